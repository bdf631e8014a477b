"""Imports between rooms go down, never up, lazy ones too (docs/architecture.md)."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
FLOORS = {  # package -> its rooms, from the top floor to the bottom
    "vlmae": (
        *("cli", "search", "evaluation", "figures", "training", "launching", "export"),
        *("runs", "weights", "models", "parallel", "config", "ops"),
    ),
    "data_pipelines": ("loading", "storage", "offline", "text", "media", "schema"),
}
PACKAGES = ("experiments", "vlmae", "data_pipelines")  # from the top to the bottom


def module_name(path: Path) -> str:
    """vlmae/ops/losses.py -> vlmae.ops.losses."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(p): p for package in PACKAGES for p in (ROOT / package).rglob("*.py")}


def imports_of(path: Path) -> set[str]:
    """The modules of ours that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (names & MODULES.keys()) or {node.module}
    return found & MODULES.keys()


def room_of(module: str) -> tuple[str, str]:
    """vlmae.ops.losses -> ("vlmae", "ops")."""
    package, _, rest = module.partition(".")
    return package, rest.split(".")[0]


def is_down(user: str, used: str) -> bool:
    """True if one module may import the other: within a room, or from a lower one."""
    (package, room), (other_package, other_room) = room_of(user), room_of(used)
    if package != other_package:
        return PACKAGES.index(package) < PACKAGES.index(other_package)
    floors = FLOORS.get(package, ())
    if room not in floors or other_room not in floors:  # experiments; vlmae/__init__.py
        return True
    return floors.index(room) <= floors.index(other_room)


def test_imports_go_down():
    upward = [f"{a} -> {b}" for a, p in MODULES.items() for b in imports_of(p) if not is_down(a, b)]
    assert not upward


def test_every_room_has_a_floor():
    for package, floors in FLOORS.items():
        rooms = {path.parent.name for path in (ROOT / package).glob("*/__init__.py")}
        assert rooms == set(floors)


def test_no_cycles():
    graph, done = {name: imports_of(path) for name, path in MODULES.items()}, set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail[trail.index(name) :], name])
        if name not in done:
            for used in sorted(graph[name] - {name}):
                visit(used, (*trail, name))
            done.add(name)

    for name in sorted(graph):
        visit(name, ())
