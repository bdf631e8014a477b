"""The contract between data and model: what one stored record and one batch hold."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Int32, UInt8

# `Batch` leaves are NumPy arrays on the host and jax Arrays on devices. Preparing data needs no
# JAX, so only the type checker imports it.
if TYPE_CHECKING:
    from jax import Array as DeviceArray

    Array = np.ndarray | DeviceArray
else:
    Array = np.ndarray


@dataclass(frozen=True)
class Question:
    """A question about a clip, with its one right answer; `kind` groups questions in reports.

    A multiple-choice question has `options`, `answer` among them; its `question` is empty where
    the options are captions to choose from.
    """

    question: str
    answer: str
    kind: str
    options: tuple[str, ...] = ()

    def text_of(self, option: str) -> str:
        """Join the question, if there is one, and an option to the text that a model reads."""
        return f"{self.question} {option}".strip()


@dataclass(frozen=True)
class Example:
    """One clip or image as a builder yields it, before it is stored (ours).

    `media` holds the encoded bytes as they were read (MP4, PNG, ...). `match_id` names what the
    example shows: two examples of equal `match_id` are correct answers to each other's captions.
    `source` says where it came from (a file, or file and line), for error messages.
    """

    media: bytes
    media_type: Literal[
        "video", "image", "frames"
    ]  # frames: pictures, as `prepare` may store clips
    captions: Sequence[str]
    match_id: str
    source: str
    questions: Sequence[Question] = ()
    labels: Sequence[str] | None = None  # (): known to have none of them; None: not known


class Batch(NamedTuple):
    """Clips with one caption each. Rows with `valid` False are padding: no loss may see them."""

    video: UInt8[Array, "b t h w 3"]  # RGB, 0-255; images have t = 1
    text_ids: Int32[Array, "b l"]  # [CLS] words [SEP] [PAD] ...
    text_mask: Bool[Array, "b l"]  # True = a real token; a prefix of each row
    media_ids: Int32[Array, " b"]  # rows of equal id are correct matches for each other
    valid: Bool[Array, " b"]
    other_ids: Int32[Array, "b o l"] | None = None  # captions that are wrong for the row
    other_mask: Bool[Array, "b o l"] | None = None  # all False: none was found
    targets: Bool[Array, "b c"] | None = None  # the classes (answers, labels) that are right
    answer_ids: Int32[Array, "b a"] | None = None  # the answer, for those who decode it
    answer_mask: Bool[Array, "b a"] | None = None


class Texts(NamedTuple):
    """Every caption of an evaluation split, tokenized."""

    text_ids: Int32[np.ndarray, "q l"]
    text_mask: Bool[np.ndarray, "q l"]
    media_ids: Int32[np.ndarray, " q"]  # clips of equal id are correct for the caption
    rows: Int32[np.ndarray, " q"]  # row of the record that holds it
    captions: tuple[str, ...]


class Choices(NamedTuple):
    """Multiple-choice questions: the texts of their options, one of them right.

    An option without a valid token is none: it fills up a question of fewer options.
    """

    option_ids: Int32[np.ndarray, "q c l"]
    option_mask: Bool[np.ndarray, "q c l"]
    answer: Int32[np.ndarray, " q"]  # the place of the right one
    media_ids: Int32[np.ndarray, " q"]
    rows: Int32[np.ndarray, " q"]  # row of the clip that the question is about
    kinds: tuple[str, ...]
    skipped: int = 0  # questions that cannot be asked
    cut: int = 0  # questions of which the text is longer than `data.text_len`


class Questions(NamedTuple):
    """Every open question of an evaluation split, with its right answer and its kind."""

    texts: Texts  # the questions
    answers: tuple[str, ...]
    kinds: tuple[str, ...]
