"""Segments of a run: which steps have which settings."""

import pytest
from helpers import SMALL

from data_pipelines.schema.checks import UserError
from data_pipelines.schema.config import SourceConfig
from vlmae.config.experiment import PhaseConfig
from vlmae.config.phases import Segment, segments
from vlmae.config.tree import override


def split(changes: dict) -> list[Segment]:
    return segments(override(SMALL, changes))


def test_without_phases_all_steps_are_one_segment():
    assert segments(SMALL) == [(0, SMALL.train.steps, SMALL)]


@pytest.mark.parametrize(
    ("warmup", "steps", "expected"),
    [
        (6, 8, [1.0, 1.0, 0.9, 0.9, 0.8, 0.8, 0.7, 0.7]),
        (4, 6, [1.0, 1.0, 0.9, 0.8, 0.7, 0.7]),
        (6, 3, [1.0, 1.0, 0.9]),  # the run ends within the warm-up
    ],
)
def test_the_keep_rate_warms_up_in_equal_parts(warmup, steps, expected):
    sparsify = {"stages": (0,), "keep_rate": 0.7, "warmup_rates": (1.0, 0.9, 0.8)}
    changes = {f"model.video.sparsify.{name}": value for name, value in sparsify.items()}
    changes |= {"model.video.sparsify.warmup_steps": warmup, "train.steps": steps}
    rates = [
        part.config.model.video.sparsify.keep_rate
        for part in split(changes)
        for _ in range(part.start, part.stop)
    ]
    assert rates == expected


def test_phases_set_the_weight_of_vtm_and_its_negatives():
    """VTC alone, then uniform negatives, then those of the run."""
    phases = (
        PhaseConfig(share=0.5, vtm=0.0),
        PhaseConfig(share=0.3, vtm_hardness=0.0),
        PhaseConfig(share=0.2),
    )
    parts = split(
        {
            "train.steps": 10,
            "train.phases": phases,
            "evaluation.rerank_top_k": 8,
            "evaluation.choices": 4,
        }
    )
    found = [part.config.objectives for part in parts]
    assert [config.weights.get("vtm") for config in found] == [None, 2.0, 2.0]
    assert [config.vtm_hardness for config in found] == [1.0, 0.0, 1.0]


def test_phases_set_ratio_size_and_frames_for_their_share():
    sources = (SourceConfig(num_frames=4), SourceConfig(num_frames=1))
    phases = (
        PhaseConfig(share=0.75, mask_ratio=0.5, train_size=8, num_frames=2),
        PhaseConfig(share=0.15),
        PhaseConfig(share=0.1, mask_ratio=0.0),
    )
    small, whole, dense = split({"train.steps": 20, "train.phases": phases, "data.train": sources})
    assert [part[:2] for part in (small, whole, dense)] == [(0, 15), (15, 18), (18, 20)]
    assert small.config.model.video.mask.ratio == 0.5
    assert (small.config.data.frame_size, whole.config.data.frame_size) == (8, 16)
    assert [source.num_frames for source in small.config.data.train] == [2, 1]
    assert whole.config == override(SMALL, {"train.steps": 20, "data.train": sources})
    # Nothing is removed, so MVM has no target; all else goes on.
    assert whole.config.objectives.mvm > 0 == dense.config.objectives.mvm
    assert dense.config.objectives.weights.keys() == {*whole.config.objectives.weights} - {"mvm"}
    patches = [part.visible_patches() for part in (small, whole, dense)]
    assert patches[0] < patches[1] < patches[2] == 4 * 16


@pytest.mark.parametrize(
    ("phases", "named"),
    [
        ([{"share": 0.5}], ["--train.phases", "0.5, not 1"]),
        ([{"share": 0.5}, {"share": 0.5, "train_size": 6}], ["phases.1", "--data.train-size=6"]),
        ([{"mask_ratio": 1.0}], ["--train.phases.0.mask-ratio"]),
    ],
)
def test_phases_that_do_not_fit_are_named(phases, named):
    with pytest.raises(UserError) as refused:
        split({"train.phases": phases})
    assert all(name in str(refused.value) for name in named)


def test_phases_and_a_warmup_of_the_keep_rate_exclude_each_other():
    sparsify = {"model.video.sparsify.stages": (0,), "model.video.sparsify.warmup_steps": 2}
    sparsify["model.video.sparsify.warmup_rates"] = (1.0,)
    with pytest.raises(UserError, match="warmup-rates"):
        split(sparsify | {"train.phases": (PhaseConfig(),)})


@pytest.mark.parametrize(
    "changes",
    [{"model.video.positions": "sincos_clip"}, {"model.video.layout.relative_bias": "layer"}],
)
def test_a_size_of_training_needs_positions_that_can_be_resized(changes):
    with pytest.raises(UserError, match=r"--data\.train-size"):
        override(SMALL, changes | {"data.train_size": 8})
    with pytest.raises(UserError, match=r"--data\.train-size"):
        override(SMALL, changes | {"train.phases": (PhaseConfig(train_size=8),)})
