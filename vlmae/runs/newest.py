"""Newest values of a growing `metrics.jsonl`: reads what was added, and parses little of it."""

import os
from pathlib import Path

from vlmae.runs.metric_writer import parse_line

_DIGITS = b"0123456789.+-eE"  # what numbers consist of


class NewestMetrics:
    """Newest value of each metric of a run; reading again reads only lines that were added."""

    def __init__(self, workdir: Path):
        """Remember the file; it need not exist yet."""
        self.path = workdir / "metrics.jsonl"
        self._forget(0)

    def _forget(self, inode: int) -> None:
        self.inode, self.offset = inode, 0
        self.step = 0
        self.values: dict[str, float] = {}

    def read(self) -> tuple[int, dict[str, float]]:
        """Return the last step and the newest value of each metric, under today's names.

        A last line that is not yet whole is left for the next time.

        Raises:
          UserError: a line is damaged; names the file.
        """
        if not self.path.exists():
            return 0, {}
        with self.path.open("rb") as file:
            inode = os.fstat(file.fileno()).st_ino
            if inode != self.inode:  # a continued run has replaced the file
                self._forget(inode)
            file.seek(self.offset)
            added = file.read()
        whole = added[: added.rfind(b"}\n") + 2]
        found = newest_values(whole, str(self.path))
        self.offset += len(whole)
        self.step = max(self.step, int(found.pop("step", 0)))
        self.values |= found
        return self.step, self.values


def newest_values(text: bytes, place: str) -> dict[str, float]:
    """Find the newest value of each name in lines of JSON objects.

    Of lines that differ in their numbers alone, only the last one is parsed: a run repeats a few
    lists of names thousands of times.

    Raises:
      UserError: one of these is damaged; the message begins with `place`.
    """
    seen: set[bytes] = set()
    values: dict[str, float] = {}
    for line in reversed(text.splitlines()):
        names = line.translate(None, _DIGITS)
        if names not in seen and line.endswith(b"}"):
            seen.add(names)
            values = parse_line(line, place) | values
    return {name: float(value) for name, value in values.items()}
