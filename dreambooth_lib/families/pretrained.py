"""Load one diffusers pipeline as a :class:`Family`: its weights, quantized or not, or its configs.

``families.loading`` finds the base and its family; this module knows nothing of LoRAs or names.
"""

from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from packaging.version import Version

from dreambooth_lib.core import gpu_memory, notices
from dreambooth_lib.families import base_files, hub_files, index_checks
from dreambooth_lib.families.base import Family
from dreambooth_lib.families.base_files import BaseError, explain_loading
from dreambooth_lib.families.clip_skip import skip_layers
from dreambooth_lib.families.precision import autoencoder_dtype, let_autocast_into
from dreambooth_lib.families.prompt_cache import PromptCache

#: The argument by which diffusers takes the dtype to load a model in.
DTYPE = "dtype" if Version(version("diffusers")) >= Version("0.40") else "torch_dtype"

#: Parts of a base that can be trained, and so loaded in another dtype than the rest.
TRAINABLE = ("denoiser", "text_encoders")


def load_pretrained(
    family_class: type[Family],
    path: str,
    index: dict[str, Any],
    *,
    resolution: int | None = None,
    dtype: torch.dtype = torch.float32,
    trained: Collection[str] = TRAINABLE,
    trained_dtype: torch.dtype = torch.float32,
    quantize: str | None = None,
    prompt_chunks: int = 1,
    clip_skip: int | None = None,
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
    options: dict[str, Any] = {"use_safetensors": True, **family_class.options, **hub}
    options[DTYPE] = {"default": dtype} | _dtypes(family_class, dtype, trained, trained_dtype)
    prompt_cache = None
    if prompts is not None:
        encoders_only = options | dict.fromkeys((family_class.denoiser_name, "vae"))
        encoders_only |= _quantization(family_class, index, encoders_only, quantize, dtype)
        encoding = _load(family_class, path, index, encoders_only, resolution=1)
        _skip_layers(encoding, clip_skip, path)
        encoding.pipeline.to(device)
        encoding.prompt_chunks = prompt_chunks
        prompt_cache = PromptCache(encoding, {*prompts, ""})
        del encoding
        gpu_memory.free_memory()
        encoders = (*family_class.encoder_names, *family_class.large_encoder_names)
        options |= {name: None for name in encoders if name in index}
    options |= _quantization(family_class, index, options, quantize, dtype)
    family = _load(family_class, path, index, options, resolution)
    if quantize is not None:
        let_autocast_into(family.denoiser)
    _skip_layers(family, clip_skip, path)
    family.prompt_cache, family.prompt_chunks = prompt_cache, prompt_chunks
    return family


def build_on_meta(
    family_class: type[Family],
    path: str,
    index: dict[str, Any],
    *,
    resolution: int | None = None,
    dtype: torch.dtype = torch.float32,
    trained: Collection[str] = TRAINABLE,
    trained_dtype: torch.dtype = torch.float32,
    quantize: str | None = None,
    prompt_chunks: int = 1,
    clip_skip: int | None = None,
    revision: str | None = None,
) -> Family:
    """Build a pipeline as :func:`load_pretrained` does, from its configs alone, on the meta device.

    Parts that ``quantize`` would quantize are in ``dtype`` here.
    """
    dtypes = _dtypes(family_class, dtype, trained, trained_dtype)
    parts: dict[str, Any] = dict(family_class.options)
    parts |= {name: None for name, value in index.items() if value == [None, None]}
    for name, (library, class_name) in index_checks.parts_of(index, path).items():
        if name.startswith("tokenizer"):
            parts[name] = load_tokenizer(path, index, revision, name)
        elif name not in parts:
            part_class = getattr(diffusers if library == "diffusers" else transformers, class_name)
            source: dict[str, Any] = {"subfolder": name, "revision": revision}
            with explain_loading(f"{path}/{name}"):
                if name.startswith(("scheduler", "feature_extractor")):
                    parts[name] = part_class.from_pretrained(path, **source)
                else:
                    parts[name] = _part_on_meta(part_class, path, source, dtypes.get(name, dtype))
                    _keep_layers_in_float32(parts[name], dtype)
    with explain_loading(path):
        family = family_class(getattr(diffusers, index["_class_name"])(**parts), resolution)
    family.prompt_chunks = prompt_chunks
    _skip_layers(family, clip_skip, path)
    return family


def _skip_layers(family: Family, clip_skip: int | None, path: str) -> None:
    """Take the text encoders' last layers out; a pipeline may have been loaded without any."""
    if clip_skip is not None:
        for encoder in family.text_encoders:
            skip_layers(encoder, clip_skip, path)


def _part_on_meta(part_class: Any, path: str, source: dict[str, Any], dtype: torch.dtype) -> Any:
    with torch.device("meta"):
        if issubclass(part_class, diffusers.ModelMixin):
            part = part_class.from_config(part_class.load_config(path, **source))
        else:
            part = part_class(part_class.config_class.from_pretrained(path, **source))
        return torch.nn.Module.to(part, dtype)  # diffusers' own warns of every cast


def _keep_layers_in_float32(part: torch.nn.Module, dtype: torch.dtype) -> None:
    """Keep layers that overflow float16 in float32, as transformers does."""
    fp32_layers = getattr(part, "_keep_in_fp32_modules", None) or []
    for module_name, module in part.named_modules() if dtype is torch.float16 else ():
        if module_name.rpartition(".")[2] in fp32_layers:
            module.to(torch.float32)


def load_tokenizer(
    path: str, index: dict[str, Any], revision: str | None, name: str = "tokenizer"
) -> Any:
    """Load the tokenizer of a base, by its ``model_index.json``'s class.

    Raises :class:`BaseError` for one that is missing or damaged.
    """
    parts = index_checks.parts_of({name: index.get(name)}, f"{path}/model_index.json")
    if name not in parts:
        raise BaseError(f"{path}/model_index.json has no '{name}'; choose another base.")
    index_checks.check_classes(parts, {}, f"{path}/model_index.json")
    with explain_loading(f"{path}/{name}"):
        return getattr(transformers, parts[name][1]).from_pretrained(
            path, subfolder=name, revision=revision, trust_remote_code=False
        )


def _load(
    family_class: type[Family],
    path: str,
    index: dict[str, Any],
    options: dict[str, Any],
    resolution: int | None,
) -> Family:
    with explain_loading(path):
        with _explain_download(path, index, options):
            pipeline: Any = DiffusionPipeline.from_pretrained(
                path, trust_remote_code=False, **options
            )
        if Path(path).is_dir():
            _check_complete(pipeline, Path(path), options.get("variant"))
        _check_tokenizers(pipeline, path)
        return family_class(pipeline, resolution)


def _explain_download(
    path: str, index: dict[str, Any], options: dict[str, Any]
) -> AbstractContextManager[None]:
    """Say what a base of the Hub lacks; what one here lacks was said before."""
    if Path(path).is_dir():
        return nullcontext()
    unread = ("scheduler", "tokenizer", "feature_extractor")
    parts = index_checks.parts_of(index, path)
    read = [n for n in parts if options.get(n, ...) is not None and not n.startswith(unread)]
    return hub_files.explain_download(path, options.get("revision"), options.get("variant"), read)


def _check_tokenizers(pipeline: Any, where: str) -> None:
    """Raise :class:`BaseError` if a tokenizer gives tokens that its text encoder does not know."""
    for number in ("", "_2", "_3"):
        tokenizer = getattr(pipeline, f"tokenizer{number}", None)
        encoder = getattr(pipeline, f"text_encoder{number}", None)
        if tokenizer is None or encoder is None:
            continue
        known = encoder.get_input_embeddings().num_embeddings
        # CLIP's prompts are padded to the tokenizer's length; others have no limit of their own.
        is_clip = encoder.config.model_type.startswith("clip")
        longest = encoder.config.max_position_embeddings if is_clip else tokenizer.model_max_length
        if len(tokenizer) > known or tokenizer.model_max_length > longest:
            raise BaseError(
                f"the base's tokenizer{number} in {where} has more tokens, or longer prompts, than "
                f"its text_encoder{number} reads; download or copy both again."
            )


def _check_complete(pipeline: Any, folder: Path, variant: str | None) -> None:
    """Raise :class:`BaseError` if a part's files lack weights that its config asks for.

    diffusers leaves these on the meta device, and transformers draws them at random.
    """
    for part, module in pipeline.components.items():
        lacking: list[str] = []
        if isinstance(module, transformers.PreTrainedModel):
            lacking = _not_saved(module, base_files.weights_to_load(folder / part, variant))
        elif isinstance(module, torch.nn.Module):
            lacking = [name for name, weight in module.named_parameters() if weight.is_meta]
        if lacking:
            raise BaseError(
                f"the base's part {folder / part} lacks the weight {lacking[0]}, which its "
                "config.json asks for; download or copy the part again."
            )


def _not_saved(module: torch.nn.Module, files: list[Path]) -> list[str]:
    """Return the weights of a module that none of its files has."""
    saved = {name for file in files for name in base_files.check_weights(file)}
    names: dict[int, list[str]] = {}  # of each weight: of tied ones a single name is saved
    for name, weight in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(weight), []).append(name)
    # One of both may have a prefix: a larger model's, or an older transformers'.
    known = saved | {name.partition(".")[2] for name in saved}
    return [
        aliases[0]
        for aliases in names.values()
        if not any(name in known or name.partition(".")[2] in saved for name in aliases)
    ]


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
        for name, (library, _) in index_checks.parts_of(index, "model_index.json").items()
        if quantize and options.get(name, ...) and name in family_class.quantized_names()
    }
    if not mapping:
        return {}
    notices.hide_casts()
    return {"quantization_config": diffusers.PipelineQuantizationConfig(quant_mapping=mapping)}
