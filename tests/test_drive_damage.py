"""Test that damaged files of a run or a backup stop only what they must."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
from conftest import save_photos
from drive_faults import Make, finish, lose, newest, save, shown, wanted
from drive_faults import drive as drive
from drive_faults import no_waits as no_waits
from drive_faults import run as run

from dreambooth_lib.core import disk
from dreambooth_lib.core.disk import DiskError
from dreambooth_lib.core.errors import KitError
from dreambooth_lib.notebook import drive_backup, drive_copy
from dreambooth_lib.notebook.drive_backup import backup
from dreambooth_lib.notebook.drive_restore import has_finished, restore
from dreambooth_lib.training import runs
from dreambooth_lib.training.checkpoints import CheckpointError, check_digests, round_weights
from dreambooth_lib.training.runs import Run


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)


def steps_there(folder: Path) -> list[int]:
    return list(runs.resume(folder).checkpoints())


DAMAGED_STATES = [
    "", "{", "null", "[]", "3", '"x"', "{}", '{"identity": 3}', '{"parts": []}',
    '{"identity": "another", "parts": {}}', "[" * 100_000, "\x00\x00",
    '{"parts": {"config.toml": [["config.toml", 1, "x", null]], "log.jsonl": [[1]], "photos": 3}}',
    '{"parts": {"config.toml": [["config.toml", 1, 1e400, 2]]}, "finished": "yes"}',
]  # fmt: skip


@pytest.mark.parametrize("text", DAMAGED_STATES)
def test_a_damaged_state_is_made_anew(run: Run, drive: Path, tmp_path: Path, text: str) -> None:
    backup(run, drive / "my-dog")
    state = drive / "my-dog" / ".backup.json"
    sound = json.loads(state.read_text())
    state.write_text(text)
    found = newest(drive)
    assert found is not None and (found.step, found.finished) == (200, False)
    assert not has_finished(drive / "my-dog")
    assert restore(drive / "my-dog", tmp_path / "back").checkpoints().keys() == {200}
    assert backup(run, drive / "my-dog") is None
    assert json.loads(state.read_text()) == sound


def test_numbers_that_no_file_has_are_left_out_of_a_state(
    run: Run, drive: Path, tmp_path: Path
) -> None:
    backup(run, drive / "my-dog")
    state = drive / "my-dog" / ".backup.json"
    fields = json.loads(state.read_text())
    fields["parts"]["log.jsonl"][0][2] = 10**40
    state.write_text(json.dumps(fields))
    assert newest(drive) is not None
    assert restore(drive / "my-dog", tmp_path / "back").rows("log")
    assert backup(run, drive / "my-dog") is None


def test_a_backup_that_lost_its_state_and_identity_is_left_alone(run: Run, drive: Path) -> None:
    backup(run, drive / "my-dog")
    (drive / "my-dog" / ".backup.json").write_text("{")
    (drive / "my-dog" / ".backup").write_text("")
    problem = str(backup(run, drive / "my-dog"))
    assert (
        "is not a backup of this run, or its .backup.json is damaged; rename" in problem
        and "\n" not in problem
    )


def test_an_identity_cut_short_in_the_run_is_not_taken_for_one(run: Run, drive: Path) -> None:
    (run.folder / ".backup").write_bytes(b"\xff\x00")
    assert backup(run, drive / "my-dog") is None
    assert len((run.folder / ".backup").read_text()) == 32


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "null", '{"base": []}'])
def test_a_damaged_manifest_stops_only_its_own_set(run: Run, drive: Path, text: str) -> None:
    sets = run.folder.parent / "class_images"
    for name in ("bad", "good"):
        save_photos(sets / name, 1)
    (sets / "bad" / "manifest.json").write_text(text)
    (sets / "good" / "manifest.json").write_text('{"base": "toybox", "prompt": "a dog"}')
    finish(run)
    problem = str(backup(run, drive / "my-dog"))
    assert str(sets / "bad" / "manifest.json") in problem and "\n" not in problem
    assert shown(drive / "my-dog").items() >= wanted(run).items()
    assert (drive / "my-dog" / "class_images" / "good" / "0.png").exists()
    assert has_finished(drive / "my-dog"), "the run itself is all there"


@pytest.mark.parametrize("row", ["{", "[]", '{"step": "x"}', '{"step": 5}', "\x00"])
def test_a_damaged_row_does_not_stop_a_backup(run: Run, drive: Path, row: str) -> None:
    (run.folder / "validation.jsonl").write_text(f"{row}\n{row}\n")
    backup(run, drive / "my-dog")
    assert steps_there(drive / "my-dog") == [200]
    assert (drive / "my-dog" / "config.toml").exists()


@pytest.mark.parametrize(
    "text",
    ["base = 3\n", "steps = [", "class_folder = true\n[subject]\nphotos = 1\n", "\x00", "= = =",
     "[subject]\nphotos = ['a']\nclass_noun = 'dog'\n"],
)  # fmt: skip
def test_a_bad_config_hides_no_other_run(run: Run, drive: Path, text: str) -> None:
    backup(run, drive / "my-dog")
    for place in (drive, run.folder.parent):
        (place / "bad").mkdir()
        (place / "bad" / "config.toml").write_text(text)
    (drive / "bytes").mkdir()
    (drive / "bytes" / "config.toml").write_bytes(b"\xff\xfe\x00base")
    found = newest(drive)
    assert found is not None and found.run.folder == drive / "my-dog"
    with pytest.raises(KitError):
        restore(drive / "bad", run.folder.parent / "back")
    assert not (run.folder.parent / "back").exists()
    assert has_finished(drive / "bad") is False


def test_duplicates_that_drive_makes_are_passed_over(run: Run, drive: Path, tmp_path: Path) -> None:
    photos = Path(run.config.subject.photos)
    shutil.copyfile(photos / "1.png", photos / "2 (1).png")  # a photo of the user's own
    for name in ("2.txt", "2 (1).txt"):
        (photos / name).write_text("a {} dog")
    backup(run, drive / "my-dog")
    there = drive / "my-dog"
    shutil.copytree(there / "checkpoints" / "000200", there / "checkpoints" / "000200 (1)")
    shutil.copyfile(there / "config.toml", there / "config (1).toml")
    shutil.copyfile(there / "log.jsonl", there / "log (2).jsonl")
    shutil.copyfile(there / "photos" / "0.png", there / "photos" / "0 (1).png")
    shutil.copyfile(there / "photos" / "2.txt", there / "photos" / "2 (3).txt")
    found = newest(drive)
    assert found is not None and found.step == 200
    back = restore(there, tmp_path / "back")
    assert not list(back.folder.rglob("*(1).toml")) + list(back.folder.rglob("log (2)*"))
    assert list(back.checkpoints()) == [200]
    names = sorted(path.name for path in Path(back.config.subject.photos).iterdir())
    assert names == ["0.png", "1.png", "2 (1).png", "2 (1).txt", "2.png", "2.txt"]
    assert backup(run, there) is None
    assert [path.name for path in (there / "checkpoints").iterdir()] == ["000200"]


# Checkpoints


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json", "digests.json"])
def test_a_damaged_checkpoint_replaces_no_sound_one(run: Run, drive: Path, name: str) -> None:
    backup(run, drive / "my-dog")
    save(run, 300)
    flip_a_bit(run.folder / "checkpoints" / "000300" / name)
    problem = str(backup(run, drive / "my-dog"))
    assert "000300" in problem and "damaged" in problem and "\n" not in problem
    assert steps_there(drive / "my-dog") == [200]
    check_digests(drive / "my-dog" / "checkpoints" / "000200")
    save(run, 400)
    assert backup(run, drive / "my-dog") is None
    assert steps_there(drive / "my-dog") == [400]


@pytest.mark.parametrize("rounded", [False, True])
def test_a_checkpoint_that_the_drive_damages_replaces_no_sound_one(
    run: Run, drive: Path, monkeypatch: pytest.MonkeyPatch, rounded: bool
) -> None:
    backup(run, drive / "my-dog")
    save(run, 300)
    copy = shutil.copyfile

    def damage(source: Path, place: Path) -> None:
        copy(source, place)
        if source.name == "tensors.safetensors":
            flip_a_bit(place)

    def damage_rounded(source: Path, place: Path) -> str:
        written = round_weights(source, place)
        flip_a_bit(place)
        return written

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", damage)
        if rounded:
            patch.setattr(drive_copy, "LARGE", 100)
            patch.setattr("dreambooth_lib.training.checkpoints.round_weights", damage_rounded)
        assert backup(run, drive / "my-dog") is not None
    assert steps_there(drive / "my-dog") == [200]
    assert backup(run, drive / "my-dog") is None
    assert steps_there(drive / "my-dog") == [300]


def test_a_run_is_restored_from_the_newest_sound_checkpoint(
    run: Run, drive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backup(run, drive / "my-dog")
    there = drive / "my-dog" / "checkpoints"
    shutil.copytree(run.folder / "checkpoints" / "000100", there / "000100")
    flip_a_bit(there / "000200" / "tensors.safetensors")
    with pytest.warns(UserWarning, match="of step 200 in .* is damaged; .* restored at step 100"):
        back = restore(drive / "my-dog", tmp_path / "back")
    assert list(back.checkpoints()) == [100]
    shutil.copytree(drive / "my-dog", drive / "another")
    monkeypatch.setattr(drive_backup, "SESSION", "0" * 32)  # as after a disconnect
    assert backup(back, drive / "another") is None and steps_there(drive / "another") == [100]
    flip_a_bit(there / "000100" / "state.json")
    with pytest.raises(CheckpointError, match="delete its folder there"):
        restore(drive / "my-dog", tmp_path / "other")
    assert not (tmp_path / "other").exists()


# Full and read-only drives


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
def test_a_drive_that_cannot_be_written_is_one_sentence(
    run: Run, drive: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    backup(run, drive / "my-dog")
    before = shown(drive / "my-dog")
    save(run, 300)
    run.append("log", {"step": 300, "loss": 0.3})

    def refuse(source: Path, place: Path) -> None:
        raise OSError(number, os.strerror(number), str(place))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", refuse)
        problem = str(backup(run, drive / "my-dog"))
    assert problem.startswith(str(run.folder)) and problem.count(". ") == 0
    assert "could not be written" in problem and problem.endswith(".")
    assert shown(drive / "my-dog") == before
    assert backup(run, drive / "my-dog") is None


def test_a_checkpoint_for_which_the_drive_has_no_room_is_not_begun(
    run: Run, drive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backup(run, drive / "my-dog")
    save(run, 300)
    with monkeypatch.context() as patch:
        patch.setattr(disk, "_free_bytes", lambda _: 10)
        assert "free some space there" in str(backup(run, drive / "my-dog"))
    assert steps_there(drive / "my-dog") == [200]


def test_restoring_to_a_full_disk_is_one_sentence(
    run: Run, drive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backup(run, drive / "my-dog")
    lose(run)
    with monkeypatch.context() as patch:
        patch.setattr(disk, "_free_bytes", lambda _: 10)
        with pytest.raises(DiskError, match="free some space there and try again"):
            restore(drive / "my-dog", tmp_path / "back")

    def full(source: Path, place: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", full)
        with pytest.raises(DiskError, match="its disk is full"):
            restore(drive / "my-dog", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_leftovers_of_killed_processes_are_deleted(run: Run, drive: Path) -> None:
    backup(run, drive / "my-dog")
    there = drive / "my-dog"
    for name in (".log.jsonl.1.partial", "validation/000100/.a.png.2.partial", ".x.jsonl.gone"):
        (there / name).write_text("half")
    (there / ".photos.partial").mkdir()
    (there / ".photos.partial" / "0.png").write_text("half")
    assert backup(run, there) is None
    left = [p.name for p in there.rglob(".*") if p.name not in (".backup", ".backup.json")]
    assert left == []


def test_a_backup_killed_between_two_renames_is_restored(
    run: Run, drive: Path, tmp_path: Path
) -> None:
    backup(run, drive / "my-dog")
    (drive / "my-dog" / "photos").rename(drive / "my-dog" / ".photos.old")
    back = restore(drive / "my-dog", tmp_path / "back")
    assert len(list(Path(back.config.subject.photos).iterdir())) == 3


def test_a_run_with_a_longer_goal_has_not_finished_in_its_backup(
    run: Run, drive: Path, monkeypatch: pytest.MonkeyPatch, make_config: Make
) -> None:
    finish(run)
    assert backup(run, drive / "my-dog") is None and has_finished(drive / "my-dog")
    shutil.rmtree(run.pipeline)

    def kill(source: Path, place: Path) -> None:
        raise KeyboardInterrupt

    save(run, 300)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", kill)
        with pytest.raises(KeyboardInterrupt):
            backup(run, drive / "my-dog")
    assert json.loads((drive / "my-dog" / ".backup.json").read_text())["finished"] is False
