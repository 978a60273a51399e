"""Check whether this machine can train a base, and say what to do if it cannot."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreambooth_lib.core.config import base_defaults
from dreambooth_lib.core.encoder_revisions import revision_of
from dreambooth_lib.core.errors import KitError
from dreambooth_lib.core.gpu_memory import GIB
from dreambooth_lib.core.hub_token import hub_token, in_colab
from dreambooth_lib.families import hub_files, loading, one_file
from dreambooth_lib.families.one_file_header import read_header
from dreambooth_lib.figures import labels
from dreambooth_lib.notebook import install
from dreambooth_lib.notebook.base_models import describe
from dreambooth_lib.notebook.will_it_fit import KINDS, Recommendation, recommend
from dreambooth_lib.training.memory_level import USABLE_SHARE
from dreambooth_lib.training.native_precision import native_precision

PYTHON = (3, 11)  #: the oldest version that the kit supports
#: Seconds after which the Hub counts as not answering.
TIMEOUT = 5.0


@dataclass(frozen=True)
class Check:
    """One check and its result."""

    name: str
    ok: bool
    result: str
    fix: str = ""  #: one sentence on what to do; empty if the check passed


class NotReady(KitError, RuntimeError):
    """A machine that failed a check."""


@dataclass(frozen=True)
class Table:
    """Checks as a table in a notebook and as text elsewhere; each row says whether it passed."""

    checks: Sequence[Check]

    def check(self) -> None:
        """Raise :class:`NotReady` if a check failed."""
        failed = [check.name for check in self.checks if not check.ok]
        if failed:
            raise NotReady(
                f"this machine is not ready ({', '.join(failed)}); follow the red lines of the "
                "table, or set SKIP_CHECKS = True to continue anyway."
            )

    def _cells(self) -> list[tuple[bool, str, Sequence[str]]]:
        words = {True: "ok", False: "to fix"}
        return [(c.ok, words[c.ok], (c.name, c.result, c.fix)) for c in self.checks]

    def __repr__(self) -> str:
        lines = []
        for ok, word, (name, result, fix) in self._cells():
            lines.append(f"{f'{labels.sign(ok)} {word}':8}  {name:13}  {result}")
            lines += [f"{'':8}  {'':13}  -> {fix}"] if fix else []
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return labels.html_table(("check", "result", "what to do"), self._cells())


def preflight(
    base: str,
    folder: str | Path,
    drive: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    resume: bool | str = True,
) -> list[Check]:
    """Check what a run on ``base`` in ``folder`` needs, and say how to fix what is missing.

    ``drive`` is where the run will be backed up, if anywhere. The space of an interrupted run on
    this base there and in ``folder``, the largest, counts as free, unless ``resume`` is False; if
    it is a name, that of the run of this name. The method is the one that :func:`recommend`
    returns; ``settings``, fields of a config, may restrict it. Nothing is downloaded, written or
    changed; the Hub is asked for two headers. While packages are missing, only the checks that need
    none of them are made.
    """
    plan = install.missing_packages(install.required(), install.installed())
    checks = [_python(), _packages(plan)]
    if plan.missing:
        return checks
    best = recommend(base, folder, drive, settings, resume)
    gpu = best.free.gpu is not None
    checks.append(_gpu(best.large))
    if gpu:
        checks.append(_optimizer())
    if gpu or best.large:
        checks.append(_method(base, best))
    if best.needs is not None:
        relevant = {"gpu": gpu, "memory": True, "disk": True, "drive": drive is not None}
        folders = {"disk": Path(folder).resolve(), "drive": Path(drive or "")}
        checks += [_resource(kind, best, folders.get(kind)) for kind in KINDS if relevant[kind]]
    distilled = (settings or {}).get("draw_base")
    drawing = [] if distilled is None else [_base(distilled, "draw_base")]
    return [*checks, _base(base), *drawing, *_scorers(base, settings or {})]


def _python() -> Check:
    version, oldest = (".".join(map(str, parts)) for parts in (sys.version_info[:3], PYTHON))
    fix = f"Use Python {oldest} or newer; on Colab, choose the latest runtime version."
    ok = sys.version_info >= PYTHON
    return Check("Python", ok, version, "" if ok else fix)


def _packages(plan: install.Plan) -> Check:
    result, fix = "all required packages are installed", ""
    if plan.missing:
        result = f"missing: {', '.join(plan.missing)}"
        fix = (
            "Run dreambooth_lib.notebook.install.install_missing(), which changes no other package."
        )
    elif plan.too_old:
        old = (f"{requirement} (here {version})" for requirement, version in plan.too_old.items())
        names = " ".join(f"'{requirement}'" for requirement in plan.too_old)
        result = f"too old: {', '.join(old)}"
        fix = f"Run pip install -U {names} and restart the session."
    return Check("packages", not fix, result, fix)


def _gpu(large: bool) -> Check:
    import torch

    if torch.cuda.is_available():
        precision = native_precision("auto", torch.device("cuda"))
        native = "native bf16" if precision == "bf16" else "fp16 (no native bf16)"
        return Check("GPU", True, f"{torch.cuda.get_device_name()}, {native}")
    if not large:
        return Check("GPU", True, "none; training runs on the CPU")
    t4 = "Choose Runtime > Change runtime type > T4 GPU"
    machine = t4 if in_colab() else "Use a machine with an NVIDIA GPU"
    result = "none, and this base would take days to train on a CPU"
    return Check("GPU", False, result, f"{machine}, or train the base 'toybox'.")


def _method(base: str, best: Recommendation) -> Check:
    if best.needs is None:
        result = f"'{base}' does not work in float16, and this GPU has no bfloat16"
        fix = "Use a GPU with bfloat16 (L4, A100 or newer), or choose another base."
        if best.reason:
            return _refused("method", best.reason)
        return Check("method", False, result, fix)
    similar = describe(base)
    result = f"{best.needs.method}, memory level '{best.needs.level}'"
    result += f", assuming that '{base}' is as large as {similar.name}" if similar.guess else ""
    if not best.needs.shortages(best.free):
        return Check("method", True, f"{result}; {best.reason}" if best.reason else result)
    result = f"none fits; the closest is {result}, but {best.needs.describe_shortage(best.free)}"
    return Check("method", False, result, "Follow the red lines below, or choose a smaller base.")


def _optimizer() -> Check:
    try:
        from bitsandbytes.optim import AdamW8bit  # noqa: F401
    except Exception as error:  # a broken native library raises whatever its loader raises
        result = f"bitsandbytes cannot be loaded ({type(error).__name__}: {error})"
        fix = "Run 'pip install -U bitsandbytes', or set optimizer to 'adamw' if GPU memory allows."
        return Check("8-bit AdamW", False, result, fix)
    return Check("8-bit AdamW", True, "bitsandbytes loads")


def _resource(kind: str, best: Recommendation, folder: Path | None) -> Check:
    """Check one of :data:`KINDS`; ``folder`` is where the disk or Drive space is needed."""
    need, free, total = (getattr(part, kind) for part in (best.needs, best.free, best.total))
    fix = {
        "gpu": "Restart the session to free it, or choose a GPU with more memory.",
        "memory": "Restart the session or close other programs to free RAM.",
        "disk": f"Delete runs and models that you no longer need, or use a folder other than "
        f"{folder}.",
        "drive": "Free space on Drive and empty its trash, or set DRIVE = False; a disconnect then "
        "loses the run.",
    }[kind]
    if free is None:
        return Check(KINDS[kind], False, f"{folder} does not answer", fix)
    if not best.total.has(kind, need):
        more = "Use a machine with more RAM, or choose a smaller base."
        if in_colab():
            more = "Choose Runtime > Change runtime type > High-RAM, or a smaller base."
        gpu = "Choose a GPU with more memory, or leave method and memory out of SETTINGS."
        fix = {"gpu": gpu, "memory": more}.get(kind, fix)
    ok = best.free.has(kind, need)
    usable = f" ({USABLE_SHARE:.0%} of it usable)" if kind == "gpu" and not ok else ""
    interrupted = best.free.interrupted.get(kind, 0)
    more = f" + {interrupted / GIB:.1f} of an interrupted run" if interrupted else ""
    room = f"{(free - interrupted) / GIB:.1f} of {total / GIB:.1f} GiB free{usable}{more}"
    result = f"{room}, about {need / GIB:.1f} needed"
    return Check(KINDS[kind], ok, result, "" if ok else fix)


def _base(base: str, name: str = "base") -> Check:
    """Check a base to train, or the distilled one that draws."""
    try:
        file = one_file.parse(base)
        unread = file is not None and one_file.find(file) is None
        path = "" if unread else loading.locate(base)
        warning = loading.warn_of_distillation(base) if name == "base" else None
        advice = f". {warning}" if warning else ""
        if file is not None and unread:
            return _one_file(name, base, file, advice)
    except KitError as error:
        return _refused(name, error)
    if Path(path).exists():
        return Check(name, True, f"'{base}' is on this machine{advice}")
    return _on_hub(name, base, "model_index.json", advice)


def _one_file(name: str, base: str, file: one_file.OneFile, advice: str) -> Check:
    """Check a base in one file that was not unpacked yet, by its header if it is here."""
    if (path := one_file.local_file(file)) is not None:
        what = f"'{base}' is on this machine ({read_header(path, file.name)})"
        return Check(name, True, f"{what}; its first run unpacks it{advice}")
    if file.repository is not None:
        return _on_hub(name, file.repository, file.file, advice, file.revision or "main")
    return Check(name, True, f"'{file.name}' will be downloaded by its link{advice}")


def _refused(name: str, error: KitError | str) -> Check:
    """Return a failed check of an error's sentence: what is wrong, and what to do."""
    result, _, fix = str(error).partition("; ")
    return Check(name, False, result, f"{fix[:1].upper()}{fix[1:]}")


def _scorers(base: str, settings: Mapping[str, Any]) -> list[Check]:
    """Check the encoders that score validation images, unless the run has none."""
    if settings.get("validate_every") == 0:
        return []
    own, defaults = settings.get("scorer"), base_defaults(base)
    scorer = own or defaults["scorer"]
    images = settings.get("image_scorer") or own or defaults["image_scorer"]
    checks = [_encoder("scorer", scorer)]
    return checks if images == scorer else [*checks, _encoder("image scorer", images)]


def _encoder(name: str, scorer: str) -> Check:
    if scorer == "toybox":
        return Check(name, True, "the bundled one")
    if Path(scorer).exists():
        ok = (Path(scorer) / "config.json").exists() and any(Path(scorer).glob("[!.]*.safetensors"))
        if ok:
            return Check(name, True, f"'{scorer}' is on this machine")
        result = f"'{scorer}' has no config.json, or no weights in safetensors"
        return Check(name, False, result, "Give an encoder by Hub id or folder.")
    return _on_hub(name, scorer, "config.json", revision=revision_of(scorer))


def _on_hub(
    name: str, repository: str, file: str, advice: str = "", revision: str = "main"
) -> Check:
    """Check that a repository on the Hub has a file, or is in the local cache as a whole."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError

    result = f"'{repository}' cannot be downloaded from the Hub"
    try:
        url = hf_hub_url(repository, file, revision=revision)
        token = hub_token(ask_again=name == "base")  # once for a table, which begins with it
        get_hf_file_metadata(url, token=token or False, timeout=TIMEOUT)
        return Check(name, True, f"'{repository}' is on the Hub{advice}")
    except EntryNotFoundError:
        result = f"'{repository}' is on the Hub but has no {file}"
        return Check(name, False, result, f"Choose a {name} that has one.")
    except KitError as error:  # on the token
        return _refused(name, error)
    except Exception as error:  # the Hub's client raises many types for the same problem
        if _is_cached(repository, file, revision):
            result = f"'{repository}' is in the local cache; the Hub does not answer{advice}"
            return Check(name, True, result)
        fix = hub_files.what_to_do(error, repository)
        result += f" ({type(error).__name__})"
        return Check(name, False, result, f"{fix[:1].upper()}{fix[1:]}.")


def _is_cached(repository: str, file: str, revision: str) -> bool:
    """Return whether the local cache has a file of the Hub and, beside it, the model's weights."""
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(repository, file, revision=revision)
    if not isinstance(cached, str):
        return False
    folder = Path(cached).parent
    if file == "model_index.json":
        try:
            folder /= loading.resolve(str(folder)).family.denoiser_name
        except KitError:  # of no family that the kit knows, or damaged
            return False
    return any(folder.glob("[!.]*.safetensors"))
