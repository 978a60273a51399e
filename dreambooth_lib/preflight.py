"""Whether this machine can do what a run on a base asks of it, and what to do where it cannot."""

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from dreambooth_lib import bases, colab, families, memory, packages, words

PYTHON = (3, 11)  #: the lowest that the kit runs on
GIB = 2**30
#: Seconds until a Hub that does not answer counts as out of reach.
TIMEOUT = 5.0
#: Of Stable Diffusion 1.5, taken for bases on the Hub that are not known.
_HUB_PARAMETERS = 1_066_235_307
#: Bytes of a weight as it is loaded to be trained by each way.
_BYTES = {"whole model": 4.0, "LoRA": 2.0, "QLoRA": 0.6}
#: Bytes of LoRA's weights to one of the base's, both in float32, of rank 16.
_ADDED = 0.02
#: A base above this is not worth training on a CPU.
_LARGE = 200_000_000


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    ok: bool
    found: str
    fix: str = ""  #: one sentence on what to do; empty where all is well


@dataclass(frozen=True)
class Needs:
    """Bytes that a run on a base takes, roughly."""

    gpu: int
    memory: int
    disk: int
    drive: int  #: where the run is mirrored
    way: str = "whole model"  #: what is trained, as :data:`bases.WAYS` has it


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


def preflight(base: str, folder: str | Path, drive: str | Path | None = None) -> list[Check]:
    """Look at what a run on ``base`` in ``folder`` needs; the fixes are for whoever is not ready.

    ``drive`` is where it will be mirrored, if it will. What runs that were cut off take there and
    in ``folder`` counts as free, as it is mostly one of them that is gone on with.
    Nothing is downloaded, written or changed; the Hub is asked for one header. While packages are
    absent only what needs none of them is looked at.
    """
    plan = packages.missing_packages(packages.required(), packages.installed())
    checks = [_python(), _packages(plan)]
    if plan.absent:
        return checks
    import torch

    large = _parameters(base) > _LARGE
    gpu = torch.cuda.is_available()
    checks.append(_gpu(large))
    memory.free()
    free, total = torch.cuda.mem_get_info() if gpu else (None, 0)
    needs = needs_of(base, gpu or large, free)
    if free is not None:
        fix = "restart the session to free it, or choose a GPU with more memory."
        by = "" if needs.way == "whole model" else f" by {needs.way}"
        checks += [_optimizer(), _room("GPU memory", free, total, needs.gpu, fix, by)]
    checks += [_memory(needs.memory), _disk(Path(folder), needs.disk)]
    if drive is not None:
        checks.append(_drive(Path(drive), needs.drive))
    return [*checks, _base(base)]


def needs_of(base: str, gpu: bool, free: int | None = None) -> Needs:
    """What a run takes with the default settings, from the number of the base's parameters.

    Of a known base it is the first way that fits ``free`` bytes of GPU memory: the whole model at
    any level of memory, then LoRA, then QLoRA. On a GPU its memory is what
    :mod:`dreambooth_lib.bases` says, or holds weights and gradients in float32 and AdamW's moments
    in 8 bits, beside the activations; system memory holds the base while it loads, later a
    checkpoint while it is written. A CPU's holds weights, gradients, moments and their average.
    The disk holds four checkpoints, the pipeline twice and the base; a drive holds the newest
    checkpoint, the best and the pipeline.
    """
    parameters = _parameters(base)
    weights = 4.0 * parameters
    checkpoint = weights * (1.25 if gpu else 4)
    ram = 2 * GIB + (1.25 if gpu else 5) * weights
    disk, drive = 4 * checkpoint + 3 * weights, 2 * checkpoint + weights
    on_gpu = 2.6 * weights
    way = _way(base, free) if gpu else None
    if way is not None:
        on_gpu = way.gib * GIB
        if way.method != "whole model":
            added = _ADDED * weights
            ram = 2 * GIB + 1.25 * _BYTES[way.method] * parameters
            disk, drive = 2.0 * parameters + 6 * added, 3 * added
    method = "whole model" if way is None else way.method
    return Needs(int(on_gpu), int(ram), int(disk), int(drive), method)


def _way(base: str, free: int | None) -> bases.Row | None:
    """How a known base on the Hub is trained in so much memory, or in any; else None."""
    known = bases.known(base)
    if known is None or base == "toybox":
        return None
    from dreambooth_lib.training import FILLED

    rows = bases.ways(known, float("inf") if free is None else FILLED * free)
    return next((row for row in rows if row.fits), rows[-1])


def _parameters(base: str) -> int:
    """Of the parts that are loaded, by the headers of a local base's files; 0 if it is nowhere."""
    try:
        path = Path(families.locate(base))
    except families.BaseError:
        return 0
    if not path.exists():
        known = bases.known(base)
        return _HUB_PARAMETERS if known is None else known.parameters
    from safetensors import safe_open

    count = 0
    for part in ("unet", "text_encoder", "vae"):
        for file in (path / part).glob("*.safetensors"):
            with safe_open(file, "np") as tensors:
                names = tensors.keys()
                count += sum(prod(tensors.get_slice(name).get_shape()) for name in names)
    return count


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
        from dreambooth_lib.training import native_precision

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


def _optimizer() -> Check:
    try:
        from bitsandbytes.optim import AdamW8bit  # noqa: F401
    except Exception as error:  # a broken native library raises whatever its loader raises
        found = f"bitsandbytes does not load ({type(error).__name__}: {error})"
        fix = "Run 'pip install -U bitsandbytes', or set optimizer to 'adamw' if memory allows."
        return Check("8-bit AdamW", False, found, fix)
    return Check("8-bit AdamW", True, "bitsandbytes loads")


def _memory(needed: int) -> Check:
    import psutil

    ram = psutil.virtual_memory()
    fix = "Restart the session or close other programs to free memory."
    return _room("memory", ram.available, ram.total, needed, fix)


def _disk(folder: Path, needed: int) -> Check:
    folder = folder.resolve()
    there = next(place for place in (folder, *folder.parents) if place.exists())
    usage = shutil.disk_usage(there)
    fix = f"Remove runs and models that you no longer need, or use another folder than {folder}."
    return _room("disk", usage.free + _cut_off(folder), usage.total, needed, fix)


def _drive(folder: Path, needed: int) -> Check:
    fix = "Make room on Drive, its trash too, or set DRIVE = False and lose a run to a disconnect."
    try:
        usage = shutil.disk_usage(folder)
        return _room("Drive", usage.free + _cut_off(folder), usage.total, needed, fix)
    except OSError as error:
        return Check("Drive", False, f"{folder} does not answer ({error})", fix)


def _cut_off(folder: Path) -> int:
    """Bytes of the runs in a folder that have not finished."""
    begun = [place.parent for place in folder.glob("*/config.toml")]
    files = [file for run in begun if not (run / "pipeline").exists() for file in run.rglob("*")]
    return sum(file.stat().st_size for file in files if file.is_file())


def _room(name: str, free: int, total: int, needed: int, fix: str, by: str = "") -> Check:
    ok = free >= needed
    found = f"{free / GIB:.1f} of {total / GIB:.1f} GiB free, about {needed / GIB:.1f} needed{by}"
    return Check(name, ok, found, "" if ok else fix)


def _base(base: str) -> Check:
    try:
        path = families.locate(base)
    except families.BaseError as error:
        found, _, fix = str(error).partition("; ")
        return Check("base", False, found, f"{fix[:1].upper()}{fix[1:]}")
    if Path(path).exists():
        return Check("base", True, f"'{base}' is on this machine")
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, RepositoryNotFoundError

    found = f"'{base}' cannot be had from the Hub"
    secret = "as Colab's secret HF_TOKEN" if colab.in_colab() else "in the environment as HF_TOKEN"
    try:
        url = hf_hub_url(base, "model_index.json")
        get_hf_file_metadata(url, token=colab.hub_token() or False, timeout=TIMEOUT)
        return Check("base", True, f"'{base}' is on the Hub")
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
            return Check("base", True, f"'{base}' was downloaded before; the Hub does not answer")
        found += f" ({type(error).__name__})"
        fix = "Check the network, or train the base 'toybox', which is here."
    return Check("base", False, found, fix)
