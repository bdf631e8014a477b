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
        self, record: dict, caption: bytes, media_id: int, rng: np.random.Generator | None
    ) -> Row:
        """A row of a batch, augmented if there is an `rng`; padding if decoding fails."""
        try:
            video = load_video(record, self.source.num_frames, rng)
        except decode.DecodeError as error:
            _report_once(self.source.name, record["source"].decode(), str(error))
            return self.padding()
        ids, mask = self.tokenizer.encode([caption.decode()], self.config.text_len)
        return _make_row(self._view(video, rng), ids[0], mask[0], media_id, valid=True)

    def padding(self) -> Row:
        """A row that no loss may see: zeros, and a text of [CLS] [SEP]."""
        size = self.config.image_size
        video = np.zeros((self.source.num_frames, size, size, 3), np.uint8)
        ids, mask = self.tokenizer.encode([""], self.config.text_len)
        return _make_row(video, ids[0], mask[0], NO_MATCH, valid=False)

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

    maker: RowMaker

    def random_map(self, record: dict, rng: np.random.Generator) -> Row:
        """All randomness comes from `rng`, which grain derives from seed and place."""
        caption = record["captions"][rng.integers(len(record["captions"]))]
        return self.maker.row(record, caption, match_hash(record["match_id"]), rng)


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


def _make_row(
    video: np.ndarray, text_ids: np.ndarray, text_mask: np.ndarray, media_id: int, valid: bool
) -> Row:
    return {
        "video": video,
        "text_ids": text_ids,
        "text_mask": text_mask,
        "media_ids": np.int32(media_id),
        "valid": np.bool_(valid),
    }


def _report_once(dataset: str, source: str, reason: str) -> None:
    """Says on stderr what cannot be used; each worker process does so for itself."""
    with _report_lock:
        first = (dataset, source) not in _reported
        _reported.add((dataset, source))
    if first:
        print(f"{dataset}: {source} cannot be used: {reason}", file=sys.stderr)
