"""Check a config: the values each field may have, and fields that contradict each other."""

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from dreambooth_lib.core.errors import KitError

if TYPE_CHECKING:
    from dreambooth_lib.core.config import TrainConfig

#: Memory levels with gradient checkpointing; a whole model's optimizer steps during the backward
#: pass there.
LOW_MEMORY = ("low", "lowest")

#: Fields with a few allowed values. Add a name here to add an optimizer (docs/architecture.md).
CHOICES: dict[str, tuple[str | None, ...]] = {
    "mixed_precision": ("auto", "no", "fp16", "bf16"),
    "optimizer": ("auto", "adamw", "adamw8bit"),
    "lr_schedule": ("constant", "linear", "cosine"),
    "crop": ("center", "random"),
    "prior": ("generated", "distilled", "none"),
    "method": ("full", "lora"),
    "lora_layers": ("attention", "all"),
    "memory": ("auto", "standard", *LOW_MEMORY),
    "quantize": (None, "nf4", "int8"),
}
#: Bounds of numbers; None is always allowed.
_LIMITS: dict[str, tuple[Callable[[float], bool], tuple[str, ...]]] = {
    "1 or more": (lambda value: value >= 1, (
        "steps", "batch_size", "gradient_accumulation", "checkpoint_every", "checkpoints_kept",
        "prior_inference_steps", "validation_inference_steps", "lora_rank", "lora_alpha",
    )),
    "0 or more": (lambda value: value >= 0, (
        "prior_weight", "class_images", "warmup_steps", "weight_decay", "seed",
        "prior_guidance_scale", "guidance_scale", "validate_every",
    )),
    "at least 0 and below 1": (lambda value: 0 <= value < 1, (
        "prompt_dropout", "dropout", "ema_decay", "lora_dropout",
    )),
    "above 0": (lambda value: value > 0, ("learning_rate", "max_grad_norm", "min_snr_gamma")),
}  # fmt: skip


class ConfigError(KitError, ValueError):
    """A field has an impossible value; the message names it and says what to write instead."""


def check(config: "TrainConfig") -> None:
    """Raise :class:`ConfigError` for a value that is out of range or contradicts another."""
    for name, choices in CHOICES.items():
        if getattr(config, name) not in choices:
            options = ", ".join("left out" if c is None else f"'{c}'" for c in choices)
            raise ConfigError(f"{name} is '{getattr(config, name)}'; it can be {options}.")
    for name, value in vars(config).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{name} is {value}; it must be a finite number.")
    for limit, (is_within, names) in _LIMITS.items():
        for name in names:
            value = getattr(config, name)
            if value is not None and not is_within(value):
                raise ConfigError(f"{name} is {value}; it must be {limit}.")
    for is_wrong, sentence in _contradictions(config):
        if is_wrong:
            raise ConfigError(sentence)


def _contradictions(config: "TrainConfig") -> Iterator[tuple[bool, str]]:
    yield (
        config.draws_class_images and config.class_images == 0,
        f"prior_weight is {config.prior_weight} but class_images is 0; set class_images above 0, "
        "give a class_folder, or set prior_weight to 0.",
    )
    yield (
        config.early_stop and not config.validate_every,
        "early_stop needs validation; set validate_every above 0.",
    )
    full = config.method == "full"
    yield (
        full and config.quantize is not None,
        f"quantize is '{config.quantize}' but method is '{config.method}': quantized weights "
        "cannot be trained; set method to 'lora', or leave quantize out.",
    )
    yield (
        full and config.train_token,
        f"train_token is set but method is '{config.method}'; set method to 'lora', or leave "
        "train_token out.",
    )
    yield (
        full and config.memory == "lowest" and config.mixed_precision == "no",
        "memory is 'lowest', which keeps weights in bfloat16, but mixed_precision is 'no'; set "
        "mixed_precision to 'auto', or memory to 'low'.",
    )
    level = f"memory is '{config.memory}', which steps the optimizer during the backward pass,"
    yield (
        config.steps_in_backward and config.max_grad_norm is not None,
        f"{level} and max_grad_norm is {config.max_grad_norm}, which needs all gradients at "
        "once; leave max_grad_norm out, or set memory to 'standard'.",
    )
    yield (
        config.steps_in_backward and config.gradient_accumulation > 1,
        f"{level} and gradient_accumulation is {config.gradient_accumulation}, which has to "
        "keep gradients; set gradient_accumulation to 1, or memory to 'standard'.",
    )
    yield (
        config.batch_size % config.gradient_accumulation > 0,
        f"batch_size {config.batch_size} does not split into gradient_accumulation "
        f"{config.gradient_accumulation} equal micro-batches; make batch_size a multiple.",
    )
    side = config.resolution
    yield (
        side is not None and (side < 8 or side % 8 > 0),
        f"resolution is {side}; it must be a multiple of 8, and 8 or more.",
    )
