"""Question answering and labels: losses by the formula, evaluators by single rows, whole runs."""

import functools
import json
import sys
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import CLS, SEP, SMALL, init_params, random_batch, randomize

from data_pipelines.loading.evaluation import EvalData
from data_pipelines.schema.classes import Classes
from data_pipelines.schema.records import Batch, Questions, Texts
from vlmae.cli.experiment import main
from vlmae.cli.run_experiment import with_classes, with_source_tokenizer
from vlmae.config.experiment import EvaluationConfig, MeshConfig
from vlmae.config.tree import override
from vlmae.evaluation import question_answering
from vlmae.evaluation.clip_features import ClipFeatures
from vlmae.evaluation.encode import Encoded, EvalInputs, encode_clips, take_texts
from vlmae.evaluation.evaluate import evaluate_workdir
from vlmae.evaluation.intervals import label_intervals, mean_interval
from vlmae.evaluation.labels import evaluate_labels, format_labels
from vlmae.evaluation.question_answering import evaluate_answers, format_answers
from vlmae.models.scoring import rank_answers
from vlmae.models.video_encoder import VideoFeatures
from vlmae.models.video_language import VideoLanguageModel, build_model
from vlmae.ops.multiple_choice import Caption
from vlmae.parallel.sharding import make_mesh
from vlmae.runs.inference import EvalContext
from vlmae.runs.metric_registry import metric_of
from vlmae.training import objectives

NAMES = tuple(f"clip{i}.mp4" for i in range(6))
CLASSES = Classes({"red": {"color": 3}, "blue": {"color": 2}, "left": {"way": 3}, "never": {}})
OFF = {f"objectives.{name}": 0.0 for name in ("vtc", "vtm", "mlm", "mvm")}
ANSWER = override(
    SMALL, {**OFF, "data.task": "questions", "objectives.answer": 1.0, "model.num_classes": 4}
)
LABEL = override(
    SMALL, {**OFF, "data.task": "labels", "objectives.label": 1.0, "model.num_classes": 4}
)
TARGETS = np.eye(5, 4, dtype=int)[[0, 2, 4, 1, 3, 0]]  # row 2 has no class


def batch_of(targets: np.ndarray, valid: np.ndarray | None = None) -> Batch:
    batch = random_batch(6)._replace(targets=jnp.asarray(targets, bool))
    return batch if valid is None else batch._replace(valid=jnp.asarray(valid))


def run(config, batch: Batch):
    """The parameters, the loss with its metrics, and the logits of every row."""
    model = build_model(config)
    params = randomize(init_params(model, batch, config.objectives))

    @jax.jit
    def compute(params):
        def both(model):
            loss = objectives.compute_losses(model, batch, jax.random.key(0), config.objectives)
            text = model.encode_text(batch.text_ids, batch.text_mask)
            return loss, model.classify(model.fuse(model.encode_video(batch.video), text))

        return model.apply({"params": params}, method=both)

    loss, logits = jax.device_get(compute(params))
    return params, loss, logits


def unmasked(config):
    """Evaluation sees all patches, and so shall these losses."""
    return override(config, {"model.video.mask.ratio": 0.0, "model.text.dropout": 0.0})


def test_answering_is_cross_entropy_over_the_answerable_rows():
    valid = np.array([1, 1, 1, 0, 1, 1], bool)
    _, loss, logits = run(unmasked(ANSWER), batch_of(TARGETS, valid))
    log_p = logits - np.log(np.exp(logits.astype(float)).sum(axis=1, keepdims=True))
    asked = [0, 1, 4, 5]  # row 2 has no class, row 3 is padding
    right = TARGETS.argmax(axis=1)
    assert loss.value == pytest.approx(-np.mean([log_p[row, right[row]] for row in asked]), 1e-5)
    accuracy = np.mean([logits[row].argmax() == right[row] for row in asked])
    assert loss.metrics["answer/accuracy"] == pytest.approx(accuracy)
    assert loss.metrics["answer/valid_ratio"] == pytest.approx(4 / 5)


def test_labeling_is_the_mean_binary_cross_entropy():
    targets = np.array(TARGETS)
    targets[4] = [1, 1, 0, 1]
    valid = np.array([1, 1, 1, 0, 1, 1], bool)
    _, loss, logits = run(unmasked(LABEL), batch_of(targets, valid))
    p = 1 / (1 + np.exp(-logits.astype(float)))
    terms = -np.where(targets, np.log(p), np.log(1 - p))
    assert loss.value == pytest.approx(terms[valid].mean(), 1e-5)


def test_the_text_and_the_clip_both_count():
    """Another question, or another clip, changes the logits of its own row only."""
    batch, config = batch_of(TARGETS), unmasked(ANSWER)
    _, _, logits = run(config, batch)
    for name in ("text_ids", "video"):
        changed = getattr(batch, name).at[2, -1].add(1)
        if name == "text_ids":
            changed = batch.text_ids.at[2, 1].set(batch.text_ids[2, 1] % 30 + 5)
        _, _, others = run(config, batch._replace(**{name: changed}))
        differs = (others != logits).any(axis=1)
        assert differs.tolist() == [False, False, True, False, False, False], name


DECODE = override(
    unmasked(ANSWER),
    {"objectives.answer_kind": "decoder", "data.answer_len": 5, "model.answer_depth": 2},
)
ANSWERS = Caption(
    np.array(
        [[CLS, 9, SEP, 0, 0], [CLS, 9, 12, SEP, 0], [CLS, 20, 9, 30, SEP], [CLS, 5, SEP, 0, 0]],
        np.int32,
    ),
    np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], bool),
)


def decoded_batch() -> Batch:
    rows = np.array([0, 2, 1, 3, 3, 0])
    batch = batch_of(TARGETS, np.array([1, 1, 1, 0, 1, 1], bool))
    return batch._replace(
        answer_ids=jnp.asarray(ANSWERS.ids[rows]), answer_mask=jnp.asarray(ANSWERS.mask[rows])
    )


@pytest.fixture(scope="module")
def decoder():
    """Model and parameters, and the log-probability of each answer for each row, word by word."""
    batch, model = decoded_batch(), build_model(DECODE)
    params = randomize(init_params(model, batch, DECODE.objectives))

    @jax.jit
    def next_word(ids):
        """The distribution after the words so far; the same words for every row."""

        def run(model):
            text = model.encode_text(batch.text_ids, batch.text_mask)
            fused = model.fuse(model.encode_video(batch.video), text)
            return jax.nn.log_softmax(model.decode_answer(ids, text, fused)[:, -1])

        return model.apply({"params": params}, method=run)

    table = np.zeros((6, 4))
    for column, (ids, mask) in enumerate(zip(*ANSWERS, strict=True)):
        for place in range(1, mask.sum()):
            table[:, column] += next_word(np.tile(ids[:place], (6, 1)))[:, ids[place]]
    return model, params, table


def test_decoding_is_trained_on_whole_answers(decoder):
    model, params, table = decoder
    batch = decoded_batch()

    @jax.jit
    def compute(params):
        def loss(model):
            key = jax.random.key(0)
            return objectives.compute_losses(model, batch, key, DECODE.objectives).value

        return model.apply({"params": params}, method=loss)

    said = [0, 2, 1, 3, 3, 0]
    expected = -np.mean([table[row, said[row]] for row in (0, 1, 2, 4, 5)])  # row 3 is padding
    assert compute(params) == pytest.approx(expected, 1e-5)


@pytest.mark.parametrize("top_k", [1, 2, 4, 128])
def test_ranked_answers_have_their_probability(decoder, top_k):
    """With all answers it is exhaustive; else those with the likeliest first words are scored."""
    model, params, table = decoder
    batch = decoded_batch()

    @jax.jit
    def rank(params):
        def run(model):
            text = model.encode_text(batch.text_ids, batch.text_mask)
            video = model.encode_video(batch.video)
            first = model.decode_answer(jnp.full((6, 1), CLS), text, model.fuse(video, text))
            answers = Caption(*map(jnp.asarray, ANSWERS))
            return rank_answers(model, video, text, answers, top_k), first[:, 0]

        return model.apply({"params": params}, method=run)

    scores, first = map(np.asarray, rank(params))
    for row in range(6):
        chosen = np.argsort(-first[row, ANSWERS.ids[:, 1]], kind="stable")[:top_k]
        np.testing.assert_allclose(scores[row, chosen], table[row, chosen], rtol=1e-4)
        assert (np.delete(scores[row], chosen) < -1e8).all()


MEDIA_IDS = np.array([0, 1, 2, 2, 4, 5], np.int32)  # two clips show the same


class Clips(EvalData):
    """Six clips in batches of four; the fifth cannot be decoded."""

    def __init__(self, questions: Questions | None):
        batch = random_batch(6)
        captions = tuple(f"text {i}" for i in range(6))
        texts = Texts(*(np.asarray(x) for x in batch[1:3]), MEDIA_IDS, np.arange(6), captions)
        super().__init__(6, MEDIA_IDS, NAMES, texts, questions, None, CLASSES, None, None)
        self.rows = jax.tree.map(np.asarray, batch_of(TARGETS)._replace(media_ids=MEDIA_IDS))

    def batches(self, part: int, parts: int) -> Iterator[Batch]:
        for patch_ids in (np.arange(4), np.array([4, 5, 5, 5])):
            valid = np.isin(np.arange(4) + patch_ids[0], (0, 1, 2, 3, 5))
            yield jax.tree.map(lambda x, p=patch_ids: x[p], self.rows)._replace(valid=valid)


def make_questions() -> Questions:
    words = random_batch(9, seed=4)
    rows = np.array([0, 0, 1, 2, 3, 3, 4, 5, 5], np.int32)  # clip 4 is bad
    answers = ("red", "left", "blue", "right", "red", "left", "red", "blue", "right")
    kinds = ("color", "way", "color", "way", "color", "way", "color", "color", "way")
    captions = tuple(f"question {i}" for i in range(9))
    words = (np.asarray(words.text_ids), np.asarray(words.text_mask))
    texts = Texts(*words, MEDIA_IDS[rows], rows, captions)
    return Questions(texts, answers, kinds)


@pytest.fixture(scope="module")
def answered():
    """The evaluator's result for two batch sizes, and the logits of each question alone."""
    config, questions = unmasked(ANSWER), make_questions()
    params, _, _ = run(config, batch_of(TARGETS))
    mesh, model, data = make_mesh(MeshConfig()), build_model(config), Clips(questions)
    results = []
    with jax.set_mesh(mesh):
        for batch_size in (3, 16):
            context = EvalContext(model, params, mesh, batch_size)
            clips = encode_clips(context, data, embed=False, keep_features=True)
            asked = (EvaluationConfig(), config.objectives)
            results.append(evaluate_answers(context, EvalInputs(data, clips, *asked)))

    @jax.jit
    def alone(ids, mask, video):
        def one(model):
            return model.classify(
                model.fuse(model.encode_video(video), model.encode_text(ids, mask))
            )

        return model.apply({"params": params}, method=one)[0]

    texts = questions.texts
    rows = [row for row in range(9) if texts.rows[row] != 4]
    logits = [
        alone(texts.text_ids[[row]], texts.text_mask[[row]], data.rows.video[[texts.rows[row]]])
        for row in rows
    ]
    return results, np.array(logits), rows


def test_answers_are_those_of_each_question_alone(answered):
    (result, other), logits, rows = answered
    assert result.metrics == pytest.approx(other.metrics)
    assert all(metric_of(f"answers/{name}") for name in result.metrics), "all are registered"
    questions = make_questions()
    assert [item["question"] for item in result.predictions] == [f"question {i}" for i in rows]
    assert [item["clip"] for item in result.predictions] == [
        NAMES[questions.texts.rows[i]] for i in rows
    ]
    for item, row in zip(result.predictions, logits, strict=True):
        assert list(item["predicted"]) == [CLASSES.names[i] for i in np.argsort(-row)]
        np.testing.assert_allclose(list(item["predicted"].values()), np.sort(row)[::-1], atol=1e-3)
    best = [CLASSES.names[i] for i in logits.argmax(axis=1)]
    right = np.array([a == questions.answers[r] for a, r in zip(best, rows, strict=True)])
    metrics = result.metrics
    assert metrics["accuracy"] == pytest.approx(100 * right.mean())
    of_clips = MEDIA_IDS[questions.texts.rows[rows]]  # two clips and their questions are one group
    assert result.intervals == {"accuracy": mean_interval(right, of_clips)}
    way = np.array([questions.kinds[row] == "way" for row in rows])
    assert metrics["accuracy_way"] == pytest.approx(100 * right[way].mean())
    # Blind: always "red" for a color, "left" for a way; "right" is no class.
    assert metrics["frequent_accuracy"] == pytest.approx(100 * 4 / 8)
    assert metrics["frequent_accuracy_color"] == pytest.approx(100 * 2 / 4)
    assert metrics["answerable"] == pytest.approx(100 * 6 / 8)
    known = [(row, questions.answers[r]) for row, r in zip(logits, rows, strict=True)]
    known = [(row, CLASSES.names.index(a)) for row, a in known if a in CLASSES.names]
    nll = [np.log(np.exp(row).sum()) - row[number] for row, number in known]
    assert metrics["nll"] == pytest.approx(np.mean(nll), rel=1e-4)
    assert (metrics["num_questions"], metrics["skipped_questions"]) == (8, 1)
    table = format_answers(metrics).splitlines()
    assert table[0].endswith("| all | color | way |")
    assert table[3] == "| most frequent answer | 50.0 | 50.0 | 50.0 |"


def numbered_clips(first: int) -> VideoFeatures:
    """Features of three clips, whose [CLS] is their number."""
    cls, ids = first + jnp.arange(3.0)[:, None, None], jnp.zeros((3, 1, 1), int)
    return VideoFeatures(cls[..., None], cls, (ids,), ids > 0)


def given_clip(model: VideoLanguageModel, video: VideoFeatures, *_) -> jax.Array:
    """A head that answers with the clip that it is given."""
    return video.frame_cls[:, 0]


def test_each_question_reads_its_own_clip():
    """Not the first one of equal id."""
    usable = np.array([0, 1, 2, 3, 5])
    batches = [functools.partial(numbered_clips, first) for first in (0, 3)]
    clips = Encoded(None, ClipFeatures(3, batches), MEDIA_IDS[usable], usable)
    questions = make_questions()
    keep = questions.texts.rows != 4
    texts = take_texts(questions.texts, np.flatnonzero(keep))
    mesh, questions = make_mesh(MeshConfig(data=1), jax.devices()[:1]), Questions(texts, (), ())
    context, method = EvalContext(build_model(ANSWER), {}, mesh, 3), functools.partial(given_clip)
    truth = np.zeros(len(texts.rows), np.int32)
    _, clip, _ = question_answering.score_questions(
        context, method, questions, truth, clips, top_k=1
    )
    np.testing.assert_array_equal(clip[:, 0], texts.rows)


def test_questions_about_a_bad_clip_are_skipped_though_its_twin_is_good(monkeypatch):
    """Clips 2 and 3 have one id; clip 3 cannot be decoded."""
    usable = np.delete(np.arange(6), 3)
    clips, data = Encoded(None, None, MEDIA_IDS[usable], usable), Clips(make_questions())

    def scores(context, method, questions, truth, clips, top_k):
        count = len(questions.answers)
        return np.full((count, 1), 2), np.ones((count, 1)), np.ones(count)

    monkeypatch.setattr(question_answering, "score_questions", scores)
    context = EvalContext(build_model(ANSWER), {}, make_mesh(MeshConfig()), 3)
    inputs = EvalInputs(data, clips, EvaluationConfig(), ANSWER.objectives)
    result = evaluate_answers(context, inputs)
    rows = [row for row in data.questions.texts.rows if row != 3]
    assert [item["clip"] for item in result.predictions] == [NAMES[row] for row in rows]
    assert result.metrics["skipped_questions"] == 9 - len(rows)
    assert result.metrics["accuracy"] == pytest.approx(100 / len(rows)), "one of them is left"


def test_labels_of_usable_clips():
    config = unmasked(LABEL)
    params, _, logits = run(config, batch_of(TARGETS))
    mesh = make_mesh(MeshConfig())
    with jax.set_mesh(mesh):
        context = EvalContext(build_model(config), params, mesh, 4)
        result = evaluate_labels(
            context,
            EvalInputs(Clips(None), None, EvaluationConfig(), config.objectives),
        )
    used = [0, 1, 2, 3, 5]
    for item, row in zip(result.predictions, used, strict=True):
        assert list(item["predicted"]) == [CLASSES.names[i] for i in np.argsort(-logits[row])]
        assert item["labels"] == [n for n, t in zip(CLASSES.names, TARGETS[row], strict=True) if t]
    metrics = result.metrics
    assert all(metric_of(f"labels/{name}") for name in metrics), "all are registered"
    assert (metrics["num_clips"], metrics["num_labels"]) == (5, 3)  # nobody is "never"
    assert metrics["chance_map"] == pytest.approx(100 * np.mean([2 / 5, 1 / 5, 1 / 5]))
    groups = MEDIA_IDS[used]
    assert len(set(groups)) < len(groups)
    labeled = logits[used], logits[used] > 0, TARGETS[used] > 0
    for name, interval in label_intervals(*labeled, groups).items():
        assert result.intervals[name] == pytest.approx(interval)
    hits = ((logits > 0) & (TARGETS > 0))[used].sum()
    f1 = 200 * hits / ((logits > 0)[used].sum() + TARGETS[used].sum())
    assert metrics["micro_f1"] == pytest.approx(f1)
    assert f"| {metrics['map']:.1f} |" in format_labels(metrics)


def test_fields_that_do_not_fit():
    with pytest.raises(ValueError, match=r"--objectives.answer needs --data.task=questions"):
        override(ANSWER, {"data.task": "labels"})
    with pytest.raises(ValueError, match=r"--data.num-others=3 needs --data.task"):
        override(ANSWER, {"data.num_others": 3})
    with pytest.raises(ValueError, match=r"--model\.num-classes=4"):
        with_classes(ANSWER, Classes({"a": {}, "b": {}}))
    open_number = override(ANSWER, {"model.num_classes": 0})
    assert with_classes(open_number, CLASSES).model.num_classes == 4


def test_words_keep_their_numbers_when_parameters_are_taken_over(tmp_path):
    taken = override(ANSWER, {"train.init_from": str(tmp_path)})
    assert with_source_tokenizer(taken).data.tokenizer == str(tmp_path / "tokenizer")
    own = override(taken, {"data.tokenizer": "mine"})
    assert with_source_tokenizer(own) == own and with_source_tokenizer(ANSWER) == ANSWER


@pytest.mark.parametrize("task", ["questions", "decoded", "labels"])
def test_a_run_and_its_evaluation_again(task, tiny_config, tmp_path, monkeypatch):
    """The whole path: pre-training's parameters, training, tables, predictions, once more."""
    name, objective = ("labels", "label") if task == "labels" else ("answers", "answer")
    tuned = {**OFF, "data.task": task, f"objectives.{objective}": 1.0, "train.steps": 2}
    if task == "decoded":
        decoder = {"objectives.answer_kind": "decoder", "data.answer_len": 4}
        tuned |= {"data.task": "questions", **decoder}
    for changes, workdir in (
        ({"train.steps": 1}, "pre"),
        ({**tuned, "train.init_from": str(tmp_path / "pre")}, "run"),
    ):
        monkeypatch.setattr(sys, "argv", ["tiny", "--workdir", str(tmp_path / workdir)])
        main(lambda changes=changes: override(tiny_config, changes))
    first = json.loads((tmp_path / "run" / f"{name}.json").read_text())
    assert first.pop("intervals")
    predictions = (tmp_path / "run" / f"{name}.jsonl").read_text().splitlines()
    assert (tmp_path / "run" / f"{name}.png").stat().st_size > 1000
    count = {"answers": "num_questions", "labels": "num_clips"}[name]
    assert len(predictions) == first[count] > 0
    [again] = evaluate_workdir(tmp_path / "run").values()
    assert again == pytest.approx({f"{name}/{key}": value for key, value in first.items()})
    both = evaluate_workdir(tmp_path / "run", split=("test", "train"))
    assert again == both["test"] != both["train"] and [*both] == ["test", "train"]
