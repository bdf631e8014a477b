"""Settings of JAX on GPUs where its defaults are plainly not right for training."""

import os

from vlmae.parallel.malloc import may_have_accelerator

MEMORY_FRACTION = "XLA_PYTHON_CLIENT_MEM_FRACTION"
# JAX takes 0.75 of a GPU's memory, as others may need some. A training run has its GPU alone; what
# is left is for CUDA, cuDNN and NCCL, which take theirs beside JAX.
OUR_FRACTION = 0.9
# Variables that decide what is compiled and how fast it is; they go into environment.json.
RECORDED = (
    "XLA_FLAGS",
    MEMORY_FRACTION,
    "XLA_PYTHON_CLIENT_PREALLOCATE",
    "XLA_PYTHON_CLIENT_ALLOCATOR",
    "JAX_COMPILATION_CACHE_DIR",
    "JAX_DEFAULT_MATMUL_PRECISION",
    "JAX_PLATFORMS",
    "NVIDIA_TF32_OVERRIDE",
    "CUDA_VISIBLE_DEVICES",
)


def memory_fraction() -> float:
    """Return the share of a GPU's memory that a run takes."""
    return float(os.environ.get(MEMORY_FRACTION, OUR_FRACTION))


def take_gpu_memory() -> None:
    """Take `OUR_FRACTION` of a GPU's memory, unless the environment says otherwise.

    Call this before JAX looks for devices. It does nothing where JAX finds CPUs alone.
    """
    if may_have_accelerator():
        os.environ.setdefault(MEMORY_FRACTION, str(OUR_FRACTION))


def recorded_settings() -> dict[str, str]:
    """Return the variables of `RECORDED` that are set."""
    return {name: os.environ[name] for name in RECORDED if name in os.environ}
