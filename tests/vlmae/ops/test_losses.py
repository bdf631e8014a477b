"""The losses against NumPy oracles written from their formulas."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import drawn_keys, key_numbers
from oracles import random, softmax

from vlmae.ops import losses

NO_ID = -1  # an id that no row has


# --- contrastive loss


def contrastive_oracle(logits: np.ndarray, ids: list[int]) -> float:
    """Over valid rows only: mean over queries of -mean over positives of log p, both directions."""
    total = 0.0
    for scores in (logits, logits.T):
        for i, row in enumerate(scores):
            positives = [j for j in range(len(ids)) if ids[j] == ids[i]]
            total -= np.log(softmax(row)[positives]).mean() / len(ids)
    return total / 2


@pytest.mark.parametrize("ids", [[0, 1, 2, 3, 4], [0, 1, 0, 2, 0], [7, 7, 7, 7, 7]])
def test_contrastive_loss(ids):
    logits = 3 * random(5, 5)
    loss = jax.jit(losses.contrastive_loss)(logits, np.array(ids, np.int32), np.ones(5, bool))
    np.testing.assert_allclose(loss, contrastive_oracle(logits, ids), rtol=1e-5)


def test_contrastive_loss_ignores_invalid_rows():
    logits, ids = 3 * random(5, 5), np.array([4, 9, 4, 9, 2], np.int32)
    valid = np.array([True, False, True, True, False])
    expected = contrastive_oracle(logits[np.ix_(valid, valid)], [4, 4, 9])
    loss, gradient = jax.jit(jax.value_and_grad(losses.contrastive_loss))(logits, ids, valid)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    gradient = np.asarray(gradient)
    assert not gradient[~valid].any() and not gradient[:, ~valid].any()
    assert (gradient[np.ix_(valid, valid)] != 0).all()


def test_contrastive_loss_without_any_valid_row_is_zero():
    ids = np.arange(3, dtype=np.int32)
    loss, gradient = jax.jit(jax.value_and_grad(losses.contrastive_loss))(
        random(3, 3), ids, np.zeros(3, bool)
    )
    assert loss == 0 and not gradient.any()


def sigmoid_oracle(logits: np.ndarray, ids: list[int]) -> float:
    """SigLIP's algorithm 1, pair by pair: -log of the probability of what is true, over rows."""
    total = 0.0
    for i, j in np.ndindex(logits.shape):
        sign = 1 if ids[i] == ids[j] else -1
        total += np.log1p(np.exp(-sign * logits[i, j]))
    return total / len(ids)


@pytest.mark.parametrize("ids", [[0, 1, 2, 3, 4], [0, 1, 0, 2, 0], [7, 7, 7, 7, 7]])
def test_sigmoid_loss(ids):
    logits = 3 * random(5, 5)
    loss = jax.jit(losses.sigmoid_loss)(logits, np.array(ids, np.int32), np.ones(5, bool))
    np.testing.assert_allclose(loss, sigmoid_oracle(logits, ids), rtol=1e-5)


def test_sigmoid_loss_reads_valid_rows_of_the_same_shard():
    """Two shards of three rows; the second row of each is not valid, and infinite."""
    logits, ids = 3 * random(6, 6), np.array([0, 1, 1, 0, 2, 0], np.int32)
    valid = np.array([True, False, True] * 2)
    logits[~valid] = np.inf
    loss = partial(losses.sigmoid_loss, shards=2)
    value, gradient = jax.jit(jax.value_and_grad(loss))(logits, ids, valid)
    rows = [np.array([0, 2]), np.array([3, 5])]
    parts = [sigmoid_oracle(logits[np.ix_(r, r)], ids[r]) for r in rows]
    np.testing.assert_allclose(value, np.mean(parts), rtol=1e-5)
    compared = losses.same_shard(6, 2) & np.outer(valid, valid)
    np.testing.assert_array_equal(np.asarray(gradient) != 0, compared)
    nothing = jax.jit(jax.value_and_grad(loss))(logits, ids, np.zeros(6, bool))
    assert nothing[0] == 0 and not nothing[1].any()


def test_same_shard():
    expected = np.kron(np.eye(3, dtype=bool), np.ones((2, 2), bool))
    np.testing.assert_array_equal(losses.same_shard(6, 3), expected)
    assert losses.same_shard(4, 1).all()


def test_contrastive_loss_in_shards_is_the_mean_of_what_each_has_alone():
    logits, ids = 3 * random(6, 6), np.array([0, 1, 1, 0, 2, 0], np.int32)
    loss = partial(losses.contrastive_loss, shards=2)
    value, gradient = jax.jit(jax.value_and_grad(loss))(logits, ids, np.ones(6, bool))
    halves = [contrastive_oracle(logits[s, s], ids[s]) for s in (slice(0, 3), slice(3, 6))]
    np.testing.assert_allclose(value, np.mean(halves), rtol=1e-5)
    np.testing.assert_array_equal(gradient != 0, losses.same_shard(6, 2))


def test_similarity_is_the_mean_over_frames():
    video, text = random(3, 4, 6), random(5, 6, seed=1)
    expected = [[np.mean([f @ x for f in clip]) for x in text] for clip in video]
    np.testing.assert_allclose(
        jax.jit(losses.similarity)(video, text), expected, rtol=1e-4, atol=1e-6
    )


# --- hard negatives


def draw_negatives(logits, ids, valid, count: int, shards: int = 1) -> losses.Negatives:
    """`count` independent draws, on the leading axis."""

    mine = partial(losses.mine_negatives, shards=shards)
    draw = jax.vmap(mine, in_axes=(0, None, None, None))
    keys = jax.random.split(jax.random.key(0), count)
    return jax.jit(draw)(keys, logits, np.array(ids, np.int32), np.array(valid))


def test_negatives_are_drawn_from_the_softmax_of_what_is_allowed():
    logits = 1.5 * random(6, 6)
    ids, valid = np.array([0, 1, 0, 2, 3, 4]), np.array([1, 1, 1, 1, 0, 1], bool)
    index, exists = draw_negatives(logits, ids, valid, 20_000)
    frequency = np.stack([(np.asarray(index) == j).mean(axis=0) for j in range(6)], axis=1)
    allowed = (ids[:, None] != ids) & valid
    expected = softmax(np.where(allowed, logits, -np.inf))
    # A share p of 20,000 draws has a standard deviation of at most 0.0035.
    np.testing.assert_allclose(frequency, expected, atol=0.015)
    assert (frequency[~allowed] == 0).all()
    np.testing.assert_array_equal(np.asarray(exists), np.tile(valid, (20_000, 1)))


def test_rows_without_a_negative_say_so():
    ids, valid = [5, 5, 5, 8], [True, True, True, False]
    assert not draw_negatives(random(4, 4), ids, valid, 1).exists.any()
    ids, valid = [5, 5, 6, NO_ID], [True, True, True, False]
    exists = draw_negatives(random(4, 4), ids, valid, 1).exists[0]
    np.testing.assert_array_equal(exists, [True, True, True, False])


def test_negatives_of_a_shard_are_drawn_by_its_own_softmax():
    logits, ids = 1.5 * random(6, 6), np.array([0, 1, 2, 0, 3, 4])
    drawn = draw_negatives(logits, ids, np.ones(6, bool), 20_000, shards=2)
    frequency = np.stack([(drawn.index == j).mean(axis=0) for j in range(6)], axis=1)
    own = np.arange(6)[:, None] // 3 == np.arange(6) // 3
    allowed = own & ~np.eye(6, dtype=bool)
    expected = softmax(np.where(allowed, logits, -np.inf))
    np.testing.assert_allclose(frequency, expected, atol=0.015)
    assert (frequency[~allowed] == 0).all() and drawn.exists.all()


def test_a_shard_of_one_row_has_no_negative():
    assert not draw_negatives(
        random(4, 4), np.arange(4), np.ones(4, bool), 1, shards=4
    ).exists.any()


# --- masked words


PAD, CLS, MASK, VOCAB = 0, 1, 2, 1000


def hide_words(ids: np.ndarray, maskable: np.ndarray, ratio: float) -> losses.MaskedTokens:
    mask_tokens = partial(losses.mask_tokens, ratio=ratio, mask_id=MASK, vocab_size=VOCAB)
    return jax.jit(mask_tokens)(jax.random.key(0), ids, maskable)


@pytest.fixture(scope="module")
def masked():
    """Words 3..999 in rows that start with [CLS] and end in padding, half of them hidden."""
    rng = np.random.default_rng(0)
    ids = rng.integers(3, VOCAB, (1000, 50), dtype=np.int32)
    ids[:, 0] = CLS
    ids[np.arange(50) >= rng.integers(2, 51, (1000, 1))] = PAD
    maskable = (ids != PAD) & (ids != CLS)
    words = hide_words(ids, maskable, 0.5)
    return ids, maskable, np.asarray(words.ids), np.asarray(words.targets_mask)


def test_only_maskable_words_are_hidden(masked):
    ids, maskable, hidden, targets = masked
    assert not (targets & ~maskable).any()
    np.testing.assert_array_equal(hidden[~targets], ids[~targets])


def test_the_ratio_of_hidden_words(masked):
    _, maskable, _, targets = masked
    assert abs(targets[maskable].mean() - 0.5) < 0.015  # about 25,000 words


def test_eighty_percent_mask_ten_random_ten_unchanged(masked):
    ids, _, hidden, targets = masked
    before, after = ids[targets], hidden[targets]
    assert abs((after == MASK).mean() - 0.8) < 0.02
    assert abs((after == before).mean() - 0.1) < 0.02
    other = after[(after != MASK) & (after != before)]
    assert abs(len(other) / len(after) - 0.1) < 0.02
    assert other.min() >= 0 and other.max() < VOCAB
    assert abs(other.mean() - VOCAB / 2) < 30, "random words come from the whole vocabulary"


def test_what_is_chosen_its_fate_and_the_words_are_drawn_apart(monkeypatch):
    key, keys = jax.random.key(0), drawn_keys(monkeypatch)
    ids = jnp.full((2, 8), 5)
    losses.mask_tokens(key, ids, ids > 0, ratio=0.5, mask_id=MASK, vocab_size=VOCAB)
    assert len({*keys, key_numbers(key)}) == 4


def test_ratio_one_chooses_every_maskable_word():
    ids, maskable = np.full((2, 8), 5, np.int32), np.eye(2, 8, dtype=bool)
    np.testing.assert_array_equal(hide_words(ids, maskable, 1.0).targets_mask, maskable)


# --- pixels and words


def test_normalize_patches():
    patches = 3 + 5 * random(2, 3, 12)
    expected = [
        [(p - p.mean()) / np.sqrt(((p - p.mean()) ** 2).sum() / 11 + 1e-6) for p in frame]
        for frame in patches
    ]
    np.testing.assert_allclose(
        jax.jit(losses.normalize_patches)(patches), expected, rtol=1e-4, atol=1e-5
    )


def test_a_patch_of_one_color_normalizes_to_zero():
    assert not losses.normalize_patches(jnp.full((1, 2, 12), 0.25)).any()


def test_reconstruction_loss_counts_only_removed_patches():
    predicted, target = random(2, 3, 4, 6), random(2, 3, 4, 6, seed=1)
    counted = np.random.default_rng(2).random((2, 3, 4)) < 0.5
    patch_ids = map(tuple, np.argwhere(counted))
    expected = np.mean([np.mean((predicted[place] - target[place]) ** 2) for place in patch_ids])
    value_and_grad = jax.jit(jax.value_and_grad(losses.reconstruction_loss))
    loss, gradient = value_and_grad(predicted, target, counted)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_array_equal((gradient != 0).any(axis=-1), counted)


def test_cross_entropy():
    logits, labels = 5 * random(2, 3, 7), np.array([[0, 6, 3], [2, 2, 5]], np.int32)
    expected = [[-np.log(softmax(logits[i, j])[labels[i, j]]) for j in range(3)] for i in range(2)]
    everywhere = np.ones((2, 3), bool)
    found = jax.jit(losses.cross_entropy)(logits, labels, everywhere)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_cross_entropy_of_huge_logits_is_finite():
    logits, labels = np.array([[1e4, -1e4]], np.float32), np.array([1], np.int32)
    found = jax.jit(losses.cross_entropy)(logits, labels, np.ones(1, bool))
    np.testing.assert_allclose(found, [2e4])


def test_masked_mean():
    values = jnp.array([1.0, np.nan, 3.0, np.inf])
    mask = jnp.array([True, False, True, False])
    assert losses.masked_mean(values, mask) == 2, "what is masked may be anything"
    assert losses.masked_mean(values, jnp.zeros(4, bool)) == 0
