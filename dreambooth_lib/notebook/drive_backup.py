"""Back up a run to a second folder, such as one on Drive.

BACKUP/...              the run's folder without hidden files. Of the checkpoints only the newest,
                        the best and the chosen one, as a drive has little space; large ones have
                        their weights in float16, and a large pipeline is left out, as it follows
                        from these
BACKUP/photos/          the subject's photos: an upload is lost with the session, too
BACKUP/class_photos/    the user's own class images
BACKUP/class_images/    the sets of class images that the base generated for this class
BACKUP/.backup.json     each part's files and whose they are: see :mod:`.drive_state`

Each file, checkpoint, pipeline and folder of photos appears only when it is complete: it is written
beside its place and renamed. Whenever copying is interrupted, the backup holds a run that can be
resumed: see :mod:`.drive_restore`. :class:`.drive_worker.Backup` does all this while the run
trains.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from dreambooth_lib.core.errors import KitError, printable
from dreambooth_lib.core.files import Fingerprint, retry, visible_files
from dreambooth_lib.core.user_text import short_path
from dreambooth_lib.notebook.drive_copy import (
    copy_part,
    delete_removed,
    describe,
    hide_and_delete,
    is_checkpoint,
    is_large,
    with_copied_sizes,
)
from dreambooth_lib.notebook.drive_state import (
    SESSION,
    State,
    open_state,
    own_identity,
    write_state,
)
from dreambooth_lib.training import best_checkpoint, validation_record
from dreambooth_lib.training.runs import CLASS_PHOTOS, PHOTOS, Run

#: How often a backup begins again when the run's files change while they are copied.
ATTEMPTS = 3


@dataclass(frozen=True)
class Part:
    """A file of a run, or a folder that is copied as a whole, as it was when it was listed."""

    source: Path
    stamp: Fingerprint


def backup(run: Run, folder: str | Path) -> str | None:
    """Copy what is new in a run to ``folder``; return None, or a sentence on what went wrong.

    Call it as often as you like while training: what was copied before is only checked by its size
    and time. What the drive fails at is retried, then left to the next call; no exception is
    raised for it. A checkpoint that the run no longer has is deleted once one that it has is
    complete there. ``folder`` is created, but not its parent, so nothing is written where no drive
    is mounted. A folder that holds something else, such as another run, or a later step of this
    run from another session, is left alone.
    """
    folder = Path(folder)
    try:
        problems = _back_up(run, folder)
    except Exception as error:  # training must go on, whatever a drive or a damaged file raises
        problems = [_reason(error)]
    if not problems:
        return None
    where = short_path(run.folder)
    return printable(f"{where} is not completely backed up to {folder}: {problems[0]}.")


def _reason(error: Exception) -> str:
    if isinstance(error, KitError):
        return str(error).rstrip(".")
    return (
        f"{error or type(error).__name__}; the next backup tries again, but check that the drive "
        "is mounted and has space"
    )


def _back_up(run: Run, folder: Path) -> list[str]:
    state = retry(open_state, folder, own_identity(run))
    if state is None:
        return [
            "that folder is not a backup of this run, or its .backup.json is damaged; rename the "
            "folder, and run the cell again"
        ]
    if (later := retry(_later_step, run, folder, state)) is not None:
        return [
            f"another session has backed up step {later} there, which this run has not reached; "
            "stop one of the two sessions, or delete that folder to keep this run"
        ]
    state.session = SESSION
    if state.finished and not run.finished:  # it has a longer goal now
        state.finished = False
        retry(write_state, folder, state)
    leftovers = []
    try:
        retry(_delete_leftovers, folder)
    except OSError as error:
        leftovers = [_reason(error)]
    for attempt in range(ATTEMPTS):
        finished = run.finished  # before its files are listed: they are complete by then
        parts, problems = list_parts(run)
        failures, changed = _copy_parts(run, folder, parts, state.parts, attempt + 1 < ATTEMPTS)
        if not changed:
            break
    state.parts = {name: rows for name, rows in state.parts.items() if name in parts}
    state.finished = finished and not failures
    retry(write_state, folder, state)
    return failures + problems + leftovers


#: Checkpoints of other sessions whose digests are right.
_sound: set[Path] = set()


def _later_step(run: Run, folder: Path, state: State) -> int | None:
    """Return the step of another session's checkpoint in the backup that is ahead of the run."""
    from dreambooth_lib.training.checkpoints import CheckpointError, check_digests

    there = Run(folder, run.config).checkpoints()
    newest = max(there, default=0)
    if state.session == SESSION or newest <= max(run.checkpoints(), default=0):
        return None
    if there[newest] not in _sound:  # read once, as it may have gigabytes
        try:
            check_digests(there[newest])
        except CheckpointError:  # so the run was restored from the one before
            return None
        _sound.add(there[newest])
    return newest


def _delete_leftovers(folder: Path) -> None:
    """Delete what killed processes left half-written or half-deleted."""
    for path in sorted(folder.rglob(".*")):
        if path.suffix in (".partial", ".gone") and path.exists():  # its folder may have been one
            hide_and_delete(path)


def _copy_parts(
    run: Run, folder: Path, parts: dict[str, Part], stamps: dict[str, Fingerprint], again: bool
) -> tuple[list[str], bool]:
    """Copy what is not current; return what failed, and whether files changed meanwhile.

    With ``again`` a part whose source has changed does not count as failed.
    """
    failures: list[str] = []
    changed = newest_failed = False
    for name, part in parts.items():
        place = folder / name
        try:
            # While the newest is missing, an older one may have the only optimizer state.
            if not (is_checkpoint(name) and newest_failed and place.exists()):
                known = delete_removed(name, stamps.get(name, []), part.stamp, place)
                stamps[name] = known
                if not _is_current(name, known, part.stamp, place):
                    source = run.config.subject if name == PHOTOS else part.source
                    copying = (name, source, place, part.stamp, run.folder)
                    retry(copy_part, *copying, patient=not failures)
                    stamps[name] = with_copied_sizes(name, part.stamp, place)
            if is_checkpoint(name):
                _delete_dropped(folder, parts, stamps)
        except Exception as error:  # one damaged part must not stop the others
            newest_failed |= is_checkpoint(name)
            if again and _has_changed(name, part):
                changed = True
            else:
                failures.append(_reason(error))
    return failures, changed


def _has_changed(name: str, part: Part) -> bool:
    try:
        return describe(name, part.source) != part.stamp
    except OSError:  # it is gone: a newer one has replaced it
        return True


def _is_current(name: str, known: Fingerprint, stamp: Fingerprint, place: Path) -> bool:
    """Return whether a part's copy is there, complete and up to date."""
    try:
        now = with_copied_sizes(name, stamp, place)
    except OSError:
        return False
    # The files of a restored run have the sizes of the backup's.
    return bool(now) and now in (known, [[row[0], row[-1], row[2], row[-1]] for row in known])


def _delete_dropped(folder: Path, parts: dict[str, Part], stamps: dict[str, Fingerprint]) -> None:
    """Delete checkpoints and a pipeline that are no longer parts, and incomplete copies."""
    for path in [*(folder / "checkpoints").iterdir(), *folder.glob("*pipeline*")]:
        name = path.relative_to(folder).as_posix()
        if name not in parts and path.is_dir():
            hide_and_delete(path)
            stamps.pop(name, None)


def list_parts(run: Run) -> tuple[dict[str, Part], list[str]]:
    """Map places in the backup to what belongs there, and say what cannot be read.

    The order lets an interrupted backup be resumed: images before the rows that mention them, these
    before the config that makes a folder a run, the newest weights first. They are listed the other
    way round, so that what a listed file mentions is listed, too, while the run goes on.
    """
    problems: list[str] = []
    weights = _stamped(_checkpoints(run, problems))
    own = [path for path in sorted(run.folder.iterdir(), reverse=True)
           if path.name not in ("checkpoints", "pipeline", PHOTOS, CLASS_PHOTOS)
           and not path.name.startswith(".")]  # fmt: skip
    top = _stamped({path.name: path for path in own if path.is_file()})
    deeper = {f"{path.name}/{name.as_posix()}": path / name for path in own if path.is_dir()
              for name in visible_files(path)}  # fmt: skip
    deeper |= _class_images(run, problems)
    photos = {PHOTOS: run.config.subject.photos, CLASS_PHOTOS: run.config.class_folder}
    sources = {name: Path(source) for name, source in photos.items() if source}
    return _stamped(sources) | _stamped(deeper) | top | weights, problems


def _stamped(sources: dict[str, Path]) -> dict[str, Part]:
    parts = {}
    for name, source in sources.items():
        if source.exists():
            parts[name] = Part(source, describe(name, source))
    return parts


def _checkpoints(run: Run, problems: list[str]) -> dict[str, Path]:
    """Return a small pipeline, and the newest, the best and the chosen checkpoint."""
    parts = {}
    # A large pipeline is the base with a checkpoint's weights: resuming writes it again.
    if run.pipeline.exists() and not is_large(run.pipeline):
        parts["pipeline"] = run.pipeline
    checkpoints = run.checkpoints()
    steps = list(checkpoints)[-1:]
    try:
        if len(validation_record.history(run)) > 1:
            best = best_checkpoint.best_checkpoint(run).step
            steps += [best, best_checkpoint.chosen_step(run) or best]
    except Exception as error:  # whatever a damaged row raises
        problems.append(f"its validation rows cannot be read ({_reason(error)})")
    return parts | {f"checkpoints/{checkpoints[step].name}": checkpoints[step]
                    for step in steps if step in checkpoints}  # fmt: skip


def _class_images(run: Run, problems: list[str]) -> dict[str, Path]:
    """Return the sets of class images of the run's base and class."""
    config = run.config
    parts: dict[str, Path] = {}
    sets = run.folder.parent / "class_images"
    for manifest in sorted(sets.glob("*/manifest.json")):
        try:
            made = json.loads(manifest.read_text())
            belongs = (made["base"], made["prompt"]) == (config.base, config.subject.class_prompt)
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            problems.append(
                f"{manifest} is damaged, so the class images beside it may be missing there; "
                "delete that folder if no run needs it"
            )
            continue
        if belongs:
            place = f"{sets.name}/{manifest.parent.name}"
            files = sorted(manifest.parent.glob("[!.]*"))
            parts |= {f"{place}/{file.name}": file for file in files if file.is_file()}
    return parts
