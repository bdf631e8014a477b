"""The multiple-choice evaluator: its questions, and its accuracy from single pairs."""

from collections.abc import Iterator

import jax
import numpy as np
import pytest
from helpers import CLS, SEP, SMALL, init_params, random_batch, randomize

from data_pipelines.pipeline import EvalData
from data_pipelines.records import Batch, Texts
from vlmae.choices import SLOT, Caption, compose
from vlmae.config import MeshConfig
from vlmae.config_tree import override
from vlmae.evaluators.encode import Trained, encode_clips
from vlmae.evaluators.multiple_choice import evaluate_multiple_choice, make_questions
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

    def __init__(self, texts: Texts):
        super().__init__(7, MEDIA_IDS, ("",) * 7, texts, None, None, None, None)

    def batches(self) -> Iterator[Batch]:
        rows = [0, 1, 2, 3, 4, 5, 6, 6, 6]
        for start in range(0, 9, 3):
            part = jax.tree.map(lambda x, s=start: x[rows[s : s + 3]], CLIPS)
            place = np.arange(start, start + 3)
            valid = (place < 7) & (place != BAD_CLIP)
            yield part._replace(valid=valid, media_ids=MEDIA_IDS[rows[start : start + 3]])


def evaluate_choices(trained: Trained, texts: Texts, **run) -> dict[str, float]:
    data = Clips(texts)
    with jax.set_mesh(trained.mesh):
        return evaluate_multiple_choice(
            trained, data, encode_clips(trained, data, keep_features=True), **run
        )


@pytest.mark.parametrize("num_options", [2, 3, 5])
def test_questions(num_options):
    given = texts()
    questions = make_questions(given, num_options)
    assert questions.options.shape == (14, num_options) and questions.skipped == 0
    for row, (options, answer) in enumerate(zip(*questions[:2], strict=True)):
        assert options[answer] == row
        wrong = np.delete(options, answer)
        assert (given.media_ids[wrong] != given.media_ids[row]).all()
        assert len(np.unique(given.text_ids[options], axis=0)) == num_options
    again = make_questions(given, num_options)
    np.testing.assert_array_equal(questions.options, again.options)
    others = make_questions(given, num_options, seed=1)
    assert not np.array_equal(questions.options, others.options)


def test_the_truth_is_anywhere_and_what_cannot_be_asked_is_counted():
    many = Texts(np.arange(4000)[:, None], np.ones((4000, 1), bool), np.arange(4000), ("",) * 4000)
    counts = np.bincount(make_questions(many, 4).answer, minlength=4)
    assert ((counts - 1000) ** 2 / 1000).sum() < 16.3  # exceeded once in 1,000 draws
    few = Texts(np.arange(3)[:, None], np.ones((3, 1), bool), np.array([0, 0, 1]), ("",) * 3)
    assert make_questions(few, 3).skipped == 2  # of media 0, whose other caption is right
    assert make_questions(few, 4).options.shape == (0, 4)


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
    run = {"num_options": 3, "objectives": config.objectives}
    actual, other = (
        evaluate_choices(Trained(model, params, mesh, batch_size), given, **run)
        for batch_size in (4, 5)
    )
    assert actual == other

    clip_of = {int(media): row for row, media in reversed(list(enumerate(MEDIA_IDS)))}
    del clip_of[int(MEDIA_IDS[BAD_CLIP])]
    usable = np.flatnonzero(np.isin(given.media_ids, list(clip_of)))
    kept = Texts(*(x[usable] for x in given[:3]), tuple(given.captions[i] for i in usable))
    questions = make_questions(kept, 3)

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
    for rows, answer in zip(questions.options, questions.answer, strict=True):
        options = Caption(kept.text_ids[rows][None], kept.text_mask[rows][None])
        clip = clip_of[int(kept.media_ids[rows[answer]])]
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
        evaluate_choices(trained, given, num_options=4, objectives=SMALL.objectives)
