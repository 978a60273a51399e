"""Measure how far a validation can be trusted: its noise, and the checkpoints that it chooses.

Everything is computed from ``docs/studies/validations.jsonl``: a row for each checkpoint of the
bank (:mod:`tools.studies.bank`) and plan, with the scores of its images. ``score_bank`` makes it.
"""

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.core.files import replace_file
from dreambooth_lib.data.images import read_photos
from dreambooth_lib.metrics import clip_scores
from dreambooth_lib.training import best_checkpoint, validation
from dreambooth_lib.training.best_checkpoint import ratios_of
from dreambooth_lib.training.validation_record import ValidationResult
from tools.studies import bank
from tools.studies.intervals import interval

ROWS = Path("docs/studies/validations.jsonl")
LAST_BY_DEFAULT = 500  # the default's steps; auto goes on


class Cell(NamedTuple):
    """A run of the bank."""

    kind: str
    subject: str
    seed: int


#: plan -> run -> its validations, the base's first
Rows = dict[str, dict[Cell, list[ValidationResult]]]


def score_bank(folder: Path, file: Path = ROWS) -> None:
    """Score every image of a bank with the bundled judge, and write a row for each validation.

    The file's rows of other runs stay, so that a bank can be filled on several machines: all by
    the same judge, since the rows do not say by which.
    """
    lines, scored = [], set()
    for subject in bank.subjects().values():
        base_file = folder / "base" / subject.name / "000000.npz"
        if not base_file.exists():
            continue
        scorers = validation.load_scorers(TrainConfig(subject))
        encoder = scorers.images
        photos = encoder.embed_images([photo.image for photo in read_photos(subject.photos)])
        ceiling = clip_scores.reference_fidelity(photos)
        of_base = bank.load(base_file, subject)
        base = {name: validation.BaseEmbeddings(encoder, own) for name, own in of_base.items()}
        files = sorted(folder.glob(f"*/{subject.name}/seed*/*.npz"))
        for file_of in [base_file, *files]:
            kind, seed = ("base", -1)
            if file_of != base_file:
                kind, seed = file_of.parts[-4], int(file_of.parts[-2].removeprefix("seed"))
            scored.add((kind, subject.name, seed))
            for plan, images in bank.load(file_of, subject).items():
                scores = validation.score_images(scorers, photos, subject, images, base[plan])
                row = ValidationResult(int(file_of.stem), reference_fidelity=ceiling, held_out={},
                                       seconds=0.0, **scores)  # fmt: skip
                where = {"kind": kind, "subject": subject.name, "seed": seed, "plan": plan}
                lines.append(json.dumps(where | _rounded(asdict(row))))
    before = file.read_text().splitlines() if file.exists() else []
    kept = [line for line in before if _run_of(line) not in scored]
    replace_file(file, ("\n".join(kept + lines) + "\n").encode())


def scored_steps(file: Path) -> defaultdict[tuple[str, str, int], set[int]]:
    """Return the steps that have rows, by kind, subject and seed."""
    steps: dict[tuple[str, str, int], set[int]] = defaultdict(set)
    for line in file.read_text().splitlines() if file.exists() else ():
        steps[_run_of(line)].add(json.loads(line)["step"])
    return steps


def _run_of(line: str) -> tuple[str, str, int]:
    fields = json.loads(line)
    return fields["kind"], fields["subject"], fields["seed"]


def _rounded(value: object) -> object:
    """Return a row with numbers of four digits after the point."""
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_rounded(one) for one in value]
    return round(value, 4) if isinstance(value, float) else value


def read_rows(file: Path = ROWS) -> Rows:
    """Read what :func:`score_bank` wrote."""
    rows: Rows = defaultdict(lambda: defaultdict(list))
    base: dict[tuple[str, str], ValidationResult] = {}
    for line in file.read_text().splitlines():
        fields = json.loads(line)
        kind, subject, seed, plan = (fields.pop(n) for n in ("kind", "subject", "seed", "plan"))
        result = ValidationResult(**fields)
        if kind == "base":
            base[subject, plan] = result
        else:
            rows[plan][Cell(kind, subject, seed)].append(result)
    for plan, cells in rows.items():
        for cell, results in cells.items():
            results.sort(key=lambda result: result.step)
            results.insert(0, base[cell.subject, plan])
    return rows


# Noise: two sets of images of the same weights, on different seeds


def as_before(row: ValidationResult) -> ValidationResult:
    """Return a validation with the eight images of earlier versions: one unrelated prompt."""
    few = {"subject_fidelity": 4, "prompt_adherence": 4, "prior_drift": 3, "unrelated_drift": 1}
    values = {name: row.by_image[name][:count] for name, count in few.items()}
    return replace(row, by_image=values, **{name: fmean(own) for name, own in values.items()})


def noise(rows: Rows, kinds: Sequence[str] = ("full", "lora")) -> list[str]:
    """Return a table of how far two validations of the same weights differ, for each measure.

    Columns: the standard deviation between seeds of one validation, by the eight images of before
    and by those of today, and of a difference between two steps, where seeds are common.
    """
    measures: dict[str, Callable[[ValidationResult, ValidationResult], float]] = {
        "likeness": lambda row, base: ratios_of(row, base).likeness,
        "adherence": lambda row, base: ratios_of(row, base).adherence,
        "class kept": lambda row, base: ratios_of(row, base).class_kept,
        "other prompts kept": lambda row, base: ratios_of(row, base).others_kept,
        "score": lambda row, base: ratios_of(row, base).score,
    }
    lines = [
        "| | eight images | eighteen images | a difference of two steps |",
        "|---|---|---|---|",
    ]
    for name, measure in measures.items():
        found: dict[str, list[float]] = defaultdict(list)
        for cell, one in rows["validation"].items():
            if cell.kind not in kinds:
                continue
            other = rows["again"][cell]
            now = [measure(a, one[0]) - measure(b, other[0]) for a, b in _pairs(one, other)]
            old = [
                measure(as_before(a), as_before(one[0]))
                - measure(as_before(b), as_before(other[0]))
                for a, b in _pairs(one, other)
            ]
            found["old"] += old
            found["now"] += now
            found["step"] += [b - a for a, b in pairwise(now)]
        cells = [f"{_spread(found[key]):.3f}" for key in ("old", "now", "step")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _pairs(
    one: Sequence[ValidationResult], other: Sequence[ValidationResult]
) -> Iterable[tuple[ValidationResult, ValidationResult]]:
    return zip(one[1:], other[1:], strict=True)


def _spread(differences: Sequence[float]) -> float:
    """Return the standard deviation of one of two that differ by so much."""
    return math.sqrt(fmean(d * d for d in differences) / 2)


# The choice: what a run's own validations choose, judged by more images on other seeds


class Choice(NamedTuple):
    """Say what a run chose, and how good that is of what it could have chosen."""

    step: int
    best: int
    share: float  #: of the best score
    rising_share: float  #: the same, where likeness never falls from one step to the next


def scores(judged: Sequence[ValidationResult], rising: bool = False) -> dict[int, float]:
    """Return a run's scores by step, of its own likeness or of the rising curve that fits it."""
    rows = best_checkpoint.rising_likeness(judged[1:]) if rising else judged[1:]
    return {row.step: ratios_of(row, judged[0]).score for row in rows}


def choose(own: Sequence[ValidationResult], judged: Sequence[ValidationResult]) -> Choice:
    """Choose among a run's steps by its own validations; judge it by the exhaustive ones."""
    step = best_checkpoint.select_best(own).step
    plain, rising = scores(judged), scores(judged, rising=True)
    best = max(plain, key=lambda each: plain[each])
    return Choice(step, best, plain[step] / plain[best], rising[step] / max(rising.values()))


def up_to(rows: Sequence[ValidationResult], last: int) -> list[ValidationResult]:
    return [row for row in rows if row.step <= last]


def choices(rows: Rows, kind: str, last: int) -> dict[str, list[Choice]]:
    """Return the choices of all seeds by subject, of runs of one kind that end at step ``last``."""
    found: dict[str, list[Choice]] = defaultdict(list)
    for cell, own in sorted(rows["validation"].items()):
        if cell.kind == kind:
            judged = rows["exhaustive"][cell]
            found[cell.subject].append(choose(up_to(own, last), up_to(judged, last)))
    return found


def choice_table(rows: Rows, kind: str, last: int) -> list[str]:
    """Return a table of how good the chosen checkpoints are, by subject, and of all together."""
    found = choices(rows, kind, last)
    lines = [
        "| subject | chosen steps | best steps | of the best score | worst "
        "| by rising likeness | worst |",
        "|---|---|---|---|---|---|---|",
    ]
    every = [choice for own in found.values() for choice in own]
    for subject, own in [*found.items(), ("all", every)]:
        steps = [_listed([c.step for c in own]), _listed([c.best for c in own])]
        shares, rising = [c.share for c in own], [c.rising_share for c in own]
        if subject == "all":
            within = [sum(share >= 0.98 for share in each) for each in (shares, rising)]
            steps = ["", f"within 2%: {within[0]} and {within[1]} of {len(own)}"]
        cells = [cell for each in (shares, rising) for cell in _mean_and_worst(each)]
        lines.append(f"| {subject} | {' | '.join([*steps, *cells])} |")
    return lines


def _mean_and_worst(shares: Sequence[float]) -> tuple[str, str]:
    return interval(shares, ".3f"), f"{min(shares):.3f}"


def auto_table(rows: Rows) -> list[str]:
    """Return a table of ``TrainConfig.auto`` beside the best of the grid of λ and steps."""
    lines = ["| subject | auto | best of the grid | of the best | worst |", "|---|---|---|---|---|"]
    every = []
    for subject in dict.fromkeys(cell.subject for cell in rows["validation"]):
        shares, chosen, bests = [], [], []
        for cell, own in rows["validation"].items():
            if cell.kind != "full" or cell.subject != subject:
                continue
            grid = {
                (other.kind, step): score
                for other, judged in rows["exhaustive"].items()
                if other[1:] == cell[1:] and (other.kind == "full" or "lambda" in other.kind)
                for step, score in scores(judged).items()
            }
            step = best_checkpoint.select_best(own).step
            best = max(grid, key=lambda key: grid[key])
            shares.append(grid["full", step] / grid[best])
            chosen.append(step)
            bests.append(f"{best[0].replace('full', 'λ 1').replace('lambda-', 'λ ')}, {best[1]}")
        every += shares
        cells = [f"λ 1, {_listed(chosen)}", _listed(bests), *_mean_and_worst(shares)]
        lines.append(f"| {subject} | {' | '.join(cells)} |")
    within = sum(share >= 0.98 for share in every)
    cells = [f"within 2%: {within} of {len(every)}", *_mean_and_worst(every)]
    lines.append(f"| all | | {' | '.join(cells)} |")
    return lines


def _listed(values: Iterable[object]) -> str:
    return ", ".join(map(str, values))
