"""What a new run starts from beside its seed: another run's parameters, or published weights."""

from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import jax
from jaxtyping import Array, PyTree

from vlmae.checkpoint import load_params
from vlmae.config import ExperimentConfig
from vlmae.positions import fit_positions
from vlmae.sharding import path_name


def initial_params(config: ExperimentConfig, params: PyTree) -> tuple[PyTree, str]:
    """The parameters after `train.init_from` or `train.init`, and what was loaded, name by name.

    Raises:
      FileNotFoundError, ValueError: there is nothing to load, or it does not fit.
    """
    train = config.train
    if train.init_from:
        source, step = load_params(Path(train.init_from).expanduser())
        merged, report = merge_params(params, source)
        return merged, f"from step {step} of {train.init_from}: {report}"
    names = {part: name for part, name in asdict(train.init).items() if name}
    return _published_params(config, params, names) if names else (params, "")


def _published_params(
    config: ExperimentConfig, params: PyTree, names: dict[str, str]
) -> tuple[PyTree, str]:
    """Published weights of one or both parts; whatever has another shape is an error here."""
    from vlmae.interop.published import load_published, merge_trees  # safetensors, only here

    reads = {part: load_published(name, part, config.model) for part, name in names.items()}
    merged, report = merge_params(params, merge_trees([read.params for read in reads.values()]))
    sources = ", ".join(f"{part} of {name}" for part, name in names.items())
    if report.mismatched:
        raise ValueError(f"{sources} does not fit the model:\n  " + "\n  ".join(report.mismatched))
    for part, read in reads.items():
        report.unused.extend(f"{name} of {names[part]}" for name in read.unused)
    return merged, f"from {sources}: {report}"


class LoadReport(NamedTuple):
    """What `merge_params` did, parameter by parameter."""

    loaded: list[str]
    resized: list[str]  # positions of another size, with both shapes
    missing: list[str]  # in the model, not in the source: keep their initial values
    unused: list[str]  # in the source, not in the model
    mismatched: list[str]  # in both, with both shapes

    def __str__(self) -> str:
        lines = [f"loaded {len(self.loaded)} parameters"]
        for name in ("resized", "missing", "unused", "mismatched"):
            lines += [f"  {name}: {entry}" for entry in getattr(self, name)]
        return "\n".join(lines)


def merge_params(params: PyTree, source: PyTree) -> tuple[PyTree, LoadReport]:
    """Replaces the parameters that `source` has under the same path with the same shape.

    Learned positions of another size are resized, see `fit_positions`.
    """
    given = {path_name(p): x for p, x in jax.tree_util.tree_leaves_with_path(source)}
    report = LoadReport([], [], [], [], [])

    def choose(path: tuple, x: Array) -> Array:
        name = path_name(path)
        if name not in given:
            report.missing.append(name)
            return x
        found = given.pop(name)
        entry = f"{name}: {found.shape} in the source, {x.shape} in the model"
        if found.shape == x.shape:
            report.loaded.append(name)
        elif (fitted := fit_positions(name, found, x)) is not None:
            found = fitted
            report.resized.append(entry)
        else:
            report.mismatched.append(entry)
            return x
        return jax.device_put(found, x.sharding)

    merged = jax.tree_util.tree_map_with_path(choose, params)
    report.unused.extend(given)
    return merged, report
