"""Compare sets of images: kernel distance (KID) and LPIPS diversity."""

from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

from dreambooth_lib.core.errors import InputError
from dreambooth_lib.metrics.clip_scores import unit_rows

if TYPE_CHECKING:
    import torch
    from PIL import Image

_PAIRS = 8  #: compared at once: one of 1024 x 1024 pixels takes 25 MB, and the network more


def lpips_diversity(images: "list[Image.Image]") -> float:
    """Return DIV (arXiv 2208.12242, section 4.3): the mean LPIPS (arXiv 1801.03924) of all pairs.

    By AlexNet; in [0, 1] or a little above, and 0 if all images are alike. They must have the same
    size. Needs the ``lpips`` package (:func:`has_lpips`). Raises ``InputError`` for fewer than two.
    """
    import torch

    if len(images) < 2:
        raise InputError("there is only one image; give two or more to compare.")
    network = _lpips()
    arrays = [np.asarray(image.convert("RGB"), np.float32) for image in images]
    pixels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2) / 127.5 - 1
    pairs = torch.triu_indices(len(images), len(images), 1).split(_PAIRS, dim=1)
    with torch.inference_mode():
        return float(torch.cat([network(pixels[a], pixels[b]) for a, b in pairs]).mean())


def has_lpips() -> bool:
    return find_spec("lpips") is not None


@cache
def _lpips() -> Any:
    import lpips

    return lpips.LPIPS(net="alex", verbose=False).eval()


def kid(images: "torch.Tensor", base: "torch.Tensor") -> float:
    """Return the kernel distance (KID, arXiv 1801.01401) of two sets of embeddings ``[N, D]``.

    It is the unbiased estimate of the squared maximum mean discrepancy with the kernel
    ``(x . y / D + 1) ** 3``, of rows scaled to length ``sqrt(D)``, the size of features that the
    kernel was made for. Sets alike give about 0, or less by chance. Not comparable with KID on
    Inception features. Raises ``InputError`` for fewer than two rows of either.
    """
    x, y = unit_rows(images=images, base=base)
    if min(len(x), len(y)) < 2:
        raise InputError("there is only one row of embeddings; give two or more to compare sets.")

    def mean_of_pairs(rows: "torch.Tensor") -> "torch.Tensor":
        kernel = (rows @ rows.T + 1) ** 3
        return (kernel.sum() - kernel.trace()) / (len(rows) * (len(rows) - 1))

    return float(mean_of_pairs(x) + mean_of_pairs(y) - 2 * ((x @ y.T + 1) ** 3).mean())
