"""Read photos and captions from a folder or a zip, as upright RGB images without metadata.

Everything is read into memory and nothing is written.
"""

import io
import json
import re
import stat
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from dreambooth_lib.core.errors import KitError

MAX_PIXELS = 50_000_000  #: in one photo, by its header
MAX_ZIP_BYTES = 2 * 2**30  #: of all members of a zip, unpacked
MAX_ZIP_RATIO = 100  #: unpacked bytes per byte of the zip, for zips above 100 MiB unpacked

#: Pillow's formats to read; it runs other programs to decode some of the rest, such as EPS.
_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "AVIF", "HEIF", "JPEG2000",
            "PPM", "QOI")  # fmt: skip
_NEEDS_DECODER = {".heic", ".heif", ".avif", ".avifs", ".jxl"}
_SUFFIXES = _NEEDS_DECODER | {".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp",
                              ".bmp", ".gif", ".tif", ".tiff"}  # fmt: skip
_TEXT_SUFFIXES = {".txt", ".json", ".jsonl", ".csv", ".md", ".xml", ".url", ".ini"}
_IGNORED = {"__macosx", "thumbs.db", "desktop.ini"}


class DataError(KitError, ValueError):
    """Photos or tables that cannot be used; the message names the file and says what to do."""


@dataclass(frozen=True)
class Photo:
    """A photo: its file name, its RGB image without metadata, and its caption if it has one."""

    name: str
    image: Image.Image
    caption: str | None = None


def captioned(photos: list[Photo], prompt: str) -> list[Photo]:
    """Return the photos with ``prompt`` as the caption of those that have none."""
    return [replace(photo, caption=photo.caption or prompt) for photo in photos]


def read_photos(source: str | Path) -> list[Photo]:
    """Read all photos in a folder (not in its sub-folders) or a zip, sorted by name.

    They are turned upright by EXIF, transparency becomes white, 16 bits are scaled to 8, and of
    several frames the first is read. A zip's photos may be in one sub-folder. Captions come from
    ``NAME.txt`` beside the photo or else from ``metadata.jsonl`` (``{"file_name": ..., "text":
    ...}``). Hidden files, system files and text files are ignored. Raises :class:`DataError` for
    any other file that is no image, photos that are damaged or above :data:`MAX_PIXELS`, zips that
    are damaged, encrypted, unpack to too much or reach outside, and where there are no photos.
    """
    path = Path(source)
    try:
        if path.is_dir():
            return _photos(path, {p.name: p.read_bytes for p in path.iterdir() if _is_wanted(p)})
        if not path.exists():
            raise DataError(f"there is no folder or zip {path}; check the path.")
        with zipfile.ZipFile(path) as archive:
            return _photos(path, _zip_members(path, archive))
    except (zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError, EOFError) as error:
        raise DataError(
            f"{path} is not a valid zip ({error}); give a folder or a zip of photos."
        ) from None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error}); check its permissions.") from None


def _is_wanted(path: Path) -> bool:
    if path.name.startswith(".") or path.name.lower() in _IGNORED or path.is_dir():
        return False
    if not path.is_file():
        raise DataError(f"{path} is a broken link or not a regular file; remove it.")
    return True


def _zip_members(path: Path, archive: zipfile.ZipFile) -> dict[str, Callable[[], bytes]]:
    """Check a zip's members and return them by file name, without the sub-folder."""
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
        hidden = any(part.startswith(".") or part.lower() in _IGNORED for part in member.parts)
        if not hidden and not name.endswith("/"):
            members[member] = info
    total, packed = sum(i.file_size for i in archive.infolist()), path.stat().st_size
    if total > MAX_ZIP_BYTES or total > MAX_ZIP_RATIO * max(packed, 2**20):
        raise DataError(
            f"{path} unpacks from {packed / 2**20:.1f} MiB to {total / 2**20:.0f} MiB, too much "
            "for photos; pack JPEG or PNG files only."
        )
    used = (
        m for m in members if m.suffix.lower() not in _TEXT_SUFFIXES or m.name == "metadata.jsonl"
    )
    folders = sorted({str(m.parent) for m in used})
    if len(folders) > 1:
        raise DataError(f"{path} has files in several folders ({', '.join(folders)}); use one.")
    return {
        member.name: lambda info=info: archive.read(info)  # type: ignore[misc]
        for member, info in members.items()
        if str(member.parent) in folders
    }


def _photos(path: Path, files: dict[str, Callable[[], bytes]]) -> list[Photo]:
    photos, texts = [], {}
    for name, read in sorted(files.items()):
        suffix = Path(name).suffix.lower()
        try:
            if suffix not in _TEXT_SUFFIXES:
                photos.append(Photo(name, _decode(f"'{name}' in {path}", suffix, read())))
            elif suffix == ".txt" or name == "metadata.jsonl":
                texts[name] = read()
        except DataError:
            raise
        # Decoders raise errors of nearly any kind for a damaged file.
        except Exception as error:
            raise DataError(
                f"'{name}' in {path} cannot be read ({str(error) or type(error).__name__}); "
                "replace or remove it."
            ) from None
    if not photos:
        raise DataError(f"{path} has no photos; put JPEG or PNG files directly into it.")
    captions = _metadata(path, {photo.name for photo in photos}, texts)
    for photo in photos:
        caption = _text(path, f"{Path(photo.name).stem}.txt", texts)
        captions[photo.name] = captions.get(photo.name) if caption is None else caption
    return [replace(photo, caption=captions[photo.name] or None) for photo in photos]


def _text(path: Path, name: str, texts: dict[str, bytes]) -> str | None:
    try:
        return texts[name].decode("utf-8-sig").strip() if name in texts else None
    except UnicodeDecodeError:
        raise DataError(f"'{name}' in {path} is not UTF-8; save it as UTF-8 text.") from None


def _metadata(path: Path, names: set[str], texts: dict[str, bytes]) -> dict[str, str | None]:
    captions: dict[str, str | None] = {}
    lines = (_text(path, "metadata.jsonl", texts) or "").split("\n")
    for number, line in enumerate(lines, 1):
        where = f"line {number} of 'metadata.jsonl' in {path}"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{where} is not valid JSON ({error}); correct that line.") from None
        match row:
            case {"file_name": str(name), "text": str(caption)}:
                captions[name] = caption.strip()
            case _:
                raise DataError(f"{where} lacks the strings 'file_name' and 'text'; add them.")
        if name not in names:
            raise DataError(f"{where} names '{name}', which is missing; correct that line.")
    return captions


def _decode(where: str, suffix: str, data: bytes) -> Image.Image:
    Image.init()
    too_large = DataError(f"{where} has more than {MAX_PIXELS:,} pixels; make it smaller.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            formats = [name for name in _FORMATS if name in Image.OPEN]
            image: Image.Image = Image.open(io.BytesIO(data), formats=formats)
    except Image.DecompressionBombError:
        raise too_large from None
    except UnidentifiedImageError:
        if suffix in _NEEDS_DECODER or data[4:12] in (b"ftypheic", b"ftypheix", b"ftypmif1"):
            problem = "cannot be decoded here; convert it to JPEG or PNG"
        elif suffix in _SUFFIXES:
            problem = "is empty, damaged or not an image; replace or remove it"
        else:
            problem = "is neither an image nor a caption; remove it"
        raise DataError(f"{where} {problem}.") from None
    if image.width * image.height > MAX_PIXELS:
        raise too_large
    image.load()
    return _to_rgb(ImageOps.exif_transpose(image))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("its 32-bit values have no known scale")
        image = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("its floating-point values have no known scale")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    image = image.convert("RGB")
    # Copy the pixels only: image.copy() would keep the EXIF data, with its GPS position, and ICC.
    return Image.frombytes("RGB", image.size, image.tobytes())
