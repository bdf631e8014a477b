"""The study of the claims: its runs share a trunk, and its seconds are those of a step."""

from pathlib import Path

import pytest

from experiments.offline import claims

STUDY = (["dense", "masked", "masked_unmasked_end"], [0, 1], 250, {True: 1, False: 2})


def flags_of(command: list[str]) -> dict[str, str]:
    return dict(zip(command[1::2], command[2::2], strict=True))


def test_each_length_branches_off_a_saved_step_of_its_trunk():
    trunks, branches = {}, []
    for name, *flags in claims.commands(Path("runs"), *STUDY):
        found = flags_of([name, *flags])
        if "--train.init-step" not in found:
            trunks[found["--workdir"]] = name, found
            continue
        trunk_name, trunk = trunks[found["--train.init-from"]]  # so it has run before
        step = int(found["--train.init-step"])
        assert step % int(trunk["--train.save-every-steps"]) == 0
        assert step <= int(trunk["--train.steps"])
        assert found["--seed"] == trunk["--seed"]
        assert trunk_name == ("masked" if name.startswith("masked") else name)
        branches.append((name, found["--seed"], int(found["--train.steps"]), step))
    assert [b[2:] for b in branches if b[:2] == ("dense", "0")] == [(250, 200), (500, 400)]
    sparse = [(250, 200), (500, 400), (1000, 800)]
    assert [b[2:] for b in branches if b[:2] == ("masked_unmasked_end", "1")] == sparse


def test_seconds_of_a_step_are_the_mean_over_sources_by_weight(monkeypatch):
    """Four batches of stills for one of clips."""
    secs = {1: iter([3.0, 1.0, 2.0]), 4: iter([9.0, 8.0, 6.0])}

    def prepare_step(config, source):
        return lambda: next(secs[source.num_frames])

    monkeypatch.setattr(claims, "prepare_step", prepare_step)
    assert claims.step_seconds(["masked"], rounds=3) == {"masked": pytest.approx((6 + 4 * 1) / 5)}
