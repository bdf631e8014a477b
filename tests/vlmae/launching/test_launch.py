"""Launching: what SLURM is asked for, what a job does, and a queue of one machine."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import typing
from pathlib import Path

import pytest

from data_pipelines.schema.checks import UserError
from vlmae.launching import job_record, launch, local_scheduler, task
from vlmae.launching.child_process import describe_exit, run_child
from vlmae.launching.job_record import (
    JobRecord,
    ask_queue,
    is_active,
    process_exists,
    read_job,
    read_queue,
    write_job,
)
from vlmae.launching.launch import without_launch_flags
from vlmae.launching.status import find_statuses
from vlmae.launching.submission import LaunchConfig, LaunchedRun
from vlmae.parallel.exit_codes import PREEMPTED
from vlmae.runs.heartbeat import read_beats
from vlmae.runs.result import last_error
from vlmae.runs.summary import find_runs

# One objective compiles several times faster than all.
QUICK = ["--objectives.vtm", "0", "--objectives.mlm", "0", "--objectives.mvm", "0"]
QUICK += ["--train.steps", "10", "--train.save-every-steps", "5"]
SUBMITTED = "echo Submitted batch job 12\n"


@pytest.mark.parametrize(
    ("argv", "kept"),
    [
        (["--launch", "slurm", "--seed", "1"], ["--seed", "1"]),
        (["--seed=1", "--launch=slurm", "--nodes=2"], ["--seed=1"]),
        (["--setup", "a b", "c", "--data.flip"], ["--data.flip"]),
        (["--gpus_per_node", "2", "--sweep", "x"], ["--sweep", "x"]),
        (["--mem-gb", "2", "--model.width", "-1"], ["--model.width", "-1"]),
    ],
)
def test_a_job_gets_the_command_without_the_flags_of_the_launch(argv, kept):
    assert without_launch_flags(["x.py", *argv]) == ["x.py", *kept]


SLURM = ["--launch", "slurm"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([*SLURM, "--nodes", "0"], "--nodes"),
        ([*SLURM, "--gpus-per-node", "-1"], "--gpus-per-node"),
        ([*SLURM, "--gpus-per-node", "3", "--tasks-per-node", "2"], "--gpus-per-node=3"),
        ([*SLURM, "--time-min", "2"], "--save-secs=120"),
        (["--nodes", "2"], "--nodes: only with --launch"),
        (["--launch", "local", "--nodes", "2"], "--nodes=2"),
    ],
)
def test_options_that_are_refused(run_tiny, flags, message):
    code, err, workdir = run_tiny(*flags)
    assert code == 1 and message in err and not workdir.exists()


def test_every_launcher_is_a_choice_and_its_jobs_can_be_watched():
    choices = typing.get_args(typing.get_type_hints(LaunchConfig)["launch"])
    assert set(choices) == {"", *launch.LAUNCHERS}
    assert launch.LAUNCHERS.keys() == job_record.ACTIVE.keys()


def test_a_record_that_cannot_be_read_is_named(tmp_path):
    write_job(tmp_path, JobRecord("cloud", "1", "host", "", (), 0.0))
    with pytest.raises(UserError, match=r"job\.json: unknown launcher 'cloud'"):
        read_job(tmp_path)
    (tmp_path / "job.json").write_text("{}")
    with pytest.raises(UserError, match=r"job\.json: command, .* is missing"):
        read_job(tmp_path)


def test_without_submitit(run_tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    code, err, workdir = run_tiny("--launch", "local")
    assert (code, err) == (1, "error: --launch needs submitit: pip install 'vlmae[cluster]'\n")
    assert not workdir.exists()


def test_without_slurm(run_tiny, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    code, err, workdir = run_tiny("--launch", "slurm")
    assert code == 1 and "--launch slurm: there is no sbatch here" in err
    assert not workdir.exists()


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """Puts commands of our own making first in the PATH: name -> a line of sh."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def add(**scripts: str) -> None:
        for name, script in scripts.items():
            path = folder / name
            path.write_text(f"#!/bin/sh\n{script}")
            path.chmod(0o755)

    return add


def make_runs(root: Path, count: int) -> list[LaunchedRun]:
    return [
        LaunchedRun(f"run {i}", root / f"seed={i}", ("python", "x.py", "--index", str(i)))
        for i in range(count)
    ]


def launch_on_slurm(commands, root: Path, runs: list[LaunchedRun], **options) -> str:
    """Launches with an sbatch that takes anything; returns the script that it was given."""
    commands(sbatch=SUBMITTED, srun="exit 1", squeue="exit 0")
    assert launch.launch(LaunchConfig("slurm", **options), runs, root) == 0
    return (root / "jobs" / "12_submission.sh").read_text()


def options_of(script: str) -> dict[str, str]:
    lines = [line.split("--", 1)[1] for line in script.splitlines() if line.startswith("#SBATCH")]
    return {name: value for name, _, value in (line.partition("=") for line in lines)}


def test_a_job_of_several_nodes(commands, tmp_path):
    root = tmp_path / "run"
    script = launch_on_slurm(
        commands,
        root,
        [LaunchedRun("the run", root, ("python", "x.py"))],
        nodes=2,
        gpus_per_node=8,
        cpus_per_task=16,
        mem_gb=200.0,
        partition="gpu",
        account="us",
        qos="high",
        time_min=600,
        save_secs=300,
        sbatch=("constraint=a100", "exclusive"),
        setup=("module load cuda",),
    )
    options = options_of(script)
    logs = {name: options.pop(name) for name in ("output", "error")}
    assert logs == {
        "output": f"{root}/jobs/%j_0_log.out",
        "error": f"{root}/jobs/%j_0_log.err",
    }
    assert options == {
        "job-name": "run",
        "nodes": "2",
        "ntasks-per-node": "1",
        "gpus-per-node": "8",
        "cpus-per-task": "16",
        "mem": "200GB",
        "partition": "gpu",
        "account": "us",
        "qos": "high",
        "time": "600",
        "signal": "USR1@300",
        "requeue": "",
        "open-mode": "append",
        "constraint": "a100",
        "exclusive": "",
        "wckey": "submitit",
    }
    after = script[script.index("# setup") :]
    assert after.index("trap : TERM USR1") < after.index("module load cuda") < after.index("srun")
    srun = next(line for line in script.splitlines() if line.startswith("srun"))
    assert "--cpus-per-task=16" in srun and "submitit.core._submit" in srun
    record = read_job(root)
    assert (record.executor, record.job, record.command) == ("slurm", "12", ("python", "x.py"))
    assert record.log == f"{root}/jobs/12_0_log.out"


def test_a_sweep_is_an_array(commands, tmp_path, capsys):
    runs = make_runs(tmp_path, 3)
    options = options_of(launch_on_slurm(commands, tmp_path, runs, max_jobs=2, tasks_per_node=4))
    assert options["array"] == "0-2%2" and options["ntasks-per-node"] == "4"
    assert options["output"] == f"{tmp_path}/jobs/%A_%a_0_log.out"
    assert not {"gpus-per-node", "partition", "mem", "account"} & set(options)
    assert [read_job(run.workdir).job for run in runs] == ["12_0", "12_1", "12_2"]
    out = capsys.readouterr().out.splitlines()
    assert out[1] == f"run 1 is job 12_1: {runs[1].workdir}"
    assert out[-1].endswith(f"to watch: vlmae status {tmp_path}")


def test_what_waits_or_runs_is_not_launched_again(commands, tmp_path, capsys):
    runs = make_runs(tmp_path, 4)
    launch_on_slurm(commands, tmp_path, runs)
    commands(squeue="echo 12_0 RUNNING; echo 12_1 FAILED; echo 12_2 PENDING", sbatch="echo job 13")
    assert launch.launch(LaunchConfig("slurm"), runs, tmp_path) == 0
    assert [read_job(run.workdir).job for run in runs] == ["12_0", "13_0", "12_2", "13_1"]
    assert f"run 2 waits or runs already (job 12_2): {runs[2].workdir}" in capsys.readouterr().out
    commands(squeue="echo slurm_load_jobs error: Unable to contact >&2; exit 1")
    with pytest.raises(ValueError, match="squeue: slurm_load_jobs error: Unable to contact"):
        launch.launch(LaunchConfig("slurm"), runs, tmp_path)
    commands(squeue="echo slurm_load_jobs error: Invalid job id specified >&2; exit 1")
    assert ask_queue([read_job(runs[0].workdir)]) == {}


def test_what_sbatch_refuses(commands, tmp_path):
    runs = make_runs(tmp_path, 2)
    commands(sbatch="echo sbatch: error: invalid partition >&2; exit 1", srun="", squeue="")
    with pytest.raises(ValueError, match="refused: sbatch: error: invalid partition"):
        launch.launch(LaunchConfig("slurm", partition="gpus"), runs, tmp_path)
    assert read_job(runs[0].workdir) is None


def test_jobs_that_have_ended_are_not_active():
    queue = read_queue("12_0 RUNNING\n12_1 TIMEOUT\n13 COMPLETING\n")
    assert queue == {"12_0": "RUNNING", "13": "COMPLETING"}
    records = [JobRecord("slurm", name, "", "", (), 0.0) for name in ("12_0", "12_1", "13", "14")]
    assert [is_active(record, queue) for record in records] == [True, False, True, False]
    assert not is_active(None, queue)


# What runs inside of a job.

LISTENS = """
import signal, sys, time
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))
signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
print("listening", flush=True)
time.sleep(60)
"""
SLEEPS = "import time; print('sleeping', flush=True); time.sleep(60)"


@pytest.mark.parametrize(
    ("script", "signum", "code"),
    [
        (LISTENS, signal.SIGUSR1, PREEMPTED),
        (LISTENS, signal.SIGTERM, 3),
        (SLEEPS, signal.SIGUSR1, PREEMPTED),  # nobody listens yet: what was saved is whole
    ],
)
def test_signals_reach_the_run(script, signum, code, tmp_path):
    ready = tmp_path / "ready"
    script = script.replace("print(", f"open({str(ready)!r}, 'w'); print(")

    def send() -> None:
        while not ready.exists():
            time.sleep(0.05)
        time.sleep(0.1)
        os.kill(os.getpid(), signum)

    threading.Thread(target=send).start()
    assert run_child([sys.executable, "-c", script]) == code


def test_exit_codes_and_environment():
    script = "import os, sys; sys.exit(int(os.environ['WANTED']))"
    assert run_child([sys.executable, "-c", script], {"WANTED": "5"}) == 5
    kills_itself = "import os; os.kill(os.getpid(), 9)"
    assert run_child([sys.executable, "-c", kills_itself]) == -9


def test_the_run_ends_with_its_job(tmp_path):
    """Whatever becomes of what watches over it."""
    pid_file = tmp_path / "pid"
    child = f"""
        import os, time
        from vlmae.launching.child_process import end_with_parent
        end_with_parent()
        open({str(pid_file)!r}, "w").write(str(os.getpid()))
        time.sleep(60)
    """
    child = textwrap.dedent(child)
    command = [sys.executable, "-c", child]
    code = f"from vlmae.launching.child_process import run_child; run_child({command!r})"
    with subprocess.Popen([sys.executable, "-c", code]) as watcher:
        wait_until(lambda: pid_file.exists() and pid_file.read_text())
        watcher.kill()
    wait_until(lambda: not process_exists(int(pid_file.read_text())))


def wait_until(condition, secs: float = 20):
    """Return what the condition gives as soon as it is true."""
    end = time.monotonic() + secs
    while not (value := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
    return value


@pytest.mark.parametrize(
    ("shown", "requeued"),
    [
        ("JobState=RUNNING Reason=None", True),
        ("JobState=COMPLETING Reason=TimeLimit", True),
        ("JobState=COMPLETING Reason=None", False),  # cancelled; or preempted, and SLURM's affair
        ("JobState=CANCELLED Reason=None", False),
    ],
)
def test_a_preempted_job_is_queued_again_but_not_a_cancelled_one(
    commands, tmp_path, shown, requeued
):
    calls = tmp_path / "calls"
    commands(scontrol=f'echo "$@" >> {calls}; echo "{shown}"')
    task.queue_again("12_3")
    expected = ["show job 12_3", "requeue 12_3"] if requeued else ["show job 12_3"]
    assert calls.read_text().splitlines() == expected


def test_a_job_that_slurm_does_not_queue_again(commands):
    commands(scontrol='[ "$1" = show ] || { echo no such job >&2; exit 1; }')
    with pytest.raises(
        task.TaskFailed, match="saved itself, but was not queued again: no such job"
    ):
        task.queue_again("12")


def test_gpus_of_slots_and_their_tasks(monkeypatch):
    options = LaunchConfig("local", gpus_per_node=2, max_jobs=2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [local_scheduler.gpus_of(options, slot) for slot in (0, 1)] == [["0", "1"], ["2", "3"]]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert [local_scheduler.gpus_of(options, slot) for slot in (0, 1)] == [["4", "5"], ["6", "7"]]
    assert local_scheduler.gpus_of(LaunchConfig("local"), 1) == []
    assert task.own_gpus(["4", "5"], 1, 2) == {"CUDA_VISIBLE_DEVICES": "5"}
    assert task.own_gpus([], 0, 1) == {"CUDA_VISIBLE_DEVICES": ""}


def test_the_tasks_of_a_local_job_find_each_other():
    flags = [task.local_addresses("local", rank, tasks=2) for rank in (0, 1)]
    assert flags[0][0] == flags[1][0] and flags[0][0].startswith("--coordinator=127.0.0.1:")
    assert [f[1:] for f in flags] == [["--num-processes=2", f"--process-id={i}"] for i in (0, 1)]
    assert task.local_addresses("local", 0, 1) == task.local_addresses("slurm", 0, 2) == []


def test_what_runs_in_a_job_imports_no_jax():
    code = "import sys, vlmae.launching.task; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# The queue of one machine, with commands that only pretend to train.

STUB = """
import hashlib, json, os, pathlib, signal, sys, time
workdir, kind, log = pathlib.Path(sys.argv[1]), sys.argv[2], open(sys.argv[3], "a", buffering=1)
log.write(f"start {workdir.name}\\n")
time.sleep(0.5)
log.write(f"end {workdir.name}\\n")
again = workdir / "again"
if kind == "fails":
    (workdir / "error.txt").write_text("ValueError: no luck\\n")
    sys.exit(1)
if kind == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if kind == "preempted" and not again.exists():
    again.touch()
    sys.exit(75)
if kind == "silent":
    sys.exit(0)
(workdir / "config.json").write_text("{}")
digest = hashlib.sha256(b"{}").hexdigest()
costs = ("flops_per_clip", "secs_per_clip", "total_flops", "total_secs")
result = {"step": 1, "metrics": {}, "cost": dict.fromkeys(costs, 1), "config_sha256": digest}
if kind == "damaged":
    del result["cost"]
(workdir / "result.json").write_text(json.dumps(result))
"""


@pytest.mark.timeout(120)
def test_a_queue_of_one_machine(tmp_path, capfd):
    kinds = ["good", "fails", "killed", "preempted", "silent", "damaged"]
    log = tmp_path / "log"
    (tmp_path / "stub.py").write_text(STUB)

    def command(workdir: Path, kind: str) -> tuple[str, ...]:
        return (sys.executable, str(tmp_path / "stub.py"), str(workdir), kind, str(log))

    runs = [LaunchedRun(f"run {k}", tmp_path / k, command(tmp_path / k, k)) for k in kinds]
    options = LaunchConfig("local", max_jobs=2, partition="gpu", mem_gb=8.0)
    code = launch.launch(options, runs, tmp_path)
    out, err = capfd.readouterr()
    assert err.startswith("note: not used by --launch local: --partition, --mem-gb\n")
    assert code == 1 and out.splitlines()[-1] == "2 complete, 4 failed"
    assert f"run preempted preempted: {tmp_path}/preempted" in out
    for kind, error in (
        ("fails", "ValueError: no luck"),
        ("killed", "killed by SIGKILL (out of memory, perhaps)"),
        ("silent", describe_exit(0)),
        ("damaged", f"{tmp_path}/damaged/result.json: cost is missing"),
    ):
        assert f"run {kind} failed: {error} (log: {tmp_path}/jobs/" in err
        assert error in (tmp_path / kind / "error.txt").read_text()
    assert most_at_once(log.read_text().splitlines()) == 2
    assert len(log.read_text().splitlines()) == 2 * 7  # one was started twice


SAVES = """
import pathlib, signal, sys, time
workdir = pathlib.Path(sys.argv[1])

def save(*_):
    time.sleep(4)  # longer than submitit waits for what it ends itself
    (workdir / "saved").touch()
    sys.exit(75)

signal.signal(signal.SIGTERM, save)
(workdir / "started").touch()
time.sleep(60)
"""
LAUNCHES = """
import sys
from pathlib import Path
from vlmae.launching.launch import launch
from vlmae.launching.submission import LaunchConfig, LaunchedRun
root = Path(sys.argv[1])
names = ("a", "b", "c")
runs = [
    LaunchedRun(name, root / name, (sys.executable, str(root / "saves.py"), str(root / name)))
    for name in names
]
sys.exit(launch(LaunchConfig("local", max_jobs=2), runs, root))
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ctrl_c_has_local_runs_save_themselves(tmp_path):
    (tmp_path / "saves.py").write_text(SAVES)
    command = [sys.executable, "-c", LAUNCHES, str(tmp_path)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, process_group=0, text=True) as launcher:
        wait_until(lambda: all((tmp_path / name / "started").exists() for name in "ab"))
        os.killpg(launcher.pid, signal.SIGINT)  # as a terminal does it: to all in the foreground
        assert launcher.wait() == 130
        assert launcher.stdout.read().endswith("0 complete, 0 failed, 3 not finished\n")
    assert [(tmp_path / name / "saved").exists() for name in "abc"] == [True, True, False]


def most_at_once(lines: list[str]) -> int:
    running = most = 0
    for line in lines:
        running += 1 if line.startswith("start") else -1
        most = max(most, running)
    return most


def test_a_local_run_that_goes_on_is_not_started_again(tmp_path, capsys):
    pretends = "import time; time.sleep(60)  # submitit"
    runs = make_runs(tmp_path, 1)
    with subprocess.Popen([sys.executable, "-c", pretends]) as process:
        wait_until(lambda: process_exists(process.pid, "submitit"))
        host = os.uname().nodename
        write_job(runs[0].workdir, JobRecord("local", str(process.pid), host, "", (), 0.0))
        assert launch.launch(LaunchConfig("local"), runs, tmp_path) == 0
        process.kill()
    assert "waits or runs already" in capsys.readouterr().out
    assert launch.idle_runs(runs) == runs
    assert json.loads((runs[0].workdir / "job.json").read_text())["executor"] == "local"


EIGHT = """
from tiny_experiment import get_config
from vlmae.cli.experiment import main


def sweep_eight():
    yield from ({"seed": seed} for seed in range(7))
    yield {"model.video.mask.ratio": 1.5}  # no ratio


main(get_config, sweeps=(sweep_eight,))
"""


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_sweep_of_which_one_run_fails_and_one_is_killed(tiny_data_dir, script_env, tmp_path):
    """Eight runs, two at a time; then the same command again."""
    root, script = tmp_path / "sweep", tmp_path / "eight.py"
    script.write_text(EIGHT)
    where = ["--workdir", str(root), "--data.data-dir", str(tiny_data_dir), "--sweep", "eight"]
    command = [sys.executable, str(script), *where, *QUICK, "--launch", "local", "--max-jobs", "2"]
    paths = [str(Path(__file__).parent), script_env.get("PYTHONPATH", "")]
    env = script_env | {"PYTHONPATH": os.pathsep.join(paths)}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as sweep:
        victim = wait_until(lambda: root.exists() and read_beats(root / "seed=3"), secs=900)[0]
        os.kill(victim.pid, signal.SIGKILL)
        assert "running" in [s.state for s in find_statuses(root, time.time())]
        assert sweep.stdout.read().splitlines()[-1] == "6 complete, 2 failed"
    assert sweep.returncode == 1
    spans = [
        (read_job(root / f"seed={i}").submitted, read_beats(root / f"seed={i}")[0].written)
        for i in range(7)
    ]
    events = [(start, "start") for start, _ in spans] + [(end, "end") for _, end in spans]
    assert most_at_once([kind for _, kind in sorted(events)]) == 2
    states = {s.name: (s.state, s.detail) for s in find_statuses(root, time.time())}
    assert states == {
        **{f"seed={seed}": ("complete", "") for seed in range(7)},
        "seed=3": ("failed", "killed by SIGKILL (out of memory, perhaps)"),
        "mask.ratio=1.5": ("failed", last_error(root / "mask.ratio=1.5")),
    }
    assert "--model.video.mask.ratio must be" in states["mask.ratio=1.5"][1]
    reported = {run.name: (run.state, run.error) for run in find_runs(root)}
    assert reported == states
    again = subprocess.run(command, env=env, capture_output=True, text=True)
    assert again.returncode == 1
    assert again.stdout.splitlines()[0] == "sweep of 8 runs: 6 already complete"
    assert again.stdout.splitlines()[-1] == "1 complete, 1 failed"
    states |= {"seed=3": ("complete", "")}
    assert {s.name: (s.state, s.detail) for s in find_statuses(root, time.time())} == states


@pytest.mark.parametrize(
    "options",
    [{"partition": "gpu\ncurl x | sh"}, {"sbatch": ("constraint=a\rb",)}, {"qos": "\x1b"}],
)
def test_an_option_of_several_lines_is_refused(options):
    """The next line of a batch script is a command."""
    with pytest.raises(UserError, match=f"--{next(iter(options))} must be one line of text"):
        LaunchConfig("slurm", **options)
