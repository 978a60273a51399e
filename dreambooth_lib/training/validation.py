"""The images that a model is validation by while it is tuned: drawing and scoring them.

They are the same at every validation. :mod:`.validation_record` writes them into the run's folder.
"""

from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from dreambooth_lib.core.config import Subject, TrainConfig
from dreambooth_lib.core.config_checks import ConfigError
from dreambooth_lib.families import loading
from dreambooth_lib.families.base import Family
from dreambooth_lib.metrics import clip_scores
from dreambooth_lib.metrics.encoders import Encoder
from dreambooth_lib.training.sampling import inference_settings

if TYPE_CHECKING:
    import torch
    from PIL import Image

#: Prompts of the pictures that are scored; {} is the identifier, {noun} the class noun.
PROMPTS = ("a {} {noun} on the beach", "a {} {noun} in the snow", "a {} {noun} in the forest",
           "a {} {noun} in space")  # fmt: skip
UNRELATED_PROMPTS = ("a car in the city", "a clock on a wooden table")  # the second for cars
CLASS_SEED = 10_000  #: of the first class image: no training draws its own from there
TOYBOX_SCORER = loading.BUNDLED / "toybox" / "judge"


@dataclass(frozen=True)
class ValidationPlan:
    """What is drawn at each look; looks compare if their views are equal.

    The eight pictures of the default are one batch.
    """

    seeds: int = 1  #: pictures of each of :data:`PROMPTS`
    class_images: int = 3  #: of the class prompt
    unrelated: int = 1
    inference_steps: int | None = None  #: None: as many as finish the base's pictures
    guidance_scale: float | None = None  #: None: the base's own
    first_seed: int = 0  #: of the prompts' pictures; class images begin CLASS_SEED after it

    def wanted(self, subject: Subject) -> list[list[tuple[str, int]]]:
        """Return prompt and seed of each picture: of the subject, of its class and unrelated."""
        first, class_images = self.first_seed, self.first_seed + CLASS_SEED
        unrelated = UNRELATED_PROMPTS[subject.class_noun == "car"]
        return [
            [(fill_prompt(p, subject), first + i) for p in PROMPTS for i in range(self.seeds)],
            [(subject.class_prompt, class_images + i) for i in range(self.class_images)],
            [(unrelated, class_images + i) for i in range(self.unrelated)],
        ]

    def prompts(self, subject: Subject) -> list[str]:
        """Return what its pictures are of: one prompt a picture, the subject's first."""
        return [prompt for kind in self.wanted(subject) for prompt, _ in kind]


def plan_for(config: TrainConfig, **changes: Any) -> ValidationPlan:
    """Make the view of a config's looks, drawn in the steps and with the guidance of its base."""
    own = inference_settings(config)
    given = {"inference_steps": own.validation_steps, "guidance_scale": own.guidance_scale}
    return ValidationPlan(**(given | changes))


@dataclass(frozen=True)
class ValidationImages:
    """One model's pictures; those in the same place of two looks have the same seed."""

    subject: "list[Image.Image]"
    class_images: "list[Image.Image]"
    unrelated: "list[Image.Image]"
    prompts: list[str]  #: of the subject's pictures, one each


def fill_prompt(prompt: str, subject: Subject) -> str:
    return prompt.replace("{noun}", subject.class_noun).replace("{}", subject.identifier)


def draw_images(family: Family, subject: Subject, view: ValidationPlan) -> ValidationImages:
    """Draw a view's pictures."""
    kinds = view.wanted(subject)
    wanted = [one for kind in kinds for one in kind]
    steps, scale = view.inference_steps or family.inference.fewest_steps, view.guidance_scale
    scale = family.inference.guidance_scale if scale is None else scale
    images, batch = [], family.batch_size_in_training
    for start in range(0, len(wanted), batch):
        part = wanted[start : start + batch]
        images += family.generate(part, steps, scale)
    left = iter(images)
    of_subject, class_images, unrelated = (list(islice(left, len(kind))) for kind in kinds)
    return ValidationImages(of_subject, class_images, unrelated, [prompt for prompt, _ in kinds[0]])


def load_scorer(config: TrainConfig, device: "str | torch.device" = "cpu") -> Encoder:
    """Load the encoder that scores a run's pictures.

    Raises ``ConfigError`` for one that cannot be read or does not read prompts.
    """
    try:
        encoder = Encoder(TOYBOX_SCORER if config.scorer == "toybox" else config.scorer, device)
    except OSError as error:
        raise ConfigError(
            f"the judge '{config.scorer}' cannot be read; give a CLIP by hub id or folder, or set "
            "validate_every to 0 to train without looks."
        ) from error
    if not encoder.reads_texts:
        raise ConfigError(
            f"judge '{config.scorer}' does not read prompts; give a CLIP such as "
            "openai/clip-vit-base-patch32."
        )
    return encoder


def score_images(
    encoder: Encoder,
    photos: "list[Image.Image]",
    subject: Subject,
    seen: ValidationImages,
    before: ValidationImages,
) -> dict[str, float]:
    """Return the measures of :func:`metrics.evaluate`, PRES and what an unrelated prompt lost.

    ``before`` is the frozen base's look.
    """
    scores = clip_scores.evaluate(
        encoder, photos, seen.subject, seen.prompts, seen.class_images, subject.identifier,
        before.class_images,
    )  # fmt: skip
    class_images = encoder.images(seen.class_images)
    scores["pres"] = clip_scores.subject_fidelity(class_images, encoder.images(photos))
    if seen.unrelated:
        one, other = encoder.images(before.unrelated), encoder.images(seen.unrelated)
        scores["unrelated_drift"] = clip_scores.prior_drift(one, other)
    return scores
