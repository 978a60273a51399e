"""Back up a run while it trains, on a drive that may be slow, fail or hang."""

import os
import time
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from dreambooth_lib.core import background
from dreambooth_lib.core.user_text import short_path
from dreambooth_lib.notebook.drive_backup import backup
from dreambooth_lib.notebook.drive_restore import unique_name
from dreambooth_lib.notebook.drive_state import own_identity, read_identity
from dreambooth_lib.training.runs import Run


@dataclass(frozen=True)
class _Copying:
    """A copy that goes on in the background, whose it is, and when it began."""

    backup: "Backup"
    result: "Future[str | None]"
    began: float

    @property
    def is_over(self) -> bool:
        """Return whether there is nothing left to copy from, or nowhere to copy it to."""
        complete = self.result.done() and self.result.result() is None
        unmounted = complete and not self.backup.folder.parent.exists()
        return unmounted or not (self.backup.run.folder / "config.toml").exists()


#: By the backup's folder: a cell that is run again must not copy to it a second time.
_under_way: dict[str, _Copying] = {}


class Backup:
    """Backs up a run to ``folder`` in the background, as :func:`.drive_backup.backup` does.

    Call :meth:`save` as often as you like in the training loop, and :meth:`finish` after it.
    """

    def __init__(self, run: Run, folder: str | Path, limit: float = background.FILE_LIMIT):
        self.run, self.folder, self.limit = run, Path(folder), limit
        self._key, self._told = os.path.abspath(folder), ""

    def save(self) -> str | None:
        """Begin to copy what is new, and return at once; return what to tell the user, or None.

        While an earlier copy goes on, nothing is begun: the next call copies what this one left.
        What went wrong is told once, until it changes or a copy succeeds.
        """
        earlier = _under_way.get(self._key)
        if earlier is None:
            self._begin()
            return None
        if not earlier.result.done():
            is_late = time.monotonic() - earlier.began > self.limit
            return self._tell_once(self._late()) if is_late else None
        self._begin()
        return self._tell_once(earlier.result.result())

    def finish(self) -> str | None:
        """Copy all that is left, and wait for it; return None, or a sentence on what went wrong."""
        try:
            if (earlier := _under_way.get(self._key)) is not None:
                earlier.result.result(max(0.0, earlier.began + self.limit - time.monotonic()))
            return self._begin().result(self.limit)
        except TimeoutError:
            return self._late()

    def _begin(self) -> "Future[str | None]":
        result = background.start(backup, self.run, self.folder)
        _under_way[self._key] = _Copying(self, result, time.monotonic())
        return result

    def _late(self) -> str:
        return (
            f"The backup of {short_path(self.run.folder)} to {self.folder} has not ended within "
            f"{self.limit / 60:.0f} minutes; it goes on in the background, but check that the "
            "drive answers, and back up again later."
        )

    def _tell_once(self, problem: str | None) -> str | None:
        is_new = problem != self._told
        self._told = problem or ""
        return problem if problem and is_new else None


def place_on(drive: str | Path, run: Run) -> Path:
    """Return the folder on a drive that backs up a run.

    A new one has the run's name, with a number if the drive has a folder or a zip of that name.
    """
    drive, name, own = Path(drive), run.folder.name, own_identity(run)

    def find() -> Path | None:
        places = [drive / name, *sorted(drive.glob("*"))]
        return next((place for place in places if read_identity(place) == own), None)

    try:
        found = background.call(find, place=drive, limit=background.ANSWER_LIMIT)
    except OSError:  # which the backup tells
        return drive / name
    return found or drive / unique_name(name, drive)


def finish_all() -> str | None:
    """Finish every backup of this process as :meth:`Backup.finish` does; return what went wrong.

    Passes over a run whose folder is gone, and a complete backup whose drive is.
    """
    left = [copying for copying in list(_under_way.values()) if not copying.is_over]
    problems = [copying.backup.finish() for copying in left]
    return next((problem for problem in problems if problem), None)
