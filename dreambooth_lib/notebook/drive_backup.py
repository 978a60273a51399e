"""A run's mirror: a copy in a second place, such as Drive, kept up while it trains.

MIRROR/...                 the run's folder without what is hidden; of its checkpoints the newest
                           and the best, as a drive has little room; large ones have their weights
                           in float16, and the pipeline that follows from these is left out
MIRROR/photos/             the subject's pictures: an upload is gone with the session, too
MIRROR/class_photos/       the user's own class images
MIRROR/class_images/     the sets that the base drew for this class
MIRROR/.mirror.json        whose copy it is, whether the run has finished, and each part's files:
                           size and time at the run, and size here

A file, a checkpoint and the pipeline each appear when they are whole: they are written beside and
renamed. Whatever is cut short, the mirror holds a run that can go on: see
:mod:`dreambooth_lib.notebook.drive_restore`.
"""

import json
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

from dreambooth_lib.core.files import Fingerprint, copy, fingerprint, retry, visible_files
from dreambooth_lib.core.old_names import locate
from dreambooth_lib.training.runs import Run

#: Bytes above which weights are rounded, and a pipeline is left out: a free drive has 15 GB in all.
LARGE = 2**30
STATE = ".mirror.json"  # in the mirror
IDENTITY = ".mirror"  # at the run: the word that its mirror knows it by


def backup(run: Run, folder: str | Path) -> str | None:
    """Copy what is new of a run to ``folder``; return None, or a sentence on what did not work.

    Call it as often as you like while training: what is there already costs a look at its size, and
    what a drive fails at is tried again, then left to the next call; it never raises for that. A
    checkpoint that the run has dropped goes once one that it still has is whole there. ``folder``
    is made, but not what it lies in, so that nothing is written where a drive is not mounted. A
    folder that holds something else, such as another run, is left alone.
    """
    folder = Path(folder)
    try:
        known = retry(_known, folder, _identity(run))
        if known is None:
            return f"{folder} holds something else than this run; mirror it to another folder."
        failures = _copy_parts(run, folder, known["parts"])
        known["finished"] = run.finished and not failures
        retry(_write, folder, known)
    except (OSError, ValueError) as error:
        failures = [str(error)]
    if not failures:
        return None
    return (
        f"{run.folder} is not all in {folder} yet ({failures[0]}); training goes on, and the next "
        "call tries again: if it keeps failing, see whether the drive is full or gone."
    )


def notes(folder: Path) -> dict[str, Any] | None:
    """Return what a mirror says of itself; None where it says nothing, or that is damaged."""
    file = folder / STATE
    try:
        return json.loads(file.read_text()) if file.exists() else None
    except ValueError:  # what it was kept for is lost, but not the run
        return None


def _copy_parts(run: Run, folder: Path, stamps: dict[str, Fingerprint]) -> list[str]:
    from dreambooth_lib.training.checkpoints import TENSORS, round_weights

    parts = _parts(run)
    failures: list[str] = []
    newest_failed = False
    for name, source in parts.items():
        stamp, place = fingerprint(source), folder / name
        is_checkpoint = place.parent.name == "checkpoints"
        try:
            # Without the newest, an older one may have all that there is of an optimizer's state.
            if not (is_checkpoint and newest_failed and place.exists()):
                stamps[name] = _without(stamps.get(name, []), stamp, place)
                if not _is_current(stamps[name], stamp, place):
                    rounded = is_checkpoint and _is_large(source / TENSORS)
                    ways = {TENSORS: round_weights} if rounded else {}
                    retry(copy, source, place, ways, patient=not failures)
                    stamps[name] = _with_copy(stamp, place)
            if is_checkpoint:
                _drop(folder, parts, stamps)
        except OSError as error:
            failures.append(str(error))
            newest_failed |= is_checkpoint
    return failures


def _is_large(path: Path) -> bool:
    return sum(size for _, size, _ in fingerprint(path)) > LARGE


def _with_copy(stamp: Fingerprint, place: Path) -> Fingerprint:
    """Return a stamp with the size that each file's copy has."""
    sizes = {name: size for name, size, _ in fingerprint(place)}
    return [[*row, sizes.get(row[0])] for row in stamp]


def _is_current(known: Fingerprint, stamp: Fingerprint, place: Path) -> bool:
    """Return whether a part's copy is there, whole, and of what the part is now."""
    try:
        now = _with_copy(stamp, place)
    except OSError:
        return False
    # A run that was restored has the sizes of its mirror.
    return now in (known, [[row[0], row[-1], row[2], row[-1]] for row in known])


def _without(known: Fingerprint, stamp: Fingerprint, place: Path) -> Fingerprint:
    """Remove from a folder's copy the files that the folder no longer has; return what is left."""
    names = {name for name, *_ in stamp}
    for name, *_ in known:
        file = place / name
        if name not in names and file.exists():
            hidden = file.rename(file.with_name(f".{file.name}.gone"))
            os.truncate(hidden, 0)
            hidden.unlink()
    return [row for row in known if row[0] in names]


def _drop(folder: Path, parts: dict[str, Path], stamps: dict[str, Fingerprint]) -> None:
    """Remove checkpoints and a pipeline that are no part any more, and their half-made copies.

    Their files are emptied first: Drive's trash counts against its room.
    """
    for path in [*(folder / "checkpoints").iterdir(), *folder.glob("*pipeline*")]:
        name = path.relative_to(folder).as_posix()
        if name in parts or not path.is_dir():
            continue
        if not path.name.startswith("."):  # half-emptied, it must not be taken for a checkpoint
            path = path.rename(path.with_name(f".{path.name}.gone"))
        for file in path.rglob("*"):
            if file.is_file():
                os.truncate(file, 0)
        shutil.rmtree(path)
        stamps.pop(name, None)


def _parts(run: Run) -> dict[str, Path]:
    """Return files, and folders that are copied whole, by their place in the mirror.

    Of the checkpoints these are the newest and the best, where looks tell which that is. In the
    order in which a mirror that is cut short can be gone on with: pictures before the rows that
    tell of them, those before the config that makes a folder a run, the newest weights first.
    """
    from dreambooth_lib.training import best_checkpoint, validation_record

    config = run.config
    parts = _pictures(config.subject.pictures, "photos")
    if config.class_folder is not None:
        parts |= _pictures(config.class_folder, "class_photos")
    sets = locate(run.folder.parent, "class_images")
    for manifest in sorted(sets.glob("*/manifest.json")):
        made_by = json.loads(manifest.read_text())
        if (made_by["base"], made_by["prompt"]) == (config.base, config.subject.class_prompt):
            parts |= _pictures(manifest.parent, f"{sets.name}/{manifest.parent.name}")
    files = [p for p in visible_files(run.folder) if p.parts[0] not in ("checkpoints", "pipeline")]
    files.sort(key=lambda path: (len(path.parts), path), reverse=True)
    parts |= {name.as_posix(): run.folder / name for name in files}
    # A large pipeline is the base with a checkpoint's weights: train makes it anew from these.
    if run.pipeline.exists() and not _is_large(run.pipeline):
        parts["pipeline"] = run.pipeline
    checkpoints = run.checkpoints()
    wanted = list(checkpoints)[-1:]
    if len(validation_record.history(run)) > 1:
        wanted.append(best_checkpoint.best_checkpoint(run).step)
    return parts | {f"checkpoints/{checkpoints[step].name}": checkpoints[step]
                    for step in wanted if step in checkpoints}  # fmt: skip


def _pictures(source: str | Path, place: str) -> dict[str, Path]:
    path = Path(source)
    files = [path] if path.is_file() else sorted(path.glob("[!.]*"))
    return {f"{place}/{file.name}": file for file in files if file.is_file()}


def _identity(run: Run) -> str:
    """Return the run's own word, so that no other run of its name overwrites its mirror."""
    from dreambooth_lib.core.files import replace_file

    file = run.folder / IDENTITY
    if not file.exists():
        replace_file(file, uuid.uuid4().hex.encode())
    return file.read_text()


def _known(folder: Path, identity: str) -> dict[str, Any] | None:
    """Return a mirror's notes, begun where nothing is; None if it is not this run's."""
    folder.mkdir(exist_ok=True)
    known = notes(folder)
    # What is hidden may be left of a first write that failed.
    if known is None and all(path.name.startswith(".") for path in folder.iterdir()):
        known = {"identity": identity, "parts": {}}
        _write(folder, known)
    return known if known and known["identity"] == identity else None


def _write(folder: Path, known: dict[str, Any]) -> None:
    from dreambooth_lib.core.files import replace_file

    replace_file(folder / STATE, json.dumps(known).encode())
