"""List a folder's or zip's files, or one photo; check names and sizes before any is read."""

import hashlib
import re
import stat
import unicodedata
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from dreambooth_lib.core.disk import format_bytes
from dreambooth_lib.core.errors import KitError

MAX_ZIP_BYTES = 2 * 2**30  #: of all members of a zip, unpacked
MAX_ZIP_RATIO = 100  #: unpacked bytes per byte of the zip, for zips above 100 MiB unpacked

#: What photos may be called.
PHOTO_SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".bmp",
                  ".gif", ".tif", ".tiff", ".heic", ".heif", ".hif", ".avif", ".avifs", ".jxl",
                  ".jp2", ".j2k", ".qoi"}  # fmt: skip
#: Of cameras' raw photos: many begin as a TIFF does, which has a small preview only.
RAW_SUFFIXES = {".dng", ".cr2", ".cr3", ".crw", ".nef", ".nrw", ".arw", ".sr2", ".srf", ".orf",
                ".rw2", ".rwl", ".raw", ".raf", ".pef", ".srw", ".3fr", ".fff", ".iiq", ".kdc",
                ".dcr", ".mrw", ".mef", ".mos", ".erf", ".x3f", ".gpr"}  # fmt: skip
#: Of captions, and of other texts, which are never opened.
CAPTION_SUFFIXES = {".txt", ".caption", ".json", ".jsonl", ".csv"}
TEXT_SUFFIXES = CAPTION_SUFFIXES | {".md", ".xml", ".url", ".ini"}
TABLES = ("metadata.jsonl", "metadata.csv")  #: of captions, as ``datasets`` reads them

MASK_FOLDER = "masks"  #: in the photos' folder

_IGNORED = {"__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"}


class DataError(KitError, ValueError):
    """Photos or tables that cannot be used; the message names the file and says what to do."""


@dataclass(frozen=True)
class SourceFile:
    """A file of a folder, or a member of an open zip."""

    name: str
    folder: Path  #: or the zip
    size: int  #: in bytes, by the folder or the zip's table
    archive: zipfile.ZipFile | None = None
    member: zipfile.ZipInfo | None = None

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.name).suffix.lower()

    def __str__(self) -> str:
        return f"'{self.name}' in {self.folder}"

    def _open(self) -> IO[bytes]:
        if self.archive is None or self.member is None:
            return (self.folder / self.name).open("rb")
        return self.archive.open(self.member)

    def head(self, size: int = 16) -> bytes:
        """Read the first bytes. Raises :class:`DataError` if the file cannot be read."""
        try:
            with self._open() as file:
                return file.read(size)
        except Exception as error:  # of a zip, nearly any kind
            reason = str(error) or type(error).__name__
            raise DataError(f"{self} cannot be read ({reason}); replace or remove it.") from error

    def read(self, limit: int, what: str) -> bytes:
        """Read all bytes. Raises :class:`DataError` as :meth:`head` does, and above ``limit``.

        ``what`` the file is, such as "a caption", goes into the message.
        """
        size = self.size
        if size <= limit:
            data = self.head(limit + 1)
            if (size := len(data)) <= limit:
                return data
        raise DataError(
            f"{self} has {format_bytes(size)}, too much for {what}; make it smaller or remove it."
        )

    def read_again(self, digest: bytes, limit: int) -> bytes:
        """Read the bytes again. Raises :class:`DataError` unless their sha256 is ``digest``."""
        data = self.read(limit, "a photo")
        if hashlib.sha256(data).digest() != digest:
            raise DataError(f"{self} has changed since it was read; start again with it.")
        return data


def list_files(path: Path) -> list[SourceFile]:
    """List a folder's files, or a zip's in its one folder, sorted by name; or a photo's own file.

    Hidden and system files are left out. Raises :class:`DataError` for a path that is none of them,
    for broken links, and for zips that are damaged, encrypted, unpack to too much or reach outside.
    """
    try:
        if path.is_dir():
            files = [
                SourceFile(p.name, path, p.stat().st_size) for p in path.iterdir() if _is_wanted(p)
            ]
        elif path.is_file() and path.suffix.lower() in PHOTO_SUFFIXES:
            files = [SourceFile(path.name, path.parent, path.stat().st_size)]
        elif path.exists():
            files = _zip_members(path)
        else:
            raise DataError(f"there is no folder or zip {path}; check the path.")
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error}); check its permissions.") from error
    return sorted(files, key=lambda file: file.name)


def list_masks(path: Path) -> list[SourceFile]:
    """List what is in the folder ``masks``, of any case, beside a folder's or zip's photos."""
    if path.is_dir():
        folders = sorted(p for p in path.iterdir() if p.is_dir() and p.name.lower() == MASK_FOLDER)
        return [file for folder in folders for file in list_files(folder)]
    return [] if path.suffix.lower() in PHOTO_SUFFIXES else _zip_members(path, masks=True)


def folded(name: str) -> str:
    """Return a file's name as it is compared: in lower case, letters with accents composed.

    macOS takes them apart, so that one name has two spellings in a zip and in a table.
    """
    return unicodedata.normalize("NFC", name).lower()


def folders_with_photos(path: Path) -> list[str]:
    """Return the folders in a folder that have photos, one or two levels below it."""
    if not path.is_dir():
        return []
    files = (file for pattern in ("*/*", "*/*/*") for file in path.glob(pattern))
    shown = [file.relative_to(path) for file in files if file.suffix.lower() in PHOTO_SUFFIXES]
    visible = [p.parent for p in shown if not any(map(_is_ignored, p.parts))]
    return sorted({folder.as_posix() for folder in visible})


def _is_ignored(name: str) -> bool:
    return name.startswith(".") or name.lower() in _IGNORED


def _is_wanted(path: Path) -> bool:
    if _is_ignored(path.name) or path.is_dir():
        return False
    if not path.is_file():
        raise DataError(f"{path} is a broken link or not a regular file; remove it.")
    return True


def _zip_members(path: Path, masks: bool = False) -> list[SourceFile]:
    try:
        archive = zipfile.ZipFile(path)
    except OSError:
        raise
    except Exception as error:  # a damaged table of contents raises many kinds
        raise DataError(
            f"{path} is not a valid zip ({error}); give a folder or a zip of photos."
        ) from error
    members = _checked_members(path, archive)
    total, packed = sum(i.file_size for i in archive.infolist()), path.stat().st_size
    if total > MAX_ZIP_BYTES or total > MAX_ZIP_RATIO * max(packed, 2**20):
        raise DataError(
            f"{path} unpacks from {packed / 2**20:.1f} MiB to {total / 2**20:.0f} MiB, too much "
            "for photos; pack JPEG or PNG files only."
        )
    photos = [m for m in members if m.suffix.lower() in PHOTO_SUFFIXES or m.name in TABLES]
    others = [m for m in members if m.suffix.lower() not in TEXT_SUFFIXES]
    found = {m.parent for m in photos or others}
    of_masks = {f for f in found if f.name.lower() == MASK_FOLDER}
    if of_masks == found:  # whose photos are of masks
        of_masks = set()
    folders = sorted(str(f) for f in (of_masks if masks else found - of_masks))
    if len(folders) > 1 and not masks:
        raise DataError(f"{path} has files in several folders ({', '.join(folders)}); use one.")
    return [
        SourceFile(member.name, path, info.file_size, archive, info)
        for member, info in members.items()
        if str(member.parent) in folders
    ]


def _checked_members(path: Path, archive: zipfile.ZipFile) -> dict[PurePosixPath, zipfile.ZipInfo]:
    """Return a zip's visible files by path. Raises :class:`DataError` for harmful ones."""
    members: dict[PurePosixPath, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        name = info.filename.replace("\\", "/")
        if name.startswith("/") or re.match("[A-Za-z]:", name) or ".." in name.split("/"):
            raise DataError(f"'{info.filename}' in {path} leads out of the zip; make a new zip.")
        if info.flag_bits & 1:
            raise DataError(f"'{name}' in {path} is encrypted; make a zip without a password.")
        if stat.S_ISLNK(info.external_attr >> 16):
            raise DataError(f"'{name}' in {path} is a link; pack the photo itself.")
        member = PurePosixPath(name)
        if member in members:
            raise DataError(f"'{name}' is in {path} twice; make a new zip.")
        if not name.endswith("/") and not any(_is_ignored(part) for part in member.parts):
            members[member] = info
    return members
