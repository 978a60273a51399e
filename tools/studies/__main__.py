"""Run the studies of ``docs/studies``: ``python -m tools.studies NAME --out outputs/studies``.

    grid       λ x steps on each bundled subject: table, heat map, front, contact sheet
    bank       train fifteen subjects with five seeds and draw every checkpoint's images
    trust      print what the bank says: noise, the chosen checkpoints, the automatic settings
    notebook   train fifteen subjects as notebook 01 does, also by LoRA, and show what they chose
    keep       print how an adaptive λ compares with fixed ones, from the bank
    finished   write the study of λ that notebook 02 shows, from the bank
    priors     what keeps the class and other prompts, by LoRA and with all weights, five seeds
    adapters   peft's adapters at equal parameter counts, five seeds
    backgrounds  masks against backgrounds that leak, five seeds
    portraits  portraits in buckets and cropped to squares, five seeds
    ablations  the paper's ablations in miniature, and this kit's methods, five seeds
    memory     what a memory level costs in quality, five seeds

An interrupted study resumes. Cells run on ``--workers`` processes of one thread each, or with
``--dask`` on a local dask cluster; the tables are the same.
"""

import argparse
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from textwrap import fill

from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.core.files import replace_file, save_png
from dreambooth_lib.core.subject import Subject
from dreambooth_lib.evaluation.demo import bundled_subjects
from dreambooth_lib.evaluation.sweep import PLAN, grid, sweep
from dreambooth_lib.evaluation.sweep_table import recommend, table
from dreambooth_lib.figures import image_grids, plots
from dreambooth_lib.figures.labels import heading
from dreambooth_lib.training import runs, validation
from dreambooth_lib.training.validation_record import load_images
from tools.studies import backgrounds, bank, finished, pairs, practice, trust
from tools.studies.adapters import adapters, sizes
from tools.studies.intervals import half_width, interval
from tools.studies.keep import keep_table
from tools.studies.priors import priors

LAMBDAS = (0.0, 0.25, 0.5, 1.0, 2.0)
STEPS = (100, 200, 300, 400, 500)
SEEDS = 5  # trainings of each kind
ABLATION_STEPS = 300  # enough for the prior's full effect, in three fifths of the default's time
MEMORY_STEPS = 100  # this is about rounding to bf16, which is slow on a CPU
#: The measures that over_seeds averages, and the base's column in a sweep's table.
MEASURES = {"subject_fidelity": "", "prompt_adherence": "base_adherence",
            "class_diversity": "base_diversity", "pres": "base_pres",
            "prior_drift": "", "unrelated_drift": ""}  # fmt: skip


def plain(subject: Subject) -> TrainConfig:
    """Return the config that every study varies."""
    return TrainConfig(subject=subject)


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


def fill_bank(
    subjects: Sequence[Subject],
    out: Path,
    kinds: Sequence[str],
    executor: Executor,
    seeds: int | None = None,
) -> None:
    """Fill the bank of images, the first seed of all subjects first, and score it.

    Runs that ``validations.jsonl`` already has in full are not trained again.
    """
    scored = trust.scored_steps(out / "validations.jsonl")
    futures = {
        executor.submit(bank.fill, out, kind, subject, seed): f"{kind} {subject.name} {seed}"
        for seed in range(seeds or SEEDS)
        for kind in kinds
        for subject in subjects
        if not scored[kind, subject.name, seed].issuperset(
            bank.steps_of(bank.config_of(kind, subject, seed))
        )
    }
    print_as_done(futures)
    trust.score_bank(out, out / "validations.jsonl")


def train_as_notebook(
    subjects: Sequence[Subject], out: Path, kinds: Sequence[str], executor: Executor
) -> None:
    """Train notebook 01's run of each subject, and show what all of them chose."""
    print_as_done({
        executor.submit(practice.run_one, out, kind, subject): f"{kind} {subject.name}"
        for kind in kinds
        for subject in subjects
    })  # fmt: skip
    for kind in kinds:
        practice.write_chosen(out, kind, subjects)


def print_as_done(futures: Mapping[Future[None], str]) -> None:
    """Wait for all, and print the name of each one that is done."""
    for done, future in enumerate(as_completed(futures), 1):
        future.result()
        print(f"{done} of {len(futures)}: {futures[future]}", flush=True)


def print_trust(file: Path) -> None:
    """Print the noise of each measure, and how good the chosen checkpoints are."""
    rows = trust.read_rows(file)
    last = {"full": trust.LAST_BY_DEFAULT, "lora": trust.LAST_BY_DEFAULT}
    print("\n".join(["Noise", *trust.noise(rows)]))
    for kind, step in last.items():
        if any(cell.kind == kind for cell in rows["validation"]):
            print("\n".join([f"\nThe choice, {kind}", *trust.choice_table(rows, kind, step)]))
    print("\n".join(["\nThe automatic settings", *trust.auto_table(rows)]))
    if (pairs.DATA / "pairs.json").exists():
        scorer = validation.load_scorers(plain(bundled_subjects()[0])).images
        print("\n".join(["\nAgreement with the two models", *pairs.agreement(scorer, rows)]))


def ablations(subject: Subject, folder: Path) -> dict[str, TrainConfig]:
    """Return the paper's ablations, each with one change, and this kit's methods.

    They train on all five photos.
    """
    default = plain(subject).replace(hold_out=False, steps=ABLATION_STEPS)
    lora = default.replace(method="lora", lora_rank=8, prior="generated")

    def of_subject(**changes: str) -> TrainConfig:
        return default.replace(subject=replace(subject, **changes))

    photos = sorted(Path(subject.photos).glob("*.png"))
    fewer = {}
    for count in (1, 2, 3, 4):
        place = folder / f"{count}-photos"
        place.mkdir(parents=True, exist_ok=True)
        for photo in photos[:count]:
            shutil.copy(photo, place)
        fewer[f"{count} photos" if count > 1 else "1 photo"] = of_subject(photos=str(place))
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
    subject: Subject,
    kinds: Mapping[str, TrainConfig],
    out: Path,
    executor: Executor,
    seeds: int | None = None,
    steps: Sequence[int] = (),
) -> None:
    """Train each kind with ``seeds`` seeds and average the scores of the last step.

    Each is validated at ``steps`` (default: the last one).

    ``means.md`` and ``means.png`` have the means, ``sheet.png`` the images of the first seed.
    """
    configs = {
        cell(name, seed): config.replace(seed=seed)
        for seed in range(seeds or SEEDS)
        for name, config in kinds.items()
    }
    (last,) = {config.steps for config in kinds.values()}
    rows = [row for row in run(configs, out, steps or [last], executor) if row["step"] == last]
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
    drawn = [load_images(runs.resume(out / cell(name, 0)), last) for name in done]
    cells = [[images.subject[:: PLAN.seeds], images.class_images[:4]] for images in drawn]
    title = f"{subject.name} after {last} steps, training seed 0"
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    studies = (
        "grid", "bank", "trust", "notebook", "keep", "finished", "priors", "adapters",
        "backgrounds", "portraits", "ablations", "memory",
    )  # fmt: skip
    parser.add_argument("study", choices=studies)
    parser.add_argument(
        "--subjects", nargs="+", help="default: all bundled ones; of bank and notebook: all"
    )
    parser.add_argument(
        "--kinds",
        nargs="+",
        help="of bank (default: full), notebook (default: full and lora), priors, adapters, "
        "backgrounds and portraits",
    )
    parser.add_argument("--seeds", type=int, default=SEEDS, help="not of ablations and memory")
    parser.add_argument("--rows", type=Path, default=trust.ROWS, help="of trust, keep and finished")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--dask", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("outputs/studies"))
    arguments = parser.parse_args()
    asked = arguments.subjects
    if arguments.study == "trust":
        print_trust(arguments.rows)
        return
    out = arguments.out / arguments.study
    subjects = [s for s in bundled_subjects() if not asked or s.name in asked]
    if arguments.study == "keep":
        print("\n".join(keep_table(trust.read_rows(arguments.rows), arguments.out / "bank")))
        return
    if arguments.study == "finished":
        rows, folder = trust.read_rows(arguments.rows), arguments.out / "bank"
        finished.write(folder, rows, subjects[0])
        finished.write_readme(folder, subjects[0])
        return
    with workers(arguments.workers, arguments.dask) as executor:
        if arguments.study == "grid":
            for subject in subjects:
                study_grid(subject, out, executor)
        elif arguments.study in ("bank", "notebook"):
            every = [s for s in bank.subjects().values() if not asked or s.name in asked]
            if arguments.study == "bank":
                fill_bank(every, out, arguments.kinds or ["full"], executor, arguments.seeds)
            else:
                train_as_notebook(every, out, arguments.kinds or practice.KINDS, executor)
        elif arguments.study in ("priors", "adapters"):
            made = {"priors": priors, "adapters": adapters}[arguments.study]
            for subject in subjects:
                place = out / subject.name
                kinds = {name: config for name, config in made(subject).items()
                         if name in (arguments.kinds or [name])}  # fmt: skip
                over_seeds(subject, kinds, place, executor, arguments.seeds)
                if arguments.study == "adapters":
                    own = {name: place / cell(name, 0) for name in kinds}
                    print("\n".join(sizes(own, place / "sizes.md")))
        elif arguments.study in ("backgrounds", "portraits"):
            ways, steps = {
                "backgrounds": (backgrounds.masks, backgrounds.MASK_STEPS),
                "portraits": (backgrounds.portraits, backgrounds.PORTRAIT_STEPS),
            }[arguments.study]
            for subject in subjects:
                place = out / subject.name
                kinds = {name: config for name, config in ways(subject, place / "photos").items()
                         if name in (arguments.kinds or [name])}  # fmt: skip
                over_seeds(subject, kinds, place, executor, arguments.seeds, steps)
                own = {name: [place / cell(name, seed) for seed in range(arguments.seeds)]
                       for name in kinds}  # fmt: skip
                lines = backgrounds.measure(subject, own, steps, place / "leaks.md")
                print("\n".join(lines))
        elif arguments.study == "ablations":
            kinds = ablations(subjects[0], out / "photos")
            over_seeds(subjects[0], kinds, out, executor)
        else:
            over_seeds(subjects[0], memory_levels(subjects[0]), out, executor)


if __name__ == "__main__":
    main()
