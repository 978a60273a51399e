"""Draw and score the validation images of a model in training.

Every validation draws the same prompts from the same seeds. :mod:`.validation_record` writes the
images and scores to the run's folder.
"""

from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.core.config_types import ConfigError
from dreambooth_lib.core.errors import InputError
from dreambooth_lib.core.subject import Subject
from dreambooth_lib.families import loading
from dreambooth_lib.families.base import Family
from dreambooth_lib.metrics import clip_scores
from dreambooth_lib.metrics.encoders import Encoder, EncoderError
from dreambooth_lib.training.sampling import check_counts, inference_settings

if TYPE_CHECKING:
    import torch
    from PIL import Image

#: Prompts of the images that are scored; {} is the identifier, {noun} the class noun.
PROMPTS = ("a {} {noun} on the beach", "a {} {noun} in the snow", "a {} {noun} in the forest",
           "a {} {noun} in space")  # fmt: skip
#: Prompts that have nothing to do with the subject; those that name its class are left out.
UNRELATED_PROMPTS = (
    "a car in the city", "a clock on a wooden table", "a cat on the grass",
    "a sailboat in the ocean", "a cactus in the desert", "a penguin in the snow",
    "a guitar on the beach", "a rocket in space", "a butterfly in the forest",
    "a hamburger on a wooden table", "a balloon at sunset",
)  # fmt: skip
CLASS_SEED = 10_000  #: of the first class image; training never draws its own from there
TOYBOX_SCORER = loading.BUNDLED / "toybox" / "judge"


@dataclass(frozen=True)
class ValidationPlan:
    """Define what each validation draws; two are comparable if their plans are equal.

    By default 18 images: few of each kind, as a small model draws seeds much alike, and many
    unrelated prompts, as one of them may change by chance (docs/studies).
    """

    seeds: int = 1  #: images of each of :data:`PROMPTS`
    class_images: int = 4  #: images of the class prompt
    unrelated: int = 10  #: unrelated prompts, one image each
    inference_steps: int | None = None  #: None: the fewest that finish the base's images
    guidance_scale: float | None = None  #: None: the base's own
    first_seed: int = 0  #: of the subject's prompts; class images start CLASS_SEED after it
    fast: bool = False  #: by the fast sampler instead of the base's own

    def __post_init__(self) -> None:
        check_counts(self, "inference_steps")

    def check(self) -> None:
        """Raise ``InputError`` unless a validation by this plan can be scored."""
        for name, least in (("seeds", 1), ("class_images", 2), ("unrelated", 1)):
            if (count := getattr(self, name)) < least:
                raise InputError(
                    f"the validation plan's {name} is {count}; give {least} or more, as scores "
                    "need them."
                )

    def prompts_and_seeds(self, subject: Subject) -> list[list[tuple[str, int]]]:
        """Return the prompt and seed of each image of the subject, of its class and unrelated."""
        first, class_images = self.first_seed, self.first_seed + CLASS_SEED
        noun = {*subject.class_noun.split()}
        unrelated = [prompt for prompt in UNRELATED_PROMPTS if noun.isdisjoint(prompt.split())]
        return [
            [(fill_prompt(p, subject), first + i) for p in PROMPTS for i in range(self.seeds)],
            [(subject.class_prompt, class_images + i) for i in range(self.class_images)],
            [(p, class_images + i) for i, p in enumerate(unrelated[: self.unrelated])],
        ]

    def prompts(self, subject: Subject) -> list[str]:
        """Return the prompt of each image, the subject's first."""
        return [prompt for kind in self.prompts_and_seeds(subject) for prompt, _ in kind]


def plan_for(config: TrainConfig, **changes: Any) -> ValidationPlan:
    """Return a config's validation plan, with its base's inference steps and guidance scale.

    By the fast sampler where the base can use it, and the config does not set the steps.
    """
    own = inference_settings(config)
    steps, fast_steps = own.validation_steps, own.fast_validation_steps
    settings: dict[str, Any] = {"inference_steps": steps, "guidance_scale": own.guidance_scale}
    if config.validation_inference_steps is None and fast_steps is not None:
        settings |= {"inference_steps": fast_steps, "fast": True}
    return ValidationPlan(**(settings | changes))


@dataclass(frozen=True)
class ValidationImages:
    """One model's validation images, in the order of their plan's seeds."""

    subject: "list[Image.Image]"
    class_images: "list[Image.Image]"
    unrelated: "list[Image.Image]"
    prompts: list[str]  #: of the subject's images, one each


class BaseEmbeddings:
    """The frozen base's class and unrelated images, embedded once: [N, D]."""

    def __init__(self, encoder: Encoder, images: ValidationImages):
        self.class_images = encoder.embed_images(images.class_images)
        self.unrelated = encoder.embed_images(images.unrelated) if images.unrelated else None


def fill_prompt(prompt: str, subject: Subject) -> str:
    return prompt.replace("{noun}", subject.class_noun).replace("{}", subject.identifier)


def draw_images(
    family: Family, subject: Subject, plan: ValidationPlan, batch_size: int | None = None
) -> ValidationImages:
    """Draw the images of a validation plan, by default in batches that training can afford."""
    kinds = plan.prompts_and_seeds(subject)
    pairs = [pair for kind in kinds for pair in kind]
    steps, scale = plan.inference_steps or family.inference.fewest_steps, plan.guidance_scale
    scale = family.inference.guidance_scale if scale is None else scale
    images, batch = [], batch_size or family.batch_size_in_training
    for start in range(0, len(pairs), batch):
        images += family.generate(pairs[start : start + batch], steps, scale, fast=plan.fast)
    remaining = iter(images)
    of_subject, class_images, unrelated = (list(islice(remaining, len(kind))) for kind in kinds)
    return ValidationImages(of_subject, class_images, unrelated, [prompt for prompt, _ in kinds[0]])


@dataclass(frozen=True)
class Scorers:
    """The encoders that score validation images; both may be one."""

    images: Encoder  #: compares them with the photos and with the base's images
    prompts: Encoder  #: compares them with their prompts


def load_scorers(config: TrainConfig, device: "str | torch.device" = "cpu") -> Scorers:
    """Load the encoders that score a run's validation images.

    Raises ``ConfigError`` if one cannot be read or ``config.scorer`` does not read prompts.
    """
    try:
        prompts = images = Encoder(scorer_source(config.scorer), device)
        if config.image_scorer != config.scorer:
            images = Encoder(scorer_source(config.image_scorer), device)
    except EncoderError as error:
        raise ConfigError(
            f"the scorer cannot be used, because {error.problem}; {error.advice}, or set "
            "validate_every to 0 to train without validation."
        ) from error
    if not prompts.reads_texts:
        raise ConfigError(
            f"the scorer '{config.scorer}' does not read prompts; give a CLIP such as "
            "openai/clip-vit-base-patch32, and this one as image_scorer."
        )
    return Scorers(images, prompts)


def scorer_source(name: str) -> str | Path:
    """Return the Hub id or folder that a config's scorer is read from."""
    return TOYBOX_SCORER if name == "toybox" else name


def score_images(
    scorers: Scorers,
    photos: "torch.Tensor",
    subject: Subject,
    images: ValidationImages,
    base: ValidationImages | BaseEmbeddings,
) -> dict[str, Any]:
    """Return the scores of a :class:`.validation_record.ValidationResult` by their names.

    ``photos`` are the photos' embeddings [M, D] by ``scorers.images``; ``base`` are the frozen
    base's images. ``by_image`` has the values that four of the scores are the means of: those of
    each image of the subject, of the class or of an unrelated prompt.
    """
    import torch

    encoder, reader = scorers.images, scorers.prompts
    base = BaseEmbeddings(encoder, base) if isinstance(base, ValidationImages) else base
    of_subject = encoder.embed_images(images.subject)
    class_images = encoder.embed_images(images.class_images)
    scores: dict[str, Any] = {
        "subject_fidelity": clip_scores.subject_fidelity(of_subject, photos),
        "class_diversity": clip_scores.diversity(class_images),
        "prior_drift": clip_scores.prior_drift(base.class_images, class_images),
        "pres": clip_scores.subject_fidelity(class_images, photos),
    }
    texts = [clip_scores.strip_identifier(p, subject.identifier) for p in images.prompts]
    read = of_subject if reader is encoder else reader.embed_images(images.subject)
    with torch.autocast("cpu", enabled=False):  # of a training in bfloat16 on a CPU
        cosines = of_subject @ photos.T
    by_image = {
        "subject_fidelity": cosines.mean(1),
        "prompt_adherence": clip_scores.row_cosines(read, reader.embed_texts(texts)),
        "prior_drift": 1 - clip_scores.row_cosines(base.class_images, class_images),
    }
    if base.unrelated is not None:
        after = encoder.embed_images(images.unrelated)
        by_image["unrelated_drift"] = 1 - clip_scores.row_cosines(base.unrelated, after)
        scores["unrelated_drift"] = clip_scores.prior_drift(base.unrelated, after)
    scores["prompt_adherence"] = by_image["prompt_adherence"].mean().item()
    scores["by_image"] = {name: values.tolist() for name, values in by_image.items()}
    return scores
