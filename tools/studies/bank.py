"""Draw a bank of images: many runs' checkpoints, each by three plans, to study validation with.

BANK/KIND/SUBJECT/seed0/000125.npz   uint8 arrays [N, 64, 64, 3], named PLAN/subject, PLAN/class and
                                     PLAN/unrelated; the base's are in BANK/base/SUBJECT/000000.npz

Rules that choose a checkpoint, encoders that score it and people who look at it are then compared
on the same images, without training again.
"""

import io
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.core.files import replace_file
from dreambooth_lib.core.subject import Subject
from dreambooth_lib.evaluation.demo import bundled_subjects
from dreambooth_lib.families import loading
from dreambooth_lib.families.base import Family
from dreambooth_lib.training import runs, trainable, validation
from dreambooth_lib.training.loop import train
from dreambooth_lib.training.validation import ValidationImages, ValidationPlan
from dreambooth_lib.training.validation_record import load_images
from tools.toybox.subjects import STUDY_PHOTOS, STUDY_SUBJECTS

EVERY = 125  #: steps between checkpoints, as by default
LAMBDAS = (0.0, 0.25, 0.5, 2.0)  #: beside the default's 1
SHARES = (0.8, 0.9)  #: of the class to keep, by an adaptive λ


def plans(config: TrainConfig) -> dict[str, ValidationPlan]:
    """Return what is drawn of each checkpoint, every plan on seeds of its own.

    ``validation`` is what a run draws, ``again`` the same on other seeds, and ``exhaustive`` more
    images by the base's own sampler, to judge the choice by.
    """
    plan = validation.plan_for(config)
    return {
        "validation": plan,
        "again": replace(plan, first_seed=500),
        "exhaustive": replace(
            plan, seeds=3, class_images=8, first_seed=1000, fast=False, inference_steps=10
        ),
    }


def kinds() -> dict[str, Callable[[TrainConfig], TrainConfig]]:
    """Return how each kind of run changes ``TrainConfig.auto``, without early stopping."""
    every: dict[str, Callable[[TrainConfig], TrainConfig]] = {
        "full": lambda config: config,
        "lora": lambda config: config.replace(method="lora", lora_rank=8),
    }
    for weight in LAMBDAS:
        every[f"lambda-{weight:g}"] = lambda config, w=weight: config.replace(prior_weight=w)
    for share in SHARES:
        every[f"keep-{share:g}"] = lambda config, s=share: config.replace(keep_class=s)
    return every


def subjects() -> dict[str, Subject]:
    """Return the bundled subjects and the studies' own."""
    every = {subject.name: subject for subject in bundled_subjects()}
    for name, (_, noun, kind, _) in STUDY_SUBJECTS.items():
        every[name] = Subject(str(STUDY_PHOTOS / name), noun, name=name, kind=kind)
    return every


def config_of(kind: str, subject: Subject, seed: int) -> TrainConfig:
    """Return the config of one run of the bank."""
    config = kinds()[kind](TrainConfig.auto(subject, seed=seed, early_stop=False))
    return config.replace(validate_every=EVERY, checkpoints_kept=10_000)


def steps_of(config: TrainConfig) -> range:
    """Return the steps whose checkpoints are drawn."""
    return range(EVERY, config.steps + 1, EVERY)


def fill(bank: Path, kind: str, subject: Subject, seed: int) -> None:
    """Train one run of the bank and draw its checkpoints; what is there already stays."""
    torch.set_num_threads(1)
    config = config_of(kind, subject, seed)
    base = bank / "base" / subject.name / "000000.npz"
    if not base.exists():
        save(base, draw(loading.load_model("toybox"), config, plans(config)))
    place = bank / kind / subject.name / f"seed{seed}"
    missing = [step for step in steps_of(config) if not (place / f"{step:06d}.npz").exists()]
    if not missing:
        return
    folder = place / "run"
    run = runs.resume(folder) if (folder / "config.toml").exists() else runs.start(config, folder)
    if not run.finished:
        for _ in train(run):
            pass
    others = {name: plan for name, plan in plans(config).items() if name != "validation"}
    for step in missing:
        drawn = draw(trainable.load_at_checkpoint(run, step), config, others)
        save(place / f"{step:06d}.npz", {"validation": load_images(run, step)} | drawn)
    for name in ("validation.jsonl", "log.jsonl"):
        (folder / name).replace(place / name)
    shutil.rmtree(folder)


def draw(
    family: Family, config: TrainConfig, plans: Mapping[str, ValidationPlan]
) -> dict[str, ValidationImages]:
    """Draw a model's images by several plans."""
    return {
        name: validation.draw_images(family, config.subject, plan, batch_size=18)
        for name, plan in plans.items()
    }


def save(path: Path, drawn: Mapping[str, ValidationImages]) -> None:
    """Save the images of one checkpoint as an archive of arrays."""
    arrays = {}
    for name, images in drawn.items():
        kinds = {"subject": images.subject, "class": images.class_images,
                 "unrelated": images.unrelated}  # fmt: skip
        for kind, of_kind in kinds.items():
            arrays[f"{name}/{kind}"] = np.stack([np.asarray(image) for image in of_kind])
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, buffer.getvalue())


def load(path: Path, subject: Subject) -> dict[str, ValidationImages]:
    """Load the images of one checkpoint, by plan."""
    with np.load(path, allow_pickle=False) as arrays:
        of = {key: [Image.fromarray(a) for a in arrays[key]] for key in arrays.files}
    return {
        name: ValidationImages(
            of[f"{name}/subject"], of[f"{name}/class"], of[f"{name}/unrelated"],
            [prompt for prompt, _ in plan.prompts_and_seeds(subject)[0]],
        )
        for name, plan in plans(TrainConfig(subject)).items()
    }  # fmt: skip
