"""Make docstrings into Markdown for the site: fences around code, no accidental links.

A griffe extension; mkdocs.yml names it.
"""

import re

import griffe

CODE = re.compile(
    r"((?:^(?:>>> |vlmae |python ).*\n?)(?:^(?!\s*$).*\n?)*"  # a paragraph of doctests or commands
    r"|(?<=\n\n)(?:^ {4}.*\n?)+)",  # an indented paragraph
    re.MULTILINE,
)


def as_markdown(docstring: str) -> str:
    """Fence doctests and commands, and escape brackets outside code.

    Brackets side by side, as in "[CLS] [PAD]", would be a link.
    """
    parts = CODE.split(docstring)
    parts[::2] = map(escape, parts[::2])
    for i, code in enumerate(parts[1::2]):
        if not code.startswith(" "):  # indented paragraphs are code to Markdown as they are
            language = "pycon" if code.startswith(">>>") else "bash"
            parts[2 * i + 1] = f"```{language}\n{code.rstrip()}\n```\n"
    return "".join(parts)


def escape(text: str) -> str:
    """Escape opening brackets, but not in inline code."""
    pieces = text.split("`")
    pieces[::2] = [piece.replace("[", r"\[") for piece in pieces[::2]]
    return "`".join(pieces)


class SiteDocstrings(griffe.Extension):
    """Rewriter of every docstring once it is loaded."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        """Rewrite the docstring of a module, class, function or attribute."""
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value)
