"""Clips whose frames say their own number, small prepared data sets, folders of published ones."""

import io
import json
import pathlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction

import av
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from data_pipelines.config import DataConfig
from data_pipelines.prepare import prepare
from data_pipelines.records import Example
from data_pipelines.stored import questions_of

NUM_BITS = 8


def _numbered_frames(num_frames: int) -> np.ndarray:
    """Frame i shows i as eight black or white bars."""
    bits = (np.arange(num_frames)[:, None] >> np.arange(NUM_BITS)) & 1
    bars = np.repeat(bits * 255, 8, axis=1).astype(np.uint8)
    return np.broadcast_to(bars[:, None, :, None], (num_frames, 32, 64, 3)).copy()


def _read_numbers(frames: np.ndarray) -> list[int]:
    bits = frames[:, 16, 4::8].mean(axis=-1) > 127
    return (bits << np.arange(NUM_BITS)).sum(axis=-1).tolist()


def _write_clip(
    times_ms: Sequence[int],
    container_format: str = "mp4",
    codec: str = "libx264",
    gop: int = 12,
    bf: int = 2,
    **container_options: str,
) -> bytes:
    """A clip of numbered frames with the given time stamps."""
    with tempfile.NamedTemporaryFile() as file:  # some options write the file a second time
        _write_to(file.name, times_ms, container_format, codec, gop, bf, container_options)
        return file.read()


def _write_to(
    path: str,
    times_ms: Sequence[int],
    container_format: str,
    codec: str,
    gop: int,
    bf: int,
    options: dict,
) -> None:
    frames = _numbered_frames(len(times_ms))
    with av.open(path, "w", format=container_format, container_options=options) as out:
        stream = out.add_stream(codec, rate=25)
        stream.height, stream.width, stream.pix_fmt = 32, 64, "yuv420p"
        stream.codec_context.gop_size = gop
        stream.codec_context.thread_count = 1
        if codec == "libx264":
            stream.codec_context.time_base = Fraction(1, 1000)
            stream.codec_context.max_b_frames = bf
            stream.options = {"sc_threshold": "0"}  # no key frames but those of `gop`
        for array, time in zip(frames, times_ms, strict=True):
            frame = av.VideoFrame.from_ndarray(array, format="rgb24")
            frame.time_base = Fraction(1, 1000)
            frame.pts = time
            out.mux(stream.encode(frame))
        out.mux(stream.encode())


@pytest.fixture(scope="session")
def numbered_frames() -> Callable[[int], np.ndarray]:
    return _numbered_frames


@pytest.fixture(scope="session")
def read_numbers() -> Callable[[np.ndarray], list[int]]:
    return _read_numbers


@pytest.fixture(scope="session")
def write_clip() -> Callable[..., bytes]:
    return _write_clip


@pytest.fixture(scope="session")
def shapes_dir(tmp_path_factory):
    """A data_dir with a small `shapes` in it."""
    from data_pipelines.builders.shapes import Shapes

    data_dir = tmp_path_factory.mktemp("data")
    builder = Shapes(data_dir=data_dir, num_train=24, num_val=4, num_test=10, frame_size=32)
    builder.download_and_prepare()
    return data_dir


@pytest.fixture
def shapes_config(shapes_dir) -> DataConfig:
    return DataConfig(
        data_dir=str(shapes_dir),
        image_size=32,
        text_len=16,
        batch_size=4,
        eval_batch_size=4,
        flip=False,
    )


@pytest.fixture(scope="session")
def small_media(write_clip) -> dict[str, bytes]:
    """Tiny real media by file ending."""
    frames = [Image.new("RGB", (16, 16), color) for color in ("red", "lime", "blue")]
    gif, png, jpg = io.BytesIO(), io.BytesIO(), io.BytesIO()
    frames[0].save(gif, "GIF", save_all=True, append_images=frames[1:], duration=100)
    frames[0].save(png, "PNG")
    frames[0].save(jpg, "JPEG")
    clip = write_clip(range(0, 300, 100))
    media = {".gif": gif.getvalue(), ".png": png.getvalue(), ".jpg": jpg.getvalue()}
    return media | dict.fromkeys((".mp4", ".avi", ".webm", ".mov"), clip)


@pytest.fixture
def manual_dir(tmp_path, small_media) -> Callable[..., pathlib.Path]:
    """Fills the folder of a published data set: annotations as text or JSON, and media files."""

    def fill(files: Mapping[str, object], media: Sequence[str] = ()) -> pathlib.Path:
        folder = tmp_path / "manual"
        contents = {name: _as_text(content).encode() for name, content in files.items()}
        contents |= {name: small_media[pathlib.Path(name).suffix] for name in media}
        for name, content in contents.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        return folder

    return fill


def _as_text(content: object) -> str:
    return content if isinstance(content, str) else json.dumps(content)


@pytest.fixture
def read_back(tmp_path) -> Callable[..., dict[str, list[Example]]]:
    """Prepares a published data set of other counts, and reads what was stored, by split."""

    def read(
        name: str, manual_dir: pathlib.Path, max_bad_ratio: float = 0.0, **options
    ) -> dict[str, list[Example]]:
        options = {"allow_other_counts": True, "max_bad_ratio": max_bad_ratio} | options
        data_dir = tmp_path / "data"
        folder = prepare(name, data_dir, manual_dir=manual_dir, **options)
        assert folder.parent == data_dir / name
        return _read_folder(folder)

    return read


@pytest.fixture(scope="session")
def read_folder() -> Callable[[pathlib.Path], dict[str, list[Example]]]:
    """Reads a prepared data set by split, as the examples that were stored."""
    return _read_folder


def _read_folder(folder: pathlib.Path) -> dict[str, list[Example]]:
    builder = tfds.builder_from_directory(folder)
    return {split: _examples(builder.as_data_source(split)) for split in builder.info.splits}


def _examples(records: Sequence[dict]) -> list[Example]:
    """Stored records as they were before; sorted, since they are stored in another order."""
    examples = [
        Example(
            media=record["media"],
            media_type=record["media_type"].decode(),
            captions=[text.decode() for text in record["captions"]],
            match_id=record["match_id"].decode(),
            source=record["source"].decode(),
            questions=questions_of(record),
            labels=[text.decode() for text in record["labels"]],
        )
        for record in (records[i] for i in range(len(records)))
    ]
    return sorted(examples, key=lambda example: (example.match_id, example.source))
