"""Every experiment on published data: from annotation files to one step and to the evaluators.

The data sets are tiny but in the published formats, and go through their own builders. The configs
are the experiments' own with small sizes; steps are traced, so most of it compiles nothing.
"""

import functools
import json

import jax
import pytest
from experiment_files import EXPERIMENTS, docs_of, step_of
from published_sets import FILES, MEDIA, fill

from data_pipelines.loading.evaluation import EvalData, eval_data
from data_pipelines.loading.pipeline import train_batches
from data_pipelines.schema.classes import Classes
from data_pipelines.schema.config import DataConfig
from data_pipelines.schema.records import Batch
from data_pipelines.storage.class_counts import classes_for
from data_pipelines.storage.prepare import PUBLISHED, prepare
from data_pipelines.storage.stored import tokenizer_for
from vlmae.cli.run_experiment import run_experiment, with_classes, with_vocabulary
from vlmae.config.experiment import ExperimentConfig
from vlmae.config.tree import override

BATCH_SIZE = 4
SMALL = {
    "data.batch_size": BATCH_SIZE,
    "data.eval_batch_size": BATCH_SIZE,
    "data.image_size": 16,
    "data.num_workers": 0,
    "model.video.patch_size": 8,
    "model.video.sparsify.stages": (0,),
    "model.fusion.depth": 1,
    "model.fusion.sampler.video_latents": 4,
    "model.fusion.sampler.text_latents": 2,
    "model.selector.width": 16,
    "model.selector.depth": 1,
    "model.selector.num_heads": 2,
    "model.embed_dim": 8,
    "model.answer_depth": 1,
    "model.dtype": "float32",
    "optim.warmup_steps": 0,
    "train.steps": 1,
    "train.eval_every_steps": 0,
    "train.init_from": "",
} | {
    f"model.{part}.{name}": size
    for part in ("video", "text", "pixel_decoder")
    for name, size in {"width": 16, "depth": 1, "num_heads": 2, "mlp_dim": 32}.items()
    if (part, name) != ("pixel_decoder", "mlp_dim")
}


def published_names(config: DataConfig) -> set[str]:
    """The data sets of a config, if all of them are published ones."""
    names = {source.name for source in (*config.train, config.eval_source)}
    return names if names <= set(PUBLISHED) else set()


ON_PUBLISHED = [name for name, get in EXPERIMENTS.items() if published_names(get().data)]


@pytest.fixture(scope="session")
def prepare_published(tmp_path_factory):
    """Prepares the data sets of a config, each once, and returns their data_dir."""
    data_dir = tmp_path_factory.mktemp("published")

    @functools.cache
    def prepare_one(name: str) -> None:
        manual_dir = tmp_path_factory.mktemp(name)
        fill(manual_dir, FILES[name], MEDIA[name])
        prepare(name, data_dir, manual_dir=manual_dir, allow_other_counts=True, max_bad_ratio=0.0)

    def prepare_all(config: DataConfig) -> str:
        for name in published_names(config):
            prepare_one(name)
        return str(data_dir)

    return prepare_all


@pytest.fixture
def small(prepare_published):
    """The config of an experiment with small sizes, its data sets prepared."""

    def shrink(name: str) -> ExperimentConfig:
        config = EXPERIMENTS[name]()
        return override(config, SMALL | {"data.data_dir": prepare_published(config.data)})

    return shrink


def filled(config: ExperimentConfig, classes: Classes | None) -> ExperimentConfig:
    """Fill in vocabulary and classes, as the command line does before training."""
    config = with_vocabulary(config, tokenizer_for(config.data))
    return with_classes(config, classes) if classes else config


@pytest.mark.parametrize("name", ON_PUBLISHED)
def test_from_annotations_to_a_step(name, small):
    get_config = EXPERIMENTS[name]
    for dataset in published_names(get_config().data):
        assert f"vlmae prepare {dataset} --manual-dir" in docs_of(get_config)
    config = small(name)
    classes = classes_for(config.data)
    config = filled(config, classes)
    with train_batches(config.data, 0, seed=0, classes=classes) as batches:
        drawn = [next(batches) for _ in config.data.train]
    for batch in drawn:
        check_training(config, batch)
    check_step(config, drawn)
    check_evaluation(config, eval_data(config.data, classes))


def check_step(config: ExperimentConfig, batches: list[Batch]) -> None:
    """A step gives a state like the one before, and the losses of the objectives, no others."""
    step, state = step_of(config)
    for batch in batches:
        after, metrics = jax.eval_shape(step, state, batch)
        before, after = (jax.tree.map(lambda x: (x.shape, x.dtype), x) for x in (state, after))
        assert before == after
        losses = {f"loss/{name}" for name in config.objectives.weights}
        assert losses == {name for name in metrics if name.startswith("loss/")} - {"loss/total"}


def check_training(config: ExperimentConfig, batch: Batch) -> None:
    """Every clip was decoded, and every row says what its objectives learn from."""
    task, size = config.data.task, config.data.image_size
    frames = {source.num_frames for source in config.data.train}
    assert batch.video.shape[1] in frames
    assert batch.video.shape == (BATCH_SIZE, batch.video.shape[1], size, size, 3)
    assert batch.valid.all()
    says_something = batch.text_mask.sum(axis=1) > 2  # more than [CLS] and [SEP]
    assert (says_something == (task != "labels")).all()
    if task == "options":
        assert batch.other_mask.any(axis=2).all() and batch.targets is None
    elif task in ("questions", "labels"):
        assert batch.targets.any(axis=1).all()
    if config.data.answer_len:
        assert (batch.answer_mask.sum(axis=1) > 2).all()


def check_evaluation(config: ExperimentConfig, data: EvalData) -> None:
    """The evaluators of the trained objectives find what they ask about."""
    with data.batches() as batches:
        first = next(batches)
    size, clips = config.data.image_size, min(data.num_clips, BATCH_SIZE)
    assert first.video.shape == (BATCH_SIZE, config.data.eval.num_frames, size, size, 3)
    assert first.valid.sum() == clips
    objectives = config.objectives
    if objectives.vtc:
        assert set(data.texts.media_ids) == set(data.media_ids) and all(data.texts.captions)
    if config.evaluation.choices:
        assert (data.choices.option_mask.any(axis=2).sum(axis=1) == 5).all()
    if objectives.answer:
        assert all(data.questions.answers) and all(data.questions.texts.captions)
        assert set(data.questions.kinds) != {""}
    if objectives.answer_kind == "decoder":
        assert data.answers()[0].shape == (config.model.num_classes, config.data.answer_len)
    if objectives.label:
        assert first.targets.shape[1] == len(data.classes.names) > 0
        assert first.targets[first.valid].any(axis=1).all()


# Each case: experiment, what its evaluation writes, metrics that must be in there.
WHOLE = [
    ("multi/qa tgif_action", "multiple_choice", {"mcm_accuracy_action", "chance_accuracy"}),
    ("smaug/qa msrvtt", "answers", {"accuracy", "accuracy_what"}),
    ("multi/hvu_labels", "labels", {"map", "micro_f1"}),
]


@pytest.mark.parametrize(("name", "result", "metrics"), WHOLE)
def test_from_annotations_to_the_number(name, result, metrics, small, tmp_path):
    config = small(name)
    values = run_experiment(config, tmp_path)
    written = json.loads((tmp_path / f"{result}.json").read_text())
    assert metrics <= written.keys()
    assert {f"{result}/{metric}" for metric in metrics} <= values.keys()
    assert (tmp_path / f"{result}.jsonl").read_text().count("\n") == 1  # one question, one clip
    assert (tmp_path / f"{result}.png").is_file()
