"""Upload and download files on Colab, and mount Drive.

:mod:`.install` installs the kit there; :mod:`.drive_backup` backs up a run to Drive.
"""

import hashlib
import warnings
from collections.abc import Mapping
from contextlib import chdir
from pathlib import Path, PurePath
from tempfile import TemporaryDirectory
from unicodedata import category

from dreambooth_lib.core import background
from dreambooth_lib.core.errors import KitError
from dreambooth_lib.core.hub_token import in_colab
from dreambooth_lib.core.user_text import problem_with_name
from dreambooth_lib.data.images import DataError, listed
from dreambooth_lib.data.sources import TEXT_SUFFIXES
from dreambooth_lib.notebook import drive_worker

MOUNT = Path("/content/drive")  #: where Colab mounts Drive


class DriveError(KitError, OSError):
    """Drive did not take what was written to it."""


def upload(folder: str | Path, kept: str | Path | None = None) -> Path:
    """Show Colab's upload button for photos or a zip, and save them with :func:`save_uploads`.

    If the user cancels and there are photos that are ``kept`` then, say so and return their path.
    Raises :class:`DataError` as ``save_uploads`` does, and outside Colab.
    """
    if not in_colab():
        raise DataError(
            "this upload works only on Colab; elsewhere, give load_subject a folder or a zip."
        )
    from google.colab import files

    # It writes into the working directory, and renames what is there already.
    with TemporaryDirectory() as empty, chdir(empty):
        uploaded = files.upload()
    if kept and not uploaded:
        print(f"Nothing was uploaded, so the photos in {kept} stay.")
        return Path(kept)
    return save_uploads(uploaded, folder)


def save_uploads(files: Mapping[str, bytes], folder: str | Path) -> Path:
    """Save uploaded photos, or a zip of them, in ``folder``; return the path for load_subject.

    Each upload gets its own sub-folder, named by a hash of its content, which appears only when it
    is complete: uploads never mix, and an earlier run resumes with its own photos. A zip is not
    unpacked. Raises :class:`DataError` if there are no files, a name is a path or none that any
    disk takes, or a zip comes with other files, and ``DiskError`` where ``folder`` cannot be
    written.
    """
    from dreambooth_lib.core.files import replacing_folder

    if not files:
        raise DataError("nothing was uploaded; choose three to six photos, or a zip of them.")
    digest = hashlib.sha256()
    if len({name.lower() for name in files}) < len(files):
        raise DataError("two uploaded names differ only in upper and lower case; rename one file.")
    for name, content in sorted(files.items()):
        # Screenshots of macOS have a space, and emoji joiners, that do not count as printable.
        odd = {c for c in name if not c.isprintable() and category(c) not in ("Cc", "Cs")}
        if problem := problem_with_name("".join("_" if c in odd else c for c in name)):
            raise DataError(f"the name of the upload {name!r} {problem}")
        digest.update(f"{name}\0{len(content)}\0".encode())
        digest.update(content)
    zips = [name for name in files if name.lower().endswith(".zip")]
    if zips and len(files) > 1:
        raise DataError(f"'{zips[0]}' was uploaded with other files; upload one zip, or photos.")
    if all(PurePath(name).suffix.lower() in TEXT_SUFFIXES for name in files):
        raise DataError(
            f"the upload has no photos, only {listed(files)}; choose JPEG or PNG files."
        )
    place = Path(folder) / digest.hexdigest()[:12]
    if not place.exists():
        with replacing_folder(place) as partial:
            for name, content in files.items():
                (partial / name).write_bytes(content)
    return place / zips[0] if zips else place


def download(file: str | Path) -> None:
    """Download a file from Colab's machine with the browser."""
    from google.colab import files

    files.download(str(file))


def end_session() -> None:
    """Give Colab's machine back, so that it costs no more; whatever is not on Drive is lost.

    This first finishes the backups of this session. Colab writes to Drive later than it says, so it
    then waits for that, too. Raises :class:`DriveError` if either fails. Does nothing outside
    Colab.
    """
    if in_colab():
        from google.colab import drive, runtime

        if problem := drive_worker.finish_all():
            raise DriveError(
                f"{problem.rstrip('.')}; the session was not ended: run this cell again later, or "
                "end it under Runtime > Disconnect and delete runtime, which loses what is not on "
                "Drive."
            )
        try:
            drive.flush_and_unmount()
        except Exception as error:  # Colab raises many types
            raise DriveError(
                f"Drive has not taken all files ({type(error).__name__}: {error}), and the session "
                "was not ended; wait a few minutes, and run this cell again."
            ) from error
        runtime.unassign()


def mount_drive() -> Path | None:
    """Mount the user's Drive and return a folder on it, made if missing; None outside Colab.

    If Drive cannot be mounted, warn and return None: a notebook then works without a backup.
    """
    if not in_colab():
        return None
    from google.colab import drive

    try:
        drive.mount(str(MOUNT))
        place = MOUNT / "MyDrive" / "dreambooth"
        # But not MyDrive: if that is missing, nothing is mounted.
        background.call(
            lambda: place.mkdir(exist_ok=True), place=place, limit=background.ANSWER_LIMIT
        )
    except Exception as error:  # Colab raises many types, for a refusal and for a fault
        warnings.warn(
            f"Drive could not be mounted ({type(error).__name__}: {error}); runs are not backed up "
            "until you run this cell again and allow access.",
            stacklevel=2,
        )
        return None
    return place
