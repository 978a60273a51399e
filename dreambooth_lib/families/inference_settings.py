"""Inference steps and guidance scale of a base, by its model card, scheduler or pipeline."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

Names = Collection[str]  #: of a base
Config = Mapping[str, Any]  #: of one of the pipeline's parts

#: Words in the names of distilled bases. "de-turbo" means the opposite, and many others are called
#: hyper: only before these words, or a number of steps, or as the last word does it count.
_DISTILLED = re.compile(
    r"(?<!\S)(?<!de )((\w*(xl|sd))?(turbo|lightning)|schnell|lcm|dmd|tcd|hyper(sd|sdxl|flux)|"
    r"hyper( (sd|sdxl|flux|lora|vae|baked|bakedvae|\d+ steps?)|$))(?!\S)"
)
_STEPS = re.compile(r"(?<!\S)(\d\d?) steps?(?!\S)")
#: A word of a name, apart or in camel case, or a number.
_WORD = re.compile(r"[A-Z]+(?=[A-Z][a-z]{2})|[A-Z]?[a-z]+|[A-Z]+|\d+")


@dataclass(frozen=True)
class Inference:
    """Inference settings of a base."""

    steps: int  #: inference steps of an image that a person looks at
    #: As the pipeline's call takes it. The value that turns guidance off differs: 1 or less for
    #: Stable Diffusion, 0 for Z-Image; Flux.1 dev takes its scale as an input.
    guidance_scale: float
    #: The fewest steps that give finished images, for those that are drawn by the hundred: the
    #: images of a study or an evaluation, and class images where ``fast_steps`` is None.
    fewest_steps: int
    validation_steps: int  #: inference steps of the validation images
    distilled: bool = False  #: distilled to draw in so few steps, which training undoes
    #: The steps of the fast sampler (``Family.generate``) that draw a class as ``steps`` of the
    #: base's own do (docs/class_images.md); None for a base that has only its own.
    fast_steps: int | None = None
    fast_validation_steps: int | None = None  #: of the fast sampler too, for validation images


def distilled_inference(steps: int, guidance_scale: float = 0.0) -> Inference:
    """Return the settings of a base that is distilled to draw in ``steps``."""
    return Inference(steps, guidance_scale, steps, steps, distilled=True)


def distilled_by_name(
    names: Names, steps: int = 8, guidance_scale: float = 0.0
) -> Inference | None:
    """Return the settings of a base whose name says that it is distilled, else None.

    ``steps`` applies where the name gives no number of steps.
    """
    names = [" ".join(_WORD.findall(name)).lower() for name in names]
    if not any(_DISTILLED.search(name) for name in names):
        return None
    named = [int(match[1]) for name in names if (match := _STEPS.search(name))]
    return distilled_inference(named[0] if named else steps, guidance_scale)


def distilled_by_scheduler(scheduler: Config, denoiser: Config) -> Inference | None:
    """Return the settings of a Stable Diffusion or XL whose scheduler is a distilled base's.

    None for any other scheduler.
    """
    kind = scheduler.get("_class_name", "")
    # A latent consistency model (arXiv 2310.04378) that takes its guidance as an input: its card
    # draws in 4 steps, at most 8, at guidance 8.0.
    if denoiser.get("time_cond_proj_dim") is not None:
        return distilled_inference(8, 8.0)
    # An LCM that does not: diffusers' guide to LCM uses 1.0 (no guidance) to 2.0.
    if kind == "LCMScheduler":
        return distilled_inference(8, 1.0)
    if kind == "TCDScheduler":  # Hyper-SD and TCD
        return distilled_inference(8)
    # SD Turbo (EulerDiscrete) and SDXL Turbo (EulerAncestralDiscrete): 1 to 4 steps, guidance 0, by
    # their cards. Bases with a zero terminal SNR space steps the same way but are not distilled.
    trailing = kind.startswith("Euler") and scheduler.get("timestep_spacing") == "trailing"
    epsilon = scheduler.get("prediction_type", "epsilon") == "epsilon"
    if trailing and epsilon and not scheduler.get("rescale_betas_zero_snr"):
        return distilled_inference(4)
    return None


def distillation_warning(base: str, inference: Inference, undistilled: str = "") -> str | None:
    """Return a warning about training on a distilled base, None for any other base.

    ``undistilled`` is the base to train instead, if it is known.
    """
    if not inference.distilled:
        return None
    instead = f"'{undistilled}'" if undistilled else "the base that it was distilled from"
    return (
        f"'{base}' is distilled to draw in about {inference.steps} steps. Training slowly undoes "
        f"this, and its images lose detail: train {instead} instead, or stop as soon as the base "
        "has learnt the subject."
    )
