"""The evaluation split: every clip once, with all of its captions and questions."""

import dataclasses
from collections.abc import Callable, Sequence

import grain
import numpy as np
from jaxtyping import Bool, Int32, UInt8

from data_pipelines.loading.pipeline import BatchIterator, iterate, local_size
from data_pipelines.loading.rows import EvalRows, RowMaker
from data_pipelines.schema.classes import Classes
from data_pipelines.schema.config import DataConfig
from data_pipelines.schema.records import Choices, Questions, Texts
from data_pipelines.storage.records import RecordTexts
from data_pipelines.storage.stored import open_source, read_texts, tokenizer_for
from data_pipelines.text.tokenize import Tokenizer

# A worker needs seconds to start, in which threads of this process read as many.
CLIPS_A_WORKER = 256


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
    labels: tuple[tuple[str, ...], ...] = ()  # of each clip, whatever the task

    def clip(self, row: int) -> UInt8[np.ndarray, "t h w 3"]:
        """Return the frames of a clip as the model sees them; zeros if it cannot be decoded."""
        return self._rows.map(row)["video"]

    def answers(self) -> tuple[Int32[np.ndarray, "c a"], Bool[np.ndarray, "c a"]]:
        """Tokenize every class as an answer to be decoded: ids and mask."""
        return self._rows.maker.tokenizer.encode(self.classes.names, self._config.answer_len)

    def tokenize(
        self, texts: Sequence[str]
    ) -> tuple[Int32[np.ndarray, "q l"], Bool[np.ndarray, "q l"]]:
        """Tokenize texts as captions are: ids and mask."""
        return self._rows.maker.tokens([text.encode() for text in texts])

    def count_cut(self, texts: Sequence[str]) -> int:
        """Count the texts that are longer than `data.text_len`."""
        longest = self._rows.maker.tokenizer.longest
        return sum(longest([text]) > self._config.text_len for text in texts)

    def first_caption(self, row: int) -> str:
        """Return the first caption of a clip; empty if it has none."""
        own = np.flatnonzero(self.texts.rows == row)
        return self.texts.captions[own[0]] if len(own) else ""

    def text_of(self, ids: Int32[np.ndarray, " l"]) -> str:
        """Decode token ids to text."""
        return self._rows.maker.tokenizer.decode(ids)

    def batches(
        self, part: int = 0, parts: int = 1, num_workers: int | None = None
    ) -> BatchIterator:
        """Read all batches, or one part of each; `valid` is False in rows that only pad.

        `num_workers` processes read them; by default those of the config, or none for few clips.

        Raises:
          UserError: `parts` does not divide the batch size.
        """
        size = self._config.eval_batch_size
        rows = local_size("data.eval_batch_size", size, parts)
        # Whole global batches: every process runs the same number of steps, or the last collective
        # hangs.
        num_rows = -(-self.num_clips // size) * size
        batches = grain.MapDataset.range(num_rows).map(self._rows).batch(rows)
        # Sliced by local batches, as in training: rows of a global batch stay contiguous.
        if num_workers is None:
            num_workers = self._config.num_workers
            num_workers *= self.num_clips >= CLIPS_A_WORKER * num_workers * parts
        return iterate(batches[part::parts], num_workers)


def eval_data(config: DataConfig, classes: Classes | None = None) -> EvalData:
    """Return the evaluation split, without randomness (ours).

    Raises:
      MissingError: the data set or the tokenizer is missing.
      UserError: there is no such split.
    """
    # Texts apart from media: retrieval encodes all captions before a clip is decoded.
    records = open_source(config.eval_source, config.data_dir)
    stored = list(read_texts(config.eval_source, config.data_dir))
    tokenizer = tokenizer_for(config)
    # Numbers and no hashes, as in training: all ids of the split are at hand, so none can collide.
    media_ids = np.unique([item.match_id for item in stored], return_inverse=True)[1]
    media_ids = media_ids.astype(np.int32)

    def tokenize(of_clips: list[list[str]]) -> Texts:
        return _tokenize_texts(of_clips, media_ids, tokenizer, config.text_len)

    maker = RowMaker(
        config.eval_source,
        # Evaluation draws nothing, and has its own questions and answers.
        dataclasses.replace(config, num_others=0, answer_len=0),
        tokenizer,
        # Answers are compared by text; only labels need a target vector for each clip.
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
        labels=tuple(item.labels for item in stored),
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
    """Return the questions that have options; None if there is none."""
    asked = [
        (item, row)
        for row, record in enumerate(stored)
        for item in record.questions
        if item.options
    ]
    if not asked:
        return None
    # As wide as the longest question; the others are filled up with options that are masked.
    count = max(len(item.options) for item, _ in asked)
    texts = [
        [item.text_of(option).encode() for option in item.options]
        + [b""] * (count - len(item.options))
        for item, _ in asked
    ]
    tokens = [
        maker.tokens(of_question, item.question.encode())
        for of_question, (item, _) in zip(texts, asked, strict=True)
    ]
    ids, mask = map(np.stack, zip(*tokens, strict=True))
    # Counted before the cut, to report how many questions lost words.
    lengths = [maker.tokenizer.longest([text.decode() for text in x]) for x in texts]
    rows = np.array([row for _, row in asked], np.int32)
    there = np.array([[text != b"" for text in of_question] for of_question in texts])
    return Choices(
        ids,
        mask & there[..., None],
        np.array([item.options.index(item.answer) for item, _ in asked], np.int32),
        media_ids[rows],
        rows,
        tuple(item.kind for item, _ in asked),
        cut=sum(length > ids.shape[-1] for length in lengths),
    )


def _tokenize_texts(
    of_clips: list[list[str]], media_ids: np.ndarray, tokenizer: Tokenizer, text_len: int
) -> Texts:
    """Tokenize the texts of all clips as one list, each with the id and the row of its clip."""
    flat = [text for of_clip in of_clips for text in of_clip]
    rows = np.repeat(np.arange(len(of_clips), dtype=np.int32), list(map(len, of_clips)))
    ids, mask = tokenizer.encode(flat, text_len)
    return Texts(ids, mask, media_ids[rows], rows, tuple(flat))
