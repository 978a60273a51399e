"""Read the photos that a run's config names."""

from pathlib import Path

from dreambooth_lib.data.images import Photo, read_photos
from dreambooth_lib.training.runs import Run, RunError


def read_subject_photos(run: Run) -> list[Photo]:
    """Read the subject's photos. Raises :class:`RunError` if they are not where they were."""
    subject = run.config.subject
    return _read(
        run, "subject.pictures", subject.pictures,
        f"subject=load_subject(FOLDER, {subject.class_noun!r}, {subject.identifier!r})",
        ", or give the command resume --photos FOLDER",
    )  # fmt: skip


def read_own_class_images(run: Run) -> list[Photo]:
    """Read the user's own class images, if any; raise as :func:`read_subject_photos` does."""
    folder = run.config.class_folder
    return _read(run, "class_folder", folder, "class_folder=FOLDER") if folder else []


def _read(run: Run, field: str, source: str, change: str, command: str = "") -> list[Photo]:
    if not Path(source).exists():
        raise RunError(
            f"there is no folder or zip {source}, which {field} in {run.folder / 'config.toml'} "
            f"names; put the photos back there, or if they have moved to FOLDER, call "
            f"resume('{run.folder}', {change}){command}."
        )
    return read_photos(source)
