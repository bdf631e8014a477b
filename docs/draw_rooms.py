"""Draw docs/rooms.svg, the rooms of the code and the imports between them.

    python docs/draw_rooms.py

An arrow points from the room that imports to the room that is imported. Arrows that follow from
others are left out: if A imports B and B imports C, there is no arrow from A to C.
"""

import ast
import itertools
import textwrap
from collections.abc import Iterator
from html import escape
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("experiments", "vlmae", "data_pipelines")
# Columns of the rooms that do not stand in the middle one of their package.
COLUMNS = {"export": -1, "search": 1, "launching": 1, "ops": -1, "media": -1, "text": 1}
CENTERS = {"experiments": 335, "vlmae": 335, "data_pipelines": 810}
COLORS = {"experiments": "#e8f0fe", "vlmae": "#e6f4ea", "data_pipelines": "#fef3e0"}
BOX_WIDTH, BOX_HEIGHT, ROW_HEIGHT, COLUMN_WIDTH, WIDTH = 204, 80, 112, 216, 1145

Edge = tuple[str, str]
Point = tuple[float, float]


def room_of(module: str) -> str:
    """Name the room of a module: vlmae.ops.losses -> vlmae.ops; all experiments are one."""
    return "experiments" if module.startswith("experiments") else ".".join(module.split(".")[:2])


def imported(path: Path) -> Iterator[str]:
    """Yield the modules that a file imports, lazily too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def find_rooms() -> dict[str, str]:
    """Find all rooms, each with the first line of its docstring."""
    folders = [path for package in PACKAGES[1:] for path in (ROOT / package).glob("*/__init__.py")]
    names = {f"{path.parts[-3]}.{path.parts[-2]}": path for path in sorted(folders)}
    docs = {name: ast.get_docstring(ast.parse(path.read_text())) for name, path in names.items()}
    rooms = {name: (doc or "").split("\n")[0] for name, doc in docs.items()}
    return {"experiments": "One plain Python file an experiment; benchmarks."} | rooms


def find_edges(rooms: dict[str, str]) -> set[Edge]:
    """Find which room imports which."""
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    modules = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files}
    pairs = {(room_of(modules[p]), room_of(used)) for p in files for used in imported(p)}
    return {(user, used) for user, used in pairs if {user, used} <= rooms.keys() and user != used}


def reachable(edges: set[Edge], start: str) -> set[str]:
    """Find the rooms that a room imports, directly or through others."""
    found, todo = set(), [start]
    while todo:
        here = todo.pop()
        new = {used for user, used in edges if user == here} - found
        found |= new
        todo += new
    return found


def without_implied(edges: set[Edge]) -> set[Edge]:
    """Leave out the edges that follow from others (transitive reduction of a DAG)."""
    below = {user: reachable(edges, user) for user, _ in edges}
    return {
        (user, used)
        for user, used in edges
        if not any(used in below.get(other, ()) for one, other in edges if one == user)
    }


def rows_of(rooms: dict[str, str], edges: set[Edge]) -> dict[str, int]:
    """Give each room a row above all that it imports; row 0 is the lowest."""
    rows = dict.fromkeys(rooms, 0)
    for _ in rooms:  # long enough for any chain
        for user, used in edges:
            rows[user] = max(rows[user], rows[used] + 1)
    for room in rooms:  # a room that imports nothing stands close to its users
        users = [rows[user] for user, used in edges if used == room]
        if users and not any(user == room for user, _ in edges):
            rows[room] = min(users) - 1
    return rows


def place(rows: dict[str, int]) -> dict[str, Point]:
    """Give each room the left upper corner of its box."""
    top, places = max(rows.values()), {}
    for room, row in rows.items():
        package, _, name = room.partition(".")
        y = 40 + (top - row) * ROW_HEIGHT
        columns = itertools.chain([COLUMNS.get(name, 0)], (0, 1, -1, 2, -2))
        x = (CENTERS[package] + c * COLUMN_WIDTH - BOX_WIDTH / 2 for c in columns)
        places[room] = next((left, y) for left in x if (left, y) not in places.values())
    return places


def route(places: dict[str, Point], user: str, used: str) -> list[Point]:
    """Find a way for an arrow that meets no other box: straight, or with a corner if far."""
    (x0, y0), (x1, y1) = places[user], places[used]
    middle0, middle1 = x0 + BOX_WIDTH / 2, x1 + BOX_WIDTH / 2
    bottom, top = (middle0, y0 + BOX_HEIGHT), (middle1, y1)
    side0, side1 = y0 + BOX_HEIGHT / 2, y1 + BOX_HEIGHT / 2
    edge0, edge1 = (x0 + BOX_WIDTH, x1) if x1 > x0 else (x0, x1 + BOX_WIDTH)
    ways = [
        [bottom, top],
        [(edge0, side0), (middle1, side0), top],
        [bottom, (middle0, side1), (edge1, side1)],
    ]
    # A straight arrow over several columns would cross others at a flat angle.
    if abs(x1 - x0) > 2 * COLUMN_WIDTH:
        ways = [*ways[1:], ways[0]]
    others = [place for room, place in places.items() if room not in (user, used)]
    return next((way for way in ways if not meets(way, others)), ways[0])


def meets(way: list[Point], boxes: list[Point]) -> bool:
    """Return True if a polyline passes through one of the boxes."""
    for (x0, y0), (x1, y1) in itertools.pairwise(way):
        for step in range(101):  # points on the line, closer to each other than a box is wide
            x, y = x0 + (x1 - x0) * step / 100, y0 + (y1 - y0) * step / 100
            if any(
                a - 6 <= x <= a + BOX_WIDTH + 6 and b - 6 <= y <= b + BOX_HEIGHT + 6
                for a, b in boxes
            ):
                return True
    return False


def draw_box(room: str, about: str, x: float, y: float) -> str:
    """Draw a room: its name, and what it holds on three lines at most."""
    package, _, name = room.partition(".")
    lines = textwrap.wrap(about.rstrip(".").replace("`", ""), 31)[:3]
    texts = "".join(
        f'<text x="{x + BOX_WIDTH / 2:g}" y="{y + 38 + 15 * i:g}" class="about">'
        f"{escape(line)}</text>"
        for i, line in enumerate(lines)
    )
    return (
        f'<rect data-room="{room}" x="{x:g}" y="{y:g}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" '
        f'rx="8" fill="{COLORS[package]}"/><text x="{x + BOX_WIDTH / 2:g}" y="{y + 20:g}" '
        f'class="name">{name or package}</text>{texts}'
    )


def draw(rooms: dict[str, str], edges: set[Edge]) -> str:
    """Draw the whole picture as SVG."""
    rows = rows_of(rooms, edges)
    places = place(rows)
    height = 40 + (max(rows.values()) + 1) * ROW_HEIGHT
    arrows = []
    for user, used in sorted(without_implied(edges)):
        points = " ".join(f"{x:g},{y:g}" for x, y in route(places, user, used))
        arrows.append(f'<polyline data-from="{user}" data-to="{used}" points="{points}"/>')
    boxes = [draw_box(room, about, *places[room]) for room, about in rooms.items()]
    titles = []
    for package in PACKAGES[1:]:
        y = min(y for room, (_, y) in places.items() if room.startswith(package)) + 20
        x = CENTERS[package] + (-1.45 if package == "vlmae" else 0.55) * COLUMN_WIDTH
        titles.append(f'<text x="{x:g}" y="{y:g}" class="package">{package}/</text>')
    head = SVG_HEAD.format(width=WIDTH, height=height)
    return "\n".join([head, *arrows, *boxes, *titles, "</svg>\n"])


SVG_HEAD = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif">
<style>
rect {{ stroke: #9aa0a6; }}
polyline {{ fill: none; stroke: #5f6368; stroke-width: 1.6; marker-end: url(#head); }}
.name {{ font-size: 17px; font-weight: bold; text-anchor: middle; fill: #202124; }}
.about {{ font-size: 12.5px; text-anchor: middle; fill: #3c4043; }}
.package {{ font-size: 20px; font-weight: bold; fill: #5f6368; }}
</style>
<defs><marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7"
orient="auto"><path d="M0 0L10 5L0 10z" fill="#5f6368"/></marker></defs>
<rect width="{width}" height="{height}" rx="12" fill="white" stroke="none"/>"""


def main() -> None:
    """Write docs/rooms.svg."""
    rooms = find_rooms()
    (ROOT / "docs" / "rooms.svg").write_text(draw(rooms, find_edges(rooms)))


if __name__ == "__main__":
    main()
