"""Run the commands ``evaluate`` and ``results``."""

import argparse
import os
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.core.errors import InputError
from dreambooth_lib.core.processes import join_group
from dreambooth_lib.evaluation import benchmarks, demo, report, results
from dreambooth_lib.evaluation.collect_result import collect
from dreambooth_lib.evaluation.judge import VisionLanguageModel
from dreambooth_lib.evaluation.judge_models import Endpoint, LocalModel
from dreambooth_lib.metrics.encoders import PAPER, PHOTOS
from dreambooth_lib.training.validation import TOYBOX_SCORER


def evaluate(arguments: argparse.Namespace) -> Iterator[str]:
    """Run the paper's evaluation, and yield the lines to show."""
    state, dataset = join_group(), arguments.dataset or demo.BUNDLED_SUBJECTS
    if arguments.download:
        dataset = arguments.dataset or Path("dreambench")
        with state.main_process_first():
            benchmarks.download(dataset)
    names = ("base", "steps", "batch_size", "class_images", "scorer")
    settings = {name: getattr(arguments, name) for name in names}
    for progress in report.base_against_tuned(
        benchmarks.load_benchmark(dataset), lambda subject: TrainConfig(subject, **settings),
        arguments.out, _encoders(arguments), arguments.base, arguments.images_per_prompt,
        _judge(arguments), arguments.drift_prompts,
    ):  # fmt: skip
        minutes = f"{progress.seconds_left / 60:.0f} minutes left"
        if state.is_main_process:
            yield f"{progress.done} of {progress.total} images, {minutes}"
    if state.is_main_process:
        yield from (arguments.out / "report.md").read_text(encoding="utf-8").splitlines()
        for file in report.FILES:
            yield str(arguments.out / file)


def _encoders(arguments: argparse.Namespace) -> list[str | Path]:
    """Return Hub ids and folders: of a real base PHOTOS, which do better on photos than PAPER."""
    if not arguments.encoders and arguments.base == "toybox":
        return [TOYBOX_SCORER]
    sets = {"photos": PHOTOS, "paper": PAPER}
    given = arguments.encoders or ["photos"]
    return list(dict.fromkeys(model for name in given for model in sets.get(name, (name,))))


def results_files(arguments: argparse.Namespace) -> Iterator[Path]:
    """Add the results of runs and evaluations, write the table, and yield what was written."""
    if (arguments.action == "add") != bool(arguments.places):
        raise InputError("'results add' takes folders of runs, and 'results table' takes none.")
    for result in [collect(place, arguments.title) for place in arguments.places]:
        yield results.write(result, arguments.folder)
    yield results.write_table(arguments.folder)


def _judge(arguments: argparse.Namespace) -> Callable[[], VisionLanguageModel] | None:
    """Return what loads the judge, once it is needed; None where none was asked for."""
    if arguments.vlm is None:
        if arguments.vlm_url is not None:
            raise InputError("--vlm-url is given without a model; name one that it has with --vlm.")
        return None
    if arguments.vlm_url is None:
        return partial(LocalModel, arguments.vlm, join_group().device)
    variable = arguments.vlm_key_env
    if variable not in os.environ and not re.fullmatch("[A-Z_][A-Z0-9_]*", variable):
        raise InputError(  # it may be the key, so it is not shown
            "--vlm-key-env takes the name of an environment variable, such as OPENAI_API_KEY, not "
            "the key itself; put the key into a variable, and give its name."
        )
    api = Endpoint(arguments.vlm_url, arguments.vlm, variable)
    return lambda: api
