"""Runs taken back after a disconnect: found among runs and mirrors, chosen, and restored."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import chain, count
from pathlib import Path

from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.core.files import copy_file, retry, visible_files
from dreambooth_lib.core.old_names import PLACES
from dreambooth_lib.data.images import read_pictures
from dreambooth_lib.notebook.drive_backup import IDENTITY, notes
from dreambooth_lib.training import runs
from dreambooth_lib.training.runs import Run, RunError


class RestoreError(RuntimeError):
    """A run that could not be read back; nothing was restored."""


@dataclass(frozen=True)
class FoundRun:
    """A run that was found, as far as it has come."""

    run: Run
    identity: str  #: by which a run and its mirrors are known for one
    step: int  #: of its newest checkpoint, from which it goes on
    finished: bool
    when: datetime  #: when it was last written

    def __str__(self) -> str:
        done = f"step {self.step} of {self.run.config.steps}"
        return f"{self.run.folder}: {done}, last written {self.when:%Y-%m-%d %H:%M} UTC"


def restore(folder: str | Path, local: str | Path) -> Run:
    """Take a mirrored run back to ``local``, a new folder, with its pictures; return the run.

    Its config then names the pictures that came with it. Raises :class:`RunError` where there is
    no run or ``local`` holds something already, and :class:`MirrorError` where a file cannot be
    read or written; nothing is left in ``local`` then.
    """
    from dreambooth_lib.core.files import replacing_folder

    folder, local = Path(folder), Path(local).resolve()
    if local.exists() and any(local.iterdir()):
        raise RunError(f"{local} is not empty; restore the run to a new folder.")
    try:
        if not (folder / "config.toml").exists():
            raise RunError(f"{folder} is not a run: it has no config.toml; check the path.")
        with replacing_folder(local) as partial:
            _take(folder, partial, local)
    except OSError as error:
        raise RestoreError(
            f"{folder} could not be restored to {local} ({error}); see that the drive is mounted "
            "and the disk has room, and try again."
        ) from error
    return runs.resume(local)


def find_interrupted(
    go_on: bool | str,
    folders: Sequence[str | Path | None],
    pictures: str | Path | None,
    class_noun: str,
    base: str,
) -> tuple[FoundRun | None, str]:
    """Return the newest unfinished run of these pictures, noun and base, and a sentence on it.

    Where there is none, or ``go_on`` is False, it is None, and the sentence says which run is left
    alone, and why. With a run's name as ``go_on`` it is that one, whatever it is of. Of a run and
    its mirror it is the one that is further, or else the one in the earlier folder. A folder that
    is None or not there, as Drive may be, holds none. Pictures that are None, or gone as after a
    disconnect, tell nothing.
    """
    named = isinstance(go_on, str)
    said = f"There is no unfinished run called {go_on!r}.\n" if named else ""
    found = [run for run in _all(folders) if go_on and not run.finished]
    for run in sorted(found, key=lambda run: run.when, reverse=True):
        name = run.run.folder.name
        other = "" if named else _other(run.run, pictures, class_noun, base)
        if name == go_on or not (named or other):
            return run, f"Going on with {run}"
        said = said or f"Left alone: {run}; {other}: RESUME = {name!r} goes on with it.\n"
    return None, f"{said}Beginning a new run."


def fetch(found: FoundRun, folder: str | Path, drive: str | Path | None = None) -> Run:
    """Return the run itself where it lies in ``folder``, else :func:`restore` it to there.

    Its name there is its own, or one that is free in both where another run has that.
    """
    run, folder = found.run, Path(folder)
    if run.folder.parent == folder:
        return run
    name = run.folder.name
    if (folder / name).exists():
        name = unique_name(name, folder, drive)
    return restore(run.folder, folder / name)


def has_finished(folder: Path) -> bool:
    """Return whether the run in a folder, or the run that it mirrors, has come to its end.

    A mirror may lack the pipeline that a run ends with, and says it of itself.
    """
    return (folder / "pipeline").exists() or bool((notes(folder) or {}).get("finished"))


def unique_name(name: str, *folders: str | Path | None) -> str:
    """Return the name, numbered where something in these folders has it, or a zip there."""
    places = {path.name for path in _inside(folders)}
    taken = places | {place.removesuffix(".zip") for place in places}
    numbered = (f"{name}-{number}" for number in count(2))
    return next(free for free in chain([name], numbered) if free not in taken)


def _take(folder: Path, partial: Path, local: Path) -> None:
    known = notes(folder) or {"parts": {}}
    stamps = known["parts"].items()
    times = {Path(part) / name: time for part, stamp in stamps for name, _, time, *_ in stamp}
    for name in retry(visible_files, folder):
        # Class images are shared by all runs that lie beside each other.
        shared = name.parts[0] in ("class_images", PLACES["class_images"])
        place = (local.parent if shared else partial) / name
        if place.exists():
            continue
        retry(copy_file, folder / name, place)
        if name in times:  # else the next mirroring would copy it again
            os.utime(place, ns=(times[name], times[name]))
    if "identity" in known:
        (partial / IDENTITY).write_text(known["identity"])
    config = TrainConfig.from_toml(partial / "config.toml")
    own = config.class_folder
    pictures = _taken("photos", config.subject.pictures, partial, local)
    class_folder = own and _taken("class_photos", own, partial, local)
    subject = replace(config.subject, pictures=pictures)
    runs.resume(partial, subject=subject, class_folder=class_folder)


def _taken(name: str, source: str, partial: Path, local: Path) -> str:
    """Return where pictures are that came from ``source``, a folder or a zip, if mirrored."""
    zipped = Path(name) / Path(source).name
    for place in (zipped, Path(name)):
        if (partial / place).exists():
            return str(local / place)
    return source


def _all(folders: Sequence[str | Path | None]) -> list[FoundRun]:
    """Return every run in these folders once: of it and its mirrors the furthest."""
    copies: dict[str, list[FoundRun]] = {}
    for place in _inside(folders):
        if (run := _found(place)) is not None:
            copies.setdefault(run.identity, []).append(run)
    return [max(of, key=lambda run: (run.step, run.finished, run.when)) for of in copies.values()]


def _inside(folders: Sequence[str | Path | None]) -> list[Path]:
    places: list[Path] = []
    for folder in folders:
        try:
            places += sorted(Path(folder).iterdir()) if folder is not None else []
        except OSError:  # there is none, or a drive is gone
            continue
    return places


def _found(folder: Path) -> FoundRun | None:
    try:
        run = runs.resume(folder)
        known = notes(folder) or {"parts": {}}
        word, stamps = folder / IDENTITY, known["parts"]
        identity = known.get("identity") or (word.read_text() if word.exists() else str(folder))
        files = [file for name in ("config.toml", "log.jsonl") if (file := folder / name).exists()]
        # A drive has no times but its own, so a mirror keeps the run's.
        times = [stamps[file.name][0][2] if file.name in stamps else file.stat().st_mtime_ns
                 for file in files]  # fmt: skip
        return FoundRun(
            run,
            identity,
            step=max(run.checkpoints(), default=0),
            finished=run.finished or known.get("finished", False),
            when=datetime.fromtimestamp(max(times) / 1e9, UTC),
        )
    except (OSError, ValueError):  # no run, or not one that can be gone on with
        return None


def _other(run: Run, pictures: str | Path | None, class_noun: str, base: str) -> str:
    """Return what a run is of that was not asked for, in words; empty where it is all the same."""
    subject = run.config.subject
    own = {"base": run.config.base, "class noun": subject.class_noun}
    asked = {"base": runs.absolute_base(base), "class noun": class_noun.strip()}
    if difference := runs.first_difference(own, asked):
        return f"its {difference}"
    if pictures is None or not Path(pictures).exists():
        return ""
    same = _content(_taken("photos", subject.pictures, run.folder, run.folder))
    return "" if same == _content(pictures) else f"its pictures are not those in {pictures}"


def _content(pictures: str | Path) -> list[str] | None:
    """Return what is in pictures, whatever they are called; None where they cannot be read."""
    try:
        photos = read_pictures(pictures)
    except (OSError, ValueError):
        return None
    return sorted(hashlib.sha256(photo.image.tobytes()).hexdigest() for photo in photos)
