"""Collect a result, as :mod:`.results` keeps it, from a run's folder or an evaluation's."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from dreambooth_lib.core.checked_json import read_object
from dreambooth_lib.core.config_file import to_dict
from dreambooth_lib.core.made_with import MADE_WITH_FILE
from dreambooth_lib.evaluation import scores, tables
from dreambooth_lib.evaluation.results import FORMAT, ResultError
from dreambooth_lib.families.precision import without_paths
from dreambooth_lib.training import runs
from dreambooth_lib.training.best_checkpoint import best_checkpoint
from dreambooth_lib.training.runs import Run
from dreambooth_lib.training.validation_record import history, plan_file, read_plan

#: Of a validation, what is no score of the images.
_NO_SCORES = ("step", "seconds", "held_out", "by_image", "reference_fidelity")
#: Settings that a result has one value of, for all its runs.
_OF_ALL_RUNS = ("base", "method", "adapter", "lora_rank", "prior_weight", "steps")


def collect(place: Path, title: str = "") -> dict[str, Any]:
    """Return the result of a finished run with validations, or of an evaluation's folder.

    A run's scores are its best checkpoint's. Raises :class:`ResultError` for a folder that has none
    and for a run that does not say what it was made with; ``RunError`` and ``DataError`` for
    damaged ones.
    """
    if (place / "protocol.json").is_file():
        return _of_evaluation(place, title)
    if (place / "config.toml").is_file():
        return _of_run(runs.resume(place), title)
    raise ResultError(f"{place} is neither a run nor an evaluation; give such a folder.")


def _of_run(run: Run, title: str) -> dict[str, Any]:
    results = {result.step: result for result in history(run)}
    if 0 not in results or len(results) < 2:
        raise ResultError(f"{run.folder} has no validations, and so no scores; validate it.")
    step, plan = best_checkpoint(run).step, read_plan(plan_file(run.folder))
    config, found = run.config, []
    images, prompts = (Path(name).name for name in (config.image_scorer, config.scorer))
    for method, result in (("base", results[0]), ("dreambooth", results[step])):
        values = {name: v for name, v in vars(result).items() if name not in _NO_SCORES}
        by = {"prompt_adherence": prompts}  # the rest compares images with images
        found += [_score(method, by.get(n, images), n, value) for n, value in values.items()]
    if (ceiling := results[step].reference_fidelity) < 1:  # else the photos have no pairs
        found.append(_score(scores.REAL, images, "subject_fidelity", ceiling))
    return _result([run], title, run.config.subject.name, step, plan.seeds, found)


def _of_evaluation(folder: Path, title: str) -> dict[str, Any]:
    places = sorted(path.parent for path in (folder / "runs").glob("*/config.toml"))
    if not places:
        raise ResultError(f"{folder} has no runs; evaluate with 'evaluate' first.")
    protocol = read_object(folder / "protocol.json") or {}
    images_per_prompt = protocol.get("images_per_prompt")
    if not isinstance(images_per_prompt, int):
        raise ResultError(f"{folder}/protocol.json is damaged; evaluate again.")
    rows = tables.read_csv(folder / "scores.csv")
    subjects = {row.subject for row in rows}
    tuned = [run for run in map(runs.resume, places) if run.config.subject.name in subjects]
    if not tuned:
        raise ResultError(f"{folder} has no run of a subject in its scores.csv; evaluate again.")
    found = [
        {"method": m.method, "encoder": m.encoder, "measure": m.measure, "value": m.value,
         "low": m.low if m.over_seeds else None, "high": m.high if m.over_seeds else None,
         "count": m.count}
        for m in scores.means(rows)
    ]  # fmt: skip
    name = next(iter(subjects)) if len(subjects) == 1 else f"{len(subjects)} subjects"
    # With early stopping the weights are of an earlier step, which may be another in each run.
    step = max(run.trained().get("step", run.config.steps) for run in tuned)
    return _result(tuned, title, name, step, images_per_prompt, found)


def _score(method: str, encoder: str, measure: str, value: float) -> dict[str, Any]:
    one = {"value": value, "low": None, "high": None, "count": 1}
    return {"method": method, "encoder": encoder, "measure": measure, **one}


def _result(
    tuned: Sequence[Run], title: str, benchmark: str, step: int, images: int,
    found: list[dict[str, Any]],
) -> dict[str, Any]:  # fmt: skip
    """Return the result of runs with one config but for their subjects."""
    made = [_made_with(run) for run in tuned]
    fields = [_shared_fields(run) for run in tuned]
    for name in _OF_ALL_RUNS:
        if any(f.get(name) != fields[0].get(name) for f in fields):
            raise ResultError(
                f"the runs in {tuned[0].folder.parent} differ in {name}; evaluate each "
                f"{name} in a folder of its own."
            )
    config = {k: v for k, v in fields[0].items() if all(f.get(k) == v for f in fields)}
    adapter = config.get("adapter") or "LoRA"
    method = "full" if config["method"] == "full" else f"{adapter} {config['lora_rank']}"
    words = f"{benchmark}, {method}, λ {config['prior_weight']:g}, {config['steps']} steps"
    versions = {
        package: " and ".join(
            sorted({m["versions"][package] for m in made if package in m["versions"]})
        )
        for package in made[-1]["versions"]
    }
    return {
        "format": FORMAT,
        "title": title or words,
        "date": max(m["date"] for m in made),
        "benchmark": benchmark,
        "subjects": [run.config.subject.name for run in tuned],
        "step": step,
        "config": config,
        "versions": versions,
        "device": " and ".join(sorted({m["device"] for m in made})),
        "seeds": {
            "training": sorted({run.config.seed for run in tuned}),
            "images": [*range(images)],
        },
        "scores": found,
        "cost": {
            "seconds": round(fmean(map(_seconds, tuned)), 1),
            "peak_memory_mb": max(m["peak_memory_mb"] for m in made),
            "weights_mb": round(fmean(map(_weights_mb, tuned)), 2),
        },
    }


def _made_with(run: Run) -> dict[str, Any]:
    made = read_object(run.folder / MADE_WITH_FILE)
    if not run.finished or made is None:
        raise ResultError(
            f"{run.folder} is not finished, or lacks {MADE_WITH_FILE}, which says what it was made "
            "with; train it to its end."
        )
    types = {"versions": dict, "device": str, "peak_memory_mb": float, "date": str}
    if not all(isinstance(made.get(name), kind) for name, kind in types.items()):
        raise ResultError(f"{run.folder / MADE_WITH_FILE} is damaged; train the run again.")
    return made


def _shared_fields(run: Run) -> dict[str, Any]:
    """Return a run's config without its subject and the places that are its machine's."""
    config = run.resolved_config
    fields = {k: v for k, v in to_dict(config).items() if k not in ("subject", "class_folder")}
    own = fields.pop("adapter_settings", {})
    fields |= {f"adapter_settings.{name}": value for name, value in own.items()}
    return without_paths(fields) | {"own_class_images": config.class_folder is not None}


def _seconds(run: Run) -> float:
    steps = sum(row["seconds"] for row in run.log())
    return steps + sum(result.seconds for result in history(run))


def _weights_mb(run: Run) -> float:
    files = run.pipeline.rglob("*.safetensors")
    return sum(file.stat().st_size for file in files) / 1e6
