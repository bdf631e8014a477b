"""Searches a folder of one's own videos and images by text, or by a clip.

vlmae search WORKDIR VIDEO_DIR --query "a dog runs" "a cat" --top-k 5
vlmae search WORKDIR VIDEO_DIR --clip dog.mp4 --json
vlmae search WORKDIR VIDEO_DIR            # asks for queries
vlmae search WORKDIR VIDEO_DIR --serve    # a web page
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from data_pipelines.schema.checks import MissingError, UserError, visible
from data_pipelines.schema.json_files import parse_json, read_text
from vlmae.figures.answer_page import spread
from vlmae.runs.load import load_run
from vlmae.runs.model import Model, load
from vlmae.search import page
from vlmae.search.folder import FolderSearch, Update, index_path, update_index
from vlmae.search.index import (
    Block,
    Hit,
    Index,
    block_paths,
    clock,
    load_index,
    read_block,
    save_block,
)

EXAMPLES = 4  # queries to try on the page
MAX_BLOCKS = 256  # files of a stored index, more are joined to one


def search_folder(
    workdir: Path,
    video_dir: Path,
    query: tuple[str, ...] = (),
    clip: tuple[Path, ...] = (),
    top_k: int = 5,
    json: bool = False,
    serve: bool = False,
    host: str = "127.0.0.1",
    port: int = 7860,
    checkpoint: str = "newest",
) -> None:
    """Rank the videos and images of a folder by how well they fit a text, or a clip.

    A result has its cosine, averaged over the frames that the model reads, and for a video the time
    of the frame that fits best.

    The folder is embedded once; later only new and changed files are. The index is kept in
    WORKDIR/search, and made anew for another checkpoint.

    Args:
      workdir: a run that was trained with VTC, or an export of one.
      video_dir: a folder of videos and images, with its subfolders.
      query: texts to search for; without any, they are asked for.
      clip: videos or images to search for, which need not lie in the folder.
      top_k: results of a query.
      json: print a JSON object for each query, a line each.
      serve: show a web page instead.
      host: address to serve it at; 0.0.0.0 lets other machines in.
      port: port to serve it at.
      checkpoint: newest, best (by `train.best_metric`) or the number of a step.

    Raises:
      MissingError: no folder, config or checkpoint.
      UserError: the run has no VTC, no file is usable, or an argument makes no sense.
    """
    if top_k < 1:
        raise UserError(f"--top-k must be at least 1, not {top_k}")
    if serve:
        page.check_gradio()  # before minutes of embedding
        if query or clip or json:
            raise UserError(
                "--serve takes its queries in the page: not with --query, --clip or --json"
            )
    for path in clip:
        if not path.is_file():
            raise MissingError(f"--clip {path}: no such file")
    found = open_folder(load_model(workdir, checkpoint), workdir, video_dir)
    if serve:
        page.serve(found, top_k, host, port, examples(workdir))
    elif query or clip:
        answer(found, query, top_k, clip, json)
    else:
        converse(found, top_k, json)


def load_model(workdir: Path, checkpoint: str = "newest") -> Model:
    """Load a run that embeds clips and texts.

    Raises:
      MissingError: no config or no checkpoint.
      UserError: the run was trained without VTC.
    """
    if not load_run(workdir).objectives.vtc:  # said before minutes are spent on the checkpoint
        raise UserError(
            f"{workdir} was trained without VTC (objectives.vtc=0): "
            "its texts and clips have no common space to search in"
        )
    return load(workdir, checkpoint)


def open_folder(model: Model, workdir: Path, folder: Path) -> FolderSearch:
    """Bring the folder's index up to date and report the work on stderr.

    Raises:
      MissingError: no such folder.
      UserError: the stored index is damaged, or no file is usable.
    """
    path = index_path(workdir, folder)
    whole = path.with_name(f"{path.name}.npz")  # as version 0.1.0 stored it
    stored = read_block(whole).added if whole.exists() else load_index(path)
    if stored and whole.exists():
        save_block(Block(stored, replaces=True), path)
        whole.unlink()
    update = update_index(stored, folder, model, lambda block: save_block(block, path))
    if len(block_paths(path)) > MAX_BLOCKS:
        save_block(Block(update.index, replaces=True), path)
    # On stderr, so that stdout holds the results alone.
    print(visible(describe(update, folder, stored)), file=sys.stderr)
    if not update.index.files:
        raise UserError(f"{folder}: no usable video or image among its files")
    return FolderSearch(folder, update.index, model)


def describe(update: Update, folder: Path, stored: Index | None) -> str:
    """Report an update: counts, then a line for each unusable file with the reason."""
    total = len(update.index.files)
    lines = [
        f"{folder}: {total} clips ({total - update.num_kept} embedded now); "
        f"forgotten: {update.num_removed}, unusable: {len(update.unusable)}, "
        f"files of other types: {update.num_others}"
    ]
    if stored and stored.checkpoint != update.index.checkpoint:
        lines.insert(0, f"made anew for another checkpoint: the index was of {stored.checkpoint}")
    lines += [f"  cannot be used: {name}: {why}" for name, why in update.unusable.items()]
    return "\n".join(lines)


def examples(workdir: Path) -> list[str]:
    """Take a few captions of the run's evaluation as queries to try; none if it has none."""
    path = workdir / "retrieval.jsonl"
    if not path.is_file():
        return []
    lines = [parse_json(line, path) for line in read_text(path).splitlines()]
    captions = [line["caption"] for line in lines if isinstance(line, dict) and "caption" in line]
    return [*dict.fromkeys(captions[i] for i in spread(len(captions), EXAMPLES))]


def answer(
    found: FolderSearch,
    queries: Sequence[str],
    top_k: int,
    clips: Sequence[Path] = (),
    as_json: bool = False,
) -> None:
    """Print the results of each text, then of each clip, as lines or as JSON."""
    results = found.query(queries, top_k, times=True) if queries else []
    results += found.query_clips(clips, top_k, times=True) if clips else []
    show = to_json if as_json else to_lines
    for query, hits in zip([*queries, *map(str, clips)], results, strict=True):
        print(show(query, hits, found.folder), flush=True)


def to_lines(query: str, hits: Sequence[Hit], _: Path) -> str:
    """Format results for people: cosine, name, and the time that fits best."""
    lines = [query]
    for hit in hits:
        at = "" if hit.secs is None else f"  at {clock(hit.secs)}"
        lines.append(f"  {hit.score:6.3f}  {hit.name}{at}")
    return visible("\n".join(lines))  # a file name may hold any bytes


def to_json(query: str, hits: Sequence[Hit], folder: Path) -> str:
    """Format results as a JSON object in a line."""
    clips = [
        {"name": hit.name, "path": str(folder / hit.name), "cosine": hit.score, "secs": hit.secs}
        for hit in hits
    ]
    return json.dumps({"query": query, "clips": clips})


def converse(found: FolderSearch, top_k: int, as_json: bool = False) -> None:
    """Answer queries from stdin line by line, until an empty line or the end of the input."""
    while True:
        try:
            query = input("query: ")
        except EOFError:
            return
        if not query.strip():
            return
        answer(found, [query], top_k, as_json=as_json)
