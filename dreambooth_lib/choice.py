"""Which checkpoint to keep: the rule, its reason in a sentence, and when to stop.

A step is judged by three shares, each at most 1: its subject fidelity of the photos' own among
themselves, its prompt adherence of the frozen base's, and what is left of the rest as it was: 1 -
the mean drift of the class and of an unrelated prompt. Its standing is their geometric mean, so
that none can be bought by giving up another: 1% of one weighs as much as 1% of the next. The best
step has the highest standing, of equals the earliest, and lies on the front: no other step is at
least as good in all three.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from dreambooth_lib.runs import Run, RunError
from dreambooth_lib.watch import Watched, history

PATIENCE = 5  #: looks without a better one before an early stop


@dataclass(frozen=True)
class Choice:
    """A step, how it stands, and why it was taken."""

    step: int
    standing: float
    reason: str
    front: tuple[int, ...]  #: all steps that no other step beats in every share


def shares(
    subject_fidelity: float,
    reference_fidelity: float,
    prompt_adherence: float,
    base_adherence: float,
    prior_drift: float,
    unrelated_drift: float,
) -> tuple[float, float, float]:
    """Fidelity, adherence and the rest kept as shares in [0, 1], as the rule weighs them."""

    def share(value: float, whole: float) -> float:
        return min(1.0, max(0.0, value / whole)) if whole > 0 else 1.0

    return (
        share(subject_fidelity, reference_fidelity),
        share(prompt_adherence, base_adherence),
        share(1 - (prior_drift + unrelated_drift) / 2, 1.0),
    )


def standing(shares: Sequence[float]) -> float:
    """The geometric mean of the shares, in [0, 1]."""
    product = 1.0
    for share in shares:
        product *= share
    return product ** (1 / len(shares))


def best_of(rows: Sequence[Watched]) -> Choice:
    """The best of a run's looks; the first row is the frozen base's and is not eligible.

    Raises ``ValueError`` where there is no other.
    """
    found = {row.step: shares_of(row, rows[0]) for row in rows[1:]}
    if not found:
        raise ValueError("no step was looked at yet; train until the first look (watch_every).")
    best = max(found, key=lambda step: (round(standing(found[step]), 6), -step))
    front = tuple(
        step
        for step, own in found.items()
        if not any(_beats(other, own) for other in found.values())
    )
    fidelity, adherence, kept = found[best]
    text = (
        f"step {best}: its pictures are {fidelity:.0%} as close to the photos as those to each "
        f"other, follow prompts {adherence:.0%} as well as the base's and leave {kept:.0%} of the "
        "rest as it was"
    )
    last = max(found)
    if best != last:
        changes = zip(("fidelity", "adherence", "the rest"), found[best], found[last], strict=True)
        moved = [f"{name} {b - a:+.0%}" for name, a, b in changes if abs(b - a) >= 0.005]
        text += f"; by step {last} that moved ({', '.join(moved) or 'hardly'}), which is no gain"
    return Choice(best, standing(found[best]), f"{text}.", front)


def best_checkpoint(run: Run) -> Choice:
    """The best step of a run so far, by this module's rule, whose checkpoint the run keeps.

    Raises :class:`RunError` where the run was not watched or no look came yet.
    """
    rows = history(run)
    if len(rows) < 2:
        raise RunError(
            f"{run.folder} has no look at a tuned model to choose from; train it with watch_every "
            "above 0, up to the first look."
        )
    return best_of(rows)


def has_peaked(rows: Sequence[Watched], patience: int = PATIENCE) -> bool:
    """Whether the last ``patience`` looks brought no better standing than an earlier one."""
    found = [row.step for row in rows[1:]]
    return len(found) > patience and best_of(rows).step < found[-patience]


def shares_of(row: Watched, base: Watched) -> tuple[float, float, float]:
    """:func:`shares` of one look beside the frozen base's."""
    return shares(
        row.subject_fidelity, row.reference_fidelity, row.prompt_adherence,
        base.prompt_adherence, row.prior_drift, row.unrelated_drift,
    )  # fmt: skip


def _beats(one: Sequence[float], other: Sequence[float]) -> bool:
    """At least as good in all, better in one."""
    pairs = list(zip(one, other, strict=True))
    return all(a >= b for a, b in pairs) and any(a > b for a, b in pairs)
