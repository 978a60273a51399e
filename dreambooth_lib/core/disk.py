"""Turn what a full, read-only or missing disk raises into one sentence."""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dreambooth_lib.core.errors import KitError


class DiskError(KitError, OSError):
    """A file or folder that cannot be written: its disk is full, read-only or gone."""


def require_room(folder: Path, size: int) -> None:
    """Raise :class:`DiskError` if the disk of ``folder`` has less than ``size`` bytes free."""
    if (free := _free_bytes(folder)) < size:
        raise DiskError(
            f"{folder} needs {format_bytes(size)}, and its disk has {format_bytes(free)} free; "
            "free some space there and try again."
        )


@contextmanager
def explain_disk_errors(path: str | Path) -> Iterator[None]:
    """Raise :class:`DiskError` for an error of the disk while ``path`` is written.

    Errors about other files pass through, and so do those that do not come from the disk. Of
    nested blocks the outermost path is named.
    """
    try:
        yield
    except Exception as error:
        number = _errno_of(error)
        if number is None or _is_elsewhere(error, Path(path)):
            raise
        told = DiskError(_sentence(Path(path), number))
        told.errno = number
        raise told from error


def _errno_of(error: Exception) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    # The errors of safetensors, which is written in Rust, end with the number.
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None


def _is_elsewhere(error: Exception, path: Path) -> bool:
    """Return whether an error is about a file neither in the folder of ``path`` nor above it."""
    name = getattr(error, "filename", None)
    if not isinstance(name, str | os.PathLike) or _errno_of(error) == errno.ENOSPC:
        return False
    place, folder = Path(name).absolute(), path.parent.absolute()
    return not (place.is_relative_to(folder) or folder.is_relative_to(place))


def _sentence(path: Path, number: int) -> str:
    if number in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"{path} could not be written, because its disk is full "
            f"({format_bytes(_free_bytes(path))} free); free some space there and try again."
        )
    if number in (errno.EROFS, errno.EACCES, errno.EPERM):
        return (
            f"{path} could not be written ({os.strerror(number)}); choose a folder that you may "
            "write to."
        )
    return (
        f"{path} could not be written ({os.strerror(number)}); check that its folder is still "
        "there, and try again."
    )


def _free_bytes(path: Path) -> int:
    """Return the bytes free on the disk of a path, which may not exist yet."""
    path = path.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free


def format_bytes(count: int) -> str:
    """Format a number of bytes: "3.7 MB", "57 MB", "4.3 GB"."""
    unit, scale = ("GB", 1e9) if count >= 1e9 else ("MB", 1e6)
    return f"{count / scale:.{0 if count >= 10 * scale else 1}f} {unit}"
