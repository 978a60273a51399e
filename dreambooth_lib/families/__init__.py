"""Model families: which adapter a base needs, and where the base is."""

import json
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dreambooth_lib import quantizers
from dreambooth_lib.config import origin
from dreambooth_lib.families.inference import Inference, few_by_name, warning

if TYPE_CHECKING:
    from dreambooth_lib.families.base import Family, Outline

_PACKAGE = Path(__file__).parent.parent
#: The bundled data: inside the installed package, or beside it in a checkout.
BUNDLED = _PACKAGE / "bundled" if (_PACKAGE / "bundled").exists() else _PACKAGE.parent / "data"


#: In a folder of LoRA weights: the base that they belong to, as :func:`load` takes it.
MADE_OF = "base.json"
#: In that folder: the weights, by the name that diffusers gives them. Offline it must be said.
LORA_FILE = "pytorch_lora_weights.safetensors"


class BaseError(ValueError):
    """A base that cannot be found or that no family adapter knows."""


def locate(base: str) -> str:
    """A path or hub id for ``base``: "toybox", a run's folder, a pipeline's folder or a hub id."""
    if base == "toybox":
        return str(BUNDLED / "toybox")
    folder = Path(base)
    for place in (folder / "pipeline", folder):
        if any((place / name).exists() for name in ("model_index.json", MADE_OF)):
            return str(place)
    if folder.exists():
        raise BaseError(
            f"the base folder {folder} has no model_index.json; give a folder in diffusers' "
            "layout, or a run that has finished."
        )
    if not folder.exists() and (folder.is_absolute() or base.count("/") != 1):
        raise BaseError(
            f"there is no base '{base}'; give 'toybox', a folder in diffusers' layout, "
            "or a hub id such as 'stable-diffusion-v1-5/stable-diffusion-v1-5'."
        )
    return base


#: The adapter of each pipeline class that a base's ``model_index.json`` may name: a subclass of
#: ``families.base.Family``, or where in this package one is. Add to it to add a family.
ADAPTERS: "dict[str, type[Family] | tuple[str, str]]" = {
    "StableDiffusionPipeline": ("stable_diffusion", "StableDiffusion"),
    "StableDiffusionXLPipeline": ("stable_diffusion_xl", "StableDiffusionXL"),
    "StableDiffusion3Pipeline": ("stable_diffusion_3", "StableDiffusion3"),
    "FluxPipeline": ("flux", "Flux"),
    "ZImagePipeline": ("z_image", "ZImage"),
}


def load(
    base: str, revision: str | None = None, variant: str | None = None, **loading: Any
) -> "Family":
    """Load a base on the CPU, safetensors only, with no remote code, in float32 if no more is said.

    ``loading`` is what ``Family.from_pretrained`` takes: resolution, and what is to be in half
    precision. LoRA weights come merged into their base, but for one that they were trained
    quantized on, which is quantized again. The hub token is the one that huggingface_hub finds by
    itself; it is never passed or kept. Raises :class:`BaseError` for a base that is not there or
    whose family is unknown or cannot compute in ``half``, or to be quantized without a GPU.
    """
    path = locate(base)
    if (Path(path) / MADE_OF).exists():
        if loading.get("quantize") is not None:
            below = made_of(path)[0]["base"]
            raise BaseError(
                f"the base '{base}' is a LoRA, which cannot be merged into weights that are "
                f"quantized; train on '{below}', or leave quantize out."
            )
        return compose({base: 1.0}, **loading)
    if loading.get("quantize") is not None and not _has_gpu():
        raise BaseError(
            f"quantize is '{loading['quantize']}', which needs a GPU, and there is none here; "
            "leave quantize out, or run this where there is one."
        )
    hub = {} if Path(path).exists() else {"revision": revision, "variant": variant}
    adapter = _adapter(base, path, revision)
    if not adapter.computes_in(loading.get("half")):
        raise BaseError(
            f"the base '{base}' produces NaN in float16, and this GPU has no bfloat16; use one "
            "that has it, such as an L4 or A100, or another base."
        )
    family = adapter.from_pretrained(path, **(loading | hub))
    family.inference = inference(base, revision)
    return family


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def compose(loras: Mapping[str, float], **loading: Any) -> "Family":
    """The base of several LoRA runs or folders, with each of these by its weight.

    Merged as :func:`load` says. Raises :class:`BaseError` where they are not all of one base.
    """
    paths = {locate(name): weight for name, weight in loras.items()}
    found = {path: made_of(path) for path in paths}
    bases = [below for below, _ in found.values()]
    if not bases or any(below != bases[0] for below in bases):
        of = ", ".join(f"'{n}' of '{b['base']}'" for n, b in zip(loras, bases, strict=True))
        raise BaseError(f"LoRAs are composed on the base that they share, and these are {of}.")
    quantizers.ignore_unusable()
    family = load(**(loading | bases[0]))
    names = [f"lora{number}" for number in range(len(paths))]
    for name, (path, (_, word)) in zip(names, found.items(), strict=True):
        if word is not None:
            import_module(f"{__name__}.tokens").load(family, path, word)
        family.pipeline.load_lora_weights(path, weight_name=LORA_FILE, adapter_name=name)
    family.pipeline.set_adapters(names, list(paths.values()))
    return family if bases[0].get("quantize") else merged(family)


def merged(family: "Family") -> "Family":
    """The family with its LoRA weights worked into its own, as plain models."""
    family.pipeline.fuse_lora()
    family.pipeline.unload_lora_weights()
    return family


def skeleton(base: str, revision: str | None = None, **loading: Any) -> "Family":
    """As :func:`load`, of weights without values: only configs and tokenizers are read."""
    path = locate(base)
    if (Path(path) / MADE_OF).exists():
        below, _ = made_of(path)
        return skeleton(below["base"], below["revision"], **loading)
    hub = {} if Path(path).exists() else {"revision": revision}
    return _adapter(base, path, revision).from_configs(path, **(loading | hub))


def outline(base: str, revision: str | None = None) -> "Outline":
    """What of a base is known without its weights; from the hub, that is a small download.

    Raises as :func:`load` does.
    """
    path = locate(base)
    if (Path(path) / MADE_OF).exists():
        below, _ = made_of(path)
        return outline(below["base"], below["revision"])
    hub = {} if Path(path).exists() else {"revision": revision}
    return _adapter(base, path, revision).outline(path, **hub)


def inference(base: str, revision: str | None = None) -> Inference:
    """Steps and guidance that a base is drawn with, told by its configs and names.

    From the hub that is a download of three small files. Raises as :func:`load` does.
    """
    path = locate(base)
    if (Path(path) / MADE_OF).exists():
        below, _ = made_of(path)
        return inference(below["base"], below["revision"])
    family, name = _adapter(base, path, revision), origin(base)
    if name != "toybox" and Path(name).exists():
        # A folder may be called anything, and diffusers writes down where it came from.
        name = _read(path, "model_index.json", revision).get("_name_or_path") or name
    parts = ("scheduler/scheduler_config.json", f"{family.denoiser_name}/config.json")
    configs = (_read(path, part, revision) for part in parts)
    return family.inference_for([Path(name).name], *configs)


def distilled(base: str) -> str | None:
    """Say what training on a distilled base does, in a sentence; None for any other.

    Nothing is downloaded: one that is not on this machine is known by its name. Raises as
    :func:`load` does.
    """
    if Path(locate(base)).exists():
        return warning(base, inference(base), adapter(base).undistilled)
    found = few_by_name([Path(base).name])
    return None if found is None else warning(base, found)


def made_of(path: str) -> tuple[dict[str, Any], str | None]:
    """Of a folder of LoRA weights, what :func:`load` is given for their base, and their word."""
    file = Path(path) / MADE_OF
    if not file.exists():
        raise BaseError(f"'{path}' is no LoRA of this kit's: it has no {MADE_OF}; check the path.")
    found = json.loads(file.read_text())
    word = found.pop("word", None)
    return found, word


def adapter(base: str, revision: str | None = None) -> "type[Family]":
    """The adapter of a base's family. Raises as :func:`load` does."""
    path = locate(base)
    if (Path(path) / MADE_OF).exists():
        below, _ = made_of(path)
        return adapter(below["base"], below["revision"])
    return _adapter(base, path, revision)


def _adapter(base: str, path: str, revision: str | None) -> "type[Family]":
    class_name = _pipeline_class(path, revision)
    if class_name not in ADAPTERS:
        raise BaseError(
            f"the base '{base}' is a {class_name}, which no family adapter knows; use a base of "
            f"one of {', '.join(ADAPTERS)}, or add an adapter to families.ADAPTERS."
        )
    adapter = ADAPTERS[class_name]
    if isinstance(adapter, tuple):
        module, name = adapter
        return getattr(import_module(f"{__name__}.{module}"), name)
    return adapter


def _pipeline_class(path: str, revision: str | None) -> str:
    return _read(path, "model_index.json", revision)["_class_name"]


def _read(path: str, name: str, revision: str | None) -> dict[str, Any]:
    """Return one of a base's configs; empty where a folder lacks it."""
    if Path(path).exists():
        file = Path(path) / name
        if not file.exists():
            return {}
    else:
        from huggingface_hub import hf_hub_download

        try:
            file = Path(hf_hub_download(path, name, revision=revision))
        except Exception as error:  # the hub's client raises many kinds, all meaning this
            raise BaseError(
                f"the base '{path}' could not be reached on the hub "
                f"({type(error).__name__}); check its name, your network and your access to it."
            ) from error
    return json.loads(file.read_text())
