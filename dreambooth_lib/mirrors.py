"""A run kept in a second place, such as Drive, and taken back from there after a disconnect.

MIRROR/...                 the run's folder without what is hidden; of its checkpoints the newest
                           and the best, as a drive has little room; large ones have their weights
                           in float16, and the pipeline that follows from these is left out
MIRROR/photos/             the subject's pictures: an upload is gone with the session, too
MIRROR/class_photos/       the user's own class pictures
MIRROR/class_pictures/     the sets that the base drew for this class
MIRROR/.mirror.json        whose copy it is, whether the run has finished, and each part's files:
                           size and time at the run, and size here

A file, a checkpoint and the pipeline each appear when they are whole: they are written beside and
renamed. Whatever is cut short, the mirror holds a run that can go on.
"""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import chain, count
from pathlib import Path
from typing import Any

from dreambooth_lib import runs
from dreambooth_lib.config import TrainConfig
from dreambooth_lib.copies import Stamp, again, copy, copy_file, is_there, shown, stamp_of
from dreambooth_lib.pictures import read_pictures
from dreambooth_lib.runs import Run, RunError

#: Bytes above which weights are rounded, and a pipeline is left out: a free drive has 15 GB in all.
LARGE = 2**30
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
        known["finished"] = run.finished and not failures
        again(_write, folder, known)
    except (OSError, ValueError) as error:
        failures = [str(error)]
    if not failures:
        return None
    return (
        f"{run.folder} is not all in {folder} yet ({failures[0]}); training goes on, and the next "
        "call tries again: if it keeps failing, see whether the drive is full or gone."
    )


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


def newest_run(*folders: str | Path | None) -> Found | None:
    """The newest run in these folders that has not finished, else the newest; None if none.

    Of a run and its mirror it is the one that is further, or else the one in the earlier folder.
    A folder that is None or not there, as Drive may be, holds none.
    """
    return max(_all(folders), key=lambda run: (not run.finished, run.when), default=None)


def cut_off(
    go_on: bool | str,
    folders: Sequence[str | Path | None],
    pictures: str | Path | None,
    class_noun: str,
    base: str,
) -> tuple[Found | None, str]:
    """The newest unfinished run of these pictures, noun and base, and a sentence for its user.

    Where there is none, or ``go_on`` is False, it gives None, and the sentence says which run is
    left alone, and why. With a run's name as ``go_on`` it is that one, whatever it is of. Pictures
    that are None, or gone as after a disconnect, tell nothing.
    """
    found = [run for run in _all(folders) if go_on and not run.finished]
    found.sort(key=lambda run: run.when, reverse=True)
    others = ""
    for run in found:
        other = "" if isinstance(go_on, str) else _other(run, pictures, class_noun, base)
        if isinstance(go_on, str) and run.run.folder.name != go_on:
            continue
        if not other:
            return run, f"Going on with {run}"
        name = run.run.folder.name
        others = others or f"Left alone: {run}; {other}: GO_ON = {name!r} goes on with it.\n"
    if isinstance(go_on, str):
        others = f"There is no unfinished run called {go_on!r}.\n"
    return None, f"{others}Beginning a new run."


def bring(found: Found, folder: str | Path, drive: str | Path | None = None) -> Run:
    """The run itself where it lies in ``folder``, else restored to there, as :func:`restore` does.

    Its name there is its own, or one that is free in both where another run has that.
    """
    run, folder = found.run, Path(folder)
    if run.folder.parent == folder:
        return run
    name = run.folder.name
    if (folder / name).exists():
        name = free_name(name, folder, drive)
    return restore(run.folder, folder / name)


def has_finished(folder: Path) -> bool:
    """Return whether the run in a folder, or the run that it mirrors, has come to its end.

    A mirror may lack the pipeline that a run ends with, and says it of itself.
    """
    return (folder / "pipeline").exists() or bool((_read(folder) or {}).get("finished"))


def free_name(name: str, *folders: str | Path | None) -> str:
    """The name, or with a number after it, that nothing in these folders has, nor a zip there."""
    places = [path.name for folder in folders if folder is not None for path in _inside(folder)]
    taken = {place.removesuffix(".zip") for place in places} | set(places)
    numbered = (f"{name}-{number}" for number in count(2))
    return next(free for free in chain([name], numbered) if free not in taken)


def _copy_parts(run: Run, folder: Path, known: dict[str, Any]) -> list[str]:
    stamps, parts = known["parts"], _parts(run)
    failures: list[str] = []
    newest_failed = False
    for name, source in parts.items():
        stamp, place = stamp_of(source), folder / name
        try:
            if place.parent.name == "checkpoints" and newest_failed and place.exists():
                _drop(folder, parts, stamps)
                continue  # it may be all that there is of an optimizer's state
            stamps[name] = _without(stamps.get(name, []), stamp, place)
            if not _is_current(stamps[name], stamp, place):
                again(_copy, source, place, patient=not failures)
                sizes = {one: size for one, size, _ in stamp_of(place)}
                stamps[name] = [[*row, sizes[row[0]]] for row in stamp]
            if place.parent.name == "checkpoints":
                _drop(folder, parts, stamps)
        except OSError as error:
            failures.append(str(error))
            newest_failed |= place.parent.name == "checkpoints"
    return failures


def _copy(source: Path, place: Path) -> None:
    """Copy a part, a checkpoint's weights rounded to half as many bytes where they are large."""
    from dreambooth_lib.state import TENSORS, replacing_folder, round_weights

    if place.parent.name != "checkpoints" or not _is_large(source / TENSORS):
        copy(source, place)
        return
    with replacing_folder(place) as partial:
        for name in shown(source):
            (round_weights if name.name == TENSORS else copy_file)(source / name, partial / name)


def _is_large(path: Path) -> bool:
    return sum(size for _, size, _ in stamp_of(path)) > LARGE


def _is_current(known: Sequence[Any], stamp: Stamp, place: Path) -> bool:
    """Return whether a part's copy is there, whole, and of what the part is now.

    A run that was restored has the sizes of its mirror.
    """
    if len(known) != len(stamp):
        return False
    for (name, was, then, *at_mirror), (now_name, now, time) in zip(known, stamp, strict=True):
        size = at_mirror[0] if at_mirror else was
        same = (name, then) == (now_name, time) and now in (was, size)
        if not same or not is_there(place, [[name, size, time]]):
            return False
    return True


def _without(known: Sequence[Any], stamp: Stamp, place: Path) -> list[Any]:
    """Remove from a folder's copy the files that the folder no longer has; gives what is left."""
    names = {name for name, *_ in stamp}
    for name, *_ in known:
        if name not in names and (place / name).exists():
            file = place / name
            _empty(file.rename(file.with_name(f".{file.name}.gone"))).unlink()
    return [row for row in known if row[0] in names]


def _parts(run: Run) -> dict[str, Path]:
    """Files, and folders that are copied whole, by their place in the mirror.

    Of the checkpoints these are the newest and the best, where looks tell which that is. In the
    order in which a mirror that is cut short can be gone on with: pictures before the rows that
    tell of them, those before the config that makes a folder a run, the newest weights first.
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
    # A large pipeline is the base with a checkpoint's weights: train makes it anew from these.
    whole = [run.pipeline] if run.pipeline.exists() and not _is_large(run.pipeline) else []
    whole += _checkpoints(run)
    names = files + [path.relative_to(run.folder) for path in whole]
    return parts | {name.as_posix(): run.folder / name for name in names}


def _checkpoints(run: Run) -> list[Path]:
    from dreambooth_lib import choice, watch_record

    found = run.checkpoints()
    wanted = list(found)[-1:]
    if len(watch_record.history(run)) > 1:
        wanted.append(choice.best_checkpoint(run).step)
    return [found[step] for step in dict.fromkeys(wanted) if step in found]


def _pictures(source: str, place: str) -> dict[str, Path]:
    path = Path(source)
    files = [path] if path.is_file() else sorted(path.glob("[!.]*"))
    return {f"{place}/{file.name}": file for file in files if file.is_file()}


def _drop(folder: Path, parts: dict[str, Path], stamps: dict[str, Any]) -> None:
    """Remove checkpoints and a pipeline that are no part any more, and their half-made copies."""
    for path in [*(folder / "checkpoints").iterdir(), *folder.glob("*pipeline*")]:
        name = path.relative_to(folder).as_posix()
        if name not in parts and path.is_dir():
            _discard(path)
            stamps.pop(name, None)


def _discard(folder: Path) -> None:
    """Remove a folder after emptying its files: Drive's trash counts against its room."""
    hidden = folder
    if not folder.name.startswith("."):  # half-emptied, it must not be taken for a checkpoint
        hidden = folder.rename(folder.with_name(f".{folder.name}.gone"))
    for file in hidden.rglob("*"):
        if file.is_file():
            _empty(file)
    shutil.rmtree(hidden)


def _empty(file: Path) -> Path:
    os.truncate(file, 0)
    return file


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
    # What is hidden may be left of a first write that failed.
    if known is None and all(path.name.startswith(".") for path in folder.iterdir()):
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
    times = {Path(part) / name: time for part, stamp in stamps for name, _, time, *_ in stamp}
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


def _all(folders: Sequence[str | Path | None]) -> list[Found]:
    """Every run in these folders once: of a run and its mirrors the one that is furthest."""
    places = [path for folder in folders if folder is not None for path in _inside(folder)]
    copies: dict[str, list[Found]] = {}
    for place in places:
        if (run := _found(place)) is not None:
            copies.setdefault(_identity_at(place), []).append(run)
    return [max(of, key=lambda run: (run.step, run.finished, run.when)) for of in copies.values()]


def _identity_at(folder: Path) -> str:
    """The word by which a run and its mirror are known for one; the folder's path without one."""
    file = folder / IDENTITY
    try:
        known = _read(folder)
        if known is not None:
            return known["identity"]
        return file.read_text() if file.exists() else str(folder)
    except OSError:
        return str(folder)


def _other(found: Found, pictures: str | Path | None, class_noun: str, base: str) -> str:
    """What a run is of that was not asked for, in words; empty where it is all the same."""
    config = found.run.config
    own = {"base": config.base, "class noun": config.subject.class_noun}
    asked = {"base": runs.whole_base(base), "class noun": class_noun.strip()}
    if other := runs.first_difference(own, asked):
        return f"its {other}"
    if pictures is None or not Path(pictures).exists():
        return ""
    folder = found.run.folder
    same = _content(_taken("photos", config.subject.pictures, folder, folder)) == _content(pictures)
    return "" if same else f"its pictures are not those in {pictures}"


def _content(pictures: str | Path) -> list[str] | None:
    """What is in pictures, whatever they are called; None where they cannot be read."""
    try:
        photos = read_pictures(pictures)
    except (OSError, ValueError):
        return None
    return sorted(hashlib.sha256(photo.image.tobytes()).hexdigest() for photo in photos)


def _inside(folder: str | Path) -> list[Path]:
    try:
        return sorted(Path(folder).iterdir())
    except OSError:  # there is none, or a drive is gone
        return []


def _found(folder: Path) -> Found | None:
    try:
        run = runs.resume(folder)
        files = [run.folder / name for name in ("config.toml", "log.jsonl")]
        known = _read(folder) or {"parts": {}}
        stamps = known["parts"]
        # A drive has no times but its own, so a mirror keeps the run's.
        times = [stamps[f.name][0][2] if f.name in stamps else f.stat().st_mtime_ns
                 for f in files if f.exists()]  # fmt: skip
        return Found(
            run,
            step=max(run.checkpoints(), default=0),
            finished=run.finished or known.get("finished", False),
            when=datetime.fromtimestamp(max(times) / 1e9, UTC),
        )
    except (OSError, ValueError):  # no run, or not one that can be gone on with
        return None
