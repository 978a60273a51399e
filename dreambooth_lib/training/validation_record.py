"""Validate a run in training, and keep the images and scores in its folder.

RUN/validation.jsonl              one row per validation; step 0 is the frozen base
RUN/validation/000100/...png      its images: subject-0.png, class-0.png, unrelated-0.png
RUN/validation/plan.json          what each validation draws
"""

import json
import time
from collections.abc import Sequence
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
    """The scores of one validation; see :mod:`dreambooth_lib.metrics.clip_scores`."""

    step: int
    subject_fidelity: float
    reference_fidelity: float  #: of the photos among themselves: the ceiling; 1 for one photo
    prompt_adherence: float
    class_diversity: float
    prior_drift: float
    pres: float  #: of class images with the photos: how much of the subject leaked (PRES)
    unrelated_drift: float  #: of images that have nothing to do with the subject
    held_out: dict[str, list[float]]  #: losses by timestep bin, see :mod:`.held_out_loss`
    seconds: float  #: what the validation took


class Validator:
    """Validates a run in training, always by the plan that it started with.

    ``photos`` are all of the subject's, held-out ones too.
    """

    def __init__(
        self, run: Run, photos: Sequence[Image.Image], held_out: HeldOutLoss, encoder: Encoder
    ):
        self.run, self.photos, self.held_out, self.encoder = run, photos, held_out, encoder
        self.plan = plan_of(run)
        self.reference_fidelity = 1.0
        if len(photos) > 1:
            self.reference_fidelity = clip_scores.reference_fidelity(encoder.embed_images(photos))

    def validate(self, step: int, model: Trainable, family: Family) -> ValidationResult:
        """Draw and score the model's validation images; write images and scores to the run."""
        start, subject, was_training = time.perf_counter(), self.run.config.subject, model.training
        model.eval()
        images = draw_images(family, subject, self.plan)
        losses = self.held_out.losses(model)
        model.train(was_training)
        base_images = load_images(self.run, 0) if step else images
        scores = score_images(self.encoder, self.photos, subject, images, base_images)
        kinds = {
            "subject": images.subject,
            "class": images.class_images,
            "unrelated": images.unrelated,
        }
        for kind, of_kind in kinds.items():
            for number, image in enumerate(of_kind):
                save_png(image, images_folder(self.run, step) / f"{kind}-{number}.png")
        result = ValidationResult(
            step=step,
            reference_fidelity=self.reference_fidelity,
            held_out=losses,
            seconds=time.perf_counter() - start,
            **scores,
        )
        self.run.append("validation", asdict(result))
        return result


def plan_of(run: Run) -> ValidationPlan:
    """Return a run's validation plan; the first call writes it to the run's folder."""
    file = plan_file(run.folder)
    if not file.exists():
        replace_file(file, json.dumps(asdict(plan_for(run.config))).encode())
    return read_plan(file)


def plan_file(folder: Path) -> Path:
    """Return the path of the validation plan in a run's folder."""
    return locate(locate(folder, "validation"), "plan.json")


def read_plan(file: Path) -> ValidationPlan:
    """Read a validation plan, an earlier version's too."""
    return ValidationPlan(**current_fields(json.loads(file.read_text())))


def images_folder(run: Run, step: int) -> Path:
    """Return the folder of one validation's images."""
    return locate(run.folder, "validation") / f"{step:06d}"


def load_images(run: Run, step: int) -> ValidationImages:
    """Load one validation's images. Raises ``RunError`` if there was none at that step."""
    folder = images_folder(run, step)
    if not folder.exists():
        raise RunError(f"{run.folder} was not validated at step {step}; see db.history(run).")

    def load(kind: str) -> list[Image.Image]:
        count = len(list(folder.glob(f"{kind}-*.png")))
        return [Image.open(folder / f"{kind}-{n}.png").convert("RGB") for n in range(count)]

    of_subject = load("subject")
    seeds = len(of_subject) // len(PROMPTS)
    prompts = [fill_prompt(p, run.config.subject) for p in PROMPTS for _ in range(seeds)]
    return ValidationImages(of_subject, load("class"), load("unrelated"), prompts)


def history(run: Run) -> list[ValidationResult]:
    """Return the result of every validation so far, the frozen base's first."""
    known = ValidationResult.__dataclass_fields__  # rows of earlier versions have more
    return [
        ValidationResult(**{k: row[k] for k in row if k in known}) for row in run.rows("validation")
    ]


def time_share(run: Run) -> float:
    """Return the seconds spent on validation as a share of those spent on training steps."""
    return sum(row.seconds for row in history(run)) / sum(row["seconds"] for row in run.log())
