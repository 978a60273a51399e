"""Runs, drives and faults for the tests of backing up and restoring."""

import shutil
import tomllib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from conftest import save_photos
from PIL import Image

from dreambooth_lib.core import files
from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.notebook import drive_copy
from dreambooth_lib.notebook.drive_restore import FoundRun, find_interrupted
from dreambooth_lib.training import runs
from dreambooth_lib.training.runs import Run
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
    """Return what a backup has of a run without validation: only its newest checkpoint.

    Its config names no local path.
    """
    newest = f"checkpoints/{max(run.checkpoints()):06d}/"
    found = shown(run.folder).items()
    fields = tomllib.loads((run.folder / "config.toml").read_text())
    fields["subject"]["photos"] = "photos"
    return {n: d for n, d in found if not n.startswith("checkpoints/") or n.startswith(newest)} | {
        "config.toml": tomli_w.dumps(fields).encode()
    }


def newest(*folders: Path | None, base: str = "toybox") -> FoundRun | None:
    """Return the run in these folders that would be resumed, whatever its photos."""
    return find_interrupted(True, folders, None, "dog", base)[0]


def validated(run: Run, fidelity: dict[int, float]) -> None:
    """Write validation rows that differ only in their subject fidelity."""
    for step, value in fidelity.items():
        row = ValidationResult(step, value, 0.9, 0.3, 0.5, 0.0, 0.1, 0.0, {}, 1.0)
        run.append("validation", asdict(row))


def lose(run: Run) -> None:
    """Delete what a disconnect does: all of the machine's own disk."""
    shutil.rmtree(run.folder.parent)
    shutil.rmtree(run.folder.parents[1] / "uploads")


def finish(run: Run) -> None:
    run.pipeline.mkdir()
    (run.pipeline / "model_index.json").write_text("{}")


def full_state(step: int) -> State:
    moments = {"state": {0: {"m": torch.ones(64)}}, "param_groups": [{"lr": 0.1}]}
    return {"step": step, "model": {"w": torch.full((8, 8), 1 / 3 * step)}, "optimizer": moments}


class Faults:
    """Writing to the drive that fails, is truncated or interrupted as told, and is counted."""

    def __init__(self) -> None:
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

    def written(self, source: Path, place: Path) -> None:
        self.copied.append(source.name)
        self.sources.append(source)
        if self.names.get(source.name, 0):
            self.names[source.name] -= 1
            self.fault(place)


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Faults:
    faults, copy, save = Faults(), shutil.copyfile, Image.Image.save
    replacing_file = files.replacing_file

    def copy_and_count(source: Path, place: Path) -> None:
        copy(source, place)
        faults.written(source, place)

    def save_and_count(image: Image.Image, place: Path, *given: Any) -> None:
        save(image, place, *given)
        faults.written(place.parent.with_name("photos") / place.name, place)

    def replace_and_count(place: Path, data: bytes) -> None:
        with replacing_file(place) as partial:
            partial.write_bytes(data)
            faults.written(place, partial)

    monkeypatch.setattr(shutil, "copyfile", copy_and_count)
    monkeypatch.setattr(Image.Image, "save", save_and_count)
    monkeypatch.setattr(drive_copy, "replace_file", replace_and_count)
    return faults
