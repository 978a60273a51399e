"""Set what a base predicts, and whether its last timestep is pure noise, in its scheduler's config.

A zero terminal signal-to-noise ratio (arXiv 2305.08891) comes with v_prediction only: where there
is no signal, epsilon says nothing of the image.
"""

from collections.abc import Mapping
from inspect import signature
from typing import Any

EPSILON, V_PREDICTION, V_PREDICTION_ZTSNR = "epsilon", "v_prediction", "v_prediction_ztsnr"
TYPES = (EPSILON, V_PREDICTION, V_PREDICTION_ZTSNR)


def with_prediction_type(scheduler: Mapping[str, Any], prediction_type: str) -> dict[str, Any]:
    """Return a scheduler's config for another of this module's prediction types.

    A scheduler that cannot rescale its betas becomes a ``DDIMScheduler`` of the same betas where
    they must be. With them the timesteps are spaced "trailing", as others leave the last one out
    (arXiv 2305.08891, section 3.3).
    """
    import diffusers

    config = dict(scheduler)
    ztsnr = prediction_type == V_PREDICTION_ZTSNR
    config["prediction_type"] = V_PREDICTION if ztsnr else prediction_type
    kind = getattr(diffusers, str(config.get("_class_name")), None)
    rescales = kind is not None and "rescale_betas_zero_snr" in signature(kind).parameters
    if ztsnr and not rescales:
        config["_class_name"], kind = "DDIMScheduler", diffusers.DDIMScheduler
        config.pop("skip_prk_steps", None)
    if kind is not None and "clip_sample" in signature(kind).parameters:
        config["clip_sample"] = False
    if ztsnr or rescales:
        config["rescale_betas_zero_snr"] = ztsnr
    if ztsnr:
        config["timestep_spacing"] = "trailing"
    return config


def set_scheduler(pipeline: Any, config: Mapping[str, Any] | None) -> None:
    """Give a pipeline a scheduler of the config, or keep its own; it clamps no latents.

    Some classes clamp to 1 by default, for images, and latents are larger.
    """
    import diffusers

    if config is not None:
        kind = getattr(diffusers, config["_class_name"])
        pipeline.register_modules(scheduler=kind.from_config(config))
    if pipeline.scheduler.config.get("clip_sample"):
        pipeline.scheduler.register_to_config(clip_sample=False)
