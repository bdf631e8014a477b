"""The mesh and every sharding. The only file that names a mesh axis."""

import functools
import re
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, PyTree

from vlmae.config import MeshConfig

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

# Parameter paths whose given dimension is cut along the tensor axis: attention heads lie side by
# side in the projections' output, the feed-forward network is cut in its hidden width.
TENSOR_RULES = (
    (r"(query|key|value)/kernel$", 1),
    (r"(query|key|value)/bias$", 0),
    (r"attention(_\d+)?/out/kernel$", 0),
    (r"mlp/up/kernel$", 1),
    (r"mlp/up/bias$", 0),
    (r"mlp/down/kernel$", 0),
)


def make_mesh(config: MeshConfig, devices: list | None = None) -> Mesh:
    """A mesh of the configured sizes over the given devices (default: all).

    Raises:
      ValueError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [getattr(config, axis) for axis in AXES]
    fixed = int(np.prod([size for size in sizes if size != -1]))
    sizes = [len(devices) // fixed if size == -1 else size for size in sizes]
    if int(np.prod(sizes)) != len(devices):
        wanted = " x ".join(f"{a}={getattr(config, a)}" for a in AXES)
        raise ValueError(f"mesh {wanted} does not fit {len(devices)} device(s)")
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def batch_shards(mesh: Mesh | AbstractMesh) -> int:
    """Parts into which the mesh cuts a batch."""
    return int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))


def check_batch_size(batch_size: int, mesh: Mesh, name: str) -> None:
    """Raises ValueError, naming the config field, if the mesh does not divide the batch."""
    parts = batch_shards(mesh)
    if batch_size % parts:
        raise ValueError(
            f"{name}={batch_size} is not divisible by the mesh: "
            f"data={mesh.shape['data']} x fsdp={mesh.shape['fsdp']} = {parts}"
        )


def check_heads(num_heads: int, mesh: Mesh, name: str) -> None:
    """Raises ValueError, naming the config field, if the tensor axis does not divide the heads."""
    if num_heads % mesh.shape["tensor"]:
        raise ValueError(
            f"{name}={num_heads} is not divisible by mesh.tensor={mesh.shape['tensor']}"
        )


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds a whole copy."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading dimension is cut along the data and fsdp axes."""
    return NamedSharding(mesh, P(BATCH_AXES))


def keep_rows(x: Float[Array, "b *_"]) -> Float[Array, "b *_"]:
    """Activations, cut by rows alone over the mesh that is set.

    Told nothing, XLA may cut them like the parameters that `fsdp` has cut, and move activations
    where it could gather parameters. Rows that the mesh does not divide stay as they are.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or len(x) % batch_shards(mesh):
        return x
    return jax.lax.with_sharding_constraint(x, P(BATCH_AXES))


@functools.cache
def process_part(mesh: Mesh) -> tuple[int, int]:
    """Which part of every batch this process reads, and how many such parts there are.

    Raises:
      ValueError: see `part_of`.
    """
    owners = np.vectorize(lambda device: device.process_index)(mesh.devices)
    return part_of(owners, jax.process_index())


def part_of(owners: Int[np.ndarray, "data fsdp tensor"], process: int) -> tuple[int, int]:
    """The part of a batch that a process reads, and the number of parts.

    Processes whose devices hold the same rows (they share a tensor axis) read the same part.

    Args:
      owners: the process of each device of a mesh.
      process: one of them.

    Raises:
      ValueError: its devices hold rows that do not lie together.

    >>> part_of(np.array([0, 0, 1, 1]).reshape(4, 1, 1), 1)
    (1, 2)
    """
    shards = owners.shape[0] * owners.shape[1]
    held = np.flatnonzero((owners == process).any(axis=2))
    first, count = int(held[0]), len(held)
    if held[-1] - first + 1 != count or first % count or shards % count:
        raise ValueError(
            f"mesh of data x fsdp x tensor = {owners.shape} gives process {process} the parts "
            f"{held.tolist()} of a batch, which do not lie together: choose other sizes"
        )
    return first // count, shards // count


def put_batch(batch: PyTree, mesh: Mesh) -> PyTree:
    """Makes global arrays from this process's part of a batch, see `process_part`."""
    sharding, (_, parts) = batch_sharding(mesh), process_part(mesh)

    def put(x: np.ndarray) -> jax.Array:
        shape = (len(x) * parts, *x.shape[1:])
        return jax.make_array_from_process_local_data(sharding, x, shape)

    return jax.tree.map(put, batch)


def put_whole(batch: PyTree, mesh: Mesh) -> PyTree:
    """Makes global arrays of a batch that every process holds whole."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(
        lambda x: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index]), batch
    )


def gather(tree: PyTree) -> PyTree:
    """Host copies of global arrays; every process must ask for them."""
    return multihost_utils.process_allgather(tree, tiled=True)


def state_shardings(state: PyTree, mesh: Mesh) -> PyTree:
    """A sharding for every array of a training state, by the rules on parameter names.

    The paths of Adam's moments end like those of their parameters, so the rules fit them too. All
    that does not decay is one vector there, which no rule cuts.
    """

    def sharding(path: tuple, x: Any) -> NamedSharding:
        return NamedSharding(mesh, partition(path_name(path), x.shape, mesh.shape))

    return jax.tree_util.tree_map_with_path(sharding, state)


def path_name(path: tuple) -> str:
    """A tree path as text: "params/video_encoder/block_0/mlp/up/kernel"."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def is_matrix(name: str) -> bool:
    """True for the path of a kernel or of an embedding table, False for biases, scales, tokens."""
    return name.rsplit("/", 1)[-1] in ("kernel", "embedding")


def partition(name: str, shape: tuple[int, ...], sizes: dict[str, int]) -> P:
    """The partition of one parameter: the tensor rule first, then fsdp on the largest dimension.

    A dimension that an axis does not divide stays whole. fsdp cuts matrices alone: the hundreds of
    biases and scales are a few MB, which the optimizer joins, and each would cross the network.
    """
    spec: list[str | None] = [None] * len(shape)
    for pattern, dim in TENSOR_RULES:
        if sizes["tensor"] > 1 and re.search(pattern, name) and len(shape) > dim:
            if shape[dim] % sizes["tensor"] == 0:
                spec[dim] = "tensor"
            break
    free = [d for d in range(len(shape)) if spec[d] is None and shape[d] % sizes["fsdp"] == 0]
    if sizes["fsdp"] > 1 and is_matrix(name) and free:
        spec[max(free, key=lambda d: shape[d])] = "fsdp"
    return P(*spec)
