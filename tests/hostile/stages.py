"""List what the kit writes to disk, each as a function of a folder that a failing disk holds."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest import mock

from conftest import save_photos

from dreambooth_lib import __main__ as command
from dreambooth_lib.core.disk import DiskError
from dreambooth_lib.evaluation import demo, report, sweep
from dreambooth_lib.evaluation.dreambench import load_benchmark
from dreambooth_lib.export import pipeline_folder, zip_download
from dreambooth_lib.metrics.encoders import Encoder, embed_files
from dreambooth_lib.notebook import drive_backup, drive_restore
from dreambooth_lib.training import class_images, runs
from dreambooth_lib.training.loop import train
from dreambooth_lib.training.sampling import load_source
from dreambooth_lib.training.validation import ValidationPlan
from hostile.copies import cells
from hostile.methods import METHODS, config_of
from hostile.run_folders import tiny_config
from hostile.texts import TABLE

#: Gets the material and the folder; writes only into the folder, and can be called again.
Stage = Callable[[Path, Path], None]
PLAN = ValidationPlan(seeds=1, class_images=2, unrelated=1, inference_steps=1)


def prepare(material: Path) -> None:
    """Make a base, photos, a finished and an interrupted run, and a backup."""
    material.mkdir(parents=True)
    for name in ("dog", "teapot"):
        save_photos(material / "data" / name, 2)
    (material / "data" / "prompts_and_classes.txt").write_text(TABLE)
    config = tiny_config(material, validate_every=3, ema_decay=0.9)
    run = runs.start(config, material / "half" / "run")
    for step in train(run):
        if step.step == 5:
            break
    shutil.copytree(material / "half", material / "whole")
    list(train(runs.resume(material / "whole" / "run")))
    tell(drive_backup.backup(runs.resume(material / "whole" / "run"), material / "drive"))


def tell(sentence: str | None) -> None:
    """Raise what a function that never raises has said of the disk."""
    if sentence is not None:
        raise DiskError(sentence)


def training(method: str) -> Stage:
    def stage(material: Path, folder: Path) -> None:
        run = runs.start_or_resume(config_of(method, material), folder / "run")
        list(train(run))

    return stage


def resuming(material: Path, folder: Path) -> None:
    list(train(runs.resume(folder / "run")))


def starting(material: Path, folder: Path) -> None:
    runs.start(tiny_config(material), folder / "run")


def drawing(material: Path, folder: Path) -> None:
    config = tiny_config(material)
    list(class_images.draw_class_images(config, load_source(config), folder))


def embedding(material: Path, folder: Path) -> None:
    photos = sorted((material / "photos").iterdir())
    embed_files(Encoder(material / "clip"), photos, folder / "embeddings")


def model(material: Path, folder: Path) -> None:
    pipeline_folder.write_model(runs.resume(material / "whole" / "run"), 6, folder / "model")


def _command(*words: str) -> None:
    given = command.parser().parse_args(words)
    given.call(given)


def exporting(material: Path, folder: Path) -> None:
    _command("export", str(folder / "run"))


def sampling(material: Path, folder: Path) -> None:
    given = (str(material / "whole" / "run"), "a {} dog", "--seeds", "0", "1", "--steps", "1")
    _command("sample", *given, "--out", str(folder / "samples"))


def backing_up(material: Path, folder: Path) -> None:
    tell(drive_backup.backup(runs.resume(material / "whole" / "run"), folder / "drive"))


def restoring(material: Path, folder: Path) -> None:
    if not (folder / "back" / "run").exists():
        drive_restore.restore(material / "drive", folder / "back" / "run")


def copying(material: Path, folder: Path) -> None:
    tell(zip_download.copy_to(folder / "drive", material / "base" / "model_index.json"))


def evaluating(material: Path, folder: Path) -> None:
    settings = {"steps": 2, "prior": "none", "validate_every": 0}
    config, benchmark = tiny_config(material, **settings), load_benchmark(material / "data")
    for _ in report.base_against_tuned(
        benchmark.only(["dog"]), lambda subject: replace(config, subject=subject),
        folder / "out", [material / "clip"], str(material / "base"), 3,
    ):  # fmt: skip
        pass


def sweeping(material: Path, folder: Path) -> None:
    for done in sweep.sweep(cells(material), folder / "sweep", [2], PLAN):
        tell(done.error)


def figures(material: Path, folder: Path) -> None:
    shutil.rmtree(folder / "runs", ignore_errors=True)
    config = tiny_config(material, steps=2)
    with mock.patch.object(demo, "TOYBOX_SCORER", material / "clip"):
        demo.personalise(config, folder / "runs" / "one", folder, PLAN)


STAGES: dict[str, Stage] = {
    "start": starting, "class images": drawing, "embed": embedding,
    **{f"train {name}": training(name) for name in METHODS if name != "two_processes"},
    "resume": resuming, "model and zip": model, "export": exporting, "sample": sampling,
    "back up": backing_up, "restore": restoring, "copy": copying, "evaluate": evaluating,
    "sweep": sweeping, "figures": figures,
}  # fmt: skip
#: Which of the runs of :func:`prepare` a stage finds in the folder.
FINDS = {"resume": "half", "export": "whole"}
