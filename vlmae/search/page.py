"""Web page of a search: a text box, and the clips found. Nothing leaves the machine.

The only file that imports Gradio, which is the extra `search`.
"""

import base64
import contextlib
import functools
import html
import importlib.util
import io
import ipaddress
import os
import re
import socket
import urllib.parse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from data_pipelines.media import decode, images
from data_pipelines.media.endings import is_image
from data_pipelines.schema.checks import UserError, visible
from vlmae.runs.load import title_of
from vlmae.search.folder import FolderSearch
from vlmae.search.index import Hit, clock

if TYPE_CHECKING:
    import gradio

THUMBNAIL_PIXELS = 320
_CALLS = tuple(
    f"/gradio_api/{name}" for name in ("queue/", "run/", "call/", "api/", "reset", "cancel")
)
STYLE = """
.hits { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 16px; }
.hits figure { margin: 0; }
.hits video, .hits img { width: 100%; aspect-ratio: 1; object-fit: contain; background: #222; }
@media (hover: hover) { .hits video:not(:hover)::-webkit-media-controls { opacity: 0; } }
.hits figcaption { overflow-wrap: anywhere; font-size: 14px; }
.hits figcaption b { font-variant-numeric: tabular-nums; }
"""


def check_gradio() -> None:
    """Raise UserError, which says how to install it, if Gradio is missing."""
    if importlib.util.find_spec("gradio") is None:
        raise UserError('--serve needs Gradio; install it with: pip install -e ".[search]"')


def serve(
    found: FolderSearch, top_k: int, host: str, port: int, examples: Sequence[str] = ()
) -> None:
    """Serve the page until it is interrupted.

    Everyone who can reach `host` and `port` can search and can fetch every indexed clip, and
    nothing else; see `refusal`.

    Raises:
      UserError: the port is in use.
    """
    import gradio
    from starlette.middleware import Middleware

    clips = frozenset(map(str, clip_files(found)))
    options = {
        "server_name": host,
        "server_port": port,
        "allowed_paths": served_paths(found),
        "app_kwargs": {"middleware": [Middleware(Guard, host=host, clips=clips)]},
        # Gradio's own theme loads its fonts from elsewhere.
        "theme": gradio.themes.Default(font="sans-serif", font_mono="monospace"),
        "css": STYLE,
        "footer_links": [],
        "ssr_mode": False,
    }
    try:
        build_page(found, top_k, examples).launch(**options)
    except OSError as error:
        raise UserError(f"cannot serve at {host}:{port}: {error}") from error


def served_paths(found: FolderSearch) -> list[str]:
    """List the folder, and clips outside of it that it links to.

    Gradio resolves links before it checks what it may serve.
    """
    root = found.folder.resolve()
    return [str(root), *(str(clip) for clip in clip_files(found) if not clip.is_relative_to(root))]


def clip_files(found: FolderSearch) -> list[Path]:
    """List the files of the index, links resolved."""
    return [(found.folder / file.name).resolve() for file in found.index.files]


class Guard:
    """ASGI middleware that answers requests that have no business here, see `refusal`."""

    def __init__(self, app: Callable, host: str, clips: frozenset[str]):
        """Guard an app that is served at `host` and may send `clips`."""
        self.app, self.host, self.clips = app, host, clips

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        """Hand a request on, or refuse it with status 403."""
        why = ""
        if scope["type"] in ("http", "websocket"):
            asked = dict(scope["headers"]).get(b"host", b"").decode("latin-1")
            why = refusal(scope.get("method", "GET"), scope["path"], asked, self.host, self.clips)
        if not why:
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": why})
        else:
            headers = [(b"content-type", b"text/plain; charset=utf-8")]
            await send({"type": "http.response.start", "status": 403, "headers": headers})
            await send({"type": "http.response.body", "body": why.encode()})


def refusal(method: str, path: str, asked: str, host: str, clips: frozenset[str]) -> str:
    """Say why a request is refused; "" if it is not.

    Args:
      method: of the request.
      path: of its URL.
      asked: its header Host. A page of a stranger whose name leads to this machine (DNS rebinding)
        sends the stranger's name; the numbers of an address cannot be rebound.
      host: the address that the page is served at.
      clips: absolute paths of the files that may be sent.
    """
    if not _is_own(asked, host):
        return (
            f"this page is not served as {asked!r}; use http://localhost or this machine's address"
        )
    if method not in ("GET", "HEAD") and not path.startswith(_CALLS):
        return "nothing can be sent to this page but queries"
    wants_file = re.search(r"/(file[=/]|proxy=|stream/)", path)
    if wants_file and path.removeprefix("/gradio_api/file=") not in clips:
        return "only the clips of the index are served"
    return ""


def _is_own(asked: str, host: str) -> bool:
    name = urllib.parse.urlsplit(f"//{asked}").hostname or ""
    with contextlib.suppress(ValueError):
        return bool(ipaddress.ip_address(name))
    own = {"localhost", socket.gethostname(), socket.getfqdn(), host}
    return name in {name.lower() for name in own}


def build_page(found: FolderSearch, top_k: int, examples: Sequence[str] = ()) -> "gradio.Blocks":
    """Build the page as a Gradio app; `examples` are queries to click."""
    import gradio

    def answer(query: str) -> str:
        if not query.strip():
            return ""
        [hits] = found.query([query], top_k, times=True)
        return show_hits(found.folder, hits)

    name, count = found.folder.resolve().name, len(found.index.files)
    config = found.model.config
    with gradio.Blocks(title=f"Search {name}", analytics_enabled=False) as page:
        gradio.HTML(
            f"<h1>Search {html.escape(visible(name))}</h1><p>{count} clips, ranked by "
            f"{html.escape(visible(config.name))}, {title_of(config, found.model.step)}. "
            "A number is the cosine of clip and text.</p>"
        )
        query = gradio.Textbox(show_label=False, placeholder="what to look for", autofocus=True)
        with gradio.Row():
            buttons = [gradio.Button(text, size="sm", min_width=0) for text in examples]
        results = gradio.HTML()
        query.submit(answer, query, results, api_name="search")
        for button in buttons:
            # The text of the button itself: first into the box, then as the query.
            filled = button.click(lambda text: text, button, query, api_name=False)
            filled.then(answer, query, results, api_name=False)
    return page


def show_hits(folder: Path, hits: Sequence[Hit]) -> str:
    """Format the results as HTML: a playable thumbnail, score and name each."""
    return f'<div class="hits">{"".join(_show_hit(folder, hit) for hit in hits)}</div>'


def _show_hit(folder: Path, hit: Hit) -> str:
    path = folder / hit.name
    # Resolved for Gradio, but shown by the name: the target of a link may have any ending.
    file = f"gradio_api/file={urllib.parse.quote(os.fsencode(path.resolve()))}"
    try:
        picture = thumbnail(path, hit.secs)
    except (decode.DecodeError, OSError) as error:
        seen = f"<p>cannot be shown: {html.escape(str(error))}</p>"
    else:
        if is_image(path):
            seen = f'<a href="{file}" target="_blank"><img src="{picture}"></a>'
        else:
            start = "" if hit.secs is None else f"#t={hit.secs:.2f}"  # the player begins there
            video = f'src="{file}{start}"></video>'
            seen = f'<video controls loop preload="none" poster="{picture}" {video}'
    name = html.escape(visible(hit.name))
    at = "" if hit.secs is None else f" at {clock(hit.secs)}"
    caption = f"<figcaption><b>{hit.score:.3f}</b> {name}{at}</figcaption>"
    return f"<figure>{seen}{caption}</figure>"


@functools.lru_cache(maxsize=1024)  # results of successive queries overlap
def thumbnail(path: Path, secs: float | None = None) -> str:
    """Make a data URL of a small JPEG from a frame of a clip, or from an image.

    Args:
      path: of a video or image.
      secs: time of the frame; None: the middle.

    Raises:
      DecodeError: the file cannot be decoded.
      OSError: it cannot be read.
    """
    if is_image(path):
        frame = images.decode_image(path.read_bytes())
    else:
        with decode.open_clip(path) as clip:
            [frame] = clip.frames([clip.info.duration_secs / 2 if secs is None else secs])
    image, file = Image.fromarray(frame), io.BytesIO()
    image.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    image.save(file, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
