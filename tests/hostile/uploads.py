"""Damaged and hostile photos and zips, read as a subject's."""

import io
import json
import zipfile
from pathlib import Path
from random import Random

from conftest import drawings
from PIL import Image

from dreambooth_lib.data import decoding
from dreambooth_lib.data.images import read_photos
from hostile.bench import Kind, Wrong
from hostile.mutate import FOREIGN, damage_bytes, damage_lines

MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F", "YCbCr", "LAB", "PA")
#: Further ways to save some formats.
OPTIONS = {
    "JPEG": ({"progressive": True}, {"subsampling": 2, "quality": 5}),
    "PNG": ({"interlace": 1}, {"transparency": 0}),
    "TIFF": tuple({"compression": c} for c in ("tiff_lzw", "tiff_deflate", "jpeg", "packbits")),
    "WEBP": ({"lossless": True},),
    "GIF": ({"save_all": True, "append_images": [Image.new("P", (9, 9))]},),
}


def prepare_photos(folder: Path) -> None:
    """Save small pictures in each mode of each format that Pillow writes here."""
    folder.mkdir(parents=True)
    Image.init()
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"  # orientation, and what must not be kept
    for name in sorted(Image.SAVE):
        for mode in MODES:
            for number, options in enumerate(({}, *OPTIONS.get(name, ()))):
                place = folder / f"{name}-{mode.replace(';', '')}-{number}"
                try:
                    picture = drawings(1, number)[0].convert("L").convert(mode)
                    more = {"exif": exif} if name in ("JPEG", "PNG", "WEBP", "TIFF", "AVIF") else {}
                    picture.save(place, name, **more, **options)
                except Exception:  # Pillow has many errors for a mode that a format lacks
                    place.unlink(missing_ok=True)


def _some(material: Path, rng: Random) -> tuple[str, bytes]:
    """Return the name and the bytes of a damaged picture; one in eight is sound."""
    file, other = (rng.choice(sorted(material.iterdir())) for _ in range(2))
    data = file.read_bytes()
    suffix = rng.choice((file.name.split("-")[0].lower(), "png", "jpg", "heic", "txt"))
    if rng.random() < 0.875:
        data = damage_bytes(data, rng, other.read_bytes())
    return f"{rng.choice(('a', 'B', 'ü', 'x' * 60))}.{suffix}", data


def picture(rng: Random, material: Path, folder: Path) -> None:
    """Read a folder with a damaged picture, at times with captions beside it."""
    name, data = _some(material, rng)
    (folder / name).write_bytes(data)
    if rng.random() < 0.1:
        row = json.dumps({"file_name": name, "text": "a dog"}).encode() + b"\n"
        (folder / "metadata.jsonl").write_bytes(damage_lines(row, rng))
    if rng.random() < 0.05:
        (folder / rng.choice(FOREIGN)).write_bytes(rng.randbytes(9))
    check_photos_are_plain(folder)


def check_photos_are_plain(source: Path) -> None:
    """Read photos; they are RGB, within the limit, and without metadata."""
    for photo in read_photos(source):
        image = photo.image
        if image.mode != "RGB" or image.info or image.getexif():
            raise Wrong(f"{photo.name} has mode {image.mode} and {image.info}")
        if image.width * image.height > decoding.MAX_PIXELS or len(image.tobytes()) % 3:
            raise Wrong(f"{photo.name} has {image.size} pixels")


NAMES = (
    "../out.png", "/abs.png", "C:\\x.png", "..\\x.png", "a/b/c.png", "a.png", "a.png", "dir/",
    "\x1b[31m.png", "new\nline.png", "x" * 3000 + ".png", "__MACOSX/a.png", ".hidden",
    "nul\x00.png", "metadata.jsonl", "a.txt", "cp437\x80.png", "\u202egnp.exe", "other.zip",
)  # fmt: skip


def zipped(rng: Random, material: Path, folder: Path) -> None:
    """Read a zip of odd members and sizes, mostly with its own bytes damaged too."""
    file, buffer = folder / "photos.zip", io.BytesIO()
    with zipfile.ZipFile(buffer, "w", rng.choice((0, 8, 12, 14))) as archive:
        for number in range(rng.choice((0, 1, 2, 5))):
            name, data = _some(material, rng)
            info = zipfile.ZipInfo(rng.choice((f"{number}{name}", *NAMES)).replace("\x00", "0"))
            info.compress_type = archive.compression
            if rng.random() < 0.1:
                info.external_attr = 0o120777 << 16  # a link
            if rng.random() < 0.03:
                data = bytes(rng.choice((10**6, 10**8)))
            if rng.random() < 0.05:
                data = flat_picture(rng)
            archive.writestr(info, data)
    data = buffer.getvalue()
    if rng.random() < 0.7:
        data = damage_bytes(data, rng)
    file.write_bytes(data)
    check_photos_are_plain(file)


_FLAT: dict[int, bytes] = {}


def flat_picture(rng: Random) -> bytes:
    """Return a PNG of few bytes and many equal pixels."""
    side = rng.choice((4000, 7000, 12_000))
    if side not in _FLAT:
        buffer = io.BytesIO()
        Image.new(rng.choice(("1", "L")), (side, side)).save(buffer, "PNG")
        _FLAT[side] = buffer.getvalue()
    return _FLAT[side]


KINDS = (
    Kind("pictures", prepare_photos, picture, 20_000),
    Kind("zips", prepare_photos, zipped, 2_000),
)
