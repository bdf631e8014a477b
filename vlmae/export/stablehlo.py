"""StableHLO programs of a trained model (`jax.export`), which run without this library's code.

Each program holds its parameters, takes any batch size, and runs on a CPU or a GPU.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax
from jax import export

from vlmae.export.folders import Checkpoint
from vlmae.export.programs import Program, bound, check_program

PLATFORMS = ("cpu", "cuda")
SOURCE_FILES = "jax_hlo_source_file_canonicalization_regex"


def write_stablehlo(found: dict[str, Program], checkpoint: Checkpoint, folder: Path) -> None:
    """Write `NAME.stablehlo` for each program, after reading it back and running it.

    Args:
      found: the programs of the model.
      checkpoint: gives config and parameters.
      folder: where to write.

    Raises:
      UserError: a program does not give the model's outputs; names it and the difference.
    """
    for name, program in found.items():
        run = jax.jit(bound(checkpoint.config, checkpoint.params, program.method))
        with short_source_names():
            data = export.export(run, platforms=PLATFORMS)(program.inputs).serialize()
        # One batch size, since each is compiled anew: `jax.export` has proven the others.
        check_program(name, run, export.deserialize(data).call, program.inputs, (3,))
        (folder / f"{name}.stablehlo").write_bytes(data)


@contextlib.contextmanager
def short_source_names() -> Iterator[None]:
    """Keep the folders of this machine out of the programs exported within the block."""
    before = getattr(jax.config, SOURCE_FILES)
    jax.config.update(SOURCE_FILES, ".*/")
    try:
        yield
    finally:
        jax.config.update(SOURCE_FILES, before)
