"""Check what a base's ``model_index.json`` and its parts' configs name, so that no code is run.

A base may come from anyone, and diffusers imports what these files name: it is compared with what
the family's pipeline can have.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from inspect import signature
from pathlib import Path
from typing import Any

from dreambooth_lib.families.base_files import BaseError, read_json

#: Keys of transformers' configs that may name a repository of kernels on the Hub.
_KERNELS = ("attn_implementation", "_attn_implementation", "experts_implementation",
            "_experts_implementation")  # fmt: skip


def check(
    path: str,
    index: Mapping[str, Any],
    needed: Iterable[str],
    options: Mapping[str, Any],
    revision: str | None,
    read: Callable[[str], dict[str, Any]],
) -> list[str]:
    """Check a base's index and its parts' configs; return the parts that have weights.

    ``path`` is a folder or a Hub id. ``needed`` are parts that it must have, ``options`` sets to
    None those that are not loaded, and ``read`` reads a config. Raises :class:`BaseError`.
    """
    import diffusers

    where = f"{path}/model_index.json"
    parts = parts_of(index, where)
    for name in needed:
        if name not in parts:
            raise BaseError(f"{where} names no {name}; download the base again.")
    loaded = {name: part for name, part in parts.items() if options.get(name, ...) is not None}
    pipeline = getattr(diffusers, index["_class_name"], None)
    if pipeline is None:
        raise BaseError(
            f"{where} has the pipeline {index['_class_name']}, which this diffusers lacks; install "
            "a newer diffusers."
        )
    check_classes(loaded, pipeline._get_signature_types(), where)
    for name, (library, _) in loaded.items():
        if Path(path).exists():
            _check_folder(Path(path) / name)
            continue
        for config in ("config.json", "tokenizer_config.json", "preprocessor_config.json"):
            if config.startswith(_kind(name)):
                check_config(read(f"{name}/{config}"), f"{path}/{name}/{config}")
        _check_cached(path, f"{name}/{library}.py", revision)
    return [name for name in loaded if _kind(name) == "config"]


def _kind(part: str) -> str:
    """Return how a part's config's name begins; "none" for a scheduler."""
    kinds = {"scheduler": "none", "tokenizer": "tokenizer", "feature_extractor": "preprocessor"}
    return next((kind for start, kind in kinds.items() if part.startswith(start)), "config")


def _check_cached(repository: str, name: str, revision: str | None) -> None:
    """Raise :class:`BaseError` if a module that diffusers would import is in the Hub's cache."""
    from huggingface_hub import try_to_load_from_cache

    if isinstance(try_to_load_from_cache(repository, name, revision=revision), str):
        raise BaseError(
            f"the base '{repository}' holds code, {name}, and the kit runs none; choose a base "
            "from a source that you trust."
        )


def parts_of(index: Mapping[str, Any], where: str) -> dict[str, tuple[str, str]]:
    """Return the library and class of each part that a ``model_index.json`` names.

    Only diffusers' and transformers' are allowed, and the safety checker of Stable Diffusion.
    ``where`` names the file. Raises :class:`BaseError` for any other library.
    """
    parts = {}
    for name, value in index.items():
        if not isinstance(value, list) or value == [None, None]:
            continue
        if len(value) != 2 or not all(isinstance(v, str) and v.isidentifier() for v in value):
            raise BaseError(
                f"{where} does not say which class its part '{name}' has; download the base again."
            )
        library, class_name = value
        safety = (name, library) == ("safety_checker", "stable_diffusion")
        if library not in ("diffusers", "transformers") and not safety:
            raise BaseError(
                f"{where} would load its part '{name}' by the module '{library}', and only parts "
                "of diffusers and transformers are loaded; choose a base from a source that you "
                "trust."
            )
        parts[name] = (library, class_name)
    return parts


def check_classes(
    parts: Mapping[str, tuple[str, str]], types: Mapping[str, tuple[Any, ...]], where: str
) -> None:
    """Check that each part's class is one that its pipeline's ``__init__`` takes.

    ``types`` are those of its annotations. Any scheduler, tokenizer and image processor passes.
    Raises :class:`BaseError` for another class.
    """
    import diffusers
    import transformers

    kinds: dict[str, tuple[Any, ...]] = {
        "scheduler": (diffusers.SchedulerMixin,),
        "tokenizer": (transformers.PreTrainedTokenizerBase,),
        "feature_extractor": (transformers.ImageProcessingMixin,),
    }
    for name, (library, class_name) in parts.items():
        module = diffusers if library == "diffusers" else transformers
        found = getattr(module, class_name, None)
        kind = next((kinds[start] for start in kinds if name.startswith(start)), types.get(name))
        wanted = tuple(one for one in kind or () if isinstance(one, type))
        if not isinstance(found, type) or not issubclass(found, wanted):
            expected = " or ".join(one.__name__ for one in wanted) or "nothing"
            raise BaseError(
                f"{where} has the class '{library}.{class_name}' for its part '{name}', where the "
                f"kit knows {expected}; choose another base, or a newer {library}."
            )


def check_config(config: Mapping[str, Any], where: str) -> None:
    """Raise :class:`BaseError` if a part's config names code: its own, or a kernel's on the Hub."""
    nested = [config]
    while nested:
        for key, value in nested.pop().items():
            if key == "auto_map" or (key in _KERNELS and "/" in str(value)):
                raise BaseError(
                    f"{where} names code to run by its key '{key}', and the kit runs none; choose "
                    "a base from a source that you trust, or remove the key."
                )
            nested += [value] if isinstance(value, dict) else []


def _check_folder(part: Path) -> None:
    """Check a part's folder: it is there, without Python modules, and with sound JSON files."""
    if not part.is_dir():
        raise BaseError(f"the base's part {part} is missing; download or copy the base again.")
    if not any(part.glob("[!.]*")):
        raise BaseError(f"the base's part {part} is empty; download or copy the base again.")
    if code := sorted(part.glob("*.py")):
        raise BaseError(
            f"the base holds code, {code[0]}, and the kit runs none; choose a base from a source "
            "that you trust, or delete the file."
        )
    for config in part.glob("[!.]*.json"):
        if not config.name.endswith((".index.json", "vocab.json")):
            check_config(read_json(config), str(config))


def check_training(
    path: str,
    family: str,
    settings: Collection[str],
    schedulers: Iterable[str],
    scheduler: Mapping[str, Any],
    vae: Mapping[str, Any],
) -> None:
    """Check that a family can train a base, by the base's scheduler and autoencoder.

    ``settings`` are what the family's schedulers have; ``schedulers`` are the base's by its index
    and by its own config. Raises :class:`BaseError` for another noise process, and for latents of
    another scale.
    """
    import diffusers

    for name in schedulers:
        known = signature(getattr(diffusers, name, object)).parameters.keys()
        flow = scheduler.get("use_flow_sigmas") and "shift" not in settings
        if flow or not known >= {*settings}:
            raise BaseError(
                f"{path}/scheduler has a {name}, with which the kit cannot train a {family} base; "
                "choose a base with the family's own scheduler."
            )
    if vae.get("latents_mean") is not None or vae.get("latents_std") is not None:
        raise BaseError(
            f"{path}/vae has latents_mean or latents_std, by which the kit does not scale latents; "
            "choose a base whose autoencoder has a scaling_factor only."
        )
