"""What a run will take of a GPU, told from the base's configs before any weight is there.

The base is built of tensors without data, one update's forward and backward passes are followed
operation by operation, and the bytes that are alive at once and the multiplications are counted.
"""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dreambooth_lib.core.config import Subject, TrainConfig
from dreambooth_lib.core.config_checks import LOW_MEMORY, ConfigError
from dreambooth_lib.core.gpu_memory import GIB
from dreambooth_lib.families import loading
from dreambooth_lib.families.base import Family
from dreambooth_lib.training import lora
from dreambooth_lib.training.allocation_counter import (
    AllocationCounter,
    CudaAutocast,
    count_numbers,
    make_fake,
)
from dreambooth_lib.training.optimizers import resolve_optimizer
from dreambooth_lib.training.trainable import (
    Trainable,
    make_trainable,
    offloads_text_encoders,
    training_load_options,
)
from dreambooth_lib.training.validation import TOYBOX_SCORER

#: Bytes of a quantized weight: of "nf4" with a scale for every 64, itself of 8 bits with one for
#: every 256; of "int8" its scales are few.
_QUANTIZED = {"nf4": 0.5 + 1 / 64 + 4 / (64 * 256), "int8": 1.0}
#: AdamW's two moments of a parameter: in float32, and in 8 bits with a scale for every 256.
_MOMENTS = {"adamw": 8.0, "adamw8bit": 2.0 + 8 / 256}
#: Bytes of a scorer on the hub, as the default one has them: CLIP ViT-B/32 in float32.
_SCORER = 4 * 151_277_313
_HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Estimate:
    """Bytes of GPU memory at the worst moment of training, by what they hold, and the work."""

    weights: int  #: of the base's parts that are there in training, as they lie in memory
    encoding: int  #: before training: text encoders that are let go of, pictures made latents
    moments: int  #: of the optimizer, and the averaged weights where the config keeps them
    working: int  #: gradients and activations together, when they are most
    validating: int  #: what drawing takes while the run is looked at, 0 without looks
    flops: float  #: floating-point operations of one update
    preparing: int = 0  #: before it: class images drawn, the base copied to be a teacher
    scoring: int = 0  #: of the encoder that scores pictures, where it is on the GPU

    @property
    def memory(self) -> int:
        """Peak allocated bytes."""
        training = self.weights + self.scoring + self.moments + max(self.working, self.validating)
        return max(training, self.encoding, self.preparing)


def estimate(config: TrainConfig, precision: str = "fp16") -> Estimate:
    """Return the peak memory and the work of training ``config`` on a GPU.

    ``precision`` is what the GPU computes in: "fp16", "bf16" or "no". Of a base on the hub only its
    configs and tokenizers are downloaded. Takes seconds, for the largest bases half a minute.
    Raises as ``families.load_model`` and :func:`training_load_options` do.
    """
    return _estimate(_in_kind(config), precision)


def _in_kind(config: TrainConfig) -> TrainConfig:
    """Return a config without what changes no shape, so that a study's are counted once."""
    one: dict[str, Any] = {"steps": 1, "seed": 0, "learning_rate": 1.0, "weight_decay": 0.0}
    one |= {name: min(1, getattr(config, name)) for name in ("validate_every", "class_images")}
    one |= {"prior_weight": float(config.prior_weight > 0), "warmup_steps": 0, "early_stop": False}
    one["class_folder"] = config.class_folder and "."
    subject = Subject("photos", "dog", config.subject.identifier)
    return config.replace(subject=subject, **one)


@lru_cache
def _estimate(config: TrainConfig, precision: str) -> Estimate:
    half = _HALVES.get(precision, torch.float32)
    family = loading.load_meta(config.base, config.revision, **training_load_options(config, half))
    trainable = make_trainable(family, config)
    numbers = sum(parameter.numel() for parameter in lora.trained_parameters(trainable))
    modules = [family.denoiser, *family.text_encoders, *family.frozen]
    few = _QUANTIZED.get(config.quantize or "")
    quantized = [getattr(family.pipeline, name, None) for name in family.quantized_names()]
    sizes = {m: _size(m, few if m in quantized else None, half) for m in modules}
    gone = family.frozen[1:] + family.text_encoders if offloads_text_encoders(config) else []
    encoding = float(sum(sizes.pop(module) for module in gone))
    weights, taught = sum(sizes.values()), 0
    teaching = config.prior == "distilled" and config.prior_weight > 0 and config.method == "full"
    if teaching:  # the copy is made as its weights are, and then rounded
        taught = sum(p.nbytes for p in family.denoiser.parameters())
    scoring = 0
    if config.validate_every and config.memory not in LOW_MEMORY:
        judge = TOYBOX_SCORER if config.scorer == "toybox" else Path(config.scorer)
        scoring = 4 * count_numbers(judge.glob("*.safetensors")) if judge.exists() else _SCORER
    with FakeTensorMode(), CudaAutocast():
        for module in modules:
            make_fake(module)
        if gone:  # text encoders encode all prompts
            prompts = [config.subject.instance_prompt] * (8 if config.validate_every else 3)
            with (
                torch.no_grad(),
                AllocationCounter(*family.text_encoders, *family.frozen[1:]) as alive,
            ):
                family.meta_prompts(prompts)
            encoding += alive.most
        pixels = torch.zeros(family.batch_size_in_training, 3, family.resolution, family.resolution)
        with AllocationCounter() as alive:
            family.pipeline.vae.state_dict()  # its views count the autoencoder's weights as well
            family.encode_images(pixels)
        encoding = max(encoding, weights + scoring + alive.most)
        working, flops = _one_update(family, trainable, config, half)
        validating = preparing = 0
        if config.validate_every:
            validating = _drawing(family, trainable, family.batch_size_in_training, config, half)
        if config.draws_class_images:
            preparing = _drawing(family, trainable, family.default_batch_size, config, half)
    if few is not None:  # a layer at a time is unpacked
        unpacked = max(m.weight.numel() for m in _linears(family.denoiser).values()) * half.itemsize
        working, validating, preparing = (
            n and n + unpacked for n in (working, validating, preparing)
        )
    preparing = int(weights) + max(preparing, scoring + taught)
    if teaching:
        weights += sum(p.numel() * half.itemsize for p in family.denoiser.parameters())
    moments = numbers * (
        _MOMENTS[resolve_optimizer(config, "cuda")] + 4 * (config.ema_decay is not None)
    )
    return Estimate(
        int(weights), int(encoding), int(moments), working, validating, flops, preparing, scoring
    )


def suggest_savings(config: TrainConfig, precision: str) -> str:
    """Say what would take less memory than ``config``, by how much, in one sentence."""
    side = config.resolution or loading.inspect_base(config.base, config.revision).resolution
    lora: dict[str, Any] = {"method": "lora"}
    less_of: list[dict[str, Any]] = [
        {"memory": "low"}, {"memory": "lowest"}, lora, lora | {"memory": "low"},
        lora | {"quantize": "nf4"}, {"resolution": side // 16 * 8},
    ]  # fmt: skip
    now, found = estimate(config, precision).memory, []
    for changes in less_of:
        try:
            less = estimate(config.replace(**changes), precision).memory
        except ConfigError:
            continue
        if less < 0.95 * now:
            name = " and ".join(f"{field} {value!r}" for field, value in changes.items())
            found.append(f"{name} ({less / GIB:.1f} GiB)")
    return f"it takes about {now / GIB:.1f} GiB as it is, and less with {', or '.join(found)}"


def _one_update(
    family: Family, trainable: Trainable, config: TrainConfig, half: torch.dtype
) -> tuple[int, float]:
    """Count the most bytes of gradients and activations at once, and operations, of one update."""
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
    with AllocationCounter(trainable) as alive:
        with _autocast(config, half):
            given = None if config.trains_text else cond
            loss = trainable(x_t, t, given, prompts).float().square().mean()
        # As loss.backward() does, which would leave AsOnCuda before blocks are computed again.
        ones, engine = (torch.ones_like(loss),), torch.autograd.Variable._execution_engine
        engine.run_backward((loss,), ones, False, False, (), True, accumulate_grad=True)
    return alive.most, float(config.gradient_accumulation * alive.flops)


@torch.no_grad()
def _drawing(
    family: Family, model: Trainable, rows: int, config: TrainConfig, half: torch.dtype
) -> int:
    """Count the most bytes at once while ``rows`` pictures are drawn and become pixels.

    ``half`` is what autocast computes in; with float32 each part computes in its own precision.
    """
    vae, (channels, side) = family.pipeline.vae, family.latent_size
    # Guidance asks twice, once without the prompt, but where a base is told it as a number.
    twice = 1 if "guidance_embeds" in family.denoiser.config else 2
    prompts = [config.subject.class_prompt] * rows * twice
    own = family.denoiser.dtype if half is torch.float32 else torch.float32
    x_t = torch.zeros(len(prompts), channels, side, side, dtype=own)
    t = torch.full([len(prompts)], 500)
    cond = {
        name: value.to(own) if value.is_floating_point() else value
        for name, value in family.meta_prompts(prompts).items()
    }
    with AllocationCounter(model, family.denoiser, vae) as alive:
        with _autocast(config, half):
            model(x_t, t, cond, prompts)
        # One that is kept in float32 because it overflows must not be cast to less.
        with _autocast(config, half if vae.dtype is half else torch.float32):
            vae.decode(x_t[:rows].to(vae.dtype))
    return alive.most


def _autocast(config: TrainConfig, half: torch.dtype) -> torch.autocast:
    """Return what training computes under, but on the CPU, where tensors without values are."""
    enabled, cached = half is not torch.float32, config.memory not in LOW_MEMORY
    return torch.autocast("cpu", half, enabled=enabled, cache_enabled=cached)


def _size(module: torch.nn.Module, few: float | None, half: torch.dtype) -> float:
    """Count bytes of a module's tensors, of its linear layers ``few`` each where that is given."""
    held = dict.fromkeys([*module.parameters(), *module.buffers()])  # one that is shared once
    size = float(sum(tensor.nbytes for tensor in held))
    if few is not None:
        # Layers that would overflow in float16 are not quantized in any precision.
        kept = getattr(module, "_keep_in_fp32_modules", None) or ()
        packed = [
            layer.weight
            for name, layer in _linears(module).items()
            if layer.weight.dtype is half and name.rpartition(".")[2] not in kept
        ]
        size -= sum(weight.nbytes - few * weight.numel() for weight in packed)
    return size


def _linears(module: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    """Return the linear layers by name; a LoRA's own are none of them."""
    named = module.named_modules()
    return {name: m for name, m in named if isinstance(m, torch.nn.Linear) and "lora_" not in name}
