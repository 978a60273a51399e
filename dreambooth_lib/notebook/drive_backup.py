"""Back up a run to a second folder, such as one on Drive, while it trains.

BACKUP/...              the run's folder without hidden files. Of the checkpoints only the newest
                        and the best, as a drive has little space; large ones have their weights in
                        float16, and a large pipeline is left out, as it follows from these
BACKUP/photos/          the subject's photos: an upload is lost with the session, too
BACKUP/class_photos/    the user's own class images
BACKUP/class_images/    the sets of class images that the base generated for this class
BACKUP/.backup.json     the run's identity, whether it has finished, and each part's files: their
                        size and time in the run, and their size here

Each file, checkpoint and pipeline appears only when it is complete: it is written beside its place
and renamed. Whenever copying is interrupted, the backup holds a run that can be resumed: see
:mod:`.drive_restore`.
"""

import json
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

from dreambooth_lib.core.files import (
    Fingerprint,
    copy,
    fingerprint,
    replace_file,
    retry,
    visible_files,
)
from dreambooth_lib.core.old_names import locate
from dreambooth_lib.training.runs import Run

#: Bytes above which weights are rounded and a pipeline is left out: a free Drive has 15 GB in all.
LARGE = 2**30
STATE = ".backup.json"  # in the backup
IDENTITY = ".backup"  # in the run: the identity that its backup records
#: What earlier versions called these two.
OLD_STATE, OLD_IDENTITY = ".mirror.json", ".mirror"


def backup(run: Run, folder: str | Path) -> str | None:
    """Copy what is new in a run to ``folder``; return None, or a sentence on what went wrong.

    Call it as often as you like while training: what was copied before is only checked by its size
    and time. What the drive fails at is retried, then left to the next call; no exception is
    raised for it. A checkpoint that the run no longer has is deleted once one that it has is
    complete there. ``folder`` is created, but not its parent, so nothing is written where no drive
    is mounted. A folder that holds something else, such as another run, is left alone.
    """
    folder = Path(folder)
    try:
        state = retry(_open_state, folder, _identity(run))
        if state is None:
            return f"{folder} holds something other than this run; back it up to another folder."
        failures = _copy_parts(run, folder, state["parts"])
        state["finished"] = run.finished and not failures
        retry(_write_state, folder, state)
    except (OSError, ValueError) as error:
        failures = [str(error)]
    if not failures:
        return None
    return (
        f"{run.folder} could not be backed up completely to {folder} ({failures[0]}); training "
        "continues, and the next backup tries again. If this persists, check that the drive is "
        "mounted and has space."
    )


def read_state(folder: Path) -> dict[str, Any] | None:
    """Return what a backup records about itself; None if there is nothing, or it is damaged."""
    file = _current_or_old(folder, STATE, OLD_STATE)
    try:
        return json.loads(file.read_text()) if file.exists() else None
    except ValueError:  # the run itself may well be intact
        return None


def read_identity(folder: Path) -> str | None:
    """Return the identity that was written into a run's folder for its backups; None if none."""
    file = _current_or_old(folder, IDENTITY, OLD_IDENTITY)
    return file.read_text() if file.exists() else None


def _current_or_old(folder: Path, name: str, old_name: str) -> Path:
    current = folder / name
    return current if current.exists() else folder / old_name


def _copy_parts(run: Run, folder: Path, stamps: dict[str, Fingerprint]) -> list[str]:
    from dreambooth_lib.training.checkpoints import TENSORS, round_weights

    parts = _parts(run)
    failures: list[str] = []
    newest_failed = False
    for name, source in parts.items():
        stamp, place = fingerprint(source), folder / name
        is_checkpoint = place.parent.name == "checkpoints"
        try:
            # While the newest is missing, an older one may have the only optimizer state.
            if not (is_checkpoint and newest_failed and place.exists()):
                stamps[name] = _delete_removed(stamps.get(name, []), stamp, place)
                if not _is_current(stamps[name], stamp, place):
                    rounded = is_checkpoint and _is_large(source / TENSORS)
                    copiers = {TENSORS: round_weights} if rounded else {}
                    retry(copy, source, place, copiers, patient=not failures)
                    stamps[name] = _with_copied_sizes(stamp, place)
            if is_checkpoint:
                _delete_dropped(folder, parts, stamps)
        except OSError as error:
            failures.append(str(error))
            newest_failed |= is_checkpoint
    return failures


def _is_large(path: Path) -> bool:
    return sum(size for _, size, _ in fingerprint(path)) > LARGE


def _with_copied_sizes(stamp: Fingerprint, place: Path) -> Fingerprint:
    """Append the size of its copy to each file's entry."""
    sizes = {name: size for name, size, _ in fingerprint(place)}
    return [[*row, sizes.get(row[0])] for row in stamp]


def _is_current(known: Fingerprint, stamp: Fingerprint, place: Path) -> bool:
    """Return whether a part's copy is there, complete and up to date."""
    try:
        now = _with_copied_sizes(stamp, place)
    except OSError:
        return False
    # The files of a restored run have the sizes of the backup's.
    return now in (known, [[row[0], row[-1], row[2], row[-1]] for row in known])


def _delete_removed(known: Fingerprint, stamp: Fingerprint, place: Path) -> Fingerprint:
    """Delete the files of a folder's copy that the folder no longer has; return the others."""
    names = {name for name, *_ in stamp}
    for name, *_ in known:
        file = place / name
        if name not in names and file.exists():
            hidden = file.rename(file.with_name(f".{file.name}.gone"))
            os.truncate(hidden, 0)
            hidden.unlink()
    return [row for row in known if row[0] in names]


def _delete_dropped(folder: Path, parts: dict[str, Path], stamps: dict[str, Fingerprint]) -> None:
    """Delete checkpoints and a pipeline that are no longer parts, and incomplete copies.

    Their files are emptied first, as Drive's trash counts towards its quota.
    """
    for path in [*(folder / "checkpoints").iterdir(), *folder.glob("*pipeline*")]:
        name = path.relative_to(folder).as_posix()
        if name in parts or not path.is_dir():
            continue
        if not path.name.startswith("."):  # half-emptied, it must not pass for a checkpoint
            path = path.rename(path.with_name(f".{path.name}.gone"))
        for file in path.rglob("*"):
            if file.is_file():
                os.truncate(file, 0)
        shutil.rmtree(path)
        stamps.pop(name, None)


def _parts(run: Run) -> dict[str, Path]:
    """Map places in the backup to the files, and the folders that are copied as a whole.

    Of the checkpoints these are the newest and, if there is validation, the best. The order lets
    an interrupted backup be resumed: images before the rows that mention them, these before the
    config that makes a folder a run, the newest weights first.
    """
    from dreambooth_lib.training import best_checkpoint, validation_record

    config = run.config
    parts = _image_files(config.subject.pictures, "photos")
    if config.class_folder is not None:
        parts |= _image_files(config.class_folder, "class_photos")
    sets = locate(run.folder.parent, "class_images")
    for manifest in sorted(sets.glob("*/manifest.json")):
        source = json.loads(manifest.read_text())
        if (source["base"], source["prompt"]) == (config.base, config.subject.class_prompt):
            parts |= _image_files(manifest.parent, f"{sets.name}/{manifest.parent.name}")
    files = [p for p in visible_files(run.folder) if p.parts[0] not in ("checkpoints", "pipeline")]
    files.sort(key=lambda path: (len(path.parts), path), reverse=True)
    parts |= {name.as_posix(): run.folder / name for name in files}
    # A large pipeline is the base with a checkpoint's weights: resuming writes it again.
    if run.pipeline.exists() and not _is_large(run.pipeline):
        parts["pipeline"] = run.pipeline
    checkpoints = run.checkpoints()
    steps = list(checkpoints)[-1:]
    if len(validation_record.history(run)) > 1:
        steps.append(best_checkpoint.best_checkpoint(run).step)
    return parts | {f"checkpoints/{checkpoints[step].name}": checkpoints[step]
                    for step in steps if step in checkpoints}  # fmt: skip


def _image_files(source: str | Path, place: str) -> dict[str, Path]:
    path = Path(source)
    files = [path] if path.is_file() else sorted(path.glob("[!.]*"))
    return {f"{place}/{file.name}": file for file in files if file.is_file()}


def _identity(run: Run) -> str:
    """Return the run's identity, so that no other run of its name overwrites its backup.

    It is written into the run's folder: a new one, or the one under the old name.
    """
    file = run.folder / IDENTITY
    if not file.exists():
        identity = read_identity(run.folder) or uuid.uuid4().hex
        replace_file(file, identity.encode())
        (run.folder / OLD_IDENTITY).unlink(missing_ok=True)
    return file.read_text()


def _open_state(folder: Path, identity: str) -> dict[str, Any] | None:
    """Return a backup's state, a new one for an empty folder; None if it is not this run's."""
    folder.mkdir(exist_ok=True)
    state = read_state(folder)
    # Hidden files may remain from a first write that failed.
    if state is None and all(path.name.startswith(".") for path in folder.iterdir()):
        state = {"identity": identity, "parts": {}}
        _write_state(folder, state)
    return state if state and state["identity"] == identity else None


def _write_state(folder: Path, state: dict[str, Any]) -> None:
    replace_file(folder / STATE, json.dumps(state).encode())
    (folder / OLD_STATE).unlink(missing_ok=True)
