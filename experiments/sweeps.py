"""Sweeps shared by experiments. The last line of an experiment file names those it offers."""

from collections.abc import Iterator

Changes = dict[str, object]  # dotted field names -> values

# What SMAUG saves by beside the mask, switched off.
UNPRUNED: Changes = {
    "model.video.sparsify.keep_rate": 1.0,
    "model.selector.kind": "none",
    "model.pixel_decoder.target_ratio": 0.0,
}


def sweep_video_ratio() -> Iterator[Changes]:
    """Vary the masking ratio of patches; 0 removes none, and leaves MVM nothing to reconstruct."""
    yield {"model.video.mask.ratio": 0.0, "objectives.mvm": 0.0}
    for ratio in (0.25, 0.5, 0.65, 0.75, 0.9):
        yield {"model.video.mask.ratio": ratio}


def sweep_text_ratio() -> Iterator[Changes]:
    """Vary the masking ratio of words in MLM."""
    for ratio in (0.15, 0.3, 0.5, 0.7):
        yield {"objectives.mlm_ratio": ratio}


def sweep_keep_rate() -> Iterator[Changes]:
    """Vary the fraction of tokens that each pruning stage keeps; 1 prunes nothing."""
    for rate in (1.0, 0.85, 0.7, 0.5):
        yield {"model.video.sparsify.keep_rate": rate}


def sweep_frames_kept() -> Iterator[Changes]:
    """Vary the number of frames that the text-guided selector keeps for the fusion."""
    for frames in (1, 2, 3, 4):
        yield {"model.selector.kind": "mlp", "model.selector.frames": frames}


def sweep_method() -> Iterator[Changes]:
    """Compare dense, masked, and all of SMAUG.

    All of SMAUG adds token pruning, half of the frames in the fusion, and half of the removed
    patches as targets of MVM.
    """
    masked = {"model.video.mask.ratio": 0.65}
    yield UNPRUNED | {"model.video.mask.ratio": 0.0, "objectives.mvm": 0.0}
    yield UNPRUNED | masked
    yield masked | {
        "model.video.sparsify.keep_rate": 0.7,
        "model.selector.kind": "mlp",
        "model.pixel_decoder.target_ratio": 0.5,
    }


def sweep_fusion() -> Iterator[Changes]:
    """Compare the fusions: multiway, concatenation, cross-attention."""
    for kind in ("multiway", "concat", "cross_attention"):
        yield {"model.fusion.kind": kind}


def sweep_pooling() -> Iterator[Changes]:
    """Compare the initial latents of the sampler; `none` is a plain resampler."""
    for kind in ("block", "global", "mean", "attention", "none"):
        yield {"model.fusion.sampler.pooling": kind}


def sweep_mcm() -> Iterator[Changes]:
    """Compare training without multiple choice modeling and with both kinds of it."""
    yield {"objectives.mcm": 0.0}
    for kind in ("concat", "score"):
        yield {"objectives.mcm": 1.0, "objectives.mcm_kind": kind}


def sweep_seed() -> Iterator[Changes]:
    """Repeat with three seeds."""
    for seed in (0, 1, 2):
        yield {"seed": seed}


SWEEPS = (
    sweep_video_ratio,
    sweep_text_ratio,
    sweep_keep_rate,
    sweep_frames_kept,
    sweep_method,
    sweep_seed,
)
