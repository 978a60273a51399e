"""Write JSON objects with a checksum, and notice damage when they are read.

A file holds one object, or one on each line (``.jsonl``). An object without a checksum is taken as
it is.
"""

import json
import zlib
from pathlib import Path
from typing import Any, NamedTuple

from dreambooth_lib.core.disk import DiskError
from dreambooth_lib.core.files import append_line, replace_file

_CHECKSUM = "crc32"  #: the key that is added to each object


class Rows(NamedTuple):
    """The sound objects of a ``.jsonl`` file, and how many lines were damaged."""

    rows: list[dict[str, Any]]
    damaged: int


def read_object(path: Path) -> dict[str, Any] | None:
    """Return a file's object; None where the file is missing or damaged."""
    try:
        return _parse(path.read_bytes())
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        return None
    except OSError as error:
        raise _unreadable(path, error) from error


def write_object(path: Path, value: dict[str, Any]) -> None:
    """Write an object to a file, completely or not at all."""
    replace_file(path, _format(value).encode())


def read_rows(path: Path) -> Rows:
    """Return the objects of a file's lines, oldest first. A half-written last line is no damage."""
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        return Rows([], 0)
    except OSError as error:
        raise _unreadable(path, error) from error
    rows = [row for row in map(_parse, lines) if row is not None]
    return Rows(rows, len(lines) - len(rows))


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Append an object as a line."""
    append_line(path, _format(row))


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write objects as lines, completely or not at all."""
    replace_file(path, "".join(f"{_format(row)}\n" for row in rows).encode())


def _unreadable(path: Path, error: OSError) -> DiskError:
    return DiskError(f"{path} cannot be read ({error.strerror}); replace or delete it.")


def _format(value: dict[str, Any]) -> str:
    return json.dumps(value | {_CHECKSUM: _checksum(value)})


def _parse(text: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict):
        return None
    found = value.pop(_CHECKSUM, None)
    return value if found in (None, _checksum(value)) else None


def _checksum(value: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(value).encode())
