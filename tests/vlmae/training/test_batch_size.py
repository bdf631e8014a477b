"""The largest batch that fits: the search, what is tried, and the command."""

import jax
import numpy as np
import pytest

from data_pipelines.schema.checks import MissingError, UserError
from vlmae.cli import experiment
from vlmae.cli.run_experiment import resolve
from vlmae.config.experiment import ExperimentConfig, MeshConfig
from vlmae.config.tree import override
from vlmae.parallel.sharding import bytes_per_device, make_mesh
from vlmae.training import batch_size as finding
from vlmae.training.batch_size import batch_sizes, largest_that_fits, try_batch
from vlmae.training.gpus import GIB, parse_target
from vlmae.training.step import abstract_batch, make_init, make_step, run_values

ONLY_VTC = {"objectives.vtm": 0.0, "objectives.mlm": 0.0, "objectives.mvm": 0.0}
FLAGS = [x for name in ONLY_VTC for x in (f"--{name}", "0")]


def search(needed, limit: int, step: int, least: int) -> tuple[int, list[int]]:
    """The answer of the search where `needed` bytes are needed, and the sizes that it tried."""
    tried = []

    def attempt(size: int) -> finding.Trial:
        tried.append(size)
        return finding.Trial(size, needed(size), needed(size) <= limit)

    return largest_that_fits(attempt, limit, step, least), tried


@pytest.mark.parametrize("step", [1, 3, 16])
@pytest.mark.parametrize("least_steps", [1, 2])
@pytest.mark.parametrize("state", [0, 1000, 10**6])
def test_two_tries_and_a_check_find_the_end_of_a_straight_line(step, least_steps, state):
    least = step * least_steps
    for rows in (*range(40), 100, 420, 1000, 1001, 30_000):
        found, tried = search(lambda size: state + 100 * size, state + 100 * rows, step, least)
        assert found == (rows // step * step if rows >= least else 0)
        assert all(size % step == 0 and size >= least for size in tried)
        assert len(set(tried)) == len(tried) <= 4


@pytest.mark.parametrize(
    "needed",
    [
        lambda size: 1000 + 100 * size + size**2 // 50,  # similarities of all rows
        lambda size: 1000 + max(40_000, 100 * size),  # the optimizer needs more than small batches
        lambda size: 1000 + 100 * size + 3000 * (size > 200),  # another algorithm from there on
    ],
    ids=["bent", "flat", "with a step"],
)
def test_where_the_line_is_bent_the_answer_fits_and_little_more_would(needed):
    for limit in (60_000, 75_000, 200_000, 500_000):
        best = max(size for size in range(1, 6000) if needed(size) <= limit)
        found, tried = search(needed, limit, 1, 1)
        assert needed(found) <= limit and found >= 0.95 * best
        assert len(tried) <= 13  # flat lines are doubled


def test_batch_sizes_suit_the_mesh_the_parts_and_the_negatives(tiny_config):
    config = override(tiny_config, {"optim.accumulate_steps": 2})
    assert batch_sizes(config, 4) == (8, 16)
    assert batch_sizes(override(config, {"objectives.vtm_scope": "global"}), 4) == (8, 8)
    assert batch_sizes(override(config, ONLY_VTC), 4) == (8, 8)


def test_of_several_keep_rates_the_largest_is_tried(tiny_config, monkeypatch):
    thinned = {"stages": (0,), "keep_rate": 0.5, "warmup_rates": (1.0, 0.75), "warmup_steps": 4}
    changes = {f"model.video.sparsify.{name}": value for name, value in thinned.items()}
    tried = []

    def try_batch(config: ExperimentConfig, mesh, init, batch, *_) -> finding.Trial:
        tried.append(config.model.video.sparsify.keep_rate)
        return finding.Trial(len(batch.valid), len(batch.valid) * GIB, len(tried) == 1)

    monkeypatch.setattr(finding, "try_batch", try_batch)
    finding.find_batch_size(override(tiny_vtc(tiny_config), changes))
    assert set(tried) == {1.0}


def test_a_program_needs_what_it_reads_writes_and_keeps_between():
    rows = jax.ShapeDtypeStruct((1000,), np.float32)

    def needed(function, **options) -> int:
        return finding.program_bytes(jax.jit(function, **options).lower(rows).compile())

    assert needed(lambda x: x + 1) == 8000
    assert needed(lambda x: x + 1, donate_argnums=0) == 4000
    assert needed(lambda x: (x[:, None] * x) @ (x[:, None] + x) @ x) > 2 * 4 * 1000**2


def test_a_step_overwrites_the_state_that_it_is_given(tiny_config):
    config, mesh = tiny_vtc(tiny_config), make_mesh(MeshConfig(), jax.devices()[:1])
    state = jax.eval_shape(make_init(config), 0)
    shapes = state, abstract_batch(config), run_values(config)
    program = make_step(config, mesh, state).lower(*shapes).compile()
    moments_and_parameters = sum(
        x.size * x.dtype.itemsize for x in jax.tree.leaves((state.params, state.opt_state))
    )
    assert program.memory_analysis().alias_size_in_bytes >= moments_and_parameters > 0


def tiny_vtc(config: ExperimentConfig) -> ExperimentConfig:
    return resolve(override(config, {**ONLY_VTC, "optim.accumulate_steps": 4}))[0]


def try_tiny(config: ExperimentConfig, size: int, limit_bytes: int) -> finding.Trial:
    """Tries a batch size of the tiny experiment on one device."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    batch = abstract_batch(config, batch_size=size)
    return try_batch(config, mesh, finding.sharded_init(config, mesh), batch, limit_bytes)


def test_a_save_on_a_cpu_needs_the_state_twice(tiny_config, monkeypatch):
    """A save decides where the step itself needs less."""
    config = tiny_vtc(tiny_config)
    monkeypatch.setattr(finding, "program_bytes", lambda compiled: 0)
    on_cpu = try_tiny(config, 4, GIB).needed_bytes
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    state = jax.tree.leaves(finding.abstract_state(config))
    assert on_cpu - try_tiny(config, 4, GIB).needed_bytes == 2 * sum(
        x.size * x.dtype.itemsize for x in state
    )


@pytest.mark.slow
def test_the_command_finds_what_just_fits(tiny_config, run_tiny, monkeypatch):
    """With exactly the memory that 24 rows need."""
    needed = try_tiny(tiny_vtc(tiny_config), 24, GIB).needed_bytes
    assert 0 < needed < GIB
    lines = []
    monkeypatch.setattr(finding, "print", lambda line, flush=True: lines.append(line), False)
    flags = ["--optim.accumulate-steps", "4", "--memory-gib", repr(needed / GIB)]
    code, err, workdir = run_tiny(*FLAGS, *flags, "--find-batch-size")
    assert (code, err) == (0, "")
    assert not workdir.exists()
    sizes = [int(line.split()[2].strip(":")) for line in lines[:-1]]
    assert sizes[0] == 4 and 24 in sizes and len(sizes) <= 5
    assert all(
        (": fits, needs" in line) == (size <= 24) for size, line in zip(sizes, lines, strict=False)
    )
    assert lines[-1] == "the largest batch, in multiples of 4: --data.batch-size 24"


def test_not_even_the_smallest_batch_fits(run_tiny):
    code, err, workdir = run_tiny(*FLAGS, "--find-batch-size", "--memory-gib", "0.00001")
    assert (code, err) == (1, "error: not even a batch of 1 fits into 1e-05 GiB a device\n")
    assert not workdir.exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--find-batch-size", "--sweep", "seed"], "not with --sweep"),
        (["--find-batch-size", "--launch", "local"], "not with --launch"),
        (["--find-batch-size", "--profile", "--index", "0"], "not with --index, --profile"),
        (["--find-batch-size", "--memory-gib", "-1"], "--memory-gib must be at least 0"),
        (["--memory-gib", "1"], "--memory-gib is only for --find-batch-size"),
        (["--for", "h100"], "--for is only for --find-batch-size"),
        (["--find-batch-size", "--for", "9xh99"], "no GPU is called '9xh99'"),
    ],
)
def test_flags_that_do_not_go_together(run_tiny, flags, message):
    code, err, workdir = run_tiny(*flags)
    assert code == 1
    assert err.startswith("error: ") and message in err and err.count("\n") == 1
    assert not workdir.exists()


def test_where_the_device_says_its_limit_a_step_is_run(tiny_config, monkeypatch):
    """And what the compiler believed to fit may not."""
    config, ended = tiny_vtc(tiny_config), []
    monkeypatch.setattr(finding, "memory_stats", lambda mesh: {"bytes_limit": GIB})
    monkeypatch.setattr(jax, "block_until_ready", lambda given: ended.append(given) or given)
    assert try_tiny(config, 4, GIB).fits
    assert not try_tiny(config, 4, 1000).fits
    [(state, metrics)] = ended
    assert state.step == 1 and metrics["loss/total"] > 0

    def run_out(batch, mesh):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes.")

    monkeypatch.setattr(finding, "put_batch", run_out)
    trial = try_tiny(config, 4, GIB)
    assert not trial.fits and trial.needed_bytes < GIB
    assert "does not fit, out of memory when run, needs" in trial.describe(GIB)


def test_other_errors_of_a_step_are_not_taken_for_lack_of_memory(tiny_config, monkeypatch):
    def fail(batch, mesh):
        raise jax.errors.JaxRuntimeError("INTERNAL: no such kernel")

    monkeypatch.setattr(finding, "memory_stats", lambda mesh: {"bytes_limit": GIB})
    monkeypatch.setattr(finding, "put_batch", fail)
    with pytest.raises(jax.errors.JaxRuntimeError, match="no such kernel"):
        try_tiny(tiny_vtc(tiny_config), 4, GIB)


def test_the_limit_of_a_cpu_is_its_share_of_the_available_memory(tmp_path, monkeypatch):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  9000 kB\nMemAvailable:    2000 kB\n")
    monkeypatch.setattr(finding, "MEMINFO", meminfo)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    monkeypatch.setattr(finding, "memory_stats", lambda mesh: {})
    assert finding.memory_limit_bytes(mesh) == 2000 * 1024
    meminfo.unlink()
    with pytest.raises(ValueError, match="give --memory-gib"):
        finding.memory_limit_bytes(mesh)


def test_for_a_described_gpu_no_data_are_needed(run_tiny, monkeypatch):
    """Words and classes that the data would give are assumed; without --for that is an error."""
    asked = []

    def resolve(config: ExperimentConfig) -> None:
        raise MissingError("no data set")

    monkeypatch.setattr(experiment, "resolve", resolve)
    monkeypatch.setattr(experiment, "find_batch_size", lambda *given: asked.append(given))
    flags = ["--find-batch-size"]
    code, err, _ = run_tiny(*flags)
    assert (code, err) == (1, "error: no data set\n") and not asked
    code, err, _ = run_tiny(*flags, "--for", "2x8xa100", "--memory-gib", "40")
    assert (code, err) == (0, "")
    [(config, memory_gib, target)] = asked
    assert config.model.text.vocab_size == 30522 and memory_gib == 40
    assert target == parse_target("2x8xa100")


def test_what_cannot_fit_is_said_before_anything_is_compiled(tiny_config, monkeypatch):
    config = override(tiny_config, {"model.text.vocab_size": 100})
    mesh, state = make_mesh(config.mesh), jax.eval_shape(make_init(config), 0)
    needed = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((state, state.params)))
    needed += 3 * bytes_per_device(abstract_batch(config), mesh)
    monkeypatch.setattr(finding, "memory_limit_bytes", lambda mesh: needed)
    finding.check_memory(config, mesh)
    monkeypatch.setattr(finding, "memory_limit_bytes", lambda mesh: needed - 1)
    with pytest.raises(UserError, match=r"batch-size=\d+: .* 3 batches .* GiB"):
        finding.check_memory(config, mesh)
