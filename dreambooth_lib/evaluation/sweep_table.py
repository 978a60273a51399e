"""Build a sweep's table, a row per cell and step, and recommend a setting from it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import fmean
from typing import Any

from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.core.errors import InputError
from dreambooth_lib.core.old_names import current_fields
from dreambooth_lib.figures.labels import NAMES, RATIOS
from dreambooth_lib.training import best_checkpoint, runs
from dreambooth_lib.training.validation_record import ValidationResult, history

#: A table's columns after the settings: the score of :mod:`best_checkpoint`, then its parts.
MEASURES = ("score", *RATIOS, "subject_fidelity", "base_fidelity", "reference_fidelity",
            "prompt_adherence",
            "base_adherence", "class_diversity", "base_diversity", "prior_drift", "pres",
            "base_pres", "unrelated_drift")  # fmt: skip
#: Scores this close, relative to the best, are alike: another seed moves them as much.
ALIKE = 0.01


def table(
    configs: Mapping[str, TrainConfig], folder: str | Path, steps: Sequence[int]
) -> list[dict[str, Any]]:
    """Return a row for every cell and step so far, as ``pandas.DataFrame`` takes them.

    The columns are the cell, λ, the fields that vary among the configs, the step and the measures.
    """
    # λ is always included: sweeps are read by it.
    names = [field.name for field in fields(TrainConfig) if field.name != "subject"]
    varied = [
        name
        for name in names
        if name == "prior_weight" or len({getattr(c, name) for c in configs.values()}) > 1
    ]
    rows = []
    for name, config in configs.items():
        place = Path(folder) / name
        results = history(runs.resume(place)) if (place / "config.toml").exists() else []
        settings = {"cell": name} | {field: getattr(config, field) for field in varied}
        rows += [
            settings | {"step": result.step} | measures(result, results[0])
            for result in results[1:]
            if result.step in steps
        ]
    return rows


def measures(result: ValidationResult, base: ValidationResult) -> dict[str, float]:
    """Return a validation's scores beside the base's, in the order of :data:`MEASURES`."""
    ratios = best_checkpoint.ratios_of(result, base)
    values = (
        ratios.score, *(getattr(ratios, name) for name in RATIOS),
        result.subject_fidelity, base.subject_fidelity, result.reference_fidelity,
        result.prompt_adherence, base.prompt_adherence,
        result.class_diversity, base.class_diversity,
        result.prior_drift, result.pres, base.pres, result.unrelated_drift,
    )  # fmt: skip
    return dict(zip(MEASURES, values, strict=True))


@dataclass(frozen=True)
class Recommendation:
    """The best settings, their score, and the reason in a sentence."""

    settings: dict[str, Any]
    score: float
    reason: str


def recommend(rows: Sequence[Mapping[str, Any]]) -> Recommendation:
    """Return the settings with the highest mean score over seeds; of equals the fewest steps.

    The reason also says where more steps may be better still, and which other values of λ are as
    good. ``rows`` are those of :func:`table` or read from its CSV; raises ``InputError`` for none.
    """
    if not rows:
        raise InputError("the table has no rows; run a sweep first.")
    rows = [current_fields(row) for row in rows]
    fixed = {"cell", "seed", *MEASURES}
    groups: dict[tuple[tuple[str, Any], ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        key = tuple((name, value) for name, value in row.items() if name not in fixed)
        groups.setdefault(key, []).append(row)

    def mean(key: tuple[tuple[str, Any], ...], measure: str) -> float:
        return fmean(float(row[measure]) for row in groups[key])

    best = max(groups, key=lambda key: (round(mean(key, "score"), 6), -int(dict(key)["step"])))
    settings, score = dict(best), mean(best, "score")
    named = ((NAMES[n] if n == "prior_weight" else n, _short(v)) for n, v in best)
    text = ", ".join(f"{name} {value}" for name, value in named)
    count = len(groups[best])
    reason = (
        f"{text} has the highest score of {len(groups)} settings ({score:.3f}, "
        f"{f'mean of {count} runs' if count > 1 else 'one run'})"
    )
    if all(name in groups[best][0] for name in RATIOS):  # not in a table of an earlier version
        means = best_checkpoint.Ratios(**{name: mean(best, name) for name in RATIOS})
        reason += f": {best_checkpoint.describe_ratios(means)}"
    reason += "."
    alike = [dict(key) for key in groups if mean(key, "score") >= (1 - ALIKE) * score]
    weights = {float(key["prior_weight"]) for key in alike if "prior_weight" in key}
    if len(weights) > 1:
        *most, last = map(_short, sorted(weights))
        any_of = "either" if len(weights) == 2 else "any"
        reason += f" λ {', '.join(most)} and {last} are within {ALIKE:.0%}: {any_of} will do."
    if int(settings["step"]) == max(int(row["step"]) for row in rows):
        reason += " This is the longest training tried: try more steps before you trust it."
    return Recommendation(settings, score, reason)


def _short(value: Any) -> str:
    """Format a number without needless digits, even one read from a CSV as text."""
    try:
        return f"{float(value):g}"
    except (TypeError, ValueError):
        return str(value)
