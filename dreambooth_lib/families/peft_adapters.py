"""Make, save, load and merge peft's adapters other than LoRA, in peft's own format.

FOLDER/unet/adapter_config.json          peft's settings of the denoiser's adapter
FOLDER/unet/adapter_model.safetensors    its weights, by peft's names

peft's ``PeftModel.from_pretrained`` reads such a folder. A text encoder has a folder of its own.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dreambooth_lib.core.config_checks import ADAPTERS
from dreambooth_lib.core.config_types import ConfigError
from dreambooth_lib.core.errors import one_line
from dreambooth_lib.families import quantizers
from dreambooth_lib.families.base_files import BaseError, check_weights, read_json

if TYPE_CHECKING:
    import torch

    from dreambooth_lib.families.base import Family

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
#: What peft puts before the names in its files.
_PREFIX = "base_model.model."
#: What peft calls an adapter's size and its alpha; the first that it has.
_SIZES = ("oft_block_size", "block_size", "group_size", "r")
_ALPHAS = ("alpha", "lora_alpha")
#: What peft writes into its configs that says nothing of an adapter.
_NOT_READ = ("peft_version", "auto_mapping", "base_model_name_or_path")
#: What peft keeps of each layer, to undo a merge: for some adapters the whole weight, in float32.
_UNDOING = ("_base_weight_before_merge", "_cached_merge_factor")


def make_config(
    name: str,
    layers: list[str],
    size: int,
    alpha: int | None,
    settings: Mapping[str, float] | None,
) -> Any:
    """Return peft's config of an adapter for the layers whose names end in one of ``layers``.

    Raises :class:`ConfigError` where this peft lacks the adapter or a setting of ``settings``.
    """
    kind = _config_class(name)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    chosen: dict[str, Any] = {"target_modules": layers}
    chosen |= {field: size for field in [f for f in _SIZES if f in fields][:1]}
    if name == "oft":  # which takes either its blocks' size or their number
        chosen["r"] = 0
    if name == "c3a":  # which would not start from the base
        chosen["init_weights"] = True
    if name == "ia3":  # whose scales are of outputs, but for these
        chosen["feedforward_modules"] = []
    scaled = [field for field in _ALPHAS if field in fields]
    chosen |= dict.fromkeys(scaled, size if alpha is None else alpha)
    if alpha is not None and not scaled:
        raise ConfigError(f"lora_alpha is set, but '{name}' has no alpha; leave lora_alpha out.")
    own = [
        field.name
        for field in fields.values()
        if isinstance(field.default, int | float) and field.name not in _of_all_adapters()
    ]
    for field in settings or {}:
        if field not in own:
            raise ConfigError(
                f"adapter_settings has '{field}', which is not a numeric setting of peft's "
                f"'{name}'; leave it out, or use one of {', '.join(own)}."
            )
    try:
        return kind(**chosen | dict(settings or {}))
    except (TypeError, ValueError) as error:
        raise _unusable(name, error) from error


def _of_all_adapters() -> set[str]:
    """Return the fields that all of peft's configs have, which say how an adapter is used."""
    from peft import PeftConfig

    return {field.name for field in dataclasses.fields(PeftConfig)}


def add(module: "torch.nn.Module", config: Any) -> None:
    """Add an adapter to a denoiser or a text encoder.

    Raises :class:`ConfigError` where its size does not fit the layers.
    """
    try:
        module.add_adapter(config)  # type: ignore[operator]
    except (TypeError, ValueError, AssertionError, ZeroDivisionError) as error:
        raise _unusable(config.peft_type.value.lower(), error) from error


def _unusable(name: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"adapter '{name}' cannot be added to this base's layers ({one_line(error)[:200]}); change "
        "lora_rank or adapter_settings."
    )


def _config_class(name: str) -> Any:
    import peft
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    kinds = {key.value.lower(): kind for key, kind in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if name not in kinds:
        raise ConfigError(
            f"adapter is '{name}', which peft {peft.__version__} does not have; update peft, or "
            "choose another adapter."
        )
    return kinds[name]


def save(module: "torch.nn.Module", folder: Path) -> None:
    """Save the adapter of a denoiser or a text encoder into a new folder."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    config: Any = module.peft_config["default"]  # type: ignore[index, union-attr]
    config = dataclasses.replace(config, base_model_name_or_path=None)
    config.save_pretrained(folder)
    weights = get_peft_model_state_dict(module, save_embedding_layers=False)
    save_file(
        {_PREFIX + name: w.contiguous() for name, w in weights.items() if not w.is_meta},
        folder / WEIGHTS_FILE,
    )


def parts(folder: str | Path) -> list[str]:
    """Return the parts of a pipeline for which a model's folder holds such adapters."""
    return sorted(file.parent.name for file in Path(folder).glob(f"[!.]*/{CONFIG_FILE}"))


def load(family: "Family", folder: str, weight: float) -> None:
    """Merge the adapters of a model's folder into a family's weights, ``weight`` of the way.

    Raises :class:`BaseError` for files that are damaged, that name code, or that do not fit.
    """
    import torch
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    quantizers.ignore_unusable()
    for name in parts(folder):
        module, own_folder = family.pipeline.components.get(name), Path(folder) / name
        config = _read_config(own_folder / CONFIG_FILE)
        check_weights(own_folder / WEIGHTS_FILE)
        weights = load_file(own_folder / WEIGHTS_FILE)
        fits = isinstance(module, torch.nn.Module)
        if fits:
            add(module, config)
            own = {key.removeprefix(_PREFIX): w for key, w in weights.items()}
            result: Any = set_peft_model_state_dict(module, own, "default")
            fits = not result.unexpected_keys
        if not fits:
            raise BaseError(
                f"the adapter in {own_folder} does not fit its base; copy or train it again."
            )
        merge(module, weight)
    family.pipeline.unload_lora_weights()


def _read_config(file: Path) -> Any:
    """Read an adapter's settings: numbers, layer names, and peft's defaults for the rest.

    A newer peft writes fields that this one does not know; those that are off are skipped.
    """
    found = read_json(file)
    name = str(found.pop("peft_type", "")).lower()
    if name not in ADAPTERS:
        raise BaseError(f"{file} names no adapter that the kit trains; train it again.")
    kind = _config_class(name)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    by_newer = _is_newer(found.get("peft_version"))
    for key, value in [*found.items()]:
        unknown = key not in fields
        if key in _NOT_READ or (unknown and not value):
            del found[key]
        elif unknown and by_newer:
            raise BaseError(f"{file} was saved by a newer peft, which has '{key}'; update peft.")
        elif unknown or not _is_harmless(key, value, fields[key]):
            raise BaseError(
                f"{file} sets '{key}', which the kit never does; use an adapter from a source that "
                "you trust."
            )
    try:
        return kind(**found)
    except (TypeError, ValueError) as error:
        raise BaseError(
            f"peft refuses the settings in {file} ({one_line(error)[:200]}); copy or train the "
            "adapter again."
        ) from error


def _is_newer(version: Any) -> bool:
    """Return whether a version of peft, such as "0.21.2", is newer than the one here."""
    import peft

    found, own = (re.findall(r"\d{1,9}", str(text))[:3] for text in (version, peft.__version__))
    return [*map(int, found)] > [*map(int, own)]


def _is_harmless(key: str, value: Any, field: dataclasses.Field[Any]) -> bool:
    """Return whether a setting is a number, a list of layer names, or peft's default."""
    if key in ("target_modules", "feedforward_modules"):
        return isinstance(value, list) and all(isinstance(name, str) for name in value)
    if isinstance(value, int | float | None):
        return True
    made = field.default_factory
    return bool(value == (field.default if made is dataclasses.MISSING else made()))


def without_dice(module: "torch.nn.Module") -> None:
    """Turn off the dropout of LoKr and LoHa: fake tensors cannot draw random numbers."""
    from peft.tuners.lycoris_utils import LycorisLayer

    for layer in module.modules():
        if isinstance(layer, LycorisLayer):
            layer.training = False


def has_other(module: "torch.nn.Module") -> bool:
    """Return whether a module has an adapter that is not a LoRA."""
    configs = getattr(module, "peft_config", {}).values()
    return any(config.peft_type.value.lower() in ADAPTERS for config in configs)


def merge(module: "torch.nn.Module", weight: float = 1.0) -> None:
    """Merge a module's adapter into its weights, ``weight`` of the way; the caller unloads it.

    It merges in float32, one layer at a time: some adapters cannot be merged in half precision.
    """
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer

    for layer in [m for m in module.modules() if isinstance(m, BaseTunerLayer)]:
        base: Any = layer.get_base_layer()
        dtype = base.weight.dtype
        layer.float()  # type: ignore[attr-defined]
        before = {name: parameter.detach().clone() for name, parameter in base.named_parameters()}
        with torch.no_grad():
            layer.merge()
        for name in _UNDOING:
            if hasattr(layer, name):
                setattr(layer, name, None)
        for name, parameter in base.named_parameters() if weight != 1 else ():
            parameter.data = before[name].lerp(parameter.data, weight)
        base.to(dtype)
