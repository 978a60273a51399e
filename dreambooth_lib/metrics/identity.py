"""Measure identity: how early the subject's photos are found among look-alikes."""

from typing import TYPE_CHECKING

from dreambooth_lib.metrics.clip_scores import unit_rows

if TYPE_CHECKING:
    import torch


def average_precision(
    generated: "torch.Tensor", photos: "torch.Tensor", look_alikes: "torch.Tensor"
) -> "torch.Tensor":
    """Return how well each generated image finds the photos among look-alikes, ``[N]`` in (0, 1].

    Each of ``generated [N, D]`` is a query that ranks the gallery, ``photos [M, D]`` and
    ``look_alikes [K, D]``, by cosine; its average precision is the mean, over the photos, of the
    share of photos among all that rank as high. 1 means that every photo comes before every
    look-alike; a look-alike comes first where both are as near. The mean over images is mAP, as in
    Finer-Personalization Rank (arXiv 2512.19026). Raises ``InputError`` for an empty set.
    """
    import torch

    generated, photos = unit_rows(generated=generated, photos=photos)
    _, look_alikes = unit_rows(photos=photos, look_alikes=look_alikes)
    cosines = (generated @ photos.T).sort(-1, descending=True).values  # [N, M]
    others = generated @ look_alikes.T  # [N, K]
    before = (others[:, None] >= cosines[:, :, None]).sum(-1)  # [N, M] look-alikes before a photo
    rank = torch.arange(1, cosines.shape[1] + 1)  # of a photo among the photos
    return (rank / (rank + before)).mean(-1)
