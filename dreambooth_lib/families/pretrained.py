"""Load a base through diffusers: with weights, quantized or not, or from its configs alone."""

from collections.abc import Collection
from importlib import import_module
from importlib.metadata import version
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from packaging.version import Version

from dreambooth_lib.core import gpu_memory, notices
from dreambooth_lib.families.base import Family
from dreambooth_lib.families.precision import autoencoder_dtype
from dreambooth_lib.families.prompt_cache import PromptCache

#: What diffusers calls the precision that a model is loaded in.
DTYPE = "dtype" if Version(version("diffusers")) >= Version("0.40") else "torch_dtype"

#: What of a base may be loaded in another precision than the rest.
MOVED = ("denoiser", "text_encoders")


def from_pretrained(
    kind: type[Family],
    path: str,
    *,
    resolution: int | None = None,
    half: torch.dtype = torch.float32,
    whole: Collection[str] = MOVED,
    master: torch.dtype = torch.float32,
    quantize: str | None = None,
    prompts: Collection[str] | None = None,
    device: str | torch.device = "cpu",
    **hub: Any,
) -> Family:
    """Load on the CPU in ``half``, but the parts that ``whole`` names in ``master``.

    The autoencoder is in float32 where ``half`` is float16, which many overflow. ``quantize`` is as
    in ``TrainConfig``; what it concerns is put on the GPU at once. With ``prompts`` the text
    encoders are loaded first and alone, encode these on ``device`` and make room for the rest: no
    other prompt is known then.
    """
    index = DiffusionPipeline.load_config(path, **hub)
    given: dict[str, Any] = {"use_safetensors": True, **kind.options, **hub}
    given[DTYPE] = {"default": half} | _dtypes(kind, half, whole, master)
    known = None
    if prompts is not None:
        alone = given | dict.fromkeys((kind.denoiser_name, "vae"))
        alone |= _quantization(kind, index, alone, quantize, half)
        text = DiffusionPipeline.from_pretrained(path, **alone).to(device)
        known = PromptCache(kind(text, resolution=1), {*prompts, ""})
        del text
        gpu_memory.free_memory()
        encoders = (*kind.encoder_names, *kind.large_encoder_names)
        given |= {name: None for name in encoders if name in index}
    given |= _quantization(kind, index, given, quantize, half)
    family = kind(DiffusionPipeline.from_pretrained(path, **given), resolution)
    family.prompt_cache = known
    return family


def from_configs(
    kind: type[Family],
    path: str,
    *,
    resolution: int | None = None,
    half: torch.dtype = torch.float32,
    whole: Collection[str] = MOVED,
    master: torch.dtype = torch.float32,
    quantize: str | None = None,
    revision: str | None = None,
) -> Family:
    """Build as :func:`from_pretrained`, without the weights: all are on the meta device.

    What ``quantize`` concerns is in ``half`` here.
    """
    index = DiffusionPipeline.load_config(path, revision=revision)
    dtypes = _dtypes(kind, half, whole, master)
    parts: dict[str, Any] = dict(kind.options)
    for name, (library, class_name) in _parts(index).items():
        if name in parts or class_name is None:
            parts[name] = None
            continue
        part = getattr(diffusers if library == "diffusers" else transformers, class_name)
        if name.startswith(("scheduler", "tokenizer")):
            parts[name] = part.from_pretrained(path, subfolder=name, revision=revision)
            continue
        given: Any
        if library == "diffusers":
            given, make = (
                part.load_config(path, subfolder=name, revision=revision),
                part.from_config,
            )
        else:
            given, make = (
                part.config_class.from_pretrained(path, subfolder=name, revision=revision),
                part,
            )
        with torch.device("meta"):
            parts[name] = make(given).to(dtypes.get(name, half))
        # Some layers overflow in float16: transformers keeps them whole.
        kept = (getattr(part, "_keep_in_fp32_modules", None) or []) if half is torch.float16 else []
        for module_name, module in parts[name].named_modules() if kept else ():
            if module_name.rpartition(".")[2] in kept:
                module.to(torch.float32)
    return kind(getattr(diffusers, index["_class_name"])(**parts), resolution)


def _dtypes(
    kind: type[Family], half: torch.dtype, whole: Collection[str], master: torch.dtype
) -> dict[str, torch.dtype]:
    """Map parts that are not in ``half`` to their precision, as :func:`from_pretrained` has it."""
    names = dict(zip(MOVED, ((kind.denoiser_name,), kind.encoder_names), strict=True))
    moved = {name: master for part in whole for name in names[part]}
    return moved | {"vae": autoencoder_dtype(half)}


def _quantization(
    kind: type[Family],
    index: dict[str, Any],
    given: dict[str, Any],
    quantize: str | None,
    half: torch.dtype,
) -> dict[str, Any]:
    """Describe to the pipeline's ``from_pretrained`` how its parts are quantized.

    It is told of none that ``given`` leaves out, which it would tell the user.
    """
    settings: dict[str, Any] = {"load_in_8bit": True}
    if quantize == "nf4":
        settings = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_compute_dtype": half,
            "bnb_4bit_use_double_quant": True,
        }
    mapping = {
        name: import_module(library).BitsAndBytesConfig(**settings)
        for name, (library, class_name) in _parts(index).items()
        if quantize and class_name and given.get(name, ...) and name in kind.quantized_names()
    }
    if not mapping:
        return {}
    notices.hide_casts()
    return {"quantization_config": diffusers.PipelineQuantizationConfig(quant_mapping=mapping)}


def _parts(index: dict[str, Any]) -> dict[str, tuple[str, str | None]]:
    """Map the parts that a ``model_index.json`` names to library and class of each."""
    return {name: (value[0], value[1]) for name, value in index.items() if isinstance(value, list)}
