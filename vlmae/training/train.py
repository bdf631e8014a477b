"""The training loop around the pure step, visible from start to end."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import jax
from jaxtyping import PyTree

from data_pipelines.schema.checks import MissingError, UserError
from data_pipelines.schema.records import Batch
from vlmae.config.experiment import ExperimentConfig, load_config
from vlmae.config.phases import Segment, segments
from vlmae.config.tree import differing, override
from vlmae.parallel.exit_codes import Preempted
from vlmae.parallel.malloc import return_freed_memory
from vlmae.parallel.preemption import PreemptionNotice
from vlmae.parallel.processes import is_main_process, print_on_main_process
from vlmae.parallel.sharding import (
    batch_shards,
    make_mesh,
    process_part,
    put_batch,
    replicated,
    state_shardings,
)
from vlmae.runs.best import BestKeeper
from vlmae.runs.checkpoint import Checkpoints
from vlmae.runs.disk import check_there
from vlmae.runs.heartbeat import Heartbeat
from vlmae.runs.metric_registry import headline
from vlmae.runs.metric_writer import (
    MetricWriter,
    NullWriter,
    Progress,
    copy_metrics,
    open_log,
)
from vlmae.runs.result import forget_result
from vlmae.runs.waiting import waiting
from vlmae.runs.workdir import check_workdir, write_run_metadata
from vlmae.training.batch_size import check_memory
from vlmae.training.compiled_step import CompiledStep, Trace, TracedStep
from vlmae.training.init_weights import read_initial, take_initial
from vlmae.training.read_ahead import ReadAhead
from vlmae.training.recovery import (
    Evaluate,
    Resources,
    best_result,
    evaluate_missing,
    evaluating,
    go_back,
)
from vlmae.training.schedule import (
    Due,
    MakeBatches,
    config_before,
    due_after,
    minutes_due,
    segment_batches,
)
from vlmae.training.step import (
    TrainState,
    abstract_state,
    make_checked_mesh,
    make_step,
    run_values,
    sharded_init,
)
from vlmae.training.train_log import NonFiniteLoss, TrainLog, measure_matrix_rate

Steps = Mapping[ExperimentConfig, CompiledStep | TracedStep]  # by the configs of the segments


def make_steps(
    parts: Sequence[Segment], mesh: jax.sharding.Mesh, state: PyTree, notify: Callable
) -> dict[ExperimentConfig, CompiledStep]:
    """Make a step for each config of the segments; it is compiled when it is first needed."""

    def step_of(config: ExperimentConfig) -> CompiledStep:
        values = jax.device_put(run_values(config), replicated(mesh))  # once, not in each step
        return CompiledStep(make_step(config, mesh, state), values, notify)

    return {config: step_of(config) for config in dict.fromkeys(part.config for part in parts)}


def start_state(
    config: ExperimentConfig,
    mesh: jax.sharding.Mesh,
    checkpoints: Checkpoints,
    resume_step: int | None = None,
) -> tuple[TrainState, str]:
    """Restore the run's last whole checkpoint, or that of `resume_step`, or make a new state.

    A new state comes from the seed, and from `train.init_from` or `train.init` if they are set.

    Returns:
      The state, and a report of loaded parameters: empty for a run that continues or loads none.

    Raises:
      UserError: the checkpoint has other shapes, is damaged, or lies beyond the last step; see
        also `read_initial`, `take_initial` and `branch_off`.
    """
    abstract = abstract_state(config)  # shapes only: a checkpoint is read straight into shards
    shardings = state_shardings(abstract, mesh)
    # The mesh may have changed since: each device reads what it holds now.
    sharded = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        abstract,
        shardings,
    )
    step = checkpoints.latest_step() if resume_step is None else resume_step
    if step is not None and step > config.train.steps:
        raise UserError(
            f"the checkpoint is at step {step}, beyond train.steps={config.train.steps}"
        )
    state = checkpoints.restore_newest(sharded, resume_step)
    if state is not None:
        print_on_main_process(f"continuing from step {int(state.step)}")
        return state, ""
    if config.train.init_step:
        return branch_off(config, sharded)
    source = read_initial(config)
    state = sharded_init(config, mesh)(config.seed)
    if source is None:
        return state, ""
    params, report = take_initial(source, state.params)
    print_on_main_process(report)
    return state.starting_from(params), report


def branch_off(config: ExperimentConfig, abstract: PyTree) -> tuple[TrainState, str]:
    """Restore step `train.init_step` of the run `train.init_from`, moments included.

    Returns:
      The state, and a report of the fields in which the two configs differ.

    Raises:
      MissingError: there is no such run, or no checkpoint of this step.
      UserError: the checkpoint has other shapes, or is of another seed; see `load_config`.
    """
    trunk, step = Path(config.train.init_from).expanduser(), config.train.init_step
    fields = differing(load_config(trunk / "config.json"), config)
    if "seed" in fields:
        raise UserError(
            f"--train.init-step goes on with the batches of {trunk}, whose --seed is not "
            f"{config.seed}"
        )
    if "optim.ema_decay" in fields:
        raise UserError(
            f"--train.init-step goes on with the state of {trunk}, averages included: leave "
            "--optim.ema-decay as it is there"
        )
    with Checkpoints(trunk, keep=None) as checkpoints:
        saved = checkpoints.all_steps()
        if step not in saved:
            raise MissingError(f"{trunk} has no checkpoint of step {step}, but of {saved}")
        state = checkpoints.restore(step, abstract)
    report = f"branches off {trunk} at step {step}; other fields: {', '.join(fields) or 'none'}"
    print_on_main_process(report)
    return state, report


def train(
    config: ExperimentConfig,
    workdir: Path,
    make_batches: MakeBatches,
    evaluate: Evaluate,
    profile: bool = False,
    resume_step: int | None = None,
) -> dict[str, float]:
    """Train to `train.steps`, continuing from the work directory's last checkpoint.

    Of several processes all must call this; the first one prints, and writes all but checkpoints.

    Args:
      config: the resolved experiment.
      workdir: for config, metrics and checkpoints; the same for all processes.
      make_batches: (data config of a segment, start step, part, parts) -> this part of the rows of
        the batches from that step on; closed when it is no longer read.
      evaluate: (parameters, mesh, on_progress) -> metrics; for on_progress see `OnProgress`.
      profile: write a profile of a few steps of the first process to `profile` in there.
      resume_step: the checkpoint to go on from, in place of the last one.

    Returns:
      The metrics of the final evaluation, or of the best step with `train.best_metric`.

    Raises:
      UserError: see `check_workdir`, `check_memory`, `start_state` and the checks of the mesh.
      NonFiniteLoss, TooManyBadClips: the run stopped; the last good checkpoint is intact.
      Preempted: a signal asked to end, see `PreemptionNotice`; the step is saved.
    """
    config = with_local_groups(config, workdir)
    parts = segments(config)  # first: it checks the phases
    mesh = make_checked_mesh(config)
    check_workdir(config, workdir)
    check_memory(config, mesh)
    with waiting("measuring the speed of the devices"):  # while they have no other work
        matrix_rate = measure_matrix_rate(config.model.dtype)
    with contextlib.ExitStack() as stack:
        notice = stack.enter_context(PreemptionNotice())
        stack.enter_context(jax.set_mesh(mesh))
        # Entered early and so left late: it watches the last save too.
        heart = stack.enter_context(Heartbeat(workdir, config.train.max_idle_secs))
        checkpoints = stack.enter_context(Checkpoints(workdir, config.train.keep_checkpoints))
        with waiting("making or reading the parameters"):
            state, loaded = start_state(config, mesh, checkpoints, resume_step)
        return_freed_memory()
        best = BestKeeper(config.train.best_metric, config.train.patience, workdir, checkpoints)
        best.go_on_from(int(state.step))
        start, last = int(state.step), config.train.steps
        if is_main_process():
            if start < last:  # a run that goes back is complete no longer
                forget_result(workdir)
            write_run_metadata(config, workdir, loaded)
            if loaded and config.train.init_step:
                copy_metrics(Path(config.train.init_from).expanduser(), workdir, start)
        writer, progress = open_writers(config, workdir, start, stack)
        batches = segment_batches(parts, start, make_batches, *process_part(mesh))
        stack.enter_context(contextlib.closing(batches))
        batches = stack.enter_context(ReadAhead(batches, lambda batch: put_batch(batch, mesh)))
        steps = make_steps(parts, mesh, state, progress.print)
        with waiting("compiling the norm of the parameters", progress.print):
            log = TrainLog(config, start, state.params, matrix_rate, writer, progress)
        # One process is enough: all run the same program.
        if profile and is_main_process():
            paused = log.meter.paused
            trace = stack.enter_context(Trace(workdir / "profile", progress.print, paused))
            steps = {key: TracedStep(step, trace) for key, step in steps.items()}
            evaluate = trace.around(evaluate)
        resources = Resources(workdir, mesh, heart, checkpoints, notice, log, best)
        state = run_steps(config, state, batches, steps, evaluate, resources)
        last = int(state.step)
        if is_main_process():
            check_there(workdir)
        try:
            with waiting(f"evaluating step {last}", progress.print):
                return best_result(state, evaluate, resources)
        except Preempted:
            progress.print(f"{notice}: step {last} is saved; the same command evaluates it")
            raise


def open_writers(
    config: ExperimentConfig, workdir: Path, start: int, stack: contextlib.ExitStack
) -> tuple[MetricWriter | NullWriter, Progress | NullWriter]:
    """Open metric files and progress bar in the first process; the stack closes them."""
    if not is_main_process():
        return NullWriter(), NullWriter()
    writer = MetricWriter(workdir, start, open_log(config, workdir))
    progress = Progress(start, config.train.steps)
    stack.enter_context(contextlib.closing(writer))
    stack.enter_context(contextlib.closing(progress))
    return writer, progress


def run_steps(
    config: ExperimentConfig,
    state: TrainState,
    batches: Iterator[Batch],
    steps: Steps,
    evaluate: Evaluate,
    resources: Resources,
) -> TrainState:
    """Run all steps that are left, with the logs, evaluations and checkpoints between them.

    `batches` are on the devices.

    Raises:
      NonFiniteLoss, TooManyBadClips, Preempted: see `train`.
    """
    workdir, mesh, heart, checkpoints, notice, log, best = resources
    evaluate_missing(config, state, evaluate, resources)
    if best.stops():
        return state
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    parts, saved_at = segments(config), time.monotonic()
    # Workers take seconds to start; later a step is too short for a thread that watches it.
    said = waiting("starting to read clips", log.progress.print)
    for step in range(int(state.step) + 1, config.train.steps + 1):
        heart.enter("waiting for data", step)
        with log.meter.waiting(), said:
            batch = next(batches)
        said = contextlib.nullcontext()
        run_step = steps[config_before(parts, step)]
        # A phase of its own: it may take minutes, and a message of the watchdog names the phase.
        heart.enter("compiling", step)
        with log.meter.paused():
            run_step.compile(state, batch)
        heart.enter("training", step)
        notice.has_work = True
        state, metrics = run_step(state, batch)
        if on_cpu:  # simulated devices may deadlock when several steps are under way
            jax.block_until_ready(metrics)

        preempted = notice.agreed()
        due = due_after(step, config.train, preempted)
        if minutes_due(config.train, step, time.monotonic() - saved_at):
            due = due._replace(save=True)
        try:
            log.add(step, metrics, read_now=any(due))
            if any(due):  # nothing is reported or saved before it is known to be finite
                log.check_params(step, state.params)
        except NonFiniteLoss as error:
            state = go_back(state, step, error, resources)
            due = Due(log=False, evaluate=due.evaluate, save=True)
        if any(due) and is_main_process():  # others may see a new file late
            check_there(workdir)
        if due.log:
            log.report(step)
        if due.evaluate:
            try:
                with log.meter.paused(), waiting(f"evaluating step {step}", log.progress.print):
                    values = evaluate(state.evaluated, mesh, evaluating(resources, step))
                log.writer.write(step, values)
                log.progress.print(f"step {step}: {headline(values)}")
                if best.add(step, values, is_main_process()) or best.stops():
                    due = due._replace(save=True)
            except Preempted:  # it is done first of all when the run goes on
                preempted = True
        if due.save or preempted:  # last: what a continued run does not do again is on record
            heart.enter("saving", step)
            with log.meter.paused(), waiting(f"saving step {step}", log.progress.print):
                checkpoints.save(step, state)
            saved_at = time.monotonic()
        if preempted:
            log.progress.print(f"{notice}: saving step {step}; the same command goes on from it")
            raise notice.exit()
        log.progress.advance()
        if best.stops():
            log.progress.print(f"{best.metric} was no better in {best.patience} evaluations")
            break
    return state


def with_local_groups(config: ExperimentConfig, workdir: Path) -> ExperimentConfig:
    """Fill in `objectives.local_groups`: that of the run, or one for each device of a new run.

    So a run that goes on elsewhere draws its negatives from the same rows.
    """
    if config.objectives.local_groups:
        return config
    path = workdir / "config.json"
    stored = load_config(path).objectives.local_groups if path.exists() else 0
    groups = stored or batch_shards(make_mesh(config.mesh))
    return override(config, {"objectives.local_groups": groups})
