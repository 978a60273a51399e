"""Draw a bank of images: many runs' checkpoints, each by three plans, to study validation with.

BANK/KIND/SUBJECT/seed0/000100.npz   uint8 arrays [N, 64, 64, 3], named PLAN/subject, PLAN/class and
                                     PLAN/unrelated; 000000.npz is the base's, BANK/base/SUBJECT

Rules that choose a checkpoint, encoders that score it and people who look at it are then compared
on the same images, without training again.
"""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dreambooth_lib.core.config import Subject, TrainConfig
from dreambooth_lib.core.files import replace_file
from dreambooth_lib.evaluation.demo import bundled_subjects
from dreambooth_lib.families import loading
from dreambooth_lib.families.base import Family
from dreambooth_lib.training import runs, trainable, validation
from dreambooth_lib.training.loop import train
from dreambooth_lib.training.validation import ValidationImages, ValidationPlan
from tools.toybox.subjects import STUDY_SUBJECTS, draw_study_subject

OTHER_SEEDS = 1000  #: the first seed of images that no validation draws
EVERY = 100  #: steps between checkpoints
#: What a validation might draw, the same on other seeds to judge it by, and fewer, faster steps.
PLANS = {
    "a": ValidationPlan(seeds=4, class_images=12, inference_steps=10),
    "b": ValidationPlan(seeds=4, class_images=12, inference_steps=10, first_seed=OTHER_SEEDS),
    "fast": ValidationPlan(seeds=1, class_images=6, inference_steps=7, fast=True),
    "free": ValidationPlan(
        seeds=1, class_images=6, inference_steps=7, fast=True, guidance_scale=1.0
    ),
}
KINDS: dict[str, Callable[[TrainConfig], TrainConfig]] = {
    "full": lambda config: config,
    "lora": lambda config: config.replace(method="lora", lora_rank=8, learning_rate=None),
}


def subjects(folder: Path) -> dict[str, Subject]:
    """Return the bundled subjects and the study's own, whose photos are drawn to ``folder``."""
    every = {subject.name: subject for subject in bundled_subjects()}
    for name in STUDY_SUBJECTS:
        every[name] = draw_study_subject(name, folder)
    return every


def fill(bank: Path, kind: str, subject: Subject, seed: int) -> None:
    """Train one run of the bank and draw its checkpoints; what is there already stays."""
    torch.set_num_threads(1)
    config = KINDS[kind](TrainConfig(subject, seed=seed))
    config = config.replace(validate_every=0, checkpoint_every=EVERY, checkpoints_kept=10_000)
    base = bank / "base" / subject.name / "000000.npz"
    if not base.exists():
        save(base, draw(loading.load_model("toybox"), config))
    place = bank / kind / subject.name / f"seed{seed}"
    steps = range(EVERY, config.steps + 1, EVERY)
    missing = [step for step in steps if not (place / f"{step:06d}.npz").exists()]
    if not missing:
        return
    folder = place / "run"
    run = runs.resume(folder) if (folder / "config.toml").exists() else runs.start(config, folder)
    if not run.finished:
        for _ in train(run):
            pass
    for step in missing:
        save(place / f"{step:06d}.npz", draw(trainable.load_at_checkpoint(run, step), config))
    shutil.rmtree(folder)


def draw(family: Family, config: TrainConfig) -> dict[str, ValidationImages]:
    """Draw a model's images by every plan."""
    scale = config.guidance_scale
    return {
        name: validation.draw_images(
            family, config.subject, replace(plan, guidance_scale=plan.guidance_scale or scale), 19
        )
        for name, plan in PLANS.items()
    }


def save(path: Path, drawn: Mapping[str, ValidationImages]) -> None:
    import io

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
        for name, plan in PLANS.items()
    }  # fmt: skip
