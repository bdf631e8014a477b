"""Index of a folder of videos and images, kept up to date: only new and changed files are read."""

import contextlib
import hashlib
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from data_pipelines.media import decode
from data_pipelines.media.endings import is_image, is_media
from data_pipelines.media.folders import walk
from data_pipelines.media.sampling import segment_times
from data_pipelines.schema.checks import MissingError, UserError
from vlmae.config.tree import flatten
from vlmae.parallel.sharding import path_name
from vlmae.runs.inputs import read_clip
from vlmae.runs.model import Model
from vlmae.search.index import Block, FileFacts, Hit, Index, compare, search

_SAVE_EVERY_BATCHES = 16  # of each comes a file


class Listing(NamedTuple):
    """Files below a folder."""

    media: tuple[FileFacts, ...]  # sorted by name
    num_others: int  # files whose ending is of no known media type


class Update(NamedTuple):
    """Index after an update, with counts of the work done."""

    index: Index
    num_kept: int  # clips that were in the index already
    num_removed: int
    num_others: int  # files of other types
    unusable: dict[str, str]  # name -> reason; tried again at the next update


class FolderSearch(NamedTuple):
    """A folder, its index, and the model that embedded it."""

    folder: Path
    index: Index
    model: Model

    def query(self, texts: Sequence[str], top_k: int, times: bool = False) -> list[list[Hit]]:
        """Find the best clips for each text; with `times`, also where in each video it fits best.

        Raises:
          UserError: a text is empty, or `top_k` is below 1.
        """
        if not all(text.strip() for text in texts):
            raise UserError("the query is empty")
        return [self._find(vector, top_k, times) for vector in self.model.embed_text(texts)]

    def query_clips(
        self, clips: Sequence[Path], top_k: int, times: bool = False
    ) -> list[list[Hit]]:
        """Find the best clips for each clip or image, by the cosine with its mean vector.

        Raises:
          UserError: a file cannot be read, or `top_k` is below 1.
        """
        vectors = self.model.embed_video(clips)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        return [self._find(vector, top_k, times) for vector in vectors]

    def _find(self, vector: Float[np.ndarray, " e"], top_k: int, times: bool) -> list[Hit]:
        hits = search(self.index, vector, top_k)
        moments = self._moments(hits, vector) if times else {}
        return [hit._replace(secs=moments.get(hit.name)) for hit in hits]

    def _moments(self, hits: Sequence[Hit], vector: Float[np.ndarray, " e"]) -> dict[str, float]:
        """Return the time of the best of the frames that the model reads, in seconds, by name.

        The files are read again, so that the index need not hold a vector for each frame. Images,
        and all clips of a model that reads one frame, have no time.
        """
        config, clips, durations = self.model.config.data, {}, {}
        for hit in hits:
            path = self.folder / hit.name
            if is_image(path) or config.eval.num_frames == 1:
                continue
            with contextlib.suppress(decode.DecodeError, OSError):  # it has gone since
                with decode.open_clip(path) as clip:
                    secs = clip.info.duration_secs
                clips[hit.name], durations[hit.name] = read_clip(path, config), secs
        if not clips:
            return {}
        scores = self.model.embed_frames([*clips.values()]) @ vector
        moments = {}
        for (name, secs), of_frames in zip(durations.items(), scores, strict=True):
            times = segment_times(secs, len(of_frames))
            times = times[::-1] if config.eval.backwards else times
            moments[name] = float(times[of_frames.argmax()])
        return moments


def list_media(folder: Path) -> Listing:
    """List all files below a folder, see `walk`; those that cannot be opened have size and time 0.

    Raises:
      MissingError: no such folder.
    """
    if not folder.is_dir():
        raise MissingError(f"{folder}: no such folder")
    paths = [Path(path) for found in walk(folder) for path in found.files]
    media = [path for path in paths if is_media(path)]
    facts = sorted(_facts(folder, path) for path in media)
    return Listing(tuple(facts), len(paths) - len(media))


def _facts(folder: Path, path: Path) -> FileFacts:
    name = path.relative_to(folder).as_posix()
    try:
        stat = path.stat()
    except OSError:  # a dangling link; decoding it will give the reason
        return FileFacts(name, 0, 0)
    return FileFacts(name, stat.st_size, stat.st_mtime_ns)


def update_index(
    index: Index | None, folder: Path, model: Model, save: Callable[[Block], None]
) -> Update:
    """Embed new and changed files and drop removed ones (ours).

    Args:
      index: the stored index; None, or one of another checkpoint, embeds everything.
      folder: holds the videos and images, in subfolders too.
      model: a run with VTC.
      save: stores what has changed. It is called every few batches, so that an interrupted update
        goes on where it stopped, and at the end if anything is left.

    Raises:
      MissingError: no such folder.
    """
    checkpoint = checkpoint_name(model)
    anew = index is None or index.checkpoint != checkpoint
    if anew:
        index = Index(checkpoint, (), np.zeros((0, model.config.model.embed_dim), np.float32))
    listing = list_media(folder)
    changes = compare(index, listing.media)
    blocks, unusable = [], {}
    removed, pending = changes.dropped, []
    parts = _embed_batches(changes.to_embed, folder, model)
    for number, (part, reasons) in enumerate(parts, start=1):
        unusable |= reasons
        pending.append(part)
        last = number * model.config.data.eval_batch_size >= len(changes.to_embed)
        if number % _SAVE_EVERY_BATCHES == 0 or last:
            joined = _join(checkpoint, pending)
            pending = []
            if joined.files or removed:
                save(Block(joined, removed, replaces=anew))
                blocks, removed, anew = [*blocks, joined], (), False
    if removed:  # and nothing was embedded
        save(Block(changes.kept._replace(files=(), embeddings=index.embeddings[:0]), removed))
    updated = _join(checkpoint, [changes.kept, *blocks]) if blocks else changes.kept
    return Update(
        updated, len(changes.kept.files), changes.num_removed, listing.num_others, unusable
    )


def _join(checkpoint: str, parts: Sequence[Index]) -> Index:
    files = tuple(file for part in parts for file in part.files)
    return Index(checkpoint, files, np.concatenate([part.embeddings for part in parts]))


def _embed_batches(
    files: Sequence[FileFacts], folder: Path, model: Model
) -> Iterator[tuple[Index, dict[str, str]]]:
    """Embed files batch by batch, with a progress bar on a terminal.

    Yields:
      The clips of a batch, and the reason for each file that is left out.
    """
    from tqdm import tqdm

    size, dim = model.config.data.eval_batch_size, model.config.model.embed_dim

    def load(file: FileFacts) -> np.ndarray | str:
        try:
            return read_clip(folder / file.name, model.config.data)
        except decode.DecodeError as error:
            return str(error)

    # Decoded here, not by the model: one damaged file must not stop a folder of thousands.
    with (
        tqdm(total=len(files), desc="embedding", unit=" files", disable=None) as bar,
        ThreadPoolExecutor() as pool,
    ):
        following = pool.map(load, files[:size])
        for start in range(0, len(files), size):
            batch, clips = files[start : start + size], list(following)
            # The next batch is decoded while this one is embedded.
            following = pool.map(load, files[start + size : start + 2 * size])
            loaded = dict(zip(batch, clips, strict=True))
            usable = {file: clip for file, clip in loaded.items() if not isinstance(clip, str)}
            vectors = np.zeros((0, dim), np.float32)
            if usable:
                vectors = model.embed_video([*usable.values()])
            reasons = {file.name: why for file, why in loaded.items() if file not in usable}
            yield Index("", tuple(usable), vectors), reasons
            bar.update(len(batch))


def checkpoint_name(model: Model) -> str:
    """Name a checkpoint by step and SHA-256 of all that a clip's vector depends on (ours).

    Parameters, model and frames are hashed, since another run may lie at the same path and reach
    the same step.
    """
    digest, config = hashlib.sha256(), model.config
    used = (flatten(config.model), config.data.image_size, config.data.eval.num_frames)
    digest.update(json.dumps(used, sort_keys=True).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(jax.device_get(model.params)):
        digest.update(path_name(path).encode())
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return f"{config.name}, step {model.step}, sha256 {digest.hexdigest()[:16]}"


def index_path(workdir: Path, folder: Path) -> Path:
    """Path at which a work directory keeps the index of a folder."""
    folder = folder.resolve()
    # The checksum of the whole path tells folders of one name apart.
    return workdir / "search" / f"{folder.name}-{zlib.crc32(str(folder).encode()):08x}"
