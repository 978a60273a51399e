"""Define what all errors of the kit have in common: one printable sentence each."""

import re


class KitError(Exception):
    """The base of the kit's errors: a sentence that says what is wrong, where, and what to do.

    The command line and the notebooks show the sentence without a traceback. Names from files and
    users may be in it, so it is made printable.
    """

    def __str__(self) -> str:
        return printable(str(self.args[0]) if len(self.args) == 1 else super().__str__())


def printable(text: str) -> str:
    """Return text as one line: white space becomes a space, other control characters are escaped.

    Half of a character, as in file names that are not UTF-8, is escaped too.
    """
    text = re.sub(r"[ \t\r\n]+", " ", text)
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
