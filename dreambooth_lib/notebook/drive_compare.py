"""Compare runs, here or on a drive, with the base, class noun and photos that are asked for."""

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from dreambooth_lib.core import background
from dreambooth_lib.core.subject import Subject
from dreambooth_lib.data.images import BadPhotosError, read_photos
from dreambooth_lib.notebook.drive_copy_back import backed_up
from dreambooth_lib.training import config_changes
from dreambooth_lib.training.photo_record import digests_of, known_digests
from dreambooth_lib.training.runs import PHOTOS, Run


def has_base(run: Run, base: str) -> bool:
    """Return whether a run, or the run that this backs up, trains this base."""
    own, base = run.config.base, config_changes.absolute_base(base)
    # A backup's is relative to where the run was.
    return own == base or (own.startswith("../") and Path(own).name == Path(base).name)


def are_there(photos: str | Path | None) -> bool:
    """Return whether photos are given and exist, as after a disconnect they may not."""
    return photos is not None and Path(photos).expanduser().exists()


def difference_to(
    run: Run,
    photos: str | Path | None,
    class_noun: str,
    base: str,
    left_out: Collection[str],
) -> str:
    """Say in words how a run's base, noun or photos differ from these; empty if they do not."""
    subject, other = run.config.subject, config_changes.absolute_base(base)
    own_base = other if has_base(run, base) else run.config.base
    before = {"base": own_base, "class noun": subject.class_noun}
    now = {"base": other, "class noun": class_noun.strip()}
    if difference := config_changes.first_difference(before, now):
        return f"it began {difference}"
    if not are_there(photos):
        return ""
    own = noted(run)  # photos in their folder may have been replaced since
    if own is None:
        place = backed_up(PHOTOS, subject.photos, run.folder, run.folder)
        own = hashes(replace(subject, photos=place))
    all_left_out = (*left_out, *(subject.left_out or ()))
    given = hashes(replace(subject, photos=str(photos), left_out=all_left_out), sound_only=True)
    if own is None or given is None:
        return f"its photos could not be compared with those in {photos}"
    return "" if own == given else f"its photos are not those in {photos}"


def noted(run: Run) -> list[str] | None:
    """Return the hashes of the photos that a run trains on; None if they cannot be read."""
    try:
        return background.call(
            lambda: known_digests(run.folder), place=run.folder, limit=background.FILE_LIMIT
        )
    except Exception:  # whatever a drive raises
        return None


def hashes(subject: Subject, sound_only: bool = False) -> list[str] | None:
    """Return the hashes of photos, whatever their names; None if they cannot be read.

    With ``sound_only`` damaged ones are passed over: a run may have gone on without them, and its
    backup names none.
    """

    def read() -> list[str]:
        try:
            photos = read_photos(subject)
        except BadPhotosError as error:
            if not sound_only:
                raise
            photos = read_photos(
                replace(subject, left_out=(*(subject.left_out or ()), *error.names))
            )
        return digests_of(photos)

    try:
        return background.call(read, place=subject.photos, limit=background.FILE_LIMIT)
    except Exception:  # whatever damaged photos raise
        return None
