"""Read photos from folders and zips, and refuse what cannot be read."""

import io
import json
import pickle
import struct
import subprocess
import sys
import types
import unicodedata
import warnings
import weakref
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageFile, ImageOps

from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.core.made_with import peak_memory_mb
from dreambooth_lib.core.subject import Subject
from dreambooth_lib.data import captions, decoding, images, sources
from dreambooth_lib.data.images import (
    BadPhotosError,
    DataError,
    captioned,
    read_photos,
    read_source,
)
from dreambooth_lib.data.subjects import load_subject
from dreambooth_lib.families.resolving import resolve
from dreambooth_lib.metrics import encoders

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


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_every_orientation_is_turned_once(kind: str) -> None:
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        data = encoded(noise(0), kind, exif=exif)
        with Image.open(io.BytesIO(data)) as image:
            expected = ImageOps.exif_transpose(image).convert("RGB")
        turned = decoding.decode("a photo", "", data)
        assert turned.size == ((48, 64) if orientation > 4 else (64, 48))
        assert np.array_equal(turned, expected)


@pytest.mark.parametrize(
    "tag",
    [
        (0x0128, 2, 2, b"2\0"),  # the unit of resolution as text
        (0x0213, 1, 1, b"\1"),  # how chroma is placed, in one byte
        (0x02BC, 2, 4, b"<x>\0"),  # XMP as text
    ],
)
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_exif_that_pillow_cannot_write_turns_the_photo(kind: str, tag: Any) -> None:
    tags = [(ORIENTATION, 3, 1, b"\6\0"), tag]
    entries = b"".join(struct.pack("<HHI4s", *values) for values in tags)
    exif = b"Exif\0\0II*\0\x08\0\0\0\x02\0" + entries + bytes(4)
    assert decoding.decode("a", "", encoded(noise(0), kind, exif=exif)).size == (48, 64)
    damaged = exif.replace(b"II*", b"II?")
    assert decoding.decode("a", "", encoded(noise(0), kind, exif=damaged)).size == (64, 48)


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
        ("x", JPEG[: len(JPEG) // 2], "cannot be read"),
        ("x.tif", FLOAT, "no known scale"),
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


@pytest.mark.parametrize(
    ("name", "brand"),
    [("x.heic", b"heic"), ("x.jpg", b"heic"), ("x.HIF", b""), *(
        ("x.jpg", brand) for brand in (b"hevc", b"heim", b"heis", b"msf1", b"mif1")
    )],
)  # fmt: skip
def test_heic_without_a_decoder_is_refused_with_what_to_do(
    folder: Path, refused: Callable[..., None], monkeypatch: pytest.MonkeyPatch, name: str,
    brand: bytes,
) -> None:  # fmt: skip
    readable = {kind: how for kind, how in Image.OPEN.items() if kind != "HEIF"}
    monkeypatch.setattr(Image, "OPEN", readable)
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    decoding.formats.cache_clear()
    noise(1).save(folder / "a.png")
    (folder / name).write_bytes(b"\0\0\0\x18ftyp" + brand + b"\0\0\0\0")
    try:
        refused(folder, f"'{name}'", "run 'pip install pillow-heif', or convert it to JPEG")
    finally:
        decoding.formats.cache_clear()


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
        refused(folder, "'x.png'", "50,331,648 pixels")


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
    monkeypatch.setattr(sources, "MAX_ZIP_RATIO", 10)
    refused(bomb, "bomb.zip", "12 MiB")
    monkeypatch.setattr(sources, "MAX_ZIP_BYTES", 1000)
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
    (tmp_path / "a.bin").write_bytes(PNG)
    refused(tmp_path / "a.bin", "a.bin", "folder or a zip")


def test_one_photo_is_read_by_its_own_path_and_nothing_beside_it(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(PNG)
    (tmp_path / "a.txt").write_text("a caption of a folder")
    (photo,) = read_photos(tmp_path / "a.png")
    assert (photo.name, photo.caption) == ("a.png", None)
    assert photo.image.tobytes() == Image.open(tmp_path / "b.png").convert("RGB").tobytes()


def test_the_home_folder_is_found_by_its_sign(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tiny_sd1: str
) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    noise(1).save(folder / "a.png")
    assert [photo.name for photo in read_photos("~/photos")] == ["a.png"]
    (folder.parent / "base").symlink_to(tiny_sd1)
    found = resolve("~/base")
    assert (found.name, found.path) == (str(folder.parent / "base"),) * 2


def test_ambiguous_zips(tmp_path: Path, refused: Callable[..., None]) -> None:
    refused(make_zip(tmp_path / "two.zip", {"a/1.png": PNG, "b/1.png": PNG}), "two.zip", "a, b")
    path = tmp_path / "twice.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.png", PNG)
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("a.png", PNG)
    refused(path, "twice.zip", "'a.png'")


@pytest.mark.parametrize(
    "module", ["images", "subjects", "quality_checks", "identifiers", "captions"]
)
def test_importing_does_not_import_torch(module: str) -> None:
    code = f"import sys, dreambooth_lib.data.{module}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# What lies beside the photos


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p0.txt", "a {} dog"),
        ("p0.png.txt", "a {} dog"),
        ("p0.TXT", "a {} dog"),
        ("P0.txt", "a {} dog"),
        ("p0.caption", "a {} dog"),
        ("metadata.csv", 'file_name,text\np0.png,"a {} dog"\n'),
        ("metadata.csv", 'file_name,text\n./p0.png,"a {} dog"\n'),
        ("metadata.csv", '\ufefftags,caption,file_name\nx,"a {} dog",P0.png\n'),
        ("metadata.jsonl", '{"file_name": "p0.png", "caption": "a {} dog", "tags": [1]}'),
        ("p0.json", '{"caption": "a {} dog", "width": 4}'),
        ("meta_cap.json", '{"p0": {"caption": "a {} dog", "train_resolution": [64, 64]}}'),
        ("metadata.json", '{"/data/dog/p0.png": {"tags": "a {} dog"}, "/data/dog/p9": {}}'),
        ("meta_clean.json", '{"C:\\\\dog\\\\P0": {"caption": "a {} dog"}, "x": 1}'),
    ],
)
def test_all_common_forms_of_captions_are_read(folder: Path, name: str, content: str) -> None:
    noise(1).save(folder / "p0.png")
    (folder / name).write_text(content, encoding="utf-8")
    source = read_source(folder)
    assert [p.caption for p in source.photos] == ["a {} dog"] and source.notes == []
    assert captioned(source.photos, "a ohwx dog", "ohwx")[0].caption == "a ohwx dog"
    zipped = make_zip(
        folder.parent / "dog.zip",
        {"dog/p0.png": PNG, f"dog/{name}": content.encode()},
    )
    assert [p.caption for p in read_photos(zipped)] == ["a {} dog"]


def test_the_first_of_several_captions_is_taken(folder: Path) -> None:
    noise(1).save(folder / "p0.png")
    forms = {
        "meta.json": '{"p0": {"caption": "kohya", "tags": "red, dog"}}',
        "p0.json": '{"caption": "its own json"}',
        "metadata.csv": "file_name,text\np0.png,table\n",
        "p0.caption": "caption",
        "p0.txt": "text",
        "p0.png.txt": "by full name",
    }
    (folder / "meta.json").write_text(forms["meta.json"])
    assert read_photos(folder)[0].caption == "kohya, red, dog"
    for name, content in list(forms.items())[1:]:
        (folder / name).write_text(content)
        assert read_photos(folder)[0].caption in content


def test_captions_are_written_where_they_are_read(folder: Path) -> None:
    for name in ("a.png", "b.png", "b.jpg", "c.png", "d.png", "e.png"):
        noise(1).save(folder / name)
    (folder / "b.txt").write_text("of both b")
    (folder / "c.PNG.TXT").write_text("old")
    (folder / "d.caption").write_text("old")
    (folder / "metadata.csv").write_text("file_name,text\ne.png,old\n")
    written = {name: f"a {{}} dog, {name}" for name in ("a.png", "b.jpg", "c.png", "d.png")}
    captions.write_captions(folder, written | {"e.png": ""})
    read = {photo.name: photo.caption for photo in read_photos(folder)}
    assert read == written | {"b.png": "of both b", "e.png": None}
    texts = [path.name for path in folder.iterdir() if path.suffix.lower() != ".png"]
    assert sorted(texts) == ["a.txt", "b.jpg", "b.jpg.txt", "b.txt", "c.PNG.TXT", "d.caption",
                             "e.txt", "metadata.csv"]  # fmt: skip
    assert (folder / "c.PNG.TXT").read_text() == "a {} dog, c.png"


def test_the_good_photos_are_used_once_the_person_goes_on_without_the_bad(folder: Path) -> None:
    for name in ("a.png", "b.png", "c.png"):
        noise(1).save(folder / name)
    (folder / "b.png").write_bytes(PNG[: len(PNG) // 2])
    (folder / "d.HEIC").write_bytes(b"")
    with pytest.raises(BadPhotosError) as caught:
        read_photos(folder)
    text = str(caught.value)
    assert text.startswith(f"'b.png' in {folder} cannot be read") and caught.value.names == (
        "b.png", "d.HEIC",
    )  # fmt: skip
    assert text.endswith(
        '; d.HEIC cannot be used either; or go on without: left_out = ["b.png", "d.HEIC"].'
    )
    from_another_process = pickle.loads(pickle.dumps(caught.value))
    assert str(from_another_process) == text and from_another_process.names == caught.value.names
    with pytest.warns(UserWarning, match=r"b\.png and d\.HEIC are left out, as you chose\."):
        subject = load_subject(folder, "dog", left_out=caught.value.names)
    assert [photo.name for photo in read_photos(subject)] == ["a.png", "c.png"]
    config = TrainConfig.from_dict(TrainConfig(subject).to_dict())
    assert config.subject == subject
    (folder / "c.png").write_bytes(b"")
    with pytest.raises(BadPhotosError, match=r"'c\.png'"):
        read_photos(subject)


@pytest.mark.parametrize(
    "name", ["p0.json", "metadata.json", "captions.jsonl", "p1.txt", "captions.csv", "p0.tif.txt"]
)
def test_text_that_is_no_caption_is_named(folder: Path, name: str) -> None:
    noise(1).save(folder / "p0.png")
    (folder / name).write_text("a dog")
    source = read_source(folder)
    assert [p.caption for p in source.photos] == [None]
    assert len(source.notes) == 1 and source.notes[0].startswith(f"{name} is not used")


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        ("metadata.jsonl", "[" * 200_000, "nested too deeply"),
        ("metadata.jsonl", '{"file_name": "p0.png", "text": "a"}\n\n' + "[" * 200_000, "line 3"),
        ("metadata.csv", "file_name,text\np0.png,a\ngone.png,b\n", "line 3"),
        ("metadata.csv", "name,words\np0.png,a\n", "'text'"),
        ("metadata.csv", "file_name,text\np0.png," + "a" * 200_000 + "\n", "not valid CSV"),
        ("p0.txt", "a" * 70_000, "too much for a caption"),
    ],
)  # fmt: skip
def test_odd_captions_are_refused(
    folder: Path, refused: Callable[..., None], name: str, content: str, word: str
) -> None:
    noise(1).save(folder / "p0.png")
    (folder / name).write_text(content)
    refused(folder, name, word)


@pytest.mark.parametrize("suffix", [".nrw", ".3FR", ".sr2", ".kdc", ".iiq", ".x3f", ".RWL"])
def test_raw_photos_of_any_camera_are_told_as_such(folder: Path, suffix: str) -> None:
    Image.new("RGB", (16, 12)).save(folder / f"IMG_1{suffix}", "TIFF")
    noise(1).save(folder / "IMG_2.jpg")
    source = read_source(folder)
    assert [photo.name for photo in source.photos] == ["IMG_2.jpg"]
    assert "raw photos are not read" in source.notes[0]


def test_raw_photos_are_not_read_as_their_previews(folder: Path) -> None:
    Image.new("RGB", (16, 12)).save(folder / "IMG_1.DNG", "TIFF")
    with pytest.raises(DataError, match=r"only raw photos, such as IMG_1\.DNG; save them as JPEG"):
        read_photos(folder)
    noise(1).save(folder / "IMG_1.jpg")
    source = read_source(folder)
    assert [photo.name for photo in source.photos] == ["IMG_1.jpg"]
    assert source.notes == [
        "IMG_1.DNG is not used, because raw photos are not read; save it as JPEG."
    ]


def test_google_docs_among_the_photos_are_passed_over(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, *given: Any, read: Callable[..., Any] = Path.open) -> Any:
        if path.suffix in (".gdoc", ".gsheet"):
            raise OSError(95, "Operation not supported")
        return read(path, *given)

    monkeypatch.setattr(Path, "open", refuse)
    (folder / "masks").mkdir()
    for name in ("notes.gdoc", "masks/notes.gsheet"):
        (folder / name).touch()
    noise(1).save(folder / "p0.png")
    source = read_source(folder)
    assert [photo.name for photo in source.photos] == ["p0.png"]
    assert source.notes == ["notes.gdoc is not used, because it is neither a photo nor a caption."]


def test_side_files_of_phones_and_trainers_are_passed_over_in_one_sentence(folder: Path) -> None:
    for name in ("IMG_1.MOV", "IMG_1.AAE", "x.mp4", "x.eps", "Icon\r", "p0.npz", "p1.npz"):
        (folder / name).write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n")
    noise(1).save(folder / "p0.png")
    source = read_source(folder)
    assert [photo.name for photo in source.photos] == ["p0.png"]
    assert source.notes == [
        "IMG_1.AAE, IMG_1.MOV, p0.npz, p1.npz and 2 more files are not used, because they are "
        "neither photos nor captions."
    ]


@pytest.mark.parametrize("packed", [False, True])
def test_large_files_are_never_read(
    folder: Path, tmp_path: Path, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files of 3 GB with holes in them, beside a photo or as one."""
    monkeypatch.setattr(sources, "MAX_ZIP_RATIO", 10**9)
    monkeypatch.setattr(sources, "MAX_ZIP_BYTES", 10**12)
    where, size = (tmp_path / "large.zip" if packed else folder), 3 * 2**20 if packed else 3 * 10**9
    if packed:
        monkeypatch.setattr(images, "MAX_BYTES", 2**20)
        large = {name: b"\0" * size for name in ("clip.mov", "long.txt")}
        make_zip(where, {"a.png": PNG, **large})
    else:
        noise(1).save(folder / "a.png")
        for name in ("clip.mov", "long.txt"):
            with (folder / name).open("wb") as file:
                file.truncate(size)
    before = peak_memory_mb()
    assert [photo.name for photo in read_photos(where)] == ["a.png"]
    for name in ("a.txt", "b.jpg"):
        if packed:
            make_zip(where, {"a.png": PNG, name: b"\0" * size})
        else:
            (folder / "long.txt").rename(folder / name)
        with pytest.raises(DataError, match=r"too much for a (caption|photo)"):
            read_photos(where)
        if not packed:
            (folder / name).rename(folder / "long.txt")
    assert peak_memory_mb() - before < 200


@pytest.mark.parametrize(
    "name",
    ["p0-masklabel.png", "p1-condlabel.jpg", "p0_mask.png", "mask_p0.png", "p0-depth.png",
     "p0.mask.webp", "p0_thumb.jpg", "p0_normal.png", "p0-control.jpg", "p0mask.png",
     "p0_mask0.png", "p0_mask_0.png", "p0 (mask).png", "p0_depthmap.png", "p0_depth_map.png",
     "p0_pose.png", "p0_lineart_anime.png", "p0_masked.png", "p0_normalmap.png",
     "depth_map_p0.png", "P0_softedge_hed.png"],
)  # fmt: skip
def test_masks_and_maps_are_left_out_and_named(folder: Path, name: str) -> None:
    noise(1).save(folder / "p0.png")
    noise(2).save(folder / name)
    source = read_source(folder)
    assert [photo.name for photo in source.photos] == ["p0.png"]
    assert len(source.notes) == 1 and source.notes[0].startswith(
        f"{name} was taken for a mask or map, so it is not trained on"
    )


def test_photos_that_are_called_like_masks_stay_photos(folder: Path) -> None:
    for name in ("face.jpg", "facemask.jpg", "mask.jpg", "mask_1.jpg", "poses.jpg", "p0.jpg"):
        noise(1).save(folder / name)
    for name in ("p0_masks on.jpg", "p0_normally.jpg", "dog_mask.jpg", "depth.jpg"):
        noise(2).save(folder / name)
    assert len(read_photos(folder)) == 10
    Image.new("1", (64, 48)).save(folder / "facemask.png")
    assert len(read_photos(folder)) == 10, "beside face.jpg, a black and white picture is a mask"


@pytest.mark.parametrize("gone", ["p0.jpg", "IMG_9.CR2"])
def test_masks_and_maps_of_a_photo_that_is_not_used_stay_out(folder: Path, gone: str) -> None:
    (folder / gone).write_bytes(b"damaged")
    noise(1).save(folder / "q.png")
    stem = Path(gone).stem
    for name in (f"{stem}_depth.png", f"{stem}_mask.png"):
        noise(2).save(folder / name)
    (folder / f"{stem}.txt").write_text("a caption")
    (folder / "metadata.csv").write_text(f"file_name,text\n{gone},a cat\n./q.png,a {{}} dog\n")
    subject = Subject(str(folder), "dog", left_out=(gone,) if gone == "p0.jpg" else ())
    photos, notes = read_source(subject)
    assert [(photo.name, photo.caption) for photo in photos] == [("q.png", "a {} dog")]
    (about_masks,) = [note for note in notes if "masks or maps" in note]
    assert about_masks.startswith(f"{stem}_depth.png and {stem}_mask.png were taken for masks")
    assert not [note for note in notes if "no caption" in note]


def test_a_black_and_white_picture_is_a_mask_only_beside_its_photo(folder: Path) -> None:
    drawn = Image.new("L", (64, 48), 0)
    drawn.paste(255, (20, 10, 40, 30))
    for name in ("p0.png", "chess.png", "cat_mask.png"):
        drawn.save(folder / name)
    assert len(read_photos(folder)) == 3, "drawings may be the subject"
    noise(1).save(folder / "p0.jpg")
    noise(2).save(folder / "carnival_mask.jpg")
    source = read_source(folder)
    assert [p.name for p in source.photos] == ["carnival_mask.jpg", "chess.png", "p0.jpg"]
    assert source.notes[0].startswith("cat_mask.png and p0.png were taken for masks or maps")


# Colours, and decoders that may be missing


def test_wide_gamut_colours_become_srgb(folder: Path) -> None:
    profile = decoding._display_p3()
    shown = Image.new("RGB", (8, 8), (200, 60, 60))
    srgb = ImageCms.createProfile("sRGB")
    wide = ImageCms.profileToProfile(shown, srgb, io.BytesIO(profile))
    assert wide is not None and abs(wide.getpixel((0, 0))[0] - 184) < 4  # type: ignore[index]
    wide.save(folder / "a.png", icc_profile=profile)
    assert np.allclose(one_pixel(folder), [200, 60, 60], atol=2)
    wide.putalpha(51)
    wide.save(folder / "a.png", icc_profile=profile)
    assert np.allclose(one_pixel(folder), [244, 216, 216], atol=2)
    wide.convert("RGB").quantize(4).save(folder / "a.png", icc_profile=profile)
    assert np.allclose(one_pixel(folder), [200, 60, 60], atol=2)


@pytest.mark.parametrize(
    "profile", [b"broken", decoding._display_p3()[:200], decoding._display_p3()]
)
def test_a_profile_that_does_not_fit_is_passed_over(folder: Path, profile: bytes) -> None:
    Image.new("L", (8, 8), 90).save(folder / "a.png", icc_profile=profile)
    assert one_pixel(folder) == [90, 90, 90]


def test_an_srgb_profile_changes_no_level(folder: Path) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    noise(1).save(folder / "a.png", icc_profile=profile)
    (photo,) = read_photos(folder)
    assert np.array_equal(np.asarray(photo.image), np.asarray(noise(1)))


def test_heic_is_read_where_pillow_heif_is_installed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = types.ModuleType("pillow_heif")

    class Heif(ImageFile.ImageFile):
        format = "HEIF"

        def _open(self) -> None:
            self._size, self._mode = (4, 4), "RGB"
            self.tile = []

        def load(self) -> Any:
            self.im = Image.new("RGB", (4, 4), "red").im
            return Image.Image.load(self)

    def register() -> None:
        Image.register_open("HEIF", Heif, lambda head: head[4:12] == b"ftypheic")

    module.register_heif_opener = register  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pillow_heif", module)
    monkeypatch.setattr(Image, "OPEN", dict(Image.OPEN))
    decoding.formats.cache_clear()
    (folder / "IMG_1.HEIC").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0")
    try:
        assert one_pixel(folder) == [255, 0, 0]
    finally:
        decoding.formats.cache_clear()


def test_heic_without_a_profile_is_in_the_colours_that_it_names(folder: Path) -> None:
    pytest.importorskip("pillow_heif")
    decoding.formats.cache_clear()
    decoding.formats()
    wide, kept = Image.new("RGB", (64, 64), (185, 71, 66)), {"transfer_characteristics": 13}
    options = kept | {"matrix_coefficients": 6, "full_range_flag": 1, "quality": 95}
    wide.save(folder / "a.heic", "HEIF", color_primaries=12, **options)  # Display P3
    assert np.abs(np.subtract(one_pixel(folder), (200, 60, 60))).max() <= 4
    wide.save(folder / "a.heic", "HEIF", color_primaries=1, **options)  # sRGB
    assert np.abs(np.subtract(one_pixel(folder), (185, 71, 66))).max() <= 2


@pytest.mark.parametrize("kind", ["HEIF", "AVIF"])
def test_phone_photos_are_read_as_a_viewer_shows_them(folder: Path, kind: str) -> None:
    decoding.formats.cache_clear()
    if kind == "HEIF":
        pytest.importorskip("pillow_heif")
    if kind not in decoding.formats():
        pytest.skip(f"no decoder for {kind}")
    srgb = Image.new("RGB", (96, 64), (200, 60, 60))
    srgb.paste((0, 0, 255), (0, 0, 48, 64))
    profile = ImageCms.ImageCmsProfile(io.BytesIO(decoding._display_p3()))
    wide = ImageCms.profileToProfile(srgb, ImageCms.createProfile("sRGB"), profile)
    assert wide is not None
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    wide.save(
        folder / f"IMG_1.{kind}",
        kind,
        quality=95,
        icc_profile=decoding._display_p3(),
        exif=exif.tobytes(),
    )
    (photo,) = read_photos(folder)
    image = photo.image
    assert image.size == (64, 96) and image.info == {}
    assert np.abs(np.asarray(image)[80, 32].astype(int) - (200, 60, 60)).max() <= 6
    assert np.asarray(image)[10, 32].argmax() == 2
    (folder / f"IMG_2.{kind}").write_bytes((folder / f"IMG_1.{kind}").read_bytes()[:400])
    with pytest.raises(BadPhotosError, match="IMG_2") as caught:
        read_photos(folder)
    assert caught.value.names == (f"IMG_2.{kind}",)


# Bounds


def test_a_phones_50_megapixels_are_within_the_limit(folder: Path) -> None:
    Image.new("1", (8192, 6144), 1).save(folder / "a.png")
    assert read_photos(folder)[0].traits.size == (8192, 6144)
    assert images.KEPT_PIXELS >= 8192 * 6144


def test_many_flat_pictures_are_refused_before_they_fill_the_memory(
    tmp_path: Path, refused: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    flat = encoded(Image.new("1", (4000, 4000)))
    bomb = make_zip(tmp_path / "flat.zip", {f"{i}.png": flat + bytes([i]) for i in range(40)})
    monkeypatch.setattr(images, "MAX_FLAT_PIXELS", 50_000_000)
    refused(bomb, "flat.zip", "50,000,000 pixels")


def test_a_picture_that_takes_too_long_is_refused(
    folder: Path, refused: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A JPEG whose last scan is there a thousand times, and one that is decoded in Python."""
    monkeypatch.setattr(decoding, "MAX_SECONDS", 0.3)
    jpeg = encoded(Image.new("RGB", (2000, 2000)), "JPEG", progressive=True)
    last = jpeg[jpeg.rindex(b"\xff\xda") : -2]
    (folder / "x.jpg").write_bytes(jpeg[:-2] + last * 3000 + b"\xff\xd9")
    refused(folder, "x.jpg", "to decode; save it as JPEG or PNG")
    (folder / "x.jpg").unlink()
    header = b"qoif" + struct.pack(">II", 3000, 3000) + bytes([3, 0])
    (folder / "x.qoi").write_bytes(header + b"\xfe\1\2\3" * 9_000_000)
    refused(folder, "x.qoi", "to decode; save it as JPEG or PNG")


@pytest.mark.parametrize("packed", [False, True])
def test_photos_beyond_the_first_are_decoded_on_demand(
    folder: Path, tmp_path: Path, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "KEPT_PIXELS", 2 * 64 * 48)
    names = [f"{i}.png" for i in range(4)]
    for i, name in enumerate(names):
        noise(i).save(folder / name)
    where = folder
    if packed:
        where = make_zip(tmp_path / "a.zip", {n: (folder / n).read_bytes() for n in names})
    photos = read_photos(where)
    kept = [photo.pixels.kept is not None for photo in photos]  # type: ignore[union-attr]
    assert kept == [True, True, False, False]
    for number, image in enumerate(images.Images(photos)):
        assert np.array_equal(np.asarray(image), np.asarray(noise(number)))
    assert [len(part) for part in (images.Images(photos)[1:3], images.Images(photos))] == [2, 4]
    assert captioned(photos, "a")[3].image.size == (64, 48)
    if packed:
        where.unlink()  # the open zip is there still
        assert photos[3].image.size == (64, 48)
        return
    noise(9).save(folder / "3.png")
    with pytest.raises(DataError, match=r"'3\.png' in .* has changed since it was read"):
        _ = photos[3].image
    (folder / "3.png").unlink()
    with pytest.raises(DataError, match=r"'3\.png' in .* cannot be read .*; replace"):
        _ = photos[3].image
    assert photos[0].image.size == (64, 48)


def test_a_photo_read_again_is_not_measured_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "KEPT_PIXELS", 0)
    noise(123).save(folder / "a.png")
    (first,) = read_photos(folder)
    monkeypatch.setattr(images, "measure", None)
    monkeypatch.setattr(images, "decode", None)
    (again,) = read_photos(folder)
    assert again.traits is first.traits


@pytest.mark.parametrize("name", ["a\nb.png", "\x1b[2J.png", "\udcff.png"])
def test_odd_names_are_told_in_a_printable_line(
    folder: Path, refused: Callable[..., None], name: str
) -> None:
    (folder / name).write_bytes(b"no photo")
    with pytest.raises(DataError) as caught:
        read_photos(folder)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("content", [b"", b"\x0c", b"P", b"\x0c\0\0\0", b"\xff\xd8"])
def test_the_shortest_side_files_are_passed_over(folder: Path, content: bytes) -> None:
    noise(1).save(folder / "a.png")
    (folder / "x.dat").write_bytes(content)
    assert [photo.name for photo in read_photos(folder)] == ["a.png"]


def test_images_are_embedded_without_holding_them_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "KEPT_PIXELS", 0)
    decoded: list[weakref.ref[Image.Image]] = []

    def decode(*given: Any) -> Image.Image:
        image = decoding.decode(*given)
        decoded.append(weakref.ref(image))
        return image

    monkeypatch.setattr(images, "decode", decode)
    for number in range(3 * encoders.BATCH):
        noise(number).save(tmp_path / f"{number:03}.png")
    photos = read_photos(tmp_path)
    most = 0

    def features(batch: list[Image.Image]) -> torch.Tensor:
        nonlocal most
        most = max(most, sum(image() is not None for image in decoded))
        return torch.zeros(len(batch), 2)

    embed = encoders.Encoder._embed
    encoder = types.SimpleNamespace(device="cpu")
    assert embed(encoder, images.Images(photos), features, "images").shape == (len(photos), 2)  # type: ignore[arg-type]
    assert most <= 2 * encoders.BATCH


def test_names_with_accents_belong_together_in_either_spelling(folder: Path) -> None:
    """As macOS spells them in a folder or zip, and another program in a table."""
    composed, apart = (unicodedata.normalize(form, "été") for form in ("NFC", "NFD"))
    assert composed != apart
    for spelt, other in ((composed, apart), (apart, composed)):
        place = folder / spelt
        place.mkdir(exist_ok=True)
        noise(1).save(place / f"{spelt}.png")
        (place / f"{other}.txt").write_text("a {} dog")
        (photo,) = read_photos(place)
        assert photo.caption == "a {} dog"
        captions.write_captions(place, {photo.name: "a new one"})
        assert len([*place.iterdir()]) == 2 and read_photos(place)[0].caption == "a new one"
        (place / f"{other}.txt").unlink()
        (place / "metadata.csv").write_text(f"file_name,text\n{other}.png,of a table\n")
        assert read_photos(place)[0].caption == "of a table"
        (place / "metadata.csv").unlink()
        (place / "metadata.json").write_text(json.dumps({other: {"caption": "of kohya's"}}))
        assert read_photos(place)[0].caption == "of kohya's"
        (place / "metadata.json").unlink()
        noise(2).save(place / f"{other}-masklabel.png")
        (photo,) = read_photos(place)
        assert photo.mask is not None and photo.mask.name == f"{other}-masklabel.png"
