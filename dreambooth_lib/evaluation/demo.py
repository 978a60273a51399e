"""Train a bundled subject and measure the result: ``make demo`` and ``make figures``."""

import json
import os
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import pairwise, product
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from dreambooth_lib.core import gpu_memory
from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.core.files import replace_file
from dreambooth_lib.core.made_with import peak_memory_mb
from dreambooth_lib.core.notices import quiet
from dreambooth_lib.core.subject import Subject
from dreambooth_lib.core.user_text import markdown
from dreambooth_lib.data.images import read_photos
from dreambooth_lib.data.subjects import load_dataset
from dreambooth_lib.evaluation.sweep import run_all
from dreambooth_lib.families import loading
from dreambooth_lib.figures import plots
from dreambooth_lib.figures.contact_sheet import contact_sheet
from dreambooth_lib.figures.labels import NAMES
from dreambooth_lib.metrics import clip_scores
from dreambooth_lib.metrics.encoders import Encoder
from dreambooth_lib.training import best_checkpoint, class_images, memory_level, runs
from dreambooth_lib.training.loop import train
from dreambooth_lib.training.sampling import inference_settings, load_source
from dreambooth_lib.training.validation import (
    TOYBOX_SCORER,
    Scorers,
    ValidationImages,
    ValidationPlan,
    draw_images,
    score_images,
)

if TYPE_CHECKING:
    from dreambooth_lib.families.base import Family

BUNDLED_SUBJECTS = loading.BUNDLED / "subjects"
#: What is drawn and scored. Class diversity is the noisiest score: its ratio to the base's, on the
#: same seeds, varies by 5 points at 24 class images.
PLAN = ValidationPlan(seeds=4, class_images=48, unrelated=0)
SHOWN = 8  #: class images on the contact sheet


def bundled_subjects() -> list[Subject]:
    """Load the subjects in ``data/subjects``, which the bundled base never saw."""
    return load_dataset(BUNDLED_SUBJECTS)


def personalise(
    config: TrainConfig,
    folder: Path,
    out: Path | None = None,
    plan: ValidationPlan = PLAN,
    threads: int | None = None,
    scored_steps: int | None = None,
) -> dict[str, Any]:
    """Train ``config`` in ``folder`` and return one subject's row of ``metrics.json``.

    With ``out``, write ``contact_sheet.png``, ``loss.png`` and ``metrics.json`` there. ``threads``
    are given in a worker process: torch uses that many, and no progress is shown. With
    ``scored_steps``, class images that are scored take so many inference steps, and those that are
    shown are drawn besides.
    """
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
        quiet()
    bar = partial(tqdm, disable=threads is not None)
    subject, times = config.subject, [time.perf_counter()]
    if config.draws_class_images:
        drawing = class_images.draw_class_images(
            config,
            load_source(config, prompts=class_images.prior_prompts(config)),
            folder.parent / "class_images",
        )
        for _ in bar(drawing, "class images", config.class_images, unit="image"):
            pass
        del drawing  # training needs the memory
        gpu_memory.free_memory()
    times.append(time.perf_counter())
    run = runs.start(config, folder)
    for _ in bar(train(run), "training", config.steps, unit="step"):
        pass
    times.append(time.perf_counter())
    gpu_memory.free_memory()
    plan = replace(plan, guidance_scale=inference_settings(config).guidance_scale)
    images, scored = {}, {}
    for name, source in (("base", config), ("tuned", run)):
        images[name], scored[name] = _draw(load_source(source), subject, plan, scored_steps)
        gpu_memory.free_memory()
    times.append(time.perf_counter())
    photos = [photo.image for photo in read_photos(subject)]
    encoder = Encoder(TOYBOX_SCORER)
    scorers, reference = Scorers(encoder, encoder), encoder.embed_images(photos)
    row: dict[str, Any] = {
        "name": subject.name,
        "class_noun": subject.class_noun,
        "prior_weight": config.prior_weight,
        "training_seed": config.seed,
        "seeds": list(range(plan.seeds)),
        "steps": config.steps,
        "encoder": Path(encoder.model_id).name,
        "reference_fidelity": clip_scores.reference_fidelity(reference),
    }
    for name, drawn in scored.items():
        row[name] = score_images(scorers, reference, subject, drawn, scored["base"])
        del row[name]["by_image"]
    seconds = [after - before for before, after in pairwise(times)]
    row["seconds"] = dict(zip(("prior", "train", "sample"), seconds, strict=True))
    row["seconds"]["total"] = time.perf_counter() - times[0]
    row["peak_memory_mb"] = peak_memory_mb()
    if out is not None:
        seeds, base, tuned = plan.seeds, images["base"], images["tuned"]
        contact_sheet(
            out / "contact_sheet.png",
            title=f'{subject.name}: "{subject.instance_prompt}", {config.steps} steps',
            photos=photos,
            rows=[
                (base.prompts[i], base.subject[i : i + seeds], tuned.subject[i : i + seeds])
                for i in range(0, len(base.prompts), seeds)
            ],
            class_prompt=subject.class_prompt,
            class_before=base.class_images[:SHOWN],
            class_after=tuned.class_images[:SHOWN],
        )
        plots.losses(run.log(), out / "loss.png")
        replace_file(out / "metrics.json", json.dumps({"subjects": [row]}, indent=2).encode())
    return row


def _draw(
    family: "Family", subject: Subject, plan: ValidationPlan, scored_steps: int | None
) -> tuple[ValidationImages, ValidationImages]:
    """Draw what is shown of a model and what is scored; they differ in the class images alone."""

    def draw(**changes: Any) -> ValidationImages:
        return draw_images(family, subject, replace(plan, **changes), family.default_batch_size)

    if scored_steps is None:
        images = draw()
        return images, images
    shown = draw(class_images=min(SHOWN, plan.class_images))
    class_images = draw(seeds=0, inference_steps=scored_steps).class_images
    return shown, replace(shown, class_images=class_images)


def delete_earlier(folder: Path) -> None:
    """Delete a run that an earlier demo left in a folder.

    Raises :class:`RunError` for a run of other photos.
    """
    if not (folder / "config.toml").exists():
        return
    subject = runs.resume(folder).config.subject
    if subject.name not in {own.name for own in bundled_subjects()}:
        raise runs.RunError(
            f"{folder} holds a run of {subject.name}, which is not a bundled subject, and the demo "
            "would replace that run; choose another folder."
        )
    gone = folder.with_name(f".{folder.name}.gone")  # if this is killed, the folder is free
    shutil.rmtree(gone, ignore_errors=True)
    shutil.rmtree(folder.rename(gone))


def figures(
    out: Path,
    seeds: Sequence[int] = (0,),
    prior_weights: Sequence[float] = (1.0, 0.0),
    *,
    workers: int = 1,
    plan: ValidationPlan = PLAN,
    **settings: Any,
) -> list[dict[str, Any]]:
    """Train every bundled subject with every λ and seed, print each row and return all of them.

    ``workers`` processes share the machine's cores; ``settings`` are ``TrainConfig``'s.
    ``metrics.json`` grows run by run.
    """
    cells: dict[str, tuple[Any, ...]] = {}
    # Each worker gets its share of the cores; without workers torch's own number of threads stays.
    threads = max(1, (os.cpu_count() or 1) // workers) if workers > 1 else None
    for subject, weight, seed in product(bundled_subjects(), prior_weights, seeds):
        config = TrainConfig(subject=subject, prior_weight=weight, seed=seed, **settings)
        name = f"{subject.name}-lambda{weight:g}-seed{seed}"
        cells[name] = (config, out / "runs" / name, out / name, plan, threads)
    for _, folder, *_ in cells.values():
        delete_earlier(folder)
    memory_level.share_level(out / "runs", [config for config, *_ in cells.values()])
    rows: list[dict[str, Any]] = []
    pool: AbstractContextManager[Executor | None] = nullcontext()
    if workers > 1:
        # Spawned, since a forked process would inherit torch's threads half alive.
        pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
    with pool as executor:
        for _, row in run_all(personalise, cells, executor):
            rows.append(row)
            replace_file(out / "metrics.json", json.dumps({"subjects": rows}, indent=2).encode())
            print(describe(row), flush=True)
    return rows


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """Return a Markdown table, a line per subject and λ: mean over the seeds (least to most)."""
    heads = [
        "subject", "λ", "seeds",
        f"{NAMES['subject_fidelity']} (0% = the base, 100% = as alike as the photos are)",
        f"{NAMES['prompt_adherence']} (100% = the base)",
        f"{NAMES['class_diversity']} (100% = the base)",
        f"{NAMES['prior_drift']} (0 = none)",
    ]  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, weight in dict.fromkeys((row["name"], row["prior_weight"]) for row in rows):
        own = [row for row in rows if (row["name"], row["prior_weight"]) == (name, weight)]
        cells = [
            f"{fmean(values):.0%} ({min(values):.0%} to {max(values):.0%})"
            for values in zip(*(ratios(row) for row in own), strict=True)
        ]
        drift = [row["tuned"]["prior_drift"] for row in own]
        cells.append(f"{fmean(drift):.3f} ({min(drift):.3f} to {max(drift):.3f})")
        lines.append(f"| {markdown(name)} | {weight:g} | {len(own)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def ratios(row: dict[str, Any]) -> tuple[float, float, float]:
    """Return :class:`Ratios`' likeness and adherence, and diversity over the base's."""
    base, tuned = row["base"], row["tuned"]
    own = best_checkpoint.ratios(
        tuned["subject_fidelity"], base["subject_fidelity"], row["reference_fidelity"],
        tuned["prompt_adherence"], base["prompt_adherence"], tuned["prior_drift"], 0.0,
    )  # fmt: skip
    return own.likeness, own.adherence, tuned["class_diversity"] / base["class_diversity"]


def describe(row: dict[str, Any]) -> str:
    """Describe one row in a line: how well the subject was learnt and the class preserved."""
    base, tuned = row["base"], row["tuned"]
    likeness, adherence, diversity = ratios(row)
    return (
        f"{row['name']}, λ {row['prior_weight']:g}, seed {row['training_seed']}: likeness to the "
        f"photos {base['subject_fidelity']:.3f} -> {tuned['subject_fidelity']:.3f} ({likeness:.0%} "
        f"of the way to {row['reference_fidelity']:.3f}, that of the photos to one another), "
        f"prompt adherence {adherence:.0%} of the base's, class diversity {diversity:.0%} "
        f"of the base's, class drift "
        f"{tuned['prior_drift']:.3f}; {row['seconds']['total']:.0f} s"
    )
