"""A run kept in a second place, such as Drive, and taken back from there after a disconnect.

MIRROR/...                 the run's folder without what is hidden
MIRROR/photos/             the subject's pictures: an upload is gone with the session, too
MIRROR/class_photos/       the user's own class pictures
MIRROR/class_pictures/     the sets that the base drew for this class
MIRROR/.mirror.json        whose copy it is, and each part's files, sizes and times at the run

A file, a checkpoint and the pipeline each appear when they are whole: they are written beside and
renamed. Whatever is cut short, the mirror holds a run that can go on.
"""

import json
import os
import shutil
import uuid
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dreambooth_lib import runs
from dreambooth_lib.config import TrainConfig
from dreambooth_lib.copies import again, copy, copy_file, is_there, shown, stamp_of
from dreambooth_lib.runs import Run, RunError

STATE = ".mirror.json"  # in the mirror
IDENTITY = ".mirror"  # at the run: the word that its mirror knows it by


class MirrorError(RuntimeError):
    """A run that could not be read back; nothing was restored."""


@dataclass(frozen=True)
class Found:
    """A run that was found, as far as it has come."""

    run: Run
    step: int  #: of its newest checkpoint, from which it goes on
    finished: bool
    when: datetime  #: when it was last written

    def __str__(self) -> str:
        steps = self.run.config.steps
        done = f"finished, {self.step} steps" if self.finished else f"step {self.step} of {steps}"
        return f"{self.run.folder}: {done}, last written {self.when:%Y-%m-%d %H:%M} UTC"


def mirror(run: Run, folder: str | Path) -> str | None:
    """Copy what is new of a run to ``folder``; gives None, or a sentence on what did not work.

    Call it as often as you like while training: what is there already costs a look at its size, and
    what a drive fails at is tried again, then left to the next call; it never raises for that. A
    checkpoint that the run has dropped goes once one that it still has is whole there. ``folder``
    is made, but not what it lies in, so that nothing is written where a drive is not mounted. A
    folder that holds something else, such as another run, is left alone.
    """
    folder = Path(folder)
    try:
        known = again(_known, folder, _identity(run))
        if known is None:
            return f"{folder} holds something else than this run; mirror it to another folder."
        failures = _copy_parts(run, folder, known)
        again(_write, folder, known)
    except (OSError, ValueError) as error:
        failures = [str(error)]
    if not failures:
        return None
    return (
        f"{run.folder} is not all in {folder} yet ({failures[0]}); training goes on, and the next "
        "call tries again: if it keeps failing, see whether the drive is full or gone."
    )


def hand_over(file: Path, folder: Path) -> str | None:
    """Copy a file into a mounted folder; None, or a sentence on why it is not there."""
    try:
        again(copy_file, file, folder / file.name)
    except OSError as error:
        return (
            f"{file} could not be copied to {folder} ({error}); it is still here: see whether the "
            "drive is full or gone, and run this again."
        )
    return None


def restore(folder: str | Path, local: str | Path) -> Run:
    """Take a mirrored run back to ``local``, a new folder, with its pictures; gives the run.

    Its config then names the pictures that came with it. Raises :class:`RunError` where there is
    no run or ``local`` holds something already, and :class:`MirrorError` where a file cannot be
    read or written; nothing is left in ``local`` then.
    """
    from dreambooth_lib.state import replacing_folder

    folder, local = Path(folder), Path(local).resolve()
    if local.exists() and any(local.iterdir()):
        raise RunError(f"{local} is not empty; restore the run to a new folder.")
    try:
        if not (folder / "config.toml").exists():
            raise RunError(f"{folder} is not a run: it has no config.toml; check the path.")
        with replacing_folder(local) as partial:
            _take(folder, partial, local)
    except OSError as error:
        raise MirrorError(
            f"{folder} could not be restored to {local} ({error}); see that the drive is mounted "
            "and the disk has room, and try again."
        ) from error
    return runs.resume(local)


def newest_run(*folders: str | Path | None, like: TrainConfig | None = None) -> Found | None:
    """The newest run in these folders that has not finished, else the newest; None if none.

    Of a run and its mirror it is the one that is further, or else the one in the earlier folder.
    With ``like`` only runs of its base and of a subject of its name and class noun count. A folder
    that is None or not there, as Drive may be, holds none.
    """
    furthest: dict[str, Found] = {}
    for place in [p for folder in folders if folder is not None for p in _inside(Path(folder))]:
        run = _found(place)
        if run is None or (like is not None and not _alike(run.run.config, like)):
            continue
        known = furthest.setdefault(_word_of(place), run)
        if (run.finished, run.step, run.when) > (known.finished, known.step, known.when):
            furthest[_word_of(place)] = run
    return max(furthest.values(), key=lambda run: (not run.finished, run.when), default=None)


def _alike(one: TrainConfig, other: TrainConfig) -> bool:
    kinds = [(c.base, c.subject.name, c.subject.class_noun) for c in (one, other)]
    return kinds[0] == kinds[1]


def _word_of(folder: Path) -> str:
    """What a run and its mirror have in common, and no other."""
    file = folder / IDENTITY
    known = _read(folder) if not file.exists() else {"identity": file.read_text()}
    return known["identity"] if known else str(folder)


def _copy_parts(run: Run, folder: Path, known: dict[str, Any]) -> list[str]:
    stamps, parts = known["parts"], _parts(run)
    failures: list[str] = []
    for name, source in parts.items():
        stamp, place = stamp_of(source), folder / name
        try:
            if stamps.get(name) != stamp or not is_there(place, stamp):
                again(copy, source, place, patient=not failures)
                stamps[name] = stamp
            if place.parent.name == "checkpoints":
                _drop(folder, parts, stamps)
        except OSError as error:
            failures.append(str(error))
    return failures


def _parts(run: Run) -> dict[str, Path]:
    """Files, and folders that are copied whole, by their place in the mirror.

    In the order in which a mirror that is cut short can be gone on with: pictures before the rows
    that tell of them, those before the config that makes a folder a run, the newest weights first.
    """
    config = run.config
    parts = _pictures(config.subject.pictures, "photos")
    if config.class_folder is not None:
        parts |= _pictures(config.class_folder, "class_photos")
    for manifest in sorted(run.folder.parent.glob("class_pictures/*/manifest.json")):
        made_by = json.loads(manifest.read_text())
        if (made_by["base"], made_by["prompt"]) == (config.base, config.subject.class_prompt):
            parts |= _pictures(str(manifest.parent), f"class_pictures/{manifest.parent.name}")
    files = [p for p in shown(run.folder) if p.parts[0] not in ("checkpoints", "pipeline")]
    files.sort(key=lambda path: (len(path.parts), path), reverse=True)
    whole = [run.pipeline] if run.pipeline.exists() else []
    whole += reversed(run.checkpoints().values())
    names = files + [path.relative_to(run.folder) for path in whole]
    return parts | {name.as_posix(): run.folder / name for name in names}


def _pictures(source: str, place: str) -> dict[str, Path]:
    path = Path(source)
    files = [path] if path.is_file() else sorted(path.glob("[!.]*"))
    return {f"{place}/{file.name}": file for file in files if file.is_file()}


def _drop(folder: Path, parts: dict[str, Path], stamps: dict[str, Any]) -> None:
    """Remove checkpoints and a pipeline that the run has no more, and their half-made copies."""
    for path in [*(folder / "checkpoints").iterdir(), folder / "pipeline"]:
        name = path.relative_to(folder).as_posix()
        if name not in parts and path.is_dir():
            shutil.rmtree(path)
            stamps.pop(name, None)


def _identity(run: Run) -> str:
    """The run's own word, so that another run of the same name does not overwrite its mirror."""
    from dreambooth_lib.state import replace_file

    file = run.folder / IDENTITY
    if not file.exists():
        replace_file(file, uuid.uuid4().hex.encode())
    return file.read_text()


def _known(folder: Path, identity: str) -> dict[str, Any] | None:
    """What the mirror says of itself, begun where nothing is; None if it is not this run's."""
    folder.mkdir(exist_ok=True)
    known = _read(folder)
    # A first write that failed may have left its hidden part.
    if known is None and not any(path.name[0] != "." for path in folder.iterdir()):
        known = {"identity": identity, "parts": {}}
        _write(folder, known)
    return known if known and known["identity"] == identity else None


def _read(folder: Path) -> dict[str, Any] | None:
    file = folder / STATE
    try:
        return json.loads(file.read_text()) if file.exists() else None
    except ValueError:  # damaged: what it was kept for is lost, but not the run
        return None


def _write(folder: Path, known: dict[str, Any]) -> None:
    from dreambooth_lib.state import replace_file

    replace_file(folder / STATE, json.dumps(known).encode())


def _take(folder: Path, partial: Path, local: Path) -> None:
    known = _read(folder) or {"parts": {}}
    stamps = known["parts"].items()
    times = {Path(part) / name: time for part, stamp in stamps for name, _, time in stamp}
    for name in again(shown, folder):
        shared = name.parts[0] == "class_pictures"  # by all runs that lie beside each other
        place = (local.parent if shared else partial) / name
        if place.exists():
            continue
        again(copy_file, folder / name, place)
        if name in times:  # else the next mirroring would copy it again
            os.utime(place, ns=(times[name], times[name]))
    if "identity" in known:
        (partial / IDENTITY).write_text(known["identity"])
    config = TrainConfig.from_toml(partial / "config.toml")
    pictures = _taken("photos", config.subject.pictures, partial, local)
    class_folder = config.class_folder and _taken(
        "class_photos", config.class_folder, partial, local
    )
    subject = replace(config.subject, pictures=pictures)
    runs.resume(partial, subject=subject, class_folder=class_folder)


def _taken(name: str, source: str, partial: Path, local: Path) -> str:
    """Where pictures are that came from ``source``, a folder or a zip, if they were mirrored."""
    zipped = Path(name) / Path(source).name
    for place in (zipped, Path(name)):
        if (partial / place).exists():
            return str(local / place)
    return source


def _inside(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:  # there is none, or a drive is gone
        return []


def _found(folder: Path) -> Found | None:
    try:
        run = runs.resume(folder)
        files = [run.folder / name for name in ("config.toml", "log.jsonl")]
        stamps = (_read(folder) or {"parts": {}})["parts"]
        # A drive has no times but its own, so a mirror keeps the run's.
        times = [stamps[f.name][0][2] if f.name in stamps else f.stat().st_mtime_ns
                 for f in files if f.exists()]  # fmt: skip
        return Found(
            run,
            step=max(run.checkpoints(), default=0),
            finished=run.finished,
            when=datetime.fromtimestamp(max(times) / 1e9, UTC),
        )
    except (OSError, ValueError):  # no run, or not one that can be gone on with
        return None
