"""Find a base by its name, and tell its family and its LoRAs, by reading small files only."""

import os
import re
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dreambooth_lib.core.config import origin
from dreambooth_lib.families import base_files, hub_files, index_checks, one_file
from dreambooth_lib.families.base_files import BaseError
from dreambooth_lib.families.inference_settings import Inference
from dreambooth_lib.families.prediction_type import with_prediction_type

if TYPE_CHECKING:
    from dreambooth_lib.families.base import Family

_PACKAGE = Path(__file__).parent.parent
#: The bundled data: inside the installed package, or beside it in a checkout.
BUNDLED = _PACKAGE / "bundled" if (_PACKAGE / "bundled").exists() else _PACKAGE.parent / "data"

#: In a folder of LoRA weights: the base that they were trained on, as :func:`load_model` takes it.
LORA_BASE_FILE = "base.json"
#: In that folder: the weights, by diffusers' own name, which it asks for when it is offline.
LORA_FILE = "pytorch_lora_weights.safetensors"
MOST_LORAS = 32  #: that may have been trained one on the other
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")

#: The family of each pipeline class that a base's ``model_index.json`` may name: a subclass of
#: ``families.base.Family``, or its module here and its name. Add to it to add a family.
FAMILIES: "dict[str, type[Family] | tuple[str, str]]" = {
    "StableDiffusionPipeline": ("stable_diffusion", "StableDiffusion"),
    "StableDiffusionXLPipeline": ("stable_diffusion_xl", "StableDiffusionXL"),
    "StableDiffusion3Pipeline": ("stable_diffusion_3", "StableDiffusion3"),
    "FluxPipeline": ("flux", "Flux"),
    "Flux2KleinPipeline": ("flux_2_klein", "Flux2Klein"),
    "ZImagePipeline": ("z_image", "ZImage"),
}


def locate(base: str, revision: str | None = None) -> str:
    """Return the path or Hub id of a base: "toybox", a folder, a Hub id or a model in one file.

    A folder is a run's or in diffusers' layout; a model in one file is unpacked into one (see
    ``families.one_file``). Raises :class:`BaseError` where it is none of these.
    """
    if base == "toybox":
        return str(BUNDLED / "toybox")
    folder = Path(base)
    try:
        for place in (folder / "pipeline", folder):
            if any((place / name).exists() for name in ("model_index.json", LORA_BASE_FILE)):
                return str(place)
        exists, file = folder.exists(), one_file.parse(base, revision)
    except OSError as error:
        raise BaseError(
            f"the base '{base}' cannot be looked for ({error.strerror}); check its path."
        ) from error
    if file is not None:
        return str(one_file.unpack(file))
    if exists:
        raise BaseError(
            f"the base folder {folder} has no model_index.json; give a folder in diffusers' "
            "layout, or the folder of a run that has finished."
        )
    if not _HUB_ID.fullmatch(base):
        raise BaseError(
            f"there is no base '{base}'; give 'toybox', a folder in diffusers' layout, a "
            ".safetensors file of Stable Diffusion, or a Hub id such as "
            "'stable-diffusion-v1-5/stable-diffusion-v1-5'."
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

    name: str  #: of the base under all LoRAs: "toybox", a folder or a Hub id
    path: str  #: its pipeline's folder, or the Hub id
    hub: dict[str, str | None]  #: revision and variant; of a folder, only a variant that it has
    loras: tuple[Lora, ...] = ()  #: in the order in which they were trained
    prediction_type: str | None = None  #: instead of its own; see ``families.prediction_type``

    @property
    def is_local(self) -> bool:
        return Path(self.path).exists()

    @cached_property
    def index(self) -> dict[str, Any]:
        """Return its ``model_index.json``. Raises :class:`BaseError` where there is none."""
        index = self.read("model_index.json")
        if not isinstance(index.get("_class_name"), str):
            raise BaseError(
                f"{self.path}/model_index.json names no pipeline class of diffusers; choose a base "
                "in diffusers' layout."
            )
        return index

    @cached_property
    def family(self) -> "type[Family]":
        """Return its family's class. Raises :class:`BaseError` for an unknown one."""
        class_name = self.index["_class_name"]
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
            name = str(self.index.get("_name_or_path") or name)
        denoiser = self.read(f"{family.denoiser_name}/config.json")
        return family.inference_for([Path(name).name], self.scheduler, denoiser, self.index)

    @property
    def scheduler(self) -> dict[str, Any]:
        """Return its scheduler's config, for ``prediction_type`` if that is set.

        Raises :class:`BaseError` where its family predicts neither epsilon nor v.
        """
        config = self.read("scheduler/scheduler_config.json")
        if self.prediction_type is None or not config:
            return config
        if "beta_start" not in self.family.scheduler_settings:
            raise BaseError(
                f"prediction_type is '{self.prediction_type}', and the base '{self.name}' predicts "
                "a flow; leave prediction_type out."
            )
        return with_prediction_type(config, self.prediction_type)

    def read(self, name: str) -> dict[str, Any]:
        """Read one of its configs; return {} where it has no such file."""
        if self.is_local:
            file: Path | None = Path(self.path) / name
        else:
            file = hub_files.download(self.path, name, self.hub["revision"])
        return {} if file is None or not file.exists() else base_files.read_json(file)

    def check(self, weights: bool = True) -> None:
        """Check all that loading reads of it, before a library reads it.

        Raises :class:`BaseError` for files that are missing or damaged, for what would run code,
        and for parts that its family cannot train.
        """
        family, hub = self.family, self.hub
        needed, revision = (family.denoiser_name, "vae", "scheduler"), hub.get("revision")
        parts = index_checks.check(
            self.path, self.index, needed, family.options, revision, self.read
        )
        for part in parts if weights and self.is_local else ():
            base_files.check_part_weights(Path(self.path) / part, hub.get("variant"))
        scheduler = self.scheduler
        if not scheduler:
            raise BaseError(
                f"{self.path}/scheduler/scheduler_config.json is missing or empty; download or "
                "copy the base again."
            )
        names = {self.index["scheduler"][1], str(scheduler.get("_class_name") or "")} - {""}
        index_checks.check_training(
            self.path, family.__name__, family.scheduler_settings, sorted(names), scheduler,
            self.read("vae/config.json"),
        )  # fmt: skip


def resolve(
    base: str,
    revision: str | None = None,
    variant: str | None = None,
    prediction_type: str | None = None,
) -> ResolvedBase:
    """Find a base; for a folder of LoRA weights, the base that they were trained on.

    Downloads nothing before its family or inference settings are asked for, but a model in one file
    that was not read yet. Raises
    :class:`BaseError` for a missing base, and for a ``base.json`` that is damaged or leads back to
    itself.
    """
    loras: list[Lora] = []
    base = os.path.expanduser(base)
    while (file := Path(path := locate(base, revision)) / LORA_BASE_FILE).exists():
        if len(loras) == MOST_LORAS:
            raise BaseError(
                f"{file} leads back to itself, or through more than {MOST_LORAS} LoRAs; correct "
                "its 'base'."
            )
        trained_on: dict[str, Any] = base_files.read_trained_on(file)
        loras.insert(0, Lora(path, trained_on, trained_on.pop("word")))
        base, revision, variant = (trained_on[key] for key in ("base", "revision", "variant"))
        prediction_type = prediction_type or trained_on["prediction_type"]
    hub = {"revision": revision, "variant": variant}
    if Path(path).exists():
        hub = (
            {"variant": variant}
            if any(f".{variant}." in p.name for p in Path(path).glob("*/[!.]*"))
            else {}
        )
    return ResolvedBase(base, path, hub, tuple(loras), prediction_type)
