"""Rows of batches from stored records: decode, crop, tokenize. Runs in the workers."""

import contextlib
import dataclasses
import functools
import sys
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import grain
import numpy as np
from jaxtyping import Int32, Int64, UInt8

from data_pipelines.media import decode, images, sampling, transforms
from data_pipelines.schema.checks import visible
from data_pipelines.schema.config import DataConfig, SourceConfig
from data_pipelines.schema.records import Question
from data_pipelines.storage.pictures import FRAMES
from data_pipelines.storage.records import DAMAGED, RecordTexts, questions_of
from data_pipelines.text.tokenize import Tokenizer

NO_MATCH = -1  # the media id of rows that are padding
_TRIES = 8  # records that are looked at for each wrong caption

Row = dict[str, np.ndarray]  # one row of each array of a Batch

_reported: set[tuple[str, str]] = set()  # (data set, source) of clips reported by this process
_report_lock = threading.Lock()


def match_hash(match_id: bytes) -> int:
    """Hash a match id to the media id of a training row: 31 bits, equal on every machine (ours).

    Two different ids among 1,000 rows collide with a probability of 0.02 %.
    """
    # A hash, since rows are made in workers that do not know each other's ids. 31 bits: the batch
    # holds int32, and -1 is padding's.
    return zlib.crc32(match_id) & 0x7FFFFFFF


class Sampled(NamedTuple):
    """Frames of a record that are chosen, and not yet decoded.

    `decode` takes a reduction, see `jpeg.read_jpeg`, which only JPEG pictures follow.
    """

    size: tuple[int, int]  # height and width of a frame
    decode: Callable[[int], Sequence[UInt8[np.ndarray, "h w 3"]]]


@contextlib.contextmanager
def sample_frames(
    record: dict, num_frames: int, rng: np.random.Generator | None
) -> Iterator[Sampled]:
    """Choose frames of a stored clip, or the one frame of an image (ours).

    Raises:
      DecodeError: the media cannot be decoded, or an image stands where a clip is expected.
    """
    media, kind = record["media"], record["media_type"].decode()
    if record["media_type"] == DAMAGED:
        raise decode.DecodeError("damaged record", media.decode())
    if kind == "image":
        # An image is no clip without motion: a source of images has num_frames=1.
        if num_frames > 1:
            raise decode.DecodeError("image where a video is expected", f"num_frames={num_frames}")
        still = images.Still(media)
        yield Sampled(still.size, lambda reduction: [still.decode(reduction)])
    elif kind == FRAMES:
        times = sampling.segment_times(media.duration_secs, num_frames, rng)
        yield Sampled(media.size, functools.partial(media.frames, times))
    else:
        # Closed at once: containers hold memory that Python does not see.
        with decode.open_clip(media) as clip:
            times = sampling.segment_times(clip.info.duration_secs, num_frames, rng)
            yield Sampled(clip.size, lambda _: clip.frames(times))


def load_video(
    record: dict, num_frames: int, rng: np.random.Generator | None
) -> UInt8[np.ndarray, "t h w 3"]:
    """Decode the frames that `sample_frames` chooses.

    Raises: as `sample_frames`.
    """
    with sample_frames(record, num_frames, rng) as sampled:
        return np.stack(sampled.decode(1))


class RowText(NamedTuple):
    """Texts and classes of one row."""

    text: bytes
    others: Sequence[bytes] = ()  # captions of other clips, or wrong options
    classes: Sequence[bytes] = ()  # the right answers or labels
    question: bytes = b""  # with which the texts begin, if they are options


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
        self, record: dict, said: RowText, media_id: int, rng: np.random.Generator | None = None
    ) -> Row:
        """Make a row of a batch, augmented if there is an `rng`; padding if decoding fails."""
        try:
            video = self._video(record, rng)
        except decode.DecodeError as error:
            # Training goes on, as one bad file among millions is normal; `max_bad_ratio` stops it
            # if there are many.
            _report_once(self.source.name, record["source"].decode(), str(error))
            return self.padding(training=rng is not None)
        return self._arrays(video, said, media_id, valid=True)

    def padding(self, training: bool = False) -> Row:
        """Make a row that no loss may see: zeros, and a text of [CLS] [SEP]."""
        size = self.config.frame_size if training else self.config.image_size
        video = np.zeros((self.source.num_frames, size, size, 3), np.uint8)
        return self._arrays(video, RowText(b""), NO_MATCH, valid=False)

    def tokens(
        self, texts: Sequence[bytes], question: bytes = b""
    ) -> tuple[np.ndarray, np.ndarray]:
        """Tokenize texts to ids and mask, at the config's length; see `Tokenizer.encode`."""
        texts = [text.decode() for text in texts]
        return self.tokenizer.encode(texts, self.config.text_len, question.decode())

    def _arrays(self, video: np.ndarray, said: RowText, media_id: int, valid: bool) -> Row:
        """Join the arrays of a row; wrong captions that were not found have no valid token."""
        count = self.config.num_others
        missing = count - len(said.others)
        ids, mask = self.tokens([said.text, *said.others, *[b""] * missing], said.question)
        # No valid token marks what is missing: the batch has no further field for it.
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
            # Rare answers outside the classes have no target; the objective leaves such rows out.
            known = [self.classes[name] for name in said.classes if name in self.classes]
            row["targets"][known] = True
        if self.config.answer_len:
            answer = next(iter(said.classes), b"").decode()
            ids, mask = self.tokenizer.encode([answer], self.config.answer_len)
            row |= {"answer_ids": ids[0], "answer_mask": mask[0]}
        return row

    def _video(
        self, record: dict, rng: np.random.Generator | None
    ) -> UInt8[np.ndarray, "t size size 3"]:
        config, num_frames = self.config, self.source.num_frames
        if rng is None:
            frames = load_video(record, num_frames, None)
            frames = frames[::-1] if self.source.backwards else frames
            return transforms.eval_view(frames, config.image_size)
        out = np.empty((num_frames, config.frame_size, config.frame_size, 3), np.uint8)
        with sample_frames(record, num_frames, rng) as sampled:
            view = transforms.draw_view(
                *sampled.size, rng, min_crop_scale=config.min_crop_scale, flip=config.flip
            )
            frames = sampled.decode(view.reduction(config.frame_size))
            for frame, own in zip(frames, out[::-1] if self.source.backwards else out, strict=True):
                transforms.write_view(frame, view, sampled.size, own)
        if config.color_jitter:
            # Drawn last, so that all other draws are those of a run without it.
            jitter = transforms.draw_jitter(config.color_jitter, rng)
            for frame in out:
                transforms.jitter_frame(frame, jitter)
        return out


@dataclasses.dataclass(frozen=True)
class PickedRecords(Sequence):
    """Some of the records of a source."""

    records: Sequence[dict]
    places: Int64[np.ndarray, " n"]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> dict:
        return self.records[int(self.places[index])]


@dataclasses.dataclass(frozen=True)
class TrainRows(grain.transforms.RandomMap):
    """The place of a record -> a row of random caption, frame times, crop, flip and colors.

    `texts` are those of all records, for the captions of other clips; empty if none are wanted.
    """

    records: Sequence[dict]
    texts: Sequence[RecordTexts]
    maker: RowMaker

    def random_map(self, place: int, rng: np.random.Generator) -> Row:
        """Make a row; all randomness comes from `rng`, which grain derives from seed and place."""
        # Read here: grain measures what a source of records gives, for longer than reading takes.
        record = self.records[place]
        # One caption a visit: over the epochs all are seen, and batches keep their size.
        captions = record["captions"]
        caption = _draw(captions, rng) if captions else b""
        others = self._others(record["match_id"].decode(), caption, rng)
        said = RowText(caption, others, record["labels"])
        return self.maker.row(record, said, match_hash(record["match_id"]), rng)

    def _others(self, match_id: str, caption: bytes, rng: np.random.Generator) -> list[bytes]:
        """Draws up to `num_others` captions of records that show something else.

        All differ to the tokenizer; there are fewer if they are not found soon, as in a source of a
        few equal captions.
        """
        wanted = self.maker.config.num_others
        found, seen = [], {self._tokens(caption)} if wanted else set()
        # A bounded number of draws: no index of captions by id has to fit in memory.
        for _ in range(_TRIES * wanted):
            if len(found) == wanted:
                break
            other = self.texts[int(rng.integers(len(self.texts)))]
            if not other.captions:
                continue
            text = _draw(other.captions, rng).encode()
            # Compared as the model reads them: captions that differ in case alone are the same.
            if other.match_id != match_id and self._tokens(text) not in seen:
                seen.add(self._tokens(text))
                found.append(text)
        return found

    def _tokens(self, caption: bytes) -> bytes:
        return self.maker.tokens([caption])[0].tobytes()


@dataclasses.dataclass(frozen=True)
class QuestionRows(grain.transforms.RandomMap):
    """The places of a record and of one of its questions -> a row, augmented like `TrainRows`."""

    records: Sequence[dict]
    maker: RowMaker

    def random_map(self, place: tuple[int, int], rng: np.random.Generator) -> Row:
        """Make a row; all randomness comes from `rng`, which grain derives from seed and place."""
        record = self.records[place[0]]
        if record["media_type"] == DAMAGED:
            return self.maker.row(record, RowText(b""), NO_MATCH, rng)
        item = questions_of(record)[place[1]]
        if self.maker.config.task == "options":
            said = RowText(
                item.text_of(item.answer).encode(),
                wrong_options(item),
                question=item.question.encode(),
            )
        else:
            said = RowText(item.question.encode(), classes=[item.answer.encode()])
        return self.maker.row(record, said, match_hash(record["match_id"]), rng)


def wrong_options(item: Question) -> list[bytes]:
    """Return the texts of all options but the answer."""
    return [item.text_of(option).encode() for option in item.options if option != item.answer]


def _draw(items: Sequence, rng: np.random.Generator):
    return items[rng.integers(len(items))]


@dataclasses.dataclass(frozen=True)
class EvalRows(grain.transforms.Map):
    """An index -> the row of that clip with its first caption and labels; padding past the end."""

    records: Sequence[dict]
    media_ids: Int32[np.ndarray, " n"]
    maker: RowMaker

    def map(self, index: int) -> Row:
        """Make the row of a clip; the same index always gives the same row."""
        if index >= len(self.records):
            return self.maker.padding()
        record = self.records[index]
        caption = next(iter(record["captions"]), b"")  # none if only labels or questions are known
        said = RowText(caption, classes=record["labels"])
        return self.maker.row(record, said, self.media_ids[index])


def _report_once(dataset: str, source: str, reason: str) -> None:
    """Report on stderr that a clip cannot be used; each worker process does so for itself."""
    with _report_lock:
        # Once for each clip: with repeated epochs the log would hold little else.
        first = (dataset, source) not in _reported
        _reported.add((dataset, source))
    if first:
        print(visible(f"{dataset}: {source} cannot be used: {reason}"), file=sys.stderr)
