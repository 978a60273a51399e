"""Validate a run in training, and keep the images and scores in its folder.

RUN/validation.jsonl              one row per validation, or skipped one; step 0 is the frozen base
RUN/validation/000100/...png      its images: subject-0.png, class-0.png, unrelated-0.png
RUN/validation/plan.json          what each validation draws
"""

import re
import time
import warnings
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from PIL import Image

from dreambooth_lib.core.checked_json import read_object, write_object
from dreambooth_lib.core.digests import changed_file, write_digests
from dreambooth_lib.core.errors import InputError, KitError
from dreambooth_lib.core.files import (
    open_image,
    recover_folder,
    replace_file,
    replacing_folder,
    save_png,
)
from dreambooth_lib.data.images import Images, Photo
from dreambooth_lib.data.quality_checks import near_duplicate_groups
from dreambooth_lib.families.base import Family
from dreambooth_lib.metrics import clip_scores
from dreambooth_lib.training.held_out_loss import HeldOutLoss
from dreambooth_lib.training.runs import Run, RunError
from dreambooth_lib.training.trainable import Trainable
from dreambooth_lib.training.validation import (
    PROMPTS,
    BaseEmbeddings,
    Scorers,
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
    #: the values of each image that four of the scores are the means of, by the score's name; empty
    #: where they are damaged
    by_image: dict[str, list[float]] = field(default_factory=dict)


#: How far one image's scores by one encoder are apart on two machines, at most.
_SAME_SCORE = 0.01


class Validator:
    """Validates a run in training, always by the plan that it started with.

    ``photos`` are all of the subject's, held-out ones too.
    """

    def __init__(self, run: Run, photos: list[Photo], held_out: HeldOutLoss, scorers: Scorers):
        self.run, self.held_out, self.scorers = run, held_out, scorers
        self.plan = plan_of(run)
        self.plan.check()
        self.photos = scorers.images.embed_images(Images(photos))  #: [M, D]
        self._base: BaseEmbeddings | None = None
        groups, self.reference_fidelity = near_duplicate_groups(photos), 1.0
        if len(groups) > 1:
            self.reference_fidelity = clip_scores.reference_fidelity(self.photos, groups)

    def validate(self, step: int, model: Trainable, family: Family) -> ValidationResult:
        """Draw and score the model's validation images; write images and scores to the run."""
        start, subject, was_training = time.perf_counter(), self.run.config.subject, model.training
        model.eval()
        try:
            images = draw_images(family, subject, self.plan)
            losses = self.held_out.losses(model)
        finally:  # training may go on without this validation
            model.train(was_training)
        if step == 0 or self._base is None:
            base_images = images if step == 0 else load_images(self.run, 0)
            self._base = BaseEmbeddings(self.scorers.images, base_images)
        scores = score_images(self.scorers, self.photos, subject, images, self._base)
        kinds = {
            "subject": images.subject,
            "class": images.class_images,
            "unrelated": images.unrelated,
        }
        folder = images_folder(self.run, step)
        with replacing_folder(folder) as partial:
            for kind, of_kind in kinds.items():
                for number, image in enumerate(of_kind):
                    save_png(image, partial / f"{kind}-{number}.png")
            write_digests(partial)
        result = ValidationResult(
            step=step,
            reference_fidelity=self.reference_fidelity,
            held_out=losses,
            seconds=time.perf_counter() - start,
            **scores,
        )
        self.run.append("validation", asdict(result))
        return result

    def has_base(self, family: Family) -> bool:
        """Return whether the frozen base has been validated, in the size that ``family`` draws in.

        Warns of images that are damaged. In another size the same seed has other noise, and a
        scorer of another version gives other scores: warns, and sets the validations so far aside,
        as later ones do not compare with them.
        """
        results = {result.step: result for result in history(self.run)}
        if 0 not in results:
            return False
        try:
            images = load_images(self.run, 0)
            sizes = {image.size for image in images.subject}
            if sizes != {family.size}:
                aside = _set_aside(self.run, *sizes)
                raise RunError(
                    f"validation images are now {family.size[0]} x {family.size[1]} pixels, so "
                    f"earlier validations were moved to {aside}."
                )
            if self._trains_on() and self._scores_otherwise(results[0], images):
                aside = _set_aside(self.run, *sizes)
                raise RunError(
                    "the scorers give different scores than when this run began, so earlier "
                    f"validations were moved to {aside}."
                )
        except KitError as error:
            warnings.warn(f"{error} The base is validated again.", stacklevel=2)
            return False
        self._base = BaseEmbeddings(self.scorers.images, images)
        # One ceiling for all of a run's validations, so that they compare.
        self.reference_fidelity = results[0].reference_fidelity
        return True

    def _trains_on(self) -> bool:
        """Return whether steps remain: a run that has ended keeps its validations."""
        reached = max(self.run.checkpoints(), default=0)
        return not self.run.finished and reached < self.run.config.steps

    def _scores_otherwise(self, base: ValidationResult, images: ValidationImages) -> bool:
        """Return whether the base's images now score otherwise, by either encoder."""
        subject = self.run.config.subject
        now = score_images(self.scorers, self.photos, subject, images, images)
        return any(
            abs(now[name] - getattr(base, name)) > _SAME_SCORE
            for name in ("prompt_adherence", "class_diversity")  # neither depends on the photos
        )


def _set_aside(run: Run, *sizes: tuple[int, int]) -> str:
    """Move a run's validation rows to a file of their images' size; return its name."""
    named = "_".join(f"{width}x{height}" for width, height in sizes)
    rows, aside = run.folder / "validation.jsonl", run.folder / f"validation_{named}.jsonl"
    before = aside.read_bytes() if aside.exists() else b""
    replace_file(aside, before + rows.read_bytes())
    rows.unlink()
    return aside.name


def plan_of(run: Run) -> ValidationPlan:
    """Return a run's validation plan; the first call writes it to the run's folder.

    A damaged one is replaced by the config's, with a warning.
    """
    file = plan_file(run.folder)
    try:
        return read_plan(file)
    except RunError as error:
        if file.exists():
            warnings.warn(f"{error} It is made again from the config.", stacklevel=2)
        plan = plan_for(run.config)
        write_object(file, asdict(plan))
        return plan


def plan_file(folder: Path) -> Path:
    """Return the path of the validation plan in a run's folder."""
    return folder / "validation" / "plan.json"


def read_plan(file: Path) -> ValidationPlan:
    """Read a validation plan. Raises ``RunError`` if it is damaged."""
    values = read_object(file) or {}
    types: dict[str, Any] = {own.name: own.type for own in fields(ValidationPlan)}
    sound = all(isinstance(value, types.get(name, ())) for name, value in values.items())
    try:
        if values and sound:
            return ValidationPlan(**values)
    except InputError:
        pass
    raise RunError(f"the validation plan {file} is missing or damaged.")


def images_folder(run: Run, step: int) -> Path:
    """Return the folder of one validation's images."""
    return run.folder / "validation" / f"{step:06d}"


def load_images(run: Run, step: int) -> ValidationImages:
    """Load one validation's images.

    Raises a ``KitError`` if there was none at that step, or if an image is missing or damaged.
    """
    folder = images_folder(run, step)
    recover_folder(folder)
    if not folder.exists():
        raise RunError(f"{run.folder} was not validated at step {step}; see db.history(run).")
    if changed := changed_file(folder):
        raise RunError(f"the validation image {folder / changed} is missing or damaged.")

    def load(kind: str) -> list[Image.Image]:
        count = sum(bool(re.fullmatch(rf"{kind}-\d+\.png", p.name)) for p in folder.iterdir())
        files = [folder / f"{kind}-{number}.png" for number in range(count)]
        if gone := [file for file in files if not file.exists()]:
            raise RunError(f"the validation image {gone[0]} is missing or damaged.")
        return [open_image(file) for file in files]

    of_subject = load("subject")
    seeds = len(of_subject) // len(PROMPTS)
    prompts = [fill_prompt(p, run.config.subject) for p in PROMPTS for _ in range(seeds)]
    return ValidationImages(of_subject, load("class"), load("unrelated"), prompts)


def load_all_images(run: Run) -> dict[int, ValidationImages]:
    """Load the images of every validation so far, by step; warn of damaged ones and leave them out.

    Training goes on without an image of an earlier step.
    """
    images = {}
    for result in history(run):
        try:
            images[result.step] = load_images(run, result.step)
        except KitError as error:
            warnings.warn(f"step {result.step} is not shown: {error}", stacklevel=2)
    return images


def history(run: Run) -> list[ValidationResult]:
    """Return the result of every validation so far, the frozen base's first."""
    types = {"step": int, "held_out": dict, "by_image": dict}
    names = [own.name for own in fields(ValidationResult)]
    rows: list[dict[str, Any]] = [
        {name: row.get(name) for name in names} | {"by_image": _numbers(row.get("by_image"))}
        for row in run.rows("validation")
    ]
    return [
        ValidationResult(**row)
        for row in rows
        if all(isinstance(value, types.get(name, float)) for name, value in row.items())
    ]


def _numbers(by_image: Any) -> dict[str, list[float]]:
    """Return the lists of scores in what a row says of its images; none that is damaged."""
    named = by_image.items() if isinstance(by_image, dict) else ()
    return {
        name: values
        for name, values in named
        if isinstance(values, list)
        and all(isinstance(value, float) and abs(value) <= 2 for value in values)
    }


def time_share(run: Run) -> float:
    """Return the seconds spent on validation as a share of those spent on training steps."""
    training = sum(row["seconds"] for row in run.log())
    return sum(row.seconds for row in history(run)) / training if training else 0.0
