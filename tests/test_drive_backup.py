"""Test the backup of a run on a drive with faults."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from drive_faults import Faults, Make, full_state, newest, save, shown, tree, validated, wanted
from drive_faults import drive as drive
from drive_faults import faults as faults
from drive_faults import no_waits as no_waits
from drive_faults import run as run

from dreambooth_lib.notebook import drive_backup, drive_copy
from dreambooth_lib.notebook.drive_backup import backup
from dreambooth_lib.notebook.drive_restore import (
    has_finished,
    restore,
)
from dreambooth_lib.training import runs
from dreambooth_lib.training.checkpoints import check_digests, load_state
from dreambooth_lib.training.runs import Run


def test_a_backup_is_the_run_with_its_photos_and_nothing_half_written(
    run: Run, drive: Path
) -> None:
    assert backup(run, drive / "my-dog") is None
    photos = {f"photos/{n}": d for n, d in tree(Path(run.config.subject.photos)).items()}
    assert len(photos) == 3
    assert shown(drive / "my-dog") == wanted(run) | photos
    assert set(tree(drive / "my-dog")) - set(shown(drive / "my-dog")) == {".backup.json", ".backup"}


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
    assert sorted(faults.copied) == ["0.png", "1.png", "2.png", "config.toml"]
    assert shown(drive / "my-dog").items() >= wanted(run).items()


def test_what_others_need_is_copied_first_and_the_newest_weights_before_older_ones(
    run: Run, drive: Path, faults: Faults
) -> None:
    backup(run, drive / "my-dog")
    order = ["/".join(path.parts[-2:]) for path in faults.sources]
    assert order == [
        "photos/0.png", "photos/1.png", "photos/2.png", "000100/subject-0.png",
        "my-dog/log.jsonl", "my-dog/config.toml", "000200/digests.json", "000200/state.json",
        "000200/tensors.safetensors",
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


def test_the_chosen_step_is_copied_until_the_run_is_validated_further(
    run: Run, drive: Path
) -> None:
    for step in (300, 400):
        run.save_checkpoint(step, {"step": step}, best=100)
    validated(run, {0: 0.1, 100: 0.8, 300: 0.7, 400: 0.6})
    for last, names in ((400, ["000100", "000300", "000400"]), (300, ["000100", "000400"])):
        chosen = json.dumps({"step": 300, "last": last})
        (run.folder / "chosen_checkpoint.json").write_text(chosen)
        assert backup(run, drive / "my-dog") is None
        there = drive / "my-dog" / "checkpoints"
        assert sorted(path.name for path in there.iterdir()) == names


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
    assert trash == dict.fromkeys(("digests.json", "state.json", "tensors.safetensors"), b"")


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
    weights = ["state.json", "tensors.safetensors"]
    assert files["000300"] == ["digests.json", *weights]
    assert files["000400"] == ["digests.json", "optimizer.safetensors", *weights]
    check_digests(there / "000300")
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
    os.utime(Path(run.config.subject.photos) / "0.png", (2e9, 2e9))
    faults.names, faults.fault = {name: 1}, faults.interrupt
    with pytest.raises(KeyboardInterrupt):
        backup(run, drive / "my-dog")
    after = wanted(run)
    for place, data in shown(drive / "my-dog").items():
        assert data in (before.get(place), after.get(place)), place
    for checkpoint in (drive / "my-dog" / "checkpoints").glob("[0-9]*"):
        check_digests(checkpoint)
    assert backup(run, drive / "my-dog") is None
    assert shown(drive / "my-dog").items() >= wanted(run).items()


def test_nothing_is_written_where_no_drive_is_mounted(run: Run, tmp_path: Path) -> None:
    problem = backup(run, tmp_path / "content" / "drive" / "my-dog")
    assert problem is not None and "No such file" in problem
    assert not (tmp_path / "content").exists()


def test_another_runs_backup_is_left_alone(run: Run, drive: Path, make_config: Make) -> None:
    backup(run, drive / "my-dog")
    before = tree(drive / "my-dog")
    config = make_config("toybox", run.config.subject.photos, seed=5)
    other = runs.start(config, run.folder.parent / "again")
    problem = backup(other, drive / "my-dog")
    assert problem is not None and "is not a backup of this run" in problem
    (drive / "thesis").mkdir()
    (drive / "thesis" / "thesis.txt").write_text("dear")
    assert "is not a backup of this run" in str(backup(run, drive / "thesis"))
    assert tree(drive / "my-dog") == before and len(tree(drive / "thesis")) == 1


def test_of_two_sessions_of_a_run_the_one_behind_leaves_the_others_backup_alone(
    run: Run, drive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backup(run, drive / "my-dog")
    second = restore(drive / "my-dog", tmp_path / "copy" / "my-dog")
    save(run, 300)
    assert backup(run, drive / "my-dog") is None
    before = tree(drive / "my-dog")
    monkeypatch.setattr(drive_backup, "SESSION", "0" * 32)
    for _ in (1, 2):
        problem = str(backup(second, drive / "my-dog"))
        assert "has backed up step 300 there, which this run has not reached; stop one" in problem
        assert tree(drive / "my-dog") == before
    shutil.copytree(drive / "my-dog", drive / "another")
    save(second, 300)
    assert backup(second, drive / "another") is None, "it has caught up"
    shutil.rmtree(second.folder / "checkpoints" / "000300")
    assert backup(second, drive / "another") is None, "what it has written is its own"
    shutil.rmtree(drive / "my-dog")
    assert backup(second, drive / "my-dog") is None, "as the sentence says"


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
        assert "its disk is full" in str(backup(run, drive / "my-dog"))
    assert list((drive / "my-dog").iterdir()) == []
    (drive / "my-dog" / ".backup.json.7.partial").write_text("of a process that was killed")
    assert backup(run, drive / "my-dog") is None
