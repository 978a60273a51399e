"""Write the finished study of λ that notebook 02 shows, from a bank of images.

data/studies/SUBJECT.csv      a row for each λ, seed and step, scored by the exhaustive plan
data/studies/SUBJECT.png      two images of the subject and one of its class for each λ and step
docs/readme.png               a subject's photos, the base's images, and those after training
"""

from pathlib import Path
from typing import Any

from PIL import Image

from dreambooth_lib.core.files import replace_file, save_png
from dreambooth_lib.core.subject import Subject
from dreambooth_lib.data.images import read_photos
from dreambooth_lib.evaluation import sweep_table
from dreambooth_lib.evaluation.tables import to_csv
from dreambooth_lib.families import loading
from dreambooth_lib.figures import image_grids
from tools.studies import bank, trust

FOLDER = loading.BUNDLED / "studies"
README = Path("docs/readme.png")


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


def write_readme(folder: Path, subject: Subject) -> None:
    """Show what training does to the subject, its class and other things, with no prior too."""
    places = ["base/{}/000000.npz", "full/{}/seed0/000500.npz", "lambda-0/{}/seed0/000500.npz"]
    cells = []
    for place in places:
        drawn = bank.load(folder / place.format(subject.name), subject)["exhaustive"]
        cells.append([drawn.subject[:9:3], drawn.class_images[1:4], drawn.unrelated[:12:4]])
    size = cells[0][0][0].size
    photos = [photo.image.resize(size) for photo in read_photos(subject)]
    nothing = [Image.new("RGB", size, "white")]
    names = ["the photos", "before training", "after training", "... without prior\npreservation"]
    columns = [f'"a {subject.token}" in three scenes', f'"{subject.class_prompt}"', "other prompts"]
    rows = [[photos[:3], nothing, nothing], *cells]
    save_png(image_grids.matrix(names, columns, rows), README)


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
