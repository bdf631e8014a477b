"""Registries: the kinds that a config names, each with the thing that implements it."""

from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")


class Registry(dict[str, T]):
    """A dict from the name of a kind to its implementation; a name it lacks is an error.

    >>> SIDES = Registry("side", {"left": -1, "right": 1})
    >>> SIDES["up"]
    Traceback (most recent call last):
    ValueError: unknown side 'up'; known are left, right
    """

    def __init__(self, what: str, kinds: Mapping[str, T]):
        """Hold `kinds`; `what` names them in the error."""
        super().__init__(kinds)
        self.what = what

    def __missing__(self, name: str) -> T:
        """Raise ValueError, naming the known kinds."""
        # Never a default: a forgotten kind was once treated as another one, and trained something
        # else.
        raise ValueError(f"unknown {self.what} {name!r}; known are {', '.join(self)}")
