"""Find a base by its name, tell its family and its LoRAs, and load it.

A name becomes a :class:`ResolvedBase` by reading small files only (:func:`resolve`);
:func:`load_model` loads its weights, through ``families.pretrained``.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dreambooth_lib.core.config import origin
from dreambooth_lib.core.errors import KitError
from dreambooth_lib.families import quantizers
from dreambooth_lib.families.inference_settings import (
    Inference,
    distillation_warning,
    distilled_by_name,
)

if TYPE_CHECKING:
    from dreambooth_lib.families.base import Family

_PACKAGE = Path(__file__).parent.parent
#: The bundled data: inside the installed package, or beside it in a checkout.
BUNDLED = _PACKAGE / "bundled" if (_PACKAGE / "bundled").exists() else _PACKAGE.parent / "data"

#: In a folder of LoRA weights: the base that they were trained on, as :func:`load_model` takes it.
LORA_BASE_FILE = "base.json"
#: In that folder: the weights, by diffusers' own name, which it asks for when it is offline.
LORA_FILE = "pytorch_lora_weights.safetensors"

#: The family of each pipeline class that a base's ``model_index.json`` may name: a subclass of
#: ``families.base.Family``, or its module here and its name. Add to it to add a family.
FAMILIES: "dict[str, type[Family] | tuple[str, str]]" = {
    "StableDiffusionPipeline": ("stable_diffusion", "StableDiffusion"),
    "StableDiffusionXLPipeline": ("stable_diffusion_xl", "StableDiffusionXL"),
    "StableDiffusion3Pipeline": ("stable_diffusion_3", "StableDiffusion3"),
    "FluxPipeline": ("flux", "Flux"),
    "ZImagePipeline": ("z_image", "ZImage"),
}


class BaseError(KitError, ValueError):
    """A base that cannot be found or loaded, or whose family is unknown."""


def locate(base: str) -> str:
    """Return the path or hub id of a base: "toybox", a run's or pipeline's folder, or a hub id.

    Raises :class:`BaseError` where it is none of these.
    """
    if base == "toybox":
        return str(BUNDLED / "toybox")
    folder = Path(base)
    for place in (folder / "pipeline", folder):
        if any((place / name).exists() for name in ("model_index.json", LORA_BASE_FILE)):
            return str(place)
    if folder.exists():
        raise BaseError(
            f"the base folder {folder} has no model_index.json; give a folder in diffusers' "
            "layout, or the folder of a run that has finished."
        )
    if folder.is_absolute() or base.count("/") != 1:
        raise BaseError(
            f"there is no base '{base}'; give 'toybox', a folder in diffusers' layout, "
            "or a hub id such as 'stable-diffusion-v1-5/stable-diffusion-v1-5'."
        )
    return base


@dataclass(frozen=True)
class Lora:
    """A folder of LoRA weights that this kit wrote."""

    path: str
    trained_on: dict[str, Any]  #: the base, as arguments of :func:`load_model`
    token: str | None  #: the new token that was trained along


@dataclass(frozen=True)
class ResolvedBase:
    """Hold where a base is, its family, and the LoRAs on top of it; see :func:`resolve`."""

    name: str  #: of the base under all LoRAs: "toybox", a folder or a hub id
    path: str  #: its pipeline's folder, or the hub id
    hub: dict[str, str | None]  #: revision and variant; empty for a folder
    loras: tuple[Lora, ...] = ()  #: in the order in which they were trained

    @property
    def is_local(self) -> bool:
        return Path(self.path).exists()

    @cached_property
    def family(self) -> "type[Family]":
        """Return its family's class. Raises :class:`BaseError` for an unknown one."""
        class_name = self.read("model_index.json")["_class_name"]
        if class_name not in FAMILIES:
            raise BaseError(
                f"the base '{self.name}' is a {class_name}, which the kit does not support; choose "
                f"a base with one of these pipelines: {', '.join(FAMILIES)}; or add its family to "
                "families.loading.FAMILIES."
            )
        family = FAMILIES[class_name]
        if isinstance(family, tuple):
            module, name = family
            return getattr(import_module(f"{__package__}.{module}"), name)
        return family

    @property
    def inference(self) -> Inference:
        """Return its inference steps and guidance scale, told by its configs and its name."""
        family, name = self.family, origin(self.name)
        if name != "toybox" and Path(name).exists():
            # A folder may have any name; diffusers records where its files came from.
            name = self.read("model_index.json").get("_name_or_path") or name
        parts = ("scheduler/scheduler_config.json", f"{family.denoiser_name}/config.json")
        return family.inference_for([Path(name).name], *map(self.read, parts))

    def read(self, name: str) -> dict[str, Any]:
        """Read one of its configs; return {} where a folder has no such file."""
        if self.is_local:
            file = Path(self.path) / name
            return json.loads(file.read_text()) if file.exists() else {}
        from huggingface_hub import hf_hub_download

        try:
            file = Path(hf_hub_download(self.path, name, revision=self.hub["revision"]))
        except Exception as error:  # huggingface_hub raises many kinds for the same problem
            raise BaseError(
                f"the base '{self.path}' could not be reached on the hub "
                f"({type(error).__name__}); check its name, your network and your access to it."
            ) from error
        return json.loads(file.read_text())


def resolve(base: str, revision: str | None = None, variant: str | None = None) -> ResolvedBase:
    """Find a base; for a folder of LoRA weights, the base that they were trained on.

    Downloads nothing before its family or inference settings are asked for. Raises
    :class:`BaseError` for a missing base.
    """
    path = locate(base)
    lora_base = Path(path) / LORA_BASE_FILE
    if not lora_base.exists():
        hub = {} if Path(path).exists() else {"revision": revision, "variant": variant}
        return ResolvedBase(base, path, hub)
    trained_on = json.loads(lora_base.read_text())
    lora = Lora(path, trained_on, trained_on.pop("word", None))
    resolved = resolve(trained_on["base"], trained_on["revision"], trained_on.get("variant"))
    return replace(resolved, loras=(*resolved.loras, lora))


def load_model(
    base: str, revision: str | None = None, variant: str | None = None, **loading: Any
) -> "Family":
    """Load a base on the CPU, in float32 by default, from safetensors only, without remote code.

    ``loading`` goes to ``families.pretrained.load_pretrained``: resolution, precisions, quantizing.
    LoRA weights are merged into their base, unless they were trained on a quantized base, which is
    then quantized again. huggingface_hub finds the hub token by itself; it is never passed on or
    stored. Raises :class:`BaseError` for a missing base, an unknown family, a precision that the
    family cannot compute in, and for quantizing without a GPU.
    """
    resolved, quantize = resolve(base, revision, variant), loading.get("quantize")
    if resolved.loras:
        if quantize is not None:
            raise BaseError(
                f"the base '{base}' is a LoRA, which cannot be merged into quantized weights; "
                f"train on '{resolved.loras[-1].trained_on['base']}', or leave quantize out."
            )
        return compose({base: 1.0}, **loading)
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
    from dreambooth_lib.families.pretrained import load_pretrained

    family = load_pretrained(resolved.family, resolved.path, **(loading | resolved.hub))
    family.inference = resolved.inference
    return family


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def compose(loras: Mapping[str, float], **loading: Any) -> "Family":
    """Load the base of several LoRA runs or folders, and add each LoRA at its weight.

    They are merged as in :func:`load_model`. Raises :class:`BaseError` for LoRAs of several bases.
    """
    from dreambooth_lib.families.textual_inversion import load_token

    parts = [_read_lora(name) for name in loras]
    bases = [lora.trained_on for lora in parts]
    if not bases or any(base != bases[0] for base in bases):
        names = ", ".join(f"'{n}' on '{b['base']}'" for n, b in zip(loras, bases, strict=True))
        raise BaseError(
            f"only LoRAs of the same base can be composed, and these are {names or 'none'}."
        )
    quantizers.ignore_unusable()
    family = load_model(**(loading | bases[0]))
    adapters = [f"lora{number}" for number in range(len(parts))]
    for adapter, lora in zip(adapters, parts, strict=True):
        if lora.token is not None:
            load_token(family, lora.path, lora.token)
        family.pipeline.load_lora_weights(lora.path, weight_name=LORA_FILE, adapter_name=adapter)
    family.pipeline.set_adapters(adapters, list(loras.values()))
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
    """Merge the LoRA weights into the family's own and return it with plain models."""
    family.pipeline.fuse_lora()
    family.pipeline.unload_lora_weights()
    return family


def load_meta(base: str, revision: str | None = None, **loading: Any) -> "Family":
    """Load as :func:`load_model`, but on the meta device: read only configs and tokenizers.

    Leaves out LoRAs on the base.
    """
    from dreambooth_lib.families.pretrained import build_on_meta

    resolved = resolve(base, revision)
    hub_revision = resolved.hub.get("revision")
    return build_on_meta(resolved.family, resolved.path, revision=hub_revision, **loading)


class BaseInfo(NamedTuple):
    """Hold what is known of a base without its weights."""

    resolution: int  #: pixels a side that the base was trained at
    tokenizers: list[Any]  #: of all text encoders; identifiers are chosen by the first


def inspect_base(base: str, revision: str | None = None) -> BaseInfo:
    """Return a base's resolution and tokenizers; from the hub, that is a small download.

    Raises as :func:`load_model` does.
    """
    import transformers

    resolved = resolve(base, revision)
    family = resolved.family
    denoiser, vae = (resolved.read(f"{n}/config.json") for n in (family.denoiser_name, "vae"))
    index, revision = resolved.read("model_index.json"), resolved.hub.get("revision")
    tokenizers = [
        getattr(transformers, index[name][1]).from_pretrained(
            resolved.path, subfolder=name, revision=revision
        )
        for name in ("tokenizer", "tokenizer_2", "tokenizer_3")
        if index.get(name, [None])[0]
    ]
    return BaseInfo(family.native_resolution(denoiser, vae), tokenizers)


def base_inference(base: str, revision: str | None = None) -> Inference:
    """Return a base's inference steps and guidance scale, told by its configs and its name.

    From the hub, that is a download of three small files.
    """
    return resolve(base, revision).inference


def warn_of_distillation(base: str) -> str | None:
    """Return a warning if a base is distilled, else None.

    Downloads nothing: a base on the hub is judged by its name alone. Raises as :func:`load_model`
    does.
    """
    resolved = resolve(base)
    if resolved.loras or resolved.is_local:
        return distillation_warning(base, resolved.inference, resolved.family.undistilled_base)
    inference = distilled_by_name([Path(base).name])
    return None if inference is None else distillation_warning(base, inference)
