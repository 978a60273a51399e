"""Write files and folders whole or not at all, and copy them to drives that may fail."""

import io
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from PIL import Image

T = TypeVar("T")


WAITS = (0.5, 2.0)  #: seconds before an operation that failed is tried again


#: Name, size in bytes and time in nanoseconds of each file of a folder; of a file itself, as ".".
Fingerprint = list[list[Any]]


def retry(operation: Callable[..., T], *given: Any, patient: bool = True) -> T:
    """Return what the operation gives; if ``patient``, only a third ``OSError`` is raised."""
    for wait in WAITS if patient else ():
        try:
            return operation(*given)
        except OSError:
            time.sleep(wait)
    return operation(*given)


def visible_files(folder: Path) -> list[Path]:
    """Return all files in a folder, relative to it, but hidden ones, such as half-written ones."""
    files = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    return [file for file in files if not any(part.startswith(".") for part in file.parts)]


def fingerprint(source: Path) -> Fingerprint:
    """Return what tells whether a copy of a file or folder is of what it is now."""
    names = visible_files(source) if source.is_dir() else [Path()]
    stats = [(name.as_posix(), (source / name).stat()) for name in names]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]


def copy(source: Path, place: Path, ways: Mapping[str, Callable[[Path, Path], None]]) -> None:
    """Copy a file or a folder so that it appears at ``place`` when it is whole.

    ``ways`` says how a folder's files of a certain name are copied; else by :func:`copy_file`.
    """
    pass

    if not source.is_dir():
        copy_file(source, place)
        return
    with replacing_folder(place) as partial:
        for name in visible_files(source):
            ways.get(name.name, copy_file)(source / name, partial / name)


def copy_file(source: Path, place: Path) -> None:
    """Copy a file of any size, whatever the free memory; it appears at ``place`` when whole."""
    place.parent.mkdir(parents=True, exist_ok=True)
    partial = place.with_name(f".{place.name}.partial")
    shutil.copyfile(source, partial)
    if partial.stat().st_size != source.stat().st_size:
        raise OSError(f"{place} was cut short")
    partial.replace(place)


@contextmanager
def replacing_folder(folder: str | Path) -> Iterator[Path]:
    """``with replacing_folder(path) as partial``: fill ``partial``; it becomes ``path`` on success.

    On an exception the partial folder is removed and ``path`` stays as it was.
    """
    folder = Path(folder)
    partial, old = folder.with_name(f".{folder.name}.partial"), _old(folder)
    recover_folder(folder)
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in partial.rglob("*"):
            if path.is_file():
                _flush(path)
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def recover_folder(folder: Path) -> None:
    """Put an older folder back where a kill came between the two renames of its replacement."""
    if _old(folder).exists() and not folder.exists():
        _old(folder).rename(folder)


def _old(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


@contextmanager
def replacing_file(path: str | Path) -> Iterator[Path]:
    """``with replacing_file(path) as partial``: write ``partial``; it becomes ``path`` on success.

    On an exception the partial file is removed and ``path`` stays as it was.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")  # others may write it too
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        _flush(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def replace_file(path: str | Path, data: bytes) -> None:
    """Write ``data`` to ``path`` so that the file is whole or, on failure, as it was before."""
    with replacing_file(path) as partial:
        partial.write_bytes(data)


def save_png(image: "Image.Image", path: str | Path) -> None:
    """Write a picture as PNG to ``path``, whole or not at all."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    replace_file(path, buffer.getvalue())


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
