"""One picture a run: frames, what masking leaves of them, and what the decoder paints."""

from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree, UInt8

from data_pipelines.records import Batch
from vlmae.models.embeddings import denormalize_pixels, unpatchify
from vlmae.models.video_language import VideoLanguageModel
from vlmae.objectives import sample_mask

MASKED_GRAY = 128
MARGIN = 4  # pixels between frames


class Reconstruction(NamedTuple):
    """Clips as the encoder is given them and as the decoder gives them back."""

    frames: UInt8[np.ndarray, "b t h w 3"]
    masked: UInt8[np.ndarray, "b t h w 3"]  # removed patches in gray
    painted: UInt8[np.ndarray, "b t h w 3"]  # removed patches as predicted, visible ones as given


def reconstruct(
    model: VideoLanguageModel, params: PyTree, batch: Batch, seed: int = 0
) -> Reconstruction:
    """Masks a batch and paints the removed patches.

    Where the decoder was trained on normalized patches, its output has no brightness and contrast
    of its own: each predicted patch gets those of the true patch, as MAE's pictures do.
    """

    def run(model: VideoLanguageModel, batch: Batch) -> tuple[Array, Array, Array]:
        mask = sample_mask(model, batch, jax.random.key(seed))
        video = model.encode_video(batch.video, mask)
        return model.patches(batch.video), model.decode_pixels(video).pixels, video.removed_mask

    paint = jax.jit(lambda params, batch: model.apply({"params": params}, batch, method=run))
    true, predicted, removed = jax.device_get(paint(params, batch))
    if model.config.pixel_decoder.normalize_target:
        std = np.sqrt(true.var(axis=-1, keepdims=True, ddof=1) + 1e-6)
        predicted = predicted * std + true.mean(axis=-1, keepdims=True)
    painted = np.where(removed[..., None], predicted, true)
    return Reconstruction(
        np.asarray(batch.video),
        _gray_out(true, removed, model),
        _to_frames(painted, model),
    )


def save_reconstruction(result: Reconstruction, captions: list[str], path: Path) -> None:
    """Writes a PNG: for each clip its caption and three rows (frames, masked, painted)."""
    from PIL import Image, ImageDraw

    scale = max(1, 96 // result.frames.shape[2])
    blocks = []
    for i, caption in enumerate(captions):
        rows = [_row(part[i], scale) for part in result]
        title = Image.new("RGB", (rows[0].shape[1], 16), "white")
        ImageDraw.Draw(title).text((MARGIN, 2), caption, fill="black")
        blocks += [np.asarray(title), *rows]
    Image.fromarray(np.concatenate(blocks)).save(path)


def _to_frames(patches: Float[np.ndarray, "b t n p"], model: VideoLanguageModel) -> np.ndarray:
    return denormalize_pixels(unpatchify(patches, model.config.video.patch_size, model.grid[0]))


def _gray_out(
    patches: Float[np.ndarray, "b t n p"],
    removed: Bool[np.ndarray, "b t n"],
    model: VideoLanguageModel,
) -> np.ndarray:
    hidden = np.broadcast_to(removed[..., None], patches.shape)
    hidden = unpatchify(hidden, model.config.video.patch_size, model.grid[0])
    return np.where(hidden, np.uint8(MASKED_GRAY), _to_frames(patches, model))


def _row(frames: UInt8[np.ndarray, "t h w 3"], scale: int) -> UInt8[np.ndarray, "y x 3"]:
    """Frames side by side on white, enlarged by whole pixels."""
    frames = frames.repeat(scale, axis=1).repeat(scale, axis=2)
    frames = np.pad(frames, ((0, 0), (MARGIN, 0), (MARGIN, 0), (0, 0)), constant_values=255)
    return np.concatenate(list(frames), axis=1)
