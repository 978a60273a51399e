"""Denoising steps and guidance scale of a base, as its own card, scheduler or pipeline has them."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

Names = Collection[str]  #: of a base
Config = Mapping[str, Any]  #: of a base's part

#: What names of distilled bases have in them, as words; "de-turbo" is the reverse.
_DISTILLED = re.compile(
    r"(?<![a-z])(?<!de-)(turbo|lightning|schnell|lcm|dmd2?|tcd|hyper(-?(sd|sdxl|flux)|$))(?![a-z])"
)
_STEPS = re.compile(r"(?<!\d)(\d\d?)-?steps?(?![a-z])")


@dataclass(frozen=True)
class Inference:
    """How a base draws finished pictures."""

    steps: int  #: denoising steps of a picture that a person looks at
    #: As the pipeline's call takes it. What switches guidance off is the pipeline's own: 1 and less
    #: for Stable Diffusion, 0 for Z-Image; Flux.1 dev is told its scale as a number.
    guidance_scale: float
    #: The fewest steps at which pictures are finished, for those that are drawn by the hundred:
    #: class images, a study's and an evaluation's.
    fewest_steps: int
    validation_steps: int  #: steps of the validation images
    distilled: bool = False  #: made to draw in so few steps, which training undoes


def few_steps(steps: int, guidance_scale: float = 0.0) -> Inference:
    """Describe how a distilled base draws."""
    return Inference(steps, guidance_scale, steps, steps, distilled=True)


def few_by_name(names: Names, steps: int = 8, guidance_scale: float = 0.0) -> Inference | None:
    """Describe how a base draws whose names say that it is distilled, by default in ``steps``.

    None for any other.
    """
    plain = [name.lower().replace("_", "-") for name in names]
    if not any(_DISTILLED.search(name) for name in plain):
        return None
    told = [int(found[1]) for name in plain if (found := _STEPS.search(name))]
    return few_steps(told[0] if told else steps, guidance_scale)


def few_by_scheduler(scheduler: Config, denoiser: Config) -> Inference | None:
    """Describe how a distilled Stable Diffusion or XL draws, told by its scheduler.

    None for any other.
    """
    kind = scheduler.get("_class_name", "")
    # A latent consistency model (arXiv 2310.04378) that is told its guidance: its card draws in 4
    # steps, in 8 at most, at 8.0.
    if denoiser.get("time_cond_proj_dim") is not None:
        return few_steps(8, 8.0)
    # One that is not: diffusers' guide to LCM draws at 1.0 (none) to 2.0.
    if kind == "LCMScheduler":
        return few_steps(8, 1.0)
    if kind == "TCDScheduler":  # Hyper-SD's and TCD's
        return few_steps(8)
    # SD Turbo (EulerDiscrete) and SDXL Turbo (EulerAncestralDiscrete): 1 to 4 steps, guidance 0, by
    # their cards. Bases with a zero terminal SNR have trailing steps too, and are not distilled.
    trailing = kind.startswith("Euler") and scheduler.get("timestep_spacing") == "trailing"
    plain = scheduler.get("prediction_type", "epsilon") == "epsilon"
    if trailing and plain and not scheduler.get("rescale_betas_zero_snr"):
        return few_steps(4)
    return None


def distillation_warning(base: str, own: Inference, instead: str = "") -> str | None:
    """Say what training on a distilled base does, and what to do; None for any other.

    ``instead`` is the base to train, where that is known.
    """
    if not own.distilled:
        return None
    other = f"'{instead}'" if instead else "the base that it was distilled from"
    return (
        f"'{base}' is distilled to draw in about {own.steps} steps. Training slowly undoes that, "
        f"and its pictures lose detail: train {other} instead, or stop as soon as the subject is "
        "learnt."
    )
