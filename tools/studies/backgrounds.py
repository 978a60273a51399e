"""Study what masks do to backgrounds, and buckets for portraits, on the embedded base.

Photos of a bundled subject are taken apart, since their scenes can be drawn again: what differs is
the subject. All photos of a set then show it in one scene, on the grass. How far that scene leaks
into "a {} dog" is the classifier's share of it among the scenes; and into "a {} dog on the beach",
in the snow, in the forest and in space its log odds, as its share there is always next to none.
Likeness is the mean cosine of those with the bundled photos, whose scenes are others.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.core.files import replace_file, save_png
from dreambooth_lib.core.subject import Subject
from dreambooth_lib.data.images import read_photos
from dreambooth_lib.data.masks import SUFFIX
from dreambooth_lib.families import loading
from dreambooth_lib.families.base import Family
from dreambooth_lib.metrics import clip_scores
from dreambooth_lib.training import runs
from dreambooth_lib.training.runs import Run
from dreambooth_lib.training.trainable import load_at_checkpoint, load_base
from dreambooth_lib.training.validation import (
    ValidationImages,
    ValidationPlan,
    draw_images,
    load_scorers,
)
from dreambooth_lib.training.validation_record import load_images, plan_of
from tools.studies.intervals import interval
from tools.toybox.scenes import draw_scene
from tools.toybox.subjects import SCENES, SIDE, SUBJECTS

MASK_STEPS = (100, 200, 300)
PORTRAIT_STEPS = (200, 300, 400, 500)
SCENE = "grass"  # none of the validation prompts has it
ANYWHERE = 16  # images without a scene in their prompt
_FIRST_SEED = 20_000  # of these
_TALL = SIDE * 3 // 2  # of a portrait
LIKENESS, LEAK = "likeness", "grass where no scene is asked"


def cut_outs(subject: Subject) -> list[tuple[Image.Image, Image.Image]]:
    """Return a bundled subject's photos with the mask of the subject in each."""
    number, pairs = list(SUBJECTS).index(subject.name), []
    for index, (scene, photo) in enumerate(zip(SCENES, read_photos(subject.photos), strict=True)):
        drawn = draw_scene(scene, np.random.default_rng((10, number, index)), SIDE)
        differs = np.abs(np.asarray(drawn, np.int16) - np.asarray(photo.image)).max(-1) > 0
        around = Image.fromarray(differs.astype(np.uint8)).copy()
        ImageDraw.floodfill(around, (0, 0), 2)  # not the holes in the subject
        pairs.append((photo.image, around.point(lambda level: 255 * (level < 2))))
    return pairs


def write_photos(subject: Subject, folder: Path, height: int = SIDE) -> Subject:
    """Write photos of a subject in one scene, with their masks; it stands in the upper part."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, (photo, mask) in enumerate(cut_outs(subject)):
        scene = draw_scene(SCENE, np.random.default_rng((11, index)), height)
        left = (height - SIDE) // 2
        scene = scene.crop((left, 0, left + SIDE, height))
        whole = Image.new("L", scene.size)
        whole.paste(mask)
        scene.paste(photo, (0, 0), mask)
        save_png(scene, folder / f"{index:02d}.png")
        save_png(whole, folder / f"{index:02d}{SUFFIX}")
    return replace(subject, photos=str(folder.resolve()))


def masks(subject: Subject, folder: Path) -> dict[str, TrainConfig]:
    """Return a config for each way to train on photos that show a subject in one scene."""
    square = _config(write_photos(subject, folder / "square"), MASK_STEPS)
    return {
        "whole photos": square,
        "background 0.1": square.replace(background_weight=0.1),
        "subject alone": square.replace(background_weight=0.0),
        "base outside": square.replace(background_weight=1.0, background_prior=True),
    }


def portraits(subject: Subject, folder: Path) -> dict[str, TrainConfig]:
    """Return a config for each way to train on photos of 2:3."""
    tall = _config(write_photos(subject, folder / "portraits", _TALL), PORTRAIT_STEPS)
    return {
        "cropped in the middle": tall,
        "cropped around the subject": tall.replace(crop="subject"),
        "in buckets": tall.replace(crop="buckets"),
    }


def _config(subject: Subject, steps: Sequence[int]) -> TrainConfig:
    # Leaks are drawn at each of the steps.
    return TrainConfig(subject, hold_out=False, steps=max(steps), checkpoints_kept=len(steps))


@cache
def _classifier() -> tuple[Any, dict[str, int]]:
    """Return the embedded base's classifier, and its number of each scene."""
    from transformers import AutoModelForImageClassification

    model = AutoModelForImageClassification.from_pretrained(
        loading.BUNDLED / "toybox" / "classifier", dtype=torch.float32
    )
    labels = {label: number for number, label in model.config.id2label.items()}
    prefix = "scene: "
    return model, {n.removeprefix(prefix): i for n, i in labels.items() if n.startswith(prefix)}


@torch.no_grad()
def shares(images: Sequence[Image.Image], scene: str = SCENE) -> torch.Tensor:
    """Return the share [B] that the classifier gives a scene in each image, of all scenes."""
    model, scenes = _classifier()
    squares = [image.resize((64, 64), Image.Resampling.LANCZOS) for image in images]
    pixels = torch.stack([torch.from_numpy(np.array(image)).float() for image in squares])
    logits = model(pixels.permute(0, 3, 1, 2) / 127.5 - 1).logits[:, [*scenes.values()]]
    return logits.double().softmax(1)[:, [*scenes].index(scene)]


def leaks(family: Family, config: TrainConfig, plan: ValidationPlan) -> float:
    """Return the mean share of the photos' scene in images whose prompt asks for no scene."""
    pairs = [(config.subject.instance_prompt, _FIRST_SEED + number) for number in range(ANYWHERE)]
    steps, scale = plan.inference_steps, plan.guidance_scale
    assert steps is not None and scale is not None
    return shares(family.generate(pairs, steps, scale, fast=plan.fast)).mean().item()


def drawn_by(run: Run, family: Family, step: int) -> dict[str, ValidationImages]:
    """Return a cell's images by how they were drawn; those of a bucket again as squares.

    The base has only ever seen squares, so that only they compare with other cells' images.
    """
    drawn = {"": load_images(run, step)}
    if run.config.crop == "buckets":
        drawn[", drawn as squares"] = draw_images(family, run.config.subject, plan_of(run), 18)
    return drawn


def measure(
    subject: Subject, cells: Mapping[str, Sequence[Path]], steps: Sequence[int], file: Path
) -> list[str]:
    """Return and write a table of each kind's likeness, leaks and adherence, step by step.

    Beside it ``leaks.png`` draws the leaks by likeness.
    """
    encoder = load_scorers(TrainConfig(subject)).images
    photos = encoder.embed_images([photo.image for photo in read_photos(subject.photos)])
    rows: dict[str, dict[int, list[dict[str, float]]]] = {}

    def add(name: str, step: int, drawn: ValidationImages, anywhere: float) -> None:
        embedded, elsewhere = encoder.embed_images(drawn.subject), shares(drawn.subject)
        texts = [clip_scores.strip_identifier(p, subject.identifier) for p in drawn.prompts]
        read = clip_scores.row_cosines(embedded, encoder.embed_texts(texts))
        rows.setdefault(name, {}).setdefault(step, []).append({
            LIKENESS: (embedded @ photos.T).mean().item(),
            LEAK: anywhere,
            "log odds of grass in other scenes": elsewhere.logit().mean().item(),
            "prompt adherence": read.mean().item(),
        })  # fmt: skip

    for name, folders in cells.items():
        for folder in folders:
            run = runs.resume(folder)
            plan, config = plan_of(run), run.config
            if not rows:
                base = load_base(config)
                add("the base", 0, load_images(run, 0), leaks(base, config, plan))
            for step in steps:
                family = load_at_checkpoint(run, step)
                anywhere = leaks(family, config, plan)
                for how, drawn in drawn_by(run, family, step).items():
                    add(name + how, step, drawn, anywhere)
    ((first, *_),) = rows["the base"].values()
    lines = [f"| | step | {' | '.join(first)} |", "|---|---|" + "---|" * len(first)]
    for name, by_step in rows.items():
        for step, own in by_step.items():
            shown = [interval([row[key] for row in own]) for key in first]
            lines.append(f"| {name} ({len(own)}) | {step} | {' | '.join(shown)} |")
    replace_file(file, ("\n".join(lines) + "\n").encode())
    draw_leaks(rows, steps, file.with_suffix(".png"))
    return lines


def draw_leaks(
    rows: Mapping[str, Mapping[int, Sequence[Mapping[str, float]]]], steps: Sequence[int],
    path: Path,
) -> None:  # fmt: skip
    """Draw the means of each kind's leaks by its likeness, a point for each step."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), dpi=110, layout="constrained")
    axes = figure.subplots()
    for name, by_step in rows.items():
        x, y = (
            [fmean(row[key] for row in own) for own in by_step.values()] for key in (LIKENESS, LEAK)
        )
        axes.plot(x, y, "o-", label=name)
    axes.set_xlabel(f"{LIKENESS} →")
    axes.set_ylabel(f"{LEAK} →")
    axes.set_title(f"Steps {', '.join(map(str, steps))} along each line")
    axes.legend(fontsize="small")
    axes.grid(color="#e4e4e4")
    figure.savefig(path)
