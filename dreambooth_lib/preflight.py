"""Whether this machine can do what a run on a base asks of it, and what to do where it cannot."""

import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dreambooth_lib import colab, families, memory, needs, packages, restoring, words
from dreambooth_lib.levels import FILLED, native_precision
from dreambooth_lib.needs import Needs, Room

PYTHON = (3, 11)  #: the lowest that the kit runs on
GIB = 2**30
#: Seconds until a Hub that does not answer counts as out of reach.
TIMEOUT = 5.0


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    ok: bool
    found: str
    fix: str = ""  #: one sentence on what to do; empty where all is well


class NotReady(RuntimeError):
    """Something that a run needs is not there."""


@dataclass(frozen=True)
class Table:
    """Checks as a notebook shows them, and as text; each row says in words whether it is well."""

    checks: Sequence[Check]

    def check(self) -> None:
        """Raise :class:`NotReady` where there is a red line."""
        red = [check.name for check in self.checks if not check.ok]
        if red:
            raise NotReady(
                f"this machine is not ready ({', '.join(red)}); do what the red lines of the table "
                "say, or set IGNORE_RED = True to go on all the same."
            )

    def __repr__(self) -> str:
        lines = []
        for check in self.checks:
            lines.append(f"{' '.join(_mark(check)):8}  {check.name:13}  {check.found}")
            if check.fix:
                lines.append(f"{'':8}  {'':13}  -> {check.fix}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        rows = [(one.ok, _mark(one)[1], (one.name, one.found, one.fix)) for one in self.checks]
        return words.html_table(("what", "found", "what to do"), rows)


def _mark(check: Check) -> tuple[str, str]:
    return words.sign(check.ok), "ok" if check.ok else "to fix"


def preflight(
    base: str,
    folder: str | Path,
    drive: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
) -> list[Check]:
    """Look at what a run on ``base`` in ``folder`` needs; the fixes are for whoever is not ready.

    ``drive`` is where it will be mirrored, if it will. What runs that were cut off take there and
    in ``folder`` counts as free, as it is mostly one of them that is gone on with. It is trained as
    :func:`recommend` says, which ``settings`` may narrow down.
    Nothing is downloaded, written or changed; the Hub is asked for one header. While packages are
    absent only what needs none of them is looked at.
    """
    plan = packages.missing_packages(packages.required(), packages.installed())
    checks = [_python(), _packages(plan)]
    if plan.absent:
        return checks
    offer = recommend(base, folder, drive, settings)
    room, total = _here(Path(folder), drive)
    checks.append(_gpu(offer.large))
    if room.gpu is not None:
        checks.append(_optimizer())
    if room.gpu is not None or offer.large:
        checks.append(_way(base, offer))
    if offer.needs is not None:
        if room.gpu is not None:
            fix = "Restart the session to free it, or choose a GPU with more memory."
            if total.gpu is not None and offer.needs.gpu > FILLED * total.gpu:
                fix = "Choose a GPU with more memory, or leave method and memory to the kit."
            checks.append(_room("GPU memory", room.gpu, total.gpu, offer.needs.gpu, fix, FILLED))
        checks.append(_memory(room.memory, total.memory, offer.needs.memory))
        fix = "Remove runs and models that you no longer need, or use another folder than "
        fix += f"{Path(folder).resolve()}."
        checks.append(_room("disk", room.disk, total.disk, offer.needs.disk, fix))
        if drive is not None:
            checks.append(_drive(Path(drive), room.drive, total.drive, offer.needs.drive))
    return [*checks, _base(base)]


@dataclass(frozen=True)
class Offer:
    """How a base is best trained on this machine, which is what a notebook begins with."""

    needs: Needs | None  #: None where the base cannot be trained on such a GPU at all
    settings: dict[str, Any]  #: fields of a config, such as {"method": "lora"}; often none
    room: Room
    large: bool  #: too large for a CPU
    why: str  #: what the ways before it lack here, or why there is none


def recommend(
    base: str,
    folder: str | Path,
    drive: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Offer:
    """Return the first way to train a base that fits GPU, memory, disk and Drive as they are now.

    In the order of :data:`bases.WAYS`: the whole model at each level of memory, LoRA, QLoRA. Where
    none fits it is one that lacks the least. Arguments are those of :func:`preflight`.
    """
    import torch

    large = needs.described(base).parameters > needs.LARGE
    room, _ = _here(Path(folder), drive)
    if room.gpu is None and not large:
        return Offer(needs.on_cpu(base), {}, room, large, "")
    precision = "bf16"  # of the GPU that is yet to be found
    if room.gpu is not None:
        precision = native_precision("auto", torch.device("cuda"))
    found = needs.ways(base, precision, settings)
    if not found:
        said = "no way to train agrees with SETTINGS" if needs.ways(base, precision) else ""
        return Offer(None, {}, room, large, said)
    best = needs.first_fitting(found, room)
    tried: dict[str, Needs] = {}  # of each way the level that takes the least
    for one in found[: found.index(best)]:
        if one.way != best.way:
            tried[one.way] = one
    why = [f"for {_called(way)} {_too_little(one.lacking(room))}" for way, one in tried.items()]
    return Offer(best, needs.settings(best, found, room), room, large, "; ".join(why))


def _called(way: str) -> str:
    return "the whole model" if way == "whole model" else way


def _too_little(lacking: Sequence[str]) -> str:
    *most, last = lacking
    return f"there is too little {', '.join(most)}{' and ' if most else ''}{last}"


def _here(folder: Path, drive: str | Path | None) -> tuple[Room, Room]:
    """Count the bytes that are free on this machine now, and of how many."""
    import psutil
    import torch

    ram, folder = psutil.virtual_memory(), folder.resolve()
    there = next(place for place in (folder, *folder.parents) if place.exists())
    disk = shutil.disk_usage(there)
    free = Room(ram.available, disk.free + _cut_off(folder))
    total = Room(ram.total, disk.total)
    if torch.cuda.is_available():
        here, of = memory.gpu_bytes()
        free, total = replace(free, gpu=here), replace(total, gpu=of)
    if drive is not None:
        with suppress(OSError):  # one that is gone has no room, which its own line says
            usage = shutil.disk_usage(drive)
            free = replace(free, drive=usage.free + _cut_off(Path(drive)))
            total = replace(total, drive=usage.total)
    return free, total


def _python() -> Check:
    found = ".".join(map(str, sys.version_info[:3]))
    lowest = ".".join(map(str, PYTHON))
    fix = f"Use Python {lowest} or newer; on Colab, take the latest runtime version."
    ok = sys.version_info >= PYTHON
    return Check("Python", ok, found, "" if ok else fix)


def _packages(plan: packages.Plan) -> Check:
    if plan.absent:
        found = f"not installed: {', '.join(plan.absent)}"
        fix = "Run dreambooth_lib.packages.install_missing(), which moves nothing else."
        return Check("packages", False, found, fix)
    if plan.too_old:
        found = ", ".join(f"{wanted} (here {here})" for wanted, here in plan.too_old.items())
        names = " ".join(f"'{wanted}'" for wanted in plan.too_old)
        fix = f"Run pip install -U {names} and restart the session."
        return Check("packages", False, f"too old: {found}", fix)
    return Check("packages", True, "all that are required")


def _gpu(large: bool) -> Check:
    import torch

    if torch.cuda.is_available():
        precision = native_precision("auto", torch.device("cuda"))
        native = "native bf16" if precision == "bf16" else "fp16, as it has no native bf16"
        return Check("GPU", True, f"{torch.cuda.get_device_name()}, {native}")
    if not large:
        return Check("GPU", True, "none; training runs on the CPU")
    where = "use a machine with an NVIDIA GPU"
    if colab.in_colab():
        where = "choose Runtime > Change runtime type > T4 GPU"
    fix = f"{where[0].upper()}{where[1:]}, or train the base 'toybox'."
    return Check("GPU", False, "none, and this base would take days on a CPU", fix)


def _way(base: str, offer: Offer) -> Check:
    if offer.needs is None:
        fix = "Use a GPU that has it (L4, A100 and newer), or choose another base."
        found = f"'{base}' does not work in float16, and this GPU has no bfloat16"
        if offer.why:
            found, fix = offer.why, "Leave method, quantize and memory out of SETTINGS."
        return Check("way", False, found, fix)
    found = f"{offer.needs.way}, memory '{offer.needs.level}'{needs.guessed(base)}"
    lacking = offer.needs.lacking(offer.room)
    if not lacking:
        return Check("way", True, f"{found}; {offer.why}" if offer.why else found)
    found = f"no way to train fits; the closest is the {found}, but {_too_little(lacking)}"
    return Check("way", False, found, "Do what the lines below say, or choose a smaller base.")


def _optimizer() -> Check:
    try:
        from bitsandbytes.optim import AdamW8bit  # noqa: F401
    except Exception as error:  # a broken native library raises whatever its loader raises
        found = f"bitsandbytes does not load ({type(error).__name__}: {error})"
        fix = "Run 'pip install -U bitsandbytes', or set optimizer to 'adamw' if memory allows."
        return Check("8-bit AdamW", False, found, fix)
    return Check("8-bit AdamW", True, "bitsandbytes loads")


def _memory(free: int, total: int, needed: int) -> Check:
    fix = "Restart the session or close other programs to free memory."
    if needed > total:
        fix = "Use a machine with more memory, or choose a smaller base."
        if colab.in_colab():
            fix = "Choose Runtime > Change runtime type > High-RAM, or a smaller base."
    return _room("memory", free, total, needed, fix)


def _drive(folder: Path, free: int | None, total: int | None, needed: int) -> Check:
    fix = "Make room on Drive, its trash too, or set DRIVE = False and lose a run to a disconnect."
    if free is None or total is None:
        return Check("Drive", False, f"{folder} does not answer", fix)
    return _room("Drive", free, total, needed, fix)


def _cut_off(folder: Path) -> int:
    """Bytes of the runs in a folder that have not finished."""
    begun = [place.parent for place in folder.glob("*/config.toml")]
    files = [file for run in begun if not restoring.has_finished(run) for file in run.rglob("*")]
    return sum(file.stat().st_size for file in files if file.is_file())


def _room(
    name: str, free: int, total: int | None, needed: int, fix: str, usable: float = 1.0
) -> Check:
    ok = usable * free >= needed
    of = "" if total is None else f" of {total / GIB:.1f}"
    share = f", {usable:.0%} of it usable" if usable < 1 and not ok else ""
    found = f"{free / GIB:.1f}{of} GiB free{share}, about {needed / GIB:.1f} needed"
    return Check(name, ok, found, "" if ok else fix)


def _base(base: str) -> Check:
    try:
        path = families.locate(base)
        sentence = families.distilled(base)
    except families.BaseError as error:
        found, _, fix = str(error).partition("; ")
        return Check("base", False, found, f"{fix[:1].upper()}{fix[1:]}")
    advice = f". {sentence}" if sentence else ""
    if Path(path).exists():
        return Check("base", True, f"'{base}' is on this machine{advice}")
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, RepositoryNotFoundError

    found = f"'{base}' cannot be had from the Hub"
    secret = "as Colab's secret HF_TOKEN" if colab.in_colab() else "in the environment as HF_TOKEN"
    try:
        url = hf_hub_url(base, "model_index.json")
        get_hf_file_metadata(url, token=colab.hub_token() or False, timeout=TIMEOUT)
        return Check("base", True, f"'{base}' is on the Hub{advice}")
    except GatedRepoError:
        fix = f"Accept the terms on the Hub's page of {base}, and give your token {secret}."
    except RepositoryNotFoundError:
        fix = f"Check its name; if it is private, give a token that may read it {secret}."
    except EntryNotFoundError:
        found = f"'{base}' is on the Hub but has no model_index.json"
        fix = "Choose a base in diffusers' layout."
    except Exception as error:  # the Hub's client raises many kinds, all meaning no answer
        cached = try_to_load_from_cache(base, "model_index.json")
        denoisers = ("unet/*.safetensors", "transformer/*.safetensors")
        if isinstance(cached, str) and any(any(Path(cached).parent.glob(d)) for d in denoisers):
            found = f"'{base}' was downloaded before; the Hub does not answer{advice}"
            return Check("base", True, found)
        found += f" ({type(error).__name__})"
        fix = "Check the network, or train the base 'toybox', which is here."
    return Check("base", False, found, fix)
