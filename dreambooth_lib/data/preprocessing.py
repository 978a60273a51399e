"""Turn photos into tensors, and shuffle them without state."""

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps

from dreambooth_lib.data.images import DataError

if TYPE_CHECKING:
    import torch


def to_tensor(
    image: Image.Image,
    resolution: int,
    crop: str = "center",
    flip: bool = False,
    generator: "torch.Generator | None" = None,
    size: tuple[int, int] | None = None,
) -> "torch.Tensor":
    """Return the image as float32 [3, resolution, resolution] in [-1, 1].

    Crops the largest square, in the center or at random by ``generator``, resizes it by Lanczos and
    flips it horizontally with ``flip``. Of a :func:`reduced` image whose ``size`` was larger, the
    crop is the same. Raises :class:`DataError` for an unknown ``crop``.
    """
    import torch

    if crop not in ("center", "random"):
        raise DataError(f"crop is '{crop}'; it can be 'center' or 'random'.")
    width, height = size or image.size
    side, spare = min(width, height), abs(width - height)
    offset = spare // 2
    if crop == "random":
        offset = int(torch.randint(spare + 1, (1,), generator=generator))
    left, top = (offset, 0) if width > height else (0, offset)
    # Resizing the box alone never resizes the long side, which may have millions of pixels.
    right, bottom = left + side, top + side
    box = (
        left * image.width / width,
        top * image.height / height,
        right * image.width / width,
        bottom * image.height / height,
    )
    square = image.convert("RGB").resize((resolution,) * 2, Image.Resampling.LANCZOS, box=box)
    if flip:
        square = ImageOps.mirror(square)
    pixels = torch.from_numpy(np.asarray(square).astype(np.float32))
    return (pixels / 127.5 - 1.0).permute(2, 0, 1).contiguous()


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
