"""Test which interrupted run or backup is found and resumed."""

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import save_photos
from drive_faults import Make, finish, newest, save
from drive_faults import drive as drive
from drive_faults import faults as faults
from drive_faults import no_waits as no_waits
from drive_faults import run as run
from PIL import Image

from dreambooth_lib.core import background
from dreambooth_lib.data.images import Photo, read_photos
from dreambooth_lib.notebook import drive_compare, drive_state
from dreambooth_lib.notebook.drive_backup import backup
from dreambooth_lib.notebook.drive_restore import (
    fetch,
    find_interrupted,
    unique_name,
)
from dreambooth_lib.training import runs
from dreambooth_lib.training.loop import train
from dreambooth_lib.training.photo_record import digests_of, known_digests
from dreambooth_lib.training.runs import Run, RunError

# Finding


def test_the_newest_run_that_has_not_finished_is_found(
    tmp_path: Path, photos: str, make_config: Make
) -> None:
    def make(name: str, modified: int, finished: bool = False, steps: int = 0) -> None:
        run = runs.start(make_config("toybox", photos), tmp_path / name)
        run.append("log", {"step": 1})
        for file in ("config.toml", "log.jsonl"):
            os.utime(run.folder / file, (modified, modified))
        if steps:
            save(run, steps)
        if finished:
            run.pipeline.mkdir()
            (run.pipeline / "model_index.json").write_text("{}")

    assert newest(tmp_path, None, tmp_path / "nowhere") is None
    make("runs/done", 3000, finished=True, steps=4)
    assert newest(tmp_path / "runs") is None
    make("runs/old", 1000, steps=2)
    make("drive/new", 2000, steps=3)
    (tmp_path / "runs" / "broken").mkdir()
    (tmp_path / "runs" / "broken" / "config.toml").write_text("steps =")
    (tmp_path / "runs" / "notes.txt").write_text("")
    found = newest(None, tmp_path / "runs", tmp_path / "drive")
    assert found is not None and found.run.folder == tmp_path / "drive" / "new"
    assert (found.step, found.finished) == (3, False)
    assert str(found).endswith("new: step 3 of 4, last saved 1970-01-01 00:33 UTC")


def test_of_a_run_and_its_backup_the_further_one_is_found(run: Run, drive: Path) -> None:
    backup(run, drive / "my-dog")
    found = newest(run.folder.parent, drive)
    assert found is not None and found.run.folder == run.folder, "of equals the first"
    run.append("log", {"step": 201, "loss": 0.4})
    found = newest(drive, run.folder.parent)
    assert found is not None and found.run.folder == run.folder
    shutil.rmtree(run.folder)
    found = newest(run.folder.parent, drive)
    assert found is not None and (found.run.folder, found.step) == (drive / "my-dog", 200)


def test_a_finished_run_does_not_lose_to_its_own_older_backup(run: Run, drive: Path) -> None:
    backup(run, drive / "my-dog")
    finish(run)
    assert newest(run.folder.parent, drive) is None, "the run itself has finished"
    save(run, 300)
    backup(run, drive / "my-dog")
    shutil.rmtree(run.pipeline)  # resumed, for more steps
    save(run, 400)
    found = newest(run.folder.parent, drive)
    assert found is not None and (found.run.folder, found.step) == (run.folder, 400)


def test_an_extended_run_does_not_lose_to_its_backup_of_a_shorter_goal(
    run: Run, drive: Path
) -> None:
    save(run, 300)
    finish(run)
    (run.pipeline / runs.GOAL_FILE).write_text(json.dumps(run.goal()))
    backup(run, drive / "my-dog")
    assert newest(run.folder.parent, drive) is None
    runs.resume(run.folder, steps=500)
    for folders in ((run.folder.parent, drive), (drive, run.folder.parent)):
        found = newest(*folders)
        assert found is not None and (found.run.folder, found.step) == (run.folder, 300)


# Resuming


def test_a_run_whose_photos_were_replaced_is_not_resumed(
    tmp_path: Path, tiny_sd1: str, make_config: Make
) -> None:
    place = tmp_path / "rex"
    save_photos(place)
    run = runs.start(
        make_config(tiny_sd1, str(place), steps=4, checkpoint_every=1), tmp_path / "runs" / "rex"
    )
    for step in train(run):
        if step.step == 2:
            break
    asked = {"photos": str(place), "base": tiny_sd1}
    assert interrupted(run, tmp_path / "no-drive", **asked)[0] == run.folder
    for number, file in enumerate(sorted(place.glob("*.png"))):
        Image.effect_noise((64, 64), 60 + 10 * number).convert("RGB").save(file)
    folder, said = interrupted(run, tmp_path / "no-drive", **asked)
    assert folder is None and f"its photos are not those in {place}" in said
    with pytest.warns(UserWarning, match="began with other photos than .*start a new run"):
        list(train(runs.resume(run.folder)))
    now = known_digests(run.folder)
    assert now == digests_of(read_photos(place)), "it trained on with these"
    shutil.rmtree(run.pipeline)
    (place / "0.png").unlink()
    with pytest.warns(UserWarning, match="began with other photos than .*start a new run"):
        list(train(runs.resume(run.folder)))
    assert run.finished and known_digests(run.folder) == now, "it trained no step on these"


def interrupted(run: Run, drive: Path, **other: Any) -> tuple[Path | None, str]:
    """Return the folder of the run that is resumed, and what its user is told."""
    asked: dict[str, Any] = {
        "resume": True, "photos": run.config.subject.photos, "class_noun": "dog",
        "base": "toybox",
    }  # fmt: skip
    found, message = find_interrupted(folders=[run.folder.parent, drive], **(asked | other))
    return (found.run.folder if found else None), message


def test_a_run_of_the_same_photos_noun_and_base_is_resumed(
    run: Run, drive: Path, tmp_path: Path
) -> None:
    folder, message = interrupted(run, drive)
    assert folder == run.folder
    assert message.startswith(f"Resuming {run.folder}: step 200 of 400")
    packed = shutil.make_archive(str(tmp_path / "zipped"), "zip", run.config.subject.photos)
    assert interrupted(run, drive, photos=packed)[0] == run.folder, "the content counts"
    assert interrupted(run, drive, photos=None)[0] == run.folder, "they are uploaded later"
    backup(run, drive / "my-dog")
    shutil.rmtree(run.folder.parent)
    assert interrupted(run, drive)[0] == drive / "my-dog"
    pictures = run.config.subject.photos
    shutil.rmtree(pictures)
    assert interrupted(run, drive, photos=pictures)[0] == drive / "my-dog", "gone with the machine"


def test_a_run_of_something_else_is_not_resumed_until_it_is_named(
    run: Run, drive: Path, tmp_path: Path, tiny_sd1: str
) -> None:
    others = {
        "class_noun": ("cat", "it began with class noun 'dog', but your settings have 'cat'"),
        "base": (tiny_sd1, f"it began with base 'toybox', but your settings have '{tiny_sd1}'"),
        "photos": (save_photos(tmp_path / "max", 2), "its photos are not those in"),
    }
    for field, (value, why) in others.items():
        folder, message = interrupted(run, drive, **{field: value})
        assert folder is None and f"UTC; {why}" in message
        assert message.startswith(f"Not resumed: {run.folder}: step 200 of 400, last saved ")
        assert "set RESUME = 'my-dog' to resume it.\nStarting a new run." in message
        assert interrupted(run, drive, resume="my-dog", **{field: value})[0] == run.folder
    assert interrupted(run, drive, resume=False) == (None, "Starting a new run.")
    with pytest.raises(RunError, match=r"no run named 'max'; set RESUME to 'my-dog', or to True"):
        interrupted(run, drive, resume="max")
    finish(run)
    told = "Finished runs here: 'my-dog'; set RESUME = 'my-dog' to open it.\nStarting a new run."
    assert interrupted(run, drive) == (None, told)
    assert interrupted(run, drive, resume=False) == (None, "Starting a new run.")
    folder, message = interrupted(run, drive, resume="my-dog")
    assert folder == run.folder and message.startswith(f"Opening finished {run.folder}: step ")


def test_photos_in_the_home_folder_are_compared(
    run: Run, drive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    save_photos(tmp_path / "max", 2)
    found, message = interrupted(run, drive, photos="~/max")
    assert found is None and "its photos are not those in ~/max" in message


@pytest.mark.parametrize("damaged", ["both", "own", "given"])
def test_photos_that_cannot_be_read_are_not_taken_for_the_same_or_for_others(
    run: Run, drive: Path, tmp_path: Path, damaged: str
) -> None:
    given = save_photos(tmp_path / "max", 2)
    broken = {"both": [given, run.config.subject.photos], "given": [given],
              "own": [run.config.subject.photos]}[damaged]  # fmt: skip
    for folder in broken:
        (Path(folder) / "0.png").write_bytes(b"no photo")
    found, message = interrupted(run, drive, photos=given)
    assert found is None
    # Of the photos that are given, a damaged one is passed over, as a run may have been.
    told = "are not" if damaged == "given" else "could not be compared with"
    assert f"UTC; its photos {told} those in {given}; set RESUME" in message


def test_many_large_photos_have_the_time_that_they_take(
    run: Run, drive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_slowly(source: str) -> list[Photo]:
        time.sleep(0.5)
        return read_photos(source)

    monkeypatch.setattr(background, "ANSWER_LIMIT", 0.3)
    monkeypatch.setattr(drive_compare, "read_photos", read_slowly)
    assert interrupted(run, drive)[0] == run.folder
    others = save_photos(tmp_path / "max", 2)
    assert "its photos are not those in" in interrupted(run, drive, photos=others)[1]


def test_an_older_run_that_matches_is_resumed_before_a_newer_one_that_does_not(
    run: Run, drive: Path, tmp_path: Path, make_config: Make
) -> None:
    other = make_config("toybox", save_photos(tmp_path / "max", 2))
    runs.start(other, run.folder.parent / "max")
    for file in ("config.toml", "log.jsonl"):
        os.utime(run.folder / file, (1, 1))
    assert interrupted(run, drive)[0] == run.folder


def test_a_name_is_unique_among_folders_and_zips(tmp_path: Path) -> None:
    runs_, drive = tmp_path / "runs", tmp_path / "drive"
    for place in (runs_ / "dog", runs_ / "cat", drive / "dog-3"):
        place.mkdir(parents=True)
    (drive / "dog-2.zip").write_text("")
    assert unique_name("dog", runs_, drive, None, tmp_path / "nowhere") == "dog-4"
    assert unique_name("cow", runs_, drive) == "cow"
    assert unique_name("cat", runs_) == "cat-2"


def test_a_run_is_fetched_beside_another_of_its_name(run: Run, drive: Path) -> None:
    backup(run, drive / "my-dog")
    (found,) = [f for f in [newest(run.folder.parent)] if f]
    assert fetch(found, run.folder.parent, drive) == found.run
    backed_up = newest(drive)
    assert backed_up is not None
    back = fetch(backed_up, run.folder.parent, drive)
    assert back.folder == run.folder.parent / "my-dog-2" and back.checkpoints().keys() == {200}
    assert (run.folder / "config.toml").exists()
    shutil.rmtree(run.folder)
    assert fetch(backed_up, run.folder.parent, drive).folder == run.folder


def test_a_run_without_a_backup_gets_no_identity(run: Run) -> None:
    newest(run.folder.parent)
    assert not (run.folder / drive_state.IDENTITY).exists()
