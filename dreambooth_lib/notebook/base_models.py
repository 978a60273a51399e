"""The bases that people know by name, and what training each takes of a GPU.

They are in ``base_models.json``, with figures of ``python -m tools.bases``: what
:func:`estimate` says with the default settings, on configs with the
published architectures' numbers.
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
from dreambooth_lib.core.gpu_memory import GIB
from dreambooth_lib.families import loading
from dreambooth_lib.figures import labels
from dreambooth_lib.training.memory_level import USABLE_SHARE, first, native_precision


class Way(NamedTuple):
    """How people say what is trained: the config's fields for it, and its levels of memory."""

    fields: dict[str, Any]
    levels: tuple[str, ...]


#: From what changes most of a base to what takes least.
WAYS = {
    "whole model": Way({"method": "full"}, ("standard", "low", "lowest")),
    "LoRA": Way({"method": "lora"}, ("standard", "low")),
    "QLoRA": Way({"method": "lora", "quantize": "nf4"}, ("standard", "low")),
}


@dataclass(frozen=True)
class Base:
    """A base as people know it."""

    name: str
    base: str  #: as a config's ``base`` takes it
    resolution: int  #: pixels a side
    licence: str
    gated: bool  #: whether its terms must be accepted on the Hub, and a token given
    remark: str
    parameters: int  #: of all parts that are loaded
    denoiser: int  #: of them, those of the denoiser
    large: int  #: and those of text encoders that are too large to train
    stored: int  #: bytes of each in the files that are downloaded by default
    #: GiB by precision: of each of WAYS, one for each of its levels, None where it does not work
    gib: Mapping[str, Sequence[Sequence[float | None]]]
    scale: float = 1  #: of these figures, for a base of another size
    guess: bool = False  #: whether it stands for one that is not known

    def takes(self, precision: str) -> list[tuple[str, str, float]]:
        """List each way, level of memory and GiB of a GPU, in the order of :data:`WAYS`."""
        by_way = zip(WAYS.items(), self.gib[precision], strict=True)
        return [
            (way, level, gib * self.scale)
            for (way, (_, levels)), by_level in by_way
            for level, gib in zip(levels, by_level, strict=True)
            if gib is not None
        ]


_FILE = Path(__file__).with_name("base_models.json")
KNOWN: tuple[Base, ...] = tuple(Base(**one) for one in json.loads(_FILE.read_text()))
_BY_NAME = {name: one for one in KNOWN for name in (one.base, one.name)}
#: Which known base one on the Hub is like, by its name or its pipeline's.
_LIKE = {
    r"flux": "Flux.1 dev",
    r"z-?image": "Z-Image",
    r"diffusion-?3|sd-?3|3\.5": "Stable Diffusion 3.5 medium",
    r"xl|pony|illustrious": "Stable Diffusion XL 1.0",
    r"diffusion-2|sd-?2": "Stable Diffusion 2.1",
    r"": "Stable Diffusion 1.5",
}


class Row(NamedTuple):
    """A way to train a base, at the first level of memory that fits or else the last."""

    base: Base
    method: str
    level: str
    gib: float  #: needed
    fits: bool


def known(base: str) -> Base | None:
    """Return the base of that name, hub id or "toybox", if it is one of :data:`KNOWN`."""
    return _BY_NAME.get(base)


def described(base: str) -> Base:
    """Find the known base that a base is, or is like: by its parameters, if it is here.

    One of as many parameters as a known one is taken for that, another for a Stable Diffusion 1.5
    of another size. One on the Hub is taken for the known base that its name or, once that was
    read, its ``model_index.json`` tells of.
    """
    from huggingface_hub import try_to_load_from_cache

    if base in _BY_NAME:
        return _BY_NAME[base]
    like = _BY_NAME["Stable Diffusion 1.5"]
    try:
        found = loading.resolve(base)
    except loading.BaseError:
        return like
    if found.loras:
        return described(found.name)
    if not found.is_local:
        read = try_to_load_from_cache(base, "model_index.json")
        said = json.loads(Path(read).read_text())["_class_name"] if isinstance(read, str) else base
        name = next(name for part, name in _LIKE.items() if re.search(part, said.lower()))
        return replace(_BY_NAME[name], guess=True)
    parts = dict(_parameters(Path(found.path)))
    every = max(1, sum(parts.values()))
    for one in KNOWN:
        if abs(every / one.parameters - 1) < 0.01:
            return one
    denoiser = parts.get("unet", 0) + parts.get("transformer", 0)
    return replace(like, parameters=every, denoiser=denoiser, scale=every / like.parameters)


def _parameters(folder: Path) -> Iterator[tuple[str, int]]:
    """Count each part's parameters by the headers of its files, of one variant alone."""
    from dreambooth_lib.training.allocation_counter import count_numbers

    for part in folder.iterdir():
        files = [file for file in part.glob("*.safetensors") if part.name != "safety_checker"]
        variant = all("." in file.stem for file in files)
        yield part.name, count_numbers(file for file in files if ("." in file.stem) == variant)


def ways(base: Base, free: float, precision: str = "fp16") -> list[Row]:
    """List the ways that work in ``precision``, "fp16" or "bf16", on ``free`` bytes of a GPU."""
    rows = [Row(base, *one, one[-1] * GIB <= free) for one in base.takes(precision)]
    return [first(of_way, lambda row: row.fits) for _, of_way in groupby(rows, lambda row: row[1])]


def fitting(free: float, precision: str = "fp16") -> list[Row]:
    """List :func:`ways` of all known bases."""
    return [row for base in KNOWN for row in ways(base, free, precision)]


@dataclass(frozen=True)
class Table:
    """Which base fits, as a notebook shows it, and as text."""

    rows: Sequence[Row]
    gpu: bool = True

    def _said(self) -> Iterator[tuple[bool, str, Sequence[str]]]:
        for base in KNOWN:
            rows = [row for row in self.rows if row.base is base]
            on_cpu = base.base == "toybox"
            ok = on_cpu or any(row.fits for row in rows)
            lacks = "needs a GPU" if not self.gpu else "too large" if rows else "needs bfloat16"
            how = _how(rows) if self.gpu or not on_cpu else "on the CPU too"
            terms = f"{base.licence}; accept its terms on the Hub" if base.gated else base.licence
            cells = (base.name, base.base, str(base.resolution), how, terms, base.remark)
            yield ok, "fits" if ok else lacks, cells

    def __repr__(self) -> str:
        return "\n".join(
            f"{labels.sign(ok)} {word:15} {name:24} {how}"
            for ok, word, (name, _, _, how, *_) in self._said()
        )

    def _repr_html_(self) -> str:
        heads = ("base", "BASE =", "pixels", "how, and GPU memory needed", "licence", "remark")
        return labels.html_table(heads, self._said())


def _how(rows: Sequence[Row]) -> str:
    """Name the ways that fit of a base's, or else the one that takes least."""
    if not rows:
        return "only on a GPU with bfloat16; it does not work in float16"

    def room(row: Row) -> str:
        level = "" if row.level == "standard" else f", memory '{row.level}'"
        return f"{row.gib:g} GiB{level}"

    least = min(rows, key=lambda row: row.gib)
    fit = "; ".join(f"{row.method} ({room(row)})" for row in rows if row.fits)
    return fit or f"{least.method} takes {room(least)}"


def table() -> Table:
    """Return which of the known bases fit this machine's GPU, as it is now."""
    if find_spec("torch") is not None:  # or it is yet to be installed
        import torch

        if torch.cuda.is_available():
            free, _ = gpu_memory.gpu_bytes()
            precision = native_precision("auto", torch.device("cuda"))
            return Table(fitting(USABLE_SHARE * free, precision))
    return Table(fitting(0), gpu=False)
