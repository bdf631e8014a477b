"""Index of clips: a vector for each file, with the file's size and time when it was embedded.

Pure functions over immutable values, and a folder of blocks on disk, to which an update only adds:
what it writes grows with the new clips, not with the index. No models and no media here.
"""

import json
import tokenize
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from data_pipelines.schema.checks import UserError, check
from data_pipelines.schema.fields import field_types
from data_pipelines.schema.json_files import parse_json, to_record

FORMAT = 2  # version of the stored files
# What zipfile and NumPy raise for a damaged file, as far as was seen.
UNREADABLE = (
    *(OSError, ValueError, KeyError, TypeError, EOFError, MemoryError, OverflowError),
    *(NotImplementedError, RuntimeError, SyntaxError, zipfile.BadZipFile, zlib.error),
    tokenize.TokenError,
)


class FileFacts(NamedTuple):
    """Name, size and time of a file; if any differs, the file has changed."""

    name: str  # path in the folder, with "/" between its parts
    size_bytes: int
    modified_ns: int


class Index(NamedTuple):
    """Clips in the space shared with texts.

    A clip's vector is the mean of its frames' unit vectors. It is not normalized again, so its
    inner product with a text is the mean of the frames' cosines, as in evaluation.
    """

    checkpoint: str  # name of the model that made the vectors
    files: tuple[FileFacts, ...]
    embeddings: Float[np.ndarray, "n e"]


class Block(NamedTuple):
    """One write to a stored index."""

    added: Index
    removed: tuple[str, ...] = ()  # names to forget before
    replaces: bool = False  # True: nothing stored before counts any more


@dataclass(frozen=True)
class _Facts:
    """All of a stored block but the vectors; the defaults are those of version 0.1.0."""

    checkpoint: str
    files: Any  # of a million, whose types are checked by `_are_facts` in a moment
    removed: tuple[str, ...] = ()
    replaces: bool = True


class Changes(NamedTuple):
    """Differences between an index and the present files of its folder."""

    kept: Index  # without the files that are gone or changed
    to_embed: tuple[FileFacts, ...]  # new or changed
    dropped: tuple[str, ...]  # gone or changed
    num_removed: int  # gone


class Hit(NamedTuple):
    """Result of a query: a file and its cosine, averaged over frames."""

    name: str
    score: float
    secs: float | None = None  # time of the frame that fits best; None: an image, or not looked for


def clock(secs: float) -> str:
    """Format a time within a clip.

    >>> clock(5.24), clock(75), clock(3725)
    ('0:05.2', '1:15.0', '1:02:05.0')
    """
    tenths = round(10 * secs)
    minutes, rest = divmod(tenths, 600)
    hours, minutes = divmod(minutes, 60)
    seconds = f"{rest // 10:02d}.{rest % 10}"
    return f"{hours}:{minutes:02d}:{seconds}" if hours else f"{minutes}:{seconds}"


def compare(index: Index, files: Sequence[FileFacts]) -> Changes:
    """Compare an index with the present files of its folder (ours)."""
    known, present = set(index.files), set(files)
    rows = [row for row, file in enumerate(index.files) if file in present]
    kept = index
    if len(rows) < len(index.files):
        kept = Index(index.checkpoint, tuple(index.files[r] for r in rows), index.embeddings[rows])
    names = {file.name for file in files}
    return Changes(
        kept=kept,
        to_embed=tuple(file for file in files if file not in known),
        dropped=tuple(file.name for file in index.files if file not in present),
        num_removed=sum(file.name not in names for file in index.files),
    )


def search(index: Index, vector: Float[np.ndarray, " e"], top_k: int) -> list[Hit]:
    """Find the `top_k` clips nearest to a text or clip, best first; all of them if there are fewer.

    The ranking is that of VTC in evaluation. Clips of equal score are sorted by name.

    Raises:
      UserError: `top_k` is below 1.
    """
    if top_k < 1:
        raise UserError(f"top_k must be at least 1, not {top_k}")
    scores = index.embeddings @ vector
    top_k = min(top_k, len(scores))
    if not top_k:
        return []
    # Objects are made of the best alone, and of those that equal the last of them.
    lowest = np.partition(scores, len(scores) - top_k)[len(scores) - top_k]
    best = np.flatnonzero(scores >= lowest)
    hits = [Hit(index.files[row].name, float(scores[row])) for row in best]
    return sorted(hits, key=lambda hit: (-hit.score, hit.name))[:top_k]


def save_block(block: Block, folder: Path) -> None:
    """Add a block to a stored index, atomically; what it replaces is deleted.

    A block is one .npz: the vectors, and the files as JSON, so that it needs no pickle.
    """
    folder.mkdir(parents=True, exist_ok=True)
    old = block_paths(folder)
    path = folder / f"{int(old[-1].stem) + 1 if old else 0:06d}.npz"
    added, removed, replaces = block
    facts = {"format": FORMAT, "checkpoint": added.checkpoint, "files": added.files}
    facts |= {"removed": removed, "replaces": replaces}
    part = path.with_suffix(".part")  # renamed at the end, so a kill leaves the blocks before
    with part.open("wb") as file:
        np.savez(file, facts=np.array(json.dumps(facts)), embeddings=added.embeddings)
    part.replace(path)
    if replaces:
        for replaced in old:
            replaced.unlink()


def block_paths(folder: Path) -> list[Path]:
    """List the blocks of a stored index, the oldest first."""
    return sorted(folder.glob("*.npz"))


def load_index(folder: Path) -> Index | None:
    """Read an index from its blocks; None if there is no block.

    Raises:
      UserError: a block is damaged, or of another format; names it.
    """
    checkpoint, rows, files, parts = "", {}, [], []
    for path in block_paths(folder):
        block = read_block(path)
        if block.replaces:
            rows, files, parts = {}, [], []
        for name in block.removed:
            rows.pop(name, None)
        checkpoint = block.added.checkpoint
        rows |= {file.name: len(files) + i for i, file in enumerate(block.added.files)}
        files += block.added.files
        parts.append(block.added.embeddings)
    if not parts:
        return None
    embeddings, live = np.concatenate(parts), list(rows.values())
    if len(live) < len(files):
        files, embeddings = [files[row] for row in live], embeddings[live]
    return Index(checkpoint, tuple(files), embeddings)


def read_block(path: Path) -> Block:
    """Read a file of `save_block`, or a whole index as version 0.1.0 wrote it.

    Raises:
      FileNotFoundError: no such file.
      UserError: it is damaged, or of another format; names it.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:  # an index may come from elsewhere
            text, embeddings = str(stored["facts"]), stored["embeddings"]
        facts = parse_json(text, "facts", keep_halves=True)  # names find their files
        check(isinstance(facts, dict), "facts must hold an object")
        check(facts.get("format") in (1, FORMAT), f"format {facts.get('format')}, not {FORMAT}")
        stated = {name: facts[name] for name in facts.keys() & field_types(_Facts).keys()}
        known = to_record(_Facts, stated, "facts")
        check(_are_facts(known.files), "files must hold names, sizes and times")
        good = embeddings.dtype == np.float32 and embeddings.ndim == 2
        good = good and len(embeddings) == len(known.files)
        check(good, f"{embeddings.shape} vectors for {len(known.files)} files")
    except FileNotFoundError:
        raise
    except UNREADABLE as error:
        raise UserError(f"{path}: not an index that can be read ({error}); delete it") from error
    files = tuple(FileFacts(*file) for file in known.files)
    return Block(Index(known.checkpoint, files, embeddings), known.removed, known.replaces)


def _are_facts(files: Any) -> bool:
    kinds = [str, int, int]
    is_list = isinstance(files, list) and all(isinstance(file, list) for file in files)
    return is_list and all([*map(type, file)] == kinds for file in files)
