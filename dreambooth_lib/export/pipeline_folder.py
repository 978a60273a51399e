"""Write a checkpoint as a model folder for plain diffusers, with its model card."""

from pathlib import Path
from typing import TYPE_CHECKING

from dreambooth_lib.core.files import replacing_folder
from dreambooth_lib.export import model_card
from dreambooth_lib.export.zip_download import zip_folder
from dreambooth_lib.families.loading import LORA_BASE_FILE
from dreambooth_lib.families.precision import save_pipeline
from dreambooth_lib.training import lora, trainable
from dreambooth_lib.training.runs import Run

if TYPE_CHECKING:
    pass


def write_model(run: Run, step: int, folder: str | Path, photos: bool = False) -> Path:
    """Make ``folder`` the model that a checkpoint is, with its card, and a zip beside it; the zip.

    ``photos`` is :func:`model_card.write_card`'s. Each appears when it is whole, and is as it was
    before where this fails. Raises ``RunError`` where the run has no checkpoint of that step, or
    did not look at it.
    """
    with replacing_folder(Path(folder)) as partial:
        write(run, step, partial)
        model_card.write_card(run, step, partial, photos)
    return zip_folder(Path(folder))


def write(run: Run, step: int, folder: Path) -> None:
    """Write a checkpoint as plain diffusers loads it, without a card.

    That is the pipeline in half precision, or of a LoRA run what ``load_lora_weights`` takes.
    Raises ``RunError`` where the run has no checkpoint of that step.
    """
    config, family = run.config, trainable.load_to_export(run, step)
    if config.method == "lora":
        lora.save_lora(family, config, folder)
        if Path(config.base).is_absolute():  # of use to no other machine
            (folder / LORA_BASE_FILE).unlink()
    else:
        save_pipeline(family.pipeline, folder)
