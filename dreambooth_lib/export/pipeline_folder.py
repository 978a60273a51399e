"""Write a checkpoint as a model folder for plain diffusers, with its model card."""

from collections.abc import Collection
from pathlib import Path

from dreambooth_lib.core.files import replacing_folder
from dreambooth_lib.export import model_card
from dreambooth_lib.export.comfyui_lora import ExportError
from dreambooth_lib.export.zip_download import zip_folder
from dreambooth_lib.families.loading import LORA_BASE_FILE
from dreambooth_lib.families.precision import save_pipeline
from dreambooth_lib.training import lora, trainable
from dreambooth_lib.training.runs import Run


def write_model(run: Run, step: int, folder: str | Path, photos: bool = False) -> Path:
    """Write a checkpoint as a model folder with its card, and zip it; return the zip's path.

    ``photos`` is as in :func:`model_card.write_card`. The folder and the zip each appear only when
    they are complete; on failure an older one stays as it was. Raises ``RunError`` if the run has
    no checkpoint or no validation at that step, and ``ExportError`` as :func:`check_replaceable`.
    """
    check_replaceable(folder, ("README.md", "samples.png", "curves.png"))  # as the card has them
    with replacing_folder(Path(folder)) as partial:
        write_pipeline(run, step, partial)
        model_card.write_card(run, step, partial, photos)
    return zip_folder(Path(folder))


def check_replaceable(folder: str | Path, made: Collection[str]) -> None:
    """Raise :class:`ExportError` for a folder of other files, which an export would delete.

    An earlier export has all of the files that are ``made``; other folders may have some.
    """
    folder = Path(folder)
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if names and (".git" in names or not names.issuperset(made)):
        raise ExportError(
            f"{folder} holds other files, which would be deleted; choose a new folder, and copy "
            "its files where you want them."
        )


def write_pipeline(run: Run, step: int, folder: Path) -> None:
    """Write a checkpoint for plain diffusers, without a card.

    This is the whole pipeline in half precision or, for a LoRA run, what ``load_lora_weights``
    loads. Raises ``RunError`` if the run has no checkpoint at that step.
    """
    config, family = run.config, trainable.load_to_export(run, step)
    if config.method == "lora":
        lora.save_lora(family, config, folder)
        if Path(config.base).is_absolute():  # a path means nothing on another machine
            (folder / LORA_BASE_FILE).unlink()
    else:
        save_pipeline(family.pipeline, folder)
