"""Say which cell of a notebook to run first, where cells are run out of order."""

from collections.abc import Mapping
from typing import Any

from dreambooth_lib.core.errors import KitError


class OutOfOrder(KitError, NameError):
    """A cell was run before one that it needs."""


def check(names: Mapping[str, Any], **sections: str) -> None:
    """Raise :class:`OutOfOrder` unless a notebook has all that a cell needs.

    ``names`` are the notebook's ``globals()``. ``sections`` name, for each variable that the cell
    needs, the section whose cells set it, the first section first.
    """
    for variable, section in sections.items():
        if variable not in names:
            restarted = (
                ""
                if "run" in names
                else " After a restart, run all cells above this one; to open a finished run, "
                "first set RESUME to its name in quotes."
            )
            raise OutOfOrder(
                f'this cell needs what section "{section}" defines; run its cells first.{restarted}'
            )
