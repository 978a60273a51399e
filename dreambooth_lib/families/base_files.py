"""Read the JSON files of a base or a LoRA, and check its weights, before a library reads them.

They may come from anyone, and be damaged: nothing of them is passed on to a loader unchecked.
"""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from traceback import walk_tb
from typing import Any

from dreambooth_lib.core.errors import KitError, one_line
from dreambooth_lib.families.prediction_type import TYPES

#: The keys of a LoRA folder's ``base.json``, and the values that are allowed for ``quantize``.
_TRAINED_ON = (
    "base", "revision", "variant", "quantize", "word", "prediction_type", "clip_skip",
)  # fmt: skip
_QUANTIZED = (None, "nf4", "int8")
#: What a LoRA's metadata may set: numbers, and names of layers. peft imports what others name.
_ADAPTER_SETTINGS = {
    "alpha_pattern", "base_model_name_or_path", "bias", "exclude_modules", "fan_in_fan_out",
    "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha",
    "lora_bias", "lora_dropout", "megatron_core", "peft_type", "peft_version", "qalora_group_size",
    "r", "rank_pattern", "revision", "runtime_config", "target_modules", "task_type", "use_dora",
    "use_rslora",
}  # fmt: skip
#: The weights files of a part; macOS puts hidden ones beside them.
_WEIGHTS = "[!.]*.safetensors"
#: How a file begins that Git left in place of a large one.
_LFS = b"version https://git-lfs"


class BaseError(KitError, ValueError):
    """A base that cannot be found or loaded, or whose family is unknown."""


@contextmanager
def explain_loading(
    where: str, kind: str = "base", only: tuple[type[Exception], ...] = (Exception,)
) -> Iterator[None]:
    """Turn what the libraries raise for files that do not fit each other into a BaseError.

    ``kind`` names what is in the folder ``where``: "base" or "LoRA". ``only`` are the types of
    errors that are turned.
    """
    import torch

    try:
        yield
    except (KitError, ImportError, MemoryError, torch.OutOfMemoryError):
        raise
    except only as error:  # by default of any kind: configs are used without a check of their shape
        frames = (frame.f_locals for frame, _ in walk_tb(error.__traceback__)
                  if frame.f_code.co_name == "load_sub_model")  # fmt: skip
        part = next((f"/{names.get('name')}" for names in frames), "")
        raise BaseError(
            f"the {kind}'s files in {where}{part} cannot be used ({one_line(error)[:200]}); "
            f"download or copy them again, or choose another {kind}."
        ) from error


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object. Raises :class:`BaseError` for any other."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or "it is not valid JSON"
        raise BaseError(
            f"the base's file {file} cannot be read ({reason}); download or copy the base again."
        ) from error
    if not isinstance(found, dict):
        raise BaseError(
            f"the base's file {file} is not a JSON object; download or copy the base again."
        )
    return found


def read_trained_on(file: Path) -> dict[str, Any]:
    """Read a LoRA folder's ``base.json``: exactly its keys, each a string, a number or None.

    Keys that are not there are None. Raises :class:`BaseError` for anything else.
    """
    found = read_json(file)
    if unknown := sorted(found.keys() - {*_TRAINED_ON}):
        raise BaseError(
            f"{file} has the key '{unknown[0]}', which the kit never writes; use a LoRA from a "
            f"source that you trust, or keep only {', '.join(_TRAINED_ON)} in it."
        )
    values = {name: found.get(name) for name in _TRAINED_ON}
    skip = values["clip_skip"]
    wrong = [] if skip is None or (type(skip) is int and skip > 0) else ["clip_skip"]
    wrong += [n for n, v in values.items() if n != "clip_skip" and not isinstance(v, str | None)]
    wrong += [] if values["base"] else ["base"]
    wrong += [] if values["quantize"] in _QUANTIZED else ["quantize"]
    wrong += [] if values["prediction_type"] in (None, *TYPES) else ["prediction_type"]
    if wrong:
        raise BaseError(
            f"{file} has no usable value for '{wrong[0]}'; copy or train the LoRA again, or "
            "correct the file."
        )
    return values


def check_part_weights(part: Path, variant: str | None) -> None:
    """Check that a part has a config and whole weights: the variant's, or plain ones without it.

    Only what will be loaded is checked. Raises :class:`BaseError` with the file that is missing or
    damaged.
    """
    check_part_names(part, part.glob("*"), variant)
    files, weights = sorted(part.glob(_WEIGHTS)), weights_to_load(part, variant)
    suffix = f".{variant}" if _variant(weights[0]) else ""
    for index in part.glob(f"{_WEIGHTS}.index{suffix}.json"):
        shards = read_json(index).get("weight_map")
        names = {*shards.values()} if isinstance(shards, dict) else {"weight_map"}
        for missing in sorted(str(n) for n in names if part / str(n) not in files):
            raise BaseError(
                f"{index} needs the file {missing}, which is missing; download the base again."
            )
    for file in weights:
        check_weights(file)


def check_part_names(part: Path, files: Iterable[Path], variant: str | None) -> None:
    """Check by the names of a part's files that it has a config and weights to load.

    ``part`` is a folder here or on the Hub. Raises :class:`BaseError` for what it has instead.
    """
    names = [file.name for file in files if not file.name.startswith(".")]
    if "config.json" not in names:
        raise BaseError(
            f"the base's file {part / 'config.json'} is missing; download or copy the base again."
        )
    weights = sorted(name for name in names if name.endswith(".safetensors"))
    if not weights:
        pickled = [name for name in names if name.endswith((".bin", ".ckpt", ".pt"))]
        found = f"only {pickled[0]}, a format that can hold code" if pickled else "no weights"
        raise BaseError(
            f"the base's part {part} has {found}; choose a base with .safetensors files."
        )
    variants = {_variant(Path(name)): name for name in reversed(weights)}
    if not variants.keys() & {variant, ""}:
        other, name = next(reversed(variants.items()))
        raise BaseError(
            f"the base's part {part} has only files of the variant '{other}', such as "
            f"{name}; set variant to '{other}'."
        )


def weights_to_load(part: Path, variant: str | None) -> list[Path]:
    """Return a part's weights files, of the variant or else plain ones."""
    files = sorted(part.glob(_WEIGHTS))
    return [f for f in files if _variant(f) == variant] or [f for f in files if not _variant(f)]


def _variant(file: Path) -> str:
    """Return the variant in a weights file's name, as in model.fp16-00001-of-00002.safetensors.

    It is "" for a plain file.
    """
    return file.stem.partition(".")[2].partition("-")[0]


def check_weights(file: Path) -> list[str]:
    """Return the names of a safetensors file's tensors; its header must fit its size.

    Raises :class:`BaseError` for a file that is missing, cut short, or Git's pointer to one.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with file.open("rb") as opened:
            pointer = opened.read(len(_LFS)) == _LFS
        if pointer:
            raise BaseError(
                f"{file} is Git's pointer to the weights and not the weights; run 'git lfs pull' "
                "in its folder, or download the file."
            )
        with safe_open(file, "pt") as weights:
            return [*weights.keys()]
    except (OSError, SafetensorError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or "it was cut short"
        raise BaseError(
            f"the weights {file} cannot be read ({reason}); download or copy them again."
        ) from error


def check_lora(file: Path) -> None:
    """Check a LoRA's weights, and that its metadata sets up a plain LoRA.

    Raises :class:`BaseError` for a file that is missing or damaged, and for other settings.
    """
    from safetensors import safe_open

    if not file.exists():
        raise BaseError(
            f"the LoRA's weights {file} are missing, and weights in other files are not read; copy "
            "or train the LoRA again."
        )
    check_weights(file)
    with safe_open(file, "pt") as weights:
        text = (weights.metadata() or {}).get("lora_adapter_metadata") or "{}"
    for key in _unknown_settings(text, file):
        raise BaseError(
            f"{file} sets '{key}' of its LoRA, which the kit never does; use a LoRA from a source "
            "that you trust."
        )


def _unknown_settings(text: str, file: Path) -> Iterator[str]:
    """Yield the adapter settings in a LoRA's metadata that are set and not a plain LoRA's."""
    try:
        settings = json.loads(text)
        found = [key for key, value in settings.items() if value]
    except (ValueError, AttributeError, RecursionError) as error:
        raise BaseError(
            f"the metadata of {file} is damaged; copy or train the LoRA again."
        ) from error
    yield from (key for key in found if key.rpartition(".")[2] not in _ADAPTER_SETTINGS)
