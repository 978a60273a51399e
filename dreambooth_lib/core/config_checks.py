"""Check a config: each field's values, and fields that contradict each other."""

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from dreambooth_lib.core.config_types import LARGEST, ConfigError, shown
from dreambooth_lib.core.user_text import problem_with_name, problem_with_words

if TYPE_CHECKING:
    from dreambooth_lib.core.config import TrainConfig
    from dreambooth_lib.core.subject import Subject

#: Memory levels with gradient checkpointing; a whole model's optimizer steps during the backward
#: pass there.
LOW_MEMORY = ("low", "lowest")

#: Bounds of an adaptive λ: a class that it cannot keep must not drown the subject.
PRIOR_WEIGHTS = (0.05, 8.0)

#: Adapters of peft beside LoRA that can be trained, by their names there. All of them can be merged
#: into the base, and their weights are all that must be saved.
ADAPTERS = ("lokr", "loha", "oft", "hra", "delora", "gralora", "miss", "hira", "deft", "glora",
            "peanut", "c3a", "road", "ia3")  # fmt: skip

#: Fields with a few allowed values. Add a name here to add an optimizer (docs/architecture.md).
CHOICES: dict[str, tuple[str | None, ...]] = {
    "mixed_precision": ("auto", "no", "fp16", "bf16"),
    "optimizer": ("auto", "adamw", "adamw8bit"),
    "lr_schedule": ("constant", "linear", "cosine"),
    "crop": ("center", "random", "subject", "buckets"),
    "prior": ("generated", "distilled", "distilled_images", "none"),
    "method": ("full", "lora"),
    "adapter": (None, *ADAPTERS),
    "lora_layers": ("attention", "all"),
    "memory": ("auto", "standard", *LOW_MEMORY),
    "quantize": (None, "nf4", "int8"),
    "prediction_type": (None, "epsilon", "v_prediction", "v_prediction_ztsnr"),
}
#: Bounds of numbers; None is always allowed.
_LIMITS: dict[str, tuple[Callable[[float], bool], tuple[str, ...]]] = {
    "1 or more": (lambda value: value >= 1, (
        "steps", "batch_size", "gradient_accumulation", "checkpoint_every", "checkpoints_kept",
        "prior_inference_steps", "validation_inference_steps", "lora_rank", "lora_alpha",
        "lora_min_rank", "text_encoder_steps", "clip_skip",
    )),
    "0 or more": (lambda value: value >= 0, (
        "prior_weight", "class_images", "warmup_steps", "weight_decay", "seed",
        "prior_guidance_scale", "guidance_scale", "validate_every",
    )),
    "from 1 to 3": (lambda value: 1 <= value <= 3, ("prompt_chunks",)),
    "from -3 to 3": (lambda value: -3 <= value <= 3, ("timestep_bias",)),
    "at least 0 and below 1": (lambda value: 0 <= value < 1, (
        "prompt_dropout", "dropout", "ema_decay", "lora_dropout",
    )),
    "from 0 to 1": (lambda value: 0 <= value <= 1, ("background_weight",)),
    "above 0 and below 1": (lambda value: 0 < value < 1, ("keep_class",)),
    "above 0": (lambda value: value > 0, (
        "learning_rate", "text_encoder_learning_rate", "max_grad_norm", "min_snr_gamma",
        "validation_share", "anchor_weight",
    )),
}  # fmt: skip


#: Above these, a number is a typing error; the seed leaves room for seeds derived from it.
_MOST = {"seed": LARGEST, "resolution": 2**14}
_MOST_OF_OTHERS = 10**9


def check_words(subject: "Subject") -> None:
    """Raise :class:`ConfigError` for a noun, an identifier or a name that nobody could mean."""
    for field in ("class_noun", "identifier", "name", "kind"):
        check = problem_with_name if field == "name" else problem_with_words
        text = getattr(subject, field)
        if (text or field != "kind") and (problem := check(text)):
            raise ConfigError(f"subject.{field} {problem}")
    if "{}" in subject.identifier:
        raise ConfigError(
            "subject.identifier has {}, which stands for the identifier itself; give a rare word."
        )


def check(config: "TrainConfig") -> None:
    """Raise :class:`ConfigError` for a value that is out of range or contradicts another."""
    for name, choices in CHOICES.items():
        if getattr(config, name) not in choices:
            options = ", ".join(f"'{choice}'" for choice in choices if choice is not None)
            advice = "leave it out, or set it to one of" if None in choices else "set it to one of"
            raise ConfigError(f"{name} is {shown(getattr(config, name))}; {advice} {options}.")
    for name, value in vars(config).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{name} is {value}; it must be a finite number.")
        most = _MOST.get(name, _MOST_OF_OTHERS)
        if isinstance(value, int) and value > most:
            raise ConfigError(f"{name} is {value}; it must be at most {most:,}.")
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
    lowest, highest = PRIOR_WEIGHTS
    yield (
        config.keep_class is not None and config.prior == "none",
        "keep_class is set but prior is 'none'; choose another prior, or leave keep_class out.",
    )
    yield (
        config.keep_class is not None and not lowest <= config.prior_weight <= highest,
        f"keep_class is set but prior_weight, where lambda starts from, is {config.prior_weight}; "
        f"set it between {lowest} and {highest:g}, or leave it out.",
    )
    yield (
        config.prior_prompts is not None
        and config.uses_class_images
        and config.class_folder is not None,
        "prior_prompts and class_folder are both given; leave class_folder out, for the base to "
        "generate images of all prompts, or put images of other prompts into it, with captions.",
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
        full and config.draw_base is not None,
        f"draw_base is set but method is '{config.method}', and only a LoRA can be put on another "
        "base; set method to 'lora', or leave draw_base out.",
    )
    yield from _of_adapter(config)
    yield (
        full and config.train_token,
        f"train_token is set but method is '{config.method}'; set method to 'lora', or leave "
        "train_token out.",
    )
    for name in ("text_encoder_learning_rate", "text_encoder_steps"):
        yield (
            getattr(config, name) is not None and not config.trains_text,
            f"{name} is set, but no text encoder is trained; set train_text_encoder to true, or "
            f"leave {name} out.",
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
    yield (
        config.lora_min_rank is not None and config.lora_min_rank > config.lora_rank,
        f"lora_min_rank is {config.lora_min_rank}, above lora_rank {config.lora_rank}; lower it.",
    )
    yield (
        config.lora_min_rank is not None and config.dora,
        "lora_min_rank and dora are both set, and DoRA's norm needs all ranks; leave one out.",
    )
    yield (
        config.background_prior and not config.background_weight,
        "background_prior is set but background_weight, which is its weight, is "
        f"{'left out' if config.background_weight is None else 0}; set it above 0, such as to 1.",
    )
    side = config.resolution
    yield (
        side is not None and (side < 8 or side % 8 > 0),
        f"resolution is {side}; it must be a multiple of 8, and 8 or more.",
    )


def _of_adapter(config: "TrainConfig") -> Iterator[tuple[bool, str]]:
    """Yield what contradicts an adapter that is not LoRA."""
    name = config.adapter
    yield (
        config.adapter_settings is not None and name is None,
        "adapter_settings is set but adapter is not; set it, or leave adapter_settings out.",
    )
    if name is None:
        return
    yield (
        config.method == "full",
        f"adapter is '{name}' but method is 'full'; set method to 'lora', or leave adapter out.",
    )
    yield (
        config.quantize is not None,
        f"adapter is '{name}' but quantize is '{config.quantize}', and only a LoRA trains on "
        "quantized weights here; leave one out.",
    )
    of_lora = {"dora": config.dora, "lora_dropout": config.lora_dropout,
               "lora_min_rank": config.lora_min_rank}  # fmt: skip
    for field, value in of_lora.items():
        yield (
            bool(value),
            f"{field} is set but adapter is '{name}', and only a LoRA has {field}; leave one out.",
        )
