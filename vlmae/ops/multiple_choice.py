"""Multiple-choice questions made of captions: sampled, shuffled, joined to one text (MuLTI, MCM).

Pure functions. The options of a question are the true caption and wrong ones; a template of token
ids holds a slot for each option.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

SLOT = -1  # in a template of token ids: the slot of an option


class Caption(NamedTuple):
    """Token ids [CLS] ... [SEP] [PAD] ... of any number of texts, and the mask of valid ones."""

    ids: Int[Array, "*b l"]
    mask: Bool[Array, "*b l"]


def negative_rows(
    noise: Float[Array, "b b"],
    ids: Int[Array, "b l"],
    media_ids: Int[Array, " b"],
    valid: Bool[Array, " b"],
    count: int,
) -> tuple[Int[Array, "b {count}"], Bool[Array, " b"]]:
    """Sample, for each row, `count` different rows whose captions are wrong for it.

    A row of equal media id or equal text is never wrong, nor is an invalid one. The rows of lowest
    noise, in [0, 1), are taken.

    Returns:
      The indices, and a mask that is False where too few rows are wrong.
    """
    # Equal texts too: many clips have the caption of another one, and no answer would be right.
    wrong = (media_ids[:, None] != media_ids) & (ids[:, None] != ids).any(axis=-1) & valid
    order = jnp.where(wrong, noise, 2.0)
    # top_k needs as many columns as it takes; these have the cost of a row that is not wrong.
    if count > len(ids):
        order = jnp.pad(order, ((0, 0), (0, count - len(ids))), constant_values=2.0)
    cost, rows = jax.lax.top_k(-order, count)
    return rows % len(ids), (cost > -2.0).all(axis=1) & valid


def insert_truth(truth: Caption, negatives: Caption, answer: Int[Array, " b"]) -> Caption:
    """Join wrong captions [b c-1 l] and the true one [b l], at `answer`, to options [b c l]."""
    count = negatives.ids.shape[1] + 1
    # A rotation and no shuffle: the negatives are drawn in random order already, so only the place
    # of the truth matters.
    order = (jnp.arange(count) - answer[:, None]) % count  # 0, the truth, at `answer`

    def arrange(first: Array, rest: Array) -> Array:
        options = jnp.concatenate([first[:, None], rest], axis=1)
        return jnp.take_along_axis(options, order[..., None], axis=1)

    return Caption(*map(arrange, truth, negatives))


def compose(template: Sequence[int], options: Caption, max_len: int) -> Caption:
    """Fill the slots of the template with the tokens of the options: one text a question.

    Each option [b c l] is cut so that the longest text has `max_len` tokens. Words with which all
    options of a question begin, such as the question itself, give way first. Padding comes last,
    as the encoders need it.

    Raises:
      ValueError: the template leaves no room for the options, or has another number of slots.
    """
    room = room_for_options(template, options, max_len)
    words, valid = (x[..., :room] for x in spare_beginning(words_of(options), room))
    constant = jnp.ones((len(words), 1), words.dtype)
    slots = iter(range(options.ids.shape[1]))
    pieces = []
    for token in template:
        if token == SLOT:
            slot = next(slots)
            pieces.append((words[:, slot], valid[:, slot]))
        else:
            pieces.append((token * constant, constant.astype(bool)))
    ids, mask = (jnp.concatenate(parts, axis=1) for parts in zip(*pieces, strict=True))
    # Valid tokens to the front: attention kernels take lengths, not masks with holes.
    front = jnp.argsort(~mask, axis=1, stable=True)
    return Caption(*(jnp.take_along_axis(x, front, axis=1) for x in (ids * mask, mask)))


def room_for_options(template: Sequence[int], options: Caption, max_len: int) -> int:
    """Count the tokens that each option may have.

    Raises:
      ValueError: see `compose`.
    """
    count, fixed = options.ids.shape[1], len(template) - template.count(SLOT)
    room = (max_len - fixed) // count
    if template.count(SLOT) != count or room < 1:
        raise ValueError(
            f"objectives.mcm_len={max_len} and a template of {fixed} tokens with "
            f"{template.count(SLOT)} slots do not fit {count} options"
        )
    return room


def words_of(options: Caption) -> Caption:
    """Take [CLS] and [SEP] off."""
    # A token of the caption is followed by another or by [SEP].
    return Caption(options.ids[..., 1:-1], options.mask[..., 2:])


def spare_beginning(words: Caption, room: int) -> Caption:
    """Take the end off the words with which all options [b c l] begin, for the longest to fit."""
    ids, mask = words
    exists = mask.any(axis=-1, keepdims=True)  # a question may have fewer options
    same = ((ids == ids[:, :1]) & mask | ~exists).all(axis=1)
    # The product ends at the first token that differs.
    shared = jnp.cumprod(same, axis=1).sum(axis=1)
    excess = jnp.maximum(mask.sum(axis=2).max(axis=1) - room, 0)
    spared = jnp.minimum(shared, excess)
    place = jnp.arange(ids.shape[2])
    place = place + jnp.where(place < (shared - spared)[:, None], 0, spared[:, None])
    there = (place < ids.shape[2])[:, None]
    place = jnp.minimum(place, ids.shape[2] - 1)[:, None]
    ids, mask = (jnp.take_along_axis(x, place, axis=2) for x in words)
    return Caption(ids, mask & there)


def are_cut(template: Sequence[int], options: Caption, max_len: int) -> Bool[Array, " b"]:
    """Find the questions of which `compose` cuts an option."""
    room = room_for_options(template, options, max_len)
    return (words_of(options).mask.sum(axis=2) > room).any(axis=1)


def fold(options: Caption) -> Caption:
    """Fold options into the batch, as texts of their own: [b c l] -> [(b c) l]."""
    return Caption(*(rearrange(x, "b c l -> (b c) l") for x in options))
