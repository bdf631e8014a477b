"""Checkpoints of a work directory: a thin wrapper around Orbax."""

import logging
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from vlmae.sharding import path_name
from vlmae.workdir import holds_tensors


class Checkpoints:
    """Asynchronous, atomic checkpoints by step number; the newest `keep` stay.

    Saving goes on in the background; a checkpoint appears under its number only when it is whole,
    so that a run killed at any moment finds the last complete one.
    """

    def __init__(self, workdir: Path, keep: int = 1):
        logging.getLogger("absl").setLevel(logging.WARNING)
        options = ocp.CheckpointManagerOptions(max_to_keep=keep)
        self.manager = ocp.CheckpointManager(
            (Path(workdir) / "checkpoints").resolve(),
            options=options,
            item_handlers={"state": ocp.StandardCheckpointHandler()},
        )

    def latest_step(self) -> int | None:
        """Step of the newest whole checkpoint, or None."""
        return self.manager.latest_step()

    def save(self, step: int, state: PyTree) -> None:
        """Starts saving; returns as soon as the state may be overwritten."""
        self.manager.save(step, args=ocp.args.Composite(state=ocp.args.StandardSave(state)))

    def restore(self, step: int, abstract_state: PyTree) -> PyTree:
        """Reads the state of a step into the given shapes and shardings.

        Raises:
          ValueError: names each array whose shape differs, with both shapes, or that only one
            side has.
        """
        problems = shape_mismatches(self._stored_shapes(step), abstract_state)
        if problems:
            shown = "\n".join(f"  {line}" for line in problems[:10])
            more = f"\n  and {len(problems) - 10} more" if len(problems) > 10 else ""
            where = self.manager.directory / str(step)
            raise ValueError(f"checkpoint {where} does not fit the model:\n{shown}{more}")
        restore = ocp.args.StandardRestore(abstract_state)
        return self.manager.restore(step, args=ocp.args.Composite(state=restore))["state"]

    def restore_params(self, step: int) -> PyTree:
        """Reads only the parameters of a step, as host arrays, whatever their shapes."""
        metadata = self._metadata(step)["params"]
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        abstract = jax.tree.map(
            lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=device), metadata
        )
        item = {"params": abstract}
        args = ocp.args.PyTreeRestore(
            item,
            restore_args=ocp.checkpoint_utils.construct_restore_args(item),
            partial_restore=True,
        )
        path = self.manager.directory / str(step) / "state"
        with ocp.PyTreeCheckpointer() as checkpointer:
            return jax.device_get(checkpointer.restore(path, args=args)["params"])

    def close(self) -> None:
        """Waits for the last save and frees the threads."""
        self.manager.wait_until_finished()
        self.manager.close()

    def _metadata(self, step: int) -> PyTree:
        return self.manager.item_metadata(step)["state"].tree

    def _stored_shapes(self, step: int) -> dict[str, tuple[int, ...]]:
        leaves = jax.tree_util.tree_leaves_with_path(self._metadata(step))
        return {path_name(path): tuple(leaf.shape) for path, leaf in leaves}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def shape_mismatches(stored: dict[str, tuple[int, ...]], abstract_state: PyTree) -> list[str]:
    """One line for each array that differs between a checkpoint and the expected state."""
    leaves = jax.tree_util.tree_leaves_with_path(abstract_state)
    expected = {path_name(path): tuple(leaf.shape) for path, leaf in leaves}
    lines = []
    for name in sorted(stored.keys() | expected.keys()):
        left, right = stored.get(name, "absent"), expected.get(name, "absent")
        if left != right:
            lines.append(f"{name}: {left} in the checkpoint, {right} in the model")
    return lines


def load_params(workdir: Path) -> tuple[PyTree, int]:
    """Parameters and step of the newest checkpoint of a work directory, or of an export.

    Raises:
      FileNotFoundError: the directory holds no checkpoint.
      ValueError: the export is damaged, of another version, or a pickle file; names the file.
    """
    if holds_tensors(Path(workdir)):
        from vlmae.interop.exported import load_export  # safetensors, only here

        params, exported = load_export(Path(workdir))
        return params, exported.step
    if not (Path(workdir) / "checkpoints").is_dir():
        raise FileNotFoundError(f"{workdir} holds no checkpoints")
    with Checkpoints(workdir) as checkpoints:
        step = checkpoints.latest_step()
        if step is None:
            raise FileNotFoundError(f"{workdir}/checkpoints holds no complete checkpoint")
        return checkpoints.restore_params(step), step
