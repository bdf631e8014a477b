"""Config and tokenizer of a run, read from a work directory or an export of one."""

import re
from pathlib import Path

from data_pipelines.schema.checks import MissingError, UserError
from data_pipelines.schema.checksum import SUMS
from vlmae.config.experiment import ExperimentConfig, load_config
from vlmae.weights.export_format import read_description
from vlmae.weights.huggingface import FILES, PICKLES, find

RUNS_NAMED = 5  # in a message
HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def holds_tensors(folder: Path) -> bool:
    """Return True if `folder` holds weight files rather than a work directory."""
    if (folder / "checkpoints").is_dir():  # whatever files a user has put beside it
        return False
    suffixes = (".safetensors", *PICKLES)
    files = folder.iterdir() if folder.is_dir() else [folder]
    # Checksums, too: an export whose tensors are gone is one all the same.
    return any(path.suffix in suffixes or path.name == SUMS for path in files)


def load_run(workdir: Path) -> ExperimentConfig:
    """Read the config of a run from its work directory or an export of it.

    Raises:
      MissingError: no config.
      UserError: the config is damaged; names the file.
    """
    if not holds_tensors(workdir):
        if not (workdir / "config.json").is_file():
            raise MissingError(f"{workdir}: no run here{_runs_below(workdir)}")
        return load_config(workdir / "config.json")
    return read_description(workdir)[1]


def find_run(source: str | Path) -> Path:
    """Find a run or an export: a local folder, or else OWNER/NAME, an export on the hub.

    The hub's files come from its cache, or over the network (`huggingface_hub`). A name whose first
    part is a local folder is a path, whatever the hub has.

    Raises:
      UserError: neither exists; says what was tried.
    """
    folder, name = Path(source).expanduser(), str(source)
    if folder.exists() or not HUB_NAME.fullmatch(name) or folder.parent.is_dir():
        return folder  # what is missing there is said by its reader
    try:
        return find(name, (*FILES, SUMS))
    except UserError as error:
        raise UserError(
            f"{error}. Give the folder of a run or of an export, or OWNER/NAME of an export on the "
            "hub, which needs a network or an earlier download"
        ) from error


def title_of(config: ExperimentConfig, step: int) -> str:
    """Name the parameters of a checkpoint for a message: "step 7", or "step 7 (EMA)"."""
    return f"step {step} (EMA)" if config.optim.ema_decay else f"step {step}"


def _runs_below(folder: Path) -> str:
    """List a few runs below a folder, for a message."""
    patterns = (f"{'*/' * depth}config.json" for depth in (1, 2, 3))
    found = sorted({path.parent for pattern in patterns for path in folder.glob(pattern)})
    names = ", ".join(map(str, found[:RUNS_NAMED]))
    more = f" and {len(found) - RUNS_NAMED} more" if len(found) > RUNS_NAMED else ""
    return f"; runs below it: {names}{more}" if found else ""


def tokenizer_of(workdir: Path) -> Path:
    """Return the folder of a run's tokenizer; an export has it among its other files."""
    return workdir if holds_tensors(workdir) else workdir / "tokenizer"
