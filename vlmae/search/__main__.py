"""Search in a folder of one's own videos and images by text.

python -m vlmae.search WORKDIR VIDEO_DIR --query "a dog runs" "a cat" --top-k 5
python -m vlmae.search WORKDIR VIDEO_DIR            # asks for queries
python -m vlmae.search WORKDIR VIDEO_DIR --serve    # a web page
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from vlmae.command import run_command
from vlmae.search import page
from vlmae.search.embedder import Embedder, load_embedder
from vlmae.search.folder import FolderSearch, Update, index_path, update_index
from vlmae.search.index import Hit, Index, load_index, save_index


def search_folder(
    workdir: Path,
    video_dir: Path,
    query: tuple[str, ...] = (),
    top_k: int = 5,
    serve: bool = False,
    host: str = "127.0.0.1",
    port: int = 7860,
) -> None:
    """Ranks the videos and images of a folder by how well they fit a text.

    The folder is embedded once; later only what is new or changed. The index is kept in
    WORKDIR/search, and made anew for another checkpoint.

    Args:
      workdir: a run that was trained with VTC, or an export of one.
      video_dir: a folder of videos and images, with its subfolders.
      query: what to look for, one text or several; without any, they are asked for.
      top_k: results of a query.
      serve: show a web page instead.
      host: where to serve it; 0.0.0.0 lets other machines in.
      port: where to serve it.

    Raises:
      FileNotFoundError: no folder, config or checkpoint.
      ValueError: the run has no VTC, no file is usable, or an argument makes no sense.
    """
    if top_k < 1:
        raise ValueError(f"--top-k must be at least 1, not {top_k}")
    if serve:
        page.check_gradio()
        if query:
            raise ValueError("--serve takes its queries in the page, not from --query")
    found = open_folder(load_embedder(workdir), workdir, video_dir)
    if serve:
        page.serve(found, top_k, host, port)
    elif query:
        answer(found, query, top_k)
    else:
        converse(found, top_k)


def open_folder(embedder: Embedder, workdir: Path, folder: Path) -> FolderSearch:
    """Brings the folder's index up to date and says on stderr what it took.

    Raises:
      FileNotFoundError: there is no such folder.
      ValueError: the stored index is damaged, or no file is usable.
    """
    path = index_path(workdir, folder)
    stored = load_index(path) if path.exists() else None
    update = update_index(stored, folder, embedder, lambda index: save_index(index, path))
    print(describe(update, folder, stored), file=sys.stderr)
    if not update.index.files:
        raise ValueError(f"{folder}: no usable video or image among its files")
    return FolderSearch(folder, update.index, embedder)


def describe(update: Update, folder: Path, stored: Index | None) -> str:
    """What has been done, and each file that cannot be used with its reason."""
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
    """Prints the results of each query."""
    for query, hits in zip(queries, found.query(queries, top_k), strict=True):
        print(format_hits(query, hits), flush=True)


def format_hits(query: str, hits: Sequence[Hit]) -> str:
    """The query, and a line for each hit: score and name."""
    return "\n".join([query, *(f"  {hit.score:6.3f}  {hit.name}" for hit in hits)])


def converse(found: FolderSearch, top_k: int) -> None:
    """Answers one line of input after the other, until an empty one or their end."""
    while True:
        try:
            query = input("query: ")
        except EOFError:
            return
        if not query.strip():
            return
        answer(found, [query], top_k)


if __name__ == "__main__":
    run_command(search_folder)
