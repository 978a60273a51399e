"""Test the backup of a run on a drive with faults, and the run restored from it."""

import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_photos
from safetensors.torch import load_file

from dreambooth_lib.core import files
from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.notebook import drive_copy, drive_state
from dreambooth_lib.notebook.drive_backup import backup
from dreambooth_lib.notebook.drive_restore import (
    FoundRun,
    RestoreError,
    fetch,
    find_interrupted,
    has_finished,
    restore,
    unique_name,
)
from dreambooth_lib.training import runs
from dreambooth_lib.training.checkpoints import load_state
from dreambooth_lib.training.loop import train
from dreambooth_lib.training.runs import Run, RunError
from dreambooth_lib.training.validation_record import ValidationResult

Make = Callable[..., TrainConfig]
State = dict[str, Any]


@pytest.fixture(autouse=True)
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "WAITS", (0.0, 0.0))


@pytest.fixture
def drive(tmp_path: Path) -> Path:
    folder = tmp_path / "MyDrive" / "dreambooth"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def run(tmp_path: Path, make_config: Make) -> Run:
    """Start a run of 200 steps, with half-written files beside the complete ones."""
    photos = save_photos(tmp_path / "uploads" / "rex", 3)
    config = make_config("toybox", photos, checkpoints_kept=2, steps=400)
    run = runs.start(config, tmp_path / "runs" / "my-dog")
    for step in (1, 2):
        run.append("log", {"step": 100 * step, "loss": 0.5})
        save(run, 100 * step)
    (run.folder / "validation" / "000100").mkdir(parents=True)
    (run.folder / "validation" / "000100" / "subject-0.png").write_bytes(b"picture")
    (run.folder / ".log.jsonl.7.partial").write_text("half")
    (run.folder / "checkpoints" / ".000300.partial").mkdir()
    (run.folder / "checkpoints" / ".000300.partial" / "state.json").write_text("{")
    return run


def save(run: Run, step: int) -> None:
    run.save_checkpoint(step, {"step": step, "model": torch.full((64,), float(step))})


def tree(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def shown(folder: Path) -> dict[str, bytes]:
    found = tree(folder).items()
    return {name: data for name, data in found if not name.startswith(".") and "/." not in name}


def wanted(run: Run) -> dict[str, bytes]:
    """Return what a backup has of a run without validation: only its newest checkpoint."""
    newest = f"checkpoints/{max(run.checkpoints()):06d}/"
    found = shown(run.folder).items()
    return {n: d for n, d in found if not n.startswith("checkpoints/") or n.startswith(newest)}


def newest(*folders: Path | None, base: str = "toybox") -> FoundRun | None:
    """Return the run in these folders that would be resumed, whatever its photos."""
    return find_interrupted(True, folders, None, "dog", base)[0]


def validated(run: Run, fidelity: dict[int, float]) -> None:
    """Write validation rows that differ only in their subject fidelity."""
    for step, value in fidelity.items():
        row = ValidationResult(step, value, 0.9, 0.3, 0.5, 0.0, 0.1, 0.0, {}, 1.0)
        run.append("validation", asdict(row))


class Faults:
    """Copying that fails, is truncated or interrupted as told, and counts what it copied."""

    def __init__(self) -> None:
        self.real = shutil.copyfile
        self.copied: list[str] = []
        self.sources: list[Path] = []
        self.names: dict[str, int] = {}  #: how often the copy of a file of this name fails
        self.fault: Callable[[Path], None] = self.fail

    def fail(self, place: Path) -> None:
        raise OSError(5, "Input/output error", str(place))

    def truncate(self, place: Path) -> None:
        place.write_bytes(place.read_bytes()[:-1])

    def interrupt(self, place: Path) -> None:
        self.truncate(place)
        raise KeyboardInterrupt

    def __call__(self, source: Path, place: Path) -> None:
        self.real(source, place)
        self.copied.append(source.name)
        self.sources.append(source)
        if self.names.get(source.name, 0):
            self.names[source.name] -= 1
            self.fault(place)


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Faults:
    faults = Faults()
    monkeypatch.setattr(shutil, "copyfile", faults)
    return faults


# Backing up


def test_a_backup_is_the_run_with_its_photos_and_nothing_half_written(
    run: Run, drive: Path
) -> None:
    assert backup(run, drive / "my-dog") is None
    photos = {f"photos/{n}": d for n, d in tree(Path(run.config.subject.pictures)).items()}
    assert len(photos) == 3
    assert shown(drive / "my-dog") == wanted(run) | photos
    assert set(tree(drive / "my-dog")) - set(shown(drive / "my-dog")) == {".backup.json"}


def test_only_what_is_new_is_copied(run: Run, drive: Path, faults: Faults) -> None:
    backup(run, drive / "my-dog")
    faults.copied.clear()
    assert backup(run, drive / "my-dog") is None and faults.copied == []
    run.append("log", {"step": 201, "loss": 0.4})
    assert backup(run, drive / "my-dog") is None and faults.copied == ["log.jsonl"]
    os.utime(run.folder / "config.toml", (1, 1))  # of the same size
    (drive / "my-dog" / "photos" / "1.png").unlink()  # by hand
    faults.copied.clear()
    assert backup(run, drive / "my-dog") is None
    assert sorted(faults.copied) == ["1.png", "config.toml"]
    assert shown(drive / "my-dog").items() >= wanted(run).items()


def test_what_others_need_is_copied_first_and_the_newest_weights_before_older_ones(
    run: Run, drive: Path, faults: Faults
) -> None:
    backup(run, drive / "my-dog")
    order = ["/".join(path.parts[-2:]) for path in faults.sources]
    assert order == [
        "rex/0.png", "rex/1.png", "rex/2.png", "000100/subject-0.png", "my-dog/log.jsonl",
        "my-dog/config.toml", "000200/state.json", "000200/tensors.safetensors",
    ]  # fmt: skip


def test_of_the_checkpoints_the_newest_and_the_best_are_copied(run: Run, drive: Path) -> None:
    save(run, 300)
    run.save_checkpoint(400, {"step": 400}, best=200)
    validated(run, {0: 0.1, 100: 0.5, 200: 0.8, 300: 0.7, 400: 0.6})
    assert list(run.checkpoints()) == [200, 300, 400]
    assert backup(run, drive / "my-dog") is None
    there = drive / "my-dog" / "checkpoints"
    assert sorted(path.name for path in there.iterdir()) == ["000200", "000400"]
    assert list(restore(drive / "my-dog", run.folder.parent / "back").checkpoints()) == [200, 400]


def test_the_best_being_whole_makes_room_for_the_newest(
    run: Run, drive: Path, faults: Faults
) -> None:
    validated(run, {0: 0.1, 100: 0.8, 200: 0.5})
    assert backup(run, drive / "my-dog") is None
    run.save_checkpoint(300, {"step": 300, "model": torch.zeros(64)}, best=100)
    faults.names["tensors.safetensors"] = 3
    assert backup(run, drive / "my-dog") is not None
    there = drive / "my-dog" / "checkpoints"
    assert [path.name for path in there.iterdir()] == ["000100"]
    assert backup(run, drive / "my-dog") is None
    assert sorted(path.name for path in there.iterdir()) == ["000100", "000300"]


def test_dropped_checkpoints_go_when_a_kept_one_is_whole(
    run: Run, drive: Path, faults: Faults
) -> None:
    backup(run, drive / "my-dog")
    there = drive / "my-dog" / "checkpoints"
    save(run, 300)
    save(run, 400)
    faults.names["tensors.safetensors"] = 1000
    assert "Input/output error" in str(backup(run, drive / "my-dog"))
    assert sorted(path.name for path in there.iterdir()) == ["000200"]
    faults.names.clear()
    (there / ".000150.partial").mkdir()  # of a session that ended
    assert backup(run, drive / "my-dog") is None
    assert sorted(path.name for path in there.iterdir()) == ["000400"]


def test_what_is_dropped_goes_into_a_drives_trash_empty(
    run: Run, drive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backup(run, drive / "my-dog")
    (old,) = (drive / "my-dog" / "checkpoints").iterdir()
    save(run, 300)
    trash: dict[str, bytes] = {}
    remove = shutil.rmtree

    def into_trash(path: Path, *args: Any, **kwargs: Any) -> None:
        if old.name in path.name:
            assert not old.exists(), "half-emptied it would be taken for a checkpoint"
            trash.update(tree(path))
        remove(path, *args, **kwargs)

    monkeypatch.setattr(shutil, "rmtree", into_trash)
    assert backup(run, drive / "my-dog") is None
    assert trash == {"state.json": b"", "tensors.safetensors": b""}


def test_an_older_checkpoint_stays_until_the_newest_is_whole(
    run: Run, drive: Path, faults: Faults
) -> None:
    backup(run, drive / "my-dog")
    save(run, 300)
    faults.names["tensors.safetensors"] = 3
    assert backup(run, drive / "my-dog") is not None
    kept = sorted(path.name for path in (drive / "my-dog" / "checkpoints").iterdir())
    assert kept == ["000200"]
    assert backup(run, drive / "my-dog") is None
    kept = sorted(path.name for path in (drive / "my-dog" / "checkpoints").iterdir())
    assert kept == ["000300"]


def test_a_pipeline_is_copied_whole_and_goes_when_the_run_goes_on(run: Run, drive: Path) -> None:
    run.pipeline.mkdir()
    (run.pipeline / "model_index.json").write_text("{}")
    backup(run, drive / "my-dog")
    assert (drive / "my-dog" / "pipeline" / "model_index.json").read_text() == "{}"
    shutil.rmtree(run.pipeline)
    assert backup(run, drive / "my-dog") is None
    assert not (drive / "my-dog" / "pipeline").exists()


def full_state(step: int) -> State:
    moments = {"state": {0: {"m": torch.ones(64)}}, "param_groups": [{"lr": 0.1}]}
    return {"step": step, "model": {"w": torch.full((8, 8), 1 / 3 * step)}, "optimizer": moments}


def best_then_newest(run: Run, drive: Path) -> None:
    """Back up a run whose best checkpoint is its newest, then give it a newer one."""
    validated(run, {0: 0.1, 300: 0.8})
    run.save_checkpoint(300, full_state(300))
    assert backup(run, drive / "my-dog") is None
    validated(run, {400: 0.5})
    run.save_checkpoint(400, full_state(400), best=300)


def test_of_an_older_checkpoint_only_the_optimizers_state_goes(
    run: Run, drive: Path, faults: Faults
) -> None:
    best_then_newest(run, drive)
    faults.sources.clear()
    assert backup(run, drive / "my-dog") is None
    there = drive / "my-dog" / "checkpoints"
    files = {path.name: sorted(f.name for f in path.iterdir()) for path in there.iterdir()}
    whole = ["optimizer.safetensors", "state.json", "tensors.safetensors"]
    assert files == {"000300": whole[1:], "000400": whole}
    assert not any(path.parent.name == "000300" for path in faults.sources), "copied again"


def test_large_weights_are_rounded_and_a_large_pipeline_is_left_out(
    run: Run, drive: Path, faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drive_copy, "LARGE", 100)
    run.save_checkpoint(300, full_state(300))
    run.pipeline.mkdir()
    (run.pipeline / "weights.safetensors").write_bytes(bytes(101))
    assert backup(run, drive / "my-dog") is None
    there = drive / "my-dog" / "checkpoints" / "000300"
    (weight,) = load_state(there)["model"].values()
    assert weight.dtype is torch.float16 and weight.mean().item() == pytest.approx(100, abs=0.1)
    assert load_state(there)["optimizer"]["state"][0]["m"].dtype is torch.float32
    assert not (drive / "my-dog" / "pipeline").exists()
    assert newest(drive) is None and has_finished(drive / "my-dog")
    faults.sources.clear()
    assert backup(run, drive / "my-dog") is None and faults.sources == []
    back = restore(drive / "my-dog", run.folder.parent / "back")
    faults.sources.clear()
    assert backup(back, drive / "my-dog") is None
    assert [p.name for p in faults.sources if "checkpoints" in p.parts] == [], "copied again"


def test_a_run_whose_last_checkpoint_has_not_arrived_has_not_finished_there(
    run: Run, drive: Path, faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drive_copy, "LARGE", 100)
    run.save_checkpoint(300, full_state(300))
    assert backup(run, drive / "my-dog") is None
    run.save_checkpoint(400, full_state(400))
    run.pipeline.mkdir()
    (run.pipeline / "weights.safetensors").write_bytes(bytes(101))
    faults.names["optimizer.safetensors"] = 3
    assert backup(run, drive / "my-dog") is not None
    found = newest(drive)
    assert found is not None and (found.step, found.finished) == (300, False)
    assert not has_finished(drive / "my-dog")
    assert backup(run, drive / "my-dog") is None
    assert newest(drive) is None and has_finished(drive / "my-dog")
    assert runs.resume(drive / "my-dog").checkpoints().keys() == {400}


def test_the_best_keeps_its_optimizers_state_until_the_newest_is_there(
    run: Run, drive: Path, faults: Faults
) -> None:
    best_then_newest(run, drive)
    faults.names["optimizer.safetensors"] = 3
    assert backup(run, drive / "my-dog") is not None
    there = drive / "my-dog" / "checkpoints"
    assert [path.name for path in there.iterdir()] == ["000300"]
    assert "optimizer" in load_state(there / "000300")
    assert backup(run, drive / "my-dog") is None
    assert "optimizer" not in load_state(there / "000300")


def test_a_file_that_left_a_folder_in_a_part_leaves_the_backup(run: Run, drive: Path) -> None:
    inside = run.pipeline / "tokenizer"
    inside.mkdir(parents=True)
    for name in ("vocab.json", "tokenizer.json"):
        (inside / name).write_text("{}")
    assert backup(run, drive / "my-dog") is None
    (inside / "vocab.json").unlink()
    assert backup(run, drive / "my-dog") is None
    there = drive / "my-dog" / "pipeline" / "tokenizer"
    assert [path.name for path in there.iterdir()] == ["tokenizer.json"]


@pytest.mark.parametrize("fault", ["fail", "truncate"])
def test_a_passing_fault_is_tried_again(run: Run, drive: Path, faults: Faults, fault: str) -> None:
    faults.fault = getattr(faults, fault)
    faults.names = {"log.jsonl": 2, "state.json": 1, "0.png": 1}
    assert backup(run, drive / "my-dog") is None
    assert shown(drive / "my-dog").items() >= wanted(run).items()


def test_a_lasting_fault_is_one_sentence_and_the_rest_is_copied(
    run: Run, drive: Path, faults: Faults
) -> None:
    faults.names = {"log.jsonl": 1000, "0.png": 1000}
    problem = backup(run, drive / "my-dog")
    assert problem is not None and problem.count("\n") == 0
    assert str(drive / "my-dog") in problem and "Input/output error" in problem
    missing = {"log.jsonl", "photos/0.png"}
    assert set(wanted(run)) - set(shown(drive / "my-dog")) == {"log.jsonl"}
    assert not missing & set(shown(drive / "my-dog"))
    assert faults.copied.count("0.png") == 3 and faults.copied.count("log.jsonl") == 1, (
        "only the first fault is waited for, or each call would take minutes on a dead drive"
    )
    faults.names.clear()
    assert backup(run, drive / "my-dog") is None
    assert missing <= set(shown(drive / "my-dog"))


def test_what_cannot_be_removed_or_renamed_is_a_sentence_too(
    run: Run, drive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backup(run, drive / "my-dog")
    save(run, 300)

    def failing(real: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(path: Path, *args: Any, **kwargs: Any) -> Any:
            if Path(path) == drive / "my-dog" / name:
                raise OSError(107, "Transport endpoint is not connected")
            return real(path, *args, **kwargs)

        return call

    gone = "checkpoints/.000200.gone"
    monkeypatch.setattr(shutil, "rmtree", failing(shutil.rmtree, gone))
    monkeypatch.setattr(Path, "replace", failing(Path.replace, ".config.toml.partial"))
    os.utime(run.folder / "config.toml", (1, 1))
    assert "Transport endpoint" in str(backup(run, drive / "my-dog"))
    assert (drive / "my-dog" / "checkpoints" / "000300").exists()
    monkeypatch.undo()
    assert backup(run, drive / "my-dog") is None
    assert shown(drive / "my-dog").items() >= wanted(run).items()
    kept = [path.name for path in (drive / "my-dog" / "checkpoints").iterdir()]
    assert kept == ["000300"]


@pytest.mark.parametrize("name", ["log.jsonl", "tensors.safetensors", "config.toml", "0.png"])
def test_a_backup_that_is_interrupted_has_nothing_half_written(
    run: Run, drive: Path, faults: Faults, name: str
) -> None:
    backup(run, drive / "my-dog")
    before = shown(drive / "my-dog")
    save(run, 300)
    run.append("log", {"step": 300, "loss": 0.3})
    (run.folder / "config.toml").write_text(run.config.replace(prior_weight=2.0).to_toml())
    os.utime(Path(run.config.subject.pictures) / "0.png", (1, 1))
    faults.names, faults.fault = {name: 1}, faults.interrupt
    with pytest.raises(KeyboardInterrupt):
        backup(run, drive / "my-dog")
    after = shown(run.folder)
    for place, data in shown(drive / "my-dog").items():
        assert data in (before.get(place), after.get(place)), place
    for checkpoint in (drive / "my-dog" / "checkpoints").glob("[0-9]*"):
        assert len(list(checkpoint.iterdir())) == 2
    assert backup(run, drive / "my-dog") is None
    assert shown(drive / "my-dog").items() >= wanted(run).items()


def test_nothing_is_written_where_no_drive_is_mounted(run: Run, tmp_path: Path) -> None:
    problem = backup(run, tmp_path / "content" / "drive" / "my-dog")
    assert problem is not None and "No such file" in problem
    assert not (tmp_path / "content").exists()


def test_another_runs_backup_is_left_alone(run: Run, drive: Path, make_config: Make) -> None:
    backup(run, drive / "my-dog")
    before = tree(drive / "my-dog")
    config = make_config("toybox", run.config.subject.pictures, seed=5)
    other = runs.start(config, run.folder.parent / "again")
    problem = backup(other, drive / "my-dog")
    assert problem is not None and "holds something other" in problem
    (drive / "thesis").mkdir()
    (drive / "thesis" / "thesis.txt").write_text("dear")
    assert "holds something other" in str(backup(run, drive / "thesis"))
    assert tree(drive / "my-dog") == before and len(tree(drive / "thesis")) == 1


def test_a_first_write_that_failed_does_not_bar_the_backup(
    run: Run, drive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        if drive in path.parents:
            write(path, data[:2])
            raise OSError(28, "No space left on device")
        return write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        assert "No space left" in str(backup(run, drive / "my-dog"))
    assert list((drive / "my-dog").iterdir()) == []
    (drive / "my-dog" / ".backup.json.7.partial").write_text("of a process that was killed")
    assert backup(run, drive / "my-dog") is None


# Restoring


def lose(run: Run) -> None:
    """Delete what a disconnect does: all of the machine's own disk."""
    shutil.rmtree(run.folder.parent)
    shutil.rmtree(run.folder.parents[1] / "uploads")


def test_a_restored_run_is_the_run_with_its_own_photos(
    run: Run, drive: Path, tmp_path: Path, faults: Faults
) -> None:
    backup(run, drive / "my-dog")
    before, photos = tree(run.folder), tree(Path(run.config.subject.pictures))
    lose(run)
    back = restore(drive / "my-dog", tmp_path / "runs" / "my-dog")
    assert tree(Path(back.config.subject.pictures)) == photos
    left = (".partial", "config.toml", "000100/tensors", "000100/state")
    same = [name for name in before if not any(part in name for part in left)]
    assert {n: tree(back.folder)[n] for n in same} == {n: before[n] for n in same}
    subject = back.config.subject
    assert back.config == run.config.replace(subject=subject)
    assert (subject.name, subject.token) == (run.config.subject.name, run.config.subject.token)
    faults.copied.clear()
    assert backup(back, drive / "my-dog") is None, "its own backup goes on"
    assert faults.copied == ["config.toml"], "the rest is there already"


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
    archive = Path(packed).read_bytes()
    lose(run)
    back = restore(drive / "my-dog", tmp_path / "runs" / "my-dog")
    assert Path(back.config.subject.pictures).read_bytes() == archive
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
    faults.names = {"state.json": 3}
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
    assert "holds something other" in str(backup(run, drive / "my-dog"))


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


def finish(run: Run) -> None:
    run.pipeline.mkdir()
    (run.pipeline / "model_index.json").write_text("{}")


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


# Resuming


def interrupted(run: Run, drive: Path, **other: Any) -> tuple[Path | None, str]:
    """Return the folder of the run that is resumed, and what its user is told."""
    asked: dict[str, Any] = {
        "resume": True, "pictures": run.config.subject.pictures, "class_noun": "dog",
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
    packed = shutil.make_archive(str(tmp_path / "zipped"), "zip", run.config.subject.pictures)
    assert interrupted(run, drive, pictures=packed)[0] == run.folder, "the content counts"
    assert interrupted(run, drive, pictures=None)[0] == run.folder, "they are uploaded later"
    backup(run, drive / "my-dog")
    shutil.rmtree(run.folder.parent)
    assert interrupted(run, drive)[0] == drive / "my-dog"
    pictures = run.config.subject.pictures
    shutil.rmtree(pictures)
    assert interrupted(run, drive, pictures=pictures)[0] == drive / "my-dog", (
        "gone with the machine"
    )


def test_a_run_of_something_else_is_not_resumed_until_it_is_named(
    run: Run, drive: Path, tmp_path: Path, tiny_sd1: str
) -> None:
    others = {
        "class_noun": ("cat", "its class noun is 'dog', not 'cat'"),
        "base": (tiny_sd1, f"its base is 'toybox', not '{tiny_sd1}'"),
        "pictures": (save_photos(tmp_path / "max", 2), "its photos are not those in"),
    }
    for field, (value, why) in others.items():
        folder, message = interrupted(run, drive, **{field: value})
        assert folder is None and f"UTC; {why}" in message
        assert message.startswith(f"Not resumed: {run.folder}: step 200 of 400, last saved ")
        assert "set RESUME = 'my-dog' to resume it.\nStarting a new run." in message
        assert interrupted(run, drive, resume="my-dog", **{field: value})[0] == run.folder
    assert interrupted(run, drive, resume=False) == (None, "Starting a new run.")
    assert "no unfinished run named 'max'" in interrupted(run, drive, resume="max")[1]
    finish(run)
    assert interrupted(run, drive) == (None, "Starting a new run.")


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


# Backups of earlier versions


def under_old_names(run: Run, backup_folder: Path) -> None:
    """Rename a backup's state and its run's identity to what earlier versions called them."""
    (backup_folder / ".backup.json").rename(backup_folder / ".mirror.json")
    (run.folder / ".backup").rename(run.folder / ".mirror")


def test_a_backup_under_the_old_names_is_found_and_restored(
    run: Run, drive: Path, tmp_path: Path
) -> None:
    backup(run, drive / "my-dog")
    under_old_names(run, drive / "my-dog")
    found = newest(run.folder.parent, drive)
    assert found is not None and found.run.folder == run.folder, "known to be one run"
    identity = (run.folder / ".mirror").read_text()
    assert found.identity == identity
    lose(run)
    back = restore(drive / "my-dog", tmp_path / "runs" / "my-dog")
    assert (back.folder / ".backup").read_text() == identity
    (drive / "my-dog" / ".mirror.json").write_text('{"finished": true}')
    assert has_finished(drive / "my-dog")


def test_a_backup_under_the_old_names_is_carried_over(
    run: Run, drive: Path, faults: Faults, make_config: Make
) -> None:
    backup(run, drive / "my-dog")
    identity = (run.folder / ".backup").read_text()
    under_old_names(run, drive / "my-dog")
    other = runs.start(make_config("toybox", run.config.subject.pictures), run.folder.parent / "b")
    assert "holds something other" in str(backup(other, drive / "my-dog"))
    faults.copied.clear()
    run.append("log", {"step": 201, "loss": 0.4})
    assert backup(run, drive / "my-dog") is None
    assert faults.copied == ["log.jsonl"], "the rest is there already"
    assert (run.folder / ".backup").read_text() == identity
    assert (drive / "my-dog" / ".backup.json").exists()
    assert not (run.folder / ".mirror").exists()
    assert not (drive / "my-dog" / ".mirror.json").exists()
    assert backup(run, drive / "my-dog") is None
