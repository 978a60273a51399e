"""Define what all errors of the kit have in common: one printable sentence each."""

import os
import re
import textwrap
import traceback

#: An environment variable: set to 1, a notebook shows the kit's errors with their tracebacks.
DEBUG = "DREAMBOOTH_DEBUG"


class OneSentence(BaseException):
    """An exception that a notebook shows as its sentence alone, without a traceback."""

    def _render_traceback_(self) -> list[str]:  # IPython asks an exception for this
        if os.environ.get(DEBUG):
            return traceback.format_exception(self)
        # A notebook would break long lines within words.
        lines = textwrap.fill(str(self), 100, break_long_words=False, break_on_hyphens=False)
        return [f"\x1b[31m{lines}\x1b[0m"]  # in red, as a notebook shows a terminal's colours


class KitError(OneSentence, Exception):
    """The base of the kit's errors: a sentence that says what is wrong, where, and what to do.

    The command line and the notebooks show the sentence without a traceback. Names from files and
    users may be in it, so it is made printable.
    """

    def __str__(self) -> str:
        return printable(str(self.args[0]) if len(self.args) == 1 else super().__str__())


class InputError(KitError, ValueError):
    """A function was given what it cannot use; the message says what to give."""


def one_line(error: BaseException) -> str:
    """Return an error as one line: the sentence of the kit's own, or another's type and message."""
    name = "" if isinstance(error, OneSentence) else type(error).__name__
    message = printable(str(error)).strip()
    return f"{name}: {message}" if name and message else name or message


def printable(text: str) -> str:
    """Return text as one line: white space becomes a space, other control characters are escaped.

    Half of a character, as in file names that are not UTF-8, is escaped too.
    """
    text = re.sub(r"[ \t\r\n]+", " ", text)
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
