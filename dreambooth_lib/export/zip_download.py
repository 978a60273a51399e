"""Zip a model folder, copy it to a drive, and link to it for download."""

import html
import os
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote
from zipfile import ZIP_STORED, ZipFile

from dreambooth_lib.core.files import (
    copy_file,
    replacing_file,
    retry,
    visible_files,
)
from dreambooth_lib.figures.labels import format_bytes

if TYPE_CHECKING:
    from IPython.display import HTML


def zip_folder(folder: Path) -> Path:
    """Zip a folder beside it, uncompressed, as weights hardly shrink; gives the zip."""
    archive = folder.with_name(f"{folder.name}.zip")
    with replacing_file(archive) as partial, ZipFile(partial, "w", ZIP_STORED) as packed:
        for name in visible_files(folder):
            packed.write(folder / name, name)
    return archive


def copy_to(folder: str | Path, file: Path) -> str | None:
    """Copy a file to a folder, such as Drive's; gives None, or a sentence on what did not work."""
    try:
        retry(copy_file, file, Path(folder) / file.name)
    except OSError as error:
        return (
            f"{file} could not be copied to {folder} ({error}); see whether the drive is full or "
            "gone, and run this again: the file itself is whole."
        )
    return None


def download_link(file: str | Path) -> "HTML":
    """Make a link that downloads a file in JupyterLab and the classic Notebook, with its size.

    Without ``download`` Lab opens the file, and fails at a zip. The link is relative, as both look
    for it from the notebook's folder, which is this kernel's.
    """
    from IPython.display import HTML

    name = os.path.relpath(file)
    link = f'<a href="{quote(Path(name).as_posix())}" download>{html.escape(name)}</a>'
    return HTML(f"{link} ({format_bytes(os.path.getsize(file))})")
