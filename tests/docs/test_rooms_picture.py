"""docs/rooms.svg shows the imports of the code, and no arrow goes up."""

import importlib.util
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[2]
IMPORT = re.compile(r"^\s*(?:from|import) ((?:vlmae|data_pipelines|experiments)\b[\w.]*)", re.M)


@pytest.fixture
def draw_rooms():
    spec = importlib.util.spec_from_file_location("draw_rooms", ROOT / "docs" / "draw_rooms.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def picture():
    return ElementTree.parse(ROOT / "docs" / "rooms.svg").getroot()


def elements(picture, tag):
    return [e for e in picture.iter(f"{{http://www.w3.org/2000/svg}}{tag}") if e.attrib]


def arrows(picture):
    return {(e.get("data-from"), e.get("data-to")): e for e in elements(picture, "polyline")}


def closure(edges):
    """All pairs that a chain of edges joins (Warshall)."""
    pairs, rooms = set(edges), {room for edge in edges for room in edge}
    for middle in rooms:
        pairs |= {(a, c) for a in rooms for c in rooms if {(a, middle), (middle, c)} <= pairs}
    return pairs


def test_arrows_are_the_imports_of_the_code(draw_rooms, picture):
    rooms = {e.get("data-room") for e in elements(picture, "rect")} - {None}
    found = set()
    for folder in draw_rooms.PACKAGES:
        for path in (ROOT / folder).rglob("*.py"):
            user = draw_rooms.room_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
            used = {draw_rooms.room_of(name) for name in IMPORT.findall(path.read_text())}
            found |= {(user, other) for other in used if {user, other} <= rooms and user != other}
    assert len(rooms) > 15
    assert closure(arrows(picture)) == closure(found), "python docs/draw_rooms.py"


def test_no_arrow_goes_up(picture):
    tops = {e.get("data-room"): float(e.get("y")) for e in elements(picture, "rect") if e.get("y")}
    assert len(arrows(picture)) > 15
    for (user, used), line in arrows(picture).items():
        heights = [float(point.split(",")[1]) for point in line.get("points").split()]
        assert tops[user] < tops[used]
        assert heights == sorted(heights) and heights[0] < heights[-1]


def test_the_committed_picture_is_the_drawn_one(draw_rooms):
    rooms = draw_rooms.find_rooms()
    drawn = draw_rooms.draw(rooms, draw_rooms.find_edges(rooms))
    assert (ROOT / "docs" / "rooms.svg").read_text() == drawn, "python docs/draw_rooms.py"


def test_implied_edges_are_left_out(draw_rooms):
    assert draw_rooms.without_implied({("a", "b"), ("b", "c"), ("a", "c"), ("a", "d")}) == {
        ("a", "b"),
        ("b", "c"),
        ("a", "d"),
    }
