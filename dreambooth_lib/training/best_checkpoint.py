"""Which checkpoint to keep: the rule, and its reason in words.

A step is judged by three shares, each at most 1 (:func:`likeness`, :func:`adherence` and
:func:`unchanged`). Its score is their geometric mean, so that none can be bought by giving up
another: 1% of one weighs as much as 1% of the next. The best step has the highest score, of
equals the earliest, and lies on the front: no other step is at least as good in all three.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dreambooth_lib.training.runs import Run, RunError
from dreambooth_lib.training.validation_record import ValidationResult, history

Ratios = tuple[float, float, float]

#: What is said of another step's share that is higher, and lower.
_CHANGES = (
    ("looks {} more like the subject", "looks {} less like the subject"),
    ("follows the prompt {} better", "follows the prompt {} worse"),
    ("changes {} less of the rest", "changes {} more of the rest"),
)


@dataclass(frozen=True)
class Selection:
    """A step, how it stands, and why it was taken."""

    step: int
    score: float
    reason: str
    front: tuple[int, ...]  #: all steps that no other step beats in every share


def likeness(subject_fidelity: float, reference_fidelity: float) -> float:
    """Return how close the images are to the photos, as a share of the photos' own closeness."""
    return _ratio(subject_fidelity, reference_fidelity)


def adherence(prompt_adherence: float, base_adherence: float) -> float:
    """Return how well the images follow their prompts, as a share of how well the base's do."""
    return _ratio(prompt_adherence, base_adherence)


def unchanged(prior_drift: float, unrelated_drift: float) -> float:
    """Return how much is left of the rest: 1 - the mean drift of class and unrelated prompt."""
    return _ratio(1 - (prior_drift + unrelated_drift) / 2, 1.0)


def ratios(
    subject_fidelity: float,
    reference_fidelity: float,
    prompt_adherence: float,
    base_adherence: float,
    prior_drift: float,
    unrelated_drift: float,
) -> Ratios:
    """Return the three shares in [0, 1], as the rule weighs them."""
    return (
        likeness(subject_fidelity, reference_fidelity),
        adherence(prompt_adherence, base_adherence),
        unchanged(prior_drift, unrelated_drift),
    )


def ratios_of(row: ValidationResult, base: ValidationResult) -> Ratios:
    """Return the shares of one look beside the frozen base's."""
    return ratios(
        row.subject_fidelity, row.reference_fidelity, row.prompt_adherence,
        base.prompt_adherence, row.prior_drift, row.unrelated_drift,
    )  # fmt: skip


def overall_score(shares: Sequence[float]) -> float:
    """Return the geometric mean of the shares, in [0, 1]."""
    return math.prod(shares) ** (1 / len(shares))


def select_best(rows: Sequence[ValidationResult]) -> Selection:
    """Return the best of a run's looks; the first row, the frozen base's, is not eligible.

    Raises ``ValueError`` where there is no other.
    """
    found = {row.step: ratios_of(row, rows[0]) for row in rows[1:]}
    if not found:
        raise ValueError("no step was looked at yet; train until the first look (validate_every).")
    best = max(found, key=lambda step: (round(overall_score(found[step]), 6), -step))
    every = found.values()
    front = tuple(step for step, own in found.items() if not any(_beats(it, own) for it in every))
    return Selection(best, overall_score(found[best]), _reason(best, found), front)


def best_checkpoint(run: Run) -> Selection:
    """Return the best step of a run so far, whose checkpoint the run keeps.

    Raises :class:`RunError` where the run was not validation or no look came yet.
    """
    rows = history(run)
    if len(rows) < 2:
        raise RunError(
            f"{run.folder} has no validation of a trained model to choose from; train it with "
            "validate_every above 0, up to the first validation."
        )
    return select_best(rows)


def _ratio(value: float, whole: float) -> float:
    return min(1.0, max(0.0, value / whole)) if whole > 0 else 1.0


def _beats(one: Ratios, other: Ratios) -> bool:
    """Return whether ``one`` is at least as good in all shares, and better in one."""
    return one != other and all(a >= b for a, b in zip(one, other, strict=True))


def _reason(best: int, found: dict[int, Ratios]) -> str:
    like, follows, rest = found[best]
    text = (
        f"Step {best}: its images are {like:.0%} as close to the photos as the photos are to each "
        f"other, follow the prompt {follows:.0%} as well as the base's, and leave {rest:.0%} of "
        "the rest unchanged."
    )
    last = max(found)
    if best == last:
        return text
    changes = list(zip(_CHANGES, found[best], found[last], strict=True))
    gains = [more.format(f"{b - a:.0%}") for (more, _), a, b in changes if b - a >= 0.005]
    losses = [less.format(f"{a - b:.0%}") for (_, less), a, b in changes if a - b >= 0.005]
    said = " but ".join(" and ".join(part) for part in (gains, losses) if part)
    return f"{text} Step {last} {said or 'is hardly different'}."
