"""What a run is asked to do: frozen, validated dataclasses, and the defaults of each base."""

import dataclasses
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreambooth_lib.core import config_file
from dreambooth_lib.core.config_checks import LOW_MEMORY, ConfigError, check

#: The default identifier: one token for CLIP's tokenizer and for the embedded base's.
DEFAULT_IDENTIFIER = "ohwx"

#: Defaults that depend on the base: toybox's, and every other's, which are the paper's for Stable
#: Diffusion; such a base is drawn with as its own card says, where None is.
_DEFAULTS: dict[str, tuple[Any, Any]] = {
    "learning_rate": (3e-4, 5e-6),
    "lora_learning_rate": (4e-3, 1e-4),
    "steps": (500, 1000),
    "batch_size": (2, 1),
    "class_images": (48, 200),
    "prior_inference_steps": (25, None),
    "prior_guidance_scale": (1.0, None),
    "prompt_dropout": (0.1, 0.0),
    "ema_decay": (0.98, None),
    "guidance_scale": (3.25, None),
    "validate_every": (100, 250),
    "lora_validate_every": (200, 400),
    "scorer": ("toybox", "openai/clip-vit-base-patch32"),
}

#: Stands for such a default until ``__post_init__`` puts the number in.
_BY_BASE: Any = None

#: How pictures are drawn. Left at None they are the base's own, which its files tell once they are
#: there: see ``families.inference``.
SAMPLING_FIELDS = ("prior_inference_steps", "prior_guidance_scale", "guidance_scale",
           "validation_inference_steps")  # fmt: skip


def base_defaults(base: str, method: str = "full") -> dict[str, Any]:
    """Return the defaults of the fields that depend on base and method.

    A finished run as a base has those of the base that it was trained from.
    """
    column = 0 if origin(base) == "toybox" else 1
    defaults = {name: values[column] for name, values in _DEFAULTS.items()}
    of_lora = {name: defaults.pop(f"lora_{name}") for name in ("learning_rate", "validate_every")}
    return defaults | (of_lora if method == "lora" else {})


def origin(base: str) -> str:
    """Trace a run's folder to the base it was trained from; any other base is its own."""
    run = Path(base) / "config.toml"
    if base in ("", "toybox") or not run.is_file():
        return base
    return origin(tomllib.loads(run.read_text()).get("base", "toybox"))


@dataclass(frozen=True)
class Subject:
    """One subject: its pictures, its rare identifier and the class noun that says what it is.

    The prompts are the paper's (arXiv 2208.12242, section 3.1): ``a [identifier] [class noun]``
    for the subject and ``a [class noun]`` for the class.
    """

    pictures: str  #: a folder or a zip of pictures
    class_noun: str  #: what the subject is, in the base's words: "dog", "teapot"
    identifier: str = DEFAULT_IDENTIFIER  #: a rare single token of the base's tokenizer
    name: str = ""  #: for tables and folders; the pictures' folder name if left empty
    kind: str = ""  #: "live" or "object", where a data set says so

    def __post_init__(self) -> None:
        for field in ("class_noun", "identifier"):
            if not getattr(self, field).strip():
                raise ConfigError(f"subject.{field} is empty; give a word such as 'dog'.")
        if not self.name:
            object.__setattr__(self, "name", Path(self.pictures).stem)

    @property
    def token(self) -> str:
        """What stands for the subject in a prompt: identifier and class noun."""
        return f"{self.identifier} {self.class_noun}"

    @property
    def instance_prompt(self) -> str:
        return f"a {self.token}"

    @property
    def class_prompt(self) -> str:
        return f"a {self.class_noun}"


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides what a run does; two equal configs make equal runs on one machine.

    Fields left at ``None`` take the base's defaults (see ``docs`` of each). Raises
    :class:`ConfigError` for a value that is out of range or contradicts another.
    """

    subject: Subject
    base: str = "toybox"  #: "toybox", a hub id, a folder in diffusers' layout, or a run's folder
    revision: str | None = None  #: the hub revision of the base
    variant: str | None = None  #: the hub variant of the base's files, such as "fp16"

    # Objective: L = mean(w e over instance) + prior_weight * mean(w e over class)
    prior_weight: float = 1.0  #: lambda of the prior preservation loss; 0 trains without it
    min_snr_gamma: float | None = None  #: min-SNR weights (arXiv 2303.09556); 5 is its default
    #: share of prompts replaced by "", to keep guidance working; None is 0.1 for toybox, else 0
    prompt_dropout: float = _BY_BASE

    # Prior: what keeps the class as the frozen base knows it
    #: "generated": class images that the base draws (the paper's); "distilled": the base's own
    #: prediction for the class prompt, on the subject's noised pictures, is what the trained one
    #: must keep to, with no class images; "none": nothing, which makes prior_weight 0
    prior: str = "generated"
    class_images: int = _BY_BASE  #: how many; None is 48 for toybox, 200 otherwise
    class_folder: str | None = None  #: a folder of the user's own class images instead
    #: None is 25 for toybox, otherwise as many as finish the base's pictures
    prior_inference_steps: int | None = None
    #: None is 1 for toybox, otherwise as the base's own card says. Without guidance (1 for Stable
    #: Diffusion, 0 for Z-Image) the class images are what the base itself believes, so that
    #: training on them leaves it as it was; guided ones are better drawn but more alike.
    prior_guidance_scale: float | None = None

    # What is trained
    method: str = "full"  #: "full": the weights; "lora": low-rank additions (arXiv 2106.09685)
    lora_rank: int = 16
    lora_alpha: int | None = None  #: the additions are scaled by alpha / rank; None is the rank
    lora_dropout: float = 0.0
    lora_layers: str = (
        "all"  #: those that LoRA adapts: "attention", or "all", feed-forward ones too
    )
    dora: bool = False  #: learn each layer's magnitude apart from its direction (arXiv 2402.09353)
    #: QLoRA (arXiv 2305.14314): the frozen denoiser and large text encoders in 4 bits, "nf4", or in
    #: 8, "int8"; needs a GPU
    quantize: str | None = None
    train_text_encoder: bool = False
    #: learn the identifier as a new word, by an embedding of its own, beside LoRA (pivotal tuning)
    train_token: bool = False

    # Training
    steps: int = _BY_BASE  #: optimizer updates; None is 500 for toybox, 1000 otherwise
    batch_size: int = _BY_BASE  #: instance pictures an update, and as many class images,
    #: over all processes and accumulated micro-batches; None is 2 for toybox, 1 otherwise
    gradient_accumulation: int = 1  #: micro-batches an update is split into
    #: None is 3e-4 for toybox and 5e-6 (the paper's) otherwise; by LoRA 4e-3 and 1e-4
    learning_rate: float = _BY_BASE
    lr_schedule: str = "constant"
    warmup_steps: int = 0
    optimizer: str = "auto"  #: "auto": 8-bit AdamW on a GPU, torch's fused AdamW on a CPU
    weight_decay: float = 0.01
    #: the norm that all gradients together are clipped to; None is 1, or none where weights are
    #: updated within the backward pass, since it needs all of them at once
    max_grad_norm: float | None = None
    dropout: float = 0.0  #: of the denoiser's own dropout layers
    #: keep an average of the weights, which the run ends with; None is 0.98 for toybox, else none;
    #: 0.999 suits 1000 steps
    ema_decay: float | None = _BY_BASE
    mixed_precision: str = "auto"  #: "auto": bf16 where the GPU has it, else fp16; "no" on a CPU
    gradient_checkpointing: bool = False  #: about 20% slower for much less memory
    #: "standard": float32 weights; "low": gradient checkpointing, and the weights of a whole model
    #: are updated within the backward pass, so that gradients never exist together; "lowest":
    #: bfloat16 weights too, rounded stochastically; "auto": the first of these that fits the GPU,
    #: "standard" on a CPU
    memory: str = "auto"

    # Pictures
    resolution: int | None = None  #: pixels a side; None is the base's own
    crop: str = "center"
    flip: bool = False  #: mirror pictures at random; not for a subject with writing on it

    #: of the run's pictures; None is 3.25 for toybox, otherwise as the base's own card says
    guidance_scale: float | None = None

    seed: int = 0
    #: updates between checkpoints; None is at each validation, or every 250 updates without any;
    #: the last step always has one
    checkpoint_every: int | None = None
    checkpoints_kept: int = 2  #: the newest ones; the best is kept besides

    # Watching for overfitting
    #: updates between looks, each of which draws and scores pictures and saves a checkpoint; 0 is
    #: never; None is what costs about 15% of the training time: 100 for toybox, 250 otherwise, by
    #: LoRA 200 and 400
    validate_every: int = _BY_BASE
    #: steps of the pictures of a look; None is 10 for toybox, otherwise as many as finish them
    validation_inference_steps: int | None = None
    hold_out: bool = True  #: keep one of four photos or more out of training, to measure its loss
    scorer: str = _BY_BASE  #: the CLIP that scores, by hub id or folder; "toybox" for its own
    early_stop: bool = False  #: end when looks get no better, with the best checkpoint's weights

    def __post_init__(self) -> None:
        if not isinstance(self.subject, Subject):
            raise ConfigError("subject is missing; make one with load_subject(folder, class_noun).")
        for name, value in base_defaults(self.base, self.method).items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if self.prior == "none":
            object.__setattr__(self, "prior_weight", 0.0)
        check(self)

    @property
    def trains_text(self) -> bool:
        """Whether text encoders, or their embedding of a new word, change in training."""
        return self.train_text_encoder or self.train_token

    @property
    def steps_in_backward(self) -> bool:
        """Whether weights are updated within the backward pass, each heap of gradients freed.

        A LoRA's gradients are small: stepping them one by one would only cost time.
        """
        return self.memory in LOW_MEMORY and self.method == "full"

    @property
    def draws_class_images(self) -> bool:
        """Whether the run needs class images that its base must draw."""
        asked = self.prior == "generated" and self.prior_weight > 0
        return asked and self.class_folder is None

    @classmethod
    def auto(cls, subject: Subject, base: str = "toybox", **changes: Any) -> "TrainConfig":
        """Make settings that nobody tunes by hand: lambda 1, and as many steps as help.

        A run may take half as many steps again as the base's default and ends with the best
        checkpoint's weights, or before once looks no longer get better. Lambda between 0.5 and 2
        made less than 1% of difference on the embedded base (docs/studies); steps did.
        """
        steps = base_defaults(base)["steps"] * 3 // 2
        return cls(subject, base, **{"steps": steps, "early_stop": True} | changes)

    def replace(self, **changes: Any) -> "TrainConfig":
        """Return this config with some fields changed, validated anew."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Return a plain dict without the fields that are None or empty, as TOML and JSON want."""
        return config_file.to_dict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "TrainConfig":
        """Reverse :meth:`to_dict`. Raises :class:`ConfigError` for unknown fields."""
        return config_file.from_dict(cls, fields)

    def to_toml(self) -> str:
        return config_file.to_toml(self)

    @classmethod
    def from_toml(cls, path: str | Path) -> "TrainConfig":
        """Read a TOML file; paths in it are taken relative to the file's folder."""
        return cls.from_dict(config_file.from_toml(path))
