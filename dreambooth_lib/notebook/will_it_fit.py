"""Estimate what a run needs of GPU, RAM, disk and Drive, and recommend a method that fits."""

import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dreambooth_lib.core import background, gpu_memory
from dreambooth_lib.core.config_types import ConfigError
from dreambooth_lib.core.errors import KitError
from dreambooth_lib.core.gpu_memory import GIB
from dreambooth_lib.families import one_file
from dreambooth_lib.notebook import drive_copy, drive_restore
from dreambooth_lib.notebook.base_models import METHODS, BaseModel, describe
from dreambooth_lib.training.memory_level import (
    USABLE_SHARE,
    check_adapter,
    first,
)
from dreambooth_lib.training.native_precision import native_precision

#: What a run needs some of, by the fields of :class:`Resources` and :class:`Needs`.
KINDS = {"gpu": "GPU memory", "memory": "RAM", "disk": "disk", "drive": "Drive"}
#: Bytes of memory that a process takes beside a notebook's own, once it uses a GPU.
PROCESS = 2.5e9
#: Bytes of a weight in half precision, in which an exported model, its zip and large weights on
#: Drive are written; and of AdamW's two moments in 8 bits.
HALF, MOMENTS = 2, 2
#: Checkpoints on the disk at once: the newest, the one that is being written, and the older and
#: the best one, which have no moments and count together as one more.
CHECKPOINTS = 3
#: A rank-16 LoRA's parameters as a fraction of the denoiser's, and at most: 6 million (0.7%) for
#: Stable Diffusion 1.5, 47 million (1.8%) for XL, 54 million for Flux.1.
LORA_FRACTION, LORA_MOST = 0.02, 60_000_000
#: Bytes of class images, validation images and the log.
IMAGES = 0.5e9
#: Bytes of latents for a pixel of each of 200 class images: 4 for FLUX.2 klein, less for others.
LATENTS = 200 * 4
#: Above this many parameters a base is not worth training without a GPU.
LARGE = 200_000_000


@dataclass(frozen=True)
class Resources:
    """Bytes that a machine has; None for what it lacks."""

    memory: int
    disk: int
    gpu: int | None = None
    drive: int | None = None  #: where the run is backed up
    #: Bytes counted above that an interrupted run takes, by the kinds "disk" and "drive".
    interrupted: Mapping[str, int] = field(default_factory=dict)

    def has(self, kind: str, need: float) -> bool:
        """Return whether there are this many bytes of one of :data:`KINDS`."""
        size = getattr(self, kind)
        return size is None or need <= size * (USABLE_SHARE if kind == "gpu" else 1)


@dataclass(frozen=True)
class Needs:
    """Bytes that a run needs, roughly, with a method at a memory level."""

    gpu: int
    memory: int
    disk: int
    drive: int
    method: str = "full fine-tuning"  #: one of :data:`.base_models.METHODS`
    level: str = "standard"  #: of memory

    def shortages(self, free: Resources) -> list[str]:
        """List the kinds of which too little is free."""
        return [name for k, name in KINDS.items() if not free.has(k, getattr(self, k))]

    def describe_shortage(self, free: Resources) -> str:
        """Say in words of which kinds too little is free."""
        *rest, last = self.shortages(free)
        return f"there is not enough {', '.join(rest)}{' or ' if rest else ''}{last}"


@dataclass(frozen=True)
class Recommendation:
    """The best method to train a base on this machine, and why."""

    needs: Needs | None  #: None if the base cannot be trained on such a GPU at all
    free: Resources
    total: Resources
    large: bool  #: too large to train on a CPU
    reason: str = ""  #: why the methods before it do not fit, or why there is none
    options: Sequence[Needs] = ()  #: the methods and levels it was chosen from

    @property
    def settings(self) -> dict[str, Any]:
        """Return the config's fields for it, such as {"method": "lora"}; often none."""
        if self.needs is None or not self.options:
            return {}
        return settings(self.needs, self.options, self.free)


def recommend(
    base: str,
    folder: str | Path,
    drive: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    resume: bool | str = True,
) -> Recommendation:
    """Return the first method that fits the GPU, RAM, disk and Drive space that are free now.

    Methods come in the order of :data:`.base_models.METHODS`; if none fits, the result is one with
    the fewest shortages. The arguments are those of :func:`.preflight.preflight`.
    """
    import torch

    large = describe(base).parameters > LARGE
    free, total = _measure_machine(Path(folder), drive, base, resume)
    if free.gpu is None and not large:
        return Recommendation(needs_on_cpu(base), free, total, large)
    gpu = torch.device("cuda")
    precision = "bf16" if free.gpu is None else native_precision("auto", gpu)
    asked = settings or {}
    own = asked.get("mixed_precision")
    try:
        check_adapter(asked.get("adapter"), precision if own in (None, "auto") else own)
    except ConfigError as error:
        return Recommendation(None, free, total, large, str(error))
    options = needs_on_gpu(base, precision, settings)
    if not options:
        contradiction = bool(needs_on_gpu(base, precision))
        reason = (
            "no training method agrees with SETTINGS; leave method, quantize and memory out of "
            "SETTINGS."
        )
        return Recommendation(None, free, total, large, reason if contradiction else "")
    best = first_fitting(options, free)
    # The last level of each method before it, which needs the least memory.
    tried = {need.method: need for need in options[: options.index(best)]}
    tried.pop(best.method, None)
    reasons = [f"for {name} {need.describe_shortage(free)}" for name, need in tried.items()]
    return Recommendation(best, free, total, large, "; ".join(reasons), options)


def needs_on_cpu(base: str) -> Needs:
    """Estimate a run without a GPU: its weights, gradients, moments and EMA weights."""
    weights = 4 * describe(base).parameters
    return Needs(0, 2 * GIB + 5 * weights, 19 * weights, 9 * weights)


def needs_on_gpu(
    base: str, precision: str = "fp16", asked: Mapping[str, Any] | None = None
) -> list[Needs]:
    """List what each method needs on a GPU at each memory level, in the order of METHODS.

    ``precision`` is what the GPU computes in; methods in which the base cannot are left out.
    ``asked`` are fields of a config: only methods that agree with them are listed. The estimates:

    - Memory holds a process and the part of the base that is on the CPU at once: all of it or,
      from level "low" on, the text encoders first and the denoiser after them. Weights count as
      they are loaded, since those that are cast or replaced are no longer backed by the file.
      Quantized weights go to the GPU tensor by tensor.
    - The disk holds the downloaded base, unpacked beside it if it is one file,
      :data:`CHECKPOINTS`, the pipeline, and the exported model and its zip in half precision.
    - Drive holds the newest checkpoint with its moments, a newer one while it is copied there, and
      the best weights; large ones in half precision.
    - A ``draw_base`` takes its denoiser on the GPU, where the run validates, and its download.
    """
    model, asked = describe(base), asked or {}
    stored = HALF if asked.get("variant") else model.stored
    stored *= _copies(base)
    needs = [
        _needs(model, method, level, gib, stored)
        for method, level, gib in model.requirements(precision)
        if _agrees(method, level, asked)
    ]
    if asked.get("draw_base") is None:
        return needs
    return [_with_distilled(one, asked["draw_base"], asked.get("validate_every") != 0)
            for one in needs]  # fmt: skip


def _with_distilled(needs: Needs, base: str, draws: bool) -> Needs:
    """Add what a ``draw_base`` takes; ``draws`` says whether training draws with it."""
    from dreambooth_lib.training.part_sizes import QUANTIZED

    distilled, weight = describe(base), QUANTIZED["nf4"] if needs.method == "QLoRA" else HALF
    return replace(
        needs,
        gpu=needs.gpu + int(draws * weight * distilled.denoiser),
        disk=needs.disk + _copies(base) * distilled.stored * distilled.parameters,
    )


def _copies(base: str) -> int:
    """Return how often the base's weights will be written: as a download, and out of one file."""
    try:
        file = one_file.parse(base)
    except KitError:  # which the check of the base tells
        return 0
    if file is None:
        return 0 if base == "toybox" or Path(base).exists() else 1
    return 0 if one_file.find(file) else 1 if file.path else 2


def _agrees(method: str, level: str, asked: Mapping[str, Any]) -> bool:
    fields, levels = METHODS[method]
    memory = asked.get("memory", "auto")
    return (
        asked.get("method") in (None, fields["method"])
        and (asked.get("adapter") is None or method == "LoRA")
        and (asked.get("draw_base") is None or fields["method"] == "lora")
        and bool(asked.get("quantize", "quantize" in fields)) == ("quantize" in fields)
        and (memory in ("auto", level) or (memory == "lowest" and level == levels[-1]))
    )


def _needs(base: BaseModel, method: str, level: str, gib: float, stored: int) -> Needs:
    """Estimate as :func:`needs_on_gpu` describes; ``stored`` is bytes per downloaded weight."""
    rest = base.parameters - base.denoiser
    weight = HALF if level == "lowest" else 4  # bytes of a trained weight
    if method == "full fine-tuning":
        trained, loaded = base.denoiser, weight * base.denoiser
        models = loaded + 4 * rest + 2 * HALF * base.parameters
    else:
        trained = min(int(LORA_FRACTION * base.denoiser), LORA_MOST)
        loaded, models = HALF * base.denoiser, (4 + 2 * HALF) * trained
    if method == "QLoRA":
        loaded, rest = 0, rest - base.large
    at_once = sum if level == "standard" and method != "QLoRA" else max
    checkpoint = (weight + MOMENTS) * trained
    # As in drive_copy: large weights are rounded, and the older copy goes after the newer came.
    backed_up = min(weight, HALF) if weight * trained > drive_copy.LARGE else weight
    memory = PROCESS + at_once((loaded, HALF * rest))
    disk = stored * base.parameters + CHECKPOINTS * checkpoint + models + IMAGES
    disk += LATENTS * base.resolution**2
    drive = (2 * (backed_up + MOMENTS) + backed_up) * trained + IMAGES
    return Needs(int(gib * GIB), int(memory), int(disk), int(drive), method, level)


def first_fitting(options: Sequence[Needs], free: Resources) -> Needs:
    """Return the first option that fits; if none does, the last with the fewest shortages."""
    fewest = min(len(needs.shortages(free)) for needs in options)
    closest = [needs for needs in options if len(needs.shortages(free)) == fewest]
    return first(closest, lambda needs: fewest == 0)


def settings(chosen: Needs, options: Sequence[Needs], free: Resources) -> dict[str, Any]:
    """Return the config's fields for an option, with its level if "auto" would take another."""
    levels = [needs for needs in options if needs.method == chosen.method]
    auto = first(levels, lambda needs: free.has("gpu", needs.gpu))
    return METHODS[chosen.method].fields | ({} if auto is chosen else {"memory": chosen.level})


def _measure_machine(
    folder: Path, drive: str | Path | None, base: str, resume: bool | str
) -> tuple[Resources, Resources]:
    """Return the bytes that are free on this machine now, and those that it has in all."""
    import psutil
    import torch

    ram, folder = psutil.virtual_memory(), folder.resolve()
    disk = shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.exists()))
    gpu = gpu_memory.gpu_bytes() if torch.cuda.is_available() else (None, None)
    interrupted = {"disk": _interrupted_bytes(folder, base, resume)}
    free, total = None, None
    if drive is not None:
        with suppress(OSError):  # a drive that is gone has a line of its own in the table
            free, total, interrupted["drive"] = background.call(
                _drive_bytes, Path(drive), base, resume, place=drive, limit=background.ANSWER_LIMIT
            )
    disk_free = disk.free + interrupted["disk"]
    return (
        Resources(ram.available, disk_free, gpu[0], free, interrupted),
        Resources(ram.total, disk.total, gpu[1], total),
    )


def _drive_bytes(drive: Path, base: str, resume: bool | str) -> tuple[int, int, int]:
    usage, interrupted = shutil.disk_usage(drive), _interrupted_bytes(drive, base, resume)
    return usage.free + interrupted, usage.total, interrupted


def _interrupted_bytes(folder: Path, base: str, resume: bool | str) -> int:
    """Count the bytes of the largest unfinished run in a folder that may be resumed."""
    runs = [place.parent for place in folder.glob("*/config.toml")]
    wanted = [run for run in runs if drive_restore.may_resume(run, resume, base)]
    sizes = [[file.stat().st_size for file in run.rglob("*") if file.is_file()] for run in wanted]
    return max(map(sum, sizes), default=0)
