"""Load one diffusers pipeline as a :class:`Family`: its weights, quantized or not, or its configs.

``families.loading`` finds the base and its family; this module knows nothing of LoRAs or names.
"""

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

#: The argument by which diffusers takes the dtype to load a model in.
DTYPE = "dtype" if Version(version("diffusers")) >= Version("0.40") else "torch_dtype"

#: Parts of a base that can be trained, and so loaded in another dtype than the rest.
TRAINABLE = ("denoiser", "text_encoders")


def load_pretrained(
    family_class: type[Family],
    path: str,
    *,
    resolution: int | None = None,
    dtype: torch.dtype = torch.float32,
    trained: Collection[str] = TRAINABLE,
    trained_dtype: torch.dtype = torch.float32,
    quantize: str | None = None,
    prompts: Collection[str] | None = None,
    device: str | torch.device = "cpu",
    **hub: Any,
) -> Family:
    """Load a pipeline on the CPU in ``dtype``, and its ``trained`` parts in ``trained_dtype``.

    The autoencoder is in float32 where ``dtype`` is float16. ``quantize`` is as in ``TrainConfig``;
    quantized parts go to the GPU at once. With ``prompts``, the text encoders are loaded first,
    encode these prompts on ``device`` and are freed before the rest is loaded; the family then
    knows no other prompt.
    """
    index = DiffusionPipeline.load_config(path, **hub)
    options: dict[str, Any] = {"use_safetensors": True, **family_class.options, **hub}
    options[DTYPE] = {"default": dtype} | _dtypes(family_class, dtype, trained, trained_dtype)
    prompt_cache = None
    if prompts is not None:
        encoders_only = options | dict.fromkeys((family_class.denoiser_name, "vae"))
        encoders_only |= _quantization(family_class, index, encoders_only, quantize, dtype)
        pipeline = DiffusionPipeline.from_pretrained(path, **encoders_only).to(device)
        prompt_cache = PromptCache(family_class(pipeline, resolution=1), {*prompts, ""})
        del pipeline
        gpu_memory.free_memory()
        encoders = (*family_class.encoder_names, *family_class.large_encoder_names)
        options |= {name: None for name in encoders if name in index}
    options |= _quantization(family_class, index, options, quantize, dtype)
    family = family_class(DiffusionPipeline.from_pretrained(path, **options), resolution)
    family.prompt_cache = prompt_cache
    return family


def build_on_meta(
    family_class: type[Family],
    path: str,
    *,
    resolution: int | None = None,
    dtype: torch.dtype = torch.float32,
    trained: Collection[str] = TRAINABLE,
    trained_dtype: torch.dtype = torch.float32,
    quantize: str | None = None,
    revision: str | None = None,
) -> Family:
    """Build a pipeline as :func:`load_pretrained` does, from its configs alone, on the meta device.

    Parts that ``quantize`` would quantize are in ``dtype`` here.
    """
    index = DiffusionPipeline.load_config(path, revision=revision)
    dtypes = _dtypes(family_class, dtype, trained, trained_dtype)
    parts: dict[str, Any] = dict(family_class.options)
    for name, (library, class_name) in _parts(index).items():
        if name in parts or class_name is None:
            parts[name] = None
            continue
        part_class = getattr(diffusers if library == "diffusers" else transformers, class_name)
        source: dict[str, Any] = {"subfolder": name, "revision": revision}
        if name.startswith(("scheduler", "tokenizer")):
            parts[name] = part_class.from_pretrained(path, **source)
            continue
        with torch.device("meta"):
            if library == "diffusers":
                part = part_class.from_config(part_class.load_config(path, **source))
            else:
                part = part_class(part_class.config_class.from_pretrained(path, **source))
            parts[name] = part.to(dtypes.get(name, dtype))
        # transformers keeps layers that overflow float16 in float32.
        fp32_layers = getattr(part_class, "_keep_in_fp32_modules", None) or []
        for module_name, module in part.named_modules() if dtype is torch.float16 else ():
            if module_name.rpartition(".")[2] in fp32_layers:
                module.to(torch.float32)
    return family_class(getattr(diffusers, index["_class_name"])(**parts), resolution)


def _dtypes(
    family_class: type[Family],
    dtype: torch.dtype,
    trained: Collection[str],
    trained_dtype: torch.dtype,
) -> dict[str, torch.dtype]:
    """Map the pipeline's parts that may differ from ``dtype`` to their dtypes."""
    trainable = ((family_class.denoiser_name,), family_class.encoder_names)
    names = dict(zip(TRAINABLE, trainable, strict=True))
    own = {name: trained_dtype for part in trained for name in names[part]}
    return own | {"vae": autoencoder_dtype(dtype)}


def _quantization(
    family_class: type[Family],
    index: dict[str, Any],
    options: dict[str, Any],
    quantize: str | None,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Return the ``quantization_config`` argument of the pipeline's ``from_pretrained``.

    It leaves out the parts that ``options`` sets to None, of which diffusers would warn.
    """
    settings: dict[str, Any] = {"load_in_8bit": True}
    if quantize == "nf4":
        settings = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_compute_dtype": dtype,
            "bnb_4bit_use_double_quant": True,
        }
    mapping = {
        name: import_module(library).BitsAndBytesConfig(**settings)
        for name, (library, class_name) in _parts(index).items()
        if quantize
        and class_name
        and options.get(name, ...)
        and name in family_class.quantized_names()
    }
    if not mapping:
        return {}
    notices.hide_casts()
    return {"quantization_config": diffusers.PipelineQuantizationConfig(quant_mapping=mapping)}


def _parts(index: dict[str, Any]) -> dict[str, tuple[str, str | None]]:
    """Map the parts in a ``model_index.json`` to the library and class of each."""
    return {name: (value[0], value[1]) for name, value in index.items() if isinstance(value, list)}
