"""Multiple-choice questions made of captions: drawn, shuffled, put into one text (MuLTI, MCM).

Pure functions. The true caption and others are the options of a question; a template of token ids
says where they go.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

SLOT = -1  # in a template of token ids: an option goes here


class Caption(NamedTuple):
    """Token ids [CLS] words [SEP] [PAD] ... and where they are valid, for any number of texts."""

    ids: Int[Array, "*b l"]
    mask: Bool[Array, "*b l"]


def other_rows(
    noise: Float[Array, "b b"],
    ids: Int[Array, "b l"],
    media_ids: Int[Array, " b"],
    valid: Bool[Array, " b"],
    count: int,
) -> tuple[Int[Array, "b {count}"], Bool[Array, " b"]]:
    """For each row `count` other rows whose captions are wrong for it, and whether there are any.

    Never a row of equal media id, of an equal text, or an invalid one; no row twice. The lowest
    noise, in [0, 1), is chosen.
    """
    wrong = (media_ids[:, None] != media_ids) & (ids[:, None] != ids).any(axis=-1) & valid
    order = jnp.where(wrong, noise, 2.0)
    if count > len(ids):
        order = jnp.pad(order, ((0, 0), (0, count - len(ids))), constant_values=2.0)
    cost, rows = jax.lax.top_k(-order, count)
    return rows % len(ids), (cost > -2.0).all(axis=1) & valid


def insert_truth(truth: Caption, others: Caption, answer: Int[Array, " b"]) -> Caption:
    """The options [b c l] of each question, the true caption [b l] in slot `answer`."""
    count = others.ids.shape[1] + 1
    order = (jnp.arange(count) - answer[:, None]) % count  # 0, the truth, at `answer`

    def arrange(first: Array, rest: Array) -> Array:
        options = jnp.concatenate([first[:, None], rest], axis=1)
        return jnp.take_along_axis(options, order[..., None], axis=1)

    return Caption(*map(arrange, truth, others))


def compose(template: Sequence[int], options: Caption, max_len: int) -> Caption:
    """One text a question: the template with the words of the options in its slots.

    Each option [b c l] is cut so that the longest text has `max_len` tokens. Padding ends up last.

    Raises:
      ValueError: the template leaves no room for the options, or has another number of slots.
    """
    count, fixed = options.ids.shape[1], len(template) - template.count(SLOT)
    room = (max_len - fixed) // count
    if template.count(SLOT) != count or room < 1:
        raise ValueError(
            f"objectives.mcm_len={max_len} and a template of {fixed} tokens with "
            f"{template.count(SLOT)} slots do not fit {count} options"
        )
    words = options.ids[:, :, 1:-1][..., :room]
    # A word is followed by another or by [SEP]; [SEP] itself is not.
    valid = options.mask[:, :, 2:][..., :room]
    constant = jnp.ones((len(words), 1), words.dtype)
    slots = iter(range(count))
    pieces = []
    for token in template:
        if token == SLOT:
            slot = next(slots)
            pieces.append((words[:, slot], valid[:, slot]))
        else:
            pieces.append((token * constant, constant.astype(bool)))
    ids, mask = (jnp.concatenate(parts, axis=1) for parts in zip(*pieces, strict=True))
    front = jnp.argsort(~mask, axis=1, stable=True)
    return Caption(*(jnp.take_along_axis(x, front, axis=1) for x in (ids * mask, mask)))


def fold(options: Caption) -> Caption:
    """The options as texts of their own: [b c l] -> [(b c) l]."""
    return Caption(*(rearrange(x, "b c l -> (b c) l") for x in options))
