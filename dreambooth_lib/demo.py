"""The whole job on one subject, measured: class pictures, training, pictures, figures.

What ``make demo`` and ``make figures`` run.
"""

import json
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dreambooth_lib import families, metrics, pages, plots, prior, runs
from dreambooth_lib.config import Subject, TrainConfig
from dreambooth_lib.data import load_dataset
from dreambooth_lib.encoders import Encoder
from dreambooth_lib.pictures import read_pictures
from dreambooth_lib.training import train
from dreambooth_lib.watch import JUDGE, View, look, score

BUNDLED_SUBJECTS = families.BUNDLED / "subjects"
#: What is shown and measured: pictures that the training has not seen.
VIEW = View(seeds=4, class_pictures=24, unrelated=0, inference_steps=25)


def bundled_subjects() -> list[Subject]:
    """The subjects in ``data/subjects``, pictures of which the embedded base never saw."""
    return load_dataset(BUNDLED_SUBJECTS)


def personalise(config: TrainConfig, folder: Path, out: Path | None = None) -> dict[str, Any]:
    """Train ``config`` in ``folder`` and return one subject's row of ``metrics.json``.

    With ``out``, ``contact_sheet.png`` and ``loss.png`` are written there. Seeds are the same for
    the base and the tuned model, picture by picture.
    """
    from dreambooth_lib.state import replace_file

    subject, began = config.subject, time.perf_counter()
    base = families.load(config.base, config.revision, config.variant)
    if config.prior_weight > 0 and config.class_folder is None:
        for made, _ in enumerate(
            prior.class_pictures(config, base, folder.parent / "class_pictures")
        ):
            _progress("class pictures", made + 1, config.class_pictures)
    prior_done = time.perf_counter()
    run = runs.start(config, folder)
    for step in train(run):
        _progress("training", step.step, config.steps)
    train_done = time.perf_counter()
    tuned = families.load(str(run.pipeline))
    view = replace(VIEW, guidance_scale=config.guidance_scale)
    looks = {name: look(family, subject, view) for name, family in
             (("base", base), ("tuned", tuned))}  # fmt: skip
    sample_done = time.perf_counter()
    reference = [photo.image for photo in read_pictures(subject.pictures)]
    encoder = Encoder(JUDGE)
    row: dict[str, Any] = {
        "name": subject.name,
        "class_noun": subject.class_noun,
        "prior_weight": config.prior_weight,
        "training_seed": config.seed,
        "seeds": list(range(view.seeds)),
        "steps": config.steps,
        "encoder": Path(encoder.model_id).name,
        "reference_fidelity": metrics.reference_fidelity(encoder.images(reference)),
    }
    for name, seen in looks.items():
        row[name] = score(encoder, reference, subject, seen, looks["base"])
    row["seconds"] = {
        "prior": prior_done - began,
        "train": train_done - prior_done,
        "sample": sample_done - train_done,
        "total": time.perf_counter() - began,
    }
    row["peak_memory_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if out is not None:
        of, before, after = view.seeds, looks["base"], looks["tuned"]
        pages.contact_sheet(
            out / "contact_sheet.png",
            title=f'{subject.name}: "{subject.instance_prompt}", {config.steps} steps',
            reference=reference,
            rows=[
                (before.prompts[i], before.subject[i : i + of], after.subject[i : i + of])
                for i in range(0, len(before.prompts), of)
            ],
            class_prompt=subject.class_prompt,
            class_before=before.of_class[:8],
            class_after=after.of_class[:8],
        )
        plots.losses(run.log(), out / "loss.png")
        replace_file(out / "metrics.json", json.dumps({"subjects": [row]}, indent=2).encode())
    return row


def figures(out: Path, seeds: Sequence[int] = (0,), base: str = "toybox") -> list[dict[str, Any]]:
    """Every bundled subject with and without the prior; a table of what must hold is printed."""
    from dreambooth_lib.state import replace_file

    rows = []
    for subject in bundled_subjects():
        for prior_weight in (1.0, 0.0):
            for seed in seeds:
                config = TrainConfig(
                    subject=subject, base=base, prior_weight=prior_weight, seed=seed
                )
                name = f"{subject.name}-lambda{prior_weight:g}-seed{seed}"
                rows.append(personalise(config, out / "runs" / name, out / name))
                replace_file(
                    out / "metrics.json", json.dumps({"subjects": rows}, indent=2).encode()
                )
                print(describe(rows[-1]), flush=True)
    return rows


def describe(row: dict[str, Any]) -> str:
    """One line of figures: how far the subject was learnt, and what of the class was kept."""
    base, tuned = row["base"], row["tuned"]
    gap = row["reference_fidelity"] - base["subject_fidelity"]
    closed = (tuned["subject_fidelity"] - base["subject_fidelity"]) / gap
    return (
        f"{row['name']} lambda {row['prior_weight']:g} seed {row['training_seed']}: "
        f"fidelity {base['subject_fidelity']:.3f} -> {tuned['subject_fidelity']:.3f} of "
        f"{row['reference_fidelity']:.3f} ({closed:.0%} of the distance), "
        f"adherence {tuned['prompt_adherence'] / base['prompt_adherence']:.0%} and "
        f"class diversity {tuned['class_diversity'] / base['class_diversity']:.0%} of the base's, "
        f"prior drift {tuned['prior_drift']:.3f}; {row['seconds']['total']:.0f} s"
    )


def _progress(what: str, done: int, total: int | None) -> None:
    end = "\n" if done == total else "\r"
    if sys.stdout.isatty() or done == total or done % 50 == 0:
        print(f"{what}: {done} of {total}", end=end if sys.stdout.isatty() else "\n", flush=True)
