"""Where half precision would lose a base: the autoencoder's own, and what saved pipelines say."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


class NonFinite(FloatingPointError):
    """A part of a base gave NaN or infinity, or black pictures; the message says which part."""

    @classmethod
    def of(cls, part: str, base: str, gave: str, dtype: torch.dtype) -> "NonFinite":
        """Make the error of a ``part`` of ``base`` that ``gave`` something useless in ``dtype``."""
        fix = "its files may be damaged: get the base anew, or choose another"
        if dtype is torch.float16:
            fix = (
                "float16 ends at 65,504: set mixed_precision to 'no', use a GPU with bfloat16, or "
                "choose another base"
            )
        precision = str(dtype).removeprefix("torch.")
        return cls(f"{part} of '{base}' gave {gave}, in {precision}, and nothing was saved; {fix}.")


def autoencoder_dtype(half: torch.dtype) -> torch.dtype:
    """Choose what autoencoders compute in where the rest computes in ``half``.

    Many overflow float16, which ends at 65,504, and give NaN or black pictures; as diffusers' own
    training scripts do, the kit keeps them in float32 there.
    """
    return torch.float32 if half is torch.float16 else half


def outside_autocast(vae: Any) -> Callable[..., Any]:
    """Make an autoencoder's ``decode`` that takes any precision and computes in its weights' own.

    Under autocast its convolutions would compute in float16 all the same.
    """
    decode = vae.decode

    def decoded(z: torch.Tensor, *given: Any, **named: Any) -> Any:
        with torch.autocast(z.device.type, enabled=False):
            return decode(z.to(vae.dtype), *given, **named)

    return decoded


def save_pipeline(pipeline: Any, folder: str | Path) -> None:
    """Write a pipeline in diffusers' layout, to be loaded with or without a precision said.

    If none is said diffusers loads every file as float32, but transformers as its config says: so
    the text encoders' configs say float32, whatever their files hold.
    """
    from transformers import PreTrainedModel

    pipeline.save_pretrained(folder, safe_serialization=True)
    for name, part in pipeline.components.items():
        if isinstance(part, PreTrainedModel):
            file = Path(folder) / name / "config.json"
            config = json.loads(file.read_text())
            # Before its version 5 transformers names it otherwise.
            config |= {key: "float32" for key in ("dtype", "torch_dtype") if key in config}
            file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
