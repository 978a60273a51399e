"""Run the studies of ``docs/studies``: ``python -m tools.studies NAME --out outputs/studies``.

    grid       λ x steps on each bundled subject: table, heat map, front, contact sheet
    choice     training far past the best step: does the rule select the best checkpoint?
    auto       ``TrainConfig.auto`` beside the best of the grid
    ablations  the paper's ablations in miniature, and this kit's methods, five seeds
    memory     what a memory level costs in quality, five seeds

An interrupted study resumes. Cells run on ``--workers`` processes of one thread each, or with
``--dask`` on a local dask cluster; the tables are the same.
"""

import argparse
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, stdev
from textwrap import fill

import torch

from dreambooth_lib.core.config import Subject, TrainConfig
from dreambooth_lib.core.files import replace_file, save_png
from dreambooth_lib.data.images import read_photos
from dreambooth_lib.evaluation.demo import bundled_subjects
from dreambooth_lib.evaluation.sweep import PLAN, grid, sweep
from dreambooth_lib.evaluation.sweep_table import recommend, table
from dreambooth_lib.evaluation.tables import to_csv
from dreambooth_lib.families import loading
from dreambooth_lib.figures import image_grids, plots
from dreambooth_lib.figures.labels import heading
from dreambooth_lib.training import best_checkpoint, runs, trainable, validation
from dreambooth_lib.training.loop import train
from dreambooth_lib.training.validation_record import history, load_images

LAMBDAS = (0.0, 0.25, 0.5, 1.0, 2.0)
STEPS = (100, 200, 300, 400, 500)
OTHER_SEEDS = 1000  # the first seed of images that no selection has seen
#: The plan that scores every checkpoint; drift is noisy and needs many class images.
SCORED = replace(PLAN, class_images=48, unrelated=4, inference_steps=12, first_seed=OTHER_SEEDS)
SEEDS = 5  # trainings of each kind
ABLATION_STEPS = 300  # enough for the prior's full effect, in three fifths of the default's time
MEMORY_STEPS = 100  # this is about rounding to bf16, which is slow on a CPU
#: The measures that over_seeds averages, and the base's column in a sweep's table.
MEASURES = {"subject_fidelity": "", "prompt_adherence": "base_adherence",
            "class_diversity": "base_diversity", "pres": "base_pres",
            "prior_drift": "", "unrelated_drift": ""}  # fmt: skip
STUDENT_T = (12.706, 4.303, 3.182, 2.776)  # the 97.5% quantile of 1 to 4 degrees of freedom


def plain(subject: Subject) -> TrainConfig:
    """Return the config that every study varies."""
    return TrainConfig(subject=subject)


def auto(subject: Subject) -> TrainConfig:
    return TrainConfig.auto(subject)


@contextmanager
def workers(count: int, dask: bool) -> Iterator[Executor]:
    if dask:
        from distributed import Client, LocalCluster

        with (
            LocalCluster(n_workers=count, threads_per_worker=1, dashboard_address=None) as cluster,
            Client(cluster) as client,
        ):
            yield client.get_executor()
    else:
        # Spawned, since a forked process would inherit torch's threads half alive.
        with ProcessPoolExecutor(count, mp_context=get_context("spawn")) as executor:
            yield executor


def run(
    configs: Mapping[str, TrainConfig], folder: Path, steps: Sequence[int], executor: Executor
) -> list[dict]:
    for cell_done in sweep(configs, folder, steps, PLAN, executor, threads=1):
        at = f"{cell_done.done} of {cell_done.total}"
        print(f"{at}: {cell_done.cell} {cell_done.error or ''}", flush=True)
    return table(configs, folder, steps)


def study_grid(subject: Subject, out: Path, executor: Executor) -> list[dict]:
    configs = grid(plain(subject), prior_weight=LAMBDAS)
    folder = out / subject.name
    rows = run(configs, folder, STEPS, executor)
    plots.heat_map(rows, "step", "prior_weight", path=folder / "heat_map.png")
    plots.front(rows, "prior_weight", folder / "front.png")
    cells = [
        [
            # Two scenes, and the class.
            (images := load_images(runs.resume(folder / name), step)).subject[:: 2 * PLAN.seeds]
            + images.class_images[:1]
            for step in STEPS
        ]
        for name in configs
    ]
    rows_named = [f"λ {config.prior_weight:g}" for config in configs.values()]
    columns = [f"step {step}" for step in STEPS]
    title = f"{subject.name}: two images of the subject and one of the class"
    save_png(image_grids.matrix(rows_named, columns, cells, title), folder / "sheet.png")
    print(recommend(rows).reason)
    return rows


def overtrain(subject: Subject, folder: Path) -> list[dict]:
    """Train for four times the default steps; score every checkpoint on seeds of their own."""
    torch.set_num_threads(1)
    config = plain(subject)
    config = config.replace(steps=4 * config.steps, checkpoints_kept=10_000)
    run = trained(config, folder)
    plan = replace(SCORED, guidance_scale=config.guidance_scale)
    photos = [photo.image for photo in read_photos(subject.pictures)]
    encoder = validation.load_scorer(config)
    before = validation.draw_images(loading.load_model(config.base), subject, plan)
    base = validation.score_images(encoder, photos, subject, before, before)
    rows = []
    for result in history(run)[1:]:
        file = folder / "scored" / f"{result.step:06d}.json"
        if not file.exists():
            images = validation.draw_images(
                trainable.load_at_checkpoint(run, result.step), subject, plan
            )
            scores = validation.score_images(encoder, photos, subject, images, before)
            replace_file(file, json.dumps(scores).encode())
        scores = json.loads(file.read_text())
        ratios = best_checkpoint.ratios(
            scores["subject_fidelity"], result.reference_fidelity, scores["prompt_adherence"],
            base["prompt_adherence"], scores["prior_drift"], scores["unrelated_drift"],
        )  # fmt: skip
        row = {
            "subject": subject.name,
            "step": result.step,
            "score": best_checkpoint.overall_score(ratios),
        }
        rows.append(row | scores)
    return rows


def trained(config: TrainConfig, folder: Path) -> runs.Run:
    """Train the run in ``folder`` to its end; start it if it is missing."""
    started = (folder / "config.toml").exists()
    run = runs.resume(folder) if started else runs.start(config, folder)
    if not run.finished:
        for _ in train(run):
            pass
    return run


def study_choice(subjects: Sequence[Subject], out: Path, executor: Executor) -> None:
    futures = [executor.submit(overtrain, s, out / s.name) for s in subjects]
    lines = ["| subject | selected step | score | best step | score | of the best | last step |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for subject, future in zip(subjects, futures, strict=True):
        rows = future.result()
        run = runs.resume(out / subject.name)
        replace_file(out / f"{subject.name}.csv", to_csv(rows).encode())
        plots.validation_curves(history(run), out / f"{subject.name}.png")
        selection = best_checkpoint.best_checkpoint(run)
        by_step = {row["step"]: row["score"] for row in rows}
        best, last = max(by_step, key=lambda step: by_step[step]), max(by_step)
        lines.append(
            f"| {subject.name} | {selection.step} | {by_step[selection.step]:.3f} | {best} "
            f"| {by_step[best]:.3f} | {by_step[selection.step] / by_step[best]:.1%} "
            f"| {last}: {by_step[last]:.3f} |"
        )
        print(selection.reason, flush=True)
    replace_file(out / "choice.md", ("\n".join(lines) + "\n").encode())
    print("\n".join(lines))


def train_auto(subject: Subject, folder: Path) -> tuple[float, int, int]:
    """Train ``TrainConfig.auto``; return its score by the grid's plan, best step and last step."""
    torch.set_num_threads(1)
    config = auto(subject)
    run = trained(config, folder)
    plan = replace(PLAN, guidance_scale=config.guidance_scale)
    photos = [photo.image for photo in read_photos(subject.pictures)]
    drawn = [validation.draw_images(loading.load_model(source), subject, plan) for source in
             (config.base, str(run.folder))]  # fmt: skip
    encoder = validation.load_scorer(config)
    base, scores = (
        validation.score_images(encoder, photos, subject, images, drawn[0]) for images in drawn
    )
    ratios = best_checkpoint.ratios(
        scores["subject_fidelity"], history(run)[0].reference_fidelity,
        scores["prompt_adherence"], base["prompt_adherence"], scores["prior_drift"],
        scores["unrelated_drift"],
    )  # fmt: skip
    return (
        best_checkpoint.overall_score(ratios),
        best_checkpoint.best_checkpoint(run).step,
        run.log()[-1]["step"],
    )


def study_auto(subjects: Sequence[Subject], out: Path, executor: Executor) -> None:
    futures = [executor.submit(train_auto, s, out / "auto" / s.name) for s in subjects]
    lines = ["| subject | auto | score | best of the grid | score | of the best "
             "| steps of the grid's |", "|---|---|---|---|---|---|---|"]  # fmt: skip
    for subject, future in zip(subjects, futures, strict=True):
        rows = study_grid(subject, out / "grid", executor)
        score, step, last = future.result()
        best = max(rows, key=lambda row: row["score"])
        ratio = last / (len(LAMBDAS) * max(STEPS))
        lines.append(
            f"| {subject.name} | λ 1, step {step} | {score:.3f} "
            f"| λ {best['prior_weight']:g}, step {best['step']} | {best['score']:.3f} "
            f"| {score / best['score']:.1%} | {ratio:.0%} |"
        )
    replace_file(out / "auto" / "auto.md", ("\n".join(lines) + "\n").encode())
    print("\n".join(lines))


def ablations(subject: Subject, folder: Path) -> dict[str, TrainConfig]:
    """Return the paper's ablations, each with one change, and this kit's methods.

    They train on all five photos.
    """
    default = plain(subject).replace(hold_out=False, steps=ABLATION_STEPS)
    lora = default.replace(method="lora", lora_rank=8, learning_rate=None)

    def of_subject(**changes: str) -> TrainConfig:
        return default.replace(subject=replace(subject, **changes))

    photos = sorted(Path(subject.pictures).glob("*.png"))
    fewer = {}
    for count in (1, 2, 3, 4):
        place = folder / f"{count}-photos"
        place.mkdir(parents=True, exist_ok=True)
        for photo in photos[:count]:
            shutil.copy(photo, place)
        fewer[f"{count} photos" if count > 1 else "1 photo"] = of_subject(pictures=str(place))
    return {
        "default": default,
        "no prior": default.replace(prior_weight=0.0),
        "8 class images": default.replace(class_images=8),
        "16 class images": default.replace(class_images=16),
        "wrong class noun": of_subject(class_noun="teapot"),
        "no class noun": default.replace(
            subject=replace(subject, identifier="hta", class_noun="ohwx"), prior_weight=0.0
        ),
        "common identifier": of_subject(identifier="purple"),
        **fewer,
        "text encoder too": default.replace(train_text_encoder=True),
        "distilled prior": default.replace(prior="distilled"),
        "LoRA": lora,
        "LoRA and distilled prior": lora.replace(prior="distilled"),
    }


def memory_levels(subject: Subject) -> dict[str, TrainConfig]:
    default = plain(subject).replace(hold_out=False, steps=MEMORY_STEPS)
    levels = ("standard", "low", "lowest")
    return {level: default.replace(memory=level) for level in levels}


def over_seeds(
    subject: Subject, kinds: Mapping[str, TrainConfig], out: Path, executor: Executor
) -> None:
    """Train each kind with ``SEEDS`` seeds and average the scores of the last step.

    ``means.md`` and ``means.png`` have the means, ``sheet.png`` the images of the first seed.
    """
    configs = {
        cell(name, seed): config.replace(seed=seed)
        for seed in range(SEEDS)
        for name, config in kinds.items()
    }
    (steps,) = {config.steps for config in kinds.values()}
    rows = run(configs, out, [steps], executor)
    base = {name: rows[0][column] for name, column in MEASURES.items() if column}
    own = {name: [row for row in rows if row["cell"].rpartition("-")[0] == cell(name)]
           for name in kinds}  # fmt: skip
    shown = [heading(name) for name in MEASURES]
    lines = [f"| | {' | '.join(shown)} |", f"|---|{'---|' * len(shown)}"]
    first = [f"{base[name]:.3f}" if name in base else "" for name in MEASURES]
    lines.append(f"| the base | {' | '.join(first)} |")
    for name, members in own.items():
        if members:
            cells = [interval([row[measure] for row in members]) for measure in MEASURES]
            lines.append(f"| {name} ({len(members)}) | {' | '.join(cells)} |")
    replace_file(out / "means.md", ("\n".join(lines) + "\n").encode())
    print("\n".join(lines))
    draw_means({name: members for name, members in own.items() if members}, base, out / "means.png")
    done = [name for name in kinds if (out / cell(name, 0) / "pipeline").exists()]
    drawn = [load_images(runs.resume(out / cell(name, 0)), steps) for name in done]
    cells = [[images.subject[:: PLAN.seeds], images.class_images[:4]] for images in drawn]
    title = f"{subject.name} after {steps} steps, training seed 0"
    page = image_grids.matrix(done, ["the subject in four scenes", "its class"], cells, title)
    save_png(page, out / "sheet.png")


def cell(kind: str, seed: int | None = None) -> str:
    """Return the name of a kind's cell, by seed."""
    return kind.replace(" ", "-") + ("" if seed is None else f"-seed{seed}")


def draw_means(
    rows: Mapping[str, Sequence[Mapping[str, float]]], base: Mapping[str, float], path: Path
) -> None:
    """Draw a panel per measure: every run as a dot, means with 95% intervals, the base dotted."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.6 * len(MEASURES) + 1.5, 0.3 * len(rows) + 1.2), dpi=110,
                    layout="constrained")  # fmt: skip
    panels = figure.subplots(1, len(MEASURES), sharey=True)
    for axes, name in zip(panels, MEASURES, strict=True):
        for place, members in enumerate(rows.values()):
            values = [row[name] for row in members]
            axes.plot(values, [place] * len(values), ".", color="tab:blue", alpha=0.35)
            axes.errorbar(fmean(values), place, xerr=half_width(values), fmt="o", capsize=3,
                          color="tab:blue")  # fmt: skip
        if name in base:
            axes.axvline(base[name], color="gray", linestyle=":")
            axes.set_title("dotted: the base", fontsize="small", color="gray")
        axes.set_xlabel(fill(heading(name), 27))
        axes.grid(axis="y", color="#e4e4e4")
    panels[0].set_yticks(range(len(rows)), list(rows))
    panels[0].set_ylim(len(rows) - 0.5, -0.5)
    figure.savefig(path)


def interval(values: Sequence[float]) -> str:
    """Format the mean and its 95% interval by Student's t."""
    half = half_width(values)
    return f"{fmean(values):.3f}" + (f" ± {half:.3f}" if half else "")


def half_width(values: Sequence[float]) -> float:
    """Return half the width of the 95% interval; 0 for a single value, which has none."""
    if len(values) < 2:
        return 0.0
    return STUDENT_T[len(values) - 2] * stdev(values) / len(values) ** 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("study", choices=("grid", "choice", "auto", "ablations", "memory"))
    parser.add_argument("--subjects", nargs="+", help="default: all bundled ones")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--dask", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("outputs/studies"))
    arguments = parser.parse_args()
    subjects = [
        s for s in bundled_subjects() if not arguments.subjects or s.name in arguments.subjects
    ]
    with workers(arguments.workers, arguments.dask) as executor:
        if arguments.study == "grid":
            for subject in subjects:
                study_grid(subject, arguments.out / "grid", executor)
        elif arguments.study == "choice":
            study_choice(subjects, arguments.out / "choice", executor)
        elif arguments.study == "auto":
            study_auto(subjects, arguments.out, executor)
        elif arguments.study == "ablations":
            out = arguments.out / "ablations"
            kinds = ablations(subjects[0], out / "photos")
            over_seeds(subjects[0], kinds, out, executor)
        else:
            over_seeds(subjects[0], memory_levels(subjects[0]), arguments.out / "memory", executor)


if __name__ == "__main__":
    main()
