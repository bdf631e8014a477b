"""Writing files so that a kill never leaves half of one."""

from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Replaces a file at once: whenever the run is killed, the old text or the new one is there."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(text)
    part.replace(path)
