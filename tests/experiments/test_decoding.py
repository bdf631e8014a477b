"""The decoding benchmark: ratios compare one round, and its clips are what it says."""

import numpy as np
import pytest

from data_pipelines.media import decode
from data_pipelines.media.reencode import Reencode
from data_pipelines.media.video_writer import encode_video
from experiments.benchmarks import decoding


def test_ratios_compare_forms_of_one_round():
    times = {"as they are": [4.0, 9.0, 8.0], "again": [2.0, 3.0, 1.0]}
    row = decoding.row("again", 6, 4, times)
    assert (row["clips_per_sec"], row["ratio"], row["ratio_range"]) == (3.0, 3.0, [2.0, 8.0])
    table = decoding.format_table([row], {"again": 1500.0})
    assert table.splitlines()[-1] == "| again | 1,500 | 3.0 (3.0x: 2.0-8.0) |"


def test_scenes_move_and_differ():
    first, second = decoding.render(0, 30), decoding.render(1, 30)
    assert first.shape == (30, 240, 320, 3)
    assert np.abs(first.astype(int) - second).mean() > 10
    assert np.abs(first[0].astype(int) - first[-1]).mean() > 10
    assert first.std() > 20


def test_a_folder_is_measured_and_reported(tmp_path, capsys):
    for i in range(3):
        frames = np.full((20, 32, 64, 3), 60 * i, np.uint8)
        (tmp_path / f"{i}.mp4").write_bytes(encode_video(frames, 10))
    setting = Reencode(short_side=16, fps=5)
    decoding.main(
        frames=(2,), clips=2, rounds=1, folder=tmp_path, reencode=setting, out_dir=tmp_path
    )
    assert "2 of 3 videos" in capsys.readouterr().out
    _, _, plain, again = (tmp_path / "decoding.md").read_text().splitlines()
    assert "| as they are |" in plain and "(1.0x: 1.0-1.0)" in plain
    assert f"| {setting} |" in again
    [clip, _] = decoding.encode_again(decoding.read_folder(tmp_path, 2), setting)
    assert decode.probe(clip).num_frames == 10


def test_a_folder_without_videos_or_with_a_broken_one_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no videos"):
        decoding.read_folder(tmp_path, 3)
    (tmp_path / "a.mp4").write_bytes(b"no video")
    with pytest.raises(ValueError, match="clip 0 of 1: not a readable video"):
        decoding.encode_again(decoding.read_folder(tmp_path, 3), Reencode())
