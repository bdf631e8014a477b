"""A real SLURM of one node, for tests: Debian's packages unpacked, nothing installed.

Controller and node daemon run as the user who runs the tests, without authentication, and listen
on free ports.
"""

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

PACKAGES = (
    *("slurm-wlm-basic-plugins", "slurm-client", "slurmctld", "slurmd"),
    *("libmunge2", "libhwloc15", "liblua5.1-0"),
)
CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={controller_port}
SlurmdPort={node_port}
AuthType=auth/none
CredType=cred/none
# A job that is queued again waits for its old credentials to expire.
AuthInfo=cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
PluginDir={plugins}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=30
NodeName=localhost NodeHostname={host} NodeAddr=127.0.0.1 CPUs=4 State=UNKNOWN
PartitionName=tests Nodes=localhost Default=YES MaxTime=INFINITE State=UP
"""


class NoSlurm(RuntimeError):
    """SLURM cannot be had here; says why."""


def unpacked() -> Path:
    """The folder with the unpacked packages, which are fetched on first use.

    Raises:
      NoSlurm: there is no apt-get, or it cannot get them.
    """
    root = Path(tempfile.gettempdir()) / f"vlmae-slurm-{getpass.getuser()}"
    if root.exists():
        return root
    if not (shutil.which("apt-get") and shutil.which("dpkg")):
        raise NoSlurm("SLURM comes from Debian's packages, but there is no apt-get and dpkg")
    with tempfile.TemporaryDirectory() as folder:
        debs, part = Path(folder), root.with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)
        run(["apt-get", "download", *PACKAGES], cwd=debs)
        for deb in debs.glob("*.deb"):
            run(["dpkg", "-x", str(deb), str(part)])
        part.rename(root)
    return root


def run(command: list[str], **options) -> str:
    """Output of a command; raises NoSlurm with its last line if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, **options)
    if done.returncode:
        reason = (done.stderr.strip() or "no message").splitlines()[-1]
        raise NoSlurm(f"{command[0]}: {reason}")
    return done.stdout


@contextlib.contextmanager
def slurm_node(folder: Path) -> Iterator[dict[str, str]]:
    """A running SLURM; yields the environment in which sbatch and the like find it.

    Args:
      folder: for configuration, state and logs.

    Raises:
      NoSlurm: it cannot be had, or does not start.
    """
    root = unpacked()
    plugins = next(root.glob("usr/lib/*/slurm-wlm"))
    (folder / "slurm.conf").write_text(
        CONF.format(
            folder=folder,
            host=socket.gethostname(),
            user=getpass.getuser(),
            controller_port=free_port(),
            node_port=free_port(),
            plugins=plugins,
        )
    )
    for name in ("state", "spool"):
        (folder / name).mkdir()
    env = os.environ | {
        "SLURM_CONF": str(folder / "slurm.conf"),
        "PATH": f"{root}/usr/bin:{os.environ['PATH']}",
        "LD_LIBRARY_PATH": f"{plugins}:{plugins.parent}:{os.environ.get('LD_LIBRARY_PATH', '')}",
    }
    sbin = {name: next(root.glob(f"usr/sbin/{name}*")) for name in ("slurmctld", "slurmd")}
    stepd = next(root.glob("usr/sbin/slurmstepd*"))
    commands = [[sbin["slurmctld"], "-D"], [sbin["slurmd"], "-D", "-d", stepd, "-N", "localhost"]]
    with contextlib.ExitStack() as stack:
        for command in commands:
            daemon = subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL)
            stack.callback(stop, daemon)
        wait_until_up(env, folder)
        yield env
        subprocess.run(["scancel", "--user", getpass.getuser(), "--full"], env=env)
        subprocess.run(["scancel", "--user", getpass.getuser()], env=env)


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def stop(daemon: subprocess.Popen) -> None:
    """Ends a daemon."""
    daemon.terminate()
    try:
        daemon.wait(timeout=20)
    except subprocess.TimeoutExpired:
        daemon.kill()


def wait_until_up(env: dict[str, str], folder: Path, secs: float = 60) -> None:
    """Returns when the node takes jobs; raises NoSlurm if it does not."""
    end = time.monotonic() + secs
    while time.monotonic() < end:
        done = subprocess.run(
            ["sinfo", "--noheader", "--format=%T"], env=env, capture_output=True, text=True
        )
        if done.stdout.strip() == "idle":
            return
        time.sleep(0.5)
    logs = [folder / "slurmctld.log", folder / "slurmd.log"]
    last = [path.read_text().splitlines()[-3:] for path in logs if path.exists()]
    raise NoSlurm(f"the node is not up after {secs:.0f} s: {done.stdout}{done.stderr} {last}")
