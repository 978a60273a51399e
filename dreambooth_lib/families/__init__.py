"""Model families: which adapter a base needs, and where the base is."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dreambooth_lib.families.base import Family, Outline
    from dreambooth_lib.families.stable_diffusion import StableDiffusion

_PACKAGE = Path(__file__).parent.parent
#: The bundled data: inside the installed package, or beside it in a checkout.
BUNDLED = _PACKAGE / "bundled" if (_PACKAGE / "bundled").exists() else _PACKAGE.parent / "data"


class BaseError(ValueError):
    """A base that cannot be found or that no family adapter knows."""


def locate(base: str) -> str:
    """A path or hub id for ``base``: "toybox", a run's folder, a pipeline's folder or a hub id."""
    if base == "toybox":
        return str(BUNDLED / "toybox")
    folder = Path(base)
    if (folder / "pipeline" / "model_index.json").exists():
        return str(folder / "pipeline")
    if folder.exists() and not (folder / "model_index.json").exists():
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


def load(base: str, revision: str | None = None, variant: str | None = None) -> "Family":
    """Load a base in float32 on the CPU, safetensors only, with no remote code.

    The hub token is the one that huggingface_hub finds by itself; it is never passed or kept.
    Raises :class:`BaseError` for a base that is not there or whose family is unknown.
    """
    path = locate(base)
    options = {} if Path(path).exists() else {"revision": revision, "variant": variant}
    return _adapter(base, path, revision).from_pretrained(path, **options)


def outline(base: str, revision: str | None = None) -> "Outline":
    """What of a base is known without its weights; from the hub, that is a small download.

    Raises as :func:`load` does.
    """
    path = locate(base)
    options = {} if Path(path).exists() else {"revision": revision}
    return _adapter(base, path, revision).outline(path, **options)


def _adapter(base: str, path: str, revision: str | None) -> "type[StableDiffusion]":
    class_name = _pipeline_class(path, revision)
    if class_name not in ("StableDiffusionPipeline",):
        raise BaseError(
            f"the base '{base}' is a {class_name}, which no family adapter knows; "
            "use a Stable Diffusion 1.x or 2.x base."
        )
    from dreambooth_lib.families.stable_diffusion import StableDiffusion

    return StableDiffusion


def _pipeline_class(path: str, revision: str | None) -> str:
    if Path(path).exists():
        index = Path(path) / "model_index.json"
    else:
        from huggingface_hub import hf_hub_download

        try:
            index = Path(hf_hub_download(path, "model_index.json", revision=revision))
        except Exception as error:  # the hub's client raises many kinds, all meaning this
            raise BaseError(
                f"the base '{path}' could not be reached on the hub "
                f"({type(error).__name__}); check its name, your network and your access to it."
            ) from error
    return json.loads(index.read_text())["_class_name"]
