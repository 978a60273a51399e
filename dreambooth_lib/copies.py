"""Copying to and from a place that may fail at any moment, such as a mounted drive."""

import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

WAITS = (0.5, 2.0)  #: seconds before an operation that failed is tried again

#: Name, size in bytes and time in nanoseconds of each file of a folder; of a file itself, as ".".
Stamp = list[list[Any]]


def again(operation: Callable[..., T], *given: Any, patient: bool = True) -> T:
    """Return what the operation gives; if ``patient``, only a third ``OSError`` is raised."""
    for wait in WAITS if patient else ():
        try:
            return operation(*given)
        except OSError:
            time.sleep(wait)
    return operation(*given)


def shown(folder: Path) -> list[Path]:
    """Return all files in a folder, relative to it, but hidden ones, such as half-written ones."""
    files = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    return [file for file in files if not any(part.startswith(".") for part in file.parts)]


def stamp_of(source: Path) -> Stamp:
    """Return what tells whether a copy of a file or folder is of what it is now."""
    names = shown(source) if source.is_dir() else [Path()]
    stats = [(name.as_posix(), (source / name).stat()) for name in names]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]


def copy(source: Path, place: Path, ways: Mapping[str, Callable[[Path, Path], None]]) -> None:
    """Copy a file or a folder so that it appears at ``place`` when it is whole.

    ``ways`` says how a folder's files of a certain name are copied; else by :func:`copy_file`.
    """
    from dreambooth_lib.state import replacing_folder

    if not source.is_dir():
        copy_file(source, place)
        return
    with replacing_folder(place) as partial:
        for name in shown(source):
            ways.get(name.name, copy_file)(source / name, partial / name)


def copy_file(source: Path, place: Path) -> None:
    """Copy a file of any size, whatever the free memory; it appears at ``place`` when whole."""
    place.parent.mkdir(parents=True, exist_ok=True)
    partial = place.with_name(f".{place.name}.partial")
    shutil.copyfile(source, partial)
    if partial.stat().st_size != source.stat().st_size:
        raise OSError(f"{place} was cut short")
    partial.replace(place)
