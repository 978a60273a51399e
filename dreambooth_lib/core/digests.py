"""Write digests of a folder's files beside them, and find files that have changed since."""

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import BinaryIO

from dreambooth_lib.core.files import replace_file, visible_files

DIGESTS = "digests.json"  #: in the folder: the digest of each file by its path in the folder


class DigestWriter:
    """Write to an open binary file, and digest the same bytes: the file need not be read again."""

    def __init__(self, file: BinaryIO):
        self._file, self._digest = file, hashlib.blake2b()

    def write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._digest.update(data)

    @property
    def digest(self) -> str:
        """Return the digest of what was written, as :func:`file_digest` does."""
        return self._digest.hexdigest()


def write_digests(folder: Path, known: Mapping[str, str] | None = None) -> None:
    """Write the digests of all files of a folder as they are now; ``known`` ones are not read."""
    known = known or {}
    digests = {
        name.as_posix(): known.get(name.as_posix()) or file_digest(folder / name)
        for name in visible_files(folder)
        if name.name != DIGESTS
    }
    replace_file(folder / DIGESTS, json.dumps(digests).encode())


def forget_digest(folder: Path, name: str) -> None:
    """Take a file, which is about to be deleted, off the folder's digests."""
    if digests := _read_digests(folder):
        digests.pop(name, None)
        replace_file(folder / DIGESTS, json.dumps(digests).encode())


def renew_digest(file: Path, before: str) -> None:
    """Note in its folder's digests that a file, whose digest was ``before``, was written anew.

    A file that had changed by then, or has no digest, stays as it is noted.
    """
    digests = _read_digests(file.parent)
    if digests and digests.get(file.name) == before:
        note_digest(file, file_digest(file))


def note_digest(file: Path, digest: str) -> None:
    """Note a file's digest in its folder's digests, if there are any."""
    if digests := _read_digests(file.parent):
        digests[file.name] = digest
        replace_file(file.parent / DIGESTS, json.dumps(digests).encode())


def changed_file(folder: Path, unread: Collection[str] = ()) -> str | None:
    """Return a file that is not as it was when the digests were written; None if all are.

    ``unread`` are files to leave out. A folder without digests has no changed file.
    """
    if not (folder / DIGESTS).exists():
        return None
    if (digests := _read_digests(folder)) is None:
        return DIGESTS
    read = {name: digest for name, digest in digests.items() if name not in unread}
    changed = (name for name, digest in read.items() if not _is_unchanged(folder, name, digest))
    return next(changed, None)


def _read_digests(folder: Path) -> dict[str, str] | None:
    """Return the digests by file; None where they are missing or damaged."""
    try:
        digests = json.loads((folder / DIGESTS).read_text())
    except (OSError, ValueError, RecursionError):
        return None
    return digests if isinstance(digests, dict) else None


def _is_unchanged(folder: Path, name: str, digest: str) -> bool:
    file = folder / name
    inside = file.is_relative_to(folder) and ".." not in Path(name).parts
    return inside and file.is_file() and file_digest(file) == digest


def file_digest(file: Path) -> str:
    """Return a file's BLAKE2b digest, as hexadecimal digits."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "blake2b").hexdigest()
