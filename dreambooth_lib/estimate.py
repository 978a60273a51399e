"""What a run will take of a GPU, told from the base's configs before any weight is there.

The base is built of tensors without data, one update's forward and backward passes are followed
operation by operation, and the bytes that are alive at once and the multiplications are counted.
"""

import weakref
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry

from dreambooth_lib import families, lora
from dreambooth_lib.config import LOW, ConfigError, TrainConfig
from dreambooth_lib.families.base import Family
from dreambooth_lib.optim import choose
from dreambooth_lib.weights import Trainable, lets_go, precisions, trainable_of

#: Bytes of a quantized weight: of "nf4" with a scale for every 64, itself of 8 bits with one for
#: every 256; of "int8" its scales are few.
_QUANTIZED = {"nf4": 0.5 + 1 / 64 + 4 / (64 * 256), "int8": 1.0}
#: AdamW's two moments of a parameter: in float32, and in 8 bits with a scale for every 256.
_MOMENTS = {"adamw": 8.0, "adamw8bit": 2.0 + 8 / 256}
GIB = 2**30


@dataclass(frozen=True)
class Estimate:
    """Bytes of GPU memory at the worst moment of training, by what they hold, and the work."""

    weights: int  #: of the base's parts that are there in training, as they lie in memory
    encoding: int  #: before training: text encoders that are let go of, pictures made latents
    moments: int  #: of the optimizer, and the averaged weights where the config keeps them
    working: int  #: gradients and activations together, when they are most
    looking: int  #: what drawing takes while the run is looked at, 0 without looks
    flops: float  #: floating-point operations of one update

    @property
    def memory(self) -> int:
        """Peak allocated bytes."""
        return max(self.weights + self.moments + max(self.working, self.looking), self.encoding)


class Alive(TorchDispatchMode):
    """Counts the bytes of tensors made under it, those alive now and the most at once, and work.

    ``FlopCounterMode`` counts the work too, but holds on to every module's inputs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = self.flops = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if count := flop_registry.get(func._overloadpacket):
            self.flops += count(*args, **kwargs, out_val=out)
        tree_map_only(torch.Tensor, self._hold, out)
        return out

    def without(self, tensor: torch.Tensor) -> None:
        """Leave a tensor out, such as a weight."""
        self._known.add(tensor.untyped_storage()._cdata)

    def _hold(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._free, key, size)
        return tensor

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


@lru_cache
def estimate(config: TrainConfig, precision: str = "fp16") -> Estimate:
    """The peak memory and the work of training ``config`` on a GPU.

    ``precision`` is what the GPU computes in: "fp16", "bf16" or "no". Of a base on the hub only its
    configs and tokenizers are downloaded. Takes seconds, for the largest bases half a minute.
    Raises as :func:`dreambooth_lib.families.load` and :func:`dreambooth_lib.weights.precisions` do.
    """
    half = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision, torch.float32)
    family = families.skeleton(config.base, config.revision, **precisions(config, half))
    trainable = trainable_of(family, config)
    trained = lora.trained(trainable)
    modules = [family.denoiser, *family.text_encoders, *family.frozen]
    numbers = sum(parameter.numel() for parameter in trained)
    few = _QUANTIZED.get(config.quantize or "")
    quantized = [getattr(family.pipeline, name, None) for name in family.quantized_names()]
    sizes = {m: _size(m, few if m in quantized else None, half) for m in modules}
    gone = family.frozen[1:] + family.text_encoders if lets_go(config) else []
    encoding = sum(sizes.pop(module) for module in gone)
    weights = sum(sizes.values())
    if config.prior == "distilled" and config.prior_weight > 0 and config.method == "full":
        weights += sum(p.numel() * half.itemsize for p in family.denoiser.parameters())
    with FakeTensorMode():
        for module in modules:
            _give_shapes(module)
        encoding = max(encoding, weights + _encoding_pictures(family))
        working, flops = _one_update(family, trainable, config, half)
        looking = _looking(family, trainable, config, half) if config.watch_every else 0
    if few is not None:  # a layer at a time is unpacked
        unpacked = max(m.weight.numel() for m in _linears(family.denoiser)) * half.itemsize
        working, looking = working + unpacked, looking and looking + unpacked
    moments = numbers * _MOMENTS[choose(config, "cuda")]
    moments += 4 * numbers * (config.ema_decay is not None)
    return Estimate(int(weights), int(encoding), int(moments), working, looking, flops)


def fitted(config: TrainConfig, precision: str, free: int) -> TrainConfig:
    """The config with its memory level "auto" decided: the first that takes at most ``free`` bytes.

    A level that the config's other fields or the base rule out is passed over; if none fits it is
    the last.
    """
    if config.memory != "auto":
        return config
    found = config.replace(memory="standard")
    enough = estimate(found, precision).memory <= free
    for level in LOW:
        if enough:
            break
        try:
            one = config.replace(memory=level)
            enough = estimate(one, precision).memory <= free
        except ConfigError:
            continue
        found = one
    return found


def ways_out(config: TrainConfig, precision: str) -> str:
    """What would take less memory than ``config``, by how much, in one sentence."""
    side = config.resolution or families.outline(config.base, config.revision).resolution
    others: dict[str, dict[str, Any]] = {
        "memory 'low'": {"memory": "low"},
        "memory 'lowest'": {"memory": "lowest"},
        "method 'lora'": {"method": "lora"},
        "method 'lora' and memory 'low'": {"method": "lora", "memory": "low"},
        "method 'lora' and quantize 'nf4'": {"method": "lora", "quantize": "nf4"},
        f"resolution {side // 16 * 8}": {"resolution": side // 16 * 8},
    }
    now, found = estimate(config, precision).memory, []
    for name, changes in others.items():
        try:
            less = estimate(config.replace(**changes), precision).memory
        except ConfigError:
            continue
        if less < 0.95 * now:
            found.append(f"{name} ({less / GIB:.1f} GiB)")
    return f"it takes about {now / GIB:.1f} GiB as it is, and less with {', or '.join(found)}"


def _one_update(
    family: Family, trainable: Trainable, config: TrainConfig, half: torch.dtype
) -> tuple[int, float]:
    """Most bytes of gradients and activations at once, and operations, of one update."""
    rows = config.batch_size // config.gradient_accumulation
    prompts = [config.subject.instance_prompt] * rows
    if config.prior_weight > 0:
        prompts += [config.subject.class_prompt] * rows
    channels, side = family.latent_size
    x_t = torch.zeros(len(prompts), channels, side, side)
    t = torch.full([len(prompts)], 500)
    with torch.no_grad():
        cond = family.blank_prompts(prompts)
    if config.memory in LOW:
        for parameter in lora.trained(trainable):
            parameter.register_post_accumulate_grad_hook(_forget)
    with Alive() as alive:
        for tensor in (*trainable.parameters(), *trainable.buffers()):
            alive.without(tensor)
        with _autocast(config, half):
            given = None if config.trains_text else cond
            loss = trainable(x_t, t, given, prompts).float().square().mean()
        loss.backward()
    return alive.most, float(config.gradient_accumulation * alive.flops)


@torch.no_grad()
def _looking(family: Family, trainable: Trainable, config: TrainConfig, half: torch.dtype) -> int:
    """Most bytes at once while pictures are drawn with guidance, and become pixels."""
    vae, rows = family.pipeline.vae, family.at_a_time
    prompts = [config.subject.instance_prompt] * rows * 2
    channels, side = family.latent_size
    x_t, t = torch.zeros(len(prompts), channels, side, side), torch.full([len(prompts)], 500)
    cond = family.blank_prompts(prompts)
    with Alive() as alive:
        for module in (trainable, vae):
            for tensor in (*module.parameters(), *module.buffers()):
                alive.without(tensor)
        with _autocast(config, half):
            trainable(x_t, t, cond, prompts)
        vae.decode(x_t[:rows].to(half))
    return alive.most


def _autocast(config: TrainConfig, half: torch.dtype) -> torch.autocast:
    """As in training, but on the CPU, where tensors without values are."""
    enabled, cached = half is not torch.float32, config.memory not in LOW
    return torch.autocast("cpu", half, enabled=enabled, cache_enabled=cached)


def _encoding_pictures(family: Family) -> int:
    """Most bytes at once while pictures become latents."""
    pixels = torch.zeros(family.at_a_time, 3, family.resolution, family.resolution)
    with Alive() as alive:
        for tensor in family.pipeline.vae.state_dict().values():
            alive.without(tensor)
        family.encode_images(pixels)
    return alive.most


def _size(module: torch.nn.Module, few: float | None, half: torch.dtype) -> float:
    """Bytes of a module's tensors, those of its linear layers at ``few`` each if that is given."""
    size = float(sum(tensor.nbytes for tensor in module.state_dict().values()))
    if few is not None:
        packed = [m.weight for m in _linears(module) if m.weight.dtype is half]
        size -= sum(weight.nbytes - few * weight.numel() for weight in packed)
    return size


def _linears(module: torch.nn.Module) -> list[torch.nn.Linear]:
    """The layers that bitsandbytes quantizes; a LoRA's own are none of them."""
    named = module.named_modules()
    return [m for name, m in named if isinstance(m, torch.nn.Linear) and "lora_" not in name]


def _give_shapes(module: torch.nn.Module) -> None:
    """Tensors of the meta device become ones without data on the CPU, which has autocast."""
    for part in module.modules():
        for name, one in part.named_parameters(recurse=False):
            empty = torch.empty(one.shape, dtype=one.dtype)
            setattr(part, name, torch.nn.Parameter(empty, requires_grad=one.requires_grad))
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, torch.empty(buffer.shape, dtype=buffer.dtype))


def _forget(parameter: torch.nn.Parameter) -> None:
    parameter.grad = None
