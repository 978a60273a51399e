"""Damaged backups and evaluations."""

import shutil
from pathlib import Path
from random import Random

from conftest import save_photos

from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.core.errors import KitError
from dreambooth_lib.evaluation import dreambench, scores, sweep
from dreambooth_lib.metrics.encoders import Encoder
from dreambooth_lib.notebook import drive_backup, drive_restore
from dreambooth_lib.training import runs
from hostile.bench import Kind, Wrong
from hostile.mutate import damage_folder
from hostile.run_folders import flat, interrupted, is_whole, saved_states, tiny_config
from hostile.texts import TABLE


def prepare_backup(folder: Path) -> None:
    interrupted(folder, validate_every=3)
    if said := drive_backup.backup(runs.resume(folder / "sound" / "run"), folder / "drive"):
        raise Wrong(said)


def backup(rng: Random, material: Path, folder: Path) -> None:
    """Damage a backup or what is backed up; find it, back up again, and restore it.

    Only restoring raises; what it restores has the weights of a whole checkpoint.
    """
    shutil.copytree(material / "sound", folder / "here")
    shutil.copytree(material / "drive", folder / "drive" / "run")
    pattern = rng.choice(
        ("*.*", "*", "checkpoints/*/*", "**/*", "class_images/*/*", ".backup.json")
    )
    where = folder / rng.choice(("drive/run", "drive/run", "here"))
    files = [path for path in where.glob(pattern) if path.is_file()]
    damage_folder(where, rng, pattern if files else "**/*")
    photos = material / "photos"
    try:
        drive_restore.find_interrupted(True, [folder / "drive"], photos, "dog", "toybox")
        try:
            run = runs.resume(folder / "here" / "run")
        except KitError:  # the run itself cannot be opened any more
            run = None
        if run is not None and rng.random() < 0.5:
            drive_backup.backup(run, folder / "drive" / "run")
        drive_restore.has_finished(folder / "drive" / "run")
    except Exception as error:
        raise Wrong(f"raised {type(error).__name__}: {error}") from error
    restored = drive_restore.restore(folder / "drive" / "run", folder / "back" / "run")
    state = flat(restored.load_checkpoint() or {})
    whole = saved_states(material / "sound" / "run")
    step = state.get("/step")
    if state and (step not in whole or not is_whole(state, whole[step])):
        raise Wrong(f"restored step {step} with other weights")


PROTOCOL = dreambench.Protocol(images_per_prompt=1, class_images=2, steps=1, guidance_scale=1.0)


def prepare_evaluation(folder: Path) -> None:
    tiny_config(folder)
    for name in ("dog", "teapot"):
        save_photos(folder / "data" / name, 1)
    (folder / "data" / "prompts_and_classes.txt").write_text(TABLE)
    draw(folder, folder / "out")


def draw(material: Path, out: Path) -> None:
    benchmark = dreambench.load_benchmark(material / "data")
    methods = {"base": lambda subject: str(material / "base")}
    list(dreambench.draw_all(benchmark, methods, out, PROTOCOL))


def evaluation(rng: Random, material: Path, folder: Path) -> None:
    """Continue an evaluation with a damaged file, and score it.

    A damaged record changes no image; a damaged image is drawn again or named.
    """
    shutil.copytree(material / "out", folder / "out")
    damaged = damage_folder(folder / "out", rng, rng.choice(("**/*.json", "**/*.json", "**/*.png")))
    draw(material, folder / "out")
    benchmark = dreambench.load_benchmark(material / "data")
    encoders = {"clip": Encoder(material / "clip")}
    list(scores.score(benchmark, ["base"], folder / "out", encoders, PROTOCOL))
    for image in material.glob("out/base/*/*.png"):
        same = (folder / image.relative_to(material)).read_bytes() == image.read_bytes()
        if damaged.suffix == ".json" and not same:
            raise Wrong(f"with {damaged.name} damaged, {image.name} is another image")


def prepare_sweep(folder: Path) -> None:
    list(sweep.sweep(cells(folder), folder / "sweep", steps=[2]))


def cells(folder: Path) -> dict[str, TrainConfig]:
    config = tiny_config(folder, steps=2, validate_every=2, class_images=2)
    return sweep.grid(config, prior_weight=[0.0, 1.0])


def swept(rng: Random, material: Path, folder: Path) -> None:
    """Continue a finished sweep with a damaged file; its table and its failures are told."""
    shutil.copytree(material / "sweep", folder / "sweep")
    damage_folder(folder / "sweep", rng, rng.choice(("*.*", "*/*.*", "*/validation/*.json")))
    for done in sweep.sweep(cells(material), folder / "sweep", steps=[2]):
        if done.error and not done.error.isprintable():
            raise Wrong(f"not one line: {done.error!r}")
    (folder / "sweep" / "table.csv").read_text()


KINDS = (
    Kind("backups", prepare_backup, backup, 300),
    Kind("evaluations", prepare_evaluation, evaluation, 200),
    Kind("sweeps", prepare_sweep, swept, 200),
)
