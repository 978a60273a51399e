"""Loss on pictures that training never sees: the smooth curve that turns up when it overfits.

The training loss says little, since each step draws its own timesteps. Here the noise and the
timesteps are fixed, a bin each of the schedule, and no random generator that training uses is
touched. The subject's bins fall and then rise again; the class's stay near the frozen base's, which
is step 0, while the prior holds.
"""

import torch

from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.data.images import Photo
from dreambooth_lib.families.base import Family
from dreambooth_lib.families.noise_schedule import Noised
from dreambooth_lib.training.latent_cache import LatentCache
from dreambooth_lib.training.losses import per_sample_errors
from dreambooth_lib.training.trainable import Trainable

BINS = 4  #: equal parts of the schedule, least noise first
ROWS = 4  #: noised rows of each bin and kind: a picture several times, or several pictures


class HeldOutLoss:
    """Fixed noised rows of each kind of picture, ``{"subject": photos, "class": photos}``."""

    def __init__(self, config: TrainConfig, family: Family, kinds: dict[str, list[Photo]]):
        process, self.batch_size_in_training = (
            family.forward_process(None),
            family.batch_size_in_training,
        )
        plain = config.replace(crop="center", flip=False)
        self.noised: dict[str, Noised] = {}
        self.prompts: dict[str, list[str]] = {}
        for kind, photos in kinds.items():
            if not photos:
                continue
            shown = [i % len(photos) for _ in range(BINS) for i in range(ROWS)]
            (posterior,) = LatentCache(photos, family, plain).posteriors
            x_0 = posterior.mean[shown]
            noise = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(0))
            # Each row in the middle of its own quarter of the bin.
            quantiles = (torch.arange(BINS * ROWS) + 0.5) / (BINS * ROWS)
            t = process.timesteps_at(quantiles)
            self.noised[kind] = process(x_0, noise.to(x_0.device), t.to(x_0.device))
            self.prompts[kind] = [photos[i].caption or "" for i in shown]

    @torch.no_grad()
    def losses(self, model: Trainable) -> dict[str, list[float]]:
        """Return the mean squared error of the prediction, by kind, one value a bin."""
        found = {}
        for kind, noised in self.noised.items():
            errors = []
            for start in range(0, BINS * ROWS, self.batch_size_in_training):
                part = slice(start, start + self.batch_size_in_training)
                prediction = model(noised.x_t[part], noised.t[part], None, self.prompts[kind][part])
                errors.append(per_sample_errors(prediction, noised.target[part]))
            found[kind] = torch.cat(errors).view(BINS, ROWS).mean(1).tolist()
        return found
