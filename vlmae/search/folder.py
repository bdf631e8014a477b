"""A folder of videos and images, embedded once: only what is new or changed is read again."""

import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from data_pipelines import decode, rows, transforms
from data_pipelines.builders.media import IMAGE_ENDINGS, MEDIA_ENDINGS
from data_pipelines.config import DataConfig
from vlmae.search.embedder import Embedder
from vlmae.search.index import FileFacts, Hit, Index, compare, empty_index, extend, search

_SAVE_EVERY_BATCHES = 16


class Listing(NamedTuple):
    """The files below a folder."""

    media: tuple[FileFacts, ...]  # in the order of their names
    num_others: int  # that are no media, by their endings


class Update(NamedTuple):
    """An index that is up to date, and what it took."""

    index: Index
    num_kept: int  # clips that were in the index already
    num_removed: int
    num_others: int
    unusable: dict[str, str]  # name -> reason; they are tried again the next time


class FolderSearch(NamedTuple):
    """A folder, its index, and the model that made it."""

    folder: Path
    index: Index
    embedder: Embedder

    def query(self, texts: Sequence[str], top_k: int) -> list[list[Hit]]:
        """The best clips for each text; raises ValueError for an empty text, or `top_k` < 1."""
        return [search(self.index, text, top_k) for text in self.embedder.texts(texts)]


def list_media(folder: Path) -> Listing:
    """All files below a folder; those that cannot be looked at have a size and time of 0.

    Raises:
      FileNotFoundError: there is no such folder.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    paths = [
        Path(where, name) for where, _, names in os.walk(folder, followlinks=True) for name in names
    ]
    media = [path for path in paths if path.suffix.lower() in MEDIA_ENDINGS]
    facts = sorted(_facts(folder, path) for path in media)
    return Listing(tuple(facts), len(paths) - len(media))


def _facts(folder: Path, path: Path) -> FileFacts:
    name = path.relative_to(folder).as_posix()
    try:
        stat = path.stat()
    except OSError:  # a dangling link; reading it will give the reason
        return FileFacts(name, 0, 0)
    return FileFacts(name, stat.st_size, stat.st_mtime_ns)


def load_clip(path: Path, config: DataConfig) -> UInt8[np.ndarray, "t h w 3"]:
    """The frames of a video as evaluation sees them, or the one of an image.

    Raises:
      DecodeError: says what is wrong with the file.
    """
    if path.suffix.lower() in IMAGE_ENDINGS:
        try:
            frames = decode.decode_image(path.read_bytes())[None]
        except OSError as error:
            raise decode.DecodeError("not a readable file", error.strerror or "") from error
    else:
        record = {"media": path, "media_type": b"video"}
        frames = rows.load_video(record, config.eval.num_frames, rng=None)
    return transforms.eval_view(frames, config.image_size)


def update_index(
    index: Index | None, folder: Path, embedder: Embedder, save: Callable[[Index], None]
) -> Update:
    """Embeds what is new or changed, forgets what is gone (ours).

    Without an index, or with one of another checkpoint, that is everything. `save` is called now
    and then, so that an interrupted run need not start again, and at the end if anything changed.

    Raises:
      FileNotFoundError: there is no such folder.
    """
    if index is None or index.checkpoint != embedder.checkpoint:
        index = empty_index(embedder.checkpoint, embedder.config.model.embed_dim)
    listing = list_media(folder)
    changes = compare(index, listing.media)
    updated, unusable = changes.kept, {}
    batches = _batches(changes.to_embed, embedder.config.data.eval_batch_size)
    for number, files in enumerate(batches, start=1):
        updated, reasons = _embed_files(updated, folder, files, embedder)
        unusable |= reasons
        if number % _SAVE_EVERY_BATCHES == 0:
            save(updated)
    if updated.files != index.files:
        save(updated)
    return Update(
        updated, len(changes.kept.files), changes.num_removed, listing.num_others, unusable
    )


def _batches(files: Sequence[FileFacts], size: int) -> Iterator[Sequence[FileFacts]]:
    """With a progress bar, if someone is there to see it."""
    from tqdm import tqdm

    with tqdm(total=len(files), desc="embedding", unit=" files", disable=None) as bar:
        for start in range(0, len(files), size):
            yield files[start : start + size]
            bar.update(len(files[start : start + size]))


def _embed_files(
    index: Index, folder: Path, files: Sequence[FileFacts], embedder: Embedder
) -> tuple[Index, dict[str, str]]:
    """The index with these files, and the reasons of those that are left out."""

    def load(file: FileFacts) -> np.ndarray | str:
        try:
            return load_clip(folder / file.name, embedder.config.data)
        except decode.DecodeError as error:
            return str(error)

    with ThreadPoolExecutor() as pool:
        loaded = dict(zip(files, pool.map(load, files), strict=True))
    clips = {file: clip for file, clip in loaded.items() if not isinstance(clip, str)}
    for length in sorted({len(clip) for clip in clips.values()}):  # images, videos
        same = {file: clip for file, clip in clips.items() if len(clip) == length}
        vectors: Float[np.ndarray, "n e"] = embedder.clips(np.stack([*same.values()]))
        index = extend(index, [*same], vectors)
    return index, {file.name: loaded[file] for file in files if file not in clips}


def index_path(workdir: Path, folder: Path) -> Path:
    """Where a work directory keeps the index of a folder."""
    folder = folder.resolve()
    return workdir / "search" / f"{folder.name}-{zlib.crc32(str(folder).encode()):08x}.npz"
