"""Device mesh and shardings. The only file that names a mesh axis."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, PyTree

from data_pipelines.schema.checks import UserError
from vlmae.config.experiment import MeshConfig

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

# Parameter paths, and the dimension that is sharded along the tensor axis: attention heads lie side
# by side in the projections' output, and feed-forward networks are sharded in their hidden width.
TENSOR_RULES = (
    (r"(query|key|value)/kernel$", 1),
    (r"(query|key|value)/bias$", 0),
    (r"attention(_\d+)?/out/kernel$", 0),
    (r"mlp/up/kernel$", 1),
    (r"mlp/up/bias$", 0),
    (r"mlp/down/kernel$", 0),
)


def make_mesh(config: MeshConfig, devices: list | None = None) -> Mesh:
    """Make a mesh of the configured sizes over the given devices (default: all).

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [getattr(config, axis) for axis in AXES]
    fixed = int(np.prod([size for size in sizes if size != -1]))
    # Checked by the product below, which also catches a remainder.
    sizes = [len(devices) // fixed if size == -1 else size for size in sizes]
    if int(np.prod(sizes)) != len(devices):
        wanted = " x ".join(f"{a}={getattr(config, a)}" for a in AXES)
        raise UserError(f"mesh {wanted} does not fit {len(devices)} device(s)")
    # Auto axes: XLA propagates shardings from the constraints here, and inserts the collectives.
    # make_mesh orders the devices by the machine's topology, so that neighbors on an axis are near.
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def batch_shards(mesh: Mesh | AbstractMesh) -> int:
    """Count the shards of a batch on the mesh."""
    return int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))


def bytes_per_device(batch: PyTree, mesh: Mesh | AbstractMesh) -> int:
    """Count the bytes of a batch on each device; its arrays may be shapes alone."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(batch)) // batch_shards(mesh)


def check_batch_size(batch_size: int, mesh: Mesh, name: str) -> None:
    """Check that the mesh divides a batch.

    Raises:
      UserError: it does not; names the config field.
    """
    parts = batch_shards(mesh)
    if batch_size % parts:
        raise UserError(
            f"{name}={batch_size} is not divisible by the mesh: "
            f"data={mesh.shape['data']} x fsdp={mesh.shape['fsdp']} = {parts}"
        )


def check_heads(num_heads: int, mesh: Mesh, name: str) -> None:
    """Check that the tensor axis divides the attention heads.

    Raises:
      UserError: it does not; names the config field.
    """
    if num_heads % mesh.shape["tensor"]:
        raise UserError(
            f"{name}={num_heads} is not divisible by mesh.tensor={mesh.shape['tensor']}"
        )


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding with a whole copy on every device."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Shard the leading dimension along the data and fsdp axes."""
    return NamedSharding(mesh, P(BATCH_AXES))


def keep_rows(x: Float[Array, "b *_"]) -> Float[Array, "b *_"]:
    """Constrain activations to batch sharding over the mesh that is set.

    Without it XLA may shard them like the parameters that `fsdp` shards, and move activations where
    it could gather parameters. Rows that the mesh does not divide stay as they are.
    """
    # The mesh that is set, not an argument: modules know nothing of devices.
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or len(x) % batch_shards(mesh):
        return x
    return jax.lax.with_sharding_constraint(x, P(BATCH_AXES))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def copy_to_shards(x: Float[Array, "*d"], sums: str) -> Float[Array, "s *d"]:
    """Give each shard of a batch a copy of a parameter; 1 copy if no mesh is set.

    The gradients of all that reads a copy are summed on its device, as they come; then devices sum
    them once, rounded to the type `sums`. (XLA by itself lets devices sum the gradient of each use
    apart, in the type in which that use computes it.)
    """
    del sums
    mesh = jax.sharding.get_abstract_mesh()
    copies = jnp.broadcast_to(x, (1 if mesh.empty else batch_shards(mesh), *x.shape))
    return copies if mesh.empty else jax.lax.with_sharding_constraint(copies, P(BATCH_AXES))


def _sum_over_shards(sums: str, _: None, grads: Float[Array, "s *d"]) -> tuple[Array]:
    if len(grads) == 1:
        return (grads[0],)
    grads = jax.lax.with_sharding_constraint(grads.astype(sums), P(BATCH_AXES))
    # Not jnp.sum, which widens: the type of this sum is that of the all-reduce.
    total = jax.lax.reduce(grads, jnp.zeros((), sums), jax.lax.add, (0,))
    return (total.astype(jnp.float32),)


copy_to_shards.defvjp(lambda x, sums: (copy_to_shards(x, sums), None), _sum_over_shards)


@functools.cache  # asked for with every batch
def process_part(mesh: Mesh) -> tuple[int, int]:
    """Return the part of every batch that this process reads, and the number of parts.

    Raises:
      UserError: see `part_of`.
    """
    # Devices of one process need not be neighbors in the mesh, so their rows are checked.
    owners = np.vectorize(lambda device: device.process_index)(mesh.devices)
    return part_of(owners, jax.process_index())


def part_of(owners: Int[np.ndarray, "data fsdp tensor"], process: int) -> tuple[int, int]:
    """Return the part of a batch that a process reads, and the number of parts.

    Processes whose devices hold the same rows (they share a tensor axis) read the same part.

    Args:
      owners: the process of each device of a mesh.
      process: the one to find the part of.

    Raises:
      UserError: its devices hold rows that are not contiguous.

    >>> part_of(np.array([0, 0, 1, 1]).reshape(4, 1, 1), 1)
    (1, 2)
    """
    shards = owners.shape[0] * owners.shape[1]
    held = np.flatnonzero((owners == process).any(axis=2))
    first, count = int(held[0]), len(held)
    if held[-1] - first + 1 != count or first % count or shards % count:
        raise UserError(
            f"mesh of data x fsdp x tensor = {owners.shape} gives process {process} the parts "
            f"{held.tolist()} of a batch, which do not lie together: choose other sizes"
        )
    return first // count, shards // count


def put_batch(batch: PyTree, mesh: Mesh) -> PyTree:
    """Make global arrays from this process's part of a batch, see `process_part`."""
    # Each process holds its rows only; the global shape is known without asking the others.
    sharding, (_, parts) = batch_sharding(mesh), process_part(mesh)

    def put(x: np.ndarray) -> jax.Array:
        shape = (len(x) * parts, *x.shape[1:])
        return jax.make_array_from_process_local_data(sharding, x, shape)

    return jax.tree.map(put, batch)


def put_whole(batch: PyTree, mesh: Mesh) -> PyTree:
    """Make global arrays of a batch that every process holds whole."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(
        # Each process copies only the rows of its own devices.
        lambda x: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index]),
        batch,
    )


def gather(tree: PyTree) -> PyTree:
    """Copy global arrays to the host; all processes must call this."""
    return multihost_utils.process_allgather(tree, tiled=True)


def state_shardings(state: PyTree, mesh: Mesh) -> PyTree:
    """Build the sharding of every array of a training state, by rules on parameter names.

    The paths of Adam's moments end like those of their parameters, so the rules fit them too. The
    parameters that do not decay are one vector there, which no rule shards.
    """

    def sharding(path: tuple, x: Any) -> NamedSharding:
        # By name, not by boxes on parameters: the same rules hit gradients, moments and restored
        # states.
        return NamedSharding(mesh, partition(path_name(path), x.shape, mesh.shape))

    return jax.tree_util.tree_map_with_path(sharding, state)


def shapes_by_path(tree: PyTree) -> dict[str, tuple[int, ...]]:
    """Return the shape of every array of a tree, by its path as `path_name` writes it."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {path_name(path): tuple(leaf.shape) for path, leaf in leaves}


def path_name(path: tuple) -> str:
    """Write a tree path as text: "params/video_encoder/block_0/mlp/up/kernel"."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def is_matrix(name: str) -> bool:
    """Return True for the path of a kernel or embedding table; biases, scales, tokens are none."""
    return name.rsplit("/", 1)[-1] in ("kernel", "embedding")


def partition(name: str, shape: tuple[int, ...], sizes: dict[str, int]) -> P:
    """Partition one parameter: the tensor rule first, then fsdp on the largest dimension.

    A dimension that an axis does not divide stays whole. fsdp shards matrices alone: the hundreds
    of biases and scales are a few MB, which the optimizer joins, and each would be a collective of
    its own.
    """
    spec: list[str | None] = [None] * len(shape)
    for pattern, dim in TENSOR_RULES:
        # The first rule that fits decides, even where its axis does not divide the dimension.
        if sizes["tensor"] > 1 and re.search(pattern, name) and len(shape) > dim:
            if shape[dim] % sizes["tensor"] == 0:
                spec[dim] = "tensor"
            break
    free = [d for d in range(len(shape)) if spec[d] is None and shape[d] % sizes["fsdp"] == 0]
    if sizes["fsdp"] > 1 and is_matrix(name) and free:
        spec[max(free, key=lambda d: shape[d])] = "fsdp"
    return P(*spec)
