"""What a run takes of GPU, memory, disk and Drive by each way to train, and the first that fits."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from dreambooth_lib import bases, families
from dreambooth_lib.bases import WAYS, Base
from dreambooth_lib.levels import FILLED
from dreambooth_lib.mirrors import LARGE as LARGE_ON_DRIVE

GIB = 2**30
#: Bytes of memory that a process takes beside a notebook's, once it computes on a GPU.
PROCESS = 2.5e9
#: Bytes of a weight in half precision, as which a kept model, its zip and large weights on Drive
#: are written; and of AdamW's two moments in 8 bits.
HALF, MOMENTS = 2, 2
#: Checkpoints on the disk at once: the newest, the one that is being written, and the older and
#: the best one, which have no moments, together counted as one more.
CHECKPOINTS = 3
#: LoRA's parameters of rank 16, of the denoiser's and at most: 6 million, 0.7%, on Stable Diffusion
#: 1.5, 47 million, 1.8%, on XL, and 54 million on Flux.1.
ADDED, ADDED_MOST = 0.02, 60_000_000
#: Class pictures, latents, pictures of looks and the log.
PICTURES = 0.5e9
#: Which known base one on the Hub is like, by its name or its pipeline's.
_KINDS = {
    r"flux": "Flux.1 dev",
    r"z-?image": "Z-Image",
    r"diffusion-?3|sd-?3|3\.5": "Stable Diffusion 3.5 medium",
    r"xl|pony|illustrious": "Stable Diffusion XL 1.0",
    r"diffusion-2|sd-?2": "Stable Diffusion 2.1",
    r"": "Stable Diffusion 1.5",
}
#: Without a GPU a base above this many parameters is not worth training.
LARGE = 200_000_000


@dataclass(frozen=True)
class Room:
    """Bytes that are free, None where there is no such thing."""

    memory: int
    disk: int
    gpu: int | None = None
    drive: int | None = None  #: where the run is mirrored


@dataclass(frozen=True)
class Needs:
    """Bytes that a run takes, roughly, and how it is trained."""

    gpu: int
    memory: int
    disk: int
    drive: int
    way: str = "whole model"  #: one of :data:`bases.WAYS`
    level: str = "standard"  #: of memory

    @property
    def fields(self) -> dict[str, Any]:
        """The way as fields of a config."""
        return WAYS[self.way].fields

    def lacking(self, room: Room) -> list[str]:
        """Return what there is too little of."""
        free = {
            "GPU memory": (self.gpu, room.gpu and FILLED * room.gpu),
            "memory": (self.memory, room.memory),
            "disk": (self.disk, room.disk),
            "Drive": (self.drive, room.drive),
        }
        return [name for name, (need, has) in free.items() if has is not None and need > has]


def on_cpu(base: str) -> Needs:
    """Count what a run takes without a GPU: weights, gradients, moments, their average."""
    weights = 4 * described(base).parameters
    return Needs(0, 2 * GIB + 5 * weights, 19 * weights, 9 * weights)


def ways(base: str, precision: str = "fp16", asked: Mapping[str, Any] | None = None) -> list[Needs]:
    """List what each way takes on a GPU by level, what changes most of the base first.

    ``precision`` is what the GPU computes in; a way in which the base cannot is left out. ``asked``
    are fields of a config: only ways that agree with them are given. The figures:

    - Memory holds a process, and what of the base is on the CPU at once: all of it, or from level
      "low" on text encoders first and the denoiser after them. Weights count as they are loaded,
      since what is cast, or put tuned weights into, is no longer the mapped file. What is quantized
      goes to the GPU tensor by tensor.
    - The disk holds the base as it is downloaded, :data:`CHECKPOINTS`, the pipeline, and the kept
      model and its zip in half precision.
    - Drive holds the newest checkpoint with its moments, a newer one while it is copied there, and
      the best weights; large ones in half precision.
    """
    known, asked = described(base), asked or {}
    found = []
    for (way, (fields, levels)), by_level in zip(WAYS.items(), known.gib[precision], strict=True):
        for level, gib in zip(levels, by_level, strict=True):
            if gib is not None and _agrees(fields, level, levels, asked):
                stored = HALF if asked.get("variant") else known.stored
                stored = 0 if base == "toybox" or Path(base).exists() else stored
                found.append(_needs(known, way, level, gib, stored))
    return found


def first_fitting(found: Sequence[Needs], room: Room) -> Needs:
    """Choose the first way that fits everything; if none does, one that lacks the fewest."""
    fewest = min(len(needs.lacking(room)) for needs in found)
    fitting = [needs for needs in found if len(needs.lacking(room)) == fewest]
    return fitting[-1 if fewest else 0]


def settings(chosen: Needs, found: Sequence[Needs], room: Room) -> dict[str, Any]:
    """Return the fields of a config for a way; its level where memory "auto" would take another."""
    of_way = [needs for needs in found if needs.way == chosen.way]
    auto = next((n for n in of_way if "GPU memory" not in n.lacking(room)), of_way[-1])
    return dict(chosen.fields) | ({} if auto is chosen else {"memory": chosen.level})


def described(base: str) -> Base:
    """Find the known base that a base is, or is like: by its parameters, if it is here.

    One of as many parameters as a known one is taken for that, another for a Stable Diffusion 1.5
    of another size. One on the Hub is taken for the known base that its name or, once that was
    read, its ``model_index.json`` tells of.
    """
    known = bases.known(base)
    if known is not None:
        return known
    like = bases.known("Stable Diffusion 1.5")
    assert like is not None
    try:
        found = families.resolve(base)
    except families.BaseError:
        return like
    if found.loras:
        return described(found.name)
    if not found.is_local:
        return _like(base)
    parts = dict(_parameters(Path(found.path)))
    every = max(1, sum(parts.values()))
    for one in bases.KNOWN:
        if abs(every / one.parameters - 1) < 0.01:
            return one
    scale = every / like.parameters
    gib = {
        precision: tuple(tuple(g and g * scale for g in levels) for levels in by_way)
        for precision, by_way in like.gib.items()
    }
    denoiser = parts.get("unet", 0) + parts.get("transformer", 0)
    return replace(like, parameters=every, denoiser=denoiser, gib=gib)


def guessed(base: str) -> str:
    """Say, to end a sentence, what :func:`described` takes an unknown base on the Hub for."""
    try:
        on_hub = not Path(families.locate(base)).exists()
    except families.BaseError:
        return ""
    guess = on_hub and bases.known(base) is None
    return f", if '{base}' is as large as {described(base).name}" if guess else ""


def _like(base: str) -> Base:
    from huggingface_hub import try_to_load_from_cache

    read = try_to_load_from_cache(base, "model_index.json")
    said = json.loads(Path(read).read_text())["_class_name"] if isinstance(read, str) else base
    for pattern, name in _KINDS.items():
        found = bases.known(name) if re.search(pattern, said.lower()) else None
        if found is not None:
            return found
    raise AssertionError("the last pattern finds all")


def _parameters(folder: Path) -> Iterator[tuple[str, int]]:
    """Count each part's parameters by the headers of its files, of one variant alone."""
    from safetensors import safe_open

    for part in folder.iterdir():
        files = [file for file in part.glob("*.safetensors") if part.name != "safety_checker"]
        variants = {"." in file.stem: file for file in files}
        count = 0
        for file in files:
            if ("." in file.stem) == (False not in variants):
                with safe_open(file, "np") as tensors:
                    names = tensors.keys()
                    count += sum(prod(tensors.get_slice(name).get_shape()) for name in names)
        yield part.name, count


def _agrees(
    fields: Mapping[str, Any], level: str, levels: Sequence[str], asked: Mapping[str, Any]
) -> bool:
    method = asked.get("method") in (None, fields["method"])
    bits = "quantize" not in asked or bool(asked["quantize"]) == ("quantize" in fields)
    wanted = asked.get("memory", "auto")
    same = wanted in ("auto", level) or (wanted == "lowest" and level == levels[-1])
    return method and bits and same


def _needs(base: Base, way: str, level: str, gib: float, stored: int) -> Needs:
    """Count bytes by the rules of :func:`ways`, ``stored`` for each downloaded weight."""
    rest = base.parameters - base.denoiser
    weight = HALF if level == "lowest" else 4  # of what is trained
    quantized = "quantize" in WAYS[way].fields
    if way == "whole model":
        trained, loaded = base.denoiser, weight * base.denoiser
        models = loaded + 4 * rest + 2 * HALF * base.parameters
    else:
        trained = min(int(ADDED * base.denoiser), ADDED_MOST)
        loaded = HALF * base.denoiser
        models = (4 + 2 * HALF) * trained
    if quantized:
        loaded, rest = 0, rest - base.large
    together = sum if level == "standard" and not quantized else max
    checkpoint = (weight + MOMENTS) * trained
    # As mirrors has it: large weights are rounded, and the newer copy is whole before the older
    # one goes.
    mirrored = min(weight, HALF) if weight * trained > LARGE_ON_DRIVE else weight
    drive = (2 * (mirrored + MOMENTS) + mirrored) * trained
    return Needs(
        gpu=int(gib * GIB),
        memory=int(PROCESS + together((loaded, HALF * rest))),
        disk=int(stored * base.parameters + CHECKPOINTS * checkpoint + models + PICTURES),
        drive=int(drive + PICTURES),
        way=way,
        level=level,
    )
