"""Turn photos into tensors, and shuffle them without state."""

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps

from dreambooth_lib.data.crops import FOLLOWING, Box, Size, crop_box
from dreambooth_lib.data.images import DataError

if TYPE_CHECKING:
    import torch


def to_tensor(
    image: Image.Image,
    shape: int | Size,
    crop: str | Box = "center",
    flip: bool = False,
    generator: "torch.Generator | None" = None,
    size: Size | None = None,
) -> "torch.Tensor":
    """Return the image as float32 [3, height, width] in [-1, 1].

    ``shape`` is width and height, or the side of a square. Crops the box of :func:`box_for`, or a
    box of its own, resizes it by Lanczos and flips it horizontally with ``flip``. Of a
    :func:`reduced` image whose ``size`` was larger, the crop is the same. Raises
    :class:`DataError` for an unknown ``crop``.
    """
    import torch

    shape, size = (shape, shape) if isinstance(shape, int) else shape, size or image.size
    box = box_for(size, shape, crop, generator) if isinstance(crop, str) else crop
    cropped = resized(image.convert("RGB"), shape, box, size, Image.Resampling.LANCZOS)
    if flip:
        cropped = ImageOps.mirror(cropped)
    pixels = torch.from_numpy(np.asarray(cropped).astype(np.float32))
    return (pixels / 127.5 - 1.0).permute(2, 0, 1).contiguous()


def box_for(
    size: Size,
    shape: Size,
    crop: str,
    generator: "torch.Generator | None" = None,
    center: tuple[float, float] = (0.5, 0.5),
) -> Box:
    """Return the largest box of ``shape``'s proportions, at a center or at random by a generator.

    Raises :class:`DataError` for an unknown ``crop``.
    """
    import torch

    if crop in ("center", *FOLLOWING):
        return crop_box(size, shape, center)
    if crop != "random":
        raise DataError(f"crop is '{crop}'; it can be 'center', 'random', 'subject' or 'buckets'.")
    left, top, right, bottom = crop_box(size, shape, (0, 0))
    spare = max(size[0] - right, size[1] - bottom)
    offset = int(torch.randint(spare + 1, (1,), generator=generator))
    across, down = (offset, 0) if right < size[0] else (0, offset)
    return left + across, top + down, right + across, bottom + down


def resized(
    image: Image.Image, shape: Size, box: Box, size: Size, how: Image.Resampling
) -> Image.Image:
    """Return a box of an image in a new shape; the box is in pixels of an image of ``size``."""
    # Resizing the box alone never resizes the long side, which may have millions of pixels.
    left, top, right, bottom = box
    return image.resize(
        shape,
        how,
        box=(left * image.width / size[0], top * image.height / size[1],
             right * image.width / size[0], bottom * image.height / size[1]),
    )  # fmt: skip


def reduced(image: Image.Image, side: int) -> Image.Image:
    """Return the image with a shorter side of ``side`` pixels, or as it is if it has no more."""
    scale = side / min(image.size)
    if scale >= 1:
        return image
    width, height = (round(edge * scale) for edge in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def shuffled(count: int, seed: int, start: int, length: int) -> list[int]:
    """Return the items from ``start`` on, ``length`` of them, of an endless shuffled stream.

    Each epoch of the stream is 0 to ``count - 1`` in a new order. It depends on the arguments only,
    so that resuming needs no state. Raises :class:`DataError` if ``count`` is below 1.
    """
    if count < 1:
        raise DataError(f"there are {count} items to shuffle; give 1 or more.")
    epochs = range(start // count, -(-(start + length) // count))
    stream = [int(i) for e in epochs for i in np.random.default_rng((seed, e)).permutation(count)]
    return stream[start % count :][:length]
