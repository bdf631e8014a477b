"""An index of clips: one vector a file, and what the files were like when they were embedded.

Pure functions over immutable values, and one file on disk. It knows nothing of models or of media.
"""

import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

FORMAT = 1  # of the stored file


class FileFacts(NamedTuple):
    """A file as it was when it was listed; a file of other facts has changed."""

    name: str  # path in the folder, with "/" between its parts
    size_bytes: int
    modified_ns: int


class Index(NamedTuple):
    """Clips in the shared space.

    A clip's vector is the mean of its frames' unit vectors, which is not of unit length itself:
    its inner product with a text is the mean of the frames' cosines.
    """

    checkpoint: str  # names the model that made the vectors
    files: tuple[FileFacts, ...]
    embeddings: Float[np.ndarray, "n e"]


class Changes(NamedTuple):
    """What has happened to a folder since an index was made."""

    kept: Index  # without the files that are gone or changed
    to_embed: tuple[FileFacts, ...]  # new or changed
    num_removed: int


class Hit(NamedTuple):
    """A file that answers a query; the score is a cosine, averaged over frames."""

    name: str
    score: float


def empty_index(checkpoint: str, embed_dim: int) -> Index:
    """The index of an empty folder."""
    return Index(checkpoint, (), np.zeros((0, embed_dim), np.float32))


def compare(index: Index, files: Sequence[FileFacts]) -> Changes:
    """What of the index still holds for a folder of these files (ours)."""
    known, present = set(index.files), set(files)
    rows = [row for row, file in enumerate(index.files) if file in present]
    kept = Index(index.checkpoint, tuple(index.files[r] for r in rows), index.embeddings[rows])
    names = {file.name for file in files}
    return Changes(
        kept=kept,
        to_embed=tuple(file for file in files if file not in known),
        num_removed=sum(file.name not in names for file in index.files),
    )


def extend(index: Index, files: Sequence[FileFacts], embeddings: Float[np.ndarray, "m e"]) -> Index:
    """The index with further clips; file i has vector i."""
    return Index(
        index.checkpoint,
        (*index.files, *files),
        np.concatenate([index.embeddings, embeddings]),
    )


def search(index: Index, text: Float[np.ndarray, " e"], top_k: int) -> list[Hit]:
    """The `top_k` clips that are nearest to a text, or all if there are fewer; best first.

    Ranks as VTC does in evaluation. Clips of equal score come in the order of their names.

    Raises:
      ValueError: `top_k` is below 1.
    """
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, not {top_k}")
    hits = [
        Hit(file.name, float(score))
        for file, score in zip(index.files, index.embeddings @ text, strict=True)
    ]
    return sorted(hits, key=lambda hit: (-hit.score, hit.name))[:top_k]


def save_index(index: Index, path: Path) -> None:
    """Writes one .npz (an array, and the facts as JSON); a kill leaves the old file or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = {"format": FORMAT, "checkpoint": index.checkpoint, "files": index.files}
    part = path.with_name(f"{path.name}.part")
    with part.open("wb") as file:
        np.savez(file, facts=np.array(json.dumps(facts)), embeddings=index.embeddings)
    part.replace(path)


def load_index(path: Path) -> Index:
    """Reads what `save_index` wrote.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is damaged, or of another format.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            facts, embeddings = json.loads(str(stored["facts"])), stored["embeddings"]
        if facts["format"] != FORMAT:
            raise ValueError(f"format {facts['format']}, not {FORMAT}")
        files = tuple(FileFacts(*file) for file in facts["files"])
        if len(files) != len(embeddings):
            raise ValueError(f"{len(embeddings)} vectors for {len(files)} files")
    except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: not an index that can be read ({error}); delete it") from error
    return Index(facts["checkpoint"], files, embeddings)
