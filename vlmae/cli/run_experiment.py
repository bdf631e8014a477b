"""One run from its config to its result: data, training, evaluation."""

import contextlib
import os
from pathlib import Path

import jax
from jaxtyping import PyTree

from data_pipelines.loading.evaluation import eval_data
from data_pipelines.loading.pipeline import train_batches
from data_pipelines.schema.checks import check
from data_pipelines.schema.classes import CLASSES_FILE, Classes, load_classes
from data_pipelines.schema.config import DataConfig
from data_pipelines.storage.class_counts import classes_for
from data_pipelines.storage.open_files import check_open_files
from data_pipelines.storage.prepare import prepare
from data_pipelines.storage.row_counts import count_rows
from data_pipelines.storage.shared_media import describe_shared
from data_pipelines.storage.stored import (
    is_prepared,
    open_source,
    source_states,
    tokenizer_for,
)
from data_pipelines.storage.text_lengths import longest_text
from data_pipelines.text.tokenize import Tokenizer, load_tokenizer
from vlmae.config.epochs import has_epochs, in_steps
from vlmae.config.experiment import ExperimentConfig
from vlmae.config.tree import override
from vlmae.evaluation.evaluate import evaluate, print_tables
from vlmae.evaluation.evaluators import chosen_evaluators
from vlmae.evaluation.zero_shot import read_classes
from vlmae.ops.multiple_choice import SLOT
from vlmae.parallel.devices import check_gpus, describe_devices
from vlmae.parallel.processes import is_main_process, print_on_main_process
from vlmae.runs.best import check_metric, result_step
from vlmae.runs.disk import disk_errors_explained
from vlmae.runs.inference import OnProgress
from vlmae.runs.load import tokenizer_of
from vlmae.runs.metric_writer import read_metrics
from vlmae.runs.owner import own
from vlmae.runs.result import last_step, write_result
from vlmae.runs.waiting import waiting
from vlmae.runs.workdir import DataState, check_data, check_workdir, has_checkpoint, note_data
from vlmae.training.operations import describe_saving
from vlmae.training.overview import describe_run
from vlmae.training.source_model import with_source_model
from vlmae.training.train import train
from vlmae.weights.huggingface import find

GENERATED = ("shapes", "shapes_3")  # data sets that need no input, so they are made on first use


def run_experiment(
    config: ExperimentConfig,
    workdir: Path,
    profile: bool = False,
    resume_step: int | None = None,
) -> dict[str, float]:
    """Prepare generated data, fill in the config, train, and evaluate.

    The last file that it writes is `result.json`, which says that the run is complete.

    Args:
      config: the experiment.
      workdir: folder for everything that the run writes.
      profile: see `vlmae.training.train.train`.
      resume_step: see there.

    Returns:
      The metrics of the final evaluation.

    Raises:
      InUseError: another process works in the folder.
      UserError: the process was given GPUs, and jax finds none; the disk is full, or the folder
        cannot be written or has vanished.
    """
    check_gpus(os.environ)
    print_on_main_process(f"devices: {describe_devices()}")
    check_metric(config.train.best_metric, chosen_evaluators(config))
    config, tokenizer, classes = resolve(config)
    owned = own(workdir) if is_main_process() else contextlib.nullcontext()
    with disk_errors_explained(workdir), owned:
        return _run_resolved(config, tokenizer, classes, workdir, profile, resume_step)


def _run_resolved(
    config: ExperimentConfig,
    tokenizer: Tokenizer,
    classes: Classes | None,
    workdir: Path,
    profile: bool,
    resume_step: int | None,
) -> dict[str, float]:
    found = data_state(config.data, tokenizer, classes)
    check_workdir(config, workdir)
    if has_checkpoint(workdir):
        check_data(found, workdir, words_state(*own_words(workdir)))
    # Read before training: a missing evaluation split must not show after the last step.
    data = eval_data(config.data, classes)
    if config.evaluation.prompts:
        read_classes(data, config.evaluation)
    if config.train.best_metric and config.data.eval.split == "test":
        print_on_main_process(
            "note: the best step is chosen on test; --data.eval.split val leaves that unseen"
        )

    def evaluate_params(
        params: PyTree, mesh: jax.sharding.Mesh, on_progress: OnProgress
    ) -> dict[str, float]:
        return evaluate(config, params, mesh, data, workdir, on_progress)

    def make_batches(data_config: DataConfig, start_step: int, part: int, parts: int):
        # Here, and not before: `train` has checked by now that it can begin.
        if is_main_process():
            write_words(tokenizer, classes, workdir)
            note_data(found, workdir)
        return train_batches(
            data_config,
            start_step,
            seed=config.seed,
            classes=classes,
            part=part,
            parts=parts,
        )

    if is_main_process():  # counting reads all texts
        with waiting("counting clips, texts and parameters"):
            overview = describe_run(config)
        print_on_main_process("\n".join(overview))
    result = train(config, workdir, make_batches, evaluate_params, profile, resume_step)
    if is_main_process():
        last = max(last_step(read_metrics(workdir)), 1)  # it may have ended early
        step = result_step(workdir, config.train.best_metric, last)
        written = write_result(workdir, step, result, config.data.batch_size)
        print_tables(workdir)
        done = override(config, {"train.steps": last})
        with waiting("counting the operations of the dense twin"):
            saving = describe_saving(done, written["cost"]["total_flops"])
        if saving:
            print(saving)
        print(f"results, metrics and pictures are in {workdir}")
    return result


def data_state(config: DataConfig, tokenizer: Tokenizer, classes: Classes | None) -> DataState:
    """Describe sources, vocabulary and classes, for `vlmae.runs.workdir.check_data`."""
    return {**source_states(config), **words_state(tokenizer, classes)}


def words_state(tokenizer: Tokenizer | None, classes: Classes | None) -> DataState:
    """Describe vocabulary and classes, as far as they are there."""
    state = {}
    if tokenizer:
        state["tokenizer"] = {"words": tokenizer.vocab_size, "digest": tokenizer.digest()}
    if classes:
        state["classes"] = {"classes": len(classes.names), "digest": classes.digest()}
    return state


def own_words(workdir: Path) -> tuple[Tokenizer | None, Classes | None]:
    """Read tokenizer and classes of a run, as far as they are there."""
    tokenizer, classes = workdir / "tokenizer", workdir / CLASSES_FILE
    return (
        load_tokenizer(tokenizer) if tokenizer.is_dir() else None,
        load_classes(classes) if classes.is_file() else None,
    )


def write_words(tokenizer: Tokenizer, classes: Classes | None, workdir: Path) -> None:
    """Write tokenizer and classes of a run that begins; one that goes on keeps its own."""
    begins = not has_checkpoint(workdir)
    if begins or not (workdir / "tokenizer").is_dir():
        tokenizer.save(workdir / "tokenizer")
    if classes and (begins or not (workdir / CLASSES_FILE).is_file()):
        classes.save(workdir)


def resolve(config: ExperimentConfig) -> tuple[ExperimentConfig, Tokenizer, Classes | None]:
    """Prepare generated data, and fill in the fields that the data decide.

    Returns:
      The config with vocabulary and number of classes; the tokenizer; the classes, if the task has
      any.

    Raises:
      MissingError, UserError: the data are not there, or contradict the config.
    """
    # In this order, since tokenizer and classes are read from the prepared data.
    check_open_files(config.data.num_workers)
    config = with_sources(config)
    # Before the vocabulary is read, since it may come with the initial parameters.
    config = with_source_tokenizer(with_source_model(config))
    with waiting("reading vocabulary and classes"):
        tokenizer, classes = tokenizer_for(config.data), classes_for(config.data)
    config = with_text_len(with_steps(with_vocabulary(config, tokenizer)), tokenizer)
    return with_classes(config, classes) if classes else config, tokenizer, classes


def with_sources(config: ExperimentConfig) -> ExperimentConfig:
    """Name the evaluation source, prepare generated data, and check that all splits are there.

    Says where evaluation has another data set than training, or media of it.

    Raises:
      MissingError: a data set is not prepared.
      UserError: a split does not exist.
    """
    config = override(config, {"data.eval": config.data.eval_source})
    data = config.data
    sources = sorted((*data.train, data.eval), key=lambda source: source.name in GENERATED)
    # A misspelled name shows before others are generated, and a missing split before compiling.
    for source in sources:
        if source.name in GENERATED and not is_prepared(source.name, data.data_dir):
            prepare(source.name, data.data_dir)
        open_source(source, data.data_dir)
    if is_main_process():
        names = {source.name: None for source in data.train}  # an ordered set
        if data.eval.name not in names:
            print(f"note: training on {', '.join(names)}, evaluation on {data.eval.name}")
        for sentence in describe_shared(data):
            print(f"note: {sentence}")
    return config


def with_steps(config: ExperimentConfig) -> ExperimentConfig:
    """Fill in the lengths in steps that follow from epochs and the prepared data.

    Raises:
      UserError: the lengths do not fit each other.
    """
    if not has_epochs(config):  # counting reads all texts, of millions for a minute
        return config
    with waiting("counting the texts of an epoch"):
        rows = sum(count_rows(source, config.data).texts for source in config.data.train)
    return in_steps(config, rows)


def with_vocabulary(config: ExperimentConfig, tokenizer: Tokenizer) -> ExperimentConfig:
    """Fill in vocabulary size, special ids and the ids of MCM's template from the tokenizer.

    Raises:
      UserError: the vocabulary of the config is too small for the tokenizer, or the texts of MCM
        too short for its template.
    """
    wanted, size = config.model.text.vocab_size, tokenizer.vocab_size
    check(
        not wanted or wanted >= size,
        f"--model.text.vocab-size={wanted}, but the tokenizer has {size} words",
    )
    filled = {
        # A larger table than the tokenizer needs is allowed: some published ones are padded.
        "model.text.vocab_size": wanted or size,
        "model.text.cls_id": tokenizer.cls_id,
    }
    if tokenizer.mask_id is not None:
        filled["model.text.mask_id"] = tokenizer.mask_id
    check(
        tokenizer.mask_id is not None or not config.objectives.need("masked_text"),
        f"--objectives.mlm={config.objectives.mlm} masks words, but the tokenizer has no [MASK]: "
        "set --objectives.mlm=0",
    )
    if config.objectives.mcm:
        template = tokenizer.encode_template(config.objectives.mcm_template, SLOT)
        longest, fixed = config.objectives.mcm_len, len(template) - template.count(SLOT)
        check(
            longest >= len(template),
            f"--objectives.mcm-len={longest} leaves no room for the options: the words of "
            f"--objectives.mcm-template alone are {fixed} tokens",
        )
        filled["objectives.mcm_template_ids"] = template
    return override(config, filled)


def with_text_len(config: ExperimentConfig, tokenizer: Tokenizer) -> ExperimentConfig:
    """Fill in the length of texts, where the config leaves it to the data.

    By the tokenizer that is used: with initial parameters of another run comes that run's own,
    which may cut unknown words into many pieces.
    """
    if config.data.text_len:
        return config
    with waiting("measuring the texts"):
        longest = longest_text(config.data, tokenizer)
    length = min(-(-longest // 8) * 8, config.model.text.max_len)
    return override(config, {"data.text_len": length})


def with_source_tokenizer(config: ExperimentConfig) -> ExperimentConfig:
    """Take the tokenizer of the initial parameters, unless the config names one.

    With another tokenizer, the embedding of a token would belong to another word. A source that
    does not exist is left for the code that reads its parameters, which says more about it.
    """
    train = config.train
    if config.data.tokenizer or not (train.init_from or train.init.text):
        return config
    if train.init.text:
        return override(config, {"data.tokenizer": str(find(train.init.text))})
    source = Path(train.init_from).expanduser()
    if not source.is_dir():
        return config
    return override(config, {"data.tokenizer": str(tokenizer_of(source))})


def with_classes(config: ExperimentConfig, classes: Classes) -> ExperimentConfig:
    """Fill in the number of classes from the data.

    Raises:
      UserError: the config asks for another number.
    """
    wanted, found = config.model.num_classes, len(classes.names)
    check(wanted in (0, found), f"--model.num-classes={wanted}, but the data have {found} classes")
    return override(config, {"model.num_classes": found})
