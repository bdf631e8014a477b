"""A disk that is full in the middle of a run, on a small file system of its own (Linux)."""

import subprocess

import pytest
from killed_runs import Killed
from run_checks import assert_same_run

# In a mount namespace of its own, so that nothing of it outlives the test.
SCRIPT = """
set -e
disk=$1; out=$2; shift 2
mount -t tmpfs -o size=1500k tmpfs "$disk"
code=0; "$@" > "$out/log" 2> "$out/err" || code=$?
mount -o remount,size=64m "$disk"
"$@" > "$out/log" 2>&1
cp -r "$disk/run" "$out/done"
exit $code
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_goes_on_when_there_is_room_again(tiny_data_dir, tmp_path, script_env):
    """One line, and then a run that is equal to an unbroken one."""
    disk, out = tmp_path / "disk", tmp_path / "out"
    disk.mkdir(), out.mkdir()
    inside = ["unshare", "--map-root-user", "--mount"]
    mount = ["mount", "-t", "tmpfs", "tmpfs", str(disk)]
    if subprocess.run([*inside, *mount], capture_output=True).returncode:
        pytest.skip("this user cannot mount a file system")
    flags = {"train.steps": 12, "train.save_every_steps": 2, "train.keep_checkpoints": 3}
    unbroken = Killed(tiny_data_dir, tmp_path / "unbroken", script_env, **flags)
    unbroken.run()
    run = Killed(tiny_data_dir, disk / "run", script_env, **flags)
    command = [*inside, "sh", "-c", SCRIPT, "sh", str(disk), str(out), *run.command]
    done = subprocess.run(command, env=script_env, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    [line] = (out / "err").read_text().splitlines()
    assert line.startswith(f"error: {disk}/run cannot be written: No space left on device. ")
    assert "continuing from step" in (out / "log").read_text()
    assert_same_run(out / "done", unbroken.workdir)
