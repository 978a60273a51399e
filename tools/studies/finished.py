"""Write the finished study of λ that notebook 02 shows, from a bank of images.

data/studies/SUBJECT.csv   a row for each λ, seed and step, scored by the exhaustive plan
data/studies/SUBJECT.png   two images of the subject and one of its class for each λ and step
"""

from pathlib import Path
from typing import Any

from dreambooth_lib.core.config import Subject
from dreambooth_lib.core.files import replace_file, save_png
from dreambooth_lib.evaluation import sweep_table
from dreambooth_lib.evaluation.tables import to_csv
from dreambooth_lib.families import loading
from dreambooth_lib.figures import image_grids
from tools.studies import bank, trust

FOLDER = loading.BUNDLED / "studies"


def write(folder: Path, rows: trust.Rows, subject: Subject) -> None:
    """Write both files of a subject whose runs with every λ are in the bank."""
    table = lambda_table(rows, subject.name)
    replace_file(FOLDER / f"{subject.name}.csv", to_csv(table).encode())
    weights = sorted({row["prior_weight"] for row in table})
    steps = sorted({row["step"] for row in table})
    cells = []
    for weight in weights:
        place = folder / kind_of(weight) / subject.name / "seed0"
        drawn = [bank.load(place / f"{step:06d}.npz", subject)["exhaustive"] for step in steps]
        # Of three seeds for each of four prompts the first, of two prompts.
        cells.append([images.subject[:6:3] + images.class_images[:1] for images in drawn])
    names = [f"λ {weight:g}" for weight in weights], [f"step {step}" for step in steps]
    save_png(image_grids.matrix(*names, cells), FOLDER / f"{subject.name}.png")


def lambda_table(rows: trust.Rows, subject: str) -> list[dict[str, Any]]:
    """Return a row for each λ, seed and step, with the columns of a sweep's table."""
    table = []
    for cell, (base, *results) in sorted(rows["exhaustive"].items()):
        if cell.subject == subject and cell.kind in map(kind_of, (*bank.LAMBDAS, 1.0)):
            weight = 1.0 if cell.kind == "full" else float(cell.kind.removeprefix("lambda-"))
            where = {"cell": f"{cell.kind}-seed{cell.seed}", "prior_weight": weight,
                     "seed": cell.seed}  # fmt: skip
            table += [where | {"step": result.step} | sweep_table.measures(result, base)
                      for result in results]  # fmt: skip
    return [{name: round(v, 4) if isinstance(v, float) else v for name, v in row.items()}
            for row in table]  # fmt: skip


def kind_of(weight: float) -> str:
    """Return the kind of the bank's runs with a λ."""
    return "full" if weight == 1 else f"lambda-{weight:g}"
