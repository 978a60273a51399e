"""Test that a backup holds nothing that is nobody else's business, and trains as the run does."""

import io
import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from drive_faults import Make
from drive_faults import drive as drive
from drive_faults import no_waits as no_waits
from drive_faults import run as run
from PIL import ExifTags, Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from dreambooth_lib.core.digests import changed_file, write_digests
from dreambooth_lib.data import decoding, images
from dreambooth_lib.data.images import read_photos
from dreambooth_lib.notebook import drive_copy
from dreambooth_lib.notebook.drive_backup import backup
from dreambooth_lib.notebook.drive_restore import find_interrupted, restore
from dreambooth_lib.training import runs
from dreambooth_lib.training.loop import train
from dreambooth_lib.training.runs import Run

SECRET = "at-home-street-7"


def photo_with_metadata(suffix: str, seed: int) -> bytes:
    """Return a photo, on its side, that says where it was taken in every way it can."""
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 9, 3)).astype(np.uint8)
    image = Image.fromarray(pixels.repeat(4, 0).repeat(4, 1))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    exif[ExifTags.Base.ImageDescription] = SECRET
    exif.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSAreaInformation] = SECRET.encode()
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    info, data = PngInfo(), io.BytesIO()
    info.add_text("Comment", SECRET)
    xmp = f"<x:xmpmeta xmlns:x='adobe:ns:meta/'>{SECRET}</x:xmpmeta>".encode()
    extra = {
        ".png": {"pnginfo": info, "exif": exif, "icc_profile": profile},
        ".jpg": {"exif": exif, "icc_profile": profile, "comment": SECRET.encode(), "xmp": xmp},
        ".webp": {"exif": exif, "icc_profile": profile, "xmp": xmp},
        ".tiff": {"exif": exif, "icc_profile": profile},
    }[suffix]
    image.save(data, Image.registered_extensions()[suffix], **extra)
    assert SECRET.encode() in data.getvalue()
    return data.getvalue()


def photos_with_metadata(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for number, suffix in enumerate((".png", ".jpg", ".webp", ".tiff")):
        (folder / f"{9 - number}{suffix}").write_bytes(photo_with_metadata(suffix, number))
    (folder / "9.txt").write_text("a ohwx dog\non the beach")
    row = {"file_name": "8.jpg", "text": "a ohwx dog, 'quoted'"}
    (folder / "metadata.jsonl").write_text(json.dumps(row))
    return folder


def zipped(folder: Path) -> Path:
    archive = folder.with_suffix(".zip")
    with zipfile.ZipFile(archive, "w") as file:
        file.comment = SECRET.encode()
        for path in sorted(folder.iterdir()):
            file.write(path, f"inner/{path.name}")
    return archive


def contents(pictures: str | Path) -> list[tuple[str, bytes, str | None]]:
    return [
        (Path(p.name).stem, p.image.tobytes(), p.caption or None) for p in read_photos(pictures)
    ]


@pytest.mark.parametrize("as_zip", [False, True])
def test_photos_on_the_drive_are_what_training_sees_and_nothing_more(
    tmp_path: Path, drive: Path, make_config: Make, as_zip: bool
) -> None:
    folder = photos_with_metadata(tmp_path / "uploads" / "rex")
    pictures = zipped(folder) if as_zip else folder
    own = photos_with_metadata(tmp_path / "uploads" / "dogs")
    run = runs.start(
        make_config("toybox", str(pictures), class_folder=str(own)), tmp_path / "runs" / "my-dog"
    )
    expected = contents(pictures)
    assert backup(run, drive / "my-dog") is None
    for file in (drive / "my-dog").rglob("*"):
        assert file.is_dir() or SECRET.encode() not in file.read_bytes(), file
    for file in (drive / "my-dog").rglob("*.png"):
        with Image.open(file) as image:
            assert not image.info and not image.getexif(), file
    shutil.rmtree(tmp_path / "uploads")
    shutil.rmtree(tmp_path / "runs")
    back = restore(drive / "my-dog", tmp_path / "runs" / "my-dog")
    assert contents(back.config.subject.photos) == expected
    assert back.config.class_folder is not None
    assert contents(back.config.class_folder) == contents(drive / "my-dog" / "class_photos")
    assert backup(back, drive / "my-dog") is None


def test_a_restored_run_trains_to_the_same_bits(
    tmp_path: Path, drive: Path, make_config: Make
) -> None:
    pictures = photos_with_metadata(tmp_path / "uploads" / "rex")
    config = make_config("toybox", str(pictures), steps=2)
    run = runs.start(config, tmp_path / "runs" / "my-dog")
    assert backup(run, drive / "my-dog") is None
    back = restore(drive / "my-dog", tmp_path / "back" / "my-dog")
    losses = [[step.loss for step in train(each)] for each in (run, back)]
    assert losses[0] == losses[1]


def test_photos_keep_their_order_where_names_would_collide(
    tmp_path: Path, drive: Path, make_config: Make
) -> None:
    folder = tmp_path / "rex"
    folder.mkdir()
    for number, name in enumerate(("a.jpg", "a.png", "a-1.png", "b.tiff", "a.b.webp")):
        (folder / name).write_bytes(photo_with_metadata(Path(name).suffix, number))
    run = runs.start(make_config("toybox", str(folder)), tmp_path / "runs" / "my-dog")
    assert backup(run, drive / "my-dog") is None
    before, after = (contents(place) for place in (folder, drive / "my-dog" / "photos"))
    assert [pixels for _, pixels, _ in before] == [pixels for _, pixels, _ in after]


def test_no_local_path_is_on_the_drive(
    tmp_path: Path, drive: Path, tiny_sd1: str, make_config: Make
) -> None:
    base = shutil.copytree(tiny_sd1, tmp_path / "models" / "my-base")
    pictures = photos_with_metadata(tmp_path / "uploads" / "rex")
    config = make_config(
        str(base),
        str(pictures),
        class_folder=str(pictures),
        scorer=str(base),
        method="lora",
        draw_base=str(base),
    )
    run = runs.start(config, tmp_path / "machine" / "runs" / "my-dog")
    (made := run.folder.parent / "class_images" / "set").mkdir(parents=True)
    manifest = json.dumps({"base": str(base), "prompt": "a dog"}, indent=2)
    (made / "manifest.json").write_text(manifest)
    run.save_checkpoint(1, {"step": 1})
    run.pipeline.mkdir()
    (run.pipeline / "base.json").write_text(json.dumps({"base": str(base), "word": None}))
    assert backup(run, drive / "my-dog") is None
    for file in (drive / "my-dog").rglob("*"):
        assert file.is_dir() or str(tmp_path).encode() not in file.read_bytes(), file
    there = runs.resume(drive / "my-dog").config
    assert there.subject.photos == str(drive / "my-dog" / "photos")
    shutil.rmtree(run.pipeline)
    assert backup(run, drive / "my-dog") is None
    before = run.config
    shutil.rmtree(tmp_path / "machine")
    found, message = find_interrupted(True, [drive], str(pictures), "dog", str(base))
    assert found is not None, message
    back = restore(drive / "my-dog", run.folder)
    for name in ("base", "draw_base", "scorer"):
        assert getattr(back.config, name) == getattr(before, name)
    assert back.config.subject.photos == str(run.folder / "photos")
    assert back.config.class_folder == str(run.folder / "class_photos")
    assert (made / "manifest.json").read_text() == manifest
    other, message = find_interrupted(True, [drive], None, "dog", tiny_sd1)
    assert other is None and "it began with base" in message


def test_a_pipeline_whose_note_names_a_local_base_counts_as_whole_there_and_back(
    run: Run, drive: Path, tmp_path: Path, tiny_sd1: str
) -> None:
    run.pipeline.mkdir()
    note = json.dumps({"base": tiny_sd1, "word": None}, indent=2)
    (run.pipeline / "base.json").write_text(note)
    (run.pipeline / "weights.safetensors").write_bytes(b"weights")
    write_digests(run.pipeline)
    assert backup(run, drive / "my-dog") is None
    there = drive / "my-dog" / "pipeline"
    assert tiny_sd1 not in (there / "base.json").read_text() and changed_file(there) is None
    back = restore(drive / "my-dog", run.folder.with_name("back"))
    assert (back.pipeline / "base.json").read_text() == note
    assert changed_file(back.pipeline) is None
    copied = contents_of(there)
    assert backup(back, drive / "my-dog") is None
    assert contents_of(there) == copied, "nothing is copied again"


@pytest.mark.parametrize("name", ["base.json", "weights.safetensors"])
def test_a_damaged_pipeline_stays_known_as_damaged(
    run: Run, drive: Path, tiny_sd1: str, name: str
) -> None:
    run.pipeline.mkdir()
    for file in ("base.json", "weights.safetensors"):
        (run.pipeline / file).write_text(json.dumps({"base": tiny_sd1}))
    write_digests(run.pipeline)
    (run.pipeline / name).write_text(json.dumps({"base": f"{tiny_sd1}/other"}))
    assert backup(run, drive / "my-dog") is None
    assert changed_file(drive / "my-dog" / "pipeline") == name
    back = restore(drive / "my-dog", run.folder.with_name("back"))
    assert changed_file(back.pipeline) == name


def test_copies_of_photos_are_compared_without_decoding_them_again(
    run: Run, drive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = []

    def decode(*given: Any) -> Image.Image:
        decoded.append(given[0])
        return decoding.decode(*given)

    monkeypatch.setattr(images, "KEPT_PIXELS", 0)
    monkeypatch.setattr(images, "decode", decode)
    pictures = Path(run.config.subject.photos)
    for file in list(pictures.glob("*.png")):
        Image.open(file).save(file.with_suffix(".bmp"))  # of other bytes than the copies
        file.unlink()
    images._traits.clear()
    drive_copy.copy_photos(pictures, drive / "photos")
    assert len(decoded) == 9, "three photos: measured, written, and their copies measured"


def contents_of(folder: Path) -> dict[Path, tuple[bytes, int]]:
    return {file: (file.read_bytes(), file.stat().st_mtime_ns)
            for file in folder.rglob("[!.]*") if file.is_file()}  # fmt: skip


def test_photos_that_are_gone_keep_their_copies_on_the_drive(
    tmp_path: Path, drive: Path, make_config: Make
) -> None:
    pictures = photos_with_metadata(tmp_path / "uploads" / "rex")
    run: Run = runs.start(make_config("toybox", str(pictures)), tmp_path / "runs" / "my-dog")
    assert backup(run, drive / "my-dog") is None
    shutil.rmtree(pictures)
    assert backup(run, drive / "my-dog") is None
    assert len(contents(drive / "my-dog" / "photos")) == 4
