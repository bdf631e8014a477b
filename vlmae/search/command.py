"""Searches a folder of one's own videos and images by text.

vlmae search WORKDIR VIDEO_DIR --query "a dog runs" "a cat" --top-k 5
vlmae search WORKDIR VIDEO_DIR            # asks for queries
vlmae search WORKDIR VIDEO_DIR --serve    # a web page
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from data_pipelines.schema.checks import UserError, visible
from vlmae.runs.load import load_run
from vlmae.runs.model import Model, load
from vlmae.search import page
from vlmae.search.folder import FolderSearch, Update, index_path, update_index
from vlmae.search.index import Block, Index, block_paths, load_index, read_block, save_block

MAX_BLOCKS = 256  # files of a stored index, more are joined to one


def search_folder(
    workdir: Path,
    video_dir: Path,
    query: tuple[str, ...] = (),
    top_k: int = 5,
    serve: bool = False,
    host: str = "127.0.0.1",
    port: int = 7860,
) -> None:
    """Rank the videos and images of a folder by how well they fit a text.

    The folder is embedded once; later only new and changed files are. The index is kept in
    WORKDIR/search, and made anew for another checkpoint.

    Args:
      workdir: a run that was trained with VTC, or an export of one.
      video_dir: a folder of videos and images, with its subfolders.
      query: texts to search for; without any, they are asked for.
      top_k: results of a query.
      serve: show a web page instead.
      host: address to serve it at; 0.0.0.0 lets other machines in.
      port: port to serve it at.

    Raises:
      MissingError: no folder, config or checkpoint.
      UserError: the run has no VTC, no file is usable, or an argument makes no sense.
    """
    if top_k < 1:
        raise UserError(f"--top-k must be at least 1, not {top_k}")
    if serve:
        page.check_gradio()  # before minutes of embedding
        if query:
            raise UserError("--serve takes its queries in the page, not from --query")
    found = open_folder(load_model(workdir), workdir, video_dir)
    if serve:
        page.serve(found, top_k, host, port)
    elif query:
        answer(found, query, top_k)
    else:
        converse(found, top_k)


def load_model(workdir: Path) -> Model:
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
    return load(workdir)


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


def answer(found: FolderSearch, queries: Sequence[str], top_k: int) -> None:
    """Print the results of each query."""
    for query, hits in zip(queries, found.query(queries, top_k), strict=True):
        lines = [query, *(f"  {hit.score:6.3f}  {hit.name}" for hit in hits)]
        print(visible("\n".join(lines)), flush=True)  # a file name may hold any bytes


def converse(found: FolderSearch, top_k: int) -> None:
    """Answer queries from stdin line by line, until an empty line or the end of the input."""
    while True:
        try:
            query = input("query: ")
        except EOFError:
            return
        if not query.strip():
            return
        answer(found, [query], top_k)
