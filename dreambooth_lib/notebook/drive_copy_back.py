"""Copy a backup's files back to a run's folder, and check what came."""

import os
import re
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dreambooth_lib.core import background
from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.core.errors import KitError
from dreambooth_lib.core.files import recover_folder, retry, visible_files
from dreambooth_lib.notebook.drive_copy import NAMING_PATHS, localize
from dreambooth_lib.notebook.drive_state import IDENTITY, State, read_state
from dreambooth_lib.training import runs
from dreambooth_lib.training.runs import CLASS_PHOTOS, PHOTOS, Run, RunError

#: What Drive calls the second file or folder of a name, such as "000006 (1)".
_DUPLICATE = re.compile(r"(.+) \(\d+\)(\.[^.]+)?")


class RestoreError(KitError, RuntimeError):
    """A backup that could not be read; nothing was restored."""


def list_files(folder: Path) -> dict[Path, int]:
    """Return the files of a backup and their sizes, without the duplicates that Drive makes."""
    if not (folder / "config.toml").exists():
        raise RunError(f"{folder} is not a run: it has no config.toml; check the path.")
    for old in [*folder.glob(".*.old"), *folder.glob("checkpoints/.*.old")]:
        recover_folder(old.with_name(old.stem[1:]))
    names = retry(visible_files, folder)
    return {
        name: (folder / name).stat().st_size for name in names if not _is_duplicate(folder, name)
    }


def _is_duplicate(folder: Path, name: Path) -> bool:
    """Return whether Drive, or a user, made a second file or folder of a name in a backup.

    Photos may have such names of their own; they are duplicates only of a file like them, and a
    caption only if its photo is one.
    """
    for part in (name, *name.parents[:-1]):
        if not (found := _DUPLICATE.fullmatch(part.name)):
            continue
        if name.parts[0] not in (PHOTOS, CLASS_PHOTOS):
            return True
        file, original = folder / name, folder / part.with_name(f"{found[1]}{found[2] or ''}")
        if (photo := file.with_suffix(".png")).is_file():
            file, original = photo, original.with_suffix(".png")
        if original.is_file() and original.read_bytes() == file.read_bytes():
            return True
    return False


def copy_back(folder: Path, files: Sequence[Path], partial: Path, local: Path) -> None:
    """Copy these files of a backup to ``partial``, which becomes ``local``, and adapt the config.

    Raises :class:`CheckpointError` if there are checkpoints and none of them is sound.
    """
    state = (
        background.call(read_state, folder, place=folder, limit=background.FILE_LIMIT) or State()
    )
    times = {Path(part) / name: time for part, rows in state.parts.items()
             for name, _, time, *_ in rows}  # fmt: skip
    copied: dict[Path, Path] = {}
    shared: dict[Path, Path] = {}  # class images, by all runs in the same folder
    for name in files:
        place = partial / name
        if name.parts[0] == "class_images":
            if (local.parent / name).exists():
                continue
            shared[place] = local.parent / name
        try:
            background.copy(folder / name, place, drive=folder / name)
        except KitError:  # the disk's, or the drive does not answer
            raise
        except OSError as error:
            raise RestoreError(
                f"{folder / name} could not be read ({error}); check that the drive is mounted, "
                "and try again."
            ) from error
        copied[name] = place
    for place in copied.values():  # after the digests, which this renews
        if place.name in NAMING_PATHS:
            localize(place, local)
    for name in times.keys() & copied.keys():  # or the next backup would copy it again
        os.utime(copied[name], ns=(times[name], times[name]))
    # A set's manifest last: without it the set is not used.
    for place in sorted(shared, key=lambda place: place.name in NAMING_PATHS):
        shared[place].parent.mkdir(parents=True, exist_ok=True)
        os.replace(place, shared[place])
    for parts in {place.relative_to(partial).parts[0] for place in shared}:
        shutil.rmtree(partial / parts)
    if state.identity is not None:
        (partial / IDENTITY).write_text(state.identity)
    _drop_damaged_checkpoints(Run(partial, TrainConfig.from_toml(partial / "config.toml")), folder)
    config = TrainConfig.from_toml(partial / "config.toml")
    original = config.class_folder
    photos = backed_up(PHOTOS, config.subject.photos, partial, local)
    class_folder = original and backed_up(CLASS_PHOTOS, original, partial, local)
    subject = replace(config.subject, photos=photos)
    runs.resume(partial, subject=subject, class_folder=class_folder)


def _drop_damaged_checkpoints(run: Run, folder: Path) -> None:
    """Delete the newest checkpoints of a restored run until one is sound; warn of each.

    Raises :class:`CheckpointError` if none is.
    """
    from dreambooth_lib.training.checkpoints import CheckpointError, check_digests

    steps = sorted(run.checkpoints().items())
    while steps:
        step, path = steps.pop()
        try:
            check_digests(path)
            return
        except CheckpointError as error:
            if not steps:
                raise CheckpointError(
                    f"the only checkpoint in {folder} is damaged, that of step {step}; delete its "
                    f"folder there to restore the rest and train from the beginning."
                ) from error
            shutil.rmtree(path)
            warnings.warn(
                f"The checkpoint of step {step} in {folder} is damaged; the run is restored at "
                f"step {steps[-1][0]}.",
                stacklevel=2,
            )


def backed_up(name: str, source: str, partial: Path, local: Path) -> str:
    """Return where a backup has the photos of ``source``, a folder or a zip; or ``source``."""
    for place in (Path(name) / Path(source).name, Path(name)):  # a zip, or else a folder
        if (partial / place).exists():
            return str(local / place)
    inside = Path(source).is_relative_to(partial)
    return str(local / Path(source).relative_to(partial)) if inside else source
