"""What is different on Colab: its secrets, uploads, downloads and Drive. Elsewhere each says so.

How a notebook installs the kit there is in :mod:`.install`; how a run is backed up to
Drive in :mod:`.drive_backup`.
"""

import hashlib
import warnings
from collections.abc import Mapping
from pathlib import Path

from dreambooth_lib.core.hub_token import in_colab
from dreambooth_lib.data.images import DataError

MOUNT = Path("/content/drive")  #: where Colab mounts Drive


def upload(folder: str | Path) -> Path:
    """Ask for pictures or a zip by Colab's own button; the rest is :func:`save_uploads`.

    Raises :class:`DataError` as that does, and outside Colab.
    """
    if not in_colab():
        raise DataError("only Colab has this upload; give load_subject a folder or a zip instead.")
    from google.colab import files

    return save_uploads(files.upload(), folder)


def save_uploads(files: Mapping[str, bytes], folder: str | Path) -> Path:
    """Write uploaded pictures, or a zip of them, into ``folder``; return what load_subject takes.

    Each upload has a sub-folder of its own, named by what is in it, which appears when it is whole:
    another upload neither mixes with it nor changes what an earlier run resumes with. A zip is kept
    as it is. Raises :class:`DataError` for no files, for a name that is a path, for a zip with
    other files, and where ``folder`` cannot be written.
    """
    from dreambooth_lib.core.files import replacing_folder

    if not files:
        raise DataError("nothing was uploaded; choose three to six pictures, or a zip of them.")
    digest = hashlib.sha256()
    for name, content in sorted(files.items()):
        if name in ("", ".", "..") or set(name) & {"/", "\\", "\0"} or Path(name).name != name:
            raise DataError(f"the uploaded file's name {name!r} is a path; rename it.")
        digest.update(f"{name}\0{len(content)}\0".encode())
        digest.update(content)
    zips = [name for name in files if name.lower().endswith(".zip")]
    if zips and len(files) > 1:
        raise DataError(f"'{zips[0]}' was uploaded with other files; upload one zip, or pictures.")
    place = Path(folder) / digest.hexdigest()[:12]
    try:
        if not place.exists():
            with replacing_folder(place) as partial:
                for name, content in files.items():
                    (partial / name).write_bytes(content)
    except OSError as error:
        raise DataError(
            f"the upload cannot be saved in {folder} ({error}); free some space, or choose another "
            "folder."
        ) from None
    return place / zips[0] if zips else place


def download(file: str | Path) -> None:
    """Have the browser download a file from Colab's machine."""
    from google.colab import files

    files.download(str(file))


def mount_drive(folder: str = "dreambooth") -> Path | None:
    """Return a folder of the user's Drive, made if it is not there; None outside Colab.

    Where Drive cannot be had, it warns and returns None: everything but the copy there goes on.
    """
    if not in_colab():
        return None
    from google.colab import drive

    try:
        drive.mount(str(MOUNT))
        place = MOUNT / "MyDrive" / folder
        place.mkdir(exist_ok=True)  # not MyDrive: without it nothing is mounted
    except Exception as error:  # Colab raises many kinds, for a refusal as for a fault
        warnings.warn(
            f"Drive could not be mounted ({type(error).__name__}: {error}); runs stay on this "
            "machine alone until you run this cell again and allow it.",
            stacklevel=2,
        )
        return None
    return place
