"""A checkpoint kept as a model: a folder for plain diffusers with its card, and a zip of it."""

import html
import os
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote
from zipfile import ZIP_STORED, ZipFile

from dreambooth_lib import lora, model_card, weights
from dreambooth_lib.copies import again, copy_file, shown
from dreambooth_lib.families import MADE_OF
from dreambooth_lib.families.precision import save
from dreambooth_lib.runs import Run
from dreambooth_lib.state import replacing_file, replacing_folder
from dreambooth_lib.words import size_in_words

if TYPE_CHECKING:
    from IPython.display import HTML


def keep(run: Run, step: int, folder: str | Path, photos: bool = False) -> Path:
    """Make ``folder`` the model that a checkpoint is, with its card, and a zip beside it; the zip.

    ``photos`` is :func:`model_card.write_card`'s. Each appears when it is whole, and is as it was
    before where this fails. Raises ``RunError`` where the run has no checkpoint of that step, or
    did not look at it.
    """
    with replacing_folder(Path(folder)) as partial:
        write(run, step, partial)
        model_card.write_card(run, step, partial, photos)
    return pack(Path(folder))


def write(run: Run, step: int, folder: Path) -> None:
    """Write a checkpoint as plain diffusers loads it, without a card.

    That is the pipeline in half precision, or of a LoRA run what ``load_lora_weights`` takes.
    Raises ``RunError`` where the run has no checkpoint of that step.
    """
    config, family = run.config, weights.as_trained(run, step)
    if config.method == "lora":
        lora.save(family, config, folder)
        if Path(config.base).is_absolute():  # of use to no other machine
            (folder / MADE_OF).unlink()
    else:
        save(family.pipeline, folder)


def pack(folder: Path) -> Path:
    """Zip a folder beside it, uncompressed, as weights hardly shrink; gives the zip."""
    archive = folder.with_name(f"{folder.name}.zip")
    with replacing_file(archive) as partial, ZipFile(partial, "w", ZIP_STORED) as packed:
        for name in shown(folder):
            packed.write(folder / name, name)
    return archive


def copy_to(folder: str | Path, file: Path) -> str | None:
    """Copy a file to a folder, such as Drive's; gives None, or a sentence on what did not work."""
    try:
        again(copy_file, file, Path(folder) / file.name)
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
    return HTML(f"{link} ({size_in_words(os.path.getsize(file))})")
