"""Defaults of a config's fields that depend on the base and the method."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dreambooth_lib.core import config_file
from dreambooth_lib.core.config_types import ConfigError, shown

if TYPE_CHECKING:
    from dreambooth_lib.core.config import TrainConfig

#: Defaults that depend on the base: first toybox's, then every other base's, which are the paper's
#: for Stable Diffusion. None means what the base's own model card says.
_DEFAULTS: dict[str, tuple[Any, Any]] = {
    "learning_rate": (3e-4, 5e-6),
    "lora_learning_rate": (4e-3, 1e-4),
    "prior": ("generated", "generated"),
    "lora_prior": ("distilled_images", "distilled_images"),
    "steps": (500, 1000),
    "batch_size": (2, 1),
    "class_images": (48, 200),
    "prior_guidance_scale": (1.0, None),
    "prompt_dropout": (0.1, 0.0),
    "ema_decay": (0.98, None),
    "guidance_scale": (3.25, None),
    "validate_every": (125, 250),
    "lora_validate_every": (250, 400),
    "scorer": ("toybox", "openai/clip-vit-base-patch32"),
    # The small one: on a CPU, where low memory levels score, the base one takes four times as long.
    "image_scorer": ("toybox", "facebook/dinov2-small"),
}


def base_defaults(base: str, method: str = "full") -> dict[str, Any]:
    """Return the defaults of the fields that depend on the base and the method.

    A finished run used as a base has the defaults of the base that it was trained from.
    """
    column = 0 if origin(base) == "toybox" else 1
    defaults = {name: values[column] for name, values in _DEFAULTS.items()}
    by_method = ("learning_rate", "prior", "validate_every")
    of_lora = {name: defaults.pop(f"lora_{name}") for name in by_method}
    return defaults | (of_lora if method == "lora" else {})


def fields_by_default(config: "TrainConfig", changes: dict[str, Any]) -> dict[str, Any]:
    """Return None for each field whose default another base or method in ``changes`` replaces."""
    base, method = changes.get("base", config.base), changes.get("method", config.method)
    if (base, method) == (config.base, config.method):
        return {}
    before, after = base_defaults(config.base, config.method), base_defaults(base, method)
    return {name: None for name, value in before.items()
            if after[name] != value == getattr(config, name)}  # fmt: skip


def origin(base: str) -> str:
    """Return the base that a run's folder was trained from; return any other base unchanged.

    Raises :class:`ConfigError` where a run's config cannot be read or leads back to itself.
    """
    passed = []
    while base not in ("", "toybox") and os.path.isfile(config := Path(base) / "config.toml"):
        fields = config_file.from_toml(config)
        passed.append(os.path.realpath(base))
        base = fields.get("base", "toybox")
        if not isinstance(base, str):
            raise ConfigError(f"{config}: base is {shown(base)}; it must be text.")
        if os.path.realpath(base) in passed:
            raise ConfigError(
                f"{config}: base is a run that was trained from this one; correct it."
            )
    return base
