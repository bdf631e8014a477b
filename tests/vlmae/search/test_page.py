"""The web page: its results as HTML, and the whole of it in a headless browser.

The latter needs Chromium and the extras: pip install -e ".[test,search,browser]"; pytest -m browser
"""

import base64
import io
import re
import shutil
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import quote, unquote

import numpy as np
import pytest
import tiny_experiment
from PIL import Image

from data_pipelines.media.video_writer import encode_video
from vlmae.cli.run_experiment import run_experiment
from vlmae.config.tree import override
from vlmae.search.index import Hit
from vlmae.search.page import refusal, show_hits, thumbnail

NASTY = 'a "<b>#1 &amp; é.mp4'  # a name that must not become part of the page


class Elements(HTMLParser):
    """The elements of a page with their attributes, and its text."""

    def __init__(self, page: str):
        super().__init__()
        self.elements, self.text = [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def gray_clip(levels: list[int]) -> bytes:
    """A second of each gray."""
    return encode_video(np.full((len(levels), 32, 48, 3), 0, "uint8") + of_frames(levels), fps=1)


def of_frames(levels: list[int]) -> np.ndarray:
    return np.array(levels, "uint8")[:, None, None, None]


def picture(data_url: str) -> np.ndarray:
    header, data = data_url.split(",")
    assert header == "data:image/jpeg;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two clips and an image, two of them by links; one name is not what one would wish for."""
    folder = tmp_path / "my videos"
    folder.mkdir()
    (folder / NASTY).write_bytes(gray_clip([0, 200, 100]))
    (tmp_path / "elsewhere.mp4").write_bytes(gray_clip([50, 60, 70]))
    (folder / "b.mp4").symlink_to(tmp_path / "elsewhere.mp4")
    Image.new("RGB", (640, 320), (250, 0, 0)).save(tmp_path / "blob", "PNG")
    (folder / "still.png").symlink_to(tmp_path / "blob")
    return folder


def test_thumbnails_are_the_middle_frame_and_small(folder):
    clip, image = picture(thumbnail(folder / NASTY)), picture(thumbnail(folder / "still.png"))
    assert clip.shape == (32, 48, 3) and abs(clip.mean() - 200) < 3
    assert image.shape == (160, 320, 3) and image[0, 0, 0] > 240


def test_results_show_score_and_name_and_play_the_file(folder):
    page = show_hits(folder, [Hit(NASTY, 0.51234), Hit("still.png", -0.1)])
    found = Elements(page)
    assert [tag for tag, _ in found.elements].count("figure") == 2
    assert not any(tag == "b" and attrs for tag, attrs in found.elements)
    assert found.text == f"0.512 {NASTY}-0.100 still.png"
    [video] = [attrs for tag, attrs in found.elements if tag == "video"]
    assert unquote(video["src"]) == f"gradio_api/file={folder / NASTY}"
    assert "#" not in video["src"] and "controls" in video
    assert video["poster"] == thumbnail(folder / NASTY)


def test_the_player_begins_at_the_time_that_fits_best(folder):
    page = show_hits(folder, [Hit(NASTY, 0.5, secs=0.5)])
    found = Elements(page)
    [video] = [attrs for tag, attrs in found.elements if tag == "video"]
    assert video["src"].endswith("#t=0.50") and found.text == f"0.500 {NASTY} at 0:00.5"
    assert abs(picture(video["poster"]).mean()) < 3, "the first frame, not the middle one"


def test_a_file_that_has_gone_is_said_to_be(folder):
    (folder / "b.mp4").unlink()
    assert "cannot be shown: not a readable video: No such file" in show_hits(
        folder, [Hit("b.mp4", 0.5)]
    )


@pytest.fixture
def run(tiny_data_dir, tmp_path) -> Path:
    """A run of one step."""
    run = tmp_path / "run"
    off = {f"objectives.{name}": 0.0 for name in ("vtm", "mlm", "mvm")}
    changes = {"data.data_dir": str(tiny_data_dir), "train.steps": 1, **off}
    run_experiment(override(tiny_experiment.get_config(), changes), run)
    return run


def command(run: Path, folder: Path, port: int | str) -> list[str]:
    where = [str(run), str(folder), "--port", str(port)]
    return [sys.executable, "-m", "vlmae", "search", *where, "--serve"]


@pytest.fixture
def url(run, folder, script_env) -> Iterator[str]:
    """Address at which the command line serves the folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        command(run, folder, port), stdout=subprocess.PIPE, text=True, env=script_env
    )
    try:
        line = next(line for line in server.stdout if "http" in line)
        yield re.search(r"http://[\w.:]+", line)[0]
    finally:
        server.terminate()
        server.wait(timeout=60)


@pytest.mark.browser
def test_the_page_in_a_browser(url, folder, tmp_path):
    """Type a query, see the thumbnails, play a clip; nothing is asked of other machines."""
    from playwright.sync_api import expect, sync_playwright

    asked: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        page = browser.new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.goto(url)
        box = page.get_by_placeholder("what to look for")
        box.fill("a red circle")
        box.press("Enter")
        expect(page.locator(".hits figure")).to_have_count(3, timeout=60_000)
        captions = page.locator(".hits figcaption").all_inner_texts()
        scores = [float(caption.split()[0]) for caption in captions]
        assert scores == sorted(scores, reverse=True)
        assert any(NASTY in caption for caption in captions)
        widths = "all => all.map(one => one.naturalWidth)"
        assert page.locator(".hits img").evaluate_all(widths) == [320]

        clip = page.locator(f'.hits figure:has-text("{NASTY[-8:]}") video')
        assert clip.get_attribute("poster").startswith("data:image/jpeg")
        clip.evaluate("video => { video.muted = true; return video.play(); }")
        page.wait_for_function("video => video.currentTime > 0", arg=clip.element_handle())
        assert clip.evaluate("video => [video.videoWidth, video.videoHeight]") == [48, 32]

        page.screenshot(path=tmp_path / "page.png")
        browser.close()
    assert Image.open(tmp_path / "page.png").size[0] > 600
    assert asked and [u for u in asked if not u.startswith((url, "data:", "blob:"))] == []


def refused(path: str, method: str = "GET", asked: str = "127.0.0.1:7860", host="127.0.0.1") -> str:
    return refusal(method, path, asked, host, frozenset({"/clips/a b.mp4"}))


@pytest.mark.parametrize(
    ("asked", "host", "good"),
    [
        ("localhost:7860", "127.0.0.1", True),
        ("[::1]:7860", "::1", True),
        ("192.168.0.7", "0.0.0.0", True),
        (f"{socket.gethostname()}:7860", "0.0.0.0", True),
        ("search.lab", "search.lab", True),
        ("evil.example:7860", "127.0.0.1", False),  # a name that leads here for a moment
        ("127.0.0.1.evil.example", "127.0.0.1", False),
        ("", "127.0.0.1", False),
    ],
)
def test_names_under_which_the_page_is_asked_for(asked, host, good):
    assert bool(refused("/", asked=asked, host=host)) != good


def test_only_queries_and_indexed_clips_pass():
    for path in ("/", "/config", "/assets/x.js", "/gradio_api/file=/clips/a b.mp4"):
        assert not refused(path)
    for path in ("/clips/.env", "/clips/../.env", "/clips/a b.mp4/", "//clips/a b.mp4", ""):
        assert "index" in refused(f"/gradio_api/file={path}")
    assert refused("/gradio_api/file//clips/a b.mp4") and refused("/gradio_api/proxy=http://x")
    for path in ("/gradio_api/queue/join", "/gradio_api/run/search"):
        assert not refused(path, "POST")
    for path in ("/gradio_api/upload", "/gradio_api/upload/queue/", "/gradio_api/stream/1", "/"):
        assert refused(path, "POST")


@pytest.mark.browser
def test_only_indexed_clips_are_served(url, folder, tmp_path):
    import gradio_client  # comes with Gradio

    (tmp_path / "secret.txt").write_text("not for the page")
    (folder / ".env").write_text("nor this one")

    def status(path: str, data: bytes | None = None, **headers: str) -> int:
        request = urllib.request.Request(f"{url}/{path}", data, headers)
        try:
            return urllib.request.urlopen(request).status
        except urllib.error.HTTPError as error:
            return error.code

    def status_of(path: Path) -> int:
        return status(f"gradio_api/file={quote(str(path.resolve()))}")

    assert [status_of(folder / name) for name in ("still.png", "b.mp4", NASTY)] == [200] * 3
    assert [status_of(path) for path in (tmp_path / "secret.txt", folder / ".env")] == [403] * 2
    assert status("") == 200 and status("", Host="evil.example") == 403
    assert status("gradio_api/upload", b"x") == 403
    found = gradio_client.Client(url, verbose=False).predict("a red circle", api_name="/search")
    assert found.count("<figure>") == 3


@pytest.mark.browser
def test_a_busy_port_is_named(url, run, folder, script_env):
    port = url.rsplit(":", 1)[1]
    done = subprocess.run(
        command(run, folder, port), capture_output=True, text=True, env=script_env, timeout=300
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"error: cannot serve at 127.0.0.1:{port}: ")
    assert "Traceback" not in done.stderr
