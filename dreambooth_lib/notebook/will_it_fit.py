"""What a run takes of GPU, memory, disk and Drive by each way to train, and the first that fits."""

import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreambooth_lib.core import gpu_memory
from dreambooth_lib.core.gpu_memory import GIB
from dreambooth_lib.notebook import drive_backup, drive_restore
from dreambooth_lib.notebook.base_models import WAYS, Base, described
from dreambooth_lib.training.memory_level import USABLE_SHARE, first, native_precision

#: What a run takes some of, by the fields of :class:`Room` and :class:`Needs`.
KINDS = {"gpu": "GPU memory", "memory": "memory", "disk": "disk", "drive": "Drive"}
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
#: Class images, latents, pictures of looks and the log.
PICTURES = 0.5e9
#: Without a GPU a base above this many parameters is not worth training.
LARGE = 200_000_000


@dataclass(frozen=True)
class Room:
    """Bytes that are free, None where there is no such thing."""

    memory: int
    disk: int
    gpu: int | None = None
    drive: int | None = None  #: where the run is mirrored

    def holds(self, kind: str, need: float) -> bool:
        """Return whether there are so many bytes of one of :data:`KINDS`."""
        has = getattr(self, kind)
        return has is None or need <= has * (USABLE_SHARE if kind == "gpu" else 1)


@dataclass(frozen=True)
class Needs:
    """Bytes that a run takes, roughly, and how it is trained."""

    gpu: int
    memory: int
    disk: int
    drive: int
    way: str = "whole model"  #: one of :data:`bases.WAYS`
    level: str = "standard"  #: of memory

    def lacking(self, room: Room) -> list[str]:
        """Return what there is too little of."""
        return [name for k, name in KINDS.items() if not room.holds(k, getattr(self, k))]

    def too_little(self, room: Room) -> str:
        """Say what of, where there is."""
        *most, last = self.lacking(room)
        return f"there is too little {', '.join(most)}{' and ' if most else ''}{last}"


@dataclass(frozen=True)
class Offer:
    """How a base is best trained on this machine, which is what a notebook begins with."""

    needs: Needs | None  #: None where the base cannot be trained on such a GPU at all
    room: Room
    total: Room  #: what would be free if nothing were in use
    large: bool  #: too large for a CPU
    why: str = ""  #: what the ways before it lack here, or why there is none
    ways: Sequence[Needs] = ()  #: from which it was chosen

    @property
    def settings(self) -> dict[str, Any]:
        """The fields of a config for it, such as {"method": "lora"}; often none."""
        return settings(self.needs, self.ways, self.room) if self.needs and self.ways else {}


def recommend(
    base: str,
    folder: str | Path,
    drive: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Offer:
    """Return the first way to train a base that fits GPU, memory, disk and Drive as they are now.

    They come in the order of :data:`bases.WAYS`; where none fits it is one that lacks the least.
    Arguments are those of :func:`preflight`.
    """
    import torch

    large = described(base).parameters > LARGE
    room, total = _here(Path(folder), drive)
    if room.gpu is None and not large:
        return Offer(on_cpu(base), room, total, large)
    gpu = torch.device("cuda")  # or one with bf16, that is yet to be found
    precision = "bf16" if room.gpu is None else native_precision("auto", gpu)
    found = ways(base, precision, settings)
    if not found:
        said = "no way to train agrees with SETTINGS" if ways(base, precision) else ""
        return Offer(None, room, total, large, said)
    best = first_fitting(found, room)
    # Of each way before it the level that takes the least.
    tried = {one.way: one for one in found[: found.index(best)] if one.way != best.way}
    called = {"whole model": "the whole model"}
    why = [f"for {called.get(way, way)} {one.too_little(room)}" for way, one in tried.items()]
    return Offer(best, room, total, large, "; ".join(why), found)


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
    like, asked = described(base), asked or {}
    stored = HALF if asked.get("variant") else like.stored
    if base == "toybox" or Path(base).exists():
        stored = 0
    return [
        _needs(like, way, level, gib, stored)
        for way, level, gib in like.takes(precision)
        if _agrees(way, level, asked)
    ]


def _agrees(way: str, level: str, asked: Mapping[str, Any]) -> bool:
    fields, levels = WAYS[way]
    wanted = asked.get("memory", "auto")
    return (
        asked.get("method") in (None, fields["method"])
        and bool(asked.get("quantize", "quantize" in fields)) == ("quantize" in fields)
        and (wanted in ("auto", level) or (wanted == "lowest" and level == levels[-1]))
    )


def _needs(base: Base, way: str, level: str, gib: float, stored: int) -> Needs:
    """Count bytes by the rules of :func:`ways`, ``stored`` for each downloaded weight."""
    rest = base.parameters - base.denoiser
    weight = HALF if level == "lowest" else 4  # of what is trained
    if way == "whole model":
        trained, loaded = base.denoiser, weight * base.denoiser
        models = loaded + 4 * rest + 2 * HALF * base.parameters
    else:
        trained = min(int(ADDED * base.denoiser), ADDED_MOST)
        loaded, models = HALF * base.denoiser, (4 + 2 * HALF) * trained
    if way == "QLoRA":
        loaded, rest = 0, rest - base.large
    together = sum if level == "standard" and way != "QLoRA" else max
    checkpoint = (weight + MOMENTS) * trained
    # As mirrors has it: large weights are rounded, and the newer copy is whole before the older
    # one goes.
    mirrored = min(weight, HALF) if weight * trained > drive_backup.LARGE else weight
    ram = PROCESS + together((loaded, HALF * rest))
    disk = stored * base.parameters + CHECKPOINTS * checkpoint + models + PICTURES
    drive = (2 * (mirrored + MOMENTS) + mirrored) * trained + PICTURES
    return Needs(int(gib * GIB), int(ram), int(disk), int(drive), way, level)


def first_fitting(found: Sequence[Needs], room: Room) -> Needs:
    """Choose the first way that fits everything; if none does, the last that lacks the fewest."""
    fewest = min(len(needs.lacking(room)) for needs in found)
    closest = [needs for needs in found if len(needs.lacking(room)) == fewest]
    return first(closest, lambda needs: fewest == 0)


def settings(chosen: Needs, found: Sequence[Needs], room: Room) -> dict[str, Any]:
    """Return the fields of a config for a way; its level where memory "auto" would take another."""
    of_way = [needs for needs in found if needs.way == chosen.way]
    auto = first(of_way, lambda needs: room.holds("gpu", needs.gpu))
    return WAYS[chosen.way].fields | ({} if auto is chosen else {"memory": chosen.level})


def _here(folder: Path, drive: str | Path | None) -> tuple[Room, Room]:
    """Count the bytes that are free on this machine now, and of how many."""
    import psutil
    import torch

    ram, folder = psutil.virtual_memory(), folder.resolve()
    disk = shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.exists()))
    gpu = gpu_memory.gpu_bytes() if torch.cuda.is_available() else (None, None)
    mirror: tuple[int | None, int | None] = None, None
    if drive is not None:
        with suppress(OSError):  # one that is gone has no room, which its own line says
            usage = shutil.disk_usage(drive)
            mirror = usage.free + _cut_off(Path(drive)), usage.total
    return (
        Room(ram.available, disk.free + _cut_off(folder), gpu[0], mirror[0]),
        Room(ram.total, disk.total, gpu[1], mirror[1]),
    )


def _cut_off(folder: Path) -> int:
    """Count the bytes of the runs in a folder that have not finished."""
    begun = [place.parent for place in folder.glob("*/config.toml")]
    files = (
        file for run in begun if not drive_restore.has_finished(run) for file in run.rglob("*")
    )
    return sum(file.stat().st_size for file in files if file.is_file())
