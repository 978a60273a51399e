"""Generate and show the class images of a run before it trains."""

from pathlib import Path

from PIL import Image

from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.figures import image_grids
from dreambooth_lib.notebook.widgets.loaded_models import release_models
from dreambooth_lib.training import class_images, sampling
from dreambooth_lib.training.config_changes import with_absolute_paths

_SHOWN = 32  # images on the page
_BAR = "{percentage:3.0f}%|{bar}| {n_fmt} of {total_fmt} images"


def show_class_images(config: TrainConfig, folder: str | Path) -> Image.Image | None:
    """Generate the missing class images of a run in ``folder``; return a page of the first.

    Shows a progress bar, and frees what playgrounds have loaded; if no image is missing, the base
    is not loaded. Returns None if the config needs no class images from the base. Raises as
    ``families.load_model`` does.
    """
    from tqdm.auto import tqdm

    if not config.draws_class_images:
        return None
    config = with_absolute_paths(config)  # as in the run, which then reuses these images
    place = Path(folder) / "class_images"
    paths = class_images.stored_class_images(config, place)
    if not paths:
        release_models()
        family = sampling.load_source(config, prompts=class_images.prior_prompts(config))
        drawn = class_images.draw_class_images(config, family, place)
        paths = list(tqdm(drawn, total=config.class_images, bar_format=_BAR, miniters=1))
    return image_grids.grid([Image.open(path) for path in paths[:_SHOWN]], 8)
