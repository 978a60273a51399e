"""The configs of a study of priors: what keeps the class, and what keeps the rest."""

from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.core.subject import Subject

STEPS = 300


def priors(subject: Subject) -> dict[str, TrainConfig]:
    """Return a config for each prior by name, by LoRA of rank 8 and with all weights."""
    kinds = {
        "class images": {"prior": "generated"},
        "class images, generic prompts": {"prior": "generated", "prior_prompts": "generic"},
        "distilled": {"prior": "distilled"},
        "distilled, blank": {"prior": "distilled", "prior_prompts": ("",)},
        "distilled, generic prompts": {"prior": "distilled", "prior_prompts": "generic"},
        "distilled on class images": {"prior": "distilled_images"},
        "distilled on generic images": {"prior": "distilled_images", "prior_prompts": "generic"},
        "class images, anchored": {"prior": "generated", "anchor_weight": 1.0},
        "anchored alone": {"prior": "none", "anchor_weight": 5.0},
        "distilled on generic images, anchored": {
            "prior": "distilled_images",
            "prior_prompts": "generic",
            "anchor_weight": 1.0,
        },
    }
    full = TrainConfig(subject, hold_out=False, steps=STEPS)
    lora = full.replace(method="lora", lora_rank=8)
    methods = {"LoRA": lora, "full": full}
    both = {f"{m} {name}": config.replace(**fields)
            for m, config in methods.items() for name, fields in kinds.items()}  # fmt: skip
    for name, config in both.items():
        if config.anchor_weight is not None:  # each step's share, the learning rate's times this
            alike = config.anchor_weight * lora.learning_rate / config.learning_rate
            both[name] = config.replace(anchor_weight=alike)
    more = {
        "rate 2e-3": {"learning_rate": 2e-3},
        "T-LoRA": {"lora_min_rank": 4},
        "noisy timesteps": {"timestep_bias": 1.0},
        "clean timesteps": {"timestep_bias": -1.0},
    }
    best = both["LoRA distilled on generic images"]
    return both | {f"LoRA distilled on generic images, {name}": best.replace(**fields)
                   for name, fields in more.items()}  # fmt: skip
