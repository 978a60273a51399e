"""Define the settings of a run: frozen, validated dataclasses with defaults for each base."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreambooth_lib.core import config_file
from dreambooth_lib.core.base_defaults import base_defaults, fields_by_default, origin
from dreambooth_lib.core.config_checks import LOW_MEMORY, check
from dreambooth_lib.core.config_types import ConfigError, take_types
from dreambooth_lib.core.prior_prompts import GENERIC, generic_prompts
from dreambooth_lib.core.subject import Subject

VALIDATION_SHARE = 0.15  #: of the training time: the default's limit, see ``validation_share``

#: A placeholder for such a default until ``__post_init__`` fills the number in.
_BY_BASE: Any = None

#: Fields that say how images are generated. None means the base's own settings, which are read
#: from its files when they are needed (see ``families.inference_settings``).
SAMPLING_FIELDS = ("prior_inference_steps", "prior_guidance_scale", "guidance_scale",
           "validation_inference_steps")  # fmt: skip


@dataclass(frozen=True)
class TrainConfig:
    """All settings of a run.

    On one CPU, two runs with equal configs and the same photos give identical weights; on a GPU
    they agree up to rounding. Fields left at ``None`` take the base's defaults. Raises
    :class:`ConfigError` for a value that is out of range or contradicts another.
    """

    subject: Subject
    #: "toybox", a Hub id, a folder in diffusers' layout, a run's folder, or a .safetensors file of
    #: Stable Diffusion: its path, OWNER/REPO/FILE on the Hub, or an https link
    base: str = "toybox"
    revision: str | None = None  #: the base's revision on the Hub
    variant: str | None = None  #: the variant of the base's files on the Hub, such as "fp16"
    #: what a Stable Diffusion base predicts, where its files say otherwise or nothing: "epsilon",
    #: "v_prediction", or "v_prediction_ztsnr" with a zero terminal SNR (arXiv 2305.08891)
    prediction_type: str | None = None
    #: the text encoder's layer that encodes prompts, counted from the last as 1, like A1111's "Clip
    #: skip"; Stable Diffusion 1.x only. None keeps the base's.
    clip_skip: int | None = None

    # Objective: L = mean(w e over instance) + prior_weight * mean(w e over class)
    prior_weight: float = 1.0  #: lambda, the weight of the prior preservation loss; 0 turns it off
    #: target class loss ratio, such as 0.95: lambda starts at ``prior_weight`` and is adjusted so
    #: that the base's loss on held-out class images is about 95% of the trained model's; None:
    #: lambda is fixed
    keep_class: float | None = None
    min_snr_gamma: float | None = None  #: min-SNR weighting (arXiv 2303.09556, whose default is 5)
    #: train more on noisy timesteps above 0, on clean ones below; None is as the base was trained
    timestep_bias: float | None = None
    #: share of prompts replaced by "", to keep guidance working; None is 0.1 for toybox, else 0
    prompt_dropout: float = _BY_BASE

    # Prior preservation: what keeps the class as the frozen base generates it
    #: "generated": train on images that the base generates (the paper's way); "distilled": on the
    #: subject's noised images with the class prompt, match the frozen base's prediction, without
    #: class images; "distilled_images": match it on class images; "none": no prior preservation,
    #: prior_weight becomes 0. None is "generated" for method "full"; for a LoRA, "distilled_images"
    #: with prior_prompts "generic", which also preserves other prompts
    prior: str = _BY_BASE
    #: also preserve images of these prompts, with any prior: half of the class images, and half of
    #: the class rows of each batch, are theirs; "" is allowed, "generic" is a list for this base
    prior_prompts: tuple[str, ...] | None = None
    #: pull the weights towards the base's: each step shrinks the change by learning_rate x this
    anchor_weight: float | None = None
    class_images: int = _BY_BASE  #: how many; None is 48 for toybox, else 200
    class_folder: str | None = None  #: a folder of your own class images to use instead
    #: steps of the base's own sampler; None is DPM-Solver++ in the few steps that are enough for
    #: it, where the base can use it, else the fewest steps that finish an image of the base
    prior_inference_steps: int | None = None
    #: None is 1 for toybox, else what the base's model card says. Class images generated
    #: without guidance (1 for Stable Diffusion, 0 for Z-Image) follow the base's own distribution,
    #: so training on them changes it least; guided ones look better but more alike.
    prior_guidance_scale: float | None = None

    # What is trained
    method: str = "full"  #: "full": all weights; "lora": low-rank adapters (arXiv 2106.09685)
    #: another of peft's adapters instead of LoRA, by peft's name for it, such as "lokr", "loha" or
    #: "oft"; with method "lora"
    adapter: str | None = None
    #: further settings of that adapter in peft, numbers only: {"decompose_factor": 8} for "lokr"
    adapter_settings: dict[str, float] | None = None
    #: also the size of another adapter: its rank, or the size of its blocks ("oft", "c3a", "road")
    lora_rank: int = 16
    lora_alpha: int | None = None  #: adapters are scaled by alpha / rank; None is the rank
    lora_dropout: float = 0.0
    #: train only so many ranks at the noisiest timestep, and more the less noise there is: T-LoRA
    #: (arXiv 2507.05964); None trains all ranks at every timestep
    lora_min_rank: int | None = None
    lora_layers: str = "all"  #: layers with an adapter: "attention", or "all"
    dora: bool = False  #: learn a layer's magnitude and direction separately (arXiv 2402.09353)
    #: QLoRA (arXiv 2305.14314): keep the frozen denoiser and large text encoders in 4 bits ("nf4")
    #: or 8 bits ("int8"); needs a GPU
    quantize: str | None = None
    #: a model distilled from the base, such as FLUX.2-klein-4B: validation images and samples are
    #: generated with the LoRA loaded on it, in its own number of steps and guidance scale; the base
    #: still generates the class images. None: the base itself
    draw_base: str | None = None
    train_text_encoder: bool = False
    #: learning rate of all that is trained in the text encoders; None is learning_rate
    text_encoder_learning_rate: float | None = None
    #: optimizer steps after which the text encoders stop training; None: they train to the end
    text_encoder_steps: int | None = None
    #: also learn a new token embedding for the identifier (pivotal tuning); LoRA only
    train_token: bool = False

    # Training
    steps: int = _BY_BASE  #: optimizer steps; None is 500 for toybox, else 1000
    #: instance images per step, and as many class images, over all processes and micro-batches;
    #: None is 2 for toybox, else 1
    batch_size: int = _BY_BASE
    gradient_accumulation: int = 1  #: micro-batches per optimizer step
    #: None: 3e-4 for toybox and 5e-6 (the paper's) for other bases; with LoRA 4e-3 and 1e-4
    learning_rate: float = _BY_BASE
    lr_schedule: str = "constant"
    warmup_steps: int = 0
    optimizer: str = "auto"  #: "auto": 8-bit AdamW on a GPU, torch's fused AdamW on a CPU
    weight_decay: float = 0.01
    #: clip the global gradient norm to this; None is 1, or no clipping where the optimizer steps
    #: during the backward pass, since clipping needs all gradients at once
    max_grad_norm: float | None = None
    dropout: float = 0.0  #: of the denoiser's own dropout layers
    #: keep an exponential moving average (EMA) of the weights and save that; None is 0.98 for
    #: toybox, else no EMA; 0.999 suits 1000 steps
    ema_decay: float | None = _BY_BASE
    mixed_precision: str = "auto"  #: "auto": bf16 if the GPU supports it, else fp16; "no" on a CPU
    #: a third to a half slower on an H200, but needs much less memory
    gradient_checkpointing: bool = False
    #: "standard": float32 weights; "low": gradient checkpointing and, for a whole model, optimizer
    #: steps during the backward pass, which free each gradient at once; "lowest": also bfloat16
    #: weights with stochastic rounding; "auto": the first level that fits the GPU
    memory: str = "auto"

    # Images
    resolution: int | None = None  #: pixels per side; None is the base's own
    #: "center" or "random": a square; "subject": a square around the subject, by its mask or where
    #: crops.json beside the photos says; "buckets": aspect ratio bucketing, in which each photo
    #: gets the size that cuts off least, around the subject
    crop: str = "center"
    #: weight of the loss outside the photos' masks, from 0 to 1, where the subject has 1; None: no
    #: masks are used
    background_weight: float | None = None
    #: outside the masks, match the frozen base's prediction instead of the photo
    background_prior: bool = False
    flip: bool = False  #: flip images at random; not for a subject with text on it
    #: how many chunks of 75 tokens of a caption or prompt are read: 1 to 3; Stable Diffusion 1.x,
    #: 2.x and XL only
    prompt_chunks: int = 1

    #: for images generated from the run; None is 3.25 for toybox, else what the model card says
    guidance_scale: float | None = None

    seed: int = 0
    #: steps between checkpoints; None saves one at each validation, or every 250 steps if the run
    #: never validates; the last step always saves one
    checkpoint_every: int | None = None
    checkpoints_kept: int = 2  #: how many of the newest to keep, besides the best one

    # Validation
    #: steps between validations, which generate and score images; 0 turns validation off. None: 125
    #: for toybox (250 with LoRA), 250 for other bases (400 with LoRA); validation_share may then
    #: skip some
    validate_every: int = _BY_BASE
    #: skip validations, but the base's and the last step's, that would take more than this share of
    #: the training time as measured; None is 0.15 where validate_every is None, else no limit;
    #: early_stop needs all of them
    validation_share: float | None = None
    #: steps of the base's own sampler; None is a few of the fast one, where the base can use it
    validation_inference_steps: int | None = None
    hold_out: bool = True  #: of four photos or more, keep one out of training to measure its loss
    #: the CLIP or SigLIP that compares validation images with their prompts: a Hub id or folder;
    #: "toybox" for its own
    scorer: str = _BY_BASE
    #: the encoder that compares images with images, for likeness, class and other prompts; None is
    #: DINOv2 for photos where scorer is None, too, else the scorer itself
    image_scorer: str = _BY_BASE
    early_stop: bool = False  #: stop when validation stops improving; keep the best checkpoint

    def __post_init__(self) -> None:
        if not isinstance(self.subject, Subject):
            raise ConfigError("subject is missing; make one with load_subject(folder, class_noun).")
        by_lora = self.method == "lora" and self.prior is None and self.prior_weight
        if by_lora and self.prior_prompts is None and self.class_folder is None:
            object.__setattr__(self, "prior_prompts", GENERIC)
        if self.prior_prompts == GENERIC:
            prompts = generic_prompts(origin(self.base), self.subject.class_noun)
            object.__setattr__(self, "prior_prompts", prompts)
        take_types(self)
        if self.validate_every is None and self.validation_share is None:
            object.__setattr__(self, "validation_share", VALIDATION_SHARE)
        if self.image_scorer is None and self.scorer is not None:
            object.__setattr__(self, "image_scorer", self.scorer)
        for name, value in base_defaults(self.base, self.method).items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if self.prior == "none":
            object.__setattr__(self, "prior_weight", 0.0)
        check(self)

    @property
    def has_lora_prior(self) -> bool:
        """Tell whether prior and prior_prompts are those that a LoRA has by default."""
        own = base_defaults(self.base, "lora")["prior"]
        generic = generic_prompts(origin(self.base), self.subject.class_noun)
        return self.method == "lora" and (self.prior, self.prior_prompts) == (own, generic)

    @property
    def trains_text(self) -> bool:
        """Tell whether training changes the text encoders or adds a token to them."""
        return self.train_text_encoder or self.train_token

    @property
    def steps_in_backward(self) -> bool:
        """Tell whether the optimizer steps during the backward pass, freeing gradients as it goes.

        Never for LoRA: its gradients are small, and stepping them in chunks would only cost time.
        """
        return self.memory in LOW_MEMORY and self.method == "full"

    @property
    def draws_class_images(self) -> bool:
        """Tell whether the base has to generate class images for this run."""
        return self.uses_class_images and self.class_folder is None

    @property
    def uses_class_images(self) -> bool:
        """Tell whether the prior preservation loss is of class images, the base's or the user's."""
        return self.prior in ("generated", "distilled_images") and self.prior_weight > 0

    @property
    def distills(self) -> bool:
        """Tell whether the frozen base's prediction is the prior's target, instead of the noise."""
        return self.prior in ("distilled", "distilled_images") and self.prior_weight > 0

    @property
    def asks_base(self) -> bool:
        """Tell whether the frozen base predicts at each step: what is distilled, or backgrounds."""
        return self.distills or self.background_prior

    @classmethod
    def auto(cls, subject: Subject, base: str = "toybox", **changes: Any) -> "TrainConfig":
        """Make a config that needs no tuning: lambda 1, and as many steps as help.

        The run may take 1.5 times the base's default steps. It stops early once validation stops
        improving, and keeps the best checkpoint. On toybox lambda between 0.5 and 2 made less than
        1% of difference (docs/studies); the number of steps did matter.
        """
        steps = base_defaults(base)["steps"] * 3 // 2
        return cls(subject, base, **{"steps": steps, "early_stop": True} | changes)

    def replace(self, **changes: Any) -> "TrainConfig":
        """Return this config with some fields changed, validated anew.

        With another ``base`` or ``method``, fields that have a default by these get that of the
        new ones. A new ``validate_every`` has no ``validation_share`` but one that is given with
        it, and a new ``scorer`` compares images, too, unless there is an ``image_scorer`` with it.
        The generic prompts of a LoRA's default prior go with it, and follow a new subject or base.
        A prior that replaces "none" has the weight 1 unless another is given.
        """
        if self.has_lora_prior and "prior_prompts" not in changes:
            new_method = changes.get("method", self.method) != self.method
            other = "prior" in changes or changes.get("class_folder") or new_method
            changes = {"prior_prompts": None if other else GENERIC} | changes
        if self.prior == "none" and changes.get("prior", "none") != "none":
            changes = {"prior_weight": 1.0} | changes
        if "scorer" in changes:
            changes = {"image_scorer": None} | changes
        if "validate_every" in changes:
            changes = {"validation_share": None} | changes
        return dataclasses.replace(self, **fields_by_default(self, changes) | changes)

    def to_dict(self) -> dict[str, Any]:
        """Return a plain dict for TOML or JSON, without fields that are None or empty."""
        return config_file.to_dict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "TrainConfig":
        """Make a config from :meth:`to_dict`'s dict. Raises ConfigError for unknown fields."""
        return config_file.from_dict(cls, fields)

    def to_toml(self) -> str:
        return config_file.to_toml(self)

    @classmethod
    def from_toml(cls, path: str | Path) -> "TrainConfig":
        """Read a TOML file; paths in it are relative to the file's folder.

        Raises :class:`ConfigError`, which names the file and the field.
        """
        fields = config_file.from_toml(path)
        try:
            return cls.from_dict(fields)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None
