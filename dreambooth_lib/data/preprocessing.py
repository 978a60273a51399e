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
) -> "torch.Tensor":
    """Return the image as float32 [3, resolution, resolution] in [-1, 1].

    Crops the largest square, in the center or at random by ``generator``, resizes it by Lanczos and
    flips it horizontally with ``flip``. Raises :class:`DataError` for an unknown ``crop``.
    """
    import torch

    if crop not in ("center", "random"):
        raise DataError(f"crop is '{crop}'; it can be 'center' or 'random'.")
    side, spare = min(image.size), max(image.size) - min(image.size)
    offset = spare // 2
    if crop == "random":
        offset = int(torch.randint(spare + 1, (1,), generator=generator))
    left, top = (offset, 0) if image.width > image.height else (0, offset)
    # Resizing the box alone never resizes the long side, which may have millions of pixels.
    box = (left, top, left + side, top + side)
    square = image.convert("RGB").resize((resolution,) * 2, Image.Resampling.LANCZOS, box=box)
    if flip:
        square = ImageOps.mirror(square)
    pixels = torch.from_numpy(np.asarray(square).astype(np.float32))
    return (pixels / 127.5 - 1.0).permute(2, 0, 1).contiguous()


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
