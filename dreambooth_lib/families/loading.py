"""Load a base with its LoRAs, or what is known of it without its weights.

``families.resolving`` finds a base by its name; :func:`load_model` loads its weights, through
``families.pretrained``.
"""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dreambooth_lib.core import gpu_memory
from dreambooth_lib.core.digests import DIGESTS, changed_file
from dreambooth_lib.core.files import fingerprint
from dreambooth_lib.core.threads import one_at_a_time
from dreambooth_lib.families import base_files, one_file, peft_adapters, quantizers
from dreambooth_lib.families.base_files import BaseError, explain_loading
from dreambooth_lib.families.clip_skip import skips_layers
from dreambooth_lib.families.inference_settings import (
    Inference,
    distillation_warning,
    distilled_by_name,
)
from dreambooth_lib.families.prediction_type import set_scheduler
from dreambooth_lib.families.resolving import BUNDLED as BUNDLED
from dreambooth_lib.families.resolving import FAMILIES as FAMILIES
from dreambooth_lib.families.resolving import LORA_BASE_FILE, LORA_FILE, Lora, ResolvedBase, resolve
from dreambooth_lib.families.resolving import locate as locate

if TYPE_CHECKING:
    from dreambooth_lib.families.base import Family


@one_at_a_time
def load_model(
    base: str,
    revision: str | None = None,
    variant: str | None = None,
    prediction_type: str | None = None,
    **loading: Any,
) -> "Family":
    """Load a base on the CPU, in float32 by default, from safetensors only, without remote code.

    ``prediction_type`` is what it predicts, where its own files say otherwise. ``loading`` goes to
    ``families.pretrained.load_pretrained``: resolution, precisions, quantizing.
    LoRA weights are merged into their base, unless they were trained on a quantized base, which is
    then quantized again. huggingface_hub finds the Hub token by itself; it is never passed on or
    stored. Raises :class:`BaseError` for a missing base, an unknown family, a precision that the
    family cannot compute in, and for quantizing without a GPU.
    """
    resolved = resolve(base, revision, variant, prediction_type)
    quantize = loading.get("quantize")
    if _has_gpu():
        gpu_memory.free_memory()  # an interrupted cell may hold another model
    if resolved.loras:
        if quantize is not None:
            raise BaseError(
                f"the base '{base}' is a LoRA, which cannot be merged into quantized weights; "
                f"train on '{resolved.loras[-1].trained_on['base']}', or leave quantize out."
            )
        return compose({base: 1.0}, **loading, prediction_type=prediction_type)
    if quantize is not None and not _has_gpu():
        raise BaseError(
            f"quantize is '{quantize}', which needs a GPU, and this machine has none; "
            "leave quantize out, or use a machine with a GPU."
        )
    if not resolved.family.supports_dtype(loading.get("dtype")):
        raise BaseError(
            f"the base '{base}' produces NaN in float16, and this GPU has no bfloat16; use one "
            "that has it, such as an L4 or A100, or choose another base."
        )
    _check_options(resolved, loading)
    resolved.check()
    _check_unchanged(resolved.path)
    from dreambooth_lib.families.pretrained import load_pretrained

    family = load_pretrained(
        resolved.family, resolved.path, resolved.index, **(loading | resolved.hub)
    )
    return _configured(family, resolved)


def _check_options(resolved: ResolvedBase, options: Mapping[str, Any]) -> None:
    """Raise :class:`BaseError` where a family cannot read prompts, or generate, as options say."""
    family, base, side = resolved.family, resolved.name, options.get("resolution")
    if side is not None:
        denoiser, vae = (resolved.read(f"{n}/config.json") for n in (family.denoiser_name, "vae"))
        with explain_loading(resolved.path):
            multiple = family.least_multiple(denoiser, vae)
        if side % multiple:
            lower = max(multiple, side // multiple * multiple)
            raise BaseError(
                f"resolution is {side}, but '{base}' needs a multiple of {multiple}; "
                f"set it to {lower} or {lower + multiple}."
            )
    if options.get("prompt_chunks", 1) > family.most_chunks:
        raise BaseError(
            f"prompt_chunks is {options['prompt_chunks']}, but the prompts of '{base}' are not "
            "read in chunks; leave prompt_chunks out, or choose a Stable Diffusion 1.x, 2.x or XL."
        )
    if options.get("clip_skip") is not None and not skips_layers(resolved):
        raise BaseError(
            f"clip_skip is {options['clip_skip']}, but '{base}' is not a Stable Diffusion 1.x "
            "model; leave clip_skip out."
        )


def _configured(family: "Family", resolved: ResolvedBase) -> "Family":
    """Give a family its inference settings, and a scheduler for its prediction type."""
    family.inference = resolved.inference
    other = resolved.scheduler if resolved.prediction_type is not None else None
    set_scheduler(family.pipeline, other)
    return family


def _check_unchanged(folder: str) -> None:
    """Raise :class:`BaseError` if a model that the kit saved has changed since.

    Each process reads it for that only once: a run's pipeline is loaded again and again.
    """
    if not (Path(folder) / DIGESTS).exists():
        return
    if changed := _changed_file(folder, tuple(map(tuple, fingerprint(Path(folder))))):
        raise BaseError(
            f"{folder}/{changed} has changed since it was saved; copy the model again, or delete "
            "this folder and resume the run, which saves it again."
        )


@cache
def _changed_file(folder: str, as_it_is: tuple[tuple[Any, ...], ...]) -> str | None:
    return changed_file(Path(folder))


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


@one_at_a_time
def compose(loras: Mapping[str, float], on: str | None = None, **loading: Any) -> "Family":
    """Load the base of several LoRA runs or folders, and add each LoRA at its weight.

    ``on`` is another base to load instead, such as one that was distilled from theirs. They are
    merged as in :func:`load_model`; other adapters of peft, which are not sums, come first, in
    their order. Raises :class:`BaseError` for LoRAs of several bases, and for one that does not
    fit its base.
    """
    from dreambooth_lib.families.textual_inversion import load_token

    parts = [_read_lora(name) for name in loras]
    bases = [lora.trained_on for lora in parts]
    if not bases or any(base != bases[0] for base in bases):
        names = ", ".join(f"'{n}' on '{b['base']}'" for n, b in zip(loras, bases, strict=True))
        raise BaseError(
            f"only LoRAs of the same base can be composed, and these are {names or 'none'}."
        )
    others = [lora for lora in parts if peft_adapters.parts(lora.path)]
    if others and bases[0].get("quantize"):
        raise BaseError(
            f"the adapter in {others[0].path} names a quantized base, but the kit trains only "
            "LoRAs on such a base; train it again."
        )
    quantizers.ignore_unusable()
    other = {} if on is None else {"base": on, "revision": None, "variant": None}
    asked = ("prediction_type", "clip_skip")  # or as in the LoRAs' own training
    own = {name: loading.get(name) or bases[0][name] for name in asked}
    family = load_model(**(loading | bases[0] | own | other))
    weights = {lora.path: weight for lora, weight in zip(parts, loras.values(), strict=True)}
    for lora in parts:
        if lora not in others:
            base_files.check_lora(Path(lora.path) / LORA_FILE)
        _check_unchanged(lora.path)
    for lora in others:
        with explain_loading(lora.path, "adapter"):
            if lora.token is not None:
                load_token(family, lora.path, lora.token)
            peft_adapters.load(family, lora.path, weights[lora.path])
    parts = [lora for lora in parts if lora not in others]
    adapters = [f"lora{number}" for number in range(len(parts))]
    for number, lora in enumerate(parts):
        with explain_loading(lora.path, "LoRA"):
            if lora.token is not None:
                load_token(family, lora.path, lora.token)
            family.pipeline.load_lora_weights(
                lora.path, weight_name=LORA_FILE, adapter_name=adapters[number],
                use_safetensors=True,
            )  # fmt: skip
            # After each, as diffusers skips a LoRA that has no layer of this base without an error.
            loaded = number + 1
            family.pipeline.set_adapters(
                adapters[:loaded], [weights[lora.path] for lora in parts[:loaded]]
            )
    return family if bases[0].get("quantize") else merge_loras(family)


def _read_lora(name: str) -> Lora:
    resolved = resolve(name)
    if not resolved.loras:
        raise BaseError(
            f"'{resolved.path}' is not a LoRA that this kit trained: it has no {LORA_BASE_FILE}; "
            "check the path."
        )
    return resolved.loras[-1]


def merge_loras(family: "Family") -> "Family":
    """Merge the adapters' weights into the family's own and return it with plain models."""
    if others := list(filter(peft_adapters.has_other, (family.denoiser, *family.text_encoders))):
        for module in others:
            peft_adapters.merge(module)
    else:
        # Named, as Flux's pipeline would leave its text encoder out.
        family.pipeline.fuse_lora(components=family.pipeline._lora_loadable_modules)
    family.pipeline.unload_lora_weights()
    return family


def load_meta(
    base: str, revision: str | None = None, prediction_type: str | None = None, **loading: Any
) -> "Family":
    """Load as :func:`load_model`, but on the meta device: read only configs and tokenizers.

    Leaves out LoRAs on the base.
    """
    from dreambooth_lib.families.pretrained import build_on_meta

    resolved = resolve(base, revision, None, prediction_type)
    if resolved.loras and loading.get("clip_skip") is None:
        loading["clip_skip"] = resolved.loras[-1].trained_on["clip_skip"]
    _check_options(resolved, loading)
    resolved.check(weights=False)
    hub_revision = resolved.hub.get("revision")
    family = build_on_meta(
        resolved.family, resolved.path, resolved.index, revision=hub_revision, **loading
    )
    return _configured(family, resolved)


class BaseInfo(NamedTuple):
    """Hold what is known of a base without its weights."""

    resolution: int  #: pixels a side that the base was trained at
    size_multiple: int  #: what sides of other sizes must be a multiple of
    #: Of all text encoders, and the tokens that each reads; identifiers are chosen by the first.
    tokenizers: list[tuple[Any, int]]
    how_to_read_more: str  #: of a prompt, "" if nothing can be done


@one_at_a_time
def inspect_base(base: str, revision: str | None = None, prompt_chunks: int = 1) -> BaseInfo:
    """Return a base's resolution and tokenizers; from the hub, that is a small download.

    Raises as :func:`load_model` does.
    """
    from dreambooth_lib.families.base import TOKENIZERS
    from dreambooth_lib.families.long_prompts import how_to_read_more
    from dreambooth_lib.families.pretrained import load_tokenizer

    resolved = resolve(base, revision)
    family, revision = resolved.family, resolved.hub.get("revision")
    denoiser, vae = (resolved.read(f"{n}/config.json") for n in (family.denoiser_name, "vae"))
    tokenizers = {
        name: load_tokenizer(resolved.path, resolved.index, revision, name)
        for name in TOKENIZERS
        if resolved.index.get(name, [None])[0]
    }
    with explain_loading(resolved.path):
        return BaseInfo(
            family.native_resolution(denoiser, vae),
            family.size_multiple(denoiser, vae),
            family.tokenizer_limits(tokenizers, prompt_chunks),
            how_to_read_more(family.most_chunks, prompt_chunks),
        )


def base_inference(
    base: str, revision: str | None = None, prediction_type: str | None = None
) -> Inference:
    """Return a base's inference steps and guidance scale, told by its configs and its name.

    From the hub, that is a download of three small files.
    """
    return resolve(base, revision, None, prediction_type).inference


def warn_of_distillation(base: str) -> str | None:
    """Return a warning if a base is distilled, else None.

    Downloads and unpacks nothing: a base on the Hub, or in one file that was not read yet, is
    judged by its name alone. Raises as :func:`load_model` does.
    """
    file = one_file.parse(base)
    if file is None or one_file.find(file):
        resolved = resolve(base)
        if resolved.loras or resolved.is_local:
            return distillation_warning(base, resolved.inference, resolved.family.undistilled_base)
    inference = distilled_by_name([Path(file.name).stem if file else Path(base).name])
    return None if inference is None else distillation_warning(base, inference)
