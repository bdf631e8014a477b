"""From a stored record to one row of a batch: decode, crop, tokenize. Runs in the workers."""

import dataclasses
import sys
import threading
import zlib
from collections.abc import Sequence

import grain
import numpy as np
from jaxtyping import Int32, UInt8

from data_pipelines import decode, sampling, transforms
from data_pipelines.config import DataConfig, SourceConfig
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


@dataclasses.dataclass(frozen=True)
class RowMaker:
    """Makes the rows of one source; it travels to the worker processes."""

    source: SourceConfig
    config: DataConfig
    tokenizer: Tokenizer

    def row(
        self,
        record: dict,
        caption: bytes,
        media_id: int,
        rng: np.random.Generator | None,
        others: Sequence[bytes] = (),
    ) -> Row:
        """A row of a batch, augmented if there is an `rng`; padding if decoding fails."""
        try:
            video = load_video(record, self.source.num_frames, rng)
        except decode.DecodeError as error:
            _report_once(self.source.name, record["source"].decode(), str(error))
            return self.padding()
        row = self._texts(caption, others)
        row |= {"video": self._view(video, rng), "media_ids": np.int32(media_id)}
        return row | {"valid": np.bool_(True)}

    def padding(self) -> Row:
        """A row that no loss may see: zeros, and a text of [CLS] [SEP]."""
        size = self.config.image_size
        video = np.zeros((self.source.num_frames, size, size, 3), np.uint8)
        row = self._texts(b"", ())
        return row | {"video": video, "media_ids": np.int32(NO_MATCH), "valid": np.bool_(False)}

    def tokens(self, texts: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """Ids and mask of texts, at the config's length."""
        return self.tokenizer.encode([text.decode() for text in texts], self.config.text_len)

    def _texts(self, caption: bytes, others: Sequence[bytes]) -> Row:
        """The caption's arrays and, if the config asks for them, those of wrong ones.

        Those that were not found have no valid token.
        """
        count = self.config.num_others
        ids, mask = self.tokens([caption, *others, *[b""] * (count - len(others))])
        row = {"text_ids": ids[0], "text_mask": mask[0]}
        if count:
            mask[1 + len(others) :] = False
            row |= {"other_ids": ids[1:], "other_mask": mask[1:]}
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
        others = self._others(record, caption, rng)
        return self.maker.row(record, caption, match_hash(record["match_id"]), rng, others)

    def _others(self, record: dict, caption: bytes, rng: np.random.Generator) -> list[bytes]:
        """Up to `num_others` captions of records that show something else, all different to the
        tokenizer; fewer if they are not found soon, as in a source of a few equal captions."""
        wanted = self.maker.config.num_others
        found = [caption]
        for _ in range(_TRIES * wanted):
            if len(found) > wanted:
                break
            other = self.records[int(rng.integers(len(self.records)))]
            text = _any_caption(other, rng)
            if other["match_id"] != record["match_id"]:
                ids, _ = self.maker.tokens([text, *found])
                if (ids[1:] != ids[0]).any(axis=1).all():
                    found.append(text)
        return found[1:]


def _any_caption(record: dict, rng: np.random.Generator) -> bytes:
    return record["captions"][rng.integers(len(record["captions"]))]


@dataclasses.dataclass(frozen=True)
class EvalRows(grain.transforms.Map):
    """An index -> the row of that clip with its first caption; padding past the last clip."""

    records: Sequence[dict]
    media_ids: Int32[np.ndarray, " n"]
    maker: RowMaker

    def map(self, index: int) -> Row:
        """The same index always gives the same row."""
        if index >= len(self.records):
            return self.maker.padding()
        record = self.records[index]
        return self.maker.row(record, record["captions"][0], self.media_ids[index], rng=None)


def _report_once(dataset: str, source: str, reason: str) -> None:
    """Says on stderr what cannot be used; each worker process does so for itself."""
    with _report_lock:
        first = (dataset, source) not in _reported
        _reported.add((dataset, source))
    if first:
        print(f"{dataset}: {source} cannot be used: {reason}", file=sys.stderr)
