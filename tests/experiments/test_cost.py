"""The cost benchmark: what it compares are the steps it says, and its ratios are pairwise."""

import jax
import pytest

from experiments.benchmarks import cost
from vlmae.config.tree import override
from vlmae.ops.masking import num_keep
from vlmae.training.step import make_init


def program(flops: float, temporary_bytes: int) -> cost.Program:
    return cost.Program(
        run=None,
        values=None,
        init=None,
        flops=flops,
        temporary_bytes=temporary_bytes,
        compile_secs=0.0,
    )


def test_ratios_compare_steps_of_one_round():
    programs = {"dense": program(8e9, 4 * 2**30), "sparse": program(2e9, 2**30)}
    times = {"dense": [4.0, 8.0, 3.0], "sparse": [2.0, 2.0, 2.0]}
    row = cost.row("S", "sparse", programs, times, batch_size=4)
    assert (row["gflops_per_clip"], row["flops_ratio"]) == (0.5, 4.0)
    assert (row["temporary_gib"], row["memory_ratio"]) == (1.0, 4.0)
    assert row["secs_per_clip"] == 0.5
    assert (row["time_ratio"], row["time_ratio_range"]) == (2.0, [1.5, 4.0])
    assert "| S/16 | sparse | 0 | 4.00 | 1.00 | 4.00 | 0.50 | 2.00 (1.50-4.00) |" in (
        cost.format_table([row])
    )


@pytest.mark.parametrize("size", ["S", "B"])
def test_every_variant_builds_and_sees_the_tokens_of_its_name(size):
    base = cost.base_config(size, batch_size=2, dtype="float32")
    seen = {}
    for name, changes in cost.PARTS.items():
        config = override(base, changes)
        jax.eval_shape(make_init(config), 0)
        patches = (config.data.image_size // config.model.video.patch_size) ** 2
        seen[name] = num_keep(patches, config.model.video.mask.ratio)
    assert list(seen.values()) == [195, 195, 68, 68, 68, 68]


def test_adapters_train_less_than_everything():
    base = cost.base_config("S", batch_size=2, dtype="float32")
    states = {}
    for name, changes in cost.ADAPTERS.items():
        state = jax.eval_shape(make_init(override(base, changes)), 0)
        states[name] = sum(x.size for x in jax.tree.leaves(state.opt_state))
    full, side, inline, none = states.values()
    assert none < side == inline < 0.7 * full
