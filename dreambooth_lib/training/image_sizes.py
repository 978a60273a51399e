"""Decide what size each photo is cropped to, and what size a run draws its images in."""

import warnings
from typing import Any

from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.data.crops import Size, bucket_of, buckets, most_common
from dreambooth_lib.data.images import Photo, read_photos
from dreambooth_lib.data.sources import DataError
from dreambooth_lib.families import loading
from dreambooth_lib.families.base import Family
from dreambooth_lib.training.runs import Run

MOST_PIXELS = 2**14  # of a side


def shapes_of(photos: list[Photo], family: Family, config: TrainConfig) -> list[Size]:
    """Return the size that each photo is cropped to: its bucket, or a square."""
    if config.crop != "buckets":
        return [(family.resolution,) * 2] * len(photos)
    multiple = family.size_multiple(dict(family.denoiser.config), dict(family.pipeline.vae.config))
    sizes = buckets(family.resolution, multiple)
    return [bucket_of(photo.traits.size, sizes) for photo in photos]


def bucket_sizes(config: TrainConfig) -> list[Size]:
    """Return the sizes of a config's buckets by its base's small files; none if it crops squares.

    Raises as ``load_model`` does.
    """
    if config.crop != "buckets":
        return []
    base = loading.inspect_base(config.base, config.revision)
    return buckets(config.resolution or base.resolution, base.size_multiple)


def fit_to_photos(family: Family, config: TrainConfig) -> None:
    """Let a family draw in the bucket of most photos, or in squares. Raises as ``read_photos``."""
    photos = read_photos(config.subject) if config.crop == "buckets" else []
    shapes = shapes_of(photos, family, config)
    family.size = most_common(shapes) if shapes else (family.resolution,) * 2


def size_to_save(family: Family) -> dict[str, Any]:
    """Return the size in which a run draws its images, for its checkpoints; {} for squares."""
    return {} if family.size == (family.resolution,) * 2 else {"size": [*family.size]}


def saved_size(run: Run, step: int | None = None) -> Size | None:
    """Return the size that a run's checkpoint, or pipeline, was saved with; None for squares."""
    from dreambooth_lib.training.checkpoints import load_state

    checkpoints = run.checkpoints()
    if step is None and not run.has_pipeline:
        step = max(checkpoints, default=None)
    if step is None:
        size = run.trained().get("size")
    else:
        size = load_state(checkpoints[step], ("size",)).get("size") if step in checkpoints else None
    match size:
        case [int() as width, int() as height] if min(size) > 0 and max(size) <= MOST_PIXELS:
            return width, height
    return None


def size_of_images(run: Run) -> Size | None:
    """Return the size in which a run's pipeline draws its images; None for its base's own."""
    side = run.config.resolution
    return saved_size(run) or (None if side is None else (side, side))


def fit_to_run(family: Family, source: Run | TrainConfig, step: int | None = None) -> None:
    """Let a family draw as a run's own images are, or will be: in the bucket of most photos."""
    config = source.config if isinstance(source, Run) else source
    if config.crop != "buckets":
        return
    size = saved_size(source, step) if isinstance(source, Run) else None
    if size is not None:
        family.size = size
        return
    try:
        fit_to_photos(family, config)
    except DataError as error:
        warnings.warn(f"images are generated as squares, because {error}", stacklevel=3)
