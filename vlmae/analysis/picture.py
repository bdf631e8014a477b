"""What the model does with a clip, in one image: mask, surviving patches, frames, repainting."""

from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Int, PyTree, UInt8
from PIL import Image, ImageDraw, ImageOps
from PIL.Image import Image as Picture

from data_pipelines.records import Batch
from vlmae.config import ExperimentConfig
from vlmae.config_tree import override
from vlmae.models.embeddings import denormalize_pixels, unpatchify
from vlmae.models.frame_selector import FrameChoice
from vlmae.models.video_encoder import VideoFeatures
from vlmae.models.video_language import VideoLanguageModel, build_model
from vlmae.objectives import sample_mask

HIDDEN_GRAY = 128
MARGIN, LABEL_WIDTH, TITLE_HEIGHT, BORDER = 4, 150, 20, 3  # pixels
MIN_FRAME_SIDE = 96  # smaller frames are enlarged by whole pixels
CHOSEN_COLOR = (220, 40, 40)


class Trace(NamedTuple):
    """Everything the model did with a batch of clips and their captions, on the host."""

    patches: Float[np.ndarray, "b t n p"]  # normalized pixels
    stage_places: tuple[Int[np.ndarray, "b t _"], ...]  # entered, then after each thinning stage
    removed_mask: Bool[np.ndarray, "b t n"]
    painted: Float[np.ndarray, "b t n p"] | None  # None without MVM
    choice: FrameChoice | None  # None where the fusion reads all frames


def trace(config: ExperimentConfig, params: PyTree, batch: Batch) -> Trace:
    """Runs the model as in training (mask, training's keep rate), but without dropout and noise."""
    keep_rate = config.model.video.sparsify.keep_rate
    model = build_model(override(config, {"model.video.sparsify.eval_keep_rate": keep_rate}))
    fuses = config.objectives.vtm or config.objectives.mlm

    def run(model: VideoLanguageModel, batch: Batch) -> Trace:
        mask = sample_mask(model, batch, jax.random.key(config.seed))
        video: VideoFeatures = model.encode_video(batch.video, mask)
        text = model.encode_text(batch.text_ids, batch.text_mask)
        return Trace(
            model.patches(batch.video),
            video.stage_places,
            video.removed_mask,
            model.decode_pixels(video).pixels if config.objectives.mvm else None,
            model.choose_frames(text, video) if fuses else None,
        )

    run_model = jax.jit(lambda params, batch: model.apply({"params": params}, batch, method=run))
    return jax.device_get(run_model(params, batch))


def picture(config: ExperimentConfig, params: PyTree, batch: Batch, captions: list[str]) -> Picture:
    """For each clip its caption, and a row of frames for each thing the model does with it."""
    traced = trace(config, params, batch)
    rows = picture_rows(config, traced)
    return stack([draw_clip(i, caption, rows, traced) for i, caption in enumerate(captions)])


def save_picture(
    config: ExperimentConfig, params: PyTree, batch: Batch, captions: list[str], path: Path
) -> None:
    """Writes `picture` as a PNG."""
    picture(config, params, batch, captions).save(path)


def picture_rows(
    config: ExperimentConfig, traced: Trace
) -> list[tuple[str, UInt8[np.ndarray, "b t h w 3"]]]:
    """Label and frames of each row: whole, masked, after each stage, painted.

    Where the decoder was trained on normalized patches, its output has no brightness and contrast
    of its own: each predicted patch gets those of the true patch, as MAE's pictures do.
    """
    patch, layout = config.model.video.patch_size, config.model.video.layout
    side = config.data.image_size // patch
    n = side * side

    def pixels_of(patches: np.ndarray) -> np.ndarray:  # of the first frame of each tubelet
        return unpatchify(patches, patch, side, layout.tubelet)[:, :: layout.tubelet]

    def frames(patches: np.ndarray, hidden: np.ndarray | None = None) -> np.ndarray:
        pixels = denormalize_pixels(pixels_of(patches), layout)
        if hidden is None:
            return pixels
        hidden = pixels_of(np.broadcast_to(hidden[..., None], patches.shape))
        return np.where(hidden, np.uint8(HIDDEN_GRAY), pixels)

    rows = [("frames", frames(traced.patches))]
    if traced.removed_mask.any():
        visible = traced.stage_places[0].shape[2]
        rows.append((f"seen: {visible} of {n}", frames(traced.patches, traced.removed_mask)))
    stages = config.model.video.sparsify.stages
    for block, places in zip(stages, traced.stage_places[1:], strict=False):
        gone = ~(places[..., None] == np.arange(n)).any(axis=2)
        label = f"after block {block}: {places.shape[2]}"
        rows.append((label, frames(traced.patches, gone)))
    if traced.painted is not None:
        rows.append(("reconstruction", frames(paint(config, traced))))
    return rows


def paint(config: ExperimentConfig, traced: Trace) -> Float[np.ndarray, "b t n p"]:
    """Visible patches as given, removed ones as predicted."""
    predicted, true = traced.painted, traced.patches
    if config.model.pixel_decoder.normalize_target:
        std = np.sqrt(true.var(axis=-1, keepdims=True, ddof=1) + 1e-6)
        predicted = predicted * std + true.mean(axis=-1, keepdims=True)
    return np.where(traced.removed_mask[..., None], predicted, true)


def draw_clip(
    index: int, caption: str, rows: list[tuple[str, np.ndarray]], traced: Trace
) -> Picture:
    """One clip: its caption above; the frames chosen for it are framed, with their scores."""
    strips = [strip(label, list(frames[index])) for label, frames in rows]
    if traced.choice is not None:
        chosen, scores = traced.choice.frames[index], traced.choice.scores[index]
        label = f"chosen: {len(chosen)} of {len(scores)}"
        strips.insert(1, strip(label, list(rows[0][1][index]), set(chosen.tolist()), scores))
    title = Image.new("RGB", (strips[0].width, TITLE_HEIGHT), "white")
    ImageDraw.Draw(title).text((MARGIN, MARGIN), caption, fill="black")
    return stack([title, *strips])


def strip(
    label: str,
    frames: list[UInt8[np.ndarray, "h w 3"]],
    chosen: set[int] = frozenset(),
    scores: Float[np.ndarray, " t"] | None = None,
) -> Picture:
    """A label and frames side by side; chosen ones with a border, scores in a corner."""
    scale = max(1, MIN_FRAME_SIDE // len(frames[0]))
    images = [Image.fromarray(frame.repeat(scale, 0).repeat(scale, 1)) for frame in frames]
    width, height = images[0].size
    row = Image.new("RGB", (LABEL_WIDTH + len(images) * (width + MARGIN), height + MARGIN), "white")
    ImageDraw.Draw(row).text((MARGIN, height // 2), label, fill="black")
    for i, image in enumerate(images):
        if i in chosen:
            inside = ImageOps.crop(image, BORDER)
            image = ImageOps.expand(inside, BORDER, CHOSEN_COLOR)
        if scores is not None:
            ImageDraw.Draw(image).text((2 * BORDER, 2 * BORDER), f"{scores[i]:+.2f}", fill="white")
        row.paste(image, (LABEL_WIDTH + i * (width + MARGIN), 0))
    return row


def stack(images: list[Picture]) -> Picture:
    """Images below one another."""
    height = sum(image.height for image in images)
    whole = Image.new("RGB", (max(image.width for image in images), height), "white")
    top = 0
    for image in images:
        whole.paste(image, (0, top))
        top += image.height
    return whole
