"""The web page: a line for the query, and the clips that answer it. Nothing leaves the machine.

The only file that imports Gradio, which is the extra `search`.
"""

import base64
import functools
import html
import importlib.util
import io
import urllib.parse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from data_pipelines import decode
from data_pipelines.builders.media import IMAGE_ENDINGS
from vlmae.search.folder import FolderSearch
from vlmae.search.index import Hit

if TYPE_CHECKING:
    import gradio

THUMBNAIL_PIXELS = 320
STYLE = """
.hits { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 16px; }
.hits figure { margin: 0; }
.hits video, .hits img { width: 100%; aspect-ratio: 1; object-fit: contain; background: #222; }
@media (hover: hover) { .hits video:not(:hover)::-webkit-media-controls { opacity: 0; } }
.hits figcaption { overflow-wrap: anywhere; font-size: 14px; }
.hits figcaption b { font-variant-numeric: tabular-nums; }
"""


def check_gradio() -> None:
    """Raises ValueError, saying how to install it, if Gradio is missing."""
    if importlib.util.find_spec("gradio") is None:
        raise ValueError('--serve needs Gradio; install it with: pip install -e ".[search]"')


def serve(found: FolderSearch, top_k: int, host: str, port: int) -> None:
    """Serves the page until it is interrupted.

    Whoever reaches `host` and `port` can search and can fetch every file of the folder.

    Raises:
      ValueError: the port is in use.
    """
    import gradio

    options = {
        "server_name": host,
        "server_port": port,
        "allowed_paths": served_paths(found),
        # Gradio's own theme loads its fonts from elsewhere.
        "theme": gradio.themes.Default(font="sans-serif", font_mono="monospace"),
        "css": STYLE,
        "footer_links": [],
        "ssr_mode": False,
    }
    try:
        build_page(found, top_k).launch(**options)
    except OSError as error:
        raise ValueError(f"cannot serve at {host}:{port}: {error}") from error


def served_paths(found: FolderSearch) -> list[str]:
    """The folder, and the clips outside of it that it links to: Gradio follows links first."""
    root = found.folder.resolve()
    clips = [(root / file.name).resolve() for file in found.index.files]
    return [str(root), *(str(clip) for clip in clips if not clip.is_relative_to(root))]


def build_page(found: FolderSearch, top_k: int) -> "gradio.Blocks":
    """The page as a Gradio app."""
    import gradio

    def answer(query: str) -> str:
        if not query.strip():
            return ""
        [hits] = found.query([query], top_k)
        return show_hits(found.folder, hits)

    with gradio.Blocks(title="Search", analytics_enabled=False) as page:
        clips = f"{len(found.index.files)} clips in {found.folder}"
        query = gradio.Textbox(label=clips, placeholder="what to look for", autofocus=True)
        results = gradio.HTML()
        query.submit(answer, query, results, api_name="search")
    return page


def show_hits(folder: Path, hits: Sequence[Hit]) -> str:
    """HTML of the results: a playable thumbnail each, its score and its name."""
    return f'<div class="hits">{"".join(_show_hit(folder, hit) for hit in hits)}</div>'


def _show_hit(folder: Path, hit: Hit) -> str:
    path = folder / hit.name  # what a link points to may have another ending, or none
    file = f"gradio_api/file={urllib.parse.quote(path.resolve().as_posix())}"
    try:
        picture = thumbnail(path)
    except (decode.DecodeError, OSError) as error:
        seen = f"<p>cannot be shown: {html.escape(str(error))}</p>"
    else:
        if path.suffix.lower() in IMAGE_ENDINGS:
            seen = f'<a href="{file}" target="_blank"><img src="{picture}"></a>'
        else:
            seen = f'<video controls loop preload="none" poster="{picture}" src="{file}"></video>'
    caption = f"<figcaption><b>{hit.score:.3f}</b> {html.escape(hit.name)}</figcaption>"
    return f"<figure>{seen}{caption}</figure>"


@functools.lru_cache(maxsize=1024)
def thumbnail(path: Path) -> str:
    """The middle frame of a clip, or an image, as a data URL of a small JPEG.

    Raises:
      DecodeError: the file cannot be decoded.
      OSError: it cannot be read.
    """
    if path.suffix.lower() in IMAGE_ENDINGS:
        frame = decode.decode_image(path.read_bytes())
    else:
        with decode.open_clip(path) as clip:
            [frame] = clip.frames([clip.info.duration_secs / 2])
    image, file = Image.fromarray(frame), io.BytesIO()
    image.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    image.save(file, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
