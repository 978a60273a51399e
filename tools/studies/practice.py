"""Train every subject as notebook 01 does by default, and show what each run chose.

docs/studies/notebook-KIND.png  of every subject its photos, the base's images and the chosen step's
OUT/KIND/SUBJECT.png            all validations of a run, to see whether another step is better

A person can compare all steps of a run, as in the notebook: would they choose the same?
"""

import ast
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.core.files import save_png
from dreambooth_lib.core.subject import Subject
from dreambooth_lib.data.images import read_photos
from dreambooth_lib.figures import image_grids
from dreambooth_lib.training import runs
from dreambooth_lib.training.best_checkpoint import best_checkpoint, ratios_of
from dreambooth_lib.training.loop import train
from dreambooth_lib.training.validation_record import history, load_images

NOTEBOOK = Path("notebooks/01_dreambooth.ipynb")
STUDIES = Path("docs/studies")
KINDS = ("full", "lora")


def practice() -> dict[str, int]:
    """Return the notebook's settings for the bundled base, from its source."""
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        for line in "".join(cell["source"]).splitlines():
            if line.startswith("PRACTICE = "):
                settings: dict[str, int] = ast.literal_eval(line.removeprefix("PRACTICE = "))
                return settings
    raise ValueError(f"{NOTEBOOK} has no line that begins with PRACTICE =.")


def run_one(out: Path, kind: str, subject: Subject) -> None:
    """Train one run, or resume it, and draw all of its validations with the chosen one marked."""
    torch.set_num_threads(1)
    run = runs.start_or_resume(
        TrainConfig(subject, method=kind, **practice()), out / kind / subject.name
    )
    for _ in train(run):
        pass
    rows, best = history(run), best_checkpoint(run)
    names = []
    for row in rows:
        mark = " (best)" if row.step == best.step else ""
        own = ratios_of(row, rows[0])
        names.append(f"{row.step}{mark}: likeness {own.likeness:.0%}, class {own.class_kept:.0%}, "
                     f"others {own.others_kept:.0%}")  # fmt: skip
    drawn = [load_images(run, row.step) for row in rows]
    cells = [[images.subject, images.class_images, images.unrelated] for images in drawn]
    columns = ["the subject", "its class", "other prompts"]
    page = image_grids.matrix(names, columns, cells, f"{subject.name}, {kind}")
    save_png(page, out / kind / f"{subject.name}.png")


def write_chosen(out: Path, kind: str, subjects: Sequence[Subject]) -> None:
    """Show what the run of each subject chose, on its own validation images."""
    names, cells = [], []
    for subject in subjects:
        run = runs.resume(out / kind / subject.name)
        step = best_checkpoint(run).step
        base, chosen = load_images(run, 0), load_images(run, step)
        photos = [photo.image.resize(base.subject[0].size) for photo in read_photos(subject.photos)]
        names.append(f"{subject.name}, step {step}")
        cells.append([photos[:2], base.subject[:2], chosen.subject, chosen.class_images[:3]])
    columns = ["photos", "the base", "the subject", "its class"]
    save_png(image_grids.matrix(names, columns, cells), STUDIES / f"notebook-{kind}.png")
