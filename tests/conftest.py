"""What all tests share: the device they run on and a cache of compiled functions."""

import getpass
import os
import tempfile
from pathlib import Path

import jax

# Programs here are compiled once and run a few times: without these, XLA takes three times longer.
FAST_COMPILE = ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
if jax.__version_info__ < (0, 11):  # later ones end the process at a flag they do not know
    FAST_COMPILE.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FAST_COMPILE]).strip()


def pytest_configure(config):
    """Before any test module is imported: simulated or real devices, compilation cache."""
    if "not gpu" in config.option.markexpr:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])
    cache = Path(tempfile.gettempdir()) / f"vlmae-tests-{getpass.getuser()}"
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
