"""A run's mirror on a drive with faults, and the run taken back from it."""

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_photos

from dreambooth_lib import copies, mirrors, runs
from dreambooth_lib.config import TrainConfig
from dreambooth_lib.mirrors import MirrorError, mirror, newest_run, restore
from dreambooth_lib.runs import Run, RunError
from dreambooth_lib.training import train

Make = Callable[..., TrainConfig]
State = dict[str, Any]


@pytest.fixture(autouse=True)
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copies, "WAITS", (0.0, 0.0))


@pytest.fixture
def drive(tmp_path: Path) -> Path:
    folder = tmp_path / "MyDrive" / "dreambooth"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def run(tmp_path: Path, make_config: Make) -> Run:
    """As after 200 steps, with files half-written beside the whole ones."""
    photos = save_photos(tmp_path / "uploads" / "rex", 3)
    config = make_config("toybox", photos, checkpoints_kept=2, steps=400)
    run = runs.start(config, tmp_path / "runs" / "my-dog")
    for step in (1, 2):
        run.append("log", {"step": 100 * step, "loss": 0.5})
        save(run, 100 * step)
    (run.folder / "watch" / "000100").mkdir(parents=True)
    (run.folder / "watch" / "000100" / "subject-0.png").write_bytes(b"picture")
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


class Faults:
    """Copying that fails, is cut short, or is interrupted, as it is told; counts what it copied."""

    def __init__(self) -> None:
        self.real = shutil.copyfile
        self.copied: list[str] = []
        self.sources: list[Path] = []
        self.names: dict[str, int] = {}  #: how often the copy of a file of this name fails
        self.fault: Callable[[Path], None] = self.fail

    def fail(self, place: Path) -> None:
        raise OSError(5, "Input/output error", str(place))

    def cut(self, place: Path) -> None:
        place.write_bytes(place.read_bytes()[:-1])

    def interrupt(self, place: Path) -> None:
        self.cut(place)
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


# Mirroring


def test_a_mirror_is_the_run_with_its_photos_and_nothing_half_written(
    run: Run, drive: Path
) -> None:
    assert mirror(run, drive / "my-dog") is None
    photos = {f"photos/{n}": d for n, d in tree(Path(run.config.subject.pictures)).items()}
    assert len(photos) == 3
    assert shown(drive / "my-dog") == shown(run.folder) | photos
    assert set(tree(drive / "my-dog")) - set(shown(drive / "my-dog")) == {".mirror.json"}


def test_only_what_is_new_is_copied(run: Run, drive: Path, faults: Faults) -> None:
    mirror(run, drive / "my-dog")
    faults.copied.clear()
    assert mirror(run, drive / "my-dog") is None and faults.copied == []
    run.append("log", {"step": 201, "loss": 0.4})
    assert mirror(run, drive / "my-dog") is None and faults.copied == ["log.jsonl"]
    os.utime(run.folder / "config.toml", (1, 1))  # of the same size
    (drive / "my-dog" / "photos" / "1.png").unlink()  # by hand
    faults.copied.clear()
    assert mirror(run, drive / "my-dog") is None
    assert sorted(faults.copied) == ["1.png", "config.toml"]
    assert shown(drive / "my-dog").items() >= shown(run.folder).items()


def test_what_others_need_is_copied_first_and_the_newest_weights_before_older_ones(
    run: Run, drive: Path, faults: Faults
) -> None:
    mirror(run, drive / "my-dog")
    order = ["/".join(path.parts[-2:]) for path in faults.sources]
    assert order == [
        "rex/0.png", "rex/1.png", "rex/2.png", "000100/subject-0.png", "my-dog/log.jsonl",
        "my-dog/config.toml", "000200/state.json", "000200/tensors.safetensors",
        "000100/state.json", "000100/tensors.safetensors",
    ]  # fmt: skip


def test_dropped_checkpoints_go_when_a_kept_one_is_whole(
    run: Run, drive: Path, faults: Faults
) -> None:
    mirror(run, drive / "my-dog")
    there = drive / "my-dog" / "checkpoints"
    save(run, 300)
    save(run, 400)
    faults.names["tensors.safetensors"] = 1000
    assert "Input/output error" in str(mirror(run, drive / "my-dog"))
    assert sorted(path.name for path in there.iterdir()) == ["000100", "000200"]
    faults.names.clear()
    (there / ".000150.partial").mkdir()  # of a session that ended
    assert mirror(run, drive / "my-dog") is None
    assert sorted(path.name for path in there.iterdir()) == ["000300", "000400"]


def test_a_full_drive_gets_room_for_the_newest_checkpoint(
    run: Run, drive: Path, faults: Faults
) -> None:
    mirror(run, drive / "my-dog")
    save(run, 300)
    faults.names["tensors.safetensors"] = 3
    assert mirror(run, drive / "my-dog") is not None
    kept = sorted(path.name for path in (drive / "my-dog" / "checkpoints").iterdir())
    assert kept == ["000200"], "100 is dropped, as 200 is whole"
    assert mirror(run, drive / "my-dog") is None


def test_a_pipeline_is_copied_whole_and_goes_when_the_run_goes_on(run: Run, drive: Path) -> None:
    run.pipeline.mkdir()
    (run.pipeline / "model_index.json").write_text("{}")
    mirror(run, drive / "my-dog")
    assert (drive / "my-dog" / "pipeline" / "model_index.json").read_text() == "{}"
    shutil.rmtree(run.pipeline)
    assert mirror(run, drive / "my-dog") is None
    assert not (drive / "my-dog" / "pipeline").exists()


@pytest.mark.parametrize("fault", ["fail", "cut"])
def test_a_passing_fault_is_tried_again(run: Run, drive: Path, faults: Faults, fault: str) -> None:
    faults.fault = getattr(faults, fault)
    faults.names = {"log.jsonl": 2, "state.json": 1, "0.png": 1}
    assert mirror(run, drive / "my-dog") is None
    assert shown(drive / "my-dog").items() >= shown(run.folder).items()


def test_a_lasting_fault_is_one_sentence_and_the_rest_is_copied(
    run: Run, drive: Path, faults: Faults
) -> None:
    faults.names = {"log.jsonl": 1000, "0.png": 1000}
    problem = mirror(run, drive / "my-dog")
    assert problem is not None and problem.count("\n") == 0
    assert str(drive / "my-dog") in problem and "Input/output error" in problem
    missing = {"log.jsonl", "photos/0.png"}
    assert set(shown(run.folder)) - set(shown(drive / "my-dog")) == {"log.jsonl"}
    assert not missing & set(shown(drive / "my-dog"))
    assert faults.copied.count("0.png") == 3 and faults.copied.count("log.jsonl") == 1, (
        "only the first fault is waited for, or each call would take minutes on a dead drive"
    )
    faults.names.clear()
    assert mirror(run, drive / "my-dog") is None
    assert missing <= set(shown(drive / "my-dog"))


def test_what_cannot_be_removed_or_renamed_is_a_sentence_too(
    run: Run, drive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror(run, drive / "my-dog")
    save(run, 300)

    def failing(real: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(path: Path, *given: Any, **named: Any) -> Any:
            if Path(path) == drive / "my-dog" / name:
                raise OSError(107, "Transport endpoint is not connected")
            return real(path, *given, **named)

        return call

    monkeypatch.setattr(shutil, "rmtree", failing(shutil.rmtree, "checkpoints/000100"))
    monkeypatch.setattr(Path, "replace", failing(Path.replace, ".config.toml.partial"))
    os.utime(run.folder / "config.toml", (1, 1))
    assert "Transport endpoint" in str(mirror(run, drive / "my-dog"))
    assert (drive / "my-dog" / "checkpoints" / "000300").exists()
    monkeypatch.undo()
    assert mirror(run, drive / "my-dog") is None
    assert shown(drive / "my-dog").items() >= shown(run.folder).items()
    assert not (drive / "my-dog" / "checkpoints" / "000100").exists()


@pytest.mark.parametrize("name", ["log.jsonl", "tensors.safetensors", "config.toml", "0.png"])
def test_a_mirror_that_is_interrupted_has_nothing_half(
    run: Run, drive: Path, faults: Faults, name: str
) -> None:
    mirror(run, drive / "my-dog")
    before = shown(drive / "my-dog")
    save(run, 300)
    run.append("log", {"step": 300, "loss": 0.3})
    (run.folder / "config.toml").write_text(run.config.replace(prior_weight=2.0).to_toml())
    os.utime(Path(run.config.subject.pictures) / "0.png", (1, 1))
    faults.names, faults.fault = {name: 1}, faults.interrupt
    with pytest.raises(KeyboardInterrupt):
        mirror(run, drive / "my-dog")
    after = shown(run.folder)
    for place, data in shown(drive / "my-dog").items():
        assert data in (before.get(place), after.get(place)), place
    for checkpoint in (drive / "my-dog" / "checkpoints").glob("[0-9]*"):
        assert len(list(checkpoint.iterdir())) == 2
    assert mirror(run, drive / "my-dog") is None
    assert shown(drive / "my-dog").items() >= shown(run.folder).items()


def test_nothing_is_written_where_no_drive_is_mounted(run: Run, tmp_path: Path) -> None:
    problem = mirror(run, tmp_path / "content" / "drive" / "my-dog")
    assert problem is not None and "No such file" in problem
    assert not (tmp_path / "content").exists()


def test_another_runs_mirror_is_left_alone(run: Run, drive: Path, make_config: Make) -> None:
    mirror(run, drive / "my-dog")
    before = tree(drive / "my-dog")
    config = make_config("toybox", run.config.subject.pictures, seed=5)
    other = runs.start(config, run.folder.parent / "again")
    problem = mirror(other, drive / "my-dog")
    assert problem is not None and "holds something else" in problem
    (drive / "thesis").mkdir()
    (drive / "thesis" / "thesis.txt").write_text("dear")
    assert "holds something else" in str(mirror(run, drive / "thesis"))
    assert tree(drive / "my-dog") == before and len(tree(drive / "thesis")) == 1


# Taking back


def lose(run: Run) -> None:
    """What a disconnect does: all of the machine's own disk is gone."""
    shutil.rmtree(run.folder.parent)
    shutil.rmtree(run.folder.parents[1] / "uploads")


def test_a_restored_run_is_the_run_with_its_own_photos(
    run: Run, drive: Path, tmp_path: Path, faults: Faults
) -> None:
    mirror(run, drive / "my-dog")
    before, photos = tree(run.folder), tree(Path(run.config.subject.pictures))
    lose(run)
    back = restore(drive / "my-dog", tmp_path / "runs" / "my-dog")
    assert tree(Path(back.config.subject.pictures)) == photos
    same = [n for n in before if ".partial" not in n and n != "config.toml"]
    assert {n: tree(back.folder)[n] for n in same} == {n: before[n] for n in same}
    subject = back.config.subject
    assert back.config == run.config.replace(subject=subject)
    assert (subject.name, subject.token) == (run.config.subject.name, run.config.subject.token)
    faults.copied.clear()
    assert mirror(back, drive / "my-dog") is None, "its own mirror goes on"
    assert faults.copied == ["config.toml"], "the rest is there already"


def test_a_zip_and_own_and_drawn_class_pictures_come_back(
    tmp_path: Path, drive: Path, make_config: Make
) -> None:
    photos, own = (save_photos(tmp_path / "uploads" / name, 2) for name in ("rex", "dogs"))
    packed = shutil.make_archive(photos, "zip", photos)
    config = make_config("toybox", packed, class_folder=own)
    run = runs.start(config, tmp_path / "runs" / "my-dog")
    for name, prompt in (("ours", "a dog"), ("others", "a cat")):
        drawn = Path(save_photos(run.folder.parent / "class_pictures" / name, 1))
        (drawn / "manifest.json").write_text(f'{{"base": "toybox", "prompt": "{prompt}"}}')
    assert mirror(run, drive / "my-dog") is None
    before = {name: tree(Path(folder)) for name, folder in (("own", own), ("zip", packed))}
    ours = tree(run.folder.parent / "class_pictures" / "ours")
    archive = Path(packed).read_bytes()
    lose(run)
    back = restore(drive / "my-dog", tmp_path / "runs" / "my-dog")
    assert Path(back.config.subject.pictures).read_bytes() == archive
    assert back.config.class_folder is not None
    assert tree(Path(back.config.class_folder)) == before["own"]
    assert tree(back.folder.parent / "class_pictures") == {f"ours/{n}": d for n, d in ours.items()}
    assert not (back.folder / "class_pictures").exists()
    assert mirror(back, drive / "my-dog") is None


def test_restoring_over_something_or_from_nothing_is_refused(
    run: Run, drive: Path, tmp_path: Path
) -> None:
    mirror(run, drive / "my-dog")
    before = tree(run.folder)
    with pytest.raises(RunError, match="is not empty"):
        restore(drive / "my-dog", run.folder)
    with pytest.raises(RunError, match=r"has no config\.toml"):
        restore(drive, tmp_path / "back")
    assert tree(run.folder) == before and not (tmp_path / "back").exists()


def test_restoring_is_all_or_nothing(run: Run, drive: Path, tmp_path: Path, faults: Faults) -> None:
    mirror(run, drive / "my-dog")
    faults.names = {"state.json": 2}
    assert restore(drive / "my-dog", tmp_path / "back").checkpoints().keys() == {100, 200}
    faults.names = {"state.json": 3}
    with pytest.raises(MirrorError, match=r"Input/output error.*try again"):
        restore(drive / "my-dog", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_run_whose_mirror_lost_its_own_notes_is_found_and_restored(
    run: Run, drive: Path, tmp_path: Path
) -> None:
    mirror(run, drive / "my-dog")
    (drive / "my-dog" / ".mirror.json").write_text("")
    found = newest_run(drive)
    assert found is not None and found.step == 200
    assert shown(restore(found.run.folder, tmp_path / "back").folder).keys() >= {"log.jsonl"}
    assert "holds something else" in str(mirror(run, drive / "my-dog"))


def test_a_drive_that_is_gone_holds_no_run_and_restores_none(
    run: Run, drive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(path: Path, *given: Any, real: Callable[..., Any], **named: Any) -> Any:
        if drive in (path, *path.parents):
            raise OSError(107, "Transport endpoint is not connected")
        return real(path, *given, **named)

    for name in ("iterdir", "stat", "exists", "mkdir"):
        real = getattr(Path, name)
        monkeypatch.setattr(Path, name, lambda *a, real=real, **k: gone(*a, real=real, **k))
    assert newest_run(drive) is None
    with pytest.raises(MirrorError, match="Transport endpoint"):
        restore(drive / "my-dog", tmp_path / "back")
    assert "Transport endpoint" in str(mirror(run, drive / "my-dog"))


def test_a_run_goes_on_after_a_disconnect_as_if_there_had_been_none(
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
            assert mirror(run, drive / "my-dog") is None
    lose(run)
    found = newest_run(run.folder.parent, drive)
    assert found is not None and (found.step, found.finished) == (2, False)
    back = restore(found.run.folder, run.folder)
    assert [step.step for step in train(back)] == [3, 4]
    assert mirror(back, drive / "my-dog") is None
    losses = [[(row["step"], row["loss"]) for row in r.log()] for r in (straight, back)]
    assert losses[0] == losses[1]
    ends = [shown(r.pipeline / "unet") for r in (straight, back)]
    assert ends[0] == ends[1]
    found = newest_run(drive)
    assert found is not None and found.finished and found.step == 4


# Finding


def test_the_newest_run_is_one_that_has_not_finished(
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

    assert newest_run(tmp_path, None, tmp_path / "nowhere") is None
    make("runs/done", 3000, finished=True, steps=4)
    found = newest_run(tmp_path / "runs")
    assert found is not None and found.run.folder.name == "done" and found.finished
    assert (
        str(found) == f"{tmp_path}/runs/done: finished, 4 steps, last written 1970-01-01 00:50 UTC"
    )
    make("runs/old", 1000, steps=2)
    make("drive/new", 2000, steps=3)
    (tmp_path / "runs" / "broken").mkdir()
    (tmp_path / "runs" / "broken" / "config.toml").write_text("steps =")
    (tmp_path / "runs" / "notes.txt").write_text("")
    found = newest_run(None, tmp_path / "runs", tmp_path / "drive")
    assert found is not None and found.run.folder == tmp_path / "drive" / "new"
    assert (found.step, found.finished) == (3, False)
    assert str(found).endswith("new: step 3 of 4, last written 1970-01-01 00:33 UTC")


def test_of_a_run_and_its_mirror_the_further_one_is_found(run: Run, drive: Path) -> None:
    mirror(run, drive / "my-dog")
    found = newest_run(run.folder.parent, drive)
    assert found is not None and found.run.folder == run.folder, "of equals the first"
    run.append("log", {"step": 201, "loss": 0.4})
    found = newest_run(drive, run.folder.parent)
    assert found is not None and found.run.folder == run.folder
    shutil.rmtree(run.folder)
    found = newest_run(run.folder.parent, drive)
    assert found is not None and (found.run.folder, found.step) == (drive / "my-dog", 200)


def test_a_run_without_a_mirror_writes_no_word_for_one(run: Run) -> None:
    newest_run(run.folder.parent)
    assert not (run.folder / mirrors.IDENTITY).exists()


def test_a_finished_run_is_not_gone_on_with_from_its_mirror(run: Run, drive: Path) -> None:
    save(run, 100)
    mirror(run, drive / "my-dog")
    run.pipeline.mkdir()
    (run.pipeline / "model_index.json").write_text("{}")
    found = newest_run(run.folder.parent, drive)
    assert found and found.finished and found.run.folder == run.folder


def test_only_runs_of_the_subject_and_base_asked_for_are_found(run: Run, tmp_path: Path) -> None:
    save(run, 100)
    config, root = run.config, run.folder.parent
    assert newest_run(root, like=config.replace(prior_weight=2.0)) == newest_run(root)
    other = [
        config.replace(base="owner/model"),
        config.replace(subject=replace(config.subject, name="max")),
        config.replace(subject=replace(config.subject, class_noun="cat")),
    ]
    assert [newest_run(root, like=asked) for asked in other] == [None] * 3


def test_a_first_write_that_failed_does_not_refuse_the_mirror_for_ever(
    run: Run, drive: Path
) -> None:
    (drive / "my-dog").mkdir()
    (drive / "my-dog" / "..mirror.json.12.partial").write_text("{")
    assert mirror(run, drive / "my-dog") is None


def test_a_file_is_handed_over_or_a_sentence_says_why_not(
    drive: Path, tmp_path: Path, faults: Faults
) -> None:
    from dreambooth_lib.copies import zipped

    folder = tmp_path / "model"
    (folder / "unet").mkdir(parents=True)
    (folder / "unet" / "weights").write_bytes(bytes(1000))
    (folder / ".hidden").touch()
    file = zipped(folder)
    assert file == tmp_path / "model.zip" and shutil.unpack_archive(file, tmp_path / "out") is None
    assert tree(tmp_path / "out") == {"unet/weights": bytes(1000)}
    assert mirrors.hand_over(file, drive) is None
    assert (drive / "model.zip").read_bytes() == file.read_bytes()
    text = mirrors.hand_over(file, tmp_path / "model.zip")
    assert text is not None and "could not be copied" in text and file.exists()
