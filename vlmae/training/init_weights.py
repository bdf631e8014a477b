"""Initial parameters of a new run: from another run or from published weights, resized to fit."""

import itertools
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from data_pipelines.schema.checks import UserError
from vlmae.config.experiment import ExperimentConfig
from vlmae.models.embeddings import resize_grid, resize_offsets
from vlmae.parallel.sharding import path_name
from vlmae.runs.checkpoint import load_params
from vlmae.runs.load import load_run, title_of
from vlmae.weights.huggingface import load_published, merge_trees

# Parts of the model that published weights of an encoder are asked for: a misfit there is an error.
ASKED = {"video": ("video_encoder/",), "text": ("text_encoder/", "fusion/")}


class Source(NamedTuple):
    """Parameters to start from, read but not yet put into a model."""

    params: PyTree  # host arrays
    title: str
    asked: tuple[str, ...]  # beginnings of the names that must fit
    unused: list[str]  # tensors that no model of ours has


def read_initial(config: ExperimentConfig) -> Source | None:
    """Read `train.init_from` or `train.init`; None if the config sets neither.

    This is to be called before anything is compiled: a misfit of the config shows here.

    Raises:
      MissingError, UserError: the source does not exist, is damaged, or has another config.
    """
    train = config.train
    if train.init_from:
        # Parameters alone: moments and step belong to another schedule.
        folder = Path(train.init_from).expanduser()
        params, step = load_params(folder)
        return Source(params, f"{title_of(load_run(folder), step)} of {train.init_from}", (), [])
    names = {part: name for part, name in asdict(train.init).items() if name}
    if not names:
        return None
    reads = {
        part: load_published(name, part, config.model, train.init_differs)
        for part, name in names.items()
    }
    if "text" in reads and names["text"] != names.get("video"):
        # The learned temperature belongs to both encoders of a CLIP.
        reads["text"].params.pop("temperature", None)
    return Source(
        merge_trees([read.params for read in reads.values()]),
        ", ".join(f"{part} of {name}" for part, name in names.items()),
        sum((ASKED[part] for part in names), ()),
        [f"{name} of {names[part]}" for part, read in reads.items() for name in read.unused],
    )


def take_initial(source: Source, params: PyTree) -> tuple[PyTree, str]:
    """Put parameters into those of a new model; what does not fit keeps its initial values.

    Returns:
      The parameters, and a report of every loaded name.

    Raises:
      UserError: a part that published weights were asked for has another shape.
    """
    merged, report = merge_params(params, source.params)
    wrong = [entry for entry in report.mismatched if entry.startswith(source.asked)]
    if source.asked and wrong:
        raise UserError(f"{source.title} does not fit the model:\n  " + "\n  ".join(wrong))
    report.unused.extend(source.unused)
    return merged, f"from {source.title}: {report}"


class LoadReport(NamedTuple):
    """Outcome of `merge_params` for every parameter."""

    loaded: list[str]
    resized: list[str]  # positional embeddings of another size, with both shapes
    missing: list[str]  # only in the model: keep their initial values
    unused: list[str]  # only in the source
    mismatched: list[str]  # in both, with both shapes

    def __str__(self) -> str:
        lines = [f"loaded {len(self.loaded)} parameters"]
        lines += [f"  resized: {entry}" for entry in self.resized]
        others = (entry.split(":")[0] for entry in (*self.resized, *self.mismatched))
        used = {part for name in (*self.loaded, *others) for part in _parts(name)}

        def whole(name: str) -> str:
            return next((part for part in _parts(name) if part not in used), name)

        for kind in ("missing", "unused"):
            for part, entries in itertools.groupby(sorted(getattr(self, kind)), whole):
                count = len([*entries])
                lines.append(f"  {kind}: {part}" + f" ({count} parameters)" * (count > 1))
        for part, entries in itertools.groupby(
            sorted(self.mismatched), lambda entry: entry.split("/")[0]
        ):
            first, *others = entries
            more = f", and {len(others)} more of {part}" if others else ""
            lines.append(f"  left out, of another shape: {first}{more}")
        return "\n".join(lines)


def _parts(name: str) -> list[str]:
    """List the parts of the model around a parameter, from the outermost to itself.

    >>> _parts("fusion/block_0/norm")
    ['fusion', 'fusion/block_0', 'fusion/block_0/norm']
    """
    if " of " in name:  # a published name, of a path
        return [name]
    parts = name.split("/")
    return ["/".join(parts[:i]) for i in range(1, len(parts) + 1)]


def merge_params(params: PyTree, source: PyTree) -> tuple[PyTree, LoadReport]:
    """Replace the parameters that `source` has under the same path in the same shape.

    Learned positional embeddings of another size are resized, see `fit_positions`.
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
        # By name, since only tables of positions may change size; any other shape is a misfit.
        elif (fitted := fit_positions(name, found, x)) is not None:
            found = fitted
            report.resized.append(entry)
        else:
            report.mismatched.append(entry)
            return x
        return jax.device_put(found, x.sharding)  # sharded as the new parameters are

    merged = jax.tree_util.tree_map_with_path(choose, params)
    report.unused.extend(given)  # `choose` has taken out all others
    return merged, report


def fit_positions(
    name: str, source: Float[Array | np.ndarray, "..."], initial: Float[Array | np.ndarray, "..."]
) -> Float[Array, "m d"] | None:
    """Resize the table of parameter `name` to the length of its initial value.

    Patches are interpolated in the square grid (bicubic), their offsets and the frames linearly.
    Positions of text are copied; those beyond the source's longest text keep their initial values.

    Args:
      name: path of the parameter.
      source: the table to resize.
      initial: the table of a new model.

    Returns:
      The resized table, or None if the parameter holds no positions or cannot be resized.
    """
    if initial.ndim != 2 or source.shape[1:] != initial.shape[1:]:
        return None
    if name == "text_encoder/embeddings/position/embedding":
        # Not interpolated: token i of a longer text is still token i.
        common = min(len(source), len(initial))
        return jnp.asarray(initial).at[:common].set(source[:common])
    if name == "video_encoder/temporal/embedding":
        # Frames spread over the clip: the first and the last stay the first and the last.
        return jax.image.resize(source, initial.shape, "linear")
    if name == "video_encoder/positions":
        return resize_grid(source, len(initial))
    if name.startswith("video_encoder/relative_bias/"):
        return resize_offsets(source, len(initial))
    return None
