"""What people feed video models with today: torch's DataLoader, with decord or PyAV.

Frames are sampled at the same times and cut to the same views as ours; only what decodes and what
makes batches differ.
"""

import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import av
import numpy as np
from jaxtyping import UInt8
from torch.utils.data import DataLoader, Dataset, RandomSampler

from data_pipelines.config import DataConfig
from data_pipelines.sampling import segment_times
from data_pipelines.transforms import train_view

Frames = UInt8[np.ndarray, "t h w 3"]
ENDLESS = 10**9  # clips


def read_decord(path: Path, num_frames: int, rng: np.random.Generator) -> Frames:
    """A few frames by decord, which seeks."""
    import decord  # not among the packages that vlmae needs

    reader = decord.VideoReader(str(path), num_threads=1)
    times = segment_times(len(reader) / reader.get_avg_fps(), num_frames, rng)
    places = (times * reader.get_avg_fps()).astype(int)
    return reader.get_batch(np.minimum(places, len(reader) - 1)).asnumpy()


def read_pyav(path: Path, num_frames: int, rng: np.random.Generator) -> Frames:
    """A few frames by PyAV: it decodes up to the last of them, and converts those alone."""
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
    """Training views of video files, new ones every time."""

    def __init__(self, paths: Sequence[Path], reader: str, config: DataConfig):
        self.paths, self.reader, self.config = paths, reader, config

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> Frames:
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
        sampler=RandomSampler(clips, num_samples=ENDLESS),  # one order of all after the other
        num_workers=config.num_workers,
        multiprocessing_context="spawn",
    )
