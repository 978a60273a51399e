"""Compare an adaptive λ with fixed ones, from a bank of images."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dreambooth_lib.core.checked_json import read_rows
from dreambooth_lib.training.best_checkpoint import ratios_of
from dreambooth_lib.training.validation_record import ValidationResult
from tools.studies import bank, trust
from tools.studies.intervals import interval


def keep_table(rows: trust.Rows, folder: Path, step: int = trust.LAST_BY_DEFAULT) -> list[str]:
    """Return a row for each share of the class that was asked for.

    Columns: the share that the run itself measured at ``step``, its mean λ until then, likeness and
    class kept by the images, and how much likeness it has above that of fixed λ where these keep as
    much of the class (linear between them), paired by subject and seed.
    """
    lines = [
        "| asked for | runs | kept, of held-out loss | mean λ | likeness | class kept, by images "
        "| likeness above fixed λ |",
        "|---|---|---|---|---|---|---|",
    ]
    for share in bank.SHARES:
        found: dict[str, list[float]] = {name: [] for name in ("own", "λ", "like", "kept", "more")}
        for cell, results in sorted(rows["exhaustive"].items()):
            if cell.kind != f"keep-{share:g}":
                continue
            place = folder / cell.kind / cell.subject / f"seed{cell.seed}"
            log = [row for row in read_rows(place / "log.jsonl").rows
                   if "class_kept" in row and row["step"] <= step]  # fmt: skip
            likeness, kept = _at(results, step)
            found["own"].append(log[-1]["class_kept"])
            found["λ"].append(float(np.mean([row["prior_weight"] for row in log])))
            found["like"].append(likeness)
            found["kept"].append(kept)
            fixed = sorted(_at(judged, step)[::-1] for other, judged in rows["exhaustive"].items()
                           if other[1:] == cell[1:] and other.kind in _FIXED)  # fmt: skip
            found["more"].append(likeness - float(np.interp(kept, *zip(*fixed, strict=True))))
        if found["own"]:
            values = " | ".join(interval(own, ".2f") for own in found.values())
            lines.append(f"| {share:.0%} | {len(found['own'])} | {values} |")
    return lines


_FIXED = {"full", *(f"lambda-{weight:g}" for weight in bank.LAMBDAS)}


def _at(results: Sequence[ValidationResult], step: int) -> tuple[float, float]:
    """Return likeness and class kept at a step, as ratios."""
    (row,) = (result for result in results if result.step == step)
    ratios = ratios_of(row, results[0])
    return ratios.likeness, ratios.class_kept
