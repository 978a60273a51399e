"""The images that a model is watched by while it is tuned: drawing and scoring them.

They are the same every few steps. :mod:`dreambooth_lib.watch_record` is what a run keeps of them.
"""

from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from dreambooth_lib import families, metrics
from dreambooth_lib.config import ConfigError, Subject, TrainConfig
from dreambooth_lib.encoders import Encoder
from dreambooth_lib.families.base import Family
from dreambooth_lib.sampling import inference_of

if TYPE_CHECKING:
    import torch
    from PIL import Image

#: Prompts of the pictures that are scored; {} is the identifier, {noun} the class noun.
PROMPTS = ("a {} {noun} on the beach", "a {} {noun} in the snow", "a {} {noun} in the forest",
           "a {} {noun} in space")  # fmt: skip
UNRELATED = ("a car in the city", "a clock on a wooden table")  # the second for cars
CLASS_SEED = 10_000  #: of the first class picture: no training draws its own from there
JUDGE = families.BUNDLED / "toybox" / "judge"


@dataclass(frozen=True)
class View:
    """What is drawn at each look; looks compare if their views are equal.

    The eight pictures of the default are one batch.
    """

    seeds: int = 1  #: pictures of each of :data:`PROMPTS`
    class_pictures: int = 3  #: of the class prompt
    unrelated: int = 1
    inference_steps: int | None = None  #: None: as many as finish the base's pictures
    guidance_scale: float | None = None  #: None: the base's own
    first_seed: int = 0  #: of the prompts' pictures; class pictures begin CLASS_SEED after it

    def wanted(self, subject: Subject) -> list[list[tuple[str, int]]]:
        """Return prompt and seed of each picture: of the subject, of its class and unrelated."""
        first, of_class = self.first_seed, self.first_seed + CLASS_SEED
        unrelated = UNRELATED[subject.class_noun == "car"]
        return [
            [(fill_prompt(p, subject), first + i) for p in PROMPTS for i in range(self.seeds)],
            [(subject.class_prompt, of_class + i) for i in range(self.class_pictures)],
            [(unrelated, of_class + i) for i in range(self.unrelated)],
        ]

    def prompts(self, subject: Subject) -> list[str]:
        """Return what its pictures are of: one prompt a picture, the subject's first."""
        return [prompt for kind in self.wanted(subject) for prompt, _ in kind]


def view_for(config: TrainConfig, **changes: Any) -> View:
    """Make the view of a config's looks, drawn in the steps and with the guidance of its base."""
    own = inference_of(config)
    given = {"inference_steps": own.validation, "guidance_scale": own.guidance_scale}
    return View(**(given | changes))


@dataclass(frozen=True)
class Look:
    """One model's pictures; those in the same place of two looks have the same seed."""

    subject: "list[Image.Image]"
    of_class: "list[Image.Image]"
    unrelated: "list[Image.Image]"
    prompts: list[str]  #: of the subject's pictures, one each


def fill_prompt(prompt: str, subject: Subject) -> str:
    return prompt.replace("{noun}", subject.class_noun).replace("{}", subject.identifier)


def look(family: Family, subject: Subject, view: View) -> Look:
    """Draw a view's pictures."""
    kinds = view.wanted(subject)
    wanted = [one for kind in kinds for one in kind]
    steps, scale = view.inference_steps or family.inference.enough, view.guidance_scale
    scale = family.inference.guidance_scale if scale is None else scale
    images, batch = [], family.at_a_time
    for start in range(0, len(wanted), batch):
        part = wanted[start : start + batch]
        images += family.generate(part, steps, scale)
    left = iter(images)
    of_subject, of_class, unrelated = (list(islice(left, len(kind))) for kind in kinds)
    return Look(of_subject, of_class, unrelated, [prompt for prompt, _ in kinds[0]])


def judge(config: TrainConfig, device: "str | torch.device" = "cpu") -> Encoder:
    """Load the encoder that scores a run's pictures.

    Raises ``ConfigError`` for one that cannot be read or does not read prompts.
    """
    try:
        encoder = Encoder(JUDGE if config.judge == "toybox" else config.judge, device)
    except OSError as error:
        raise ConfigError(
            f"the judge '{config.judge}' cannot be read; give a CLIP by hub id or folder, or set "
            "watch_every to 0 to train without looks."
        ) from error
    if not encoder.reads_texts:
        raise ConfigError(
            f"judge '{config.judge}' does not read prompts; give a CLIP such as "
            "openai/clip-vit-base-patch32."
        )
    return encoder


def score(
    encoder: Encoder,
    photos: "list[Image.Image]",
    subject: Subject,
    seen: Look,
    before: Look,
) -> dict[str, float]:
    """Return the measures of :func:`metrics.evaluate`, PRES and what an unrelated prompt lost.

    ``before`` is the frozen base's look.
    """
    scores = metrics.evaluate(
        encoder, photos, seen.subject, seen.prompts, seen.of_class, subject.identifier,
        before.of_class,
    )  # fmt: skip
    of_class = encoder.images(seen.of_class)
    scores["pres"] = metrics.subject_fidelity(of_class, encoder.images(photos))
    if seen.unrelated:
        one, other = encoder.images(before.unrelated), encoder.images(seen.unrelated)
        scores["unrelated_drift"] = metrics.prior_drift(one, other)
    return scores
