"""Whether this machine can do what a run on a base asks of it, and what to do where it cannot."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreambooth_lib.core.gpu_memory import GIB
from dreambooth_lib.core.hub_token import hub_token, in_colab
from dreambooth_lib.families import loading
from dreambooth_lib.figures import labels
from dreambooth_lib.notebook import install
from dreambooth_lib.notebook.base_models import described
from dreambooth_lib.notebook.will_it_fit import KINDS, Offer, recommend
from dreambooth_lib.training.memory_level import USABLE_SHARE, native_precision

PYTHON = (3, 11)  #: the lowest that the kit runs on
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
                "say, or set SKIP_CHECKS = True to go on all the same."
            )

    def _said(self) -> list[tuple[bool, str, Sequence[str]]]:
        called = {True: "ok", False: "to fix"}
        return [(one.ok, called[one.ok], (one.name, one.found, one.fix)) for one in self.checks]

    def __repr__(self) -> str:
        lines = []
        for ok, word, (name, found, fix) in self._said():
            lines.append(f"{f'{labels.sign(ok)} {word}':8}  {name:13}  {found}")
            lines += [f"{'':8}  {'':13}  -> {fix}"] if fix else []
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return labels.html_table(("what", "found", "what to do"), self._said())


def preflight(
    base: str,
    folder: str | Path,
    drive: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
) -> list[Check]:
    """Look at what a run on ``base`` in ``folder`` needs; the fixes are for whoever is not ready.

    ``drive`` is where it will be mirrored, if it will. What runs that were cut off take there and
    in ``folder`` counts as free, as one of them mostly goes on. It is trained as :func:`recommend`
    says, which ``settings`` may narrow down. Nothing is downloaded, written or changed; the Hub is
    asked for one header. While packages are absent only what needs none of them is looked at.
    """
    plan = install.missing_packages(install.required(), install.installed())
    checks = [_python(), _packages(plan)]
    if plan.absent:
        return checks
    offer = recommend(base, folder, drive, settings)
    gpu = offer.room.gpu is not None
    checks.append(_gpu(offer.large))
    if gpu:
        checks.append(_optimizer())
    if gpu or offer.large:
        checks.append(_way(base, offer))
    if offer.needs is not None:
        there = {"gpu": gpu, "memory": True, "disk": True, "drive": drive is not None}
        place = {"disk": Path(folder).resolve(), "drive": Path(drive or "")}
        checks += [_room(kind, offer, place.get(kind)) for kind in KINDS if there[kind]]
    return [*checks, _base(base)]


def _python() -> Check:
    found, lowest = (".".join(map(str, of)) for of in (sys.version_info[:3], PYTHON))
    fix = f"Use Python {lowest} or newer; on Colab, take the latest runtime version."
    ok = sys.version_info >= PYTHON
    return Check("Python", ok, found, "" if ok else fix)


def _packages(plan: install.Plan) -> Check:
    found, fix = "all that are required", ""
    if plan.absent:
        found = f"not installed: {', '.join(plan.absent)}"
        fix = "Run dreambooth_lib.notebook.install.install_missing(), which moves nothing else."
    elif plan.too_old:
        old = (f"{wanted} (here {here})" for wanted, here in plan.too_old.items())
        names = " ".join(f"'{wanted}'" for wanted in plan.too_old)
        found = f"too old: {', '.join(old)}"
        fix = f"Run pip install -U {names} and restart the session."
    return Check("packages", not fix, found, fix)


def _gpu(large: bool) -> Check:
    import torch

    if torch.cuda.is_available():
        precision = native_precision("auto", torch.device("cuda"))
        native = "native bf16" if precision == "bf16" else "fp16, as it has no native bf16"
        return Check("GPU", True, f"{torch.cuda.get_device_name()}, {native}")
    if not large:
        return Check("GPU", True, "none; training runs on the CPU")
    t4 = "Choose Runtime > Change runtime type > T4 GPU"
    where = t4 if in_colab() else "Use a machine with an NVIDIA GPU"
    found = "none, and this base would take days on a CPU"
    return Check("GPU", False, found, f"{where}, or train the base 'toybox'.")


def _way(base: str, offer: Offer) -> Check:
    if offer.needs is None:
        fix = "Use a GPU that has it (L4, A100 and newer), or choose another base."
        found = f"'{base}' does not work in float16, and this GPU has no bfloat16"
        if offer.why:
            found, fix = offer.why, "Leave method, quantize and memory out of SETTINGS."
        return Check("way", False, found, fix)
    like = described(base)
    found = f"{offer.needs.way}, memory '{offer.needs.level}'"
    found += f", if '{base}' is as large as {like.name}" if like.guess else ""
    if not offer.needs.lacking(offer.room):
        return Check("way", True, f"{found}; {offer.why}" if offer.why else found)
    found = f"no way to train fits; the closest is the {found}, but "
    found += offer.needs.too_little(offer.room)
    return Check("way", False, found, "Do what the lines below say, or choose a smaller base.")


def _optimizer() -> Check:
    try:
        from bitsandbytes.optim import AdamW8bit  # noqa: F401
    except Exception as error:  # a broken native library raises whatever its loader raises
        found = f"bitsandbytes does not load ({type(error).__name__}: {error})"
        fix = "Run 'pip install -U bitsandbytes', or set optimizer to 'adamw' if memory allows."
        return Check("8-bit AdamW", False, found, fix)
    return Check("8-bit AdamW", True, "bitsandbytes loads")


def _room(kind: str, offer: Offer, place: Path | None) -> Check:
    """Check one of :data:`KINDS` of room, which is at a place if it is a folder's."""
    need, free, total = (getattr(one, kind) for one in (offer.needs, offer.room, offer.total))
    fix = {
        "gpu": "Restart the session to free it, or choose a GPU with more memory.",
        "memory": "Restart the session or close other programs to free memory.",
        "disk": "Remove runs and models that you no longer need, or use another folder than "
        f"{place}.",
        "drive": "Make room on Drive, its trash too, or set DRIVE = False and lose a run to a "
        "disconnect.",
    }[kind]
    if free is None:
        return Check(KINDS[kind], False, f"{place} does not answer", fix)
    if not offer.total.holds(kind, need):
        more = "Use a machine with more memory, or choose a smaller base."
        if in_colab():
            more = "Choose Runtime > Change runtime type > High-RAM, or a smaller base."
        gpu = "Choose a GPU with more memory, or leave method and memory to the kit."
        fix = {"gpu": gpu, "memory": more}.get(kind, fix)
    ok = offer.room.holds(kind, need)
    share = f", {USABLE_SHARE:.0%} of it usable" if kind == "gpu" and not ok else ""
    found = f"{free / GIB:.1f} of {total / GIB:.1f} GiB free{share}, about {need / GIB:.1f} needed"
    return Check(KINDS[kind], ok, found, "" if ok else fix)


def _base(base: str) -> Check:
    try:
        path = loading.locate(base)
        sentence = loading.warn_of_distillation(base)
    except loading.BaseError as error:
        found, _, fix = str(error).partition("; ")
        return Check("base", False, found, f"{fix[:1].upper()}{fix[1:]}")
    advice = f". {sentence}" if sentence else ""
    if Path(path).exists():
        return Check("base", True, f"'{base}' is on this machine{advice}")
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, RepositoryNotFoundError

    found = f"'{base}' cannot be had from the Hub"
    secret = "as Colab's secret HF_TOKEN" if in_colab() else "in the environment as HF_TOKEN"
    try:
        url = hf_hub_url(base, "model_index.json")
        get_hf_file_metadata(url, token=hub_token() or False, timeout=TIMEOUT)
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
        files = Path(cached).parent.glob("*/*.safetensors") if isinstance(cached, str) else ()
        if any(file.parent.name in ("unet", "transformer") for file in files):
            found = f"'{base}' was downloaded before; the Hub does not answer{advice}"
            return Check("base", True, found)
        found += f" ({type(error).__name__})"
        fix = "Check the network, or train the base 'toybox', which is here."
    return Check("base", False, found, fix)
