"""Test that a backup is restored to the run that it was."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_photos
from drive_faults import Faults, Make, lose, newest, save, shown, tree
from drive_faults import drive as drive
from drive_faults import faults as faults
from drive_faults import no_waits as no_waits
from drive_faults import run as run
from PIL import Image
from safetensors.torch import load_file

from dreambooth_lib.core.subject import Subject
from dreambooth_lib.notebook import (
    drive_copy,
)
from dreambooth_lib.notebook.drive_backup import backup
from dreambooth_lib.notebook.drive_restore import (
    RestoreError,
    find_interrupted,
    has_finished,
    restore,
)
from dreambooth_lib.training import photo_record, runs
from dreambooth_lib.training.loop import train
from dreambooth_lib.training.run_photos import read_own_class_images, read_subject_photos
from dreambooth_lib.training.runs import Run, RunError


def test_a_restored_run_is_the_run_with_its_own_photos(
    run: Run, drive: Path, tmp_path: Path, faults: Faults
) -> None:
    backup(run, drive / "my-dog")
    before, photos = tree(run.folder), tree(Path(run.config.subject.photos))
    lose(run)
    back = restore(drive / "my-dog", tmp_path / "runs" / "my-dog")
    assert tree(Path(back.config.subject.photos)) == photos
    left = (".partial", "config.toml", "000100/tensors", "000100/state", "000100/digests", ".lock")
    same = [name for name in before if not any(part in name for part in left)]
    assert {n: tree(back.folder)[n] for n in same} == {n: before[n] for n in same}
    subject = back.config.subject
    assert back.config == run.config.replace(subject=subject)
    assert (subject.name, subject.token) == (run.config.subject.name, run.config.subject.token)
    faults.copied.clear()
    assert backup(back, drive / "my-dog") is None, "its own backup goes on"
    assert faults.copied == ["config.toml"], "the rest is there already"


def test_a_photo_that_was_left_out_stays_out_of_the_backup(
    tmp_path: Path, drive: Path, make_config: Make
) -> None:
    photos = Path(save_photos(tmp_path / "uploads" / "rex", 3))
    Image.open(photos / "0.png").save(photos / "0.bmp")
    (photos / "0.png").write_bytes(b"damaged")  # its name is that of a copy of 0.bmp
    subject = Subject(str(photos), "dog", left_out=("0.png",))
    config = make_config("toybox", str(photos), subject=subject)
    run = runs.start(config, tmp_path / "runs" / "my-dog")
    used = [photo.traits.digest for photo in read_subject_photos(run)]
    assert backup(run, drive / "my-dog") is None and len(used) == 3
    found, _ = find_interrupted(True, [tmp_path / "runs", drive], photos, "dog", "toybox")
    assert found is not None
    shutil.rmtree(run.folder)
    found, _ = find_interrupted(True, [drive], photos, "dog", "toybox", ["0.png"])
    assert found is not None, "the backup has the photos that were used"
    found, _ = find_interrupted(True, [drive], photos, "dog", "toybox")
    assert found is not None, "its damaged photo need not be named again"
    (photos / "1.png").rename(tmp_path / "another.png")
    found, message = find_interrupted(True, [drive], photos, "dog", "toybox")
    assert found is None and "its photos are not those in" in message
    (tmp_path / "another.png").rename(photos / "1.png")
    lose(run)
    back = restore(drive / "my-dog", tmp_path / "runs" / "my-dog")
    assert [photo.traits.digest for photo in read_subject_photos(back)] == used
    assert back.config.subject.left_out is None and backup(back, drive / "my-dog") is None


def test_a_restored_finished_run_has_the_photos_captions_crops_and_masks_that_it_noted(
    tmp_path: Path, drive: Path, make_config: Make
) -> None:
    photos = Path(save_photos(tmp_path / "uploads" / "rex", 3))
    (photos / "0.txt").write_text("a {} dog in the snow ")
    (photos / "crops.json").write_text('{"0.png": [0.3, 0.5]}')
    mask = Image.new("L", (12, 10))
    mask.paste(255, (0, 0, 12, 5))
    mask.save(photos / "mask_1.png")
    Image.open(photos / "1.png").save(photos / "1.jpg")
    (photos / "1.png").unlink()
    config = make_config("toybox", str(photos), crop="subject", background_weight=0.1)
    run = runs.start(config, tmp_path / "runs" / "my-dog")
    photo_record.note(run.folder, read_subject_photos(run), config)
    save(run, config.steps)
    assert backup(run, drive / "my-dog") is None
    lose(run)
    back = restore(drive / "my-dog", tmp_path / "runs" / "my-dog")
    assert runs.why_not_resumable(back.config, back.folder) is None
    (Path(back.config.subject.photos) / "0.txt").write_text("a {} dog")
    assert "other captions" in str(runs.why_not_resumable(back.config, back.folder))


def test_a_zip_and_own_and_generated_class_images_come_back(
    tmp_path: Path, drive: Path, make_config: Make
) -> None:
    photos, own = (save_photos(tmp_path / "uploads" / name, 2) for name in ("rex", "dogs"))
    packed = shutil.make_archive(photos, "zip", photos)
    config = make_config("toybox", packed, class_folder=own)
    run = runs.start(config, tmp_path / "runs" / "my-dog")
    for name, prompt in (("ours", "a dog"), ("others", "a cat")):
        drawn = Path(save_photos(run.folder.parent / "class_images" / name, 1))
        (drawn / "manifest.json").write_text(f'{{"base": "toybox", "prompt": "{prompt}"}}')
    assert backup(run, drive / "my-dog") is None
    before = {name: tree(Path(folder)) for name, folder in (("own", own), ("zip", packed))}
    ours = tree(run.folder.parent / "class_images" / "ours")
    zipped = tree(Path(photos))
    lose(run)
    back = restore(drive / "my-dog", tmp_path / "runs" / "my-dog")
    assert tree(Path(back.config.subject.photos)) == zipped
    assert back.config.class_folder is not None
    assert tree(Path(back.config.class_folder)) == before["own"]
    assert tree(back.folder.parent / "class_images") == {f"ours/{n}": d for n, d in ours.items()}
    assert not (back.folder / "class_images").exists()
    assert backup(back, drive / "my-dog") is None


def test_restoring_over_something_or_from_nothing_is_refused(
    run: Run, drive: Path, tmp_path: Path
) -> None:
    backup(run, drive / "my-dog")
    before = tree(run.folder)
    with pytest.raises(RunError, match="is not empty"):
        restore(drive / "my-dog", run.folder)
    with pytest.raises(RunError, match=r"has no config\.toml"):
        restore(drive, tmp_path / "back")
    assert tree(run.folder) == before and not (tmp_path / "back").exists()


def test_restoring_is_all_or_nothing(run: Run, drive: Path, tmp_path: Path, faults: Faults) -> None:
    backup(run, drive / "my-dog")
    faults.names = {"state.json": 2}
    assert restore(drive / "my-dog", tmp_path / "back").checkpoints().keys() == {200}

    def unreadable(place: Path) -> None:
        raise OSError(5, "Input/output error", str(drive / "my-dog" / "config.toml"))

    faults.names, faults.fault = {"state.json": 3}, unreadable
    with pytest.raises(RestoreError, match=r"Input/output error.*try again"):
        restore(drive / "my-dog", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_run_whose_backup_lost_its_state_is_found_and_restored(
    run: Run, drive: Path, tmp_path: Path
) -> None:
    backup(run, drive / "my-dog")
    (drive / "my-dog" / ".backup.json").write_text("")
    found = newest(drive)
    assert found is not None and found.step == 200
    assert shown(restore(found.run.folder, tmp_path / "back").folder).keys() >= {"log.jsonl"}
    assert backup(run, drive / "my-dog") is None, "its own identity is known all the same"


def test_a_drive_that_is_gone_holds_no_run_and_restores_none(
    run: Run, drive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(path: Path, *args: Any, real: Callable[..., Any], **kwargs: Any) -> Any:
        if drive in (path, *path.parents):
            raise OSError(107, "Transport endpoint is not connected")
        return real(path, *args, **kwargs)

    for name in ("iterdir", "stat", "exists", "mkdir"):
        real = getattr(Path, name)
        monkeypatch.setattr(Path, name, lambda *a, real=real, **k: gone(*a, real=real, **k))
    assert newest(drive) is None
    with pytest.raises(RestoreError, match="Transport endpoint"):
        restore(drive / "my-dog", tmp_path / "back")
    assert "Transport endpoint" in str(backup(run, drive / "my-dog"))


def test_a_run_resumes_after_a_disconnect_as_if_there_had_been_none(
    tmp_path: Path, drive: Path, tiny_sd1: str, make_config: Make
) -> None:
    def begin(name: str) -> Run:
        photos = save_photos(tmp_path / name / "uploads" / "rex")
        config = make_config(tiny_sd1, photos, steps=4, checkpoint_every=2, checkpoints_kept=1)
        return runs.start(config, tmp_path / name / "runs" / "my-dog")

    straight, run = begin("straight"), begin("broken")
    assert len(list(train(straight))) == 4
    for step in islice(train(run), 3):
        if step.step == 2:
            assert backup(run, drive / "my-dog") is None
    lose(run)
    found = newest(run.folder.parent, drive, base=tiny_sd1)
    assert found is not None and (found.step, found.finished) == (2, False)
    back = restore(found.run.folder, run.folder)
    assert [step.step for step in train(back)] == [3, 4]
    assert backup(back, drive / "my-dog") is None
    losses = [[(row["step"], row["loss"]) for row in r.log()] for r in (straight, back)]
    assert losses[0] == losses[1]
    ends = [shown(r.pipeline / "unet") for r in (straight, back)]
    assert ends[0] == ends[1]
    assert newest(drive, base=tiny_sd1) is None and has_finished(drive / "my-dog")
    assert max(runs.resume(drive / "my-dog").checkpoints()) == 4


def test_a_large_run_resumes_and_makes_its_pipeline_from_what_the_drive_has(
    tmp_path: Path, drive: Path, tiny_sd1: str, make_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drive_copy, "LARGE", 100)
    photos = save_photos(tmp_path / "uploads" / "rex")
    config = make_config(tiny_sd1, photos, steps=4, checkpoint_every=2, ema_decay=0.5)
    run = runs.start(config, tmp_path / "runs" / "my-dog")
    for step in train(run):
        if step.step == 2:
            assert backup(run, drive / "half-way") is None
    assert backup(run, drive / "my-dog") is None
    half_way = restore(drive / "half-way", tmp_path / "again" / "my-dog")
    assert [step.step for step in train(half_way)] == [3, 4]
    done = restore(drive / "my-dog", tmp_path / "back" / "my-dog")
    assert not done.finished and list(train(done)) == [] and done.finished
    expected, *found = (
        load_file(next((r.pipeline / "unet").glob("*.safetensors"))) for r in (run, done, half_way)
    )
    for weights in found:
        assert {value.dtype for value in weights.values()} == {torch.float32}
        assert all(torch.allclose(weights[k], expected[k], atol=2e-3) for k in expected)


@pytest.mark.parametrize("field", ["subject.photos", "class_folder"])
def test_a_run_moved_with_its_photos_says_which_field_names_them(
    tmp_path: Path, make_config: Make, field: str
) -> None:
    for name in ("rex", "dogs"):
        save_photos(tmp_path / "before" / name)
    config = make_config(
        "toybox", str(tmp_path / "before" / "rex"), class_folder=str(tmp_path / "before" / "dogs")
    )
    runs.start(config, tmp_path / "before" / "my-dog")
    after = (tmp_path / "before").rename(tmp_path / "after")
    if field == "class_folder":
        runs.resume(after / "my-dog", subject=replace(config.subject, photos=str(after / "rex")))
    with pytest.raises(RunError) as raised:
        next(train(runs.resume(after / "my-dog")))
    message = str(raised.value)
    assert f"{field} in {after / 'my-dog' / 'config.toml'}" in message
    assert f"resume('{after / 'my-dog'}', " in message and "\n" not in message
    subject = replace(config.subject, photos=str(after / "rex"))
    back = runs.resume(after / "my-dog", subject=subject, class_folder=str(after / "dogs"))
    assert len(read_subject_photos(back)) == len(read_own_class_images(back)) == 4


def test_a_run_restored_before_its_first_checkpoint_starts_with_its_photos(
    tmp_path: Path, drive: Path, make_config: Make
) -> None:
    photos = save_photos(tmp_path / "uploads" / "rex")
    run = runs.start(make_config("toybox", photos), tmp_path / "runs" / "my-dog")
    assert backup(run, drive / "my-dog") is None
    lose(run)
    back = restore(drive / "my-dog", tmp_path / "runs" / "my-dog")
    for seed in (0, 1):  # the same config, and another one
        begun = runs.start_or_resume(back.config.replace(seed=seed), back.folder)
    assert begun.config.seed == 1 and len(read_subject_photos(begun)) == 4
