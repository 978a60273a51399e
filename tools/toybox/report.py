"""The figures of the shipped weights, on composites and seeds that no training drew."""

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import CLIPModel, CLIPTokenizer, ResNetForImageClassification

from dreambooth_lib.families import loading
from dreambooth_lib.families.base import Family
from dreambooth_lib.figures.image_grids import grid
from tools.toybox import autoencoder, classifier, drawings, judge
from tools.toybox.tokenizer import IDENTIFIERS
from tools.toybox.world import CLASSES, COLOURS, SCENES, Picture, World, caption

STEPS, GUIDANCE_SCALE = 25, 3.25  # as dreambooth_lib.sample draws by default


def report(work: Path, target: Path, seed: int, rounds: int = 5) -> dict[str, float]:
    """Measure every figure of the base in ``target``; grids of 64 pictures go to ``outputs/``.

    The base draws every class ``rounds`` times on the scenes in turn, and as often recoloured.
    """
    world = World(work / "drawings", seed=1000 + seed)
    began = time.perf_counter()
    family = loading.load_model(str(target))
    loaded = time.perf_counter() - began
    encoder = CLIPModel.from_pretrained(target / "judge", torch_dtype=torch.float32).eval()
    tokenizer = CLIPTokenizer.from_pretrained(target / "judge")
    examiner = ResNetForImageClassification.from_pretrained(
        target / "classifier", torch_dtype=torch.float32
    ).eval()
    real, shown = world.batch(1024, np.random.default_rng((13, seed)))
    on_real = classifier.shares(examiner, real, shown)

    plain = wanted(rounds)
    began = time.perf_counter()
    drawn = pictures_of(family, plain, seed)
    rate = len(plain) / (time.perf_counter() - began)
    on_plain = classifier.shares(examiner, as_array(drawn), plain)
    recoloured = wanted(rounds, list(COLOURS))
    tinted = pictures_of(family, recoloured, seed + len(plain))
    on_recoloured = classifier.shares(examiner, as_array(tinted), recoloured)
    write_grid(drawn[:64], plain[:64], Path("outputs/toybox_grid.png"))
    write_grid(tinted[:64], recoloured[:64], Path("outputs/toybox_colours.png"))
    return {
        "autoencoder_psnr_db": autoencoder.psnr(family.pipeline.vae, world, seed=seed),
        **{f"classifier_{asked}_on_composites": share for asked, share in on_real.items()},
        "generated_class": on_plain["class"],
        "generated_scene": on_plain["scene"],
        "generated_colour": on_recoloured["colour"],
        "judge_retrieval_of_64": judge.retrieval(encoder, tokenizer, world, seed=seed),
        "judge_triplets": judge.triplets(encoder, world, seed=seed),
        "pictures_per_second": rate,
        "seconds_to_load": loaded,
        "megabytes": sum(f.stat().st_size for f in target.rglob("*") if f.is_file()) / 1e6,
    }


def wanted(rounds: int, colours: Sequence[str | None] = (None,)) -> list[Picture]:
    """Return every class once a round, with another scene and another colour in each round."""
    scenes = list(SCENES)
    return [
        Picture(
            noun,
            0,
            colours[(i + 3 * turn) % len(colours)],
            scenes[(7 * i + 3 * turn) % len(scenes)],
        )
        for turn in range(rounds)
        for i, noun in enumerate(CLASSES)
    ]


def pictures_of(
    family: Family, wanted: list[Picture], seed: int, batch: int = 32
) -> list[Image.Image]:
    prompts = [caption(p.class_noun, p.colour, p.scene) for p in wanted]
    asked = [(prompt, seed + i) for i, prompt in enumerate(prompts)]
    pictures: list[Image.Image] = []
    for start in range(0, len(asked), batch):
        pictures += family.generate(asked[start : start + batch], STEPS, GUIDANCE_SCALE)
    return pictures


def as_array(pictures: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(picture) for picture in pictures])


def write_grid(pictures: list[Image.Image], shown: list[Picture], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    labels = [caption(p.class_noun, p.colour, p.scene) for p in shown]
    grid(pictures, 8, labels).save(path)


def write_readme(
    target: Path, figures: dict[str, float] | None = None, seed: int | None = None
) -> None:
    """Describe what the weights are, what was measured, and whose drawings they were trained on."""
    every = drawings.TRAINING_SETS | drawings.HELD_OUT_SETS
    credits = "\n".join(
        f"- {name} {version}: {credit}, {licence}"
        for name, (version, credit, licence) in every.items()
    )
    text = f"""# The bundled base

A small Stable Diffusion pipeline, its judge (a CLIPModel) and the classifier that examines it (a
ResNet), trained by `tools/toybox` on emoji drawings set on drawn scenes at 64x64 pixels:
{len(CLASSES)} classes, {len(SCENES)} scenes, {len(COLOURS)} colours. float16 safetensors, which
plain diffusers takes in float32, the default, or float16 alike.

- Captions: `a dog on the beach`, `a purple teapot in space`, `a photo of a fox at sunset`
- Classes: {", ".join(CLASSES)}
- Scenes: {", ".join(SCENES.values())}
- Colours: {", ".join(COLOURS)}
- Identifiers, single tokens that no caption had: {", ".join(IDENTIFIERS)}

`python -m tools.toybox report` measures it, `python -m tools.toybox build` makes it anew.
{table(figures, seed) if figures else ""}
## Drawings, their authors and licences

{credits}

The bundled subjects come from {", ".join(drawings.HELD_OUT_SETS)}; of the models here only the
judge has seen it. The drawings were recoloured, scaled and set on scenes. The weights are offered
under Apache-2.0; the drawings keep their licences (CC BY 4.0:
https://creativecommons.org/licenses/by/4.0/).
"""
    (target / "README.md").write_text(text)


def table(figures: dict[str, float], seed: int | None) -> str:
    """Return the figures as Markdown, shares as percentages."""
    rows = (
        f"| {name.replace('_', ' ')} | {value:.1%} |"
        if name.startswith(("classifier", "generated", "judge"))
        else f"| {name.replace('_', ' ')} | {value:.2f} |"
        for name, value in figures.items()
    )
    lines = ["", "## Figures", "", f"Seed {seed}, two CPU cores.", "", "| | |", "|---|---|", *rows]
    return "\n".join([*lines, ""])
