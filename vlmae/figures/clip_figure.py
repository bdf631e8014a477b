"""Picture of a clip inside the model: mask, kept patches, selected frames, reconstruction."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Int, PyTree, UInt8
from PIL import Image, ImageDraw, ImageOps
from PIL.Image import Image as Picture

from data_pipelines.schema.records import Batch
from vlmae.config.experiment import ExperimentConfig
from vlmae.config.tree import override
from vlmae.figures.answer_page import BORDER, MARGIN, TITLE_SIZE, enlarged, font, stack, text_line
from vlmae.models.embeddings import denormalize_pixels, unpatchify
from vlmae.models.frame_selector import FrameChoice
from vlmae.models.video_encoder import VideoFeatures
from vlmae.models.video_language import VideoLanguageModel, build_model
from vlmae.training.features import sample_mask

HIDDEN_GRAY = 128  # of patches that are masked or pruned
LABEL_WIDTH = 170  # pixels
SELECTED_COLOR = (220, 40, 40)


class Trace(NamedTuple):
    """Intermediate results of a batch of clips and their captions, on the host."""

    patches: Float[np.ndarray, "b t n p"]  # normalized pixels
    stage_patch_ids: tuple[Int[np.ndarray, "b t _"], ...]  # visible, then kept by each stage
    removed_mask: Bool[np.ndarray, "b t n"]
    prediction: Float[np.ndarray, "b t n p"] | None  # None without MVM
    choice: FrameChoice | None  # None where the fusion reads all frames


def trace(config: ExperimentConfig, params: PyTree, batch: Batch) -> Trace:
    """Run the model with mask and keep rate of training, but without dropout and noise."""
    return jax.device_get(_tracer(config)(params, batch))


@functools.lru_cache(maxsize=4)  # evaluations during training draw the same clips again
def _tracer(config: ExperimentConfig) -> Callable[[PyTree, Batch], Trace]:
    # Masks come with training's keep rate, while dropout and noise would hide what was learned.
    keep_rate = config.model.video.sparsify.keep_rate
    model = build_model(override(config, {"model.video.sparsify.eval_keep_rate": keep_rate}))
    fuses, predicts = (config.objectives.need(x) for x in ("fuses", "removed_patches"))

    def run(model: VideoLanguageModel, batch: Batch) -> Trace:
        # By the run's seed: the same picture each time it is drawn.
        mask = sample_mask(model, batch, jax.random.key(config.seed))
        video: VideoFeatures = model.encode_video(batch.video, mask)
        text = model.encode_text(batch.text_ids, batch.text_mask)
        return Trace(
            model.patches(batch.video),
            video.stage_patch_ids,
            video.removed_mask,
            model.decode_pixels(video).pixels if predicts else None,
            model.choose_frames(video, text) if fuses else None,
        )

    return jax.jit(lambda params, batch: model.apply({"params": params}, batch, method=run))


def picture(config: ExperimentConfig, params: PyTree, batch: Batch, captions: list[str]) -> Picture:
    """Draw each clip's caption and rows of frames, see `picture_rows`."""
    traced = trace(config, params, batch)
    rows = picture_rows(config, traced)
    return stack([draw_clip(i, caption, rows, traced) for i, caption in enumerate(captions)])


def save_picture(
    config: ExperimentConfig, params: PyTree, batch: Batch, captions: list[str], path: Path
) -> None:
    """Write `picture` as a PNG."""
    picture(config, params, batch, captions).save(path)


def picture_rows(
    config: ExperimentConfig, traced: Trace
) -> list[tuple[str, UInt8[np.ndarray, "b t h w 3"]]]:
    """Make label and frames of each row: whole, masked, after each pruning stage, reconstructed.

    Args:
      config: gives patch size, layout and the blocks that prune.
      traced: the intermediate results of a batch.

    Returns:
      The rows from top to bottom. Of a tubelet the first frame is shown.
    """
    patch, layout = config.model.video.patch_size, config.model.video.layout
    side = config.data.image_size // patch
    n = side * side

    def pixels_of(patches: np.ndarray) -> np.ndarray:
        return unpatchify(patches, patch, side, layout.tubelet)[:, :: layout.tubelet]

    def frames(patches: np.ndarray, hidden: np.ndarray | None = None) -> np.ndarray:
        # From the patches that the model read, not from the file: the picture shows its input.
        pixels = denormalize_pixels(pixels_of(patches), layout)
        if hidden is None:
            return pixels
        hidden = pixels_of(np.broadcast_to(hidden[..., None], patches.shape))
        return np.where(hidden, np.uint8(HIDDEN_GRAY), pixels)

    rows = [("frames", frames(traced.patches))]
    if traced.removed_mask.any():
        visible = traced.stage_patch_ids[0].shape[2]
        rows.append((f"visible: {visible} of {n}", frames(traced.patches, traced.removed_mask)))
    stages = config.model.video.sparsify.stages
    # Not strict: without pruning the config still names its stages.
    for block, patch_ids in zip(stages, traced.stage_patch_ids[1:], strict=False):
        pruned = ~(patch_ids[..., None] == np.arange(n)).any(axis=2)
        label = f"after block {block}: {patch_ids.shape[2]}"
        rows.append((label, frames(traced.patches, pruned)))
    if traced.prediction is not None:
        label = "reconstruction"
        if not traced.removed_mask.all():
            label += "\n(seen patches pasted in)"
        rows.append((label, frames(reconstruct(config, traced))))
    return rows


def reconstruct(config: ExperimentConfig, traced: Trace) -> Float[np.ndarray, "b t n p"]:
    """Fill the masked patches with their predictions.

    A decoder trained on normalized patches predicts neither brightness nor contrast: each patch
    gets those of the true one, as in MAE's figures.
    """
    predicted, true = traced.prediction, traced.patches
    if config.model.pixel_decoder.normalize_target:
        # Sample variance and 1e-6 as in the target of MVM, which this inverts.
        std = np.sqrt(true.var(axis=-1, keepdims=True, ddof=1) + 1e-6)
        predicted = predicted * std + true.mean(axis=-1, keepdims=True)
    return np.where(traced.removed_mask[..., None], predicted, true)


def draw_clip(
    index: int, caption: str, rows: list[tuple[str, np.ndarray]], traced: Trace
) -> Picture:
    """Draw a clip's caption and rows; frames selected for the caption have a border and scores."""
    strips = [strip(label, list(frames[index])) for label, frames in rows]
    if traced.choice is not None:
        selected, scores = traced.choice.frames[index], traced.choice.scores[index]
        label = f"selected: {len(selected)} of {len(scores)}\n(red border; scores of\nthe caption)"
        strips.insert(1, strip(label, list(rows[0][1][index]), set(selected.tolist()), scores))
    return stack([text_line(caption, size=TITLE_SIZE), *strips])


def strip(
    label: str,
    frames: list[UInt8[np.ndarray, "h w 3"]],
    selected: set[int] = frozenset(),
    scores: Float[np.ndarray, " t"] | None = None,
) -> Picture:
    """Draw a label and frames side by side; selected ones with a border, scores in a corner."""
    images = [enlarged(frame) for frame in frames]
    width, height = images[0].size
    row = Image.new("RGB", (LABEL_WIDTH + len(images) * (width + MARGIN), height + MARGIN), "white")
    draw = ImageDraw.Draw(row)
    draw.multiline_text((MARGIN, height // 2), label, fill="black", font=font(), anchor="lm")
    for i, image in enumerate(images):
        if i in selected:  # drawn inside, so that all frames keep one size
            inside = ImageOps.crop(image, BORDER)
            image = ImageOps.expand(inside, BORDER, SELECTED_COLOR)
        if scores is not None:
            draw_score(image, float(scores[i]))
        row.paste(image, (LABEL_WIDTH + i * (width + MARGIN), 0))
    return row


def draw_score(image: Picture, score: float) -> None:
    """Write a score in a corner of a frame, white on black, which is read on any picture."""
    draw, place, text = ImageDraw.Draw(image), (3 * BORDER, 3 * BORDER), f"{score:+.2f}"
    left, top, right, bottom = draw.textbbox(place, text, font=font())
    draw.rectangle((left - BORDER, top - BORDER, right + BORDER, bottom + BORDER), fill="black")
    draw.text(place, text, fill="white", font=font())
