"""A study's table, a row a cell and step, and the setting that it recommends."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import fmean
from typing import Any

from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.core.old_names import current_fields
from dreambooth_lib.figures.labels import NAMES
from dreambooth_lib.training import best_checkpoint, runs
from dreambooth_lib.training.validation_record import ValidationResult, history

#: A table's columns after the settings: score by the rule of ``choice``, then what it is of.
MEASURES = ("score", "subject_fidelity", "reference_fidelity", "prompt_adherence",
            "base_adherence", "class_diversity", "base_diversity", "prior_drift", "pres",
            "base_pres", "unrelated_drift")  # fmt: skip
#: Standings closer than this are alike: another seed moves them as much.
ALIKE = 0.01


def table(
    configs: Mapping[str, TrainConfig], folder: str | Path, steps: Sequence[int]
) -> list[dict[str, Any]]:
    """Return a row a cell and step that is there, as ``pandas.DataFrame`` takes them.

    It has λ and what varies among the configs, then the measures.
    """
    # λ is named even where it is one and the same: studies are read by it.
    names = [field.name for field in fields(TrainConfig) if field.name != "subject"]
    varied = [
        name
        for name in names
        if name == "prior_weight" or len({getattr(c, name) for c in configs.values()}) > 1
    ]
    rows = []
    for name, config in configs.items():
        place = Path(folder) / name
        looks = history(runs.resume(place)) if (place / "config.toml").exists() else []
        of_cell = {"cell": name} | {field: getattr(config, field) for field in varied}
        rows += [
            of_cell | {"step": seen.step} | measures(seen, looks[0])
            for seen in looks[1:]
            if seen.step in steps
        ]
    return rows


def measures(seen: ValidationResult, base: ValidationResult) -> dict[str, float]:
    """A look's figures beside the base's, in the order of :data:`MEASURES`."""
    values = (
        best_checkpoint.overall_score(best_checkpoint.ratios_of(seen, base)),
        seen.subject_fidelity, seen.reference_fidelity,
        seen.prompt_adherence, base.prompt_adherence, seen.class_diversity, base.class_diversity,
        seen.prior_drift, seen.pres, base.pres, seen.unrelated_drift,
    )  # fmt: skip
    return dict(zip(MEASURES, values, strict=True))


@dataclass(frozen=True)
class Recommendation:
    """Settings, how they stand, and why."""

    settings: dict[str, Any]
    score: float
    reason: str


def recommend(rows: Sequence[Mapping[str, Any]]) -> Recommendation:
    """Return the setting with the highest score, a mean over seeds; of equals the fewest steps.

    The reason says too where more steps may be better still, and which other values of λ stand as
    high. ``rows`` are of :func:`table` or read back from its CSV; ``ValueError`` for none.
    """
    if not rows:
        raise ValueError("the table has no rows; run a sweep first.")
    rows = [current_fields(row) for row in rows]
    fixed = {"cell", "seed", *MEASURES}
    found: dict[tuple[tuple[str, Any], ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        key = tuple((name, value) for name, value in row.items() if name not in fixed)
        found.setdefault(key, []).append(row)

    def mean(key: tuple[tuple[str, Any], ...], measure: str) -> float:
        return fmean(float(row[measure]) for row in found[key])

    best = max(found, key=lambda key: (round(mean(key, "score"), 6), -int(dict(key)["step"])))
    settings, score = dict(best), mean(best, "score")
    settings_named = [(NAMES[n] if n == "prior_weight" else n, v) for n, v in best]
    stands = ", ".join(f"{name} {_short(value)}" for name, value in settings_named)
    fidelity = mean(best, "subject_fidelity") / mean(best, "reference_fidelity")
    adherence = mean(best, "prompt_adherence") / mean(best, "base_adherence")
    reason = (
        f"{stands} stands highest of {len(found)} settings ({score:.3f}, mean of "
        f"{len(found[best])}): fidelity {fidelity:.0%} of the photos' own, adherence "
        f"{adherence:.0%} of the base's, prior drift {mean(best, 'prior_drift'):.3f}."
    )
    high = [dict(key) for key in found if mean(key, "score") >= (1 - ALIKE) * score]
    weights = {float(key["prior_weight"]) for key in high if "prior_weight" in key}
    if len(weights) > 1:
        *most, last = map(_short, sorted(weights))
        any_of = "either" if len(weights) == 2 else "any"
        reason += f" λ {', '.join(most)} and {last} are within {ALIKE:.0%}: {any_of} will do."
    if int(settings["step"]) == max(int(row["step"]) for row in rows):
        reason += " This is the longest training tried: try more steps before you trust it."
    return Recommendation(settings, score, reason)


def _short(value: Any) -> str:
    """A number without needless digits, also one that a CSV gave as text."""
    try:
        return f"{float(value):g}"
    except (TypeError, ValueError):
        return str(value)
