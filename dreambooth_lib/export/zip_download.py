"""Zip a model folder, copy it to a drive, and link to it for download."""

import html
import os
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote
from zipfile import ZIP_STORED, ZipFile

from dreambooth_lib.core import background
from dreambooth_lib.core.disk import format_bytes
from dreambooth_lib.core.errors import printable
from dreambooth_lib.core.files import replacing_file, visible_files

if TYPE_CHECKING:
    from IPython.display import HTML


def zip_folder(folder: Path) -> Path:
    """Zip a folder beside it and return the zip's path; uncompressed, as weights hardly shrink."""
    archive = folder.with_name(f"{folder.name}.zip")
    with replacing_file(archive) as partial, _new_zip(partial) as zip_file:
        for name in visible_files(folder):
            zip_file.write(folder / name, name)
    return archive


def _new_zip(file: Path) -> ZipFile:
    # Strict, it would refuse files that a drive dates before 1980.
    return ZipFile(file, "w", ZIP_STORED, strict_timestamps=False)


def copy_to(folder: str | Path, file: Path, name: str | None = None) -> str | None:
    """Copy a file to a folder, such as Drive's; return None, or a sentence on what went wrong.

    The copy is called ``name``, or else as the file is, and replaces what has that name.
    """
    try:
        place = Path(folder) / (name or file.name)
        background.copy(file, place, drive=folder)
    except OSError as error:
        return (
            f"{file} is complete but could not be copied to {folder} ({str(error).rstrip('.')}); "
            "check that the drive is mounted and has space, and try again."
        )
    return None


def download_link(file: str | Path) -> "HTML":
    """Return a link, with the file's size, that downloads it in JupyterLab and classic Notebook.

    Without the ``download`` attribute, JupyterLab opens the file and fails for a zip. The link is
    relative to the notebook's folder, which is the kernel's working directory.
    """
    from IPython.display import HTML

    name = os.path.relpath(file)
    link = f'<a href="{quote(os.fsencode(name))}" download>{html.escape(printable(name))}</a>'
    return HTML(f"{link} ({format_bytes(os.path.getsize(file))})")
