"""The class images that a run trains with, drawn before it and shown."""

from pathlib import Path

from PIL import Image

from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.core.old_names import locate
from dreambooth_lib.figures import image_grids
from dreambooth_lib.training import class_images, runs, sampling

_SHOWN = 32


def show_class_images(config: TrainConfig, folder: str | Path) -> Image.Image | None:
    """Draw what is missing for a run in ``folder``, with its progress; return a page of the first.

    None where the config asks the base for none. Raises as ``families.load_model`` does.
    """
    from tqdm.auto import tqdm

    if not config.draws_class_images:
        return None
    config = runs.with_absolute_paths(config)  # as the run will have it, or it would draw its own
    family = sampling.load_source(config)
    made = class_images.draw_class_images(config, family, locate(folder, "class_images"))
    paths = list(tqdm(made, total=config.class_images, unit="picture", miniters=1))
    return image_grids.grid([Image.open(path) for path in paths[:_SHOWN]], 8)
