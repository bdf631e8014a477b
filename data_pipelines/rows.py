"""From a stored record to one row of a batch: decode, crop, tokenize. Runs in the workers."""

import dataclasses
import sys
import threading
import zlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import grain
import numpy as np
from jaxtyping import Int32, UInt8

from data_pipelines import decode, sampling, transforms
from data_pipelines.config import DataConfig, SourceConfig
from data_pipelines.records import Question
from data_pipelines.stored import questions_of
from data_pipelines.tokenize import Tokenizer

NO_MATCH = -1  # the media id of rows that are padding
_TRIES = 8  # records that are looked at for each wrong caption

Row = dict[str, np.ndarray]  # one row of each array of a Batch

_reported: set[tuple[str, str]] = set()  # (data set, source) of clips reported by this process
_report_lock = threading.Lock()


def match_hash(match_id: bytes) -> int:
    """The media id of a training row: 31 bits, the same on every machine and in every run (ours).

    Two different ids among 1,000 rows collide with a probability of 0.02 %.
    """
    return zlib.crc32(match_id) & 0x7FFFFFFF


def load_video(
    record: dict, num_frames: int, rng: np.random.Generator | None
) -> UInt8[np.ndarray, "t h w 3"]:
    """The sampled frames of a stored record, or the one frame of an image (ours).

    Raises:
      DecodeError: the media cannot be decoded, or an image stands where a clip is expected.
    """
    if record["media_type"] == b"image":
        if num_frames > 1:
            raise decode.DecodeError("image where a video is expected", f"num_frames={num_frames}")
        return decode.decode_image(record["media"])[None]
    with decode.open_clip(record["media"]) as clip:
        return clip.frames(sampling.segment_times(clip.info.duration_secs, num_frames, rng))


class Said(NamedTuple):
    """What one row says about its clip."""

    text: bytes
    others: Sequence[bytes] = ()  # captions of other clips, or wrong options
    classes: Sequence[bytes] = ()  # the right answers or labels


@dataclasses.dataclass(frozen=True)
class RowMaker:
    """Makes the rows of one source; it travels to the worker processes.

    `classes` gives every known answer or label its number; it is empty for the task of captions.
    """

    source: SourceConfig
    config: DataConfig
    tokenizer: Tokenizer
    classes: Mapping[bytes, int] = dataclasses.field(default_factory=dict)

    def row(
        self, record: dict, said: Said, media_id: int, rng: np.random.Generator | None = None
    ) -> Row:
        """A row of a batch, augmented if there is an `rng`; padding if decoding fails."""
        try:
            video = load_video(record, self.source.num_frames, rng)
            video = video[::-1] if self.source.backwards else video
        except decode.DecodeError as error:
            _report_once(self.source.name, record["source"].decode(), str(error))
            return self.padding()
        return self._arrays(self._view(video, rng), said, media_id, valid=True)

    def padding(self) -> Row:
        """A row that no loss may see: zeros, and a text of [CLS] [SEP]."""
        size = self.config.image_size
        video = np.zeros((self.source.num_frames, size, size, 3), np.uint8)
        return self._arrays(video, Said(b""), NO_MATCH, valid=False)

    def tokens(self, texts: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """Ids and mask of texts, at the config's length."""
        return self.tokenizer.encode([text.decode() for text in texts], self.config.text_len)

    def _arrays(self, video: np.ndarray, said: Said, media_id: int, valid: bool) -> Row:
        """The row; wrong captions that were not found have no valid token."""
        count = self.config.num_others
        missing = count - len(said.others)
        ids, mask = self.tokens([said.text, *said.others, *[b""] * missing])
        mask[1 + len(said.others) :] = False
        row = {
            "video": video,
            "text_ids": ids[0],
            "text_mask": mask[0],
            "media_ids": np.int32(media_id),
            "valid": np.bool_(valid),
        }
        if count:
            row |= {"other_ids": ids[1:], "other_mask": mask[1:]}
        if self.classes:
            row["targets"] = np.zeros(len(self.classes), bool)
            known = [self.classes[name] for name in said.classes if name in self.classes]
            row["targets"][known] = True
        if self.config.answer_len:
            answer = next(iter(said.classes), b"").decode()
            ids, mask = self.tokenizer.encode([answer], self.config.answer_len)
            row |= {"answer_ids": ids[0], "answer_mask": mask[0]}
        return row

    def _view(self, video: np.ndarray, rng: np.random.Generator | None) -> np.ndarray:
        config = self.config
        if rng is None:
            return transforms.eval_view(video, config.image_size)
        return transforms.train_view(
            video, config.image_size, rng, min_crop_scale=config.min_crop_scale, flip=config.flip
        )


@dataclasses.dataclass(frozen=True)
class TrainRows(grain.transforms.RandomMap):
    """A record -> a row with a random caption, random frame times, crop and flip."""

    records: Sequence[dict]
    maker: RowMaker

    def random_map(self, record: dict, rng: np.random.Generator) -> Row:
        """All randomness comes from `rng`, which grain derives from seed and place."""
        caption = _any_caption(record, rng)
        said = Said(caption, self._others(record, caption, rng), record["labels"])
        return self.maker.row(record, said, match_hash(record["match_id"]), rng)

    def _others(self, record: dict, caption: bytes, rng: np.random.Generator) -> list[bytes]:
        """Up to `num_others` captions of records that show something else, all different to the
        tokenizer; fewer if they are not found soon, as in a source of a few equal captions."""
        wanted = self.maker.config.num_others
        found, seen = [], {self._words(caption)} if wanted else set()
        for _ in range(_TRIES * wanted):
            if len(found) == wanted:
                break
            other = self.records[int(rng.integers(len(self.records)))]
            text = _any_caption(other, rng)
            if other["match_id"] != record["match_id"] and self._words(text) not in seen:
                seen.add(self._words(text))
                found.append(text)
        return found

    def _words(self, caption: bytes) -> bytes:
        """What the tokenizer sees of a caption."""
        return self.maker.tokens([caption])[0].tobytes()


@dataclasses.dataclass(frozen=True)
class QuestionRows(grain.transforms.RandomMap):
    """The places of a record and of one of its questions -> a row, augmented like `TrainRows`."""

    records: Sequence[dict]
    maker: RowMaker

    def random_map(self, place: tuple[int, int], rng: np.random.Generator) -> Row:
        """All randomness comes from `rng`, which grain derives from seed and place."""
        record = self.records[place[0]]
        item = questions_of(record)[place[1]]
        if self.maker.config.task == "options":
            said = Said(item.text_of(item.answer).encode(), wrong_options(item))
        else:
            said = Said(item.question.encode(), classes=[item.answer.encode()])
        return self.maker.row(record, said, match_hash(record["match_id"]), rng)


def wrong_options(item: Question) -> list[bytes]:
    """The texts of all options but the answer."""
    return [item.text_of(option).encode() for option in item.options if option != item.answer]


def _any_caption(record: dict, rng: np.random.Generator) -> bytes:
    """One of the captions; empty if only labels or questions are known."""
    captions = record["captions"]
    return captions[rng.integers(len(captions))] if len(captions) else b""


@dataclasses.dataclass(frozen=True)
class EvalRows(grain.transforms.Map):
    """An index -> the row of that clip with its first caption and its labels; padding past the last
    clip."""

    records: Sequence[dict]
    media_ids: Int32[np.ndarray, " n"]
    maker: RowMaker

    def map(self, index: int) -> Row:
        """The same index always gives the same row."""
        if index >= len(self.records):
            return self.maker.padding()
        record = self.records[index]
        caption = next(iter(record["captions"]), b"")  # none if only labels or questions are known
        said = Said(caption, classes=record["labels"])
        return self.maker.row(record, said, self.media_ids[index])


def _report_once(dataset: str, source: str, reason: str) -> None:
    """Says on stderr what cannot be used; each worker process does so for itself."""
    with _report_lock:
        first = (dataset, source) not in _reported
        _reported.add((dataset, source))
    if first:
        print(f"{dataset}: {source} cannot be used: {reason}", file=sys.stderr)
