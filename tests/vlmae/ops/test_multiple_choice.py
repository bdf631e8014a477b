"""Multiple Choice Modeling: options, the text made of them, and the loss, in plain Python."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import CLS, FIRST_WORD, PAD, SEP, SMALL, init_params, random_batch, randomize
from oracles import softmax

from vlmae.config.tree import override
from vlmae.models.video_language import build_model
from vlmae.ops import multiple_choice
from vlmae.ops.multiple_choice import SLOT, Caption, compose, insert_truth, negative_rows
from vlmae.training import objectives
from vlmae.training.features import Context, extract, keys_of

TEMPLATE = (CLS, 30, 31, SEP, 32, SLOT, 33, SLOT, 34, SLOT, 35, SLOT, SEP)
FIXED = len(TEMPLATE) - 4
CONFIG = override(
    SMALL,
    {
        "model.text.max_len": 40,
        "objectives.mcm": 1.0,
        "objectives.mcm_template_ids": TEMPLATE,
        "objectives.mcm_len": 40,
    },
)
BATCH = random_batch(6)


# Compiled whole: one by one, the small operations take longer to compile.
draw_options = jax.jit(objectives.draw_options, static_argnums=2)
fill = jax.jit(compose, static_argnums=(0, 2))


def draw(batch, seed: int):
    return draw_options(batch, jax.random.key(seed), CONFIG.objectives)


# --- the options


def test_options_are_the_truth_and_other_captions_in_any_order():
    answers = []
    for seed in range(50):
        options, answer, asked = draw(BATCH, seed)
        answers.append(answer)
        assert asked.all()
        for row in range(6):
            texts = [tuple(ids) for ids in np.asarray(options.ids[row])]
            assert texts[answer[row]] == tuple(np.asarray(BATCH.text_ids[row]))
            assert len(set(texts)) == 4  # all captions of this batch differ
    assert np.array_equal(np.unique(answers), range(4))


def test_the_place_of_the_truth_is_uniform():
    keys = jax.random.split(jax.random.key(0), 2000)
    drawn = jax.jit(jax.vmap(lambda key: objectives.draw_options(BATCH, key, CONFIG.objectives)[1]))
    counts = np.bincount(np.ravel(drawn(keys)), minlength=4)
    expected = counts.sum() / 4
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    assert chi_squared < 16.3  # 3 degrees of freedom: exceeded once in 1,000 draws


def test_wrong_options_are_never_right():
    """Rows of equal media or equal text, and invalid ones, are never wrong options."""
    ids = BATCH.text_ids.at[1].set(BATCH.text_ids[0])  # another clip, the same words
    media_ids = jnp.array([0, 1, 2, 2, 4, 5])
    valid = jnp.array([True, True, True, True, True, False])
    noise = jax.random.uniform(jax.random.key(1), (500, 6, 6))
    rows, exist = jax.vmap(lambda n: negative_rows(n, ids, media_ids, valid, 3))(noise)
    allowed = {0: {2, 3, 4}, 1: {2, 3, 4}, 2: {0, 1, 4}, 3: {0, 1, 4}, 4: {0, 1, 2, 3}}
    for row, wrong in allowed.items():
        assert exist[:, row].all()
        assert set(np.unique(rows[:, row])) == wrong
        assert all(len(set(drawn)) == 3 for drawn in np.asarray(rows[:, row]))
    assert not exist[:, 5].any()


@pytest.mark.parametrize("size", [2, 3, 4])
def test_a_row_with_too_few_wrong_captions_is_not_asked(size):
    batch = random_batch(size)
    options, _, asked = draw(batch, 0)
    assert options.ids.shape == (size, 4, batch.text_ids.shape[1])
    assert asked.all() == (size == 4)
    same = batch._replace(media_ids=jnp.zeros(size, jnp.int32))
    assert not draw(same, 0)[2].any()


def test_captions_of_the_corpus_take_the_place_of_the_batchs():
    rng = np.random.default_rng(0)
    other_ids = rng.integers(FIRST_WORD, 40, (6, 3, 8), dtype=np.int32)
    other_mask = np.ones((6, 3, 8), bool)
    other_mask[2, 1] = False  # the source had too few for this row
    batch = BATCH._replace(other_ids=jnp.asarray(other_ids), other_mask=jnp.asarray(other_mask))
    options, answer, asked = draw(batch, 3)
    assert asked.tolist() == [True, True, False, True, True, True]
    for row in range(6):
        texts = {tuple(ids) for ids in np.asarray(options.ids[row])}
        truth = tuple(np.asarray(BATCH.text_ids[row]))
        assert texts == {truth, *map(tuple, other_ids[row])}
        assert tuple(np.asarray(options.ids[row, answer[row]])) == truth


# --- the text


def words_of(ids, mask) -> list[int]:
    return [int(i) for i, m in zip(ids, mask, strict=True) if m][1:-1]


@pytest.mark.parametrize("max_len", [FIXED + 4, FIXED + 10, FIXED + 100])
def test_the_question_in_plain_python(max_len):
    options, _, _ = draw(BATCH, 0)
    composed = fill(TEMPLATE, options, max_len)
    room = (max_len - FIXED) // 4
    for row in range(6):
        words = iter(words_of(options.ids[row, i], options.mask[row, i])[:room] for i in range(4))
        expected = []
        for token in TEMPLATE:
            expected += next(words) if token == SLOT else [token]
        assert len(expected) <= max_len
        length = int(composed.mask[row].sum())
        assert composed.ids[row, :length].tolist() == expected
        assert composed.mask[row, :length].all()
        assert (composed.ids[row, length:] == PAD).all()


def asked(question: list[int], options: list[list[int]], length: int = 40) -> Caption:
    """One question: options that begin with it; an empty option is none."""
    ids = np.zeros((1, len(options), length), np.int32)
    for row, option in zip(ids[0], options, strict=True):
        words = [CLS, *question, *option, SEP] if option else []
        row[: len(words)] = words
    return Caption(jnp.asarray(ids), jnp.asarray(ids > 0))


@pytest.mark.parametrize("length", [0, 5, 20, 24, 30])
def test_the_question_gives_way_before_the_options(length):
    """Whatever the question's length, the words that tell options apart stay."""
    question = list(range(100, 100 + length))
    options = [[200, 201], [202], [203, 204, 205], []]
    max_len = FIXED + 4 * 8  # eight tokens for each
    composed = fill(TEMPLATE, asked(question, options), max_len)
    said = composed.ids[0][composed.mask[0]].tolist()
    kept = question[: 8 - 3] if length > 5 else question
    expected, slots = [], iter(options)
    for token in TEMPLATE:
        option = next(slots) if token == SLOT else None
        expected += [token] if option is None else [*kept, *option] if option else []
    assert said == expected
    cut = multiple_choice.are_cut(TEMPLATE, asked(question, options), max_len)
    assert cut.tolist() == [length > 5]


def test_each_question_gives_way_by_itself():
    """A short and a long one in one batch are cut as each alone."""
    options = [[200, 201], [202], [203, 204, 205], [206]]
    one, two = (asked(list(range(100, 100 + n)), options) for n in (3, 20))
    both = Caption(*(jnp.concatenate(x) for x in zip(one, two, strict=True)))
    max_len = FIXED + 4 * 8
    for row, alone in enumerate((one, two)):
        for found, expected in zip(
            fill(TEMPLATE, both, max_len), fill(TEMPLATE, alone, max_len), strict=True
        ):
            np.testing.assert_array_equal(found[row], expected[0])


def test_an_option_longer_than_its_room_loses_its_end():
    """Its question is gone by then."""
    options = [[200, *range(300, 312)], [201, *range(300, 312)], [202], [203]]
    composed = fill(TEMPLATE, asked([100, 101], options), FIXED + 4 * 8)
    said = composed.ids[0][composed.mask[0]].tolist()
    words = [token for token in said if token >= 100]
    assert words == [200, *range(300, 307), 201, *range(300, 307), 202, 203]


def test_padding_of_the_captions_changes_nothing():
    options, _, _ = draw(BATCH, 0)
    longer = Caption(*(jnp.pad(x, ((0, 0), (0, 0), (0, 5))) for x in options))
    ours, theirs = fill(TEMPLATE, options, 60), fill(TEMPLATE, longer, 60)
    size = ours.ids.shape[1]
    np.testing.assert_array_equal(theirs.ids[:, :size], ours.ids)
    assert not theirs.mask[:, size:].any()


def test_no_room_is_an_error():
    options, _, _ = draw(BATCH, 0)
    with pytest.raises(ValueError, match=r"objectives\.mcm_len=12 and a template of 9 tokens"):
        compose(TEMPLATE, options, 12)
    with pytest.raises(ValueError, match="0 slots do not fit 4 options"):
        compose((), options, 40)


def test_the_truth_goes_where_it_should():
    truth = Caption(jnp.full((4, 2), 7), jnp.ones((4, 2), bool))
    wrong = jnp.broadcast_to(jnp.arange(3)[None, :, None], (4, 3, 2))
    others = Caption(wrong, jnp.ones(wrong.shape, bool))
    options = insert_truth(truth, others, jnp.arange(4))
    assert options.ids[..., 0].tolist() == [[7, 0, 1, 2], [2, 7, 0, 1], [1, 2, 7, 0], [0, 1, 2, 7]]


# --- the loss


@pytest.mark.model
@pytest.mark.parametrize("kind", ["concat", "score"])
def test_the_loss_from_the_parts_of_the_model(kind):
    config = override(CONFIG, {"objectives.mcm_kind": kind})
    model, key = build_model(config), jax.random.key(4)
    batch = BATCH._replace(valid=BATCH.valid.at[2].set(False))
    params = randomize(init_params(model, batch, config.objectives))

    def run(model):
        features = extract(model, batch, keys_of(key), config.objectives)
        loss = objectives.mcm(model, features, Context(batch, key, config.objectives))
        options, answer, _ = objectives.draw_options(batch, key, config.objectives)
        if kind == "concat":
            text = model.encode_text(*compose(TEMPLATE, options, 40))
            return loss, model.choose(model.fuse(features.video, text), 4), answer
        scores = []
        for slot in range(4):
            text = model.encode_text(options.ids[:, slot], options.mask[:, slot])
            scores.append(model.choose(model.fuse(features.video, text), 1))
        return loss, jnp.concatenate(scores, axis=1), answer

    loss, logits, answer = jax.jit(lambda p: model.apply({"params": p}, method=run))(params)
    truth = softmax(np.asarray(logits, np.float64))[np.arange(6), answer]
    counted = np.asarray(batch.valid)
    assert float(loss.value) == pytest.approx(-np.log(truth[counted]).mean(), abs=1e-5)
    right = logits.argmax(axis=1) == answer
    assert float(loss.metrics["mcm/accuracy"]) == pytest.approx(right[counted].mean())
    assert float(loss.metrics["mcm/valid_ratio"]) == 1.0


@pytest.mark.model
@pytest.mark.parametrize("kind", ["concat", "score"])
def test_an_untrained_model_is_at_chance(kind):
    config = override(CONFIG, {"objectives.mcm_kind": kind})
    model, batch = build_model(config), random_batch(64)
    params = init_params(model, batch, config.objectives)

    @jax.jit
    def run(params, key):
        def loss(model):
            features = extract(model, batch, keys_of(key), config.objectives)
            return objectives.mcm(model, features, Context(batch, key, config.objectives))

        return model.apply({"params": params}, method=loss)

    results = [run(params, jax.random.key(seed)) for seed in range(5)]
    # A head with random weights prefers one option a little, always the same one.
    assert np.mean([r.value for r in results]) == pytest.approx(math.log(4), abs=0.1)
    # 320 answers: the standard deviation of the share of right ones is 0.024.
    assert np.mean([r.metrics["mcm/accuracy"] for r in results]) == pytest.approx(0.25, abs=0.1)


def test_options_are_scored_alone_when_folded():
    options, _, _ = draw(BATCH, 0)
    folded = multiple_choice.fold(options)
    np.testing.assert_array_equal(folded.ids[5], options.ids[1, 1])
