"""Devices of a run: what they are, and whether they are those that were asked for."""

from collections import Counter
from collections.abc import Mapping

import jax

from data_pipelines.schema.checks import check

# Variables by which a scheduler or a user gives GPUs to a process; these values give none.
GPU_VARIABLES = (
    "SLURM_STEP_GPUS",
    "SLURM_JOB_GPUS",
    "CUDA_VISIBLE_DEVICES",
    "ROCR_VISIBLE_DEVICES",
)
NO_GPU = ("", "-1", "NoDevFiles")


def describe_devices() -> str:
    """Describe the devices of all processes in a line: "8 x NVIDIA H100 80GB HBM3 in 2 processes".

    The kind is JAX's; devices of several kinds are listed one after the other.
    """
    kinds = Counter(device.device_kind for device in jax.devices())
    text = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
    processes = jax.process_count()
    return f"{text} in {processes} processes" if processes > 1 else text


def check_gpus(environ: Mapping[str, str]) -> None:
    """Check that JAX has found a GPU if this process was given one.

    Without its plugin for GPUs, JAX computes on the CPU and says so in a warning at most. Who wants
    that sets JAX_PLATFORMS=cpu.

    Raises:
      UserError: it has not; names the variable that gives the GPU.
    """
    if jax.default_backend() != "cpu" or (jax.config.jax_platforms or "").startswith("cpu"):
        return
    found = {name: environ.get(name, "") for name in GPU_VARIABLES}
    given = [f"{name}={value}" for name, value in found.items() if value not in NO_GPU]
    check(
        not given,
        f"this process was given GPUs ({', '.join(given)}), but jax finds the CPU alone: install "
        'its plugin (pip install "jax[cuda13]"), look at nvidia-smi, or set JAX_PLATFORMS=cpu to '
        "train on the CPU",
    )
