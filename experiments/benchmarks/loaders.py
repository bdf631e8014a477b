"""Video input pipelines to compare ours with: torch's DataLoader, with decord or PyAV.

Frames are sampled at the same times and cropped to the same views as ours; only the decoder and the
loader of batches differ.
"""

import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import av
import numpy as np
from jaxtyping import UInt8
from torch.utils.data import DataLoader, Dataset, RandomSampler

from data_pipelines.media.sampling import segment_times
from data_pipelines.media.transforms import train_view
from data_pipelines.schema.config import DataConfig

Frames = UInt8[np.ndarray, "t h w 3"]
ENDLESS = 10**9  # clips


def read_decord(path: Path, num_frames: int, rng: np.random.Generator) -> Frames:
    """Sample frames by decord, which seeks."""
    import decord  # not among the packages that vlmae needs

    reader = decord.VideoReader(str(path), num_threads=1)
    times = segment_times(len(reader) / reader.get_avg_fps(), num_frames, rng)
    patch_ids = (times * reader.get_avg_fps()).astype(int)
    return reader.get_batch(np.minimum(patch_ids, len(reader) - 1)).asnumpy()


def read_pyav(path: Path, num_frames: int, rng: np.random.Generator) -> Frames:
    """Sample frames by PyAV: decode up to the last of them, convert only those to RGB."""
    frames = []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        times = list(segment_times(float(stream.duration * stream.time_base), num_frames, rng))
        for frame in container.decode(stream):
            while times and frame.time + 1 / float(stream.average_rate) > times[0]:
                frames.append(frame.reformat(format="rgb24", threads=1).to_ndarray())
                times.pop(0)
            if not times:
                break
    return np.stack(frames)


READERS: dict[str, Callable[[Path, int, np.random.Generator], Frames]] = {
    "decord": read_decord,
    "PyAV": read_pyav,
}


class Clips(Dataset):
    """Training views of video files, drawn anew at each access."""

    def __init__(self, paths: Sequence[Path], reader: str, config: DataConfig):
        """Read `paths` by `READERS[reader]`, with the sizes of the config."""
        self.paths, self.reader, self.config = paths, reader, config

    def __len__(self) -> int:
        """Count the files."""
        return len(self.paths)

    def __getitem__(self, i: int) -> Frames:
        """Decode and crop a file."""
        config = self.config
        rng = np.random.default_rng([zlib.crc32(self.paths[i].name.encode()), *np.random.bytes(4)])
        video = READERS[self.reader](self.paths[i], config.train[0].num_frames, rng)
        return train_view(
            video, config.image_size, rng, min_crop_scale=config.min_crop_scale, flip=config.flip
        )


def torch_batches(paths: Sequence[Path], reader: str, config: DataConfig) -> Iterator:
    """Endless batches of a DataLoader with the config's workers; no worker waits between epochs."""
    clips = Clips(paths, reader, config)
    yield from DataLoader(
        clips,
        config.batch_size,
        sampler=RandomSampler(clips, num_samples=ENDLESS),  # without a pause between epochs
        num_workers=config.num_workers,
        multiprocessing_context="spawn",
    )
