"""Decide what size each photo is cropped to, and what size a run draws its images in."""

from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.data.crops import Size, bucket_of, buckets, most_common
from dreambooth_lib.data.images import Photo, read_photos
from dreambooth_lib.families.base import Family


def shapes_of(photos: list[Photo], family: Family, config: TrainConfig) -> list[Size]:
    """Return the size that each photo is cropped to: its bucket, or a square."""
    if config.crop != "buckets":
        return [(family.resolution,) * 2] * len(photos)
    multiple = family.size_multiple(dict(family.denoiser.config), dict(family.pipeline.vae.config))
    sizes = buckets(family.resolution, multiple)
    return [bucket_of(photo.traits.size, sizes) for photo in photos]


def fit_to_photos(family: Family, config: TrainConfig) -> None:
    """Let a family draw in the bucket of most photos, or in squares. Raises as ``read_photos``."""
    photos = read_photos(config.subject) if config.crop == "buckets" else []
    shapes = shapes_of(photos, family, config)
    family.size = most_common(shapes) if shapes else (family.resolution,) * 2
