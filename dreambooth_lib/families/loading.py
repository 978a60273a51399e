"""Model families: which adapter a base needs, where the base is, and how it is loaded."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dreambooth_lib.core.config import origin
from dreambooth_lib.families import quantizers
from dreambooth_lib.families.inference_settings import Inference, distillation_warning, few_by_name

if TYPE_CHECKING:
    from dreambooth_lib.families.base import Family

_PACKAGE = Path(__file__).parent.parent
#: The bundled data: inside the installed package, or beside it in a checkout.
BUNDLED = _PACKAGE / "bundled" if (_PACKAGE / "bundled").exists() else _PACKAGE.parent / "data"


#: In a folder of LoRA weights: the base that they belong to, as :func:`load_model` takes it.
LORA_BASE_FILE = "base.json"
#: In that folder: the weights, by the name that diffusers gives them. Offline it must be said.
LORA_FILE = "pytorch_lora_weights.safetensors"

#: The adapter of each pipeline class that a base's ``model_index.json`` may name: a subclass of
#: ``families.base.Family``, or where in this package one is. Add to it to add a family.
FAMILIES: "dict[str, type[Family] | tuple[str, str]]" = {
    "StableDiffusionPipeline": ("stable_diffusion", "StableDiffusion"),
    "StableDiffusionXLPipeline": ("stable_diffusion_xl", "StableDiffusionXL"),
    "StableDiffusion3Pipeline": ("stable_diffusion_3", "StableDiffusion3"),
    "FluxPipeline": ("flux", "Flux"),
    "ZImagePipeline": ("z_image", "ZImage"),
}


class BaseError(ValueError):
    """A base that cannot be found or that no family adapter knows."""


def locate(base: str) -> str:
    """Return a path or hub id: of "toybox", a run's folder, a pipeline's folder or a hub id."""
    if base == "toybox":
        return str(BUNDLED / "toybox")
    folder = Path(base)
    for place in (folder / "pipeline", folder):
        if any((place / name).exists() for name in ("model_index.json", LORA_BASE_FILE)):
            return str(place)
    if folder.exists():
        raise BaseError(
            f"the base folder {folder} has no model_index.json; give a folder in diffusers' "
            "layout, or a run that has finished."
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
    below: dict[str, Any]  #: the base that they were trained on, as :func:`load_model` takes it
    word: str | None  #: that they learnt


@dataclass(frozen=True)
class ResolvedBase:
    """Where a base is, its family, and the LoRAs that lie on it; see :func:`resolve`."""

    name: str  #: of the base below all LoRAs: "toybox", a folder or a hub id
    path: str  #: its pipeline's folder, or the hub id
    hub: dict[str, str | None]  #: revision and variant; empty for a folder
    loras: tuple[Lora, ...] = ()  #: the lowest first

    @property
    def is_local(self) -> bool:
        return Path(self.path).exists()

    @cached_property
    def family(self) -> "type[Family]":
        """The adapter of its family. Raises :class:`BaseError` as :func:`load_model` does."""
        class_name = self.read("model_index.json")["_class_name"]
        if class_name not in FAMILIES:
            raise BaseError(
                f"the base '{self.name}' is a {class_name}, which no family adapter knows; use a "
                f"base of one of {', '.join(FAMILIES)}, or add an adapter to families.ADAPTERS."
            )
        adapter = FAMILIES[class_name]
        if isinstance(adapter, tuple):
            module, name = adapter
            return getattr(import_module(f"dreambooth_lib.families.{module}"), name)
        return adapter

    @property
    def inference(self) -> Inference:
        """Steps and guidance that it is drawn with, told by its configs and names."""
        family, name = self.family, origin(self.name)
        if name != "toybox" and Path(name).exists():
            # A folder may be called anything, and diffusers writes down where it came from.
            name = self.read("model_index.json").get("_name_or_path") or name
        parts = ("scheduler/scheduler_config.json", f"{family.denoiser_name}/config.json")
        return family.inference_for([Path(name).name], *map(self.read, parts))

    def read(self, name: str) -> dict[str, Any]:
        """Return one of its configs; empty where a folder lacks it."""
        if self.is_local:
            file = Path(self.path) / name
            return json.loads(file.read_text()) if file.exists() else {}
        from huggingface_hub import hf_hub_download

        try:
            file = Path(hf_hub_download(self.path, name, revision=self.hub["revision"]))
        except Exception as error:  # the hub's client raises many kinds, all meaning this
            raise BaseError(
                f"the base '{self.path}' could not be reached on the hub "
                f"({type(error).__name__}); check its name, your network and your access to it."
            ) from error
        return json.loads(file.read_text())


def resolve(base: str, revision: str | None = None, variant: str | None = None) -> ResolvedBase:
    """Find a base, and below a folder of LoRA weights what these were trained on, and so on.

    Nothing is downloaded before its family or inference is asked for. Raises :class:`BaseError`
    for a base that is not there.
    """
    path = locate(base)
    made_of = Path(path) / LORA_BASE_FILE
    if not made_of.exists():
        hub = {} if Path(path).exists() else {"revision": revision, "variant": variant}
        return ResolvedBase(base, path, hub)
    below = json.loads(made_of.read_text())
    lora = Lora(path, below, below.pop("word", None))
    under = resolve(below["base"], below["revision"], below.get("variant"))
    return replace(under, loras=(*under.loras, lora))


def load_model(
    base: str, revision: str | None = None, variant: str | None = None, **loading: Any
) -> "Family":
    """Load a base on the CPU, safetensors only, with no remote code, in float32 if no more is said.

    ``loading`` is what ``families.loading.from_pretrained`` takes: resolution, and what is to be in
    half precision. LoRA weights come merged into their base, but for one that they were trained
    quantized on, which is quantized again. The hub token is the one that huggingface_hub finds by
    itself; it is never passed or kept. Raises :class:`BaseError` for a base that is not there or
    whose family is unknown or cannot compute in ``half``, or to be quantized without a GPU.
    """
    found, quantize = resolve(base, revision, variant), loading.get("quantize")
    if found.loras:
        if quantize is not None:
            raise BaseError(
                f"the base '{base}' is a LoRA, which cannot be merged into weights that are "
                f"quantized; train on '{found.loras[-1].below['base']}', or leave quantize out."
            )
        return compose({base: 1.0}, **loading)
    if quantize is not None and not _has_gpu():
        raise BaseError(
            f"quantize is '{quantize}', which needs a GPU, and there is none here; "
            "leave quantize out, or run this where there is one."
        )
    if not found.family.supports_dtype(loading.get("half")):
        raise BaseError(
            f"the base '{base}' produces NaN in float16, and this GPU has no bfloat16; use one "
            "that has it, such as an L4 or A100, or another base."
        )
    from dreambooth_lib.families.pretrained import from_pretrained

    family = from_pretrained(found.family, found.path, **(loading | found.hub))
    family.inference = found.inference
    return family


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def compose(loras: Mapping[str, float], **loading: Any) -> "Family":
    """Load the base of several LoRA runs or folders, with each of these by its weight.

    Merged as :func:`load_model` says. Raises :class:`BaseError` where they are not all of one base.
    """
    found = [_lora_at(name) for name in loras]
    bases = [lora.below for lora in found]
    if not bases or any(below != bases[0] for below in bases):
        of = ", ".join(f"'{n}' of '{b['base']}'" for n, b in zip(loras, bases, strict=True))
        raise BaseError(f"LoRAs are composed on the base that they share, and these are {of}.")
    quantizers.ignore_unusable()
    family = load_model(**(loading | bases[0]))
    names = [f"lora{number}" for number in range(len(found))]
    for name, lora in zip(names, found, strict=True):
        if lora.word is not None:
            from dreambooth_lib.families import textual_inversion

            textual_inversion.load_token(family, lora.path, lora.word)
        family.pipeline.load_lora_weights(lora.path, weight_name=LORA_FILE, adapter_name=name)
    family.pipeline.set_adapters(names, list(loras.values()))
    return family if bases[0].get("quantize") else merge_loras(family)


def _lora_at(name: str) -> Lora:
    found = resolve(name)
    if not found.loras:
        raise BaseError(
            f"'{found.path}' is no LoRA of this kit's: it has no {LORA_BASE_FILE}; check the path."
        )
    return found.loras[-1]


def merge_loras(family: "Family") -> "Family":
    """Return the family with its LoRA weights worked into its own, as plain models."""
    family.pipeline.fuse_lora()
    family.pipeline.unload_lora_weights()
    return family


def load_meta(base: str, revision: str | None = None, **loading: Any) -> "Family":
    """Load as :func:`load_model`, weights without values: only configs and tokenizers are read.

    LoRAs on the base are left out.
    """
    from dreambooth_lib.families.pretrained import from_configs

    found = resolve(base, revision)
    return from_configs(found.family, found.path, revision=found.hub.get("revision"), **loading)


class BaseInfo(NamedTuple):
    """What of a base is known without its weights."""

    resolution: int  #: pixels a side that the base was made for
    tokenizer: Any


def inspect_base(base: str, revision: str | None = None) -> BaseInfo:
    """Return what of a base is known without its weights; from the hub, that is a small download.

    Raises as :func:`load_model` does.
    """
    import transformers

    found = resolve(base, revision)
    parts = (found.family.denoiser_name, "vae")
    resolution = found.family.native_resolution(*(found.read(f"{p}/config.json") for p in parts))
    tokenizer = getattr(transformers, found.read("model_index.json")["tokenizer"][1])
    own = {"subfolder": "tokenizer", "revision": found.hub.get("revision")}
    return BaseInfo(resolution, tokenizer.from_pretrained(found.path, **own))


def base_inference(base: str, revision: str | None = None) -> Inference:
    """Return the steps and guidance that a base is drawn with, told by its configs and names.

    From the hub that is a download of three small files.
    """
    return resolve(base, revision).inference


def warn_of_distillation(base: str) -> str | None:
    """Say what training on a distilled base does, in a sentence; None for any other.

    Nothing is downloaded: one that is not on this machine is known by its name. Raises as
    :func:`load_model` does.
    """
    found = resolve(base)
    if found.loras or found.is_local:
        return distillation_warning(base, found.inference, found.family.undistilled_base)
    named = few_by_name([Path(base).name])
    return None if named is None else distillation_warning(base, named)
