"""The multiple-choice evaluator: its questions, and its accuracy from single pairs."""

from collections.abc import Iterator

import jax
import numpy as np
import pytest
from helpers import CLS, SEP, SMALL, init_params, random_batch, randomize

from data_pipelines.evaluation import EvalData
from data_pipelines.records import Batch, Choices, Texts
from vlmae.choices import SLOT, Caption, compose
from vlmae.config import EvaluationConfig, MeshConfig, ObjectivesConfig
from vlmae.config_tree import override
from vlmae.evaluators.encode import Trained, encode_clips
from vlmae.evaluators.multiple_choice import (
    draw_questions,
    evaluate_multiple_choice,
    format_choices,
)
from vlmae.evaluators.result import Result
from vlmae.models.video_language import build_model
from vlmae.sharding import make_mesh

TEMPLATE = (CLS, 30, SLOT, 31, SLOT, 32, SLOT, SEP)
CLIPS = jax.tree.map(np.asarray, random_batch(7))
MEDIA_IDS = np.array([3, 0, 1, 1, 6, 2, 5], np.int32)  # two clips show the same
BAD_CLIP = 4


def texts() -> Texts:
    """Two captions of each media id but 4, of which there is no clip; some are equal."""
    captions = jax.tree.map(np.array, random_batch(14, seed=1))
    ids = np.where(captions.text_mask, captions.text_ids, 0)
    mask = captions.text_mask
    ids[3], mask[3] = ids[8], mask[8]  # the same words for two media
    media = np.arange(14, dtype=np.int32) // 2
    return Texts(ids, mask, media, tuple(f"caption {i}" for i in range(14)))


class Clips(EvalData):
    """The clips in batches of three, one of them undecodable."""

    def __init__(self, texts: Texts, choices: Choices | None = None):
        super().__init__(7, MEDIA_IDS, ("",) * 7, texts, None, choices, *[None] * 3)

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
    trained: Trained, data: Clips, num_options: int, objectives: ObjectivesConfig
) -> Result:
    config = EvaluationConfig(choices=num_options, resamples=50)
    with jax.set_mesh(trained.mesh):
        clips = encode_clips(trained, data, keep_features=True)
        return evaluate_multiple_choice(trained, data, clips, config, objectives)


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
    many = Texts(np.arange(4000)[:, None], np.ones((4000, 1), bool), np.arange(4000), ("",) * 4000)
    counts = np.bincount(draw_questions(many, 4).answer, minlength=4)
    assert ((counts - 1000) ** 2 / 1000).sum() < 16.3  # exceeded once in 1,000 draws
    few = Texts(np.arange(3)[:, None], np.ones((3, 1), bool), np.array([0, 0, 1]), ("",) * 3)
    assert draw_questions(few, 3).skipped == 2  # of media 0, whose other caption is right
    assert draw_questions(few, 4).option_ids.shape == (0, 4, 1)


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
            Trained(model, params, mesh, batch_size), Clips(given), 3, config.objectives
        )
        for batch_size in (4, 5)
    )
    assert result == other
    actual = result.metrics

    clip_of = {int(media): row for row, media in reversed(list(enumerate(MEDIA_IDS)))}
    del clip_of[int(MEDIA_IDS[BAD_CLIP])]
    usable = np.flatnonzero(np.isin(given.media_ids, list(clip_of)))
    kept = Texts(*(x[usable] for x in given[:3]), tuple(given.captions[i] for i in usable))
    questions = draw_questions(kept, 3)

    @jax.jit
    def score(params, options: Caption, video):
        def run(model):
            single = model.encode_video(video)
            texts = [model.encode_text(options.ids[:, i], options.mask[:, i]) for i in range(3)]
            fused = [model.fuse(text, single) for text in texts]
            match = [model.match(f)[0, 1] - model.match(f)[0, 0] for f in fused]
            if kind == "score":
                return match, [model.choose(f, 1)[0, 0] for f in fused]
            question = model.encode_text(*compose(TEMPLATE, options, 32))
            return match, model.choose(model.fuse(question, single), 3)[0]

        return model.apply({"params": params}, method=run)

    right = []
    for ids, mask, answer, media, *_ in zip(*questions[:4], strict=True):
        options = Caption(ids[None], mask[None])
        clip = clip_of[int(media)]
        match, mcm = score(params, options, CLIPS.video[clip : clip + 1])
        right.append([np.argmax(match) == answer, np.argmax(mcm) == answer])
    accuracy = 100 * np.mean(right, axis=0)
    assert actual["match_accuracy"] == pytest.approx(accuracy[0])
    assert actual["mcm_accuracy"] == pytest.approx(accuracy[1])
    assert actual["num_questions"] == len(usable) == 10
    assert actual["chance_accuracy"] == pytest.approx(100 / 3)


def test_too_few_captions():
    given = Texts(*(x[:2] for x in texts()[:3]), ("a", "b"))
    mesh, model = make_mesh(MeshConfig()), build_model(SMALL)
    params = init_params(model, random_batch(7))
    trained = Trained(model, params, mesh, 4)
    with pytest.raises(ValueError, match="no caption has 3 wrong ones"):
        evaluate_choices(trained, Clips(given), 4, SMALL.objectives)


def test_questions_of_the_split_go_first():
    """Their own options, fewer for some; those about the bad clip are skipped."""
    captions = jax.tree.map(np.asarray, random_batch(15, seed=3))
    ids, mask = (x.reshape(5, 3, -1) for x in (captions.text_ids, captions.text_mask.copy()))
    mask[1, 2] = False  # the second question has two options
    media = MEDIA_IDS[[0, 1, BAD_CLIP, 5, 6]]
    kinds = ("who", "what", "what", "who", "what")
    given = Choices(ids, mask, np.array([2, 0, 1, 1, 0], np.int32), media, kinds)
    mesh, model = make_mesh(MeshConfig()), build_model(SMALL)
    params = randomize(init_params(model, random_batch(7)))
    trained, data = Trained(model, params, mesh, 4), Clips(texts(), given)
    result = evaluate_choices(trained, data, 3, SMALL.objectives)
    rows, clips = [0, 1, 3, 4], [0, 1, 5, 6]

    @jax.jit
    def score(ids, mask, video):
        def run(model):
            return model.match(model.fuse(model.encode_text(ids, mask), model.encode_video(video)))

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
        evaluate_choices(trained, data, 4, SMALL.objectives)
