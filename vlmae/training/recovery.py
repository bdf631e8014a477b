"""Going on with a run: evaluations that were cut short, and steps that are not finite."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from vlmae.config.experiment import ExperimentConfig
from vlmae.parallel.preemption import PreemptionNotice
from vlmae.parallel.processes import decided_by_main, is_main_process
from vlmae.runs.best import BestKeeper
from vlmae.runs.checkpoint import Checkpoints
from vlmae.runs.heartbeat import Heartbeat
from vlmae.runs.inference import OnProgress
from vlmae.training.schedule import is_due
from vlmae.training.step import TrainState
from vlmae.training.train_log import NonFiniteLoss, TrainLog

Evaluate = Callable[[PyTree, jax.sharding.Mesh, OnProgress], dict[str, float]]


class Resources(NamedTuple):
    """Everything that a loop holds open while it runs."""

    workdir: Path
    mesh: jax.sharding.Mesh
    heart: Heartbeat
    checkpoints: Checkpoints
    notice: PreemptionNotice
    log: TrainLog
    best: BestKeeper


def evaluate_missing(
    config: ExperimentConfig, state: TrainState, evaluate: Evaluate, resources: Resources
) -> None:
    """Do the evaluation in which a run that goes on was told to end."""
    mesh, checkpoints, log = resources.mesh, resources.checkpoints, resources.log
    step, train = int(state.step), config.train
    due = is_due(step, train.eval_every_steps) and step != train.steps
    if due and checkpoints.latest_step() == step:
        if decided_by_main(bool(log.writer.lacks_evaluation(step))):
            values = evaluate(state.evaluated, mesh, evaluating(resources, step))
            log.writer.write(step, values)
            resources.best.add(step, values, is_main_process())


def evaluating(resources: Resources, step: int) -> OnProgress:
    """Enter an evaluation; each call of the result counts as progress and asks whether to end."""
    seen, notice = resources.heart.within("evaluating", step), resources.notice

    def on_progress(together: bool = False) -> None:
        seen()
        if together or not notice.several:
            notice.stop()

    return on_progress


def best_result(state: TrainState, evaluate: Evaluate, resources: Resources) -> dict[str, float]:
    """Evaluate the last step, and then the best one where that is another.

    Returns:
      The metrics of the best step, or of the last one of a run that keeps none, or whose metric was
      never a number.
    """
    mesh, checkpoints, best, result = resources.mesh, resources.checkpoints, resources.best, {}
    last = int(state.step)
    if not best.stops() or best.step() is None:  # else it was evaluated just now
        result = evaluate(state.evaluated, mesh, evaluating(resources, last))
        resources.log.writer.write(last, result)
        best.add(last, result, is_main_process())
    checkpoints.manager.wait_until_finished()
    step = best.step() if best.metric else last
    if step in (None, last):
        return result
    resources.log.progress.print(f"{best.metric} was best at step {step}, which is the result")
    state = restored(state, step, checkpoints)
    return evaluate(state.evaluated, mesh, evaluating(resources, step))


def restored(state: TrainState, step: int, checkpoints: Checkpoints) -> TrainState:
    """Replace a state by that of a checkpoint, in the same shards; deletes the one given."""
    sharded = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    jax.tree.map(lambda x: x.delete(), state)  # there may be no room for two
    return checkpoints.restore(step, sharded)


def go_back(state: TrainState, step: int, error: NonFiniteLoss, resources: Resources) -> TrainState:
    """Return the last checkpoint's state as that of `step`, so that the next batch comes next.

    Raises:
      NonFiniteLoss: there is no checkpoint, or `train.max_rollbacks` are used up.
    """
    checkpoints, log = resources.checkpoints, resources.log
    checkpoints.manager.wait_until_finished()
    saved = checkpoints.latest_step()
    if saved is None or log.rollbacks == log.config.train.max_rollbacks:
        raise error
    log.progress.print(f"{error}; going back to the parameters of step {saved}")
    log.roll_back()
    before = restored(state, saved, checkpoints)
    # Counts of the optimizer stand for the step, whose learning rate they give.
    moments = jax.tree.map(
        lambda x: x + (step - saved) if jnp.issubdtype(x.dtype, jnp.integer) else x,
        before.opt_state,
    )
    return before.replace(step=before.step + (step - saved), opt_state=moments)
