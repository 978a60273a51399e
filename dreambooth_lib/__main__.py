"""Train, sample, export and evaluate from the command line.

python -m dreambooth_lib demo
accelerate launch -m dreambooth_lib train config.toml --out runs/my-dog
python -m dreambooth_lib sample runs/my-dog "a {} dog on the beach" --seeds 0 1 2 3
"""

import argparse
import io
import re
import shlex
import signal
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.core.disk import explain_disk_errors
from dreambooth_lib.core.errors import KitError, one_line, printable
from dreambooth_lib.core.files import replace_file, save_png
from dreambooth_lib.core.notices import quiet
from dreambooth_lib.core.processes import join_group
from dreambooth_lib.evaluation.arguments import add_evaluate, add_results
from dreambooth_lib.training import runs
from dreambooth_lib.training.runs import Run

_FOLDER = "the folder to write to (default: %(default)s)"


def parser() -> argparse.ArgumentParser:
    debug = argparse.ArgumentParser(add_help=False)
    # Without a default, since a command's would replace what stands before the command.
    debug.add_argument("--debug", action="store_true", default=argparse.SUPPRESS,
                       help="show the traceback of an error")  # fmt: skip
    main = argparse.ArgumentParser(
        prog="python -m dreambooth_lib", description=__doc__.split("\n")[0], parents=[debug]
    )
    commands = main.add_subparsers(dest="command", required=True)
    add = partial(commands.add_parser, parents=[debug])

    demo = add("demo", help="train the bundled base on a bundled subject")
    demo.set_defaults(call=run_demo)
    demo.add_argument("--subject", help="a bundled subject's name (default: the first)")
    demo.add_argument("--out", type=Path, default=Path("outputs/demo"), help=_FOLDER)

    figures = add(
        "figures", help="train and score every bundled subject, with and without prior preservation"
    )
    figures.set_defaults(call=run_figures)
    figures.add_argument("--seeds", type=int, nargs="+", default=[0], help="training seeds")
    figures.add_argument("--prior-weights", type=float, nargs="+", default=[1.0, 0.0],
                         help="weights of prior preservation; 0 turns it off")  # fmt: skip
    figures.add_argument("--method", choices=("full", "lora"), default="full",
                         help="train all weights, or a LoRA")  # fmt: skip
    figures.add_argument("--lora-rank", type=int, default=8, help="default: %(default)s")
    figures.add_argument("--workers", type=int, default=1, help="processes that share the cores")
    figures.add_argument("--out", type=Path, default=Path("outputs/figures"), help=_FOLDER)

    train = add("train", help="train a TOML config, or resume its run")
    train.set_defaults(call=run_train)
    train.add_argument("config", type=Path, help="a TOML file with the fields of TrainConfig")
    train.add_argument("--out", type=Path, help="the run's folder (default: runs/CONFIG)")

    resume = add("resume", help="resume an interrupted run")
    resume.set_defaults(call=run_resume)
    resume.add_argument("run", type=Path, help="the run's folder")
    resume.add_argument("--photos", type=Path, help="where its photos are now, if they were moved")

    sample = add("sample", help="generate images from a run")
    sample.set_defaults(call=run_sample)
    sample.add_argument("run", type=Path, help="the run's folder")
    sample.add_argument("prompts", nargs="+", help="{} is replaced by the identifier")
    sample.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3],
                        help="one image for each prompt and seed (default: 0 1 2 3)")  # fmt: skip
    sample.add_argument("--at", type=int, help="a checkpoint's step (default: the finished model)")
    sample.add_argument("--steps", type=int, help="inference steps (default: the base's)")
    sample.add_argument("--guidance-scale", type=float, help="default: the run's")
    sample.add_argument("--out", type=Path, help="a folder (default: RUN/samples)")

    export = add("export", help="export one file for A1111 and ComfyUI")
    export.set_defaults(call=run_export)
    export.add_argument("run", type=Path, help="the run's folder")
    export.add_argument("--step", type=int, help="a checkpoint's step (default: the pipeline's)")
    export.add_argument("--out", type=Path, help="a file or a folder (default: RUN/exports)")

    evaluate = add("evaluate", help="run the paper's evaluation: the base against tuned runs")
    evaluate.set_defaults(call=run_evaluate)
    add_evaluate(evaluate)

    results = add("results", help="save results as JSON, and write their table")
    results.set_defaults(call=run_results)
    add_results(results)

    gallery = add("gallery", help="write a study as one HTML page with sliders")
    gallery.set_defaults(call=run_gallery)
    gallery.add_argument("folders", type=Path, nargs="+", help="folders of runs or studies")
    gallery.add_argument("--out", type=Path, default=Path("gallery.html"),
                         help="the page's file (default: %(default)s)")  # fmt: skip
    gallery.add_argument("--photos", action="store_true", help="show the subjects' photos, too")
    gallery.add_argument("--space", type=Path,
                         help="write a Hugging Face Space to this folder instead: the page, plus a "
                         "prompt field that generates on a CPU")  # fmt: skip

    report = add("report", help="describe this machine for an issue, without anything private")
    report.set_defaults(call=run_report)
    report.add_argument("--base", default="toybox", help="the base that you train")
    return main


def run_demo(arguments: argparse.Namespace) -> None:
    from dreambooth_lib.data.images import DataError
    from dreambooth_lib.evaluation import demo
    from dreambooth_lib.training.sampling import inference_settings

    out, subjects = arguments.out, {subject.name: subject for subject in demo.bundled_subjects()}
    name = arguments.subject or next(iter(subjects))
    if name not in subjects:
        raise DataError(f"there is no bundled subject '{name}'; choose {', '.join(subjects)}.")
    demo.delete_earlier(out / "run")
    config = TrainConfig(subject=subjects[name])
    scored_steps = inference_settings(config).validation_steps
    row = demo.personalise(config, out / "run", out, scored_steps=scored_steps)
    print(demo.describe(row))
    for file in ("contact_sheet.png", "loss.png", "metrics.json"):
        show(out / file)


def run_figures(arguments: argparse.Namespace) -> None:
    from dreambooth_lib.evaluation import demo

    out = arguments.out
    rows = demo.figures(
        out, arguments.seeds, arguments.prior_weights, workers=arguments.workers,
        method=arguments.method, lora_rank=arguments.lora_rank,
    )  # fmt: skip
    table = demo.summary(rows)
    replace_file(out / "summary.md", f"{table}\n".encode())
    print(table)


def run_train(arguments: argparse.Namespace) -> None:
    from dreambooth_lib.data.subjects import check_subject
    from dreambooth_lib.training.image_sizes import bucket_sizes

    state, config = join_group(), TrainConfig.from_toml(arguments.config)
    folder = arguments.out or Path("runs") / arguments.config.stem
    if state.is_main_process:
        run = runs.start_or_resume(config, folder)
        if not run.checkpoints():
            for message in check_subject(run.config.subject, bucket_sizes(run.config)):
                print(message)
    state.wait_for_everyone()
    run_training(runs.resume(folder))


def run_resume(arguments: argparse.Namespace) -> None:
    state = join_group()
    if arguments.photos is not None and state.is_main_process:
        from dreambooth_lib.data.images import read_photos

        subject = runs.resume(arguments.run).config.subject
        moved = replace(subject, photos=str(arguments.photos.resolve()))
        read_photos(moved)
        runs.resume(arguments.run, subject=moved)
    state.wait_for_everyone()
    run_training(runs.resume(arguments.run))


def run_training(run: Run) -> None:
    from dreambooth_lib.training.best_checkpoint import select_best
    from dreambooth_lib.training.interrupts import Terminated
    from dreambooth_lib.training.loop import train
    from dreambooth_lib.training.prior_weight import class_shortfall
    from dreambooth_lib.training.validation_pace import share_limit, skipped_steps
    from dreambooth_lib.training.validation_record import history, time_share

    state = join_group()
    try:
        for step in train(run):
            prior = "" if step.prior_loss is None else f", prior loss {step.prior_loss:.4f}"
            losses = f"instance loss {step.instance_loss:.4f}{prior}"
            state.print(f"step {step.step}/{run.config.steps}: {losses}")
    except KeyboardInterrupt as stop:
        folder = shlex.quote(printable(str(run.folder)))
        state.print(f"interrupted; resume with 'python -m dreambooth_lib resume {folder}'.")
        number = stop.number if isinstance(stop, Terminated) else signal.SIGINT
        raise SystemExit(128 + number) from None
    if sentence := class_shortfall(run):
        state.print(sentence)
    if results := history(run):
        if (ratio := time_share(run)) > 0.2 and share_limit(run.config) is None:
            state.print(
                f"validation took {ratio:.0%} of the time; raise validate_every for fewer of them"
            )
        if skipped := skipped_steps(run):
            state.print(
                f"validation was skipped at step {', '.join(map(str, skipped))} to limit its share "
                "of the training time; to validate at every interval, set validate_every, and "
                "leave validation_share out"
            )
        if len(results) > 1:
            selection = select_best(results)
            state.print(f"{selection.verdict.text} {selection.verdict.advice}")
            best = "Best: " if selection.better_than_base else ""
            state.print(f"{best}{selection.reason}")
    state.print(printable(str(run.pipeline)))


def run_sample(arguments: argparse.Namespace) -> None:
    from dreambooth_lib.training.sampling import iter_samples

    run = runs.resume(arguments.run)
    folder, seeds = arguments.out or arguments.run / "samples", arguments.seeds
    with explain_disk_errors(folder / "00.png"):  # before the images are generated
        folder.mkdir(parents=True, exist_ok=True)
    earlier = [re.fullmatch(r"(\d{2,9})-seed\d+\.png", file.name) for file in folder.iterdir()]
    samples = iter_samples(
        run, arguments.prompts, seeds, at=arguments.at, steps=arguments.steps,
        guidance_scale=arguments.guidance_scale,
    )  # fmt: skip
    first = 1 + max((int(found[1]) for found in earlier if found), default=-1)
    for number, made in enumerate(samples):
        path = folder / f"{first + number // len(seeds):02d}-seed{made.seed}.png"
        save_png(made.image, path)
        show(path)


def run_export(arguments: argparse.Namespace) -> None:
    from dreambooth_lib.export import comfyui

    run = runs.resume(arguments.run)
    show(comfyui.export_run(run, arguments.out or run.folder / "exports", arguments.step))


def run_evaluate(arguments: argparse.Namespace) -> None:
    from dreambooth_lib.evaluation import commands

    for line in commands.evaluate(arguments):
        show(line)


def run_results(arguments: argparse.Namespace) -> None:
    from dreambooth_lib.evaluation import commands

    for file in commands.results_files(arguments):
        show(file)


def run_gallery(arguments: argparse.Namespace) -> None:
    from dreambooth_lib.export import gallery, space

    study, photos = gallery.find_runs(arguments.folders), arguments.photos
    if arguments.space is not None:
        show(space.write_space(study, arguments.space, photos))
    else:
        show(gallery.write_gallery(study, arguments.out, photos))


def run_report(arguments: argparse.Namespace) -> None:
    from dreambooth_lib.notebook.report import report

    print(report(arguments.base))


def show(line: object) -> None:
    """Print a line with a file's name in it, whatever characters that has."""
    print(printable(str(line)))


def main() -> None:
    arguments = parser().parse_args()
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal may lack a character of a name
        sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
    quiet()
    try:
        if arguments.command in ("train", "resume", "evaluate"):
            state = join_group()  # before anything else
            if state.num_processes > 1:
                state.print(f"{state.num_processes} processes work together on {state.device.type}")
            arguments.call(arguments)
            state.destroy_process_group()  # torch asks for this at a clean exit
        else:
            arguments.call(arguments)
    except KeyboardInterrupt:
        if hasattr(arguments, "debug"):
            raise
        print("interrupted.", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None
    except Exception as error:
        if hasattr(arguments, "debug"):
            raise
        advice = "" if isinstance(error, KitError) else "; add --debug to see the traceback."
        raise SystemExit(f"error: {one_line(error)}{advice}") from error


if __name__ == "__main__":
    main()
