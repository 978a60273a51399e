"""Read photos from folders and zips, and refuse what cannot be read."""

import io
import json
import struct
import subprocess
import sys
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dreambooth_lib.data import images
from dreambooth_lib.data.images import DataError, read_photos

GPS, ORIENTATION, MAKE = 0x8825, 0x0112, 0x010F


def noise(seed: int) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (48, 64, 3), np.uint8)
    return Image.fromarray(values)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def snapshot(folder: Path) -> dict[str, bytes | None]:
    return {str(p): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def one_pixel(folder: Path) -> list[int]:
    (photo,) = read_photos(folder)
    assert photo.image.mode == "RGB"
    assert photo.image.info == {}
    pixel: list[int] = np.asarray(photo.image)[0, 0].tolist()
    return pixel


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "photos"
    path.mkdir()
    return path


@pytest.fixture
def refused(tmp_path: Path) -> Callable[..., None]:
    """Check that reading fails in one sentence with these words and changes nothing."""

    def check(source: Path, *words: str) -> None:
        before = snapshot(tmp_path)
        with pytest.raises(DataError) as caught:
            read_photos(source)
        for word in words:
            assert word in str(caught.value)
        assert str(caught.value).endswith(".")
        assert "\n" not in str(caught.value)
        assert snapshot(tmp_path) == before

    return check


def make_zip(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


PALETTE = Image.new("P", (2, 2), 1)
PALETTE.putpalette([255, 0, 0, 0, 0, 255])
MODES: dict[str, tuple[Image.Image, dict[str, Any], list[int]]] = {
    "rgb.png": (Image.new("RGB", (2, 2), (1, 2, 3)), {}, [1, 2, 3]),
    "grey.png": (Image.new("L", (2, 2), 77), {}, [77, 77, 77]),
    "bilevel.png": (Image.new("1", (2, 2), 1), {}, [255, 255, 255]),
    "alpha.png": (Image.new("RGBA", (2, 2), (100, 0, 0, 51)), {}, [224, 204, 204]),
    "grey-alpha.png": (Image.new("LA", (2, 2), (0, 0)), {}, [255, 255, 255]),
    "palette.png": (PALETTE, {}, [0, 0, 255]),
    "clear-palette.png": (PALETTE, {"transparency": 1}, [255, 255, 255]),
    "half-palette.png": (PALETTE, {"transparency": bytes([255, 51])}, [204, 204, 255]),
    "clear-rgb.png": (Image.new("RGB", (2, 2), 0), {"transparency": (0, 0, 0)}, [255, 255, 255]),
    "cmyk.tif": (Image.new("CMYK", (2, 2), (255, 0, 0, 0)), {}, [0, 255, 255]),
    "deep.png": (Image.fromarray(np.full((2, 2), 30000, np.uint16)), {}, [117, 117, 117]),
    "deep.tiff": (Image.fromarray(np.full((2, 2), 65535, np.uint16)), {}, [255, 255, 255]),
    "photo.bmp": (Image.new("RGB", (2, 2), (9, 8, 7)), {}, [9, 8, 7]),
    "photo.webp": (Image.new("RGB", (2, 2), (9, 8, 7)), {"lossless": True}, [9, 8, 7]),
    "clear.gif": (PALETTE, {"transparency": 1}, [255, 255, 255]),
}


@pytest.mark.parametrize("name", MODES)
def test_every_mode_becomes_rgb(folder: Path, name: str) -> None:
    image, options, expected = MODES[name]
    image.save(folder / name, **options)
    assert one_pixel(folder) == expected


def test_16_bit_big_endian_tiff_is_scaled(folder: Path) -> None:
    pixels = struct.pack(">4H", 0, 1000, 30000, 65535)
    Image.frombytes("I;16B", (4, 1), pixels).save(folder / "a.tif")
    (photo,) = read_photos(folder)
    assert np.asarray(photo.image)[0, :, 0].tolist() == [0, 4, 117, 255]


def test_cmyk_jpeg_keeps_its_colours(folder: Path) -> None:
    Image.new("CMYK", (8, 8), (255, 0, 0, 0)).save(folder / "a.jpg", quality=100)
    assert np.allclose(one_pixel(folder), [0, 255, 255], atol=3)


def test_exif_rotates_the_photo_and_is_gone(folder: Path) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6  # the camera was turned: rotate by 90 degrees clockwise
    exif[MAKE] = "Camera"
    exif.get_ifd(GPS)[1] = "N"
    image = Image.new("RGB", (32, 16), "white")
    image.paste("black", (0, 0, 16, 16))
    image.save(folder / "a.jpg", exif=exif, quality=95)
    assert b"Camera" in (folder / "a.jpg").read_bytes()
    (photo,) = read_photos(folder)
    assert photo.image.size == (16, 32)
    assert np.asarray(photo.image)[:16].max() < 20
    assert np.asarray(photo.image)[16:].min() > 235
    assert photo.image.info == {}
    assert not dict(photo.image.getexif())
    assert b"Camera" not in encoded(photo.image, "JPEG")


@pytest.mark.parametrize(
    ("name", "kind"),
    [("a.jpg", "MPO"), ("a.gif", "GIF"), ("a.webp", "WEBP"), ("a.png", "PNG"), ("a.tif", "TIFF")],
)
def test_first_of_several_frames(folder: Path, name: str, kind: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    frames[0].save(folder / name, kind, save_all=True, append_images=frames[1:], **options)
    with Image.open(folder / name) as image:
        assert (image.format, getattr(image, "n_frames", 1)) == (kind, 2)
    assert np.allclose(one_pixel(folder), [255, 0, 0], atol=3)


def test_folder_is_sorted_and_its_clutter_ignored(folder: Path) -> None:
    for name in ("b.PNG", "a.png", "c"):
        noise(1).save(folder / name, "PNG")
    for name in (".DS_Store", "._a.png", "Thumbs.db", "LICENSE.md", "credits.txt", "desktop.ini"):
        (folder / name).write_bytes(b"\xff\x00")
    for name in (".ipynb_checkpoints", "__MACOSX", "more"):
        (folder / name).mkdir()
        (folder / name / "a.png").write_bytes(b"no photo")
    assert [photo.name for photo in read_photos(folder)] == ["a.png", "b.PNG", "c"]


@pytest.mark.parametrize("prefix", ["", "dog/", "a/dog/", "dog\\"])
def test_zip_reads_like_a_folder(tmp_path: Path, prefix: str) -> None:
    members = {
        f"{prefix}b.png": encoded(noise(1)),
        f"{prefix}a.png": encoded(noise(2)),
        f"{prefix}a.txt": b"a caption",
        "__MACOSX/dog/._a.png": b"resource fork",
        f"{prefix}.DS_Store": b"",
        "README.md": b"about",
    }
    photos = read_photos(make_zip(tmp_path / "dog.zip", members))
    assert [(p.name, p.caption) for p in photos] == [("a.png", "a caption"), ("b.png", None)]
    assert np.array_equal(np.asarray(photos[1].image), np.asarray(noise(1)))
    assert [p.name for p in tmp_path.iterdir()] == ["dog.zip"]


def test_captions_of_both_kinds(folder: Path) -> None:
    for name in ("a.png", "b.png", "c.png"):
        noise(1).save(folder / name)
    (folder / "a.txt").write_text("\ufeffbeside é\n", encoding="utf-8")
    rows = [{"file_name": "a.png", "text": "listed"}, {"file_name": "b.png", "text": " listed "}]
    (folder / "metadata.jsonl").write_text("\n\n".join(map(json.dumps, rows)) + "\n")
    assert [p.caption for p in read_photos(folder)] == ["beside é", "listed", None]


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("{broken", "not valid JSON"),
        ('{"file_name": "gone.png", "text": "x"}', "gone.png"),
        ('{"file_name": "a.png"}', "'text'"),
        ("[1]", "'file_name'"),
    ],
)
def test_bad_metadata(folder: Path, refused: Callable[..., None], line: str, word: str) -> None:
    noise(1).save(folder / "a.png")
    (folder / "metadata.jsonl").write_text(
        '{"file_name": "a.png", "text": "x"}\n' + line + "\n", encoding="utf-8"
    )
    refused(folder, "metadata.jsonl", "line 2", word)


def test_caption_that_is_not_text(folder: Path, refused: Callable[..., None]) -> None:
    noise(1).save(folder / "a.png")
    (folder / "a.txt").write_bytes(b"\xff\xfe\x00")
    refused(folder, "a.txt", "UTF-8")


PNG, JPEG = encoded(noise(3)), encoded(noise(3), "JPEG")
FLOAT = encoded(Image.new("F", (4, 4), 0.5), "TIFF")


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        ("x.png", b"", "replace or remove"),
        ("x.jpg", b"no photo at all", "replace or remove"),
        ("x.png", PNG[: len(PNG) // 2], "cannot be read"),
        ("x.jpg", JPEG[: len(JPEG) // 2], "cannot be read"),
        ("x.png", PNG[:60] + b"\0\0\0\0" + PNG[64:], "cannot be read"),
        ("x.heic", b"\0\0\0\x18ftypheic\0\0\0\0", "convert it to JPEG"),
        ("x.jpg", b"\0\0\0\x18ftypheic\0\0\0\0", "convert it to JPEG"),
        ("x.mp4", b"\0\0\0\x18ftypmp42\0\0\0\0", "remove it"),
        ("x", JPEG[: len(JPEG) // 2], "cannot be read"),
        ("x.tif", FLOAT, "no known scale"),
        ("x.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "remove it"),
    ],
)
def test_bad_files_are_named(
    folder: Path, refused: Callable[..., None], tmp_path: Path, name: str, content: bytes, word: str
) -> None:
    noise(1).save(folder / "a.png")
    (folder / name).write_bytes(content)
    refused(folder, f"'{name}'", word)
    packed = make_zip(tmp_path / "bad.zip", {"d/a.png": PNG, f"d/{name}": content})
    refused(packed, f"'{name}'", "bad.zip", word)


@pytest.mark.parametrize("side", [7_100, 9_500, 20_000])  # silent, warned of, refused by Pillow
def test_pixels_are_counted_before_decoding(
    folder: Path, refused: Callable[..., None], side: int
) -> None:
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    (folder / "x.png").write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + b"".join(
            struct.pack(">I", len(c)) + t + c + struct.pack(">I", zlib.crc32(t + c))
            for t, c in chunks
        )
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refused(folder, "'x.png'", "50,000,000 pixels")


def test_missing_and_empty_sources(
    tmp_path: Path, folder: Path, refused: Callable[..., None]
) -> None:
    refused(tmp_path / "nowhere", "nowhere", "check the path")
    refused(folder, "photos", "has no photos")
    (folder / "a.txt").write_text("a caption without its photo")
    refused(folder, "photos", "has no photos")
    refused(make_zip(tmp_path / "empty.zip", {}), "empty.zip", "has no photos")
    (folder / "link.jpg").symlink_to(tmp_path / "gone.jpg")
    refused(folder, "link.jpg", "remove it")


@pytest.mark.parametrize("name", ["../a.png", "/a.png", "C:\\a.png", "d\\..\\..\\a.png"])
def test_zip_that_leaves_its_folder(
    tmp_path: Path, refused: Callable[..., None], name: str
) -> None:
    refused(make_zip(tmp_path / "evil.zip", {"b.png": PNG, name: PNG}), "evil.zip", name, "out of")


def test_zip_that_explodes(
    tmp_path: Path, refused: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    bomb = make_zip(tmp_path / "bomb.zip", {"a.bmp": bytes(12 * 2**20)})
    monkeypatch.setattr(images, "MAX_ZIP_RATIO", 10)
    refused(bomb, "bomb.zip", "12 MiB")
    monkeypatch.setattr(images, "MAX_ZIP_BYTES", 1000)
    refused(make_zip(tmp_path / "large.zip", {"a.png": PNG}), "large.zip", "MiB")


def test_damaged_zips(tmp_path: Path, refused: Callable[..., None]) -> None:
    sound = make_zip(tmp_path / "sound.zip", {"a.png": PNG}).read_bytes()
    (tmp_path / "cut.zip").write_bytes(sound[: len(sound) // 2])
    refused(tmp_path / "cut.zip", "cut.zip", "valid zip")
    middle = len(sound) // 2
    (tmp_path / "flip.zip").write_bytes(sound[:middle] + b"\0" * 16 + sound[middle + 16 :])
    refused(tmp_path / "flip.zip", "flip.zip", "'a.png'")
    encrypted = bytearray(sound)
    encrypted[6] |= 1
    encrypted[sound.rindex(b"PK\1\2") + 8] |= 1
    (tmp_path / "locked.zip").write_bytes(encrypted)
    refused(tmp_path / "locked.zip", "locked.zip", "'a.png'", "password")
    (tmp_path / "a.png").write_bytes(PNG)
    refused(tmp_path / "a.png", "a.png", "folder or a zip")


def test_ambiguous_zips(tmp_path: Path, refused: Callable[..., None]) -> None:
    refused(make_zip(tmp_path / "two.zip", {"a/1.png": PNG, "b/1.png": PNG}), "two.zip", "a, b")
    path = tmp_path / "twice.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.png", PNG)
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("a.png", PNG)
    refused(path, "twice.zip", "'a.png'")


@pytest.mark.parametrize("module", ["images", "subjects", "quality_checks", "identifiers"])
def test_importing_does_not_import_torch(module: str) -> None:
    code = f"import sys, dreambooth_lib.data.{module}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
