"""Compare two runs bit for bit: the losses of all steps, and the parameters at the end.

    python tests/support/compare_runs.py RUN_BEFORE RUN_AFTER

Both runs must have the same config and machine; XLA orders sums by the processor's features.
"""

import sys
from pathlib import Path

import jax
import numpy as np
from jaxtyping import PyTree

from vlmae.runs.checkpoint import load_params
from vlmae.runs.metric_writer import read_metrics


def differing(before: PyTree, after: PyTree) -> list[str]:
    """Names of leaves that are missing on one side, or not equal in dtype, shape and bits."""
    old, new = (
        {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree.leaves_with_path(tree)}
        for tree in (before, after)
    )
    return sorted(
        name
        for name in old.keys() | new.keys()
        if not (
            name in old
            and name in new
            and old[name].dtype == new[name].dtype
            and old[name].shape == new[name].shape
            and old[name].tobytes() == new[name].tobytes()
        )
    )


def losses_of(workdir: Path) -> dict[str, float]:
    """Losses of a run by step and name."""
    return {
        f"step {line['step']} {name}": value
        for line in read_metrics(workdir)
        for name, value in line.items()
        if name.startswith("loss/")
    }


def contents(workdir: Path) -> PyTree:
    """Losses and parameters of a run."""
    return {"losses": losses_of(workdir), "params": load_params(workdir)[0]}


if __name__ == "__main__":
    before, after = (contents(Path(folder)) for folder in sys.argv[1:])
    found = differing(before, after)
    print("\n".join(found) or f"equal: {len(jax.tree.leaves(before))} losses and parameters")
    sys.exit(bool(found))
