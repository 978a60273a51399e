"""Describe the well-known base models, and list the training methods that fit a GPU.

Their figures in ``base_models.json`` come from ``python -m tools.bases``: they are what
:func:`.memory_estimate.estimate` returns with the default settings for the published architectures.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from dreambooth_lib.core import gpu_memory
from dreambooth_lib.core.errors import KitError
from dreambooth_lib.core.gpu_memory import GIB
from dreambooth_lib.families import loading, one_file
from dreambooth_lib.families.one_file_header import read_header
from dreambooth_lib.figures import labels
from dreambooth_lib.training.memory_level import USABLE_SHARE, first
from dreambooth_lib.training.native_precision import native_precision


class Method(NamedTuple):
    """A training method: the config's fields for it, and its memory levels."""

    fields: dict[str, Any]
    levels: tuple[str, ...]


#: By name, from the method that trains most of a base's weights to the one that needs least memory.
METHODS = {
    "full fine-tuning": Method({"method": "full"}, ("standard", "low", "lowest")),
    "LoRA": Method({"method": "lora"}, ("standard", "low")),
    "QLoRA": Method({"method": "lora", "quantize": "nf4"}, ("standard", "low")),
}


@dataclass(frozen=True)
class BaseModel:
    """A well-known base model."""

    name: str
    base: str  #: what a config's ``base`` takes
    resolution: int  #: pixels per side
    licence: str
    gated: bool  #: whether its terms must be accepted on the Hub, and a token is needed
    remark: str
    parameters: int  #: in all components that are loaded
    denoiser: int  #: those of the denoiser among them
    large: int  #: those of text encoders that are too large to train
    stored: int  #: bytes per parameter in the files that are downloaded by default
    #: GiB by precision: a row for each of METHODS, a figure for each of its levels; None where the
    #: base does not work in this precision
    gib: Mapping[str, Sequence[Sequence[float | None]]]
    scale: float = 1  #: the factor on these figures for a base of another size
    guess: bool = False  #: whether it stands in for a base of unknown size

    def requirements(self, precision: str) -> list[tuple[str, str, float]]:
        """List (method, memory level, GiB of GPU memory) in the order of :data:`METHODS`."""
        by_method = zip(METHODS.items(), self.gib[precision], strict=True)
        return [
            (name, level, gib * self.scale)
            for (name, method), by_level in by_method
            for level, gib in zip(method.levels, by_level, strict=True)
            if gib is not None
        ]


_FILE = Path(__file__).with_name("base_models.json")
KNOWN: tuple[BaseModel, ...] = tuple(BaseModel(**row) for row in json.loads(_FILE.read_text()))
_DEFAULT = "Stable Diffusion 1.5"  # what an unknown base is taken for
_BY_NAME = {name: model for model in KNOWN for name in (model.base, model.name)}
#: Which known base model to take for one on the Hub, by its name or its pipeline's.
_SIMILAR = {
    r"klein.*9b": "FLUX.2 klein-base 9B",
    r"klein": "FLUX.2 klein-base 4B",
    r"flux": "Flux.1 dev",
    r"z-?image": "Z-Image",
    r"diffusion-?3|sd-?3|3\.5": "Stable Diffusion 3.5 medium",
    r"xl|pony|illustrious": "Stable Diffusion XL 1.0",
    r"diffusion-2|sd-?2": "Stable Diffusion 2.1",
    r"": "Stable Diffusion 1.5",
}


class Row(NamedTuple):
    """A method for a base model, at the first memory level that fits, or else the last."""

    base: BaseModel
    method: str
    level: str
    gib: float  #: needed
    fits: bool


def describe(base: str) -> BaseModel:
    """Return the known base model that a base is, or resembles most.

    A local base with as many parameters as a known one is taken for that one; any other local base
    is taken for Stable Diffusion 1.5 of another size. A base on the Hub is recognised by its name
    or, once it was downloaded, by its ``model_index.json``; one in one file that is not unpacked
    yet by its header.
    """
    from huggingface_hub import try_to_load_from_cache

    if base in _BY_NAME:
        return _BY_NAME[base]
    default = _BY_NAME[_DEFAULT]
    try:
        file = one_file.parse(base)
        if file is not None and one_file.find(file) is None:
            here = one_file.local_file(file)
            return _by_size(read_header(here, file.name).numbers) if here else _similar(file.name)
        resolved = loading.resolve(base)
    except KitError:
        return default
    if resolved.loras:
        return describe(resolved.name)
    if not resolved.is_local:
        index = try_to_load_from_cache(base, "model_index.json")
        text = (
            json.loads(Path(index).read_text())["_class_name"] if isinstance(index, str) else base
        )
        return _similar(text)
    return _by_size(dict(_parameters(Path(resolved.path))))


def _by_size(counts: Mapping[str, int]) -> BaseModel:
    """Return the known base model of this many parameters, or Stable Diffusion 1.5 scaled."""
    total = max(1, sum(counts.values()))
    for model in KNOWN:
        if abs(total / model.parameters - 1) < 0.01:
            return model
    denoiser, default = counts.get("unet", 0) + counts.get("transformer", 0), _BY_NAME[_DEFAULT]
    return replace(default, parameters=total, denoiser=denoiser, scale=total / default.parameters)


def _similar(text: str) -> BaseModel:
    """Return the known base model that a name or a pipeline's class resembles most."""
    name = next(name for part, name in _SIMILAR.items() if re.search(part, text.lower()))
    return replace(_BY_NAME[name], guess=True)


def _parameters(folder: Path) -> Iterator[tuple[str, int]]:
    """Count each component's parameters from its files' headers, for one variant only."""
    from dreambooth_lib.training.allocation_counter import count_numbers

    for component in folder.iterdir():
        if component.name == "safety_checker":
            continue
        files = list(component.glob("[!.]*.safetensors"))
        variant = all("." in file.stem for file in files)
        yield component.name, count_numbers(f for f in files if ("." in f.stem) == variant)


def methods_for(base: BaseModel, free: float, precision: str = "fp16") -> list[Row]:
    """List the methods that work in ``precision``, "fp16" or "bf16", on ``free`` GPU bytes."""
    rows = [Row(base, *need, need[-1] * GIB <= free) for need in base.requirements(precision)]
    return [first(group, lambda row: row.fits) for _, group in groupby(rows, lambda row: row[1])]


def methods_for_all(free: float, precision: str = "fp16") -> list[Row]:
    """List :func:`methods_for` every known base model."""
    return [row for base in KNOWN for row in methods_for(base, free, precision)]


@dataclass(frozen=True)
class Table:
    """The base models that fit, as a table in a notebook and as text elsewhere."""

    rows: Sequence[Row]
    gpu: bool = True

    def _cells(self) -> Iterator[tuple[bool, str, Sequence[str]]]:
        for base in KNOWN:
            rows = [row for row in self.rows if row.base is base]
            on_cpu = base.base == "toybox"
            ok = on_cpu or any(row.fits for row in rows)
            reason = "needs a GPU" if not self.gpu else "too large" if rows else "needs bfloat16"
            methods = _methods(rows) if self.gpu or not on_cpu else "runs on the CPU too"
            terms = f"{base.licence}; accept its terms on the Hub" if base.gated else base.licence
            cells = (base.name, base.base, str(base.resolution), methods, terms, base.remark)
            yield ok, "fits" if ok else reason, cells

    def __repr__(self) -> str:
        return "\n".join(
            f"{labels.sign(ok)} {word:15} {name:28}{methods}"
            for ok, word, (name, _, _, methods, *_) in self._cells()
        )

    def _repr_html_(self) -> str:
        heads = ("base", "BASE =", "pixels", "method and GPU memory it needs", "licence", "remark")
        # Nothing is to be mended where a base does not fit.
        return labels.html_table(heads, self._cells(), bad=labels.NEUTRAL)


def _methods(rows: Sequence[Row]) -> str:
    """Name a base's methods that fit or, if none does, all with the least they need."""
    if not rows:
        return "only on a GPU with bfloat16; it does not work in float16"

    def memory(row: Row) -> str:
        level = "" if row.level == "standard" else f", memory level '{row.level}'"
        return f"{row.gib:g} GiB{level}"

    fitting = [row for row in rows if row.fits]
    return "; ".join(f"{row.method} ({memory(row)})" for row in fitting or rows)


def table() -> Table:
    """Return the table of base models for this machine's GPU and its free memory."""
    if find_spec("torch") is not None:  # it may not be installed yet
        import torch

        if torch.cuda.is_available():
            free, _ = gpu_memory.gpu_bytes()
            precision = native_precision("auto", torch.device("cuda"))
            return Table(methods_for_all(USABLE_SHARE * free, precision))
    return Table(methods_for_all(0), gpu=False)
