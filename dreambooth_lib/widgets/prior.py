"""The class pictures that a run trains with, drawn before it and shown."""

from pathlib import Path

from PIL import Image

from dreambooth_lib import pages, prior, runs, sampling
from dreambooth_lib.config import TrainConfig

_SHOWN = 32


def class_pictures(config: TrainConfig, folder: str | Path) -> Image.Image | None:
    """Draw what is missing for a run in ``folder``, with its progress; return a page of the first.

    None where the config asks the base for none. Raises as ``families.load_model`` does.
    """
    from tqdm.auto import tqdm

    if not config.draws_class_pictures:
        return None
    config = runs.with_whole_paths(config)  # as the run will have it, or it would draw its own
    family = sampling.load_source(config)
    made = prior.class_pictures(config, family, Path(folder) / "class_pictures")
    paths = list(tqdm(made, total=config.class_pictures, unit="picture", miniters=1))
    return pages.grid([Image.open(path) for path in paths[:_SHOWN]], 8)
