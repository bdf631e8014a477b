"""The input benchmark: both sides see the same frames, and what was made ahead does not count."""

import contextlib
import functools
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Iterator

import numpy as np
import pytest

from data_pipelines.loading.rows import load_video
from data_pipelines.media.frames import whole_clip
from data_pipelines.media.reencode import Reencode, reencode
from data_pipelines.media.video_writer import encode_video
from data_pipelines.schema.config import DataConfig, SourceConfig
from experiments.benchmarks import input as benchmark
from experiments.benchmarks import loaders


@pytest.fixture(scope="module")
def clips() -> list[bytes]:
    """Clips of 30 frames at 10 a second, each of another gray that grows from frame to frame."""
    gray = 2 * np.arange(30, dtype=np.uint8)[:, None, None, None] + np.zeros(
        (1, 64, 80, 3), "uint8"
    )
    return [encode_video(gray + 40 * i, 10, gop=12, crf=1) for i in range(3)]


def test_pyav_reads_the_frames_that_we_read(clips, tmp_path):
    paths = benchmark.write_clips(clips, tmp_path)
    for media, path in zip(clips, paths, strict=True):
        for seed in range(5):
            record = {"media": media, "media_type": b"video"}
            ours = load_video(record, 4, np.random.default_rng(seed))
            theirs = loaders.read_pyav(path, 4, np.random.default_rng(seed))
            np.testing.assert_array_equal(ours, theirs)


def test_a_dataloader_gives_each_clip_once_before_any_comes_again(clips, tmp_path):
    paths = benchmark.write_clips(clips, tmp_path)
    config = DataConfig((SourceConfig(num_frames=2),), batch_size=3, image_size=32, num_workers=1)
    with contextlib.closing(loaders.torch_batches(paths, "PyAV", config)) as batches:
        for _ in range(4):
            batch = np.asarray(next(batches))
            assert batch.shape == (3, 2, 32, 32, 3) and batch.dtype == np.uint8
            assert sorted((batch[:, 0].mean(axis=(1, 2, 3)) + 5) // 40) == [0, 1, 2]


def test_decord_reads_the_frames_that_we_read(clips, tmp_path):
    pytest.importorskip("decord")
    paths = benchmark.write_clips(clips, tmp_path)
    record = {"media": clips[1], "media_type": b"video"}
    ours = load_video(record, 4, np.random.default_rng(0))
    theirs = loaders.read_decord(paths[1], 4, np.random.default_rng(0))
    np.testing.assert_allclose(ours.mean(axis=(1, 2, 3)), theirs.mean(axis=(1, 2, 3)), atol=1)


def test_our_batches_come_from_the_same_clips(clips, tmp_path):
    paths = benchmark.write_clips(clips, tmp_path)
    assert [path.read_bytes() for path in paths] == clips
    config = DataConfig((SourceConfig(num_frames=2),), batch_size=3, image_size=32)
    benchmark.store(tmp_path, "stored", None)
    batches = benchmark.our_batches(tmp_path, config, "stored")
    found = [next(batches) for _ in range(8)]
    batches.close()
    assert found[0].video.shape == (3, 2, 32, 32, 3)
    grays = np.concatenate([batch.video[:, 0].mean(axis=(1, 2, 3)) for batch in found])
    assert {*((grays + 5) // 40)} == {0, 1, 2}


def test_batches_made_ahead_are_not_timed(monkeypatch):
    clock = itertools.count(0, 10)
    monkeypatch.setattr(benchmark, "processor_secs", lambda: next(clock))
    taken = []
    batches = (taken.append(i) for i in range(9))
    assert benchmark.time_batches(batches, skip=2, count=3).processor == 10
    assert taken == [0, 1, 2, 3, 4]


def test_time_of_started_processes_counts():
    work = "while True: pass"
    with subprocess.Popen([sys.executable, "-c", work]) as process:
        start = benchmark.processor_secs()
        try:
            for _ in range(600):
                time.sleep(0.05)
                if benchmark.processor_secs() > start + 0.1:
                    break
            assert benchmark.processor_secs() > start + 0.1
        finally:
            process.kill()


def test_webdataset_reads_the_pictures_that_we_store(clips, tmp_path):
    pytest.importorskip("webdataset")
    media = [reencode(clip, "video", Reencode(store="frames")) for clip in clips]
    loaders.write_tar([whole_clip(clip) for clip in media], tmp_path / "clips.tar")
    config = DataConfig((SourceConfig(num_frames=2),), batch_size=3, image_size=32)
    with contextlib.closing(loaders.webdataset_batches(tmp_path / "clips.tar", config)) as batches:
        found = [np.asarray(next(batches)) for _ in range(4)]
    assert all(batch.shape == (3, 2, 3, 32, 32) and batch.dtype == np.uint8 for batch in found)
    grays = np.concatenate([batch[:, 0].mean(axis=(1, 2, 3)) for batch in found])
    assert {*((grays + 5) // 40)} == {0, 1, 2}


def test_no_pipeline_works_while_another_one_is_timed():
    opened, closed = [], []

    def make(name: str) -> Iterator[int]:
        assert len(opened) == len(closed)
        opened.append(name)
        try:
            yield from itertools.count()
        finally:
            closed.append(name)

    makers = {name: functools.partial(make, name) for name in ("theirs", "ours")}
    secs = benchmark.measure(makers, rounds=2, skip=1, count=3)
    assert opened == closed == ["theirs", "ours"] * 2
    assert [len(x) for x in secs.values()] == [2, 2]


def test_rates_and_ratios():
    spent = benchmark.Spent
    secs = {
        "decord": [spent(4.0, 2.0), spent(2.0, 1.0), spent(8.0, 4.0)],
        "ours": [spent(1.0, 0.5)] * 3,
    }
    base, ours = benchmark.rows_of(secs, clips=16)
    assert base["clips_per_sec_and_core"] == 4 and base["ratio"] == 1
    assert ours["clips_per_sec_and_core"] == 16
    assert (ours["ratio"], ours["ratio_range"]) == (4.0, [2.0, 8.0])
    assert benchmark.format_table([base, ours]).splitlines()[2:] == [
        "| decord | 4.0 | 1.00 (1.00-1.00) | 8.0 |",
        "| ours | 16.0 | 4.00 (2.00-8.00) | 32.0 |",
    ]


@pytest.mark.slow
def test_measures_all_pipelines(clips, tmp_path, monkeypatch):
    pytest.importorskip("decord")
    pytest.importorskip("webdataset")
    folder = tmp_path / "clips"
    folder.mkdir()
    benchmark.write_clips(clips, folder)
    benchmark.main(2, 3, 3, 2, 1, workers=1, folder=folder, out_dir=tmp_path)
    rows = json.loads((tmp_path / "input.json").read_text())["rows"]
    assert len(rows) == 6 and all(row["clips_per_sec_and_core"] > 0 for row in rows)
