"""Estimate a run's GPU memory from the base's configs, before any weight is loaded.

The base is built of fake tensors. One training step's forward and backward passes run on them, and
the bytes allocated at once and the FLOPs are counted.
"""

from dataclasses import dataclass
from functools import lru_cache
from math import inf
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.core.config_checks import LOW_MEMORY
from dreambooth_lib.core.config_types import ConfigError
from dreambooth_lib.core.gpu_memory import GIB
from dreambooth_lib.core.subject import Subject
from dreambooth_lib.core.threads import one_at_a_time
from dreambooth_lib.families import loading, peft_adapters
from dreambooth_lib.families.base import Family, vae_scale
from dreambooth_lib.families.prompt_cache import BATCH
from dreambooth_lib.training import lora
from dreambooth_lib.training.allocation_counter import (
    AllocationCounter,
    CudaAutocast,
    count_numbers,
    make_fake,
)
from dreambooth_lib.training.native_precision import dtype_of
from dreambooth_lib.training.optimizer_step import Optimizer
from dreambooth_lib.training.optimizers import resolve_optimizer
from dreambooth_lib.training.part_sizes import linears, sizes_of_parts
from dreambooth_lib.training.trainable import (
    Trainable,
    load_meta,
    make_trainable,
    offloads_text_encoders,
    precision_of_weights,
    training_load_options,
)
from dreambooth_lib.training.validation import scorer_source

#: Bytes of AdamW's two moments per parameter: in float32, and in 8 bits with a scale per 256. Any
#: other optimizer counts as float32 AdamW.
_MOMENTS = {"adamw": 8.0, "adamw8bit": 2.0 + 8 / 256}
#: Bytes of scorers on the Hub, assumed to be the default ones: CLIP ViT-B/32 and DINOv2 small in
#: float32.
_SCORER, _IMAGE_SCORER = 4 * 151_277_313, 4 * 22_056_576


@dataclass(frozen=True)
class Estimate:
    """Peak bytes of GPU memory by what they hold, and the FLOPs of a training step."""

    weights: int  #: of the base's parts that stay on the GPU in training
    encoding: int  #: before training: text encoders that are offloaded, images encoded to latents
    moments: int  #: of the optimizer, and the EMA weights if the config has them
    working: int  #: gradients and activations together at their peak
    validating: int  #: drawing validation images; 0 without validation
    flops: float  #: of one training step
    preparing: int = 0  #: before training: drawing class images, copying the base as a teacher
    scoring: int = 0  #: the scorers, if they are on the GPU

    @property
    def memory(self) -> int:
        """Return the peak allocated bytes."""
        training = self.weights + self.scoring + self.moments + max(self.working, self.validating)
        return max(training, self.encoding, self.preparing)


@one_at_a_time
def estimate(config: TrainConfig, precision: str = "fp16") -> Estimate:
    """Estimate the peak memory and the FLOPs of training ``config`` on a GPU.

    ``precision`` is what the GPU computes in: "fp16", "bf16" or "no". For a base on the Hub, only
    configs and tokenizers are downloaded. Takes seconds, for the largest bases half a minute.
    Raises as ``families.load_model`` and :func:`training_load_options` do.
    """
    return _estimate(_without_details(config), precision_of_weights(config, precision))


def _without_details(config: TrainConfig) -> TrainConfig:
    """Return a config without what changes no shape, so that one estimate serves a whole study."""
    fixed: dict[str, Any] = {"steps": 1, "seed": 0, "learning_rate": 1.0, "weight_decay": 0.0}
    fixed |= {name: min(1, getattr(config, name)) for name in ("validate_every", "class_images")}
    fixed |= {"prior_weight": float(config.prior_weight > 0), "warmup_steps": 0}
    fixed |= {"text_encoder_learning_rate": None, "text_encoder_steps": None}
    fixed |= {"early_stop": False, "keep_class": None, "class_folder": config.class_folder and "."}
    subject = Subject("photos", "dog", config.subject.identifier)
    return config.replace(subject=subject, **fixed)


@lru_cache
def _estimate(config: TrainConfig, precision: str) -> Estimate:
    half = dtype_of(precision)
    family = load_meta(config, **training_load_options(config, half))
    trainable = make_trainable(family, config)
    if config.adapter is not None:
        peft_adapters.without_dice(trainable)
    numbers = sum(parameter.numel() for parameter in lora.trained_parameters(trainable))
    modules = [family.denoiser, *family.text_encoders, *family.frozen]
    sizes = sizes_of_parts(family, config.quantize, half)
    offloaded = family.frozen[1:] + family.text_encoders if offloads_text_encoders(config) else []
    encoding = float(sum(sizes.pop(module) for module in offloaded))
    weights, teacher = sum(sizes.values()), 0
    has_teacher = config.asks_base and config.method == "full"
    if has_teacher:  # the weights are copied as they are, and then rounded
        teacher = sum(p.nbytes for p in family.denoiser.parameters())
    scoring = 0
    if config.validate_every and config.memory not in LOW_MEMORY:
        hub = {config.image_scorer: _IMAGE_SCORER} | {config.scorer: _SCORER}
        for name, size in hub.items():
            scorer = Path(scorer_source(name))
            weights_of = scorer.glob("[!.]*.safetensors")
            scoring += 4 * count_numbers(weights_of) if scorer.exists() else size
    with FakeTensorMode(), CudaAutocast():
        for module in modules:
            make_fake(module)
        if offloaded:  # text encoders encode all prompts first
            prompts = [config.subject.instance_prompt] * (BATCH if config.validate_every else 3)
            encoders = (*family.text_encoders, *family.frozen[1:])
            with torch.no_grad(), AllocationCounter(*encoders) as counter:
                family.meta_prompts(prompts)
            encoding += counter.peak_bytes
        pixels = torch.zeros(family.batch_size_in_training, 3, family.resolution, family.resolution)
        with AllocationCounter() as counter:
            family.pipeline.vae.state_dict()  # its views count the autoencoder's weights as well
            family.encode_images(pixels)
        encoding = max(encoding, weights + scoring + counter.peak_bytes)
        working, flops = _training_step(family, trainable, config, half)
        validating = preparing = 0
        if config.validate_every:
            rows = family.batch_size_in_training
            validating = _drawing_bytes(family, trainable, rows, config, half)
        if config.draws_class_images:
            rows = family.default_batch_size
            preparing = _drawing_bytes(family, trainable, rows, config, half)
    if config.quantize is not None:  # one layer at a time is unpacked
        unpacked = max(m.weight.numel() for m in linears(family.denoiser).values()) * half.itemsize
        working, validating, preparing = (
            n and n + unpacked for n in (working, validating, preparing)
        )
    preparing = int(weights) + max(preparing, scoring + teacher)
    if has_teacher:
        weights += sum(p.numel() * half.itemsize for p in family.denoiser.parameters())
    if config.draw_base is not None and config.validate_every:  # loaded when all is prepared
        weights += sizes[family.denoiser]
    bytes_per_parameter = _MOMENTS.get(resolve_optimizer(config, "cuda"), 8.0)
    bytes_per_parameter += 4 * (config.ema_decay is not None)
    if config.anchor_weight is not None:  # a copy of the weights, as they are trained
        bytes_per_parameter += 2 if config.memory == "lowest" and config.method == "full" else 4
    return Estimate(
        int(weights), int(encoding), int(numbers * bytes_per_parameter), working, validating,
        flops, preparing, scoring,
    )  # fmt: skip


def suggest_savings(config: TrainConfig, precision: str, room: float = inf) -> str:
    """Say how much memory ``config`` takes, and which settings would take less.

    Stops at the third that takes at most ``room`` bytes, since an estimate may take half a minute.
    The words go on after a run's name: "which needs about 12.0 GiB; resume with ...".
    """
    side = config.resolution or loading.inspect_base(config.base, config.revision).resolution
    lora: dict[str, Any] = {"method": "lora"}
    suggestions: list[dict[str, Any]] = [
        {"memory": "low"}, {"memory": "lowest"}, lora, lora | {"memory": "low"},
        lora | {"quantize": "nf4"}, {"resolution": side // 32 * 16},
    ]  # fmt: skip
    now, fitting = estimate(config, precision).memory, 0
    tried: list[dict[str, Any]] = [{}]
    resumed: list[str] = []  # what a run can change when it is resumed
    anew: list[str] = []
    for suggestion in suggestions:
        changes = {f: value for f, value in suggestion.items() if getattr(config, f) != value}
        if changes in tried:  # as of a LoRA
            continue
        tried.append(changes)
        try:
            less = estimate(config.replace(**changes), precision).memory
        except ConfigError:
            continue
        if less < 0.95 * now:
            name = " and ".join(f"{field}={value!r}" for field, value in changes.items())
            fixed = changes.keys() & {"method", "quantize"}
            (anew if fixed else resumed).append(f"{name} ({less / GIB:.1f} GiB)")
            fitting += less <= room
        if fitting == 3:
            break
    ways = [f"resume with {' or '.join(resumed)}"] if resumed else []
    ways += [f"start a new run with {' or '.join(anew)}"] if anew else []
    ways = ways or ["choose a smaller base, or use a GPU with more memory"]
    return f"which needs about {now / GIB:.1f} GiB; {', or '.join(ways)}"


def _training_step(
    family: Family, trainable: Trainable, config: TrainConfig, half: torch.dtype
) -> tuple[int, float]:
    """Return a training step's peak bytes of gradients and activations together, and its FLOPs."""
    rows = config.batch_size // config.gradient_accumulation
    prompts = [config.subject.instance_prompt] * rows
    if config.prior_weight > 0:
        prompts += [config.subject.class_prompt] * rows
    channels, side = family.latent_size
    x_t = torch.zeros(len(prompts), channels, side, side)
    t = torch.full([len(prompts)], 500)
    with torch.no_grad():
        cond = family.meta_prompts(prompts)
    if config.steps_in_backward:
        for parameter in lora.trained_parameters(trainable):
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    with AllocationCounter(trainable) as counter:
        with _autocast(config, half):
            own_cond = None if config.trains_text else cond
            loss = trainable(x_t, t, own_cond, prompts).float().square().mean()
        # As loss.backward() does, which would leave CudaAutocast before blocks are recomputed.
        ones, engine = (torch.ones_like(loss),), torch.autograd.Variable._execution_engine
        engine.run_backward((loss,), ones, False, False, (), True, accumulate_grad=True)
    peak = counter.peak_bytes
    if not config.steps_in_backward:  # the gradients are then copied, a bucket at a time
        gradients = sum(parameter.nbytes for parameter in lora.trained_parameters(trainable))
        peak = max(peak, gradients + min(gradients, 4 * Optimizer.LARGEST_BUCKET))
    return peak, float(config.gradient_accumulation * counter.flops)


@torch.no_grad()
def _drawing_bytes(
    family: Family, model: Trainable, rows: int, config: TrainConfig, half: torch.dtype
) -> int:
    """Return the peak bytes while ``rows`` images are drawn and decoded.

    ``half`` is what autocast computes in; with float32 each part computes in its own precision.
    """
    vae, (channels, side) = family.pipeline.vae, family.latent_size
    # Guidance doubles the batch, but for bases that take its scale as an input, or twice draw.
    copies = 1 if "guidance_embeds" in family.denoiser.config else 2
    prompts = [config.subject.class_prompt] * rows * copies
    dtype = family.denoiser.dtype if half is torch.float32 else torch.float32
    x_t = torch.zeros(len(prompts), channels, side, side, dtype=dtype)
    t = torch.full([len(prompts)], 500)
    cond = {
        name: value.to(dtype) if value.is_floating_point() else value
        for name, value in family.meta_prompts(prompts).items()
    }
    with AllocationCounter(model, family.denoiser, vae) as counter:
        with _autocast(config, half):
            model(x_t, t, cond, prompts)
        # An autoencoder that stays in float32 because it overflows must not be cast to less.
        with _autocast(config, half if vae.dtype is half else torch.float32):
            side = family.resolution // vae_scale(dict(vae.config))
            latents = x_t[:rows].reshape(rows, vae.config.latent_channels, side, side)
            vae.decode(latents.to(vae.dtype))
    return counter.peak_bytes


def _autocast(config: TrainConfig, half: torch.dtype) -> torch.autocast:
    """Return training's autocast, but for the CPU, where the fake tensors are."""
    enabled, cached = half is not torch.float32, config.memory not in LOW_MEMORY
    return torch.autocast("cpu", half, enabled=enabled, cache_enabled=cached)
