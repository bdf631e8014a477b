"""The multiple-choice evaluator: its questions, and its accuracy from single pairs."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import CLS, SEP, SMALL, init_params, random_batch, randomize

from data_pipelines.loading.evaluation import EvalData
from data_pipelines.schema.records import Batch, Choices, Texts
from vlmae.config.experiment import EvaluationConfig, MeshConfig, ObjectivesConfig
from vlmae.config.tree import override
from vlmae.evaluation import multiple_choice
from vlmae.evaluation.clip_features import ClipFeatures
from vlmae.evaluation.encode import Encoded, EvalInputs, encode_clips
from vlmae.evaluation.intervals import mean_interval
from vlmae.evaluation.multiple_choice import (
    draw_negatives,
    draw_questions,
    evaluate_multiple_choice,
    format_choices,
)
from vlmae.evaluation.result import Result
from vlmae.models.video_language import VideoLanguageModel, build_model
from vlmae.ops.multiple_choice import SLOT, Caption, compose
from vlmae.parallel.sharding import make_mesh
from vlmae.runs.inference import EvalContext
from vlmae.runs.metric_registry import metric_of

TEMPLATE = (CLS, 30, SLOT, 31, SLOT, 32, SLOT, SEP)
CLIPS = jax.tree.map(np.asarray, random_batch(7))
MEDIA_IDS = np.array([3, 0, 1, 1, 6, 2, 5], np.int32)  # two clips show the same
BAD_CLIP = 4
TEXT_ROWS = np.array([1, 1, 2, 3, 5, 5, 0, 0, 4, 4, 6, 6, 4, 4], np.int32)  # one for each twin


def texts() -> Texts:
    """Two captions of each media id but 4, of which there is no clip; some are equal."""
    captions = jax.tree.map(np.array, random_batch(14, seed=1))
    ids = np.where(captions.text_mask, captions.text_ids, 0)
    mask = captions.text_mask
    ids[3], mask[3] = ids[8], mask[8]  # the same words for two media
    media = np.arange(14, dtype=np.int32) // 2
    return Texts(ids, mask, media, TEXT_ROWS, tuple(f"caption {i}" for i in range(14)))


class Clips(EvalData):
    """The clips in batches of three, one of them undecodable."""

    def __init__(self, texts: Texts, choices: Choices | None = None):
        names = tuple(f"clip {i}" for i in range(7))
        super().__init__(7, MEDIA_IDS, names, texts, None, choices, *[None] * 3)

    def text_of(self, ids: np.ndarray) -> str:
        return " ".join(map(str, ids))

    def batches(self, part: int, parts: int) -> Iterator[Batch]:
        rows = [0, 1, 2, 3, 4, 5, 6, 6, 6]
        for start in range(0, 9, 3):
            batch = jax.tree.map(lambda x, s=start: x[rows[s : s + 3]], CLIPS)
            place = np.arange(start, start + 3)
            valid = (place < 7) & (place != BAD_CLIP)
            yield batch._replace(valid=valid, media_ids=MEDIA_IDS[rows[start : start + 3]])


def evaluate_choices(
    context: EvalContext, data: Clips, num_options: int, objectives: ObjectivesConfig
) -> Result:
    config = EvaluationConfig(choices=num_options)
    with jax.set_mesh(context.mesh):
        clips = encode_clips(context, data, keep_features=True)
        result = evaluate_multiple_choice(context, EvalInputs(data, clips, config, objectives))
    assert all(metric_of(f"multiple_choice/{name}") for name in result.metrics), "all registered"
    return result


@pytest.mark.parametrize("num_options", [2, 3, 5])
def test_questions(num_options):
    given = texts()
    questions = draw_questions(given, num_options)
    assert questions.option_ids.shape[:2] == (14, num_options) and questions.skipped == 0
    np.testing.assert_array_equal(questions.media_ids, given.media_ids)
    media_of = {}
    for words, media in zip(given.text_ids, given.media_ids, strict=True):
        media_of.setdefault(tuple(words), set()).add(media)
    for row, (options, answer) in enumerate(
        zip(questions.option_ids, questions.answer, strict=True)
    ):
        np.testing.assert_array_equal(options[answer], given.text_ids[row])
        for wrong in np.delete(options, answer, axis=0):
            assert media_of[tuple(wrong)] - {given.media_ids[row]}
        assert len(np.unique(options, axis=0)) == num_options
    again = draw_questions(given, num_options)
    np.testing.assert_array_equal(questions.option_ids, again.option_ids)
    others = draw_questions(given, num_options, seed=1)
    assert not np.array_equal(questions.option_ids, others.option_ids)


def test_the_truth_is_anywhere_and_what_cannot_be_asked_is_counted():
    many = Texts(
        np.arange(4000)[:, None],
        np.ones((4000, 1), bool),
        np.arange(4000),
        np.arange(4000),
        ("",) * 4000,
    )
    counts = np.bincount(draw_questions(many, 4).answer, minlength=4)
    assert ((counts - 1000) ** 2 / 1000).sum() < 16.3  # exceeded once in 1,000 draws
    few = Texts(
        np.arange(3)[:, None], np.ones((3, 1), bool), np.array([0, 0, 1]), np.arange(3), ("",) * 3
    )
    assert draw_questions(few, 3).skipped == 2  # of media 0, whose other caption is right
    assert draw_questions(few, 4).option_ids.shape == (0, 4, 1)


def test_negatives_are_drawn_without_a_look_at_all_captions():
    """Unless they are rare; then all captions are tried, so that none is missed."""

    class Rng(np.random.Generator):
        """Counts what was drawn."""

        drawn = 0

        def integers(self, high: int, size: int) -> np.ndarray:
            self.drawn += size
            return super().integers(high, size=size)

        def permutation(self, count: int) -> np.ndarray:
            self.drawn += count
            return super().permutation(count)

    count = 100_000
    own = np.arange(count)
    for row in range(20):
        rng = Rng(np.random.PCG64(0))
        assert len(draw_negatives(rng, row, own, own, 3)) == 3
        assert rng.drawn < 100
    media, rare = np.zeros(count, int), np.array([5, 70_000, 99_999])
    media[rare] = 1
    assert set(draw_negatives(np.random.default_rng(0), 0, media, own, 3)) == {*rare}
    assert len(draw_negatives(np.random.default_rng(0), 0, media, own, 4)) == 3


@pytest.mark.parametrize("kind", ["concat", "score"])
def test_accuracy_from_single_pairs(kind):
    """Every option scored with its clip alone; batch sizes and the order of clips are no matter."""
    changes = {
        "model.text.max_len": 32,
        "objectives.mcm": 1.0,
        "objectives.mcm_kind": kind,
        "objectives.mcm_len": 32,
        "objectives.mcm_template": "{} {} {}",
        "objectives.mcm_template_ids": TEMPLATE,
    }
    config = override(SMALL, changes)
    model = build_model(config)
    params = randomize(init_params(model, random_batch(7), config.objectives))
    mesh, given = make_mesh(MeshConfig()), texts()
    result, other = (
        evaluate_choices(
            EvalContext(model, params, mesh, batch_size), Clips(given), 3, config.objectives
        )
        for batch_size in (4, 5)
    )
    assert result.predictions == other.predictions
    actual = result.metrics  # of another batch size but for the order of sums
    assert actual == pytest.approx(other.metrics, rel=1e-5)

    usable = np.flatnonzero(given.rows != BAD_CLIP)
    kept = Texts(*(x[usable] for x in given[:4]), tuple(given.captions[i] for i in usable))
    questions = draw_questions(kept, 3)

    @jax.jit
    def score(params, options: Caption, video):
        def run(model):
            single = model.encode_video(video)
            texts = [model.encode_text(options.ids[:, i], options.mask[:, i]) for i in range(3)]
            fused = [model.fuse(single, text) for text in texts]
            match = [model.match(f)[0, 1] - model.match(f)[0, 0] for f in fused]
            if kind == "score":
                return match, [model.choose(f, 1)[0, 0] for f in fused]
            question = model.encode_text(*compose(TEMPLATE, options, 32))
            return match, model.choose(model.fuse(single, question), 3)[0]

        return model.apply({"params": params}, method=run)

    right, nll = [], []
    asked = zip(*questions[:3], given.rows[usable], result.predictions, strict=True)
    for ids, mask, answer, clip, said in asked:
        options = Caption(ids[None], mask[None])
        match, mcm = score(params, options, CLIPS.video[clip : clip + 1])
        right.append([np.argmax(match) == answer, np.argmax(mcm) == answer])
        nll.append([np.log(np.exp(np.ravel(x)).sum()) - np.ravel(x)[answer] for x in (match, mcm)])
        # Each twin of one id has a question of its own.
        chosen = {"match": np.argmax(match), "mcm": np.argmax(mcm)}
        assert (said["clip"], said["chosen"]) == (f"clip {clip}", chosen)
    groups = MEDIA_IDS[given.rows[usable]]
    for name, answers in zip(("match", "mcm"), np.transpose(right), strict=True):
        assert result.intervals[f"{name}_accuracy"] == mean_interval(answers, groups)
    accuracy = 100 * np.mean(right, axis=0)
    assert actual["match_accuracy"] == pytest.approx(accuracy[0])
    assert actual["mcm_accuracy"] == pytest.approx(accuracy[1])
    of_heads = [actual["match_nll"], actual["mcm_nll"]]
    np.testing.assert_allclose(of_heads, np.mean(nll, axis=0), rtol=1e-4)
    assert actual["num_questions"] == len(usable) == 10
    assert actual["chance_accuracy"] == pytest.approx(100 / 3)
    assert actual["chance_nll"] == pytest.approx(np.log(3))
    assert all(metric_of(f"multiple_choice/{name}") for name in actual), "all are registered"


def test_too_few_captions():
    given = Texts(*(x[:2] for x in texts()[:4]), ("a", "b"))
    mesh, model = make_mesh(MeshConfig()), build_model(SMALL)
    params = init_params(model, random_batch(7))
    context = EvalContext(model, params, mesh, 4)
    with pytest.raises(ValueError, match="no caption has 3 negatives"):
        evaluate_choices(context, Clips(given), 4, SMALL.objectives)


def test_questions_of_the_split_go_first():
    """Their own options, fewer for some; those about the bad clip are skipped."""
    captions = jax.tree.map(np.asarray, random_batch(15, seed=3))
    ids, mask = (x.reshape(5, 3, -1) for x in (captions.text_ids, captions.text_mask.copy()))
    mask[1, 2] = False  # the second question has two options
    rows = np.array([0, 3, BAD_CLIP, 5, 6])
    kinds = ("who", "what", "what", "who", "what")
    given = Choices(ids, mask, np.array([2, 0, 1, 1, 0], np.int32), MEDIA_IDS[rows], rows, kinds)
    mesh, model = make_mesh(MeshConfig()), build_model(SMALL)
    params = randomize(init_params(model, random_batch(7)))
    context, data = EvalContext(model, params, mesh, 4), Clips(texts(), given)
    result = evaluate_choices(context, data, 3, SMALL.objectives)
    rows, clips = [0, 1, 3, 4], [0, 3, 5, 6]  # clip 3 has a twin of equal id before it

    @jax.jit
    def score(ids, mask, video):
        def run(model):
            return model.match(model.fuse(model.encode_video(video), model.encode_text(ids, mask)))

        logits = model.apply({"params": params}, method=run)
        return logits[:, 1] - logits[:, 0]

    right = []
    for row, clip in zip(rows, clips, strict=True):
        video = np.repeat(np.asarray(CLIPS.video[clip : clip + 1]), 3, axis=0)
        there = mask[row].any(axis=1)
        scores = np.where(there, score(ids[row], mask[row] | (np.arange(8) < 1), video), -np.inf)
        right.append(scores.argmax() == given.answer[row])
        item = result.predictions[rows.index(row)]
        assert item["chosen"] == {"match": scores.argmax()} and item["answer"] == given.answer[row]
        assert len(item["options"]) == there.sum()
    assert result.metrics["match_accuracy"] == pytest.approx(100 * np.mean(right))
    who = [right[0], right[2]]
    assert result.metrics["match_accuracy_who"] == pytest.approx(100 * np.mean(who))
    assert result.metrics["chance_accuracy"] == pytest.approx(
        100 * np.mean([1 / 3, 1 / 2, 1 / 3, 1 / 3])
    )
    assert (result.metrics["num_questions"], result.metrics["skipped_questions"]) == (4, 1)
    assert "| match: who |" in format_choices(result.metrics)
    with pytest.raises(ValueError, match=r"questions have 3 options: set evaluation\.choices=3"):
        evaluate_choices(context, data, 4, SMALL.objectives)


def test_an_absent_option_is_never_chosen(monkeypatch):
    """Whatever a head says of its empty text."""
    captions = jax.tree.map(np.array, random_batch(12, seed=3))
    ids, mask = (x.reshape(4, 3, -1) for x in (captions.text_ids, captions.text_mask))
    mask[1, 2] = mask[3, 1] = mask[3, 2] = False
    rows, right = np.arange(4), np.array([2, 1, 0, 0], np.int32)
    given = Choices(ids, mask, right, MEDIA_IDS[rows], rows, ("",) * 4)
    scores = np.array([[0, 1, 2], [0, 1, 9], [2, 1, 0], [-1, 9, 9.0]])
    monkeypatch.setattr(multiple_choice, "score_options", lambda *_: scores)
    context = EvalContext(build_model(SMALL), {}, make_mesh(MeshConfig()), 4)
    clips = Encoded(None, None, MEDIA_IDS, np.arange(7))
    inputs = EvalInputs(Clips(texts(), given), clips, EvaluationConfig(choices=3), SMALL.objectives)
    result = evaluate_multiple_choice(context, inputs)
    assert [item["chosen"]["match"] for item in result.predictions] == right.tolist()
    assert result.metrics["match_accuracy"] == 100
    assert result.metrics["chance_accuracy"] == pytest.approx(100 * (1 / 3 + 1 / 2 + 1 / 3 + 1) / 4)
    there = [row[: 3 - absent] for row, absent in zip(scores, (0, 1, 0, 2), strict=True)]
    nll = [np.log(np.exp(x).sum()) - x[i] for x, i in zip(there, right, strict=True)]
    assert result.metrics["match_nll"] == pytest.approx(np.mean(nll))


def given_clip(model: VideoLanguageModel, video: jax.Array, options: Caption) -> jax.Array:
    """A head that answers with the clip that it is given."""
    return jnp.repeat(video, options.ids.shape[1], axis=1)


def test_each_question_reads_its_own_clip():
    """Not the first one of equal id."""
    usable = np.delete(np.arange(7), BAD_CLIP)
    batches = [lambda first=first: first + jnp.arange(4.0)[:, None] for first in (0, 4)]
    clips = Encoded(None, ClipFeatures(4, batches), MEDIA_IDS[usable], usable)
    rows = np.array([6, 2, 3, 0, 5])
    ids = np.zeros((5, 3, 8), np.int32)
    given = Choices(ids, ids == 0, ids[:, 0, 0], MEDIA_IDS[rows], rows, ("",) * 5)
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    context, head = EvalContext(build_model(SMALL), {}, mesh, 2), functools.partial(given_clip)
    scores = multiple_choice.score_options(context, head, given, clips)
    np.testing.assert_array_equal(scores, np.repeat(rows[:, None], 3, axis=1))


def test_questions_about_a_bad_clip_are_skipped_though_its_twin_is_good():
    """Clips 2 and 3 have one id; clip 3 cannot be decoded."""
    usable = np.delete(np.arange(7), 3)
    clips = Encoded(None, None, MEDIA_IDS[usable], usable)
    rows, ids = np.array([3, 2, 0]), np.arange(9, dtype=np.int32).reshape(3, 3, 1)
    given = Choices(ids, ids >= 0, ids[:, 0, 0], MEDIA_IDS[rows], rows, ("", "", ""))
    kept = multiple_choice.usable_questions(Clips(texts(), given), clips, 3)
    assert kept.rows.tolist() == [2, 0] and kept.skipped == 1
    drawn = multiple_choice.usable_questions(Clips(texts()), clips, 3)
    assert drawn.rows.tolist() == [row for row in TEXT_ROWS if row != 3]
    np.testing.assert_array_equal(drawn.media_ids, texts().media_ids[TEXT_ROWS != 3])
