"""The index of a folder: nearest first, stored and read back, and a damaged one is named."""

import json

import numpy as np
import pytest

from vlmae.search.index import (
    Block,
    FileFacts,
    Hit,
    Index,
    load_index,
    read_block,
    save_block,
    search,
)

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


def test_the_best_of_many_are_those_of_a_full_sort():
    """With many ties, and more wanted than there are."""
    rng = np.random.default_rng(0)
    vectors = rng.integers(0, 3, (200, 2)).astype(np.float32)
    names = [f"{i:03d}.mp4" for i in rng.permutation(200)]
    index = Index("", tuple(FileFacts(name, 1, 1) for name in names), vectors)
    text = np.array([1.0, 0.5], np.float32)
    whole = sorted(zip(-(vectors @ text), names, strict=True))
    for top_k in (1, 7, 199, 200, 300):
        found = search(index, text, top_k)
        assert [(-hit.score, hit.name) for hit in found] == whole[:top_k]
    assert search(Index("", (), vectors[:0]), text, 5) == []


def stored(folder) -> Index:
    index = load_index(folder)
    assert index is not None
    return index


def test_a_stored_index_is_the_same(tmp_path):
    assert load_index(tmp_path / "new") is None
    save_block(Block(INDEX), tmp_path / "new")
    loaded = stored(tmp_path / "new")
    assert loaded[:2] == INDEX[:2]
    np.testing.assert_array_equal(loaded.embeddings, INDEX.embeddings)
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["000000.npz"]


def test_names_of_files_that_are_no_utf_8_stay(tmp_path):
    facts = (FileFacts("\udce9.mp4", 1, 1),)
    save_block(Block(Index("a run", facts, INDEX.embeddings[:1])), tmp_path)
    assert stored(tmp_path).files == facts


def test_blocks_add_remove_and_replace(tmp_path):
    """Earlier files are not written again; those of a replaced index are deleted."""
    changed = FileFacts("a.mp4", 11, 5)
    save_block(Block(INDEX), tmp_path)
    before = (tmp_path / "000000.npz").stat()
    added = Index(INDEX.checkpoint, (changed,), np.array([[3, 4]], np.float32))
    save_block(Block(added, removed=("a.mp4", "c.png")), tmp_path)
    assert (tmp_path / "000000.npz").stat() == before
    index = stored(tmp_path)
    assert index.files == (INDEX.files[2], changed)
    np.testing.assert_array_equal(index.embeddings, np.array([[0.5, 0], [3, 4]], np.float32))
    save_block(Block(added._replace(checkpoint="another"), replaces=True), tmp_path)
    assert stored(tmp_path)[:2] == ("another", (changed,))
    assert [file.name for file in tmp_path.iterdir()] == ["000002.npz"]


def test_an_index_of_version_0_1_0_is_read(tmp_path):
    facts = {"format": 1, "checkpoint": "a run, step 3", "files": INDEX.files}
    np.savez(tmp_path / "old.npz", facts=json.dumps(facts), embeddings=INDEX.embeddings)
    assert read_block(tmp_path / "old.npz").added[:2] == INDEX[:2]


@pytest.mark.parametrize("damage", [b"", b"no archive", "cut", "format", "rows"])
def test_a_damaged_index_is_named(tmp_path, monkeypatch, damage):
    path = tmp_path / "000000.npz"
    if damage == "format":
        monkeypatch.setattr("vlmae.search.index.FORMAT", 0)
    rows = INDEX._replace(files=INDEX.files[:2])
    save_block(Block(rows if damage == "rows" else INDEX), tmp_path)
    monkeypatch.undo()
    if damage == "cut":
        damage = path.read_bytes()[:-40]
    if isinstance(damage, bytes):
        path.write_bytes(damage)
    with pytest.raises(ValueError, match=r"000000.npz: not an index that can be read .*; delete"):
        load_index(tmp_path)
