"""Select a run's best checkpoint, and say why in a sentence.

Each validation gives three ratios in [0, 1] (see :func:`ratios`), and their geometric mean is its
score: no ratio can be bought by giving up another, since 1% of one weighs as much as 1% of the
next. The best step has the highest score, the earliest of equals. It lies on the Pareto front: no
other step is at least as good in all three ratios and better in one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dreambooth_lib.core.errors import InputError
from dreambooth_lib.training.runs import Run, RunError
from dreambooth_lib.training.validation_record import ValidationResult, history

Ratios = tuple[float, float, float]

#: How to describe another step whose ratio is higher, and lower.
_CHANGES = (
    ("looks {} more like the subject", "looks {} less like the subject"),
    ("follows the prompt {} better", "follows the prompt {} worse"),
    ("changes {} less of the rest", "changes {} more of the rest"),
)


@dataclass(frozen=True)
class Selection:
    """The best step, its score, and the reason in a sentence."""

    step: int
    score: float
    reason: str
    front: tuple[int, ...]  #: the Pareto front: all steps that no other beats


def ratios(
    subject_fidelity: float,
    reference_fidelity: float,
    prompt_adherence: float,
    base_adherence: float,
    prior_drift: float,
    unrelated_drift: float,
) -> Ratios:
    """Return three ratios, clipped to [0, 1]: how good a model is of what is possible.

    The images' fidelity over that of the photos among themselves, their prompt adherence over the
    base's, and 1 - the mean drift of the class and of the unrelated prompt.
    """
    return (
        _ratio(subject_fidelity, reference_fidelity),
        _ratio(prompt_adherence, base_adherence),
        _ratio(1 - (prior_drift + unrelated_drift) / 2, 1.0),
    )


def ratios_of(row: ValidationResult, base: ValidationResult) -> Ratios:
    """Return the ratios of one validation; ``base`` is the frozen base's."""
    return ratios(
        row.subject_fidelity, row.reference_fidelity, row.prompt_adherence,
        base.prompt_adherence, row.prior_drift, row.unrelated_drift,
    )  # fmt: skip


def overall_score(ratios: Sequence[float]) -> float:
    """Return the geometric mean of the ratios, in [0, 1]."""
    return math.prod(ratios) ** (1 / len(ratios))


def select_best(rows: Sequence[ValidationResult]) -> Selection:
    """Select the best step of a run's validations; the first row is the frozen base's.

    Raises ``InputError`` if there is no other row.
    """
    by_step = {row.step: ratios_of(row, rows[0]) for row in rows[1:] if rows[0].step == 0}
    if not by_step:
        raise InputError(
            "no step was validated yet; train up to the first validation (validate_every)."
        )
    best = max(by_step, key=lambda step: (round(overall_score(by_step[step]), 6), -step))
    front = tuple(
        step for step, own in by_step.items() if not any(_beats(r, own) for r in by_step.values())
    )
    return Selection(best, overall_score(by_step[best]), _reason(best, by_step), front)


def best_checkpoint(run: Run) -> Selection:
    """Select the best step of a run so far; the run keeps its checkpoint.

    Raises :class:`RunError` if no trained step was validated yet.
    """
    rows = history(run)
    if len(rows) < 2:
        raise RunError(
            f"{run.folder} has no validated step to choose from; train it with validate_every "
            "above 0, up to the first validation."
        )
    return select_best(rows)


def _ratio(value: float, reference: float) -> float:
    return min(1.0, max(0.0, value / reference)) if reference > 0 else 1.0


def _beats(a: Ratios, b: Ratios) -> bool:
    """Return whether ``a`` is at least as good in all ratios, and better in one."""
    return a != b and all(x >= y for x, y in zip(a, b, strict=True))


def _reason(best: int, by_step: dict[int, Ratios]) -> str:
    fidelity, adherence, unchanged = by_step[best]
    text = (
        f"Step {best}: its images are {fidelity:.0%} as close to the photos as the photos are to "
        f"each other, follow the prompt {adherence:.0%} as well as the base's, and leave "
        f"{unchanged:.0%} of the rest unchanged."
    )
    last = max(by_step)
    if best == last:
        return text
    changes = list(zip(_CHANGES, by_step[best], by_step[last], strict=True))
    gains = [more.format(f"{b - a:.0%}") for (more, _), a, b in changes if b - a >= 0.005]
    losses = [less.format(f"{a - b:.0%}") for (_, less), a, b in changes if a - b >= 0.005]
    difference = " but ".join(" and ".join(part) for part in (gains, losses) if part)
    return f"{text} Step {last} {difference or 'is hardly different'}."
