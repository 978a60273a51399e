"""Decode a photo as an upright RGB image in sRGB, without metadata, within bounds.

Pixels are counted by the header, before decoding. Some files of a few bytes take minutes to decode,
such as a JPEG of a thousand scans, and some formats are decoded in Python; so the decoder runs out
of bytes when its time is over.
"""

import io
import re
import struct
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any, TypeVar

import numpy as np
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError

from dreambooth_lib.data.sources import PHOTO_SUFFIXES, DataError, SourceFile

MAX_PIXELS = 8192 * 6144  #: in one photo, by its header: a phone's 50 megapixels
MAX_BYTES = 2**28  #: of one photo's file
MAX_SECONDS = 10.0  #: of CPU time to decode one photo

#: Pillow's formats to read; it runs other programs to decode some of the rest, such as EPS.
_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "AVIF", "HEIF", "JPEG2000",
            "PPM", "QOI")  # fmt: skip
#: What turns a photo upright, by its EXIF's orientation.
_TURNS: dict[Any, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
#: What Pillow raises for EXIF that it cannot parse.
_DAMAGED_EXIF = (struct.error, SyntaxError, KeyError, TypeError, ValueError)
_HEIC = re.compile(rb".{4}ftyp(hei[cxms]|hev[cxms]|mif1|msf1)", re.DOTALL)
_P3_PRIMARIES = 12  # of Display P3, by ITU-T H.273
_BLOCK = 2**10  # bytes that a decoder gets at once: it is timed between them


_Read = TypeVar("_Read")


class _TooSlow(Exception):
    pass


class _TimedBytes(io.BytesIO):
    """A file in memory that raises once :data:`MAX_SECONDS` of CPU time are over."""

    def __init__(self, data: bytes):
        super().__init__(data)
        self._end = time.monotonic() + MAX_SECONDS
        self._cpu_end = time.thread_time() + MAX_SECONDS

    def read(self, size: int | None = -1, /) -> bytes:
        # The wall clock is the cheaper one to ask, but a busy machine is not the file's fault.
        if time.monotonic() > self._end and time.thread_time() > self._cpu_end:
            raise _TooSlow
        return super().read(size)


@cache
def formats() -> tuple[str, ...]:
    """Return the formats that can be read here, HEIF among them if pillow-heif is installed."""
    Image.init()
    with suppress(ImportError):
        from pillow_heif import register_heif_opener

        register_heif_opener()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def is_photo(file: SourceFile) -> bool:
    """Return whether a file is an image to read, by its name or else by its first 16 bytes."""
    if file.suffix in PHOTO_SUFFIXES:
        return True
    try:
        head = file.head()
    except DataError:  # Colab lists the Google Docs of a Drive, and cannot open them
        return False
    # Nearly any file may begin as a DIB does.
    accepts = (Image.OPEN[name][1] for name in formats() if name != "DIB")
    return any(accept(head.ljust(16, b"\0")) for accept in accepts if accept is not None)


def decode(where: str, suffix: str, data: bytes) -> Image.Image:
    """Return a file's first image. Raises :class:`DataError` that says ``where`` it is."""
    return _read(where, suffix, data, lambda image: _to_rgb(_to_srgb(upright(image))))


def decode_alpha(where: str, suffix: str, data: bytes) -> Image.Image | None:
    """Return the alpha channel of a file's first image, None if it has none; raise as above."""
    return _read(
        where, suffix, data, lambda i: _alpha(upright(i)) if i.has_transparency_data else None
    )


def _alpha(image: Image.Image) -> Image.Image | None:
    return image.convert("RGBA").getchannel("A") if image.has_transparency_data else None


def _read(where: str, suffix: str, data: bytes, convert: Callable[[Image.Image], _Read]) -> _Read:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, on damaged metadata and large images
            return convert(_open(data))
    except (Image.DecompressionBombError, _TooLarge):
        problem = f"has more than {MAX_PIXELS:,} pixels; make it smaller"
    except UnidentifiedImageError:
        problem = _why_unidentified(suffix, data)
    except _TooSlow:
        problem = f"takes longer than {MAX_SECONDS:.0f} seconds to decode; save it as JPEG or PNG"
    # Decoders raise errors of nearly any kind for a damaged file.
    except Exception as error:
        reason = str(error) or type(error).__name__
        problem = f"cannot be read ({reason}); replace or remove it"
    raise DataError(f"{where} {problem}.")


class _TooLarge(Exception):
    pass


def _open(data: bytes) -> Image.Image:
    image = Image.open(_TimedBytes(data), formats=formats())
    if image.width * image.height > MAX_PIXELS:
        raise _TooLarge
    image.decodermaxblock = _BLOCK  # type: ignore[attr-defined]
    return image


def upright(image: Image.Image) -> Image.Image:
    """Return an image turned as its EXIF says; if that is damaged, as it is.

    Unlike Pillow's ``exif_transpose`` it writes no EXIF anew, which fails for many phones' tags,
    and does not copy an upright image.
    """
    image.load()  # by which a TIFF turns itself, and no longer says so
    turn = None
    with suppress(*_DAMAGED_EXIF):
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    return image if turn is None else image.transpose(turn)


def _why_unidentified(suffix: str, data: bytes) -> str:
    is_heic = suffix in (".heic", ".heif", ".hif") or _HEIC.match(data)
    if is_heic and "HEIF" not in formats():
        return "cannot be decoded here; run 'pip install pillow-heif', or convert it to JPEG or PNG"
    if suffix == ".jxl" or (suffix in (".avif", ".avifs") and "AVIF" not in formats()):
        return "cannot be decoded here; convert it to JPEG or PNG"
    if suffix in PHOTO_SUFFIXES:
        return "is empty, damaged or not an image; replace or remove it"
    return "is not an image; remove it"


@cache
def _display_p3() -> bytes:
    """Return an ICC profile of Display P3: its primaries (SMPTE EG 432-1), with sRGB's curve."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    data = bytearray(srgb.replace("sRGB".encode("utf-16-be"), "P3  ".encode("utf-16-be")))
    primaries = {b"rXYZ": (0.51512, 0.24120, -0.00105), b"gXYZ": (0.29198, 0.69225, 0.04189),
                 b"bXYZ": (0.15710, 0.06657, 0.78407)}  # fmt: skip
    for number in range(struct.unpack(">I", srgb[128:132])[0]):
        tag, offset, _ = struct.unpack(">4sII", srgb[132 + 12 * number :][:12])
        if tag in primaries:
            fixed = [round(value * 65536) for value in primaries[tag]]
            data[offset + 8 : offset + 20] = struct.pack(">3i", *fixed)
    return bytes(data)


def _to_srgb(image: Image.Image) -> Image.Image:
    """Return the image as a viewer shows it, by its ICC profile; a broken one is passed over."""
    data = image.info.get("icc_profile")
    nclx = image.info.get("nclx_profile")  # of a HEIC; Pillow does not tell an AVIF's
    if not data and nclx and nclx.get("color_primaries") == _P3_PRIMARIES:
        data = _display_p3()
    if not data or image.mode not in ("RGB", "RGBA", "L", "LA", "P", "PA", "CMYK"):
        return image
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(data))
        if ImageCms.getProfileDescription(profile).strip().startswith("sRGB"):
            return image  # keep every level: a conversion would round some
        alpha = _alpha(image)
        if image.mode in ("L", "LA", "CMYK"):
            source = image.convert("L") if image.mode == "LA" else image
        else:
            source = image.convert("RGB")
        converted = ImageCms.profileToProfile(
            source, profile, ImageCms.createProfile("sRGB"), outputMode="RGB"
        )
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return image
    if converted is None:
        return image
    if alpha is not None:
        converted.putalpha(alpha)
    return converted


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("its 32-bit values have no known scale")
        image = Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("its floating-point values have no known scale")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    # Copy the pixels only: image.copy() would keep the EXIF data, with its GPS position, and ICC.
    pixels = Image.new("RGB", image.size)
    pixels.paste(image.convert("RGB") if image.mode != "RGB" else image)
    return pixels
