"""Of files: what pins a download and tells a changed file."""

import hashlib
from pathlib import Path


def sha256_of(path: Path) -> str:
    """SHA-256 of a file as 64 hex digits (ours)."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
