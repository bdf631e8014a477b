"""A trained model as StableHLO programs, for serving without this library's code (`jax.export`).

Each program holds its parameters, takes any batch size, and runs on a CPU or a GPU.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax
from jax import export
from jaxtyping import PyTree

from vlmae.config import ExperimentConfig
from vlmae.interop.programs import Program, bound, check_program

PLATFORMS = ("cpu", "cuda")
SOURCE_FILES = "jax_hlo_source_file_canonicalization_regex"


def write_stablehlo(
    found: dict[str, Program], config: ExperimentConfig, params: PyTree, step: int, folder: Path
) -> None:
    """Writes `NAME.stablehlo` for each program, after it was read again and run on random input.

    Args:
      found: the programs of the model.
      config: of the run.
      params: of the model.
      step: of the checkpoint; it plays no part.
      folder: where to write.

    Raises:
      ValueError: a program does not give what the model gives; names it and the difference.
    """
    for name, program in found.items():
        run = jax.jit(bound(config, params, program.method))
        with short_source_names():
            data = export.export(run, platforms=PLATFORMS)(program.inputs).serialize()
        # One batch size, each of which is compiled: `jax.export` has proven the others.
        check_program(name, run, export.deserialize(data).call, program.inputs, (3,))
        (folder / f"{name}.stablehlo").write_bytes(data)


@contextlib.contextmanager
def short_source_names() -> Iterator[None]:
    """Within, a program tells of the files it comes from without the folders they were in."""
    before = getattr(jax.config, SOURCE_FILES)
    jax.config.update(SOURCE_FILES, ".*/")
    try:
        yield
    finally:
        jax.config.update(SOURCE_FILES, before)
