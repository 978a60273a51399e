"""Write files and folders whole or not at all, and copy them to drives that may fail."""

import io
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import get_native_id
from typing import TYPE_CHECKING, Any, TypeVar

from dreambooth_lib.core.disk import DiskError, explain_disk_errors
from dreambooth_lib.core.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

T = TypeVar("T")

WAITS = (0.5, 2.0)  #: seconds to wait before each retry

#: Name, size in bytes and mtime in nanoseconds of each file in a folder; a single file is ".".
Fingerprint = list[list[Any]]


def retry(operation: Callable[..., T], *given: Any, patient: bool = True) -> T:
    """Call the operation and return its result; if ``patient``, retry twice after an OSError."""
    for wait in WAITS if patient else ():
        try:
            return operation(*given)
        except OSError:
            time.sleep(wait)
    return operation(*given)


def visible_files(folder: Path) -> list[Path]:
    """List all files in a folder, relative to it; hidden and half-written ones are left out."""
    files = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    return [file for file in files if not any(part.startswith(".") for part in file.parts)]


def fingerprint(source: Path) -> Fingerprint:
    """Describe a file or folder so that a copy can be recognised as current or outdated."""
    names = visible_files(source) if source.is_dir() else [Path()]
    stats = [(name.as_posix(), (source / name).stat()) for name in names]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]


def copy_file(source: Path, place: Path, size: int | None = None) -> None:
    """Copy a file of any size; it appears at ``place`` only once it is complete.

    Of a file that may grow meanwhile, copy the first ``size`` bytes.
    """
    with replacing_file(place) as partial:
        # A drive may hang from here on, and the folder of ``place`` be gone when it goes on.
        size = source.stat().st_size if size is None else size
        shutil.copyfile(source, partial)
        copied = partial.stat().st_size
        if copied < size:
            raise DiskError(f"{place} was cut short; check its disk and try again.")
        if copied > size:
            os.truncate(partial, size)


@contextmanager
def replacing_folder(folder: str | Path) -> Iterator[Path]:
    """Yield a temporary folder to fill; it replaces ``folder`` when the block succeeds.

    On an exception the temporary folder is removed and ``folder`` stays as it was. Raises
    :class:`DiskError` where the disk is full, read-only or gone.
    """
    folder = Path(folder)
    partial, old = folder.with_name(f".{folder.name}.partial"), _old(folder)
    with explain_disk_errors(folder):
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


def remove_partials(folder: Path) -> None:
    """Remove the files in a folder that processes were writing when they were killed."""
    import psutil

    for partial in folder.rglob(".*.partial"):
        process = partial.name.split(".")[-2]
        if partial.is_file() and not (process.isdigit() and psutil.pid_exists(int(process))):
            partial.unlink(missing_ok=True)


def recover_folder(folder: Path) -> None:
    """Restore the older folder if the process was killed between the two renames."""
    if _old(folder).exists() and not folder.exists():
        _old(folder).rename(folder)


def _old(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


@contextmanager
def replacing_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path to write; it replaces ``path`` when the block succeeds.

    On an exception the temporary file is removed and ``path`` stays as it was. Raises
    :class:`DiskError` where the disk is full, read-only or gone.
    """
    path = Path(path)
    # Another process may write the same file, and so may a thread that a drive has held up.
    partial = path.with_name(f".{path.name}.{get_native_id()}.{os.getpid()}.partial")
    with explain_disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            _flush(partial)
            partial.replace(path)
        finally:
            with suppress(OSError):  # the disk's error is the one to tell
                partial.unlink(missing_ok=True)


def replace_file(path: str | Path, data: bytes) -> None:
    """Write ``data`` to ``path``, completely or not at all."""
    with replacing_file(path) as partial:
        partial.write_bytes(data)


def append_line(path: Path, line: str) -> None:
    """Append a line to a text file. Raises :class:`DiskError` where that is not possible."""
    with explain_disk_errors(path), path.open("a+b") as file:
        # A killed process may have left half a line.
        half = file.tell() > 0 and file.seek(-1, os.SEEK_END) >= 0 and file.read(1) != b"\n"
        file.write(b"\n" * half + f"{line}\n".encode())


def save_png(image: "Image.Image", path: str | Path) -> None:
    """Write an image as PNG to ``path``, completely or not at all."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    replace_file(path, buffer.getvalue())


def open_image(path: Path) -> "Image.Image":
    """Open an image file as RGB. Raises :class:`InputError` for one that is damaged."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"the image {path} is damaged; delete it and make it again.") from error


def _flush(path: Path) -> None:
    # Windows flushes no file that is open for reading.
    descriptor = os.open(path, os.O_RDWR if os.access(path, os.W_OK) else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
