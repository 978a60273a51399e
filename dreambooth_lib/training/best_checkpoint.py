"""Select a run's best checkpoint, and say in words what it learnt and what it kept.

Each validation gives four ratios in [0, 1] (:class:`Ratios`). Its score is the geometric mean of
likeness, prompt adherence and what is kept: no ratio can be bought by giving up another. Scores of
a few images are noisy. All validations generate the same prompts from the same seeds, so two steps
are compared image by image: their scores differ only if the difference is larger than its standard
error (:func:`difference`).

Likeness rises with training, and its falls are mostly noise. In 115 pairs of images from two steps
of a run, one was judged to show the subject more clearly: it was the later one in 113, and the one
with the higher likeness in 100 (docs/studies). So steps are compared by the rising curve that fits
their likeness best (:func:`rising_likeness`), and of steps that do not differ the last is best.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import stdev

from dreambooth_lib.core.checked_json import read_object
from dreambooth_lib.core.errors import InputError
from dreambooth_lib.training.runs import Run, RunError
from dreambooth_lib.training.validation_record import ValidationResult, history
from dreambooth_lib.training.verdict import Verdict, verdict

#: In a run's folder: the step that a person chose, and the run's last validated step then.
CHOSEN_FILE = "chosen_checkpoint.json"
_CLEARLY = 2  #: a likeness that is lower by more standard errors than these is no noise
#: A highest score after this share of the steps so far means that more steps may help.
STILL_LEARNING = 2 / 3


@dataclass(frozen=True)
class Ratios:
    """Say how good a model's images are of what is possible, from 0 to 1."""

    #: to the photos: 0 is the base's, 1 is that of the photos to each other, or of one to itself
    likeness: float
    adherence: float  #: to the prompts, over the base's
    class_kept: float  #: 1 - the drift of the class images
    others_kept: float  #: 1 - the mean drift of the unrelated prompts' images

    @property
    def score(self) -> float:
        """Return the geometric mean of likeness, adherence and the mean of both kept shares."""
        kept = (self.class_kept + self.others_kept) / 2
        return (self.likeness * self.adherence * kept) ** (1 / 3)


@dataclass(frozen=True)
class Selection:
    """The best step, its score, the verdict on it, and the reason in sentences."""

    step: int
    score: float
    verdict: Verdict
    reason: str
    better_than_base: bool  #: whether its images are more like the photos than the base's


def ratios(
    subject_fidelity: float,
    base_fidelity: float,
    reference_fidelity: float,
    prompt_adherence: float,
    base_adherence: float,
    prior_drift: float,
    unrelated_drift: float,
) -> Ratios:
    """Return the ratios of some scores, clipped to [0, 1].

    Where the base's images are as like the photos as these are to each other, all images are.
    """
    possible = reference_fidelity - base_fidelity
    return Ratios(
        _clip((subject_fidelity - base_fidelity) / possible) if possible > 0 else 1.0,
        _clip(prompt_adherence / base_adherence) if base_adherence > 0 else 1.0,
        _clip(1 - prior_drift),
        _clip(1 - unrelated_drift),
    )


def ratios_of(row: ValidationResult, base: ValidationResult) -> Ratios:
    """Return the ratios of one validation; ``base`` is the frozen base's."""
    return ratios(
        row.subject_fidelity, base.subject_fidelity, row.reference_fidelity,
        row.prompt_adherence, base.prompt_adherence, row.prior_drift, row.unrelated_drift,
    )  # fmt: skip


def difference(
    row: ValidationResult, other: ValidationResult, base: ValidationResult
) -> tuple[float, float]:
    """Return how much higher a validation's score is than another's, and its standard error.

    Both in shares of the score. The error is that of the mean differences image by image, to first
    order; 0 where the images' own values are missing.
    """
    one, two = ratios_of(row, base), ratios_of(other, base)
    if min(one.score, two.score) == 0:
        return math.copysign(math.inf, one.score - two.score) if one.score != two.score else 0.0, 0
    kept = (one.class_kept + one.others_kept + two.class_kept + two.others_kept) / 2
    likeness = (one.likeness + two.likeness) / 2
    sizes = {  # a change of a measure, over three times its size, is the change of the log score
        "subject_fidelity": likeness * (row.reference_fidelity - base.subject_fidelity),
        "prompt_adherence": (row.prompt_adherence + other.prompt_adherence) / 2,
        "prior_drift": kept,
        "unrelated_drift": kept,
    }
    errors = [
        _standard_error(row.by_image.get(name, []), other.by_image.get(name, [])) / (3 * size)
        for name, size in sizes.items()
        if size > 0  # a measure that is at its limit changes nothing
    ]
    return math.log(one.score / two.score), math.hypot(*errors)


def rising_likeness(rows: Sequence[ValidationResult]) -> list[ValidationResult]:
    """Return a run's validations, in order, with a likeness to the photos that never falls.

    It is the least squares fit: neighbours that fall are averaged until none does (the
    pool-adjacent-violators algorithm of isotonic regression).
    """
    pools: list[tuple[float, int]] = []  # of neighbours: the sum of their likeness, and how many
    for row in rows:
        total, count = row.subject_fidelity, 1
        while pools and pools[-1][0] / pools[-1][1] > total / count:
            before, more = pools.pop()
            total, count = before + total, more + count
        pools.append((total, count))
    fitted = [total / count for total, count in pools for _ in range(count)]
    return [replace(row, subject_fidelity=own) for row, own in zip(rows, fitted, strict=True)]


def highest_score(rows: Sequence[ValidationResult]) -> ValidationResult:
    """Return the first validation with the highest score, by a likeness that never falls.

    The first row is the frozen base's, and at least one other follows.
    """
    return _highest(rising_likeness(rows[1:]), rows[0])


def sound_likeness(rows: Sequence[ValidationResult], at: int) -> float:
    """Return the likeness ratio of ``rows[at]`` by the rising curve; ``rows[0]`` is the base's.

    A fall that lasts to the end of the run is no noise, so the curve leaves it out.
    """
    end = max(i for i in range(at, len(rows)) if i == at or not _falls(rows[i], rows[at], rows[0]))
    return ratios_of(rising_likeness(rows[1 : end + 1])[at - 1], rows[0]).likeness


def select_best(rows: Sequence[ValidationResult]) -> Selection:
    """Select the best step of a run's validations; the first row is the frozen base's.

    It is the last step whose score does not differ from the highest one, and whose own likeness is
    not clearly lower than that of any best step before it. A later validation never brings back an
    earlier step, so a run may delete the others' checkpoints. Raises ``InputError`` if there is no
    other row.
    """
    if len(rows) < 2 or rows[0].step != 0:
        raise InputError(
            "no step was validated yet; train up to the first validation (validate_every)."
        )
    base, at, most_like = rows[0], 1, rows[1]
    for index, row in enumerate(rows[2:], 2):
        fitted = rising_likeness(rows[1 : index + 1])
        is_lower = _is_lower(fitted[-1], _highest(fitted, base), base)
        if not (is_lower or _falls(row, most_like, base)):
            at, most_like = index, max(most_like, row, key=lambda each: each.subject_fidelity)
    best = rows[at]
    own = ratios_of(best, base)
    judged = verdict(
        own,
        leakage(best, base),
        still_learning=highest_score(rows).step >= STILL_LEARNING * rows[-1].step,
        has_ceiling=best.reference_fidelity < 1,
        likeness=sound_likeness(rows, at),
    )
    better = own.likeness > 0
    return Selection(best.step, own.score, judged, _reason(best, rows), better)


def best_checkpoint(run: Run) -> Selection:
    """Select the best step of a run so far; the run keeps its checkpoint.

    Raises :class:`RunError` if no trained step was validated yet.
    """
    rows = history(run)
    if len(rows) < 2:
        every = run.config.validate_every
        fix = (
            f"train it further, as its first validation comes at step {every}."
            if every
            else "train a run with validate_every above 0."
        )
        raise RunError(f"{run.folder} has no validated step to choose from yet; {fix}")
    return select_best(rows)


def chosen_step(run: Run) -> int | None:
    """Return the step that a person chose, if its weights are there and no validation is newer.

    Otherwise a model that was saved from it would be saved again from the best step.
    """
    known = read_object(run.folder / CHOSEN_FILE) or {}
    step = known.get("step")
    is_current = known.get("last") == max((row.step for row in history(run)), default=None)
    is_saved = isinstance(step, int) and step in run.checkpoints()
    return step if is_current and is_saved else None


def _reason(best: ValidationResult, rows: Sequence[ValidationResult]) -> str:
    own, last = ratios_of(best, rows[0]), rows[-1]
    if own.likeness == 0:
        return (
            f"No step is better than the base: at step {best.step} the images are no more like the "
            "photos than before training."
        )
    reason = f"Step {best.step}: {describe_ratios(own, best.reference_fidelity)}."
    return reason if best is last else f"{reason} {_comparison(last, best, rows[0])}"


def describe_ratios(own: Ratios, reference_fidelity: float) -> str:
    """Write the ratios as the second half of a sentence, without a full stop."""
    best = "as alike as the photos are" if reference_fidelity < 1 else "a copy of the photo"
    return (
        f"likeness to the photos {own.likeness:.0%} (0% is the base, 100% {best}), prompt "
        f"adherence {own.adherence:.0%} (100% is the base), class kept {own.class_kept:.0%}, other "
        f"prompts kept {own.others_kept:.0%}"
    )


def leakage(row: ValidationResult, base: ValidationResult) -> float:
    """Return how far class images came to look like the subject: 0 as the base's, 1 as the photos.

    It is negative where they look less like it than the base's.
    """
    possible = row.reference_fidelity - base.pres
    return (row.pres - base.pres) / possible if possible > 0 else 0.0


def _comparison(last: ValidationResult, best: ValidationResult, base: ValidationResult) -> str:
    """Say how the last step's ratios differ from the best one's, in a sentence."""
    after, before = ratios_of(last, base), ratios_of(best, base)
    changes = {
        "likeness": after.likeness - before.likeness,
        "prompt adherence": after.adherence - before.adherence,
        "class kept": after.class_kept - before.class_kept,
        "other prompts kept": after.others_kept - before.others_kept,
    }
    parts = [f"{name} {gain:+.0f}" for name, share in changes.items() if round(gain := 100 * share)]
    told = f"{', '.join(parts)} percentage points" if parts else "hardly any difference"
    return f"Step {last.step}, compared with it: {told}."


def _highest(rows: Sequence[ValidationResult], base: ValidationResult) -> ValidationResult:
    return max(rows, key=lambda row: ratios_of(row, base).score)


def _is_lower(row: ValidationResult, other: ValidationResult, base: ValidationResult) -> bool:
    gain, error = difference(row, other, base)
    return gain < -error


def _falls(row: ValidationResult, other: ValidationResult, base: ValidationResult) -> bool:
    """Say whether a step's images are less like the photos than another's by more than chance."""
    own, others = (each.by_image.get("subject_fidelity", []) for each in (row, other))
    fall = other.subject_fidelity - row.subject_fidelity
    is_lost = ratios_of(row, base).likeness == 0 < ratios_of(other, base).likeness
    return is_lost or fall > _CLEARLY * _standard_error(own, others)


def _clip(value: float) -> float:
    return min(1.0, max(0.0, value))


def _standard_error(values: Sequence[float], others: Sequence[float]) -> float:
    """Return the standard error of the mean of paired differences; 0 for fewer than two pairs."""
    if len(values) != len(others) or len(values) < 2:
        return 0.0
    differences = [a - b for a, b in zip(values, others, strict=True)]
    return stdev(differences) / math.sqrt(len(differences))
