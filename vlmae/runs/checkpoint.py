"""Checkpoints of a work directory: a thin wrapper around Orbax."""

import contextlib
import logging
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jaxtyping import Array, PyTree

from data_pipelines.schema.checks import MissingError, UserError, first_line
from data_pipelines.schema.checksum import SUMS, DamagedError, check_sums, read_sums, write_sums
from vlmae.parallel.processes import is_main_process, print_on_main_process, wait_for_all
from vlmae.parallel.sharding import path_name, shapes_by_path
from vlmae.runs.load import holds_tensors
from vlmae.weights.export_format import load_export

# What Orbax raises for a checkpoint that is not whole, as far as was seen.
UNREADABLE = (
    *(ValueError, LookupError, TypeError, AttributeError, EOFError, NotImplementedError),
    *(FileNotFoundError, NotADirectoryError),
)
SET_ASIDE = "set_aside"  # folder of checkpoints that a run does not go on from


class ChecksummedHandler(ocp.StandardCheckpointHandler):
    """Orbax's handler of trees; writes the SHA-256 of all files before a checkpoint appears.

    Orbax has checksums of its own for the tree of an OCDBT database alone, not for its values: a
    flipped bit in those would restore another number.
    """

    def finalize(self, directory) -> None:
        """Complete the files of a checkpoint and write their `SHA256SUMS`."""
        super().finalize(directory)
        if is_main_process():
            write_sums(Path(directory))


@ocp.args.register_with_handler(ChecksummedHandler, for_save=True)
class ChecksummedSave(ocp.args.StandardSave):
    """Arguments by which Orbax saves with `ChecksummedHandler`."""


@ocp.args.register_with_handler(ChecksummedHandler, for_restore=True)
class ChecksummedRestore(ocp.args.StandardRestore):
    """Arguments by which Orbax restores with `ChecksummedHandler`."""


class Checkpoints:
    """Asynchronous, atomic checkpoints by step number.

    Saving goes on in the background. A checkpoint appears under its number only when it is whole,
    so a run that was killed at any moment finds the last complete one. Older ones are deleted only
    after that.

    Attributes:
      best: step that is never deleted; None: there is none.
    """

    def __init__(self, workdir: Path, keep: int | None = 1):
        """Open `WORKDIR/checkpoints`; saving keeps the newest `keep`, or all."""
        # Orbax logs a dozen lines for every checkpoint.
        logging.getLogger("absl").setLevel(logging.WARNING)
        self.keep = keep
        self.best: int | None = None
        options = ocp.CheckpointManagerOptions(preservation_policy=self)
        self.folder = (Path(workdir) / "checkpoints").resolve()  # Orbax refuses relative paths
        self.manager = ocp.CheckpointManager(
            self.folder,
            options=options,
            # Named, since without a handler Orbax cannot read the shapes before it restores.
            item_handlers={"state": ChecksummedHandler()},
        )

    def should_preserve(self, checkpoints: Sequence, **_: object) -> list[bool]:
        """Say for each checkpoint, oldest first, whether it stays: Orbax asks after each save."""
        count = len(checkpoints) if self.keep is None else self.keep
        first = len(checkpoints) - count
        return [i >= first or x.step == self.best for i, x in enumerate(checkpoints)]

    def latest_step(self) -> int | None:
        """Return the step of the newest whole checkpoint, or None."""
        return self.manager.latest_step()

    def all_steps(self) -> list[int]:
        """Return the steps of all whole checkpoints, ascending."""
        return sorted(self.manager.all_steps())

    def save(self, step: int, state: PyTree) -> None:
        """Start saving; returns as soon as the step may donate the state's buffers again.

        On a CPU that is at the end: a step that runs meanwhile cannot reuse the state's memory, and
        has no processors of its own.
        """
        self.manager.save(step, args=ocp.args.Composite(state=ChecksummedSave(state)))
        if jax.default_backend() == "cpu":
            self.manager.wait_until_finished()

    def restore_newest(self, abstract_state: PyTree, wanted: int | None = None) -> PyTree | None:
        """Restore the newest checkpoint that is whole; None if there is none at all.

        Damaged ones are named in a line each. These, and those after a step that is wanted, go to
        the folder `set_aside`, so that the run can save these steps again.

        Args:
          abstract_state: shapes and shardings.
          wanted: step to restore in place of the newest.

        Raises:
          MissingError: there is no checkpoint of the step that is wanted.
          DamagedError: that one, or every one, is damaged; names a file.
          UserError: see `restore`.
        """
        steps, error = self.all_steps(), None
        if wanted is not None and wanted not in steps:
            raise MissingError(
                f"{self.folder} holds no checkpoint of step {wanted}, but of {steps}"
            )
        for step in reversed(steps) if wanted is None else [wanted]:
            try:
                state = self.restore(step, abstract_state)
            except DamagedError as damage:
                error = error or damage
                print_on_main_process(f"step {step} cannot be restored: {damage}")
            else:
                self.set_aside([other for other in steps if other > step])
                return state
        if error:
            raise error
        return None

    def restore(self, step: int, abstract_state: PyTree) -> PyTree:
        """Read the state of a step into the given shapes and shardings.

        Raises:
          DamagedError: a file is not what was written, or a number is not finite; names it.
          UserError: an array differs in shape, or only one side has it; names the first ten with
            both shapes. If only the optimizer's do, says how to go on with the parameters.
        """
        where = self.folder / str(step)
        with self._checked(step):
            stored = shapes_by_path(self._metadata(step))
        # Compared here, since Orbax names one array at most and calls it a user argument.
        problems = shape_mismatches(stored, abstract_state)
        if problems and all(line.startswith("opt_state/") for line in problems):
            raise UserError(
                f"checkpoint {where} cannot be continued: its optimizer trained other parameters "
                f"({problems[0]}). Train in a new work directory with "
                f"--train.init-from={where.parents[1]}, which takes over the parameters"
            )
        if problems:
            shown = "\n".join(f"  {line}" for line in problems[:10])
            more = f"\n  and {len(problems) - 10} more" if len(problems) > 10 else ""
            raise UserError(f"checkpoint {where} does not fit the model:\n{shown}{more}")
        restore = ChecksummedRestore(abstract_state)
        with self._readable(step):
            state = self.manager.restore(step, args=ocp.args.Composite(state=restore))["state"]
        check_finite(state, where)
        return state

    def restore_params(self, step: int) -> PyTree:
        """Read only the parameters of a step, as host arrays in their stored shapes.

        Where the run averages them (`optim.ema_decay`), these are the averages.

        Raises:
          DamagedError: a file is not what was written, or a number is not finite; names it.
        """
        path = self.folder / str(step) / "state"
        with self._checked(step):
            stored = self._metadata(step)
            name = "ema" if "ema" in stored else "params"
            # One device, whatever mesh wrote them: Orbax would ask for that many devices again.
            device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            abstract = jax.tree.map(
                lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=device), stored[name]
            )
            item = {name: abstract}
            # The optimizer state is twice as large as the parameters and stays on disk.
            args = ocp.args.PyTreeRestore(
                item,
                restore_args=ocp.checkpoint_utils.construct_restore_args(item),
                partial_restore=True,
            )
            with ocp.PyTreeCheckpointer() as checkpointer:
                params = jax.device_get(checkpointer.restore(path, args=args)[name])
        check_finite(params, path.parent)
        return params

    def set_aside(self, steps: Sequence[int]) -> None:
        """Move checkpoints out of the way, to `WORKDIR/set_aside`; all processes call it."""
        if not steps:
            return
        wait_for_all()  # until none reads them any more
        if is_main_process():
            folder = self.folder.parent / SET_ASIDE
            folder.mkdir(exist_ok=True)
            for step in steps:
                shutil.rmtree(folder / str(step), ignore_errors=True)  # of an earlier time
                (self.folder / str(step)).rename(folder / str(step))
            print(f"set aside in {folder}: steps {', '.join(map(str, steps))}", flush=True)
        wait_for_all()
        self.manager.reload()

    def close(self) -> None:
        """Wait for the last save and end the background threads."""
        self.manager.wait_until_finished()
        self.manager.close()

    def _metadata(self, step: int) -> PyTree:
        return self.manager.item_metadata(step)["state"].tree

    @contextlib.contextmanager
    def _checked(self, step: int) -> Iterator[None]:
        """Compare the files of a step with their checksums, and then read them within the block.

        Processes divide the files, and raise if one of them has found a damaged one.
        """
        folder, problem = self.folder / str(step) / "state", ""
        try:
            names = sorted(read_sums(folder))
            check_sums(folder, names[jax.process_index() :: jax.process_count()])
        except DamagedError as error:
            problem = str(error)
        if problem := first_of_all(problem):
            raise DamagedError(problem)
        with self._readable(step):
            yield

    @contextlib.contextmanager
    def _readable(self, step: int) -> Iterator[None]:
        """Raise DamagedError for whatever Orbax raises where no checksums vouch for the files."""
        folder = self.folder / str(step) / "state"
        try:
            yield
        except UNREADABLE as error:
            # With checksums it is no damage: another version of Orbax, a full memory, our mistake.
            if isinstance(error, UserError) or (folder / SUMS).exists():
                raise
            reason = first_line(error)[:200]
            raise DamagedError(f"checkpoint {folder} cannot be read: {reason}") from error

    def __enter__(self):
        """Return itself."""
        return self

    def __exit__(self, *_):
        """Close."""
        self.close()


def first_of_all(text: str) -> str:
    """Return the first text of all processes that is not empty; the same in each of them."""
    if jax.process_count() == 1:
        return text
    own = np.frombuffer(text.encode()[:1024].ljust(1024, b"\0"), np.uint8)
    found = [row.tobytes().rstrip(b"\0") for row in multihost_utils.process_allgather(own)]
    return next((row.decode("utf-8", "replace") for row in found if row), "")


def check_finite(state: PyTree, where: Path) -> None:
    """Raise DamagedError, naming the array, if a number of a restored tree is not finite."""
    for path, x in jax.tree_util.tree_leaves_with_path(state):
        if jnp.issubdtype(x.dtype, jnp.inexact) and not _all_finite(x):
            raise DamagedError(f"checkpoint {where}: {path_name(path)} holds NaN or infinity")


@jax.jit
def _all_finite(x: Array) -> Array:
    return jnp.isfinite(x).all()


def shape_mismatches(stored: dict[str, tuple[int, ...]], abstract_state: PyTree) -> list[str]:
    """List each array that differs between a checkpoint and the expected state, a line each."""
    expected = shapes_by_path(abstract_state)
    lines = []
    for name in sorted(stored.keys() | expected.keys()):
        left, right = stored.get(name, "absent"), expected.get(name, "absent")
        if left != right:
            lines.append(f"{name}: {left} in the checkpoint, {right} in the model")
    return lines


def load_params(workdir: Path, step: int | None = None) -> tuple[PyTree, int]:
    """Read parameters and step of a checkpoint of a run, or of an export of one.

    Args:
      workdir: a run, or an export of one.
      step: of the checkpoint; None: the newest whole one. A damaged one is then named on stderr,
        and the one before it is read.

    Returns:
      Host arrays, and the training step.

    Raises:
      MissingError: the directory holds no checkpoint, or none of this step.
      UserError: every checkpoint is damaged; or the export is, or it is of another version or a
        pickle file; names the file.
    """
    if holds_tensors(Path(workdir)):
        params, exported = load_export(Path(workdir))
        return params, exported.step
    if not (Path(workdir) / "checkpoints").is_dir():
        raise MissingError(f"{workdir} holds no checkpoints")
    with Checkpoints(workdir) as checkpoints:
        if step is not None:
            steps = checkpoints.all_steps()
            if step not in steps:
                raise MissingError(f"{workdir} holds no checkpoint of step {step}, but of {steps}")
            return checkpoints.restore_params(step), step
        error: UserError = MissingError(f"{workdir}/checkpoints holds no complete checkpoint")
        for step in reversed(checkpoints.all_steps()):
            try:
                return checkpoints.restore_params(step), step
            except DamagedError as damage:
                error = damage
                print(f"step {step} is left out: {damage}", file=sys.stderr)
        raise error
