"""The index of a folder: nearest first, stored and read back, and a damaged one is named."""

import numpy as np
import pytest

from vlmae.search.index import FileFacts, Hit, Index, load_index, save_index, search

INDEX = Index(
    "a run, step 3",
    tuple(FileFacts(name, 10, 2**60 + 1) for name in ("c.png", "a.mp4", "b/ö 1.mp4")),
    np.array([[1, 0], [0, 1], [1, 0]], np.float32) / 2,
)


def test_nearest_first_and_names_decide_ties():
    text = np.array([1, 0.5], np.float32)
    expected = [Hit("b/ö 1.mp4", 0.5), Hit("c.png", 0.5), Hit("a.mp4", 0.25)]
    assert search(INDEX, text, 5) == expected
    assert search(INDEX, text, 1) == expected[:1]
    with pytest.raises(ValueError, match="top_k must be at least 1, not 0"):
        search(INDEX, text, 0)


def test_a_stored_index_is_the_same(tmp_path):
    path = tmp_path / "new" / "index.npz"
    save_index(INDEX, path)
    loaded = load_index(path)
    assert loaded[:2] == INDEX[:2]
    np.testing.assert_array_equal(loaded.embeddings, INDEX.embeddings)
    assert [file.name for file in path.parent.iterdir()] == ["index.npz"]


@pytest.mark.parametrize("damage", [b"", b"no archive", "cut", "format", "rows"])
def test_a_damaged_index_is_named(tmp_path, monkeypatch, damage):
    path = tmp_path / "index.npz"
    if damage == "format":
        monkeypatch.setattr("vlmae.search.index.FORMAT", 0)
    save_index(INDEX._replace(files=INDEX.files[:2]) if damage == "rows" else INDEX, path)
    monkeypatch.undo()
    if damage == "cut":
        damage = path.read_bytes()[:-40]
    if isinstance(damage, bytes):
        path.write_bytes(damage)
    with pytest.raises(ValueError, match=r"index.npz: not an index that can be read .*; delete it"):
        load_index(path)
