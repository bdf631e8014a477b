"""Damaged files: flipped bits, cuts, and JSON with other values, by a random generator."""

import json
import random
from pathlib import Path
from typing import Any

STRANGE = (
    *(None, True, -1, 2**70, 1.5, float("nan"), float("inf"), "", "x", "../../x", "\u0000\n\x1b"),
    *("\ud800", [], {}, [[]], [None], {"": {}}, ["a", 1], {"a": 1}, 10**400),
)


def damage(path: Path, rng: random.Random) -> None:
    """Flip a bit (as often as all others), cut, empty, remove, or zero a file."""
    content = bytearray(path.read_bytes())
    kind = rng.choice(("flip", "flip", "flip", "flip", "cut", "empty", "remove", "zero"))
    place = rng.randrange(len(content)) if content else 0
    if kind == "remove":
        path.unlink()
        return
    if kind == "flip" and content:
        content[place] ^= 1 << rng.randrange(8)
    elif kind == "zero":
        content[place : place + 64] = bytes(len(content[place : place + 64]))
    else:
        del content[place if kind == "cut" else 0 :]
    path.write_bytes(content)


def damage_json(text: str, rng: random.Random) -> bytes:
    """Change JSON, or JSON lines, in one place: another value, no value, a new field, nesting."""
    lines = text.splitlines() if text.count("\n{") else [text]
    number = rng.randrange(len(lines))
    value = json.loads(lines[number])
    kind = rng.random()
    if kind < 0.08:
        lines[number] = rng.choice(("[", '{"a":')) * 50_000
    elif kind < 0.2:
        lines[number] = json.dumps(rng.choice(STRANGE))
    else:
        lines[number] = json.dumps(_changed(value, rng))
    return "\n".join(lines).encode() + b"\n" * text.endswith("\n")


def _changed(value: Any, rng: random.Random) -> Any:
    """Change one place of a tree, at any depth."""
    inner = isinstance(value, dict | list) and len(value) and rng.random() < 0.8
    if not inner:
        return rng.choice(STRANGE)
    key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
    action = rng.random()
    copy = value.copy()
    if action < 0.15:
        del copy[key]
    elif action < 0.25 and isinstance(copy, dict):
        copy[rng.choice(("x", "", "../x"))] = rng.choice(STRANGE)
    else:
        copy[key] = _changed(copy[key], rng)
    return copy
