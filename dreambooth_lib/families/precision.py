"""Keep half precision from breaking a base: autoencoders, saved dtypes, clear errors."""

import json
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import torch

from dreambooth_lib.core.errors import KitError

#: Where the libraries record in a config what its weights were loaded from.
NAMES = ("_name_or_path", "name_or_path", "base_model_name_or_path")

#: Why values in float16 are not finite, and what to do.
OVERFLOWED = (
    "values probably overflowed float16 (its maximum is 65,504): set mixed_precision to 'no', use "
    "a GPU with bfloat16, or choose another base model"
)


class NonFinite(KitError, FloatingPointError):
    """A part of a base gave NaN, infinity or black images; the message names the part."""

    @classmethod
    def of(cls, part: str, base: str, gave: str, dtype: torch.dtype) -> "NonFinite":
        """Make the error for a ``part`` of ``base`` that ``gave`` such values in ``dtype``."""
        fix = "its files may be damaged: download the base again, or choose another base"
        if dtype is torch.float16:
            fix = OVERFLOWED
        precision = str(dtype).removeprefix("torch.")
        return cls(
            f"{part} of '{base}' produced {gave} in {precision}, and nothing was saved; {fix}."
        )


def computed_in(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype that weights of ``dtype`` compute in: autocast's, where that is on."""
    kind = device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else dtype


def autoencoder_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the autoencoder where the rest of the base is in ``dtype``.

    Many autoencoders overflow float16, whose maximum is 65,504, and give NaN or black images, so
    their weights stay in float32, as in diffusers' own training scripts.
    """
    return torch.float32 if dtype is torch.float16 else dtype


def finite_decoder(vae: Any) -> Callable[..., Any]:
    """Wrap an autoencoder's ``decode`` to take any dtype and compute as fast as is finite.

    Where the rest of the base computes in float16, so do its layers, though the weights are in
    float32: on a T4 in a quarter of the time. The first time that overflows, it is decoded again in
    the dtype of the weights, as everything is from then on, and outside autocast, under which
    convolutions would compute in float16 again.
    """
    decode, fits = vae.decode, True

    def decode_finite(z: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal fits
        half, device = computed_in(z.dtype, z.device), z.device.type
        if fits and half is torch.float16 and vae.dtype is torch.float32:
            with torch.autocast(device, half, cache_enabled=False):
                decoded = decode(z, *args, **kwargs)
            if fits := bool(decoded[0].isfinite().all()):
                return decoded
        with torch.autocast(device, enabled=False):
            return decode(z.to(vae.dtype), *args, **kwargs)

    return decode_finite


def without_autocast(encoder: Any) -> Callable[..., Any]:
    """Wrap a large text encoder's ``forward`` to compute in the dtypes of its weights always.

    In float16 transformers keeps some of T5's layers in float32, as they overflow; autocast would
    compute them in float16 again.
    """
    forward = encoder.forward

    @wraps(forward)
    def forward_exact(*args: Any, **kwargs: Any) -> Any:
        kind = encoder.device.type
        with torch.autocast("cpu" if kind == "meta" else kind, enabled=False):
            return forward(*args, **kwargs)

    return forward_exact


def let_autocast_into(denoiser: torch.nn.Module) -> None:
    """Make layers that bitsandbytes quantized compute in autocast's dtype, as plain ones do.

    They return their input's dtype, and autocast does not know them: what a layer norm gives in
    float32 would go on through all blocks in float32, which takes twice the memory. Nor would
    diffusers clip it, which it does in float16 alone.
    """
    for layer in denoiser.modules():
        if type(layer).__module__.startswith("bitsandbytes."):
            layer.register_forward_pre_hook(_cast_input)


def _cast_input(layer: torch.nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    return (inputs[0].to(computed_in(inputs[0].dtype, inputs[0].device)),)


def save_pipeline(pipeline: Any, folder: str | Path) -> None:
    """Save a pipeline in diffusers' layout, such that it loads in float32 by default.

    Without a dtype, diffusers loads every file as float32, but transformers goes by the config: so
    the text encoders' configs say float32, whatever dtype their files have. Where the base was
    loaded from a folder, the configs keep the folder's name without its path.
    """
    from transformers import PreTrainedModel

    pipeline.save_pretrained(folder, safe_serialization=True)
    for file in (Path(folder) / "model_index.json", *Path(folder).glob("*/*config.json")):
        config = portable = json.loads(file.read_text(encoding="utf-8"))
        is_encoder = isinstance(getattr(pipeline, file.parent.name, None), PreTrainedModel)
        if is_encoder and "dtype" in config:
            portable = portable | {"dtype": "float32"}
        portable = portable | without_paths({key: config[key] for key in NAMES if key in config})
        if portable != config:
            file.write_text(json.dumps(portable, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def without_paths(names: dict[str, Any]) -> dict[str, Any]:
    """Return the fields with each absolute path cut down to its last part."""
    return {
        key: Path(name).name if isinstance(name, str) and Path(name).is_absolute() else name
        for key, name in names.items()
    }
