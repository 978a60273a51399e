"""Find interrupted runs and backups after a disconnect, and restore one."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import chain, count
from pathlib import Path

from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.core.errors import KitError
from dreambooth_lib.core.files import copy_file, replacing_folder, retry, visible_files
from dreambooth_lib.core.old_names import PLACES
from dreambooth_lib.data.images import read_photos
from dreambooth_lib.notebook.drive_backup import IDENTITY, read_identity, read_state
from dreambooth_lib.training import config_changes, runs
from dreambooth_lib.training.runs import Run, RunError


class RestoreError(KitError, RuntimeError):
    """A backup that could not be read; nothing was restored."""


@dataclass(frozen=True)
class FoundRun:
    """A run or its backup, and how far it has come."""

    run: Run
    identity: str  #: shared by a run and its backups
    step: int  #: of its newest checkpoint, from which it resumes
    finished: bool
    last_saved: datetime

    def __str__(self) -> str:
        progress = f"step {self.step} of {self.run.config.steps}"
        return f"{self.run.folder}: {progress}, last saved {self.last_saved:%Y-%m-%d %H:%M} UTC"


def restore(folder: str | Path, local: str | Path) -> Run:
    """Restore a backup and its photos to ``local``, a new folder; return the run.

    Its config then names the photos that came with it. Raises :class:`RunError` if there is no run
    or ``local`` is not empty, and :class:`RestoreError` if a file cannot be read or written;
    nothing is left in ``local`` then.
    """
    folder, local = Path(folder), Path(local).resolve()
    if local.exists() and any(local.iterdir()):
        raise RunError(f"{local} is not empty; restore the run to a new folder.")
    try:
        if not (folder / "config.toml").exists():
            raise RunError(f"{folder} is not a run: it has no config.toml; check the path.")
        with replacing_folder(local) as partial:
            _copy_back(folder, partial, local)
    except OSError as error:
        raise RestoreError(
            f"{folder} could not be restored to {local} ({error}); check that the drive is mounted "
            "and the disk has space, and try again."
        ) from error
    return runs.resume(local)


def find_interrupted(
    resume: bool | str,
    folders: Sequence[str | Path | None],
    pictures: str | Path | None,
    class_noun: str,
    base: str,
) -> tuple[FoundRun | None, str]:
    """Return the newest unfinished run of these photos, noun and base, and a sentence on it.

    If there is none, or ``resume`` is False, the run is None and the sentence says which run is
    not resumed, and why. If ``resume`` is a run's name, it is that run, whatever it was trained
    on. Of a run and its backups it is the one that is furthest, or else the one in the earlier
    folder. Folders that are None or missing, as Drive may be, are skipped, and so is the
    comparison of photos that are None, or missing as after a disconnect.
    """
    named = isinstance(resume, str)
    message = f"There is no unfinished run named {resume!r}.\n" if named else ""
    unfinished = [run for run in _all_runs(folders) if resume and not run.finished]
    for run in sorted(unfinished, key=lambda run: run.last_saved, reverse=True):
        name = run.run.folder.name
        difference = "" if named else _difference(run.run, pictures, class_noun, base)
        if name == resume or not (named or difference):
            return run, f"Resuming {run}"
        hint = f"set RESUME = {name!r} to resume it."
        message = message or f"Not resumed: {run}; {difference}; {hint}\n"
    return None, f"{message}Starting a new run."


def fetch(found: FoundRun, folder: str | Path, drive: str | Path | None = None) -> Run:
    """Return a run that is in ``folder``, or :func:`restore` its backup there.

    It keeps its name, unless another run in ``folder`` has it: then it gets one that neither
    ``folder`` nor ``drive`` has.
    """
    run, folder = found.run, Path(folder)
    if run.folder.parent == folder:
        return run
    name = run.folder.name
    if (folder / name).exists():
        name = unique_name(name, folder, drive)
    return restore(run.folder, folder / name)


def has_finished(folder: Path) -> bool:
    """Return whether the run in a folder, or the run that it backs up, has finished.

    A backup may lack the pipeline that a run ends with; its state says whether the run finished.
    """
    return (folder / "pipeline").exists() or bool((read_state(folder) or {}).get("finished"))


def unique_name(name: str, *folders: str | Path | None) -> str:
    """Return the name, with a number if these folders have a folder or a zip of that name."""
    names = {path.name for path in _contents(folders)}
    taken = names | {name.removesuffix(".zip") for name in names}
    numbered = (f"{name}-{number}" for number in count(2))
    return next(free for free in chain([name], numbered) if free not in taken)


def _copy_back(folder: Path, partial: Path, local: Path) -> None:
    state = read_state(folder) or {"parts": {}}
    stamps = state["parts"].items()
    times = {Path(part) / name: time for part, stamp in stamps for name, _, time, *_ in stamp}
    for name in retry(visible_files, folder):
        # Class images are shared by all runs in the same folder.
        shared = name.parts[0] in ("class_images", PLACES["class_images"])
        place = (local.parent if shared else partial) / name
        if place.exists():
            continue
        retry(copy_file, folder / name, place)
        if name in times:  # or the next backup would copy it again
            os.utime(place, ns=(times[name], times[name]))
    if "identity" in state:
        (partial / IDENTITY).write_text(state["identity"])
    config = TrainConfig.from_toml(partial / "config.toml")
    original = config.class_folder
    pictures = _backed_up("photos", config.subject.pictures, partial, local)
    class_folder = original and _backed_up("class_photos", original, partial, local)
    subject = replace(config.subject, pictures=pictures)
    runs.resume(partial, subject=subject, class_folder=class_folder)


def _backed_up(name: str, source: str, partial: Path, local: Path) -> str:
    """Return where a backup has the photos of ``source``, a folder or a zip; or ``source``."""
    for place in (Path(name) / Path(source).name, Path(name)):  # a zip, or else a folder
        if (partial / place).exists():
            return str(local / place)
    return source


def _all_runs(folders: Sequence[str | Path | None]) -> list[FoundRun]:
    """Return every run in these folders once: of the run and its backups the furthest."""
    copies: dict[str, list[FoundRun]] = {}
    for place in _contents(folders):
        if (run := _read_run(place)) is not None:
            copies.setdefault(run.identity, []).append(run)
    return [max(c, key=lambda run: (run.step, run.finished, run.last_saved))
            for c in copies.values()]  # fmt: skip


def _contents(folders: Sequence[str | Path | None]) -> list[Path]:
    paths: list[Path] = []
    for folder in folders:
        try:
            paths += sorted(Path(folder).iterdir()) if folder is not None else []
        except OSError:  # a missing folder, or a drive that is gone
            continue
    return paths


def _read_run(folder: Path) -> FoundRun | None:
    try:
        run = runs.resume(folder)
        state = read_state(folder) or {"parts": {}}
        stamps = state["parts"]
        files = [file for name in ("config.toml", "log.jsonl") if (file := folder / name).exists()]
        # Drive sets its own file times, so a backup's state has those of the run.
        times = [stamps[file.name][0][2] if file.name in stamps else file.stat().st_mtime_ns
                 for file in files]  # fmt: skip
        return FoundRun(
            run,
            identity=state.get("identity") or read_identity(folder) or str(folder),
            step=max(run.checkpoints(), default=0),
            finished=run.finished or state.get("finished", False),
            last_saved=datetime.fromtimestamp(max(times) / 1e9, UTC),
        )
    except (OSError, ValueError):  # not a run, or not one that can be resumed
        return None


def _difference(run: Run, pictures: str | Path | None, class_noun: str, base: str) -> str:
    """Say in words how a run's base, noun or photos differ from these; empty if they do not."""
    subject = run.config.subject
    before = {"base": run.config.base, "class noun": subject.class_noun}
    now = {"base": config_changes.absolute_base(base), "class noun": class_noun.strip()}
    if difference := config_changes.first_difference(before, now):
        return f"its {difference}"
    if pictures is None or not Path(pictures).exists():
        return ""
    same = _hashes(_backed_up("photos", subject.pictures, run.folder, run.folder))
    return "" if same == _hashes(pictures) else f"its photos are not those in {pictures}"


def _hashes(pictures: str | Path) -> list[str] | None:
    """Return the hashes of photos, whatever their names; None if they cannot be read."""
    try:
        photos = read_photos(pictures)
    except (OSError, ValueError):
        return None
    return sorted(hashlib.sha256(photo.image.tobytes()).hexdigest() for photo in photos)
