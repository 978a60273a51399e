"""Build a sweep's table, a row per cell and step, and recommend a setting from it."""

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.core.errors import InputError, one_line
from dreambooth_lib.data.images import DataError
from dreambooth_lib.figures.labels import NAMES, RATIOS
from dreambooth_lib.training import best_checkpoint, runs
from dreambooth_lib.training.validation_record import ValidationResult, history

#: The fields of a config that vary, and the step, with their values.
Setting = tuple[tuple[str, Any], ...]
#: A table's columns after the settings: the score of :mod:`best_checkpoint`, then its parts.
MEASURES = ("score", *RATIOS, "subject_fidelity", "base_fidelity", "reference_fidelity",
            "prompt_adherence",
            "base_adherence", "class_diversity", "base_diversity", "prior_drift", "pres",
            "base_pres", "unrelated_drift")  # fmt: skip

_NO_NUMBERS = {"": None, "True": True, "False": False}  #: settings by how a CSV has them


def table(
    configs: Mapping[str, TrainConfig], folder: str | Path, steps: Sequence[int]
) -> list[dict[str, Any]]:
    """Return a row for every cell and step so far, as ``pandas.DataFrame`` takes them.

    The columns are the cell, λ, the fields that vary among the configs, the step and the measures.
    """
    columns = {name: _columns(config) for name, config in configs.items()}
    every = [*columns.values()]
    named = {own["subject.name"]: own["subject.photos"] for own in every}
    if all(named[own["subject.name"]] == own["subject.photos"] for own in every):
        for own in every:  # the names tell the photos apart, without places on a machine
            del own["subject.photos"]
    varied = [
        column
        for column in dict.fromkeys(column for own in every for column in own)
        # λ is always included: sweeps are read by it.
        if column == "prior_weight" or len({own.get(column) for own in every}) > 1
    ]
    rows = []
    for name, own in columns.items():
        place = Path(folder) / name
        results = history(runs.resume(place)) if (place / "config.toml").exists() else []
        settings = {"cell": name} | {column: own.get(column) for column in varied}
        rows += [
            settings | {"step": result.step} | measures(result, results[0])
            for result in results[1:]
            if result.step in steps
        ]
    return rows


def _columns(config: TrainConfig) -> dict[str, Any]:
    """Return a config's fields, with a column for each of its subject's and its adapter's."""
    columns = {f"subject.{name}": value for name, value in vars(config.subject).items()}
    for name, value in vars(config).items():
        if name == "adapter_settings":
            columns |= {f"{name}.{key}": number for key, number in (value or {}).items()}
        elif name != "subject":
            columns[name] = value
    return columns


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


def read(path: str | Path) -> list[dict[str, Any]]:
    """Read a table's CSV. Raises :class:`DataError` for what is none."""
    try:
        with Path(path).open(newline="", encoding="utf-8") as file:
            rows = [{name: _value(name, text) for name, text in line.items()}
                    for line in csv.DictReader(file, strict=True)]  # fmt: skip
        if not all({"step", "score"} <= row.keys() for row in rows):
            raise ValueError("it has no steps or no scores")
    except (OSError, ValueError, TypeError, csv.Error) as error:
        raise DataError(
            f"{path} cannot be read as a sweep's table ({one_line(error)}); run the sweep again."
        ) from error
    return rows


def _value(name: str, text: str) -> float | str | None:
    """Return a cell's value as :func:`table` had it, but for whole numbers of settings."""
    if name == "step":
        return int(text)
    if str(name).startswith(("cell", "subject.")):  # which may look like numbers
        return text
    if name not in MEASURES and text in _NO_NUMBERS:
        return _NO_NUMBERS[text]
    try:
        return float(text)
    except ValueError:
        if name in MEASURES:
            raise
        return text  # such as a prior's


def spread(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Return how much another training seed moves a score: the standard deviation in a setting.

    It is pooled over all settings; None where none has two seeds.
    """
    groups = [[float(row["score"]) for row in own] for own in _by_setting(rows).values()]
    degrees = sum(len(own) - 1 for own in groups)
    squares = sum((score - fmean(own)) ** 2 for own in groups for score in own)
    return math.sqrt(squares / degrees) if degrees else None


def _by_setting(
    rows: Sequence[Mapping[str, Any]], by_subject: bool = True
) -> dict[Setting, list[Mapping[str, Any]]]:
    """Return the rows by all of their settings but the seed.

    Without ``by_subject`` several subjects are no settings either; an identifier of one is.
    """
    fixed = {"cell", "seed", *MEASURES}
    if not by_subject and any({"subject.name", "subject.photos"} & row.keys() for row in rows):
        fixed |= {name for row in rows for name in row if name.startswith("subject.")}
    groups: dict[Setting, list[Mapping[str, Any]]] = {}
    for row in rows:
        key = tuple((name, value) for name, value in row.items() if name not in fixed)
        groups.setdefault(key, []).append(row)
    return groups


def recommend(
    rows: Sequence[Mapping[str, Any]], moved_by_seed: float | None = None
) -> Recommendation:
    """Return the settings with the highest mean score over seeds; of equals the fewest steps.

    The reason also says where more steps may be better still, and what the table cannot tell: the
    settings within twice the standard error of a difference from the best. The standard deviation
    between training seeds is the table's own, else ``moved_by_seed``, such as the :func:`spread` of
    a longer study. ``rows`` are those of :func:`table` or :func:`read`; raises ``InputError`` for
    none.
    """
    if not rows:
        raise InputError("the table has no rows; run a sweep first.")
    groups = _by_setting(rows, by_subject=False)

    def mean(key: Setting, measure: str) -> float:
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
    means = best_checkpoint.Ratios(**{name: mean(best, name) for name in RATIOS})
    reason += f": {best_checkpoint.describe_ratios(means, mean(best, 'reference_fidelity'))}."
    deviation = spread(rows) or moved_by_seed
    if deviation:
        errors = {key: deviation * math.sqrt(1 / count + 1 / len(own))
                  for key, own in groups.items()}  # fmt: skip
        alike = [key for key in groups if score - mean(key, "score") <= 2 * errors[key]]
        reason += f" Retraining with another seed changes the score by about {deviation:.3f}"
        reason += _cannot_tell(alike, list(groups), best)
    if int(settings["step"]) == max(int(row["step"]) for row in rows):
        reason += " This is the longest training tried, so try more steps too."
    return Recommendation(settings, score, reason)


def _cannot_tell(alike: list[Setting], every: list[Setting], best: Setting) -> str:
    """Go on with what differences within chance leave open, and what they do not."""
    if every == [best]:
        return "."
    if alike == [best]:
        return ", too little to explain the lead over any other setting."
    weights, others = (
        {float(dict(key)["prior_weight"]) for key in keys if "prior_weight" in dict(key)}
        for keys in (alike, every)
    )
    count = len(alike) - 1
    text = f", so {count} other setting{'s' * (count > 1)} may be just as good"
    if len(weights) > 1:
        text += f" (λ can be {_listed(weights, 'or')})"
    if worse := others - weights:
        verb = "is" if len(worse) == 1 else "are"
        text += f"; λ {_listed(worse, 'and')} {verb} worse at every step"
    return text + "."


def _listed(numbers: set[float], word: str) -> str:
    *most, last = map(_short, sorted(numbers))
    return f"{', '.join(most)} {word} {last}" if most else last


def _short(value: Any) -> str:
    """Format a number without needless digits, even one read from a CSV as text."""
    if isinstance(value, bool):  # which float() takes for 1 or 0
        return str(value)
    try:
        return f"{float(value):g}"
    except (TypeError, ValueError):
        return str(value)
