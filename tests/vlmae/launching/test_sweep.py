"""A sweep runs what is left to run, whatever happened to it before."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_experiment
from tiny_experiment import SWEEPS

from vlmae.config.experiment import ExperimentConfig
from vlmae.config.tree import override
from vlmae.launching.launch import LAUNCHER
from vlmae.launching.sweep_plan import (
    COMPLETE,
    choose_sweeps,
    directory_name,
    merge_changes,
    overruled_flags,
    plan_runs,
    run_at,
    run_state,
    short_names,
)
from vlmae.launching.sweep_run import run_or_skip
from vlmae.parallel.exit_codes import PREEMPTED
from vlmae.runs.metric_writer import read_metrics
from vlmae.runs.owner import own
from vlmae.runs.result import last_step, read_result, write_result
from vlmae.runs.workdir import write_run_metadata

NEEDS = "needs --sweep NAMES, of ratio, seed, or --sweep FIELD=VALUE,VALUE"
RATIO = "model.video.mask.ratio"
# One objective compiles several times faster than all.
QUICK = ["--objectives.vtm", "0", "--objectives.mlm", "0", "--objectives.mvm", "0"]
QUICK += ["--train.steps", "3", "--train.save-every-steps", "1"]


def test_product_and_directories():
    runs = plan_runs(SWEEPS, Path("root"))
    assert [(run.changes[RATIO], run.changes["seed"]) for run in runs] == [
        *[(0.25, 0), (0.25, 1), (1.5, 0), (1.5, 1), (0.5, 0), (0.5, 1)],
    ]
    assert [run.index for run in runs] == list(range(6))
    assert runs[1].workdir == Path("root/mask.ratio=0.25,seed=1")


def test_directories_do_not_depend_on_the_order_of_the_sweeps():
    one, other = (plan_runs(sweeps, Path()) for sweeps in (SWEEPS, SWEEPS[::-1]))
    assert {run.workdir for run in one} == {run.workdir for run in other}
    assert [run.workdir for run in one] != [run.workdir for run in other]


@pytest.mark.parametrize("launch", [[], ["--launch", "local"]])
def test_a_second_sweep_or_launcher_is_refused(run_main, tmp_path, launch):
    root = tmp_path / "sweep"
    with own(root, LAUNCHER):
        before = sorted(root.rglob("*"))
        _, message = run_main("--sweep", "seed", *launch)
        assert message.startswith(f"error: {root} is in use by process {os.getpid()} on ")
        assert sorted(root.rglob("*")) == before


def test_a_run_in_use_is_left_out_of_a_sweep(tmp_path, capsys):
    [run, *_] = plan_runs(SWEEPS, tmp_path)
    config = tiny_experiment.get_config()
    with own(run.workdir):
        assert run_or_skip(config, run, 6, ["a command that is not run"]) == "failed"
        assert [path.name for path in run.workdir.iterdir()] == ["owner"]
    assert f"is left out: {run.workdir} is in use by process" in capsys.readouterr().err


def test_sweeps_by_name():
    for words in (["seed, ratio"], ["seed", "ratio"]):
        assert choose_sweeps(SWEEPS, words) == [SWEEPS[1], SWEEPS[0]]
    with pytest.raises(ValueError, match="unknown sweep 'seeds'; there is: ratio, seed"):
        choose_sweeps(SWEEPS, ["ratio,seeds"])
    with pytest.raises(ValueError, match="unknown sweep 'seed'; there is: none"):
        choose_sweeps((), ["seed"])


def test_values_on_the_command_line():
    """Beside a sweep of the file; numbers, words, lists, and names as flags have them."""
    [ratios, *_] = sweeps = choose_sweeps(SWEEPS, [f"{RATIO}=0.5,0.75", "seed"])
    assert list(ratios()) == [{RATIO: 0.5}, {RATIO: 0.75}]
    runs = plan_runs(sweeps, Path("root"))
    assert [(run.changes[RATIO], run.changes["seed"]) for run in runs] == [
        *[(0.5, 0), (0.5, 1), (0.75, 0), (0.75, 1)],
    ]
    assert runs[0].workdir == Path("root/mask.ratio=0.5,seed=0")
    [sweep] = choose_sweeps((), ["optim.warmup-steps=10, 1e2"])
    assert list(sweep()) == [{"optim.warmup_steps": 10}, {"optim.warmup_steps": 100.0}]
    [sweep] = choose_sweeps((), ["model.video.sparsify.stages=[1],[1,2]"])
    assert [x["model.video.sparsify.stages"] for x in sweep()] == [[1], [1, 2]]
    [sweep] = choose_sweeps((), ["x=cosine,True,null"])
    assert [x["x"] for x in sweep()] == ["cosine", True, None]
    with pytest.raises(ValueError, match="--sweep seed=1,: a value is missing"):
        choose_sweeps((), ["seed=1,"])


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("optim.rate=1", "run 0 of --sweep, optim.rate=1: unknown field optim.rate"),
        (f"{RATIO}=0.5,1.5", f"run 1 of --sweep, {RATIO}=1.5: "),
        ("optim.schedule=cosine,sine", "run 1 of --sweep, optim.schedule=sine: "),
    ],
)
def test_a_mistake_on_the_command_line_starts_no_run(run_main, tmp_path, word, message):
    _, error = run_main("--sweep", word, "--workdir", str(tmp_path / "sweep"))
    assert message in error
    assert not (tmp_path / "sweep").exists()


def test_sweeps_that_contradict_each_other():
    parts = [("a", {"seed": 1, "x": 2}), ("b", {"seed": 1}), ("c", {"y": 3})]
    assert merge_changes(parts) == {"seed": 1, "x": 2, "y": 3}
    with pytest.raises(ValueError, match="sweeps a and d both set x: to 2 and to 5"):
        merge_changes([*parts, ("d", {"x": 5})])


def test_the_same_run_twice_and_no_run_at_all():
    def sweep_nothing():
        return ()

    with pytest.raises(ValueError, match="same run more than once: seed=1"):
        plan_runs([lambda: ({"seed": 1}, {"seed": 1})], Path())
    with pytest.raises(ValueError, match="sweep nothing yields no run"):
        plan_runs([SWEEPS[1], sweep_nothing], Path())


@pytest.mark.parametrize(
    ("fields", "short"),
    [
        (["model.video.mask.ratio", "seed"], ["mask.ratio", "seed"]),
        (["a.video.width", "b.video.width"], ["a.video.width", "b.video.width"]),
        (["a.b.video.width", "a.c.video.width"], ["b.video.width", "c.video.width"]),
        (["data.train.0.weight", "data.train.1.weight"], ["train.0.weight", "train.1.weight"]),
        (["b.c", "a.b.c"], ["b.c", "a.b.c"]),
    ],
)
def test_short_names(fields, short):
    assert list(short_names(fields).values()) == short


def test_names_of_directories_are_safe_and_differ():
    def name(value) -> str:
        return directory_name({"x": value}, {"x": "x"})

    assert name(1e-05) == "x=1e-05" and name(True) == "x=True"
    awkward = ["a/b", "a\\b", "a b", "../..", "a,x=1", "long" * 100, "long" * 100 + "er", "\n"]
    names = [name(value) for value in awkward]
    assert len(set(names)) == len(names)
    assert all(len(n) < 200 and not set(n[2:]) & set("/\\ ,=\n") for n in names)


@pytest.mark.parametrize("index", [-1, 6])
def test_index_out_of_range(index):
    with pytest.raises(ValueError, match=f"--index {index} is not in 0 ... 5"):
        run_at(plan_runs(SWEEPS, Path()), index)


def test_flags_that_the_sweep_overrules():
    runs = plan_runs(SWEEPS, Path())
    argv = ["--sweep", "ratio,seed", "--model.video.mask.ratio=0.5", "--optim.learning-rate", "1"]
    assert overruled_flags(runs, argv) == [RATIO]
    assert overruled_flags(runs, ["--seed", "3", "--data.seed", "4"]) == ["seed"]


def test_state_of_a_run(tmp_path):
    """Seen from its files alone, and only for the very config that they are of."""
    base = tiny_experiment.get_config()
    run = plan_runs([SWEEPS[1]], tmp_path)[0]
    assert run_state(base, run) == "not started"
    write_run_metadata(base, run.workdir)
    (run.workdir / "metrics.jsonl").write_text('{"step": 3}\n{"step": 4}\n{"step": 5, "lo')
    assert run_state(base, run) == "step 4 of 8"
    (run.workdir / "error.txt").write_text("Traceback\nValueError: no luck\n\n")
    assert run_state(base, run) == "failed at step 4 of 8: ValueError: no luck"
    write_result(run.workdir, 8, {}, 8)
    assert run_state(base, run) == COMPLETE
    assert "another config (optim.b2)" in run_state(with_field(base, "optim.b2", 0.9), run)
    assert run_state(with_field(base, "train.steps", 9), run).startswith("failed at step 4 of 9")
    write_run_metadata(with_field(base, "evaluation.rerank_top_k", 2), run.workdir)
    assert read_result(run.workdir) is None


def with_field(config: ExperimentConfig, field: str, value) -> ExperimentConfig:
    return override(config, {field: value})


@pytest.fixture
def command_line(tiny_data_dir, tmp_path) -> Callable[..., list[str]]:
    """The tiny experiment's command line in its own process; its work directory is `sweep`."""

    def command(*flags: str) -> list[str]:
        where = ["--data.data-dir", str(tiny_data_dir), "--workdir", str(tmp_path / "sweep")]
        return [sys.executable, tiny_experiment.__file__, *where, *QUICK, *flags]

    return command


@pytest.fixture
def run_main(command_line, monkeypatch, capsys) -> Callable[..., tuple[str, str]]:
    """Runs the command line in this process: (stdout, stderr or the message of the exit)."""

    def run(*flags: str) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", command_line(*flags)[1:])
        message = ""
        try:
            tiny_experiment.main(tiny_experiment.get_config, sweeps=SWEEPS)
        except SystemExit as end:
            message = str(end.code)
        out, err = capsys.readouterr()
        return out, err + message

    return run


def test_list_touches_nothing(run_main, tmp_path):
    out, err = run_main("--sweep", "ratio,seed", "--list", "--seed", "4")
    rows = out.splitlines()
    assert len(rows) == 7 and rows[0].split() == [
        "index",
        "overrides",
        "work",
        "directory",
        "state",
    ]
    assert rows[2].startswith(f"1      {RATIO}=0.25 seed=1  ")
    assert rows[2].endswith(f"{tmp_path}/sweep/mask.ratio=0.25,seed=1  not started")
    assert "refused: --model.video.mask.ratio" in rows[3] and "1.5" in rows[3]
    assert err == "note: the sweep sets seed, so its flag is not used\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--sweep", "rato"],
            "error: unknown sweep 'rato'; there is: ratio, seed; or give values: FIELD=VALUE,VALUE",
        ),
        (["--sweep", "seed", "--index", "2"], "error: --index 2 is not in 0 ... 1"),
        (["--list"], f"error: --list {NEEDS}"),
        (["--index", "0"], f"error: --index {NEEDS}"),
    ],
)
def test_mistakes_on_the_command_line(run_main, tmp_path, flags, message):
    assert run_main(*flags) == ("", message)
    assert list(tmp_path.iterdir()) == []


def wait_for(condition: Callable[[], object], secs: float = 120) -> None:
    end = time.monotonic() + secs
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


def steps_saved(workdir: Path) -> int:
    """The step of the newest whole checkpoint."""
    names = [path.name for path in (workdir / "checkpoints").glob("*")]
    return max((int(name) for name in names if name.isdigit()), default=0)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_stopped_and_started_again(command_line, script_env, tmp_path):
    """The same command three times: killed, then interrupted, in the first run; then complete."""
    long = ["--train.steps", "150", "--train.save-every-steps", "10"]
    command, first = command_line("--sweep", "seed", *long), tmp_path / "sweep" / "seed=0"

    def stop_after(step: int, how: signal.Signals) -> subprocess.Popen:
        with (tmp_path / "log").open("w") as log:
            sweep = subprocess.Popen(command, env=script_env, stdout=log, stderr=log)
        wait_for(lambda: steps_saved(first) >= step)
        sweep.send_signal(how)
        sweep.wait(timeout=60)
        wait_for(lambda: is_quiet(first / "metrics.jsonl"))  # the run has ended with its sweep
        assert step <= last_step(read_metrics(first)) < 150
        return sweep

    assert stop_after(10, signal.SIGKILL).returncode == -signal.SIGKILL
    assert stop_after(steps_saved(first) + 10, signal.SIGINT).returncode == 130
    before = steps_saved(first)
    assert stop_after(before + 10, signal.SIGTERM).returncode == PREEMPTED
    assert steps_saved(first) % 10 or steps_saved(first) > before + 10  # of the step it was told in
    log = (tmp_path / "log").read_text()
    assert "continuing from step" in log and "the same command goes on from here" in log
    assert log.endswith(
        "sweep of 2 runs: 0 complete, 0 failed, 0 already complete, 2 not finished\n"
    )
    done = subprocess.run(command, env=script_env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("continuing from step") == 1
    for name in ("seed=0", "seed=1"):
        lines = read_metrics(first.with_name(name))
        assert [line["step"] for line in lines if "loss/total" in line] == list(range(1, 151))
        assert read_result(first.with_name(name))["step"] == 150


def is_quiet(path: Path) -> bool:
    """True if a file that grows all the time has not grown for a second."""
    before = path.stat().st_size
    time.sleep(1)
    return path.stat().st_size == before


@pytest.mark.slow  # two runs that compile; test_run_values.py compares their programs
@pytest.mark.timeout(600)
def test_runs_that_differ_in_values_alone_share_their_programs(command_line, script_env, tmp_path):
    words = ["optim.learning-rate=1e-3,1e-2", "objectives.vtc=2.0"]
    env = script_env | {"HOME": str(tmp_path)}
    del env["JAX_COMPILATION_CACHE_DIR"]
    done = subprocess.run(command_line("--sweep", *words), env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    programs = [path.name for path in (tmp_path / ".cache/vlmae/programs").rglob("jit_*-cache")]
    assert len([name for name in programs if name.startswith("jit_step-")]) == 1, programs
    losses = [
        next(line["loss/total"] for line in read_metrics(workdir) if line["step"] == 3)
        for workdir in sorted((tmp_path / "sweep").glob("*learning_rate=*"))
    ]
    assert len({*losses}) == 2, "the program reads the rate"


@pytest.mark.timeout(600)
def test_a_failed_run_does_not_stop_the_others(command_line, script_env, tmp_path):
    command, root = command_line("--sweep", "ratio"), tmp_path / "sweep"
    done = subprocess.run(command, env=script_env, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == (
        "sweep of 3 runs: 2 complete, 1 failed, 0 already complete"
    )
    broken = "--model.video.mask.ratio must be"
    assert f"failed: UserError: {broken}" in done.stderr
    assert "Traceback" not in done.stderr
    assert broken in (root / "mask.ratio=1.5" / "error.txt").read_text()
    for name in ("mask.ratio=0.25", "mask.ratio=0.5"):
        result = read_result(root / name)
        assert result["step"] == 3 and result["metrics"]["retrieval/num_clips"] == 12
        assert result["cost"]["total_flops"] == 3 * 8 * result["cost"]["flops_per_clip"] > 0
    before = {path: path.stat().st_mtime_ns for path in root.rglob("metrics.jsonl")}
    again = subprocess.run(command, env=script_env, capture_output=True, text=True)
    assert again.returncode == 1
    assert again.stdout.splitlines()[-1] == (
        "sweep of 3 runs: 0 complete, 1 failed, 2 already complete"
    )
    assert len(before) == 2
    assert before == {path: path.stat().st_mtime_ns for path in root.rglob("metrics.jsonl")}
