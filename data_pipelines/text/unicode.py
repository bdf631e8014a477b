"""Text that can be written to a file, whatever it came with."""


def well_formed(text: str) -> str:
    r"""Replace half pairs of UTF-16 (a cut emoji, a byte that was no UTF-8) by question marks.

    >>> well_formed("a \ud83d dog"), well_formed("a 🐶")
    ('a ? dog', 'a 🐶')
    """
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")
