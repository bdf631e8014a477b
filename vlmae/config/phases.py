"""Segments of a run: consecutive steps with one config, hence one compiled step."""

import itertools
import math
from typing import Any, NamedTuple

from data_pipelines.schema.checks import UserError
from vlmae.config.experiment import ExperimentConfig, PhaseConfig
from vlmae.config.tree import override


class Segment(NamedTuple):
    """Updates `start`, ..., `stop` - 1 of a run, counted from 0."""

    start: int
    stop: int
    config: ExperimentConfig  # without phases or a warm-up of the keep rate

    def visible_patches(self) -> float:
        """Count the patches of a clip that the last block sees, which orders segments by cost."""
        video, data = self.config.model.video, self.config.data
        frames = max(source.num_frames for source in data.train)
        ratio = 0.0 if video.mask.scheme == "none" else video.mask.ratio
        patches = frames * (data.frame_size / video.patch_size) ** 2
        return patches * (1 - ratio) * video.sparsify.keep_rate


def segments(config: ExperimentConfig) -> list[Segment]:
    """Split the steps by `train.phases`, or else by the warm-up of the keep rate.

    Shapes are static, so each different config costs a compilation (EViT anneals its keep rate
    smoothly; the steps are ours).

    Raises:
      UserError: a phase does not fit the experiment; names both.
    """
    steps, phases, sparsify = config.train.steps, config.train.phases, config.model.video.sparsify
    if phases:
        stops = [round(steps * share) for share in itertools.accumulate(p.share for p in phases)]
        changes = [phase_changes(config, phase) for phase in phases]
    else:
        rates = sparsify.warmup_rates
        ends = [math.ceil(i * sparsify.warmup_steps / len(rates)) for i in range(1, len(rates) + 1)]
        stops = [*(min(end, steps) for end in ends), steps]
        changes = [*({"model.video.sparsify.keep_rate": rate} for rate in rates), {}]
    plain = {
        "train.phases": (),
        "model.video.sparsify.warmup_rates": (),
        "model.video.sparsify.warmup_steps": 0,
    }
    found = []
    for i, (start, stop) in enumerate(itertools.pairwise([0, *stops])):
        try:
            found.append(Segment(start, stop, override(config, plain | changes[i])))
        except UserError as error:
            raise UserError(f"--train.phases.{i}: {error}") from error
    return [segment for segment in found if segment.start < segment.stop]


def phase_changes(config: ExperimentConfig, phase: PhaseConfig) -> dict[str, Any]:
    """Return the fields of the experiment that a phase sets, by dotted names."""
    changes: dict[str, Any] = {
        "model.video.mask.ratio": phase.mask_ratio,
        "model.video.sparsify.keep_rate": phase.keep_rate,
        "data.train_size": phase.train_size,
        "objectives.vtm": phase.vtm,
        "objectives.vtm_hardness": phase.vtm_hardness,
    }
    changes = {name: value for name, value in changes.items() if value is not None}
    if phase.mask_ratio == 0:  # nothing is removed, so MVM has no target
        changes |= {"model.video.mask.scheme": "none", "objectives.mvm": 0.0}
    if phase.vtm == 0:  # evaluation, which reads the match head, has the config of the whole run
        changes |= {"evaluation.rerank_top_k": 0, "evaluation.choices": 0}
    if phase.num_frames is not None:
        for i, source in enumerate(config.data.train):
            changes[f"data.train.{i}.num_frames"] = min(source.num_frames, phase.num_frames)
    return changes
