"""Draw a batch of images with a family's own pipeline, by its own sampler or a fast one."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from dreambooth_lib.families.base_files import explain_loading
from dreambooth_lib.families.noise_schedule import process_settings
from dreambooth_lib.families.precision import NonFinite, computed_in

if TYPE_CHECKING:
    from PIL import Image

    from dreambooth_lib.families.base import Family

#: The steps are equal in the logarithm of the signal-to-noise ratio (arXiv 2206.00927); steps equal
#: in time, so few of them, would lose fine detail. The last one ends at no noise at all. The others
#: are settings that a base's own sampler may have otherwise.
_FAST = {
    "use_lu_lambdas": True, "final_sigmas_type": "zero", "lower_order_final": True,
    "algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint",
    "use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False,
}  # fmt: skip


def fast_scheduler(own: Any) -> Any:
    """Return DPM-Solver++ 2M (arXiv 2211.01095) for the noise process of a base's own scheduler.

    It keeps the betas and the prediction type. It draws no noise, so that an image depends on its
    first noise alone. Not for a zero terminal SNR, where most steps would be at noise beyond use.
    """
    from diffusers import DPMSolverMultistepScheduler

    settings = process_settings(own.config) | _FAST
    return DPMSolverMultistepScheduler.from_config(own.config, **settings)


def draw(
    family: "Family",
    prompts_and_seeds: list[tuple[str, int]],
    steps: int,
    guidance_scale: float,
    negative_prompt: str = "",
    *,
    fast: bool = False,
) -> list["Image.Image"]:
    """Draw images as :meth:`Family.generate` does."""
    prompts, seeds = zip(*prompts_and_seeds, strict=True)
    pipeline, latents = family.pipeline, torch.zeros(())

    def store_latents(pipeline: Any, step: int, t: Any, tensors: dict[str, Any]) -> Any:
        nonlocal latents
        latents = tensors["latents"]
        return tensors

    pipeline.set_progress_bar_config(disable=True)
    with _ready(family, fast):
        arguments = family.prompt_arguments([*prompts], negative_prompt)
        with torch.inference_mode(), explain_loading(family.name, only=(TypeError, IndexError)):
            images = pipeline(
                **arguments,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                num_inference_steps=steps,
                guidance_scale=guidance_scale,
                height=family.size[1],
                width=family.size[0],
                callback_on_step_end=store_latents,
                output_type="np",
            ).images
            finite = bool(latents.isfinite().all())
    dtype = pipeline.vae.dtype
    if not finite:
        part = f"the {family.denoiser_name} or a text encoder"
        dtype = computed_in(family.denoiser.dtype, family.denoiser.device)
        raise NonFinite.of(part, family.name, "NaN or infinite latents", dtype)
    if not math.isfinite(images.sum()):
        raise NonFinite.of("the VAE", family.name, "NaN or infinite pixels", dtype)
    if not images.max((1, 2, 3)).all():
        raise NonFinite.of("the VAE", family.name, "an all-black image", dtype)
    return pipeline.image_processor.numpy_to_pil(images)


@contextmanager
def _ready(family: "Family", fast: bool) -> Iterator[None]:
    """Turn dropout off and set the sampler; put back each part's mode and the base's own."""
    modules, own = [family.denoiser, *family.text_encoders], family.pipeline.scheduler
    was_training = [module.training for module in modules]
    try:
        for module in modules:
            module.eval()
        family.pipeline.scheduler = family.scheduler(fast)
        yield
    finally:
        family.pipeline.scheduler = own
        for module, training in zip(modules, was_training, strict=True):
            module.train(training)
