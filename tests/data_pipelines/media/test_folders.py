"""Every file once, whatever links lead to it."""

import os

import pytest

from data_pipelines.media.folders import walk
from data_pipelines.storage.builders.media import MediaFolder


def names(root) -> list[str]:
    return [os.path.relpath(path, root) for folder in walk(root) for path in folder.files]


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "videos"
    (root / "b" / "c").mkdir(parents=True)
    for name in ("1.mp4", "b/2.mp4", "b/c/3.mp4"):
        (root / name).touch()
    return root


def test_links_that_lead_back_add_nothing(root):
    (root / "a").symlink_to("b")  # a sister, which comes first by name
    (root / "b" / "c" / "up").symlink_to("../..")
    (root / "self").symlink_to(".")
    assert names(root) == ["1.mp4", "b/2.mp4", "b/c/3.mp4"]


def test_links_to_other_places_are_followed_once(root, tmp_path):
    other = tmp_path / "disk"
    (other / "deep").mkdir(parents=True)
    (other / "deep" / "4.mp4").touch()
    (other / "back").symlink_to(root)
    (root / "b" / "x").symlink_to(other)
    (root / "y").symlink_to(other / "deep")
    assert names(root) == ["1.mp4", "b/2.mp4", "b/c/3.mp4", "y/4.mp4"]


def test_builders_find_a_clip_below_a_loop(root):
    (root / "b" / "up").symlink_to("..")
    assert MediaFolder(root).find("3") == (str(root / "b" / "c" / "3.mp4"), 0)


def test_a_folder_that_cannot_be_read_is_named(root, capsys, monkeypatch):
    scandir = os.scandir

    def refuse(path):
        if path.endswith("c"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert names(root) == ["1.mp4", "b/2.mp4"]
    assert "c: this folder cannot be read: Permission denied" in capsys.readouterr().err
