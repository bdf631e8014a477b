"""Numbered clips, small prepared data sets, and folders of published ones, as fixtures."""

import pathlib
from collections.abc import Callable, Mapping, Sequence

import clips
import numpy as np
import published_sets
import pytest

from data_pipelines.schema.config import DataConfig, SourceConfig
from data_pipelines.schema.records import Example
from data_pipelines.storage.build import build
from data_pipelines.storage.prepare import prepare
from data_pipelines.storage.records import questions_of
from data_pipelines.storage.stored import open_source, read_info


@pytest.fixture(scope="session")
def numbered_frames() -> Callable[[int], np.ndarray]:
    return clips.numbered_frames


@pytest.fixture(scope="session")
def read_numbers() -> Callable[[np.ndarray], list[int]]:
    return clips.read_numbers


@pytest.fixture(scope="session")
def write_clip() -> Callable[..., bytes]:
    return clips.write_clip


@pytest.fixture(scope="session")
def shapes_dir(tmp_path_factory):
    """A data_dir with a small `shapes` in it."""
    from data_pipelines.storage.builders.shapes import Shapes

    data_dir = tmp_path_factory.mktemp("data")
    builder = Shapes(data_dir=data_dir, num_train=24, num_val=4, num_test=10, frame_size=32)
    build(builder)
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
def small_media() -> dict[str, bytes]:
    """Tiny real media by file ending."""
    return published_sets.small_media()


@pytest.fixture
def manual_dir(tmp_path) -> Callable[..., pathlib.Path]:
    """Fills the folder of a published data set: annotations as text or JSON, and media files."""

    def fill(files: Mapping[str, object], media: Sequence[str] = ()) -> pathlib.Path:
        folder = tmp_path / "manual"
        published_sets.fill(folder, files, media)
        return folder

    return fill


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


@pytest.fixture
def read_train(tmp_path, read_folder) -> Callable[..., list[Example]]:
    """Prepares files of `tmp_path` in a form as a training split; reads back what was stored."""

    def read(form: str, pattern: str, **options) -> list[Example]:
        options = {"name": "mine", "splits": {"train": str(tmp_path / pattern)}} | options
        return read_folder(prepare(form, tmp_path / "data", **options))["train"]

    return read


def _read_folder(folder: pathlib.Path) -> dict[str, list[Example]]:
    data_dir, name = folder.parent.parent, folder.parent.name
    return {
        split: _examples(open_source(SourceConfig(name, split), data_dir))
        for split in read_info(folder).splits
    }


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
