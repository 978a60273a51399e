"""Read the photos that a run's config names, and note what of them it trains on."""

import warnings
from pathlib import Path
from shlex import quote

from dreambooth_lib.core.subject import Subject
from dreambooth_lib.data.images import Photo, read_photos
from dreambooth_lib.training import photo_record
from dreambooth_lib.training.runs import Run, RunError, has_begun


def read_subject_photos(run: Run) -> list[Photo]:
    """Read the subject's photos. Raises :class:`RunError` if they are not where they were."""
    subject = run.config.subject
    words = f"{subject.class_noun!r}, {subject.identifier!r}"
    return _read(
        run, "subject.photos", subject.photos, subject,
        f"run 'python -m dreambooth_lib resume {quote(str(run.folder))} --photos FOLDER', or call "
        f"resume('{run.folder}', subject=load_subject(FOLDER, {words}))",
    )  # fmt: skip


def read_own_class_images(run: Run) -> list[Photo]:
    """Read the user's own class images, if any; raise as :func:`read_subject_photos` does."""
    folder = run.config.class_folder
    call = f"call resume('{run.folder}', class_folder=FOLDER)"
    return _read(run, "class_folder", folder, folder, call) if folder else []


def note_photos(run: Run, photos: list[Photo], ended: bool) -> None:
    """Note the photos that a run trains on; warn where it was others before.

    A run that has ``ended`` keeps the note of those that it was trained on.
    """
    known = photo_record.known_digests(run.folder)
    if known not in (None, photo_record.digests_of(photos)) and has_begun(run.folder):
        warnings.warn(
            f"{run.folder} began with other photos than {run.config.subject.photos} has now; "
            "for these, start a new run.",
            stacklevel=2,
        )
    if not ended:
        photo_record.note(run.folder, photos, run.config)


def _read(run: Run, field: str, source: str, photos: Subject | str, advice: str) -> list[Photo]:
    if not Path(source).exists():
        raise RunError(
            f"there is no folder or zip {source}, which {field} in {run.folder / 'config.toml'} "
            f"names; put the photos back there, or if they have moved to FOLDER, {advice}."
        )
    return read_photos(photos)
