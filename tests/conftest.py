"""Shared by all tests: the device they run on, a cache of compiled functions, their markers."""

import getpass
import os
import re
import signal
import tempfile
from pathlib import Path, PurePosixPath

import hypothesis
import jax
import pytest

# Programs here are compiled once and run a few times: without these, XLA takes three times longer.
FAST_COMPILE = ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
if jax.__version_info__ < (0, 11):  # later ones end the process at a flag they do not know
    FAST_COMPILE.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FAST_COMPILE]).strip()

KINDS = ("unit", "model", "e2e")
OPTIONAL = {"slow", "gpu", "network", "slurm", "browser", "aot"}
# Folder or file -> marker of its tests. The longest path wins, a marker of the test itself first.
MARKERS = {
    ".": "unit",
    "data_pipelines/media/test_against_ffmpeg.py": "e2e",
    "data_pipelines/media/test_fuzz.py": "e2e",
    "data_pipelines/media/test_long.py": "e2e",
    "docs/test_extending.py": "e2e",
    "data_pipelines/storage/test_build.py": "e2e",
    "data_pipelines/storage/test_read_only.py": "e2e",
    "data_pipelines/storage/test_stored.py": "e2e",
    "docs/test_guide_python.py": "e2e",
    "docs/test_site.py": "e2e",
    "test_commands.py": "e2e",
    "test_fuzz_readers.py": "e2e",
    "experiments": "model",
    "experiments/test_claims.py": "unit",
    "experiments/test_decoding.py": "unit",
    "experiments/test_own_process.py": "e2e",
    "experiments/test_scale.py": "unit",
    "experiments/test_memory.py": "unit",
    "vlmae/cli": "e2e",
    "vlmae/evaluation": "model",
    "vlmae/evaluation/test_downstream.py": "e2e",
    "vlmae/evaluation/test_metrics.py": "unit",
    "vlmae/evaluation/test_ranking.py": "unit",
    "vlmae/export": "model",
    "vlmae/export/test_folders.py": "e2e",
    "vlmae/figures/test_clip_figure.py": "e2e",
    "vlmae/launching": "e2e",
    "vlmae/models": "model",
    "vlmae/parallel": "e2e",
    "vlmae/runs/test_checkpoint.py": "e2e",
    "vlmae/runs/test_model.py": "model",
    "vlmae/runs/test_old_files.py": "e2e",
    "vlmae/runs/test_owner.py": "e2e",
    "vlmae/search": "e2e",
    "vlmae/training": "model",
    "vlmae/training/test_multi.py": "e2e",
    "vlmae/training/test_position_resize.py": "unit",
    "vlmae/training/test_optim.py": "unit",
    "vlmae/training/test_compiled_step.py": "e2e",
    "vlmae/training/test_full_disk.py": "e2e",
    "vlmae/training/test_kills.py": "e2e",
    "vlmae/training/test_resume.py": "e2e",
    "vlmae/weights": "model",
}


def named_optional(config) -> set[str]:
    """Optional markers that `-m` asks for."""
    named = re.findall(r"(?<!not )\b\w+", config.option.markexpr)
    return OPTIONAL & set(named)


# The same few examples in every run, on any machine, however busy.
hypothesis.settings.register_profile(
    "vlmae", derandomize=True, max_examples=25, deadline=None, database=None
)
hypothesis.settings.load_profile("vlmae")


def pytest_configure(config):
    """Choose simulated or real devices and the compilation cache, before test modules import."""
    if "aot" in named_optional(config):
        # Before JAX looks for its plugins, see vlmae.training.gpus.
        os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    import vlmae.cli  # noqa: F401  sets handlers of signals for a command line, which pytest is not

    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    if "gpu" not in named_optional(config):
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])
    cache = Path(tempfile.gettempdir()) / f"vlmae-tests-{getpass.getuser()}"
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(config, items):
    """Mark each test as one of `KINDS`; deselect optional tests unless `-m` names them."""
    for item in items:
        if not any(map(item.get_closest_marker, KINDS)):
            path = PurePosixPath(item.path.relative_to(Path(__file__).parent).as_posix())
            place = next(p for p in map(str, (path, *path.parents)) if p in MARKERS)
            item.add_marker(MARKERS[place])
    named = named_optional(config)
    markers = [{mark.name for mark in item.iter_markers()} & OPTIONAL for item in items]
    left_out = [item for item, own in zip(items, markers, strict=True) if own and not own & named]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in set(left_out)]
