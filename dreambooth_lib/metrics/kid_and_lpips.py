"""Compare sets of images: kernel distance (KID) and LPIPS diversity."""

from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

from dreambooth_lib.metrics.clip_scores import unit_rows

if TYPE_CHECKING:
    import torch
    from PIL import Image


def lpips_diversity(pictures: "list[Image.Image]") -> float:
    """Return DIV (section 4.3): the mean LPIPS (arXiv 1801.03924) over pairs, by AlexNet.

    In [0, 1] or a little above, 0 when all are alike. Pictures are equally large. Needs the
    ``lpips`` package (:func:`has_lpips`); raises ``ValueError`` for fewer than two pictures.
    """
    import torch

    if len(pictures) < 2:
        raise ValueError("there is only one picture; give two or more to pair.")
    network = _lpips()
    arrays = [np.asarray(picture.convert("RGB"), np.float32) for picture in pictures]
    pixels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2) / 127.5 - 1
    one, other = torch.triu_indices(len(pictures), len(pictures), 1)
    with torch.inference_mode():
        return float(network(pixels[one], pixels[other]).mean())


def has_lpips() -> bool:
    return find_spec("lpips") is not None


@cache
def _lpips() -> Any:
    import lpips

    return lpips.LPIPS(net="alex", verbose=False).eval()


def kid(pictures: "torch.Tensor", base: "torch.Tensor") -> float:
    """Return the kernel distance of two sets of pictures (KID, arXiv 1801.01401).

    The unbiased estimate of the squared maximum mean discrepancy by the kernel
    ``(x . y / D + 1) ** 3``, rows scaled to length ``sqrt(D)`` so that the kernel sees numbers of
    the size it was made for. About 0, below it by chance, for sets alike. Not comparable with KID
    on Inception features. Takes two rows of each.
    """
    one, other = unit_rows(pictures=pictures, base=base)
    if min(len(one), len(other)) < 2:
        raise ValueError("there is only one row of embeddings; give two or more to compare sets.")

    def among(rows: "torch.Tensor") -> "torch.Tensor":
        kernel = (rows @ rows.T + 1) ** 3
        return (kernel.sum() - kernel.trace()) / (len(rows) * (len(rows) - 1))

    return float(among(one) + among(other) - 2 * ((one @ other.T + 1) ** 3).mean())
