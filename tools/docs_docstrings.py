"""Read the kit's docstrings as Markdown; ``mkdocs.yml`` names this as an extension of griffe's.

They are written as Sphinx has it, with roles such as :class:`Path`, and some show a folder's
layout in columns.
"""

import re
from typing import Any

from griffe import Extension

_ROLE = re.compile(r":\w+:`[~.]?([^`]+)`")
_COLUMNS = re.compile(r"\S {2,}\S")


def as_markdown(text: str) -> str:
    """Return a docstring without roles, and with columns as a block of code."""
    paragraphs = re.split(r"\n{2,}", _ROLE.sub(r"`\1`", text))
    return "\n\n".join(
        "\n".join(f"    {line}" for line in lines)
        if all(map(_COLUMNS.search, lines := paragraph.splitlines()))
        else paragraph
        for paragraph in paragraphs
    )


class Docstrings(Extension):
    """Change the docstrings of a package once it is read, those of comments (``#:``) too."""

    def on_package(self, *, pkg: Any, **_: Any) -> None:
        if pkg.docstring:
            pkg.docstring.value = as_markdown(pkg.docstring.value)
        for member in pkg.members.values():
            if not member.is_alias:
                self.on_package(pkg=member)
