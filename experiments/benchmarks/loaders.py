"""Input pipelines to compare ours with: torch's DataLoader, with decord, PyAV or WebDataset.

Frames are sampled at the same times. decord and PyAV get the same views as ours; only the decoder
and the loader of batches differ. WebDataset gets the JPEG files of our form of storage, Pillow and
the kernel of torchvision's transforms.
"""

import io
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import av
import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch.utils.data import DataLoader, Dataset, RandomSampler

from data_pipelines.media.frames import FrameClip
from data_pipelines.media.sampling import segment_times
from data_pipelines.media.transforms import draw_view, train_view
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


def write_tar(clips: Sequence[FrameClip], path: Path) -> None:
    """Write a shard of WebDataset: the pictures of each clip, and a caption."""
    with tarfile.open(path, "w") as tar:
        for number, clip in enumerate(clips):
            files = {f"{place:04}.jpg": clip.picture(place) for place in range(len(clip))}
            for ending, content in (files | {"txt": b"a disk that moves"}).items():
                info = tarfile.TarInfo(f"{number:06}.{ending}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


class SampledViews:
    """A sample of WebDataset -> frames by Pillow, views by what torchvision's v2 transforms call.

    That is torch's antialiased bilinear kernel for uint8; torchvision itself does not load beside
    torch's CPU build.
    """

    def __init__(self, config: DataConfig):
        """Take the sizes of the config."""
        self.config = config

    def __call__(self, sample: dict) -> torch.Tensor:
        """Decode the sampled frames alone."""
        config, rng = self.config, np.random.default_rng()
        names = sorted(name for name in sample if name.endswith(".jpg"))
        times = segment_times(len(names), config.train[0].num_frames, rng)
        pictures = [Image.open(io.BytesIO(sample[names[int(time)]])) for time in times]
        video = torch.from_numpy(np.stack([np.asarray(image.convert("RGB")) for image in pictures]))
        scale, flip = config.min_crop_scale, config.flip
        view = draw_view(*video.shape[1:3], rng, min_crop_scale=scale, flip=flip)
        left, top, right, bottom = map(round, view.box)
        crop = video[:, top:bottom, left:right].permute(0, 3, 1, 2)
        size = config.image_size, config.image_size
        resized = torch.nn.functional.interpolate(crop, size, mode="bilinear", antialias=True)
        return resized.flip(-1) if view.mirrored else resized


def webdataset_batches(path: Path, config: DataConfig) -> Iterator:
    """Endless batches of WebDataset in a DataLoader; every worker reads the whole shard."""
    import webdataset

    clips = webdataset.WebDataset(
        str(path), shardshuffle=False, nodesplitter=None, workersplitter=None
    )
    dataset = clips.repeat().shuffle(2 * config.batch_size).map(SampledViews(config))
    yield from DataLoader(
        dataset,
        config.batch_size,
        num_workers=config.num_workers,
        multiprocessing_context="spawn" if config.num_workers else None,
    )
