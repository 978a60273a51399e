"""``python -m dreambooth_lib``: demo, figures, train, resume, sample, export, evaluate.

python -m dreambooth_lib demo
accelerate launch -m dreambooth_lib train config.toml --out runs/my-dog
python -m dreambooth_lib sample runs/my-dog "a {} dog on the beach" --seeds 0 1 2 3
"""

import argparse
import shutil
import signal
from pathlib import Path
from typing import TYPE_CHECKING

from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.training import runs
from dreambooth_lib.training.runs import Run

if TYPE_CHECKING:
    from accelerate import PartialState


def parser() -> argparse.ArgumentParser:
    main = argparse.ArgumentParser(
        prog="python -m dreambooth_lib", description=__doc__.split(":")[0]
    )
    commands = main.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="personalise the embedded base for a bundled subject")
    demo.add_argument("--subject", help="a bundled subject's name; the first if left out")
    demo.add_argument("--out", type=Path, default=Path("outputs/demo"))
    figures = commands.add_parser(
        "figures", help="measure all bundled subjects, with and without the prior"
    )
    figures.add_argument("--seeds", type=int, nargs="+", default=[0])
    figures.add_argument("--prior-weights", type=float, nargs="+", default=[1.0, 0.0])
    figures.add_argument("--method", choices=("full", "lora"), default="full")
    figures.add_argument("--lora-rank", type=int, default=8)
    figures.add_argument("--workers", type=int, default=1, help="processes that share the cores")
    figures.add_argument("--out", type=Path, default=Path("outputs/figures"))
    train = commands.add_parser("train", help="train what a TOML file describes")
    train.add_argument("config", type=Path)
    train.add_argument(
        "--out", type=Path, help="the run's folder; runs/<config's name> if left out"
    )
    resume = commands.add_parser("resume", help="go on with a run")
    resume.add_argument("run", type=Path)
    sample = commands.add_parser("sample", help="draw pictures from a finished run")
    sample.add_argument("run", type=Path)
    sample.add_argument("prompts", nargs="+", help="{} stands for the identifier")
    sample.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3])
    sample.add_argument("--steps", type=int, help="of denoising; the base's own if left out")
    sample.add_argument("--guidance-scale", type=float, help="the run's if left out")
    sample.add_argument("--out", type=Path, help="a folder; RUN/samples if left out")
    export = commands.add_parser("export", help="write the file that A1111 and ComfyUI load")
    export.add_argument("run", type=Path)
    export.add_argument("--step", type=int, help="a checkpoint's; the last one's if left out")
    export.add_argument("--out", type=Path, help="a file or a folder; RUN/exports if left out")
    evaluate = commands.add_parser(
        "evaluate", help="the paper's evaluation: a data set's subjects, base against tuned runs"
    )
    evaluate.add_argument("dataset", type=Path, nargs="?", help="the bundled ones if left out")
    evaluate.add_argument("--download", action="store_true",
                          help="fetch the DreamBooth data set into that folder first")  # fmt: skip
    evaluate.add_argument("--base", default="toybox")
    evaluate.add_argument("--encoders", nargs="+", help="ids or folders; toybox's judge if none")
    evaluate.add_argument("--pictures", type=int, default=4, help="of each prompt")
    evaluate.add_argument("--steps", type=int, help="of training; the base's default if left out")
    evaluate.add_argument("--batch-size", type=int, help="the base's default if left out")
    evaluate.add_argument("--class-images", type=int, help="the base's default if left out")
    evaluate.add_argument("--scorer", help="of the looks on the way; the base's if left out")
    evaluate.add_argument("--out", type=Path, default=Path("outputs/evaluation"))
    return main


def run_evaluate(given: argparse.Namespace) -> None:
    from dreambooth_lib.core.processes import join_group
    from dreambooth_lib.evaluation import demo, dreambench, report
    from dreambooth_lib.training import validation

    state = join_group()
    if given.download:
        given.dataset = given.dataset or Path("dreambench")
        with state.main_process_first():
            dreambench.download(given.dataset)
    benchmark = dreambench.load_benchmark(given.dataset or demo.BUNDLED_SUBJECTS)
    names = ("base", "steps", "batch_size", "class_images", "scorer")
    settings = {name: getattr(given, name) for name in names}
    for at in report.base_against_tuned(
        benchmark, lambda subject: TrainConfig(subject, **settings), given.out,
        given.encoders or [validation.TOYBOX_SCORER], given.base, given.pictures,
    ):  # fmt: skip
        state.print(f"{at.done} of {at.total} pictures, {at.seconds_left / 60:.0f} minutes left")
    if state.is_main_process:
        print((given.out / "report.md").read_text())
        for file in report.FILES:
            print(given.out / file)


def run_demo(subject_name: str | None, out: Path) -> None:
    from dreambooth_lib.evaluation import demo

    subjects = {subject.name: subject for subject in demo.bundled_subjects()}
    name = subject_name or next(iter(subjects))
    if name not in subjects:
        raise SystemExit(f"there is no bundled subject '{name}'; choose {', '.join(subjects)}.")
    shutil.rmtree(out / "run", ignore_errors=True)
    row = demo.personalise(TrainConfig(subject=subjects[name]), out / "run", out)
    print(demo.describe(row))
    for file in ("contact_sheet.png", "loss.png", "metrics.json"):
        print(out / file)


def run_training(run: Run) -> None:
    from dreambooth_lib.core.processes import join_group
    from dreambooth_lib.training.best_checkpoint import select_best
    from dreambooth_lib.training.loop import train
    from dreambooth_lib.training.validation_record import history, time_share

    state = join_group()
    try:
        for step in train(run):
            prior = "" if step.prior_loss is None else f" prior {step.prior_loss:.4f}"
            losses = f"instance {step.instance_loss:.4f}{prior}"
            state.print(f"step {step.step}/{run.config.steps} {losses}")
    except KeyboardInterrupt:
        state.print(f"interrupted; 'python -m dreambooth_lib resume {run.folder}' goes on.")
        raise SystemExit(128 + signal.SIGINT) from None
    if looks := history(run):
        if (took := time_share(run)) > 0.2:
            state.print(f"looks took {took:.0%} of the time; a larger validate_every means fewer")
        state.print(f"Best: {select_best(looks).reason}")
    state.print(run.pipeline)


def join() -> "PartialState":
    """Join the group of processes before anything else, and say of how many it is."""
    from dreambooth_lib.core.processes import join_group

    state = join_group()
    if state.num_processes > 1:
        state.print(f"{state.num_processes} processes work together, on {state.device.type}")
    return state


def run_train(config: Path, out: Path | None) -> None:
    from dreambooth_lib.core.processes import join_group

    state = join_group()
    wanted, folder = TrainConfig.from_toml(config), out or Path("runs") / config.stem
    if state.is_main_process:
        runs.start(wanted, folder)
    state.wait_for_everyone()
    run_training(runs.resume(folder))


def run_sample(given: argparse.Namespace) -> None:
    from dreambooth_lib.training.sampling import sample

    folder, wanted = given.out or given.run / "samples", (given.prompts, given.seeds)
    folder.mkdir(parents=True, exist_ok=True)
    drawing = {"steps": given.steps, "guidance_scale": given.guidance_scale}
    for number, made in enumerate(sample(runs.resume(given.run), *wanted, **drawing)):
        path = folder / f"{number // len(given.seeds):02d}-seed{made.seed}.png"
        made.image.save(path)
        print(path)


def run_export(given: argparse.Namespace) -> None:
    from tempfile import TemporaryDirectory

    from dreambooth_lib.export import comfyui, pipeline_folder

    run = runs.resume(given.run)
    comfyui.check_exportable(run)
    step = max(run.checkpoints(), default=0) if given.step is None else given.step
    with TemporaryDirectory(dir=run.folder) as model:  # as large as the run's pipeline
        pipeline_folder.write_pipeline(run, step, Path(model))
        print(comfyui.export(run, model, given.out or run.folder / "exports"))


def main() -> None:
    from dreambooth_lib.core.notices import quiet

    given = parser().parse_args()
    quiet()
    from dreambooth_lib.evaluation import demo

    try:
        state = join() if given.command in ("train", "resume", "evaluate") else None
        if given.command == "demo":
            run_demo(given.subject, given.out)
        elif given.command == "figures":
            from dreambooth_lib.core.files import replace_file

            shutil.rmtree(given.out / "runs", ignore_errors=True)
            rows = demo.figures(
                given.out, given.seeds, given.prior_weights, workers=given.workers,
                method=given.method, lora_rank=given.lora_rank,
            )  # fmt: skip
            table = demo.summary(rows)
            replace_file(given.out / "summary.md", f"{table}\n".encode())
            print(table)
        elif given.command == "train":
            run_train(given.config, given.out)
        elif given.command == "evaluate":
            run_evaluate(given)
        elif given.command == "resume":
            run_training(runs.resume(given.run))
        elif given.command == "export":
            run_export(given)
        else:
            run_sample(given)
        if state is not None:
            state.destroy_process_group()  # which torch asks for, of those that end well
    except Exception as error:  # the library's own say in a sentence what the user can mend
        if isinstance(error, ValueError) or type(error).__module__.startswith("dreambooth_lib."):
            raise SystemExit(f"error: {error}") from error
        raise


if __name__ == "__main__":
    main()
