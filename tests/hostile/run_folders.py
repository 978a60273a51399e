"""Damaged run folders, checkpoints and caches, each resumed by training's own code."""

import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
from conftest import save_base, save_clip, save_photos

from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.core.errors import KitError
from dreambooth_lib.core.subject import Subject
from dreambooth_lib.training import best_checkpoint, runs
from dreambooth_lib.training.checkpoints import load_state
from dreambooth_lib.training.loop import train
from dreambooth_lib.training.validation_record import history, load_images
from hostile.bench import Kind, Wrong
from hostile.mutate import FOREIGN, damage_folder

STEPS, SAVED = 7, (2, 4, 6)  #: a sound run's steps, and the steps of its checkpoints


def tiny_config(folder: Path, **changes: Any) -> TrainConfig:
    """Return the config of a short run, and save its base, scorer and photos beside it."""
    if not (folder / "base").exists():
        save_base(folder / "base", "epsilon", attention_head_dim=2)
        save_clip(folder / "clip")
        save_photos(folder / "photos")
    fields: dict[str, Any] = {
        "base": str(folder / "base"), "scorer": str(folder / "clip"), "steps": STEPS,
        "batch_size": 2, "class_images": 4, "prior_inference_steps": 2, "learning_rate": 1e-3,
        "validation_inference_steps": 2, "checkpoint_every": 2, "validate_every": 0,
        "checkpoints_kept": 3,
    }  # fmt: skip
    return TrainConfig(Subject(str(folder / "photos"), "dog"), **(fields | changes))


def interrupted(folder: Path, at: int = max(SAVED), **changes: Any) -> None:
    """Train a run to a step and leave it there; then train a copy of it to its end."""
    folder.mkdir(parents=True, exist_ok=True)
    run = runs.start(tiny_config(folder, **changes), folder / "sound" / "run")
    for step in train(run):
        if step.step == at:
            break
    shutil.copytree(folder / "sound", folder / "ended")
    list(train(runs.resume(folder / "ended" / "run")))


def prepare_plain(folder: Path) -> None:
    interrupted(folder)


def prepare_validated(folder: Path) -> None:
    interrupted(folder, validate_every=3)


def weights(run: Path) -> dict[str, torch.Tensor]:
    """Return the trained weights of a run's last step."""
    return flat(load_state(run / "checkpoints" / f"{STEPS:06d}", ("model",)))


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """Return a nested state's values by their paths."""
    if isinstance(value, dict):
        return {k: v for name in value for k, v in flat(value[name], f"{path}/{name}").items()}
    if isinstance(value, list | tuple):
        return flat(dict(enumerate(value)), path)
    return {path: value}


def same(one: dict[str, Any], two: dict[str, Any]) -> bool:
    """Return whether two flat states are equal, bit for bit."""

    def bits(value: Any) -> Any:
        return value.numpy().tobytes() if isinstance(value, torch.Tensor) else value

    return one.keys() == two.keys() and all(bits(one[k]) == bits(two[k]) for k in one)


def checkpoint(rng: Random, material: Path, folder: Path) -> None:
    """Resume a run with a damaged newest checkpoint, at times with two.

    It goes on with the state of the newest whole checkpoint; the first is always whole.
    """
    shutil.copytree(material / "sound" / "run", folder / "run")
    run = runs.resume(folder / "run")
    damaged = (6, 4)[: rng.choice((1, 1, 1, 2))]
    for step in damaged:
        damage_folder(folder / "run" / "checkpoints" / f"{step:06d}", rng)
    if rng.random() < 0.1:
        (folder / "run" / "checkpoints" / rng.choice(FOREIGN)).mkdir()
    whole = saved_states(material / "sound" / "run")
    try:
        found = flat(run.load_checkpoint() or {})
    except KitError as error:
        raise Wrong(f"with {damaged} damaged, passes over the whole ones: {error}") from error
    step = found.get("/step")
    if step not in whole or not is_whole(found, whole[step]):
        raise Wrong(f"with {damaged} damaged, goes on from step {step} with other weights")
    if step < max(set(SAVED) - set(damaged)):
        raise Wrong(f"with {damaged} damaged, goes on from step {step}")


def saved_states(run: Path) -> dict[int, dict[str, Any]]:
    """Return the flat states of a sound run's checkpoints by step."""
    return {step: flat(load_state(path)) for step, path in runs.resume(run).checkpoints().items()}


def is_whole(found: dict[str, Any], saved: dict[str, Any]) -> bool:
    """Return whether a state is as it was saved; only an optimizer's state may be left out."""
    kept = {name for name in saved if not name.startswith("/optimizer")}
    within = kept <= found.keys() <= saved.keys()
    return within and same(found, {name: saved[name] for name in found})


def trained(rng: Random, material: Path, folder: Path) -> None:
    """Resume a run with a damaged checkpoint to its end; its newest one is then whole."""
    checkpoint(rng, material, folder)
    run = runs.resume(folder / "run")
    list(train(run))
    try:
        load_state(max(run.checkpoints().items())[1])
    except KitError as error:
        raise Wrong(f"the newest checkpoint is a damaged one: {error}") from error


def _to_the_end(damage: Callable[[Random, Path], Path]) -> Callable[[Random, Path, Path], None]:
    """Return a case that damages a copy of the sound run and trains it to its end.

    Its weights are then those of the run that nothing happened to.
    """

    def case(rng: Random, material: Path, folder: Path) -> None:
        shutil.copytree(material / "sound", folder, dirs_exist_ok=True)
        damaged = damage(rng, folder)
        run = runs.resume(folder / "run")
        look_at(run)
        list(train(run))
        look_at(run)
        if damaged.name in ("config.toml", "memory.json"):
            return  # other settings may give other weights
        if not same(weights(folder / "run"), weights(material / "ended" / "run")):
            raise Wrong(f"with {damaged.name} damaged, the weights are others")

    return case


def look_at(run: runs.Run) -> None:
    """Read of a run all that notebooks and the command line show."""
    run.log()
    for result in history(run):
        load_images(run, result.step)
    if len(history(run)) > 1:
        best_checkpoint.best_checkpoint(run)


def damage_record(rng: Random, folder: Path) -> Path:
    """Damage a run's files but its checkpoints, or its pipeline; add a foreign file at times."""
    run = folder / "run"
    pattern = rng.choice(
        ("*.*", "validation.jsonl", "log.jsonl", "validation/*.json", "validation/**/*")
    )
    if not [path for path in run.glob(pattern) if path.is_file()]:
        pattern = "*.*"
    return damage_folder(run, rng, pattern)


def damage_cache(rng: Random, folder: Path) -> Path:
    return damage_folder(folder, rng, rng.choice(("latents/*", "class_images/*/*")))


KINDS = (
    Kind("checkpoints", prepare_plain, checkpoint, 1_000),
    Kind("resumed", prepare_plain, trained, 100),
    Kind("runs", prepare_validated, _to_the_end(damage_record), 500),
    Kind("caches", prepare_plain, _to_the_end(damage_cache), 300),
)
