"""The figures of the shipped weights, on composites and seeds that no training drew."""

import re
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
from tools.toybox.recipes import BUNDLED, Recipe
from tools.toybox.tokenizer import IDENTIFIERS
from tools.toybox.world import CLASSES, COLOURS, RELATIONS, SCENES, VAGUE, Picture, World, caption

BATCH = {True: 32, False: 256}  # pictures drawn at once, on a CPU or not
MOST_MEGABYTES = 48.0
ROUNDS, DRAWN_SEED = 15, 2_000_000  # of every class, pictures that the judge learns from
STEPS, GUIDANCE_SCALE = 25, 3.25  # as dreambooth_lib.sample draws by default


def report(
    world: World, target: Path, seed: int, rounds: int = 5, device: str = "cpu"
) -> dict[str, float]:
    """Measure every figure of the base in ``target``; grids of 64 pictures go to ``outputs/``.

    The base draws every class ``rounds`` times on the scenes in turn, and as often recoloured; one
    that was trained on two things, as often beside another class. The rate is always that of the
    CPU.
    """
    began = time.perf_counter()
    family = loading.load_model(str(target))
    loaded = time.perf_counter() - began
    encoder = CLIPModel.from_pretrained(target / "judge", torch_dtype=torch.float32)
    encoder = encoder.eval().to(device)
    tokenizer = CLIPTokenizer.from_pretrained(target / "judge")
    examiner = ResNetForImageClassification.from_pretrained(
        target / "classifier", torch_dtype=torch.float32
    ).eval()
    real, shown = world.batch(1024, np.random.default_rng((13, seed)))
    batch = BATCH[device == "cpu"]
    on_real = classifier.shares(examiner, real, shown)

    plain = wanted(rounds)
    timed = plain if device == "cpu" else plain[:32]
    began = time.perf_counter()
    drawn = pictures_of(family, timed, seed)
    rate = len(timed) / (time.perf_counter() - began)
    family.pipeline.to(device)
    if timed is not plain:
        drawn = pictures_of(family, plain, seed, batch)
    on_plain = classifier.shares(examiner, as_array(drawn), plain)
    recoloured = wanted(rounds, list(COLOURS))
    tinted = pictures_of(family, recoloured, seed + len(plain), batch)
    on_recoloured = classifier.shares(examiner, as_array(tinted), recoloured)
    write_grid(drawn[:64], plain[:64], Path("outputs/toybox_grid.png"))
    write_grid(tinted[:64], recoloured[:64], Path("outputs/toybox_colours.png"))
    of_two: dict[str, float] = {}
    if world.pairs:
        two = wanted(rounds, pairs=True)
        together = pictures_of(family, two, seed + 2 * len(plain), batch)
        on_two = classifier.shares(examiner, as_array(together), two)
        write_grid(together[:64], two[:64], Path("outputs/toybox_pairs.png"))
        asked = {"first": "class", "second": "second", "relation": "relation"}
        of_two = {f"generated_{name}_of_two": on_two[key] for name, key in asked.items()}
    of = min(16, 4 * rounds)
    return {
        "autoencoder_psnr_db": autoencoder.psnr(family.pipeline.vae, world, seed=seed),
        **{f"classifier_{asked}_on_composites": share for asked, share in on_real.items()},
        "generated_class": on_plain["class"],
        "generated_scene": on_plain["scene"],
        "generated_colour": on_recoloured["colour"],
        **of_two,
        "judge_retrieval_of_64": judge.retrieval(encoder, tokenizer, world, of, seed),
        "judge_triplets": judge.triplets(encoder, world, of, seed),
        "images_per_second": rate,
        "seconds_to_load": loaded,
        "megabytes": sum(f.stat().st_size for f in target.rglob("*") if f.is_file()) / 1e6,
    }


def wanted(
    rounds: int, colours: Sequence[str | None] = (None,), pairs: bool = False
) -> list[Picture]:
    """Return every class once a round, with another scene and another colour in each round.

    With ``pairs``, each has a second thing, of another class and relation in each round.
    """
    scenes, nouns, relations = list(SCENES), list(CLASSES), list(RELATIONS)
    return [
        Picture(
            noun,
            0,
            colours[(i + 3 * turn) % len(colours)],
            scenes[(7 * i + 3 * turn) % len(scenes)],
            relation=relations[(i + turn) % len(relations)] if pairs else None,
            second_noun=nouns[(i + 7 + 11 * (turn % 4)) % len(nouns)] if pairs else None,
        )
        for turn in range(rounds)
        for i, noun in enumerate(CLASSES)
    ]


def pictures_of(
    family: Family, wanted: list[Picture], seed: int, batch: int = 32
) -> list[Image.Image]:
    asked = [(prompt, seed + i) for i, prompt in enumerate(map(caption_of, wanted))]
    pictures: list[Image.Image] = []
    for start in range(0, len(asked), batch):
        pictures += family.generate(asked[start : start + batch], STEPS, GUIDANCE_SCALE)
    return pictures


def drawn_by(
    target: Path, file: Path, rounds: int = ROUNDS, device: str = "cpu"
) -> tuple[np.ndarray, list[Picture]]:
    """Pictures by the diffusion model of every class, and what they were to show; drawn once."""
    shown = wanted(rounds)
    if not file.exists():
        family = loading.load_model(str(target))
        family.pipeline.to(device)
        pictures = pictures_of(family, shown, DRAWN_SEED, BATCH[device == "cpu"])
        partial = file.with_suffix(".partial.npy")
        np.save(partial, as_array(pictures))
        partial.rename(file)
    return np.load(file), shown


def caption_of(picture: Picture) -> str:
    return caption(picture.class_noun, picture.colour, picture.scene, second=picture.second)


def as_array(pictures: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(picture) for picture in pictures])


def write_grid(pictures: list[Image.Image], shown: list[Picture], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    grid(pictures, 8, [caption_of(p) for p in shown]).save(path)


def write_readme(
    target: Path,
    figures: dict[str, float] | None = None,
    seed: int | None = None,
    recipe: Recipe = BUNDLED,
    machine: str = "two CPU cores",
) -> None:
    """Describe what the weights are, what was measured, and whose drawings they were trained on."""
    command, of_two = "build", ""
    if recipe.pairs:
        command = "gpu"
        relations = ", ".join(RELATIONS)
        of_two = (
            f"\n- Two things: `a dog beside a teapot on the beach`; {relations}, or {VAGUE}; the"
            "\n  first beside the second is on its left"
        )
    text = f"""# The bundled base

A small Stable Diffusion pipeline; its judge, the CLIP model (a CLIPModel) that scores its images; and a
classifier (a ResNet) that checks what it draws. `tools/toybox` trained all three on emoji drawings placed
on drawn scenes, at {recipe.size} × {recipe.size} pixels: {len(CLASSES)} classes, {len(SCENES)} scenes and {len(COLOURS)} colours. The weights are
float16 safetensors. Plain diffusers loads them in float32, its default, or in float16.

- Captions: `a dog on the beach`, `a purple teapot in space`, `a photo of a fox at sunset`{of_two}
- Classes: {", ".join(CLASSES)}
- Scenes: {", ".join(SCENES.values())}
- Colours: {", ".join(COLOURS)}
- Identifiers (single tokens that occur in no caption): {", ".join(IDENTIFIERS)}

`python -m tools.toybox report` measures the base; `python -m tools.toybox {command}` trains it again.
{table(figures, seed, machine) if figures else ""}
## Drawings, their authors and licences

{drawings.credits()}

The bundled subjects come from {", ".join(drawings.HELD_OUT_SETS)}; of these models, only the judge has seen that set.
The drawings were recoloured, scaled and placed on scenes. The weights are offered under Apache-2.0;
the drawings keep their licences (CC BY 4.0: https://creativecommons.org/licenses/by/4.0/).
"""  # noqa: E501
    (target / "README.md").write_text(text)


def table(figures: dict[str, float], seed: int | None, machine: str = "two CPU cores") -> str:
    """Return the figures as Markdown, shares as percentages."""
    rows = [f"| {name.replace('_', ' ')} | {_shown(name, v)} |" for name, v in figures.items()]
    lines = ["", "## Figures", "", f"Seed {seed}, {machine}.", "", "| | |", "|---|---|", *rows]
    return "\n".join([*lines, ""])


def _shown(name: str, value: float) -> str:
    if name.startswith(("classifier", "generated", "judge")):
        return f"{value:.1%}"
    return f"{value:.2f}"


def read_table(readme: str) -> dict[str, float]:
    """Return the figures of a README that :func:`write_readme` wrote, to what it shows of them."""
    rows = re.findall(r"^\| ([a-z][a-z 0-9]*) \| ([0-9.]+)(%?) \|$", readme, re.MULTILINE)
    return {
        name.replace(" ", "_"): float(value) / (100 if percent else 1)
        for name, value, percent in rows
    }


def compared(figures: dict[str, float], old: dict[str, float]) -> str:
    """Return lines of the figures beside those of an older base, and which are better or equal.

    Both are compared to the digits shown. For seconds and megabytes less is better, and up to
    :data:`MOST_MEGABYTES` is as good.
    """
    lines = [f"{'':32} {'new':>8} {'old':>8}"]
    for name, value in figures.items():
        was, mark = old.get(name), "new"
        if was is not None:
            new = read_table(f"| {name.replace('_', ' ')} | {_shown(name, value)} |")[name]
            good = new <= was if name.startswith("seconds") else new >= was
            if name == "megabytes":
                good = new <= MOST_MEGABYTES
            mark = "better or equal" if good else "WORSE"
        before = "" if was is None else _shown(name, was)
        lines.append(f"{name.replace('_', ' '):32} {_shown(name, value):>8} {before:>8}  {mark}")
    return "\n".join(lines)
