"""GPUs by their published figures, for which XLA compiles without one being there.

JAX's plugin for CUDA must be installed (`pip install "jax[cuda13]"`, or its two wheels of the
plugin alone); a driver, CUDA's libraries and a GPU need not be. The program that results is the one
that such a GPU would run, but for what XLA chooses by measuring: autotuning is off.
"""

import contextlib
import os
import re
from collections.abc import Iterator
from typing import NamedTuple

import jax
from jax._src.cudnn import fused_attention_stablehlo as rules
from jax.experimental import topologies

from data_pipelines.schema.checks import UserError, check, first_line
from vlmae.parallel.gpu_settings import memory_fraction

# Before JAX looks for devices: the plugin asks libraries of CUDA for their versions, which do not
# load without a driver.
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")

GIB = 2**30
CUDNN_VERSION = 91000  # that JAX's rules for fused attention are asked about
# Options of XLA; both measure kernels on the GPU to choose one.
WITHOUT_MEASURING = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}


class Gpu(NamedTuple):
    """Published figures of a GPU (data sheet, and the tables of NVIDIA's CUDA guide)."""

    name: str
    capability: tuple[int, int]
    cores: int  # streaming multiprocessors
    units: int  # float32 units of a core
    clock_ghz: float
    memory_bytes: int  # as the driver reports it: a little less than the name says
    bytes_per_sec: float  # of its memory
    l2_bytes: int
    shared_bytes: int  # of a core; a block gets 1 KiB less
    threads: int  # of a core
    product_flops: float  # a second, of dense bfloat16 products with float32 sums
    link_bytes_per_sec: float  # to other GPUs, in one direction: NVLink, or PCIe 4.0 x16

    def target(self) -> str:
        """Write the figures as XLA's text form of a target (GpuTargetConfigProto)."""
        major, minor = self.capability
        hopper = "feature_extension: ACCELERATED_FEATURES" if major == 9 else ""
        return f"""
            gpu_device_info {{
              threads_per_block_limit: 1024 threads_per_warp: 32
              shared_memory_per_block: 49152 shared_memory_per_core: {self.shared_bytes}
              shared_memory_per_block_optin: {self.shared_bytes - 1024}
              threads_per_core_limit: {self.threads}
              core_count: {self.cores} fpus_per_core: {self.units}
              clock_rate_ghz: {self.clock_ghz}
              block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
              memory_bandwidth: {self.bytes_per_sec:.0f} l2_cache_size: {self.l2_bytes}
              device_memory_size: {self.memory_bytes}
              cuda_compute_capability {{ major: {major} minor: {minor} {hopper} }}
              registers_per_core_limit: 65536 registers_per_block_limit: 65536
            }}
            platform_name: "CUDA"
            dnn_version_info {{ major: 9 minor: 10 }}
            runtime_version {{ major: 13 }}
            device_description_str: "{self.name}"
        """


KIB, MIB = 2**10, 2**20
GPUS = {
    "h100": Gpu(
        "NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 1.98, 84942979072, 3.352e12, 50 * MIB,
        228 * KIB, 2048, 989.4e12, 450e9,
    ),
    "a100": Gpu(
        "NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 1.41, 85100068864, 2.039e12, 40 * MIB,
        164 * KIB, 2048, 311.9e12, 300e9,
    ),
    # The paper's: "about 50 NVIDIA A6000 GPU hours".
    "a6000": Gpu(
        "NVIDIA RTX A6000", (8, 6), 84, 128, 1.80, 51041271808, 0.768e12, 6 * MIB,
        100 * KIB, 1536, 154.8e12, 31.5e9,
    ),
    "l4": Gpu(
        "NVIDIA L4", (8, 9), 58, 128, 2.04, 23580639232, 0.300e12, 48 * MIB,
        100 * KIB, 1536, 121e12, 31.5e9,
    ),
}  # fmt: skip


class Target(NamedTuple):
    """Some GPUs of a kind: "h100", "8xh100" (of one node), "2x8xh100" (nodes, GPUs, kind)."""

    nodes: int
    gpus: int  # of a node
    gpu: Gpu

    @property
    def limit_bytes(self) -> int:
        """Memory of a GPU that a run takes, see `vlmae.parallel.gpu_settings`."""
        return int(memory_fraction() * self.gpu.memory_bytes)


def parse_target(text: str) -> Target:
    """Read the name of a target.

    >>> parse_target("2x8xa100")[:2]
    (2, 8)

    Raises:
      UserError: it is none; lists the kinds.
    """
    found = re.fullmatch(r"(?:(?:(\d+)x)?(\d+)x)?(\w+)", text.lower())
    check(
        found is not None and found[3] in GPUS and "0" not in (found[1], found[2]),
        f"no GPU is called {text!r}: give h100, 8xh100 or 2x8xh100 (2 nodes of 8), with one of "
        f"{', '.join(GPUS)}",
    )
    return Target(int(found[1] or 1), int(found[2] or 1), GPUS[found[3]])


def described_devices(target: Target) -> list[jax.Device]:
    """Return devices that programs can be compiled for, and that cannot run any.

    Raises:
      UserError: JAX's plugin for CUDA is not installed, or does not take the description.
    """
    nodes, gpus, gpu = target
    try:
        topology = topologies.get_topology_desc(
            gpu.name, "cuda", target_config=gpu.target(), topology=f"1x{nodes}x{gpus}"
        )
    except (NotImplementedError, RuntimeError, ValueError) as error:
        reason = first_line(error)[:300]
        raise UserError(
            f"nothing can be compiled for a GPU here ({reason}): install JAX's plugin for CUDA of "
            f"the version of jax ({jax.__version__}), pip install jax-cuda13-plugin jax-cuda13-pjrt"
        ) from error
    return topology.devices


@contextlib.contextmanager
def as_on(target: Target) -> Iterator[None]:
    """Let JAX's rules for cuDNN's attention ask about the described GPU, not the one that is here.

    They look at this machine even while a program for another one is traced, and have no argument
    to say otherwise.
    """

    def version(text: str) -> tuple[int, ...]:
        return tuple(map(int, text.split(".")))

    replaced = {
        "check_compute_capability": lambda least: target.gpu.capability >= version(least),
        "is_cuda_compute_capability_equal": lambda x: target.gpu.capability == version(x),
        "check_cudnn_version": lambda: CUDNN_VERSION,
    }
    own = {name: getattr(rules, name) for name in replaced}
    try:
        for name, function in replaced.items():
            setattr(rules, name, function)
        yield
    finally:
        for name, function in own.items():
            setattr(rules, name, function)
