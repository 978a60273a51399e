"""Test that a drive that hangs stops neither training nor the notebook."""

import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import save_photos
from drive_faults import Make, save, shown, wanted
from drive_faults import drive as drive
from drive_faults import no_waits as no_waits
from drive_faults import run as run

from dreambooth_lib.core import background, files
from dreambooth_lib.export import zip_download
from dreambooth_lib.notebook import drive_restore, drive_worker, will_it_fit
from dreambooth_lib.notebook.drive_backup import backup
from dreambooth_lib.notebook.drive_worker import Backup
from dreambooth_lib.training import runs
from dreambooth_lib.training.loop import train
from dreambooth_lib.training.runs import Run


@pytest.fixture
def frozen(monkeypatch: pytest.MonkeyPatch, drive: Path) -> Iterator[threading.Event]:
    """Make the drive hang in each listing and write until the event is set."""
    thawed = threading.Event()

    def hanging(name: str) -> None:
        real = getattr(Path, name)

        def call(path: Path, *args: Any, **kwargs: Any) -> Any:
            if drive in (path, *path.parents):
                thawed.wait(60)
            return real(path, *args, **kwargs)

        monkeypatch.setattr(Path, name, call)

    for name in ("iterdir", "mkdir", "write_bytes"):
        hanging(name)
    yield thawed
    thawed.set()


def copied(backup: Backup) -> None:
    """Wait for the copy that is under way."""
    drive_worker._under_way[backup._key].result.result(30)


def test_saving_returns_at_once_and_finishing_waits(run: Run, drive: Path) -> None:
    background_backup = Backup(run, drive / "my-dog")
    assert background_backup.save() is None
    assert background_backup.finish() is None
    assert shown(drive / "my-dog").items() >= wanted(run).items()


def test_a_drive_that_hangs_is_told_of_once_and_the_next_save_catches_up(
    run: Run, drive: Path, frozen: threading.Event
) -> None:
    hanging = Backup(run, drive / "my-dog", limit=0.2)
    start = time.monotonic()
    assert hanging.save() is None
    assert hanging.save() is None, "it is not late yet"
    assert time.monotonic() - start < 0.2
    time.sleep(0.3)
    assert "has not ended within" in str(hanging.save()) and hanging.save() is None
    assert "has not ended within" in str(hanging.finish())
    again = Backup(run, drive / "my-dog", limit=30)  # as when the cell is run again
    assert again.save() is None and threading.active_count() < 10
    frozen.set()
    copied(again)
    save(run, 300)
    assert again.save() is None and again.finish() is None
    assert shown(drive / "my-dog").items() >= wanted(run).items()


def test_training_takes_its_steps_while_the_drive_hangs(
    tmp_path: Path, drive: Path, frozen: threading.Event, make_config: Make
) -> None:
    config = make_config("toybox", save_photos(tmp_path / "rex"), steps=4, checkpoint_every=1)
    trained = runs.start(config, tmp_path / "runs" / "my-dog")
    hanging, slowest = Backup(trained, drive / "my-dog", limit=0.1), 0.0
    for _ in train(trained):
        start = time.monotonic()
        hanging.save()
        slowest = max(slowest, time.monotonic() - start)
    assert slowest < 1 and trained.finished
    frozen.set()
    copied(hanging)
    assert Backup(trained, drive / "my-dog").finish() is None
    assert max(runs.resume(drive / "my-dog").checkpoints()) == 4


def test_a_lasting_fault_is_told_once_until_a_copy_succeeds(
    run: Run, drive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = iter(["it is full", "it is full", None, "it is full", None])
    monkeypatch.setattr(drive_worker, "backup", lambda *_: next(results))
    failing = Backup(run, drive / "my-dog")
    told = []
    for _ in range(4):
        told.append(failing.save())
        copied(failing)
    assert told == [None, "it is full", None, None]
    assert failing.save() == "it is full"


def test_a_backup_of_a_run_in_training_is_one_moment_of_it(
    run: Run, drive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run goes on, and drops the checkpoint, while it is copied."""
    copy, went_on = files.shutil.copyfile, []

    def go_on(source: Path, place: Path) -> None:
        if source.name == "log.jsonl" and not went_on:
            run.append("log", {"step": 201, "loss": 0.4})
        if source.parent.name == "000200" and not went_on:
            went_on.append(True)
            for step in (300, 400, 500):
                save(run, step)
        copy(source, place)

    monkeypatch.setattr(files.shutil, "copyfile", go_on)
    assert backup(run, drive / "my-dog") is None and went_on
    assert [p.name for p in (drive / "my-dog" / "checkpoints").iterdir()] == ["000500"]
    assert backup(run, drive / "my-dog") is None
    assert shown(drive / "my-dog").items() >= wanted(run).items()


def test_of_a_growing_log_the_rows_of_its_moment_are_copied(
    run: Run, drive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (run.folder / "log.jsonl").read_bytes()
    copy = files.shutil.copyfile

    def grow(source: Path, place: Path) -> None:
        if source.name == "log.jsonl":
            run.append("log", {"step": 201, "loss": 0.4})
        copy(source, place)

    monkeypatch.setattr(files.shutil, "copyfile", grow)
    assert backup(run, drive / "my-dog") is None
    assert (drive / "my-dog" / "log.jsonl").read_bytes() == before


def test_reading_a_drive_that_hangs_ends_in_a_sentence(
    run: Run, drive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert backup(run, drive / "my-dog") is None
    thawed = threading.Event()
    monkeypatch.setattr(background, "ANSWER_LIMIT", 0.2)
    monkeypatch.setattr(background, "FILE_LIMIT", 0.2)
    for module, name in ((drive_restore, "_contents"), (drive_restore, "list_files")):
        monkeypatch.setattr(module, name, lambda *_: thawed.wait(60))
    asked = (True, [None, drive], None, "dog", "toybox")
    found, message = drive_restore.find_interrupted(*asked)
    assert found is None and message.count(str(drive)) == 1
    assert f"{drive} did not answer within 0 seconds, so runs there were skipped; " in message
    assert message.endswith("Starting a new run.")
    assert drive_restore.unique_name("rex", drive) == "rex"
    with pytest.raises(background.NoAnswerError, match="did not answer"):
        drive_restore.restore(drive / "my-dog", tmp_path / "back")
    monkeypatch.undo()
    monkeypatch.setattr(background, "FILE_LIMIT", 0.2)
    monkeypatch.setattr(background, "copy_file", lambda *_: thawed.wait(60))
    with pytest.raises(background.NoAnswerError, match="did not answer"):
        drive_restore.restore(drive / "my-dog", tmp_path / "back")
    assert not (tmp_path / "back").exists()
    thawed.set()


@pytest.mark.parametrize("name", ["copyfile", "stat"])
def test_a_copy_that_was_given_up_writes_nothing_more(
    run: Run, drive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The drive hangs in the midst of restoring, and answers when that has been given up."""
    assert backup(run, drive / "my-dog") is None
    thawed, held_up, real = threading.Event(), [], {"copyfile": shutil.copyfile, "stat": Path.stat}
    monkeypatch.setattr(background, "FILE_LIMIT", 0.3)

    def hang(source: Path, *given: Any, **options: Any) -> Any:
        if source == drive / "my-dog" / "log.jsonl" and threading.current_thread().daemon:
            held_up.append(threading.current_thread())
            thawed.wait(60)
        return real[name](source, *given, **options)

    files = drive_restore.list_files(drive / "my-dog")
    monkeypatch.setattr(drive_restore, "list_files", lambda _: files)
    monkeypatch.setattr(shutil if name == "copyfile" else Path, name, hang)
    with pytest.raises(background.NoAnswerError, match=r"log\.jsonl did not answer"):
        drive_restore.restore(drive / "my-dog", tmp_path / "new" / "back")
    thawed.set()
    held_up[0].join(10)
    assert not held_up[0].is_alive() and len(held_up) == 1
    assert list((tmp_path / "new").iterdir()) == []


def test_a_copy_to_a_drive_is_tried_again_but_not_after_its_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def copy_file(source: Path, place: Path) -> None:
        calls.append(place)
        if len(calls) == 1:
            raise OSError(5, "Input/output error")
        time.sleep(0.4)

    monkeypatch.setattr(background, "copy_file", copy_file)
    monkeypatch.setattr(background, "FILE_LIMIT", 0.2)
    assert "did not answer" in str(zip_download.copy_to(tmp_path, tmp_path / "a.zip"))
    assert len(calls) == 2


def test_copying_a_zip_and_asking_for_space_have_a_limit(
    tmp_path: Path, drive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    thawed = threading.Event()
    monkeypatch.setattr(background, "ANSWER_LIMIT", 0.2)
    monkeypatch.setattr(background, "FILE_LIMIT", 0.2)
    monkeypatch.setattr(background, "copy_file", lambda *_: thawed.wait(60))
    monkeypatch.setattr(will_it_fit, "_drive_bytes", lambda *_: thawed.wait(60))
    (tmp_path / "my-dog.zip").write_bytes(b"zip")
    assert "did not answer" in str(zip_download.copy_to(drive, tmp_path / "my-dog.zip"))
    free, _ = will_it_fit._measure_machine(tmp_path, drive, "toybox", True)
    assert free.drive is None, "the table says that it does not answer"
    thawed.set()


def test_a_process_exits_although_a_call_hangs() -> None:
    """A FIFO that nobody writes to stands for the drive."""
    code = """
import os, tempfile
from dreambooth_lib.core import background
fifo = os.path.join(tempfile.mkdtemp(), "fifo")
os.mkfifo(fifo)
try:
    background.call(open, fifo, place=fifo, limit=0.2)
except background.NoAnswerError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0 and "did not answer within" in done.stdout


def test_what_a_call_raises_is_raised() -> None:
    def fail() -> None:
        raise TimeoutError("of its own")

    with pytest.raises(TimeoutError, match="of its own"):
        background.call(fail, place="drive", limit=5)
