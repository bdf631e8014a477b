"""Mistakes of the user's as exceptions, and the checks that raise them."""

import re
from pathlib import PurePath

# Control characters but tab and line feed, marks that turn the direction of writing, and bytes that
# were no UTF-8: in a terminal they move the cursor, hide text or fail.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def visible(text: str) -> str:
    r"""Escape what a terminal would obey in place of showing it, in text of others.

    >>> visible("a\x1b[2J\u202egpj.mp4")
    'a\\x1b[2J\\u202egpj.mp4'
    """
    return _INVISIBLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def first_line(error: BaseException) -> str:
    r"""Return the first line of an error's message, or the name of its class if it has none.

    >>> first_line(ValueError("no PNG\nat byte 3")), first_line(IndexError())
    ('no PNG', 'IndexError')
    """
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class UserError(ValueError):
    """Mistake of the user's: the command line shows it as one line, without a traceback."""

    def __str__(self) -> str:
        """Return the message; names of files in it may hold any characters."""
        return visible(super().__str__())


class MissingError(UserError, FileNotFoundError):
    """A file or folder that the user named, or has to make first, does not exist."""


def check(condition: bool, message: str) -> None:
    """Raise UserError with the message unless the condition holds."""
    if not condition:
        raise UserError(message)


def check_folder_name(name: str, flag: str) -> None:
    """Raise UserError, naming the flag, unless `name` is that of a folder within another one."""
    path = PurePath(name)
    inside = name.strip() and not path.is_absolute() and not {"..", "."} & {*name.split("/")}
    good = inside and name.isprintable() and len(name) <= 200
    check(bool(good), f"{flag} must be the name of a folder, without ..: not {name[:100]!r}")
