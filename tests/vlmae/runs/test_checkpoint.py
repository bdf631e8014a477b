"""Checkpoints on a disk that damages files: never other values, and the step before goes on."""

import random
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from damage import damage

from data_pipelines.schema.checks import MissingError, UserError
from data_pipelines.schema.checksum import SUMS, DamagedError
from vlmae.runs.checkpoint import SET_ASIDE, Checkpoints, load_params


def state_of(step: int) -> dict:
    """A small state; all numbers depend on the step."""
    rng = np.random.default_rng(step)
    params = {f"w{i}": rng.normal(size=(16, 24)).astype(np.float32) for i in range(4)}
    return {"step": jnp.int32(step), "params": params, "opt_state": {"m": params["w0"] + 1}}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A work directory with checkpoints of steps 4 and 8."""
    workdir = tmp_path_factory.mktemp("saved")
    with Checkpoints(workdir, keep=2) as checkpoints:
        for step in (4, 8):
            checkpoints.save(step, state_of(step))
    return workdir


@pytest.fixture
def workdir(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "run"))


ABSTRACT = jax.eval_shape(lambda: state_of(4))


def restore(workdir: Path, wanted: int | None = None) -> tuple[dict, list[int]]:
    """The state that a run would go on from, and the checkpoints that are left."""
    with Checkpoints(workdir, keep=2) as checkpoints:
        return checkpoints.restore_newest(ABSTRACT, wanted), checkpoints.all_steps()


def assert_is(state: dict, step: int) -> None:
    jax.tree.map(np.testing.assert_array_equal, state, state_of(step))


def largest(workdir: Path, step: int) -> Path:
    """The file that holds the arrays."""
    files = [path for path in (workdir / "checkpoints" / str(step)).rglob("*") if path.is_file()]
    return max(files, key=lambda path: path.stat().st_size)


def flip(path: Path) -> None:
    """Flips one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def test_the_newest_is_restored(workdir):
    state, steps = restore(workdir)
    assert_is(state, 8)
    assert steps == [4, 8] and not (workdir / SET_ASIDE).exists()


def check_random_damage(saved: Path, tmp_path: Path, seeds: range) -> None:
    """One damaged file each: restored are the values of that step or of the one before."""
    fell_back = 0
    for seed in seeds:
        rng, copy = random.Random(seed), Path(shutil.copytree(saved, tmp_path / str(seed)))
        files = sorted(path for path in (copy / "checkpoints/8").rglob("*") if path.is_file())
        damage(rng.choice(files), rng)
        state, steps = restore(copy)
        assert_is(state, steps[-1])
        fell_back += steps == [4]
        shutil.rmtree(copy)
    assert fell_back > len(seeds) / 3


def test_a_damaged_file_never_gives_other_values(saved, tmp_path):
    check_random_damage(saved, tmp_path, range(12))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_200_damaged_files_never_give_other_values(saved, tmp_path):
    check_random_damage(saved, tmp_path, range(200))


def test_the_step_before_goes_on_and_saves_again(workdir, capsys):
    path = largest(workdir, 8)
    flip(path)
    with Checkpoints(workdir, keep=2) as checkpoints:
        assert_is(checkpoints.restore_newest(ABSTRACT), 4)
        assert checkpoints.all_steps() == [4]
        checkpoints.save(8, state_of(8))  # Orbax skips steps that are not after the newest
    [line, moved] = capsys.readouterr().out.splitlines()
    assert line.startswith(f"step 8 cannot be restored: {path} is damaged: ")
    assert moved == f"set aside in {workdir / SET_ASIDE}: steps 8"
    assert (workdir / SET_ASIDE / "8" / "state").is_dir()
    assert_is(restore(workdir)[0], 8)


def test_a_step_that_is_wanted(workdir):
    state, steps = restore(workdir, wanted=4)
    assert_is(state, 4)
    assert steps == [4] and (workdir / SET_ASIDE / "8").is_dir()
    with pytest.raises(MissingError, match=r"holds no checkpoint of step 8, but of \[4\]"):
        restore(workdir, wanted=8)
    flip(largest(workdir, 4))
    with pytest.raises(DamagedError, match="is damaged"):
        restore(workdir, wanted=4)


def test_a_run_without_a_whole_checkpoint_does_not_start_anew(workdir):
    for step in (4, 8):
        flip(largest(workdir, step))
    with pytest.raises(DamagedError, match=re.escape(str(largest(workdir, 8)))):
        restore(workdir)
    assert not (workdir / SET_ASIDE).exists()
    with pytest.raises(DamagedError):
        load_params(workdir)


def test_parameters_come_from_the_step_before_too(workdir, capsys):
    path = largest(workdir, 8)
    flip(path)
    params, step = load_params(workdir)
    assert step == 4
    jax.tree.map(np.testing.assert_array_equal, params, state_of(4)["params"])
    assert f"step 8 is left out: {path} is damaged" in capsys.readouterr().err
    assert (workdir / "checkpoints" / "8").is_dir()  # reading moves nothing


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax's coroutines
@pytest.mark.parametrize("kind", ["emptied", "removed"])
@pytest.mark.parametrize("name", ["_METADATA", "manifest.ocdbt"])
def test_without_checksums(workdir, name, kind):
    """As older versions saved them: what Orbax cannot read is left out in the same way."""
    for path in workdir.rglob(SUMS):
        path.unlink()
    assert_is(restore(workdir)[0], 8)
    path = workdir / "checkpoints/8/state" / name
    path.write_bytes(b"") if kind == "emptied" else path.unlink()
    assert load_params(workdir)[1] == 4
    state, steps = restore(workdir)
    assert_is(state, 4)
    assert steps == [4]


def test_what_is_not_finite_is_refused(tmp_path):
    bad = state_of(8)
    bad["opt_state"]["m"][3, 3] = np.inf
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(8, bad)
    with pytest.raises(UserError, match="opt_state/m holds NaN or infinity"):
        restore(tmp_path)
    assert load_params(tmp_path)[1] == 8  # the parameters are
    bad["params"]["w1"][0, 0] = np.nan
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(9, bad)
    with pytest.raises(UserError, match="opt_state/m holds NaN"):
        restore(tmp_path)
    assert load_params(tmp_path)[1] == 8
