"""The one exception of this package."""

import contextlib
from collections.abc import Iterator


class DecodeError(ValueError):
    """Media that cannot be used; `reason` is a short phrase to count by, `detail` is free text."""

    def __init__(self, reason: str, detail: str = ""):
        """Join both to the message."""
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


# Mistakes of ours, or another version of a library: not what a damaged file leads to.
OURS = (TypeError, AttributeError, NameError)


@contextlib.contextmanager
def as_decode_errors(reason: str, but: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Raise whatever a library raises in the block as DecodeError, with the cause kept.

    For blocks that do nothing but read media: what a damaged file leads FFmpeg's bindings and
    Pillow to is not documented (IndexError, KeyError, MemoryError and more were seen), and one bad
    file of a million must not end a run. Errors of the types `but` stay what they are.
    """
    try:
        yield
    except (DecodeError, *but):
        raise
    except Exception as error:
        detail = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise DecodeError(reason, detail) from error
