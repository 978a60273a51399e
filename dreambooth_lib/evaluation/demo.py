"""The whole job on one subject, measured: class images, training, pictures, figures.

What ``make demo`` and ``make figures`` run.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from dataclasses import replace
from functools import partial
from itertools import pairwise, product
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Any

from dreambooth_lib.core import gpu_memory
from dreambooth_lib.core.config import Subject, TrainConfig
from dreambooth_lib.core.notices import quiet
from dreambooth_lib.core.old_names import locate
from dreambooth_lib.data.images import read_pictures
from dreambooth_lib.data.subjects import load_dataset
from dreambooth_lib.evaluation.sweep import each
from dreambooth_lib.families import loading
from dreambooth_lib.figures import plots
from dreambooth_lib.figures.contact_sheet import contact_sheet
from dreambooth_lib.metrics import clip_scores
from dreambooth_lib.metrics.encoders import Encoder
from dreambooth_lib.training import class_images, memory_level, runs
from dreambooth_lib.training.loop import train
from dreambooth_lib.training.sampling import inference_settings, load_source
from dreambooth_lib.training.validation import (
    TOYBOX_SCORER,
    ValidationPlan,
    draw_images,
    score_images,
)

BUNDLED_SUBJECTS = loading.BUNDLED / "subjects"
#: What is shown and measured: pictures that the training has not seen. Diversity is the noisiest
#: figure: its ratio to the base's, on the same seeds, varies by 5 points at 24 class images.
VIEW = ValidationPlan(seeds=4, class_images=48, unrelated=0)


def bundled_subjects() -> list[Subject]:
    """The subjects in ``data/subjects``, pictures of which the embedded base never saw."""
    return load_dataset(BUNDLED_SUBJECTS)


def personalise(
    config: TrainConfig, folder: Path, out: Path | None = None, view: ValidationPlan = VIEW
) -> dict[str, Any]:
    """Train ``config`` in ``folder`` and return one subject's row of ``metrics.json``.

    With ``out``, ``contact_sheet.png``, ``loss.png`` and ``metrics.json`` are written there.
    """
    from dreambooth_lib.core.files import replace_file

    subject, times = config.subject, [time.perf_counter()]
    if config.draws_class_images:
        made = class_images.draw_class_images(
            config, load_source(config), locate(folder.parent, "class_images")
        )
        for number, _ in enumerate(made, 1):
            _progress("class images", number, config.class_images)
        del made  # training needs the memory
        gpu_memory.free_memory()
    times.append(time.perf_counter())
    run = runs.start(config, folder)
    for step in train(run):
        _progress("training", step.step, config.steps)
    times.append(time.perf_counter())
    gpu_memory.free_memory()
    view = replace(view, guidance_scale=inference_settings(config).guidance_scale)
    looks = {}
    for name, source in (("base", config), ("tuned", run)):
        looks[name] = draw_images(load_source(source), subject, view)
        gpu_memory.free_memory()
    times.append(time.perf_counter())
    reference = [photo.image for photo in read_pictures(subject.pictures)]
    encoder = Encoder(TOYBOX_SCORER)
    row: dict[str, Any] = {
        "name": subject.name,
        "class_noun": subject.class_noun,
        "prior_weight": config.prior_weight,
        "training_seed": config.seed,
        "seeds": list(range(view.seeds)),
        "steps": config.steps,
        "encoder": Path(encoder.model_id).name,
        "reference_fidelity": clip_scores.reference_fidelity(encoder.images(reference)),
    }
    for name, seen in looks.items():
        row[name] = score_images(encoder, reference, subject, seen, looks["base"])
    took = [after - before for before, after in pairwise(times)]
    row["seconds"] = dict(zip(("prior", "train", "sample"), took, strict=True))
    row["seconds"]["total"] = time.perf_counter() - times[0]
    row["peak_memory_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if out is not None:
        of, before, after = view.seeds, looks["base"], looks["tuned"]
        contact_sheet(
            out / "contact_sheet.png",
            title=f'{subject.name}: "{subject.instance_prompt}", {config.steps} steps',
            reference=reference,
            rows=[
                (before.prompts[i], before.subject[i : i + of], after.subject[i : i + of])
                for i in range(0, len(before.prompts), of)
            ],
            class_prompt=subject.class_prompt,
            class_before=before.class_images[:8],
            class_after=after.class_images[:8],
        )
        plots.losses(run.log(), out / "loss.png")
        replace_file(out / "metrics.json", json.dumps({"subjects": [row]}, indent=2).encode())
    return row


def figures(
    out: Path,
    seeds: Sequence[int] = (0,),
    prior_weights: Sequence[float] = (1.0, 0.0),
    *,
    workers: int = 1,
    view: ValidationPlan = VIEW,
    **settings: Any,
) -> list[dict[str, Any]]:
    """Every bundled subject with and without the prior, a run a seed; each row is printed.

    ``workers`` processes share the machine's cores; ``settings`` are ``TrainConfig``'s.
    ``metrics.json`` grows run by run.
    """
    from dreambooth_lib.core.files import replace_file

    cells = {}
    for subject, weight, seed in product(bundled_subjects(), prior_weights, seeds):
        config = TrainConfig(subject=subject, prior_weight=weight, seed=seed, **settings)
        name = f"{subject.name}-lambda{weight:g}-seed{seed}"
        cells[name] = (config, out / "runs" / name, out / name, view)
    memory_level.share_level(out / "runs", [config for config, *_ in cells.values()])
    rows: list[dict[str, Any]] = []
    work: Callable[..., Any] = personalise
    pool: AbstractContextManager[Executor | None] = nullcontext()
    if workers > 1:
        work = partial(_quietly, max(1, (os.cpu_count() or 1) // workers))
        # Started anew, since a fork would take torch's threads with it half alive.
        pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
    with pool as executor:
        for _, row in each(work, cells, executor):
            rows.append(row)
            replace_file(out / "metrics.json", json.dumps({"subjects": rows}, indent=2).encode())
            print(describe(row), flush=True)
    return rows


def _quietly(threads: int, *given: Any) -> dict[str, Any]:
    """Personalise in a worker, without its progress: that of several is one heap of lines."""
    import torch

    torch.set_num_threads(threads)
    quiet()
    with open(os.devnull, "w") as nothing, redirect_stdout(nothing):
        return personalise(*given)


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table, a line a subject and λ: means over the seeds, and the least and most."""
    lines = [
        "| subject | λ | seeds | fidelity, of the photos' own | adherence, of the base's "
        "| class diversity, of the base's | prior drift |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind in dict.fromkeys((row["name"], row["prior_weight"]) for row in rows):
        own = [row for row in rows if (row["name"], row["prior_weight"]) == kind]
        found = zip(*(kept(row) for row in own), strict=True)
        cells = [f"{fmean(v):.0%} ({min(v):.0%} to {max(v):.0%})" for v in found]
        drift = [row["tuned"]["prior_drift"] for row in own]
        cells.append(f"{fmean(drift):.3f} ({min(drift):.3f} to {max(drift):.3f})")
        lines.append(f"| {kind[0]} | {kind[1]:g} | {len(own)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def kept(row: dict[str, Any]) -> tuple[float, float, float]:
    """Tuned fidelity of the photos' own; adherence and class diversity of the base's."""
    base, tuned = row["base"], row["tuned"]
    return (
        tuned["subject_fidelity"] / row["reference_fidelity"],
        tuned["prompt_adherence"] / base["prompt_adherence"],
        tuned["class_diversity"] / base["class_diversity"],
    )


def describe(row: dict[str, Any]) -> str:
    """One line of figures: how far the subject was learnt, and what of the class was kept."""
    base, tuned = row["base"], row["tuned"]
    fidelity, adherence, diversity = kept(row)
    gap = row["reference_fidelity"] - base["subject_fidelity"]
    closed = (tuned["subject_fidelity"] - base["subject_fidelity"]) / gap
    return (
        f"{row['name']} lambda {row['prior_weight']:g} seed {row['training_seed']}: "
        f"fidelity {base['subject_fidelity']:.3f} -> {tuned['subject_fidelity']:.3f} of the "
        f"photos' own {row['reference_fidelity']:.3f} ({fidelity:.0%}; {closed:.0%} of the "
        f"distance), adherence {adherence:.0%} and class diversity {diversity:.0%} of the base's, "
        f"prior drift {tuned['prior_drift']:.3f}; {row['seconds']['total']:.0f} s"
    )


def _progress(what: str, done: int, total: int | None) -> None:
    end = "\n" if done == total else "\r"
    if sys.stdout.isatty() or done == total or done % 50 == 0:
        print(f"{what}: {done} of {total}", end=end if sys.stdout.isatty() else "\n", flush=True)
