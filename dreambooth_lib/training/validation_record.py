"""What a run keeps of its looks: the images of each and what was measured of them.

RUN/validation.jsonl              a row a look, step 0 being the frozen base
RUN/validation/000100/...png      its pictures: subject-0.png, class-0.png, unrelated-0.png
RUN/validation/plan.json          what is drawn at each
"""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image

from dreambooth_lib.core.files import replace_file, save_png
from dreambooth_lib.core.old_names import current_fields, locate
from dreambooth_lib.families.base import Family
from dreambooth_lib.metrics import clip_scores
from dreambooth_lib.metrics.encoders import Encoder
from dreambooth_lib.training.held_out_loss import HeldOutLoss
from dreambooth_lib.training.runs import Run, RunError
from dreambooth_lib.training.trainable import Trainable
from dreambooth_lib.training.validation import (
    PROMPTS,
    ValidationImages,
    ValidationPlan,
    draw_images,
    fill_prompt,
    plan_for,
    score_images,
)


@dataclass(frozen=True)
class ValidationResult:
    """What one look found; measures as in :mod:`dreambooth_lib.metrics.clip_scores`."""

    step: int
    subject_fidelity: float
    reference_fidelity: float  #: of the photos among themselves: the ceiling; 1 for one photo
    prompt_adherence: float
    class_diversity: float
    prior_drift: float
    pres: float  #: of class images with the photos: how much of the subject leaked (PRES)
    unrelated_drift: float  #: of pictures that have nothing to do with the subject
    held_out: dict[
        str, list[float]
    ]  #: loss by timestep bin, see :mod:`dreambooth_lib.training.held_out_loss`
    seconds: float  #: what the look cost


class Validator:
    """Looks at a run in training, on disk as said above. A run keeps the view that it began with.

    ``photos`` are all of the subject's, those held out of training too.
    """

    def __init__(
        self, run: Run, photos: list[Image.Image], held_out: HeldOutLoss, encoder: Encoder
    ):
        self.run, self.photos, self.held_out, self.encoder = run, photos, held_out, encoder
        self.view = plan_of(run)
        self.reference = 1.0
        if len(photos) > 1:
            self.reference = clip_scores.reference_fidelity(encoder.images(photos))

    def validate(self, step: int, model: Trainable, family: Family) -> ValidationResult:
        """Draw and score the model as it is now, and write both down."""
        began, subject, training = time.perf_counter(), self.run.config.subject, model.training
        model.eval()
        seen = draw_images(family, subject, self.view)
        losses = self.held_out.losses(model)
        model.train(training)
        before = load_images(self.run, 0) if step else seen
        scores = score_images(self.encoder, self.photos, subject, seen, before)
        kinds = {"subject": seen.subject, "class": seen.class_images, "unrelated": seen.unrelated}
        for kind, images in kinds.items():
            for number, image in enumerate(images):
                save_png(image, images_folder(self.run, step) / f"{kind}-{number}.png")
        found = ValidationResult(
            step=step,
            reference_fidelity=self.reference,
            held_out=losses,
            seconds=time.perf_counter() - began,
            **scores,
        )
        self.run.append("validation", asdict(found))
        return found


def plan_of(run: Run) -> ValidationPlan:
    """Return the view that a run's looks have, written down when it is first asked for."""
    file = plan_file(run.folder)
    if not file.exists():
        replace_file(file, json.dumps(asdict(plan_for(run.config))).encode())
    return read_plan(file)


def plan_file(folder: Path) -> Path:
    """Return where the plan of the run in a folder is, or will be."""
    return locate(locate(folder, "validation"), "plan.json")


def read_plan(file: Path) -> ValidationPlan:
    """Read a plan, an earlier version's too."""
    return ValidationPlan(**current_fields(json.loads(file.read_text())))


def images_folder(run: Run, step: int) -> Path:
    """Return where the pictures of one look lie."""
    return locate(run.folder, "validation") / f"{step:06d}"


def load_images(run: Run, step: int) -> ValidationImages:
    """Read the pictures of one look. Raises ``RunError`` where there was none."""
    place = images_folder(run, step)
    if not place.exists():
        raise RunError(f"{run.folder} was not looked at in step {step}; see db.history(run).")

    def images(kind: str) -> list[Image.Image]:
        files = [place / f"{kind}-{n}.png" for n in range(len(list(place.glob(f"{kind}-*.png"))))]
        return [Image.open(file).convert("RGB") for file in files]

    pictures = images("subject")
    each = len(pictures) // len(PROMPTS)
    prompts = [fill_prompt(p, run.config.subject) for p in PROMPTS for _ in range(each)]
    return ValidationImages(pictures, images("class"), images("unrelated"), prompts)


def history(run: Run) -> list[ValidationResult]:
    """Return every look so far, the frozen base's first."""
    known = ValidationResult.__dataclass_fields__  # rows of earlier versions have more
    return [
        ValidationResult(**{k: row[k] for k in row if k in known}) for row in run.rows("validation")
    ]


def time_share(run: Run) -> float:
    """Return the seconds spent on looks, as a share of those spent on updates."""
    return sum(row.seconds for row in history(run)) / sum(row["seconds"] for row in run.log())
