"""The evaluation split: every clip once, and all that is said and asked about it."""

import dataclasses
from collections.abc import Callable

import grain
import numpy as np
from jaxtyping import Bool, Int32, UInt8

from data_pipelines.classes import Classes
from data_pipelines.config import DataConfig
from data_pipelines.pipeline import BatchIterator, iterate, local_size
from data_pipelines.records import Choices, Questions, Texts
from data_pipelines.rows import EvalRows, RowMaker
from data_pipelines.stored import RecordTexts, open_source, read_texts, tokenizer_for
from data_pipelines.tokenize import Tokenizer


@dataclasses.dataclass(frozen=True)
class EvalData:
    """One split, every clip once and in order, and all of its captions (ours).

    `media_ids[i]` is the id of clip i; a caption of equal id in `texts` is correct for it.
    """

    num_clips: int
    media_ids: Int32[np.ndarray, " n"]
    names: tuple[str, ...]  # where each clip comes from
    texts: Texts
    questions: Questions | None  # where the task is to answer them
    choices: Choices | None  # where the split has questions with options
    classes: Classes | None
    _rows: EvalRows
    _config: DataConfig

    def clip(self, row: int) -> UInt8[np.ndarray, "t h w 3"]:
        """The frames of a clip as the model sees them; zeros if it cannot be decoded."""
        return self._rows.map(row)["video"]

    def answers(self) -> tuple[Int32[np.ndarray, "c a"], Bool[np.ndarray, "c a"]]:
        """Ids and mask of every class as an answer to be decoded."""
        return self._rows.maker.tokenizer.encode(self.classes.names, self._config.answer_len)

    def text_of(self, ids: Int32[np.ndarray, " l"]) -> str:
        """What token ids say."""
        return self._rows.maker.tokenizer.decode(ids)

    def batches(self, part: int = 0, parts: int = 1) -> BatchIterator:
        """All batches, or one of several parts of each; `valid` is False in rows that only pad.

        Raises:
          ValueError: `parts` does not divide the batch size.
        """
        size = self._config.eval_batch_size
        rows = local_size("data.eval_batch_size", size, parts)
        num_rows = -(-self.num_clips // size) * size
        batches = grain.MapDataset.range(num_rows).map(self._rows).batch(rows)
        return iterate(batches[part::parts], self._config.num_workers)


def eval_data(config: DataConfig, classes: Classes | None = None) -> EvalData:
    """The evaluation split, without randomness (ours).

    Raises:
      FileNotFoundError: the data set or the tokenizer is missing.
      ValueError: there is no such split.
    """
    records = open_source(config.eval, config.data_dir)
    stored = read_texts(config.eval, config.data_dir)
    tokenizer = tokenizer_for(config)
    media_ids = np.unique([item.match_id for item in stored], return_inverse=True)[1]
    media_ids = media_ids.astype(np.int32)

    def tokenize(of_clips: list[list[str]]) -> Texts:
        return _tokenize_texts(of_clips, media_ids, tokenizer, config.text_len)

    maker = RowMaker(
        config.eval,
        dataclasses.replace(config, num_others=0, answer_len=0),
        tokenizer,
        classes.numbers if classes and config.task == "labels" else {},
    )
    return EvalData(
        num_clips=len(records),
        media_ids=media_ids,
        names=tuple(item.source for item in stored),
        texts=tokenize([list(item.captions) for item in stored]),
        questions=_open_questions(stored, tokenize) if config.task == "questions" else None,
        choices=_choices(stored, media_ids, maker),
        classes=classes,
        _rows=EvalRows(records, media_ids, maker),
        _config=config,
    )


def _open_questions(
    stored: list[RecordTexts], tokenize: Callable[[list[list[str]]], Texts]
) -> Questions:
    flat = [question for item in stored for question in item.questions]
    return Questions(
        tokenize([[question.question for question in item.questions] for item in stored]),
        tuple(question.answer for question in flat),
        tuple(question.kind for question in flat),
    )


def _choices(
    stored: list[RecordTexts], media_ids: Int32[np.ndarray, " n"], maker: RowMaker
) -> Choices | None:
    """The questions that have options; None if there is none."""
    asked = [
        (item, media_id)
        for record, media_id in zip(stored, media_ids, strict=True)
        for item in record.questions
        if item.options
    ]
    if not asked:
        return None
    count = max(len(item.options) for item, _ in asked)
    texts = [
        [item.text_of(option).encode() for option in item.options]
        + [b""] * (count - len(item.options))
        for item, _ in asked
    ]
    ids, mask = maker.tokens([text for of_question in texts for text in of_question])
    shape = (len(asked), count, ids.shape[1])
    there = np.array([[text != b"" for text in of_question] for of_question in texts])
    return Choices(
        ids.reshape(shape),
        mask.reshape(shape) & there[..., None],
        np.array([item.options.index(item.answer) for item, _ in asked], np.int32),
        np.array([media_id for _, media_id in asked], np.int32),
        tuple(item.kind for item, _ in asked),
    )


def _tokenize_texts(
    of_clips: list[list[str]], media_ids: np.ndarray, tokenizer: Tokenizer, text_len: int
) -> Texts:
    """All texts of all clips in one list, each with the id of its clip."""
    flat = [text for of_clip in of_clips for text in of_clip]
    counts = [len(of_clip) for of_clip in of_clips]
    ids, mask = tokenizer.encode(flat, text_len)
    return Texts(ids, mask, np.repeat(media_ids, counts), tuple(flat))
