"""Which checkpoint to keep: the rule, and its reason in words.

A step is judged by three shares, each at most 1 (:func:`likeness`, :func:`adherence` and
:func:`unchanged`). Its standing is their geometric mean, so that none can be bought by giving up
another: 1% of one weighs as much as 1% of the next. The best step has the highest standing, of
equals the earliest, and lies on the front: no other step is at least as good in all three.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dreambooth_lib.runs import Run, RunError
from dreambooth_lib.watch_record import Watched, history

Shares = tuple[float, float, float]

#: What is said of another step's share that is higher, and lower.
_CHANGES = (
    ("looks {} more like the subject", "looks {} less like the subject"),
    ("follows the prompt {} better", "follows the prompt {} worse"),
    ("changes {} less of the rest", "changes {} more of the rest"),
)


@dataclass(frozen=True)
class Choice:
    """A step, how it stands, and why it was taken."""

    step: int
    standing: float
    reason: str
    front: tuple[int, ...]  #: all steps that no other step beats in every share


def likeness(subject_fidelity: float, reference_fidelity: float) -> float:
    """Return how close the images are to the photos, as a share of the photos' own closeness."""
    return _share(subject_fidelity, reference_fidelity)


def adherence(prompt_adherence: float, base_adherence: float) -> float:
    """Return how well the images follow their prompts, as a share of how well the base's do."""
    return _share(prompt_adherence, base_adherence)


def unchanged(prior_drift: float, unrelated_drift: float) -> float:
    """Return how much is left of the rest: 1 - the mean drift of class and unrelated prompt."""
    return _share(1 - (prior_drift + unrelated_drift) / 2, 1.0)


def shares(
    subject_fidelity: float,
    reference_fidelity: float,
    prompt_adherence: float,
    base_adherence: float,
    prior_drift: float,
    unrelated_drift: float,
) -> Shares:
    """Return the three shares in [0, 1], as the rule weighs them."""
    return (
        likeness(subject_fidelity, reference_fidelity),
        adherence(prompt_adherence, base_adherence),
        unchanged(prior_drift, unrelated_drift),
    )


def shares_of(row: Watched, base: Watched) -> Shares:
    """Return the shares of one look beside the frozen base's."""
    return shares(
        row.subject_fidelity, row.reference_fidelity, row.prompt_adherence,
        base.prompt_adherence, row.prior_drift, row.unrelated_drift,
    )  # fmt: skip


def standing(shares: Sequence[float]) -> float:
    """Return the geometric mean of the shares, in [0, 1]."""
    return math.prod(shares) ** (1 / len(shares))


def best_of(rows: Sequence[Watched]) -> Choice:
    """Return the best of a run's looks; the first row, the frozen base's, is not eligible.

    Raises ``ValueError`` where there is no other.
    """
    found = {row.step: shares_of(row, rows[0]) for row in rows[1:]}
    if not found:
        raise ValueError("no step was looked at yet; train until the first look (watch_every).")
    best = max(found, key=lambda step: (round(standing(found[step]), 6), -step))
    every = found.values()
    front = tuple(step for step, own in found.items() if not any(_beats(it, own) for it in every))
    return Choice(best, standing(found[best]), _reason(best, found), front)


def best_checkpoint(run: Run) -> Choice:
    """Return the best step of a run so far, whose checkpoint the run keeps.

    Raises :class:`RunError` where the run was not watched or no look came yet.
    """
    rows = history(run)
    if len(rows) < 2:
        raise RunError(
            f"{run.folder} has no look at a tuned model to choose from; train it with watch_every "
            "above 0, up to the first look."
        )
    return best_of(rows)


def _share(value: float, whole: float) -> float:
    return min(1.0, max(0.0, value / whole)) if whole > 0 else 1.0


def _beats(one: Shares, other: Shares) -> bool:
    """Return whether ``one`` is at least as good in all shares, and better in one."""
    return one != other and all(a >= b for a, b in zip(one, other, strict=True))


def _reason(best: int, found: dict[int, Shares]) -> str:
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
