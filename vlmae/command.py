"""A function as a command line, for the tools that run as `python -m vlmae.NAME`."""

import sys
from collections.abc import Callable


def run_command(function: Callable) -> None:
    """Calls a function with the command line as its arguments; those without a default come first.

    What the user can mend (ValueError, FileNotFoundError) ends with one line on stderr and exit
    code 1.
    """
    import tyro

    try:
        tyro.cli(function, config=(tyro.conf.PositionalRequiredArgs,))
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
