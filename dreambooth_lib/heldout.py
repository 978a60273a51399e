"""Loss on pictures that training never sees: the smooth curve that turns up when it overfits.

The training loss says little, since each step draws its own timesteps. Here the noise and the
timesteps are fixed, a bin each of the schedule, and no random generator that training uses is
touched. The subject's bins fall and then rise again; the class's stay near the frozen base's, which
is step 0, while the prior holds.
"""

import torch

from dreambooth_lib.config import TrainConfig
from dreambooth_lib.families.base import Family
from dreambooth_lib.latents import LatentCache
from dreambooth_lib.losses import per_sample_errors
from dreambooth_lib.noise import Noised
from dreambooth_lib.pictures import Photo
from dreambooth_lib.weights import Trainable

BINS = 4  #: equal parts of the schedule, least noise first
ROWS = 4  #: noised rows of each bin and kind: a picture several times, or several pictures


class HeldOut:
    """Fixed noised rows of each kind of picture, ``{"subject": photos, "class": photos}``."""

    def __init__(self, config: TrainConfig, family: Family, kinds: dict[str, list[Photo]]):
        process, self.at_a_time = family.forward_process(None), family.at_a_time
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
            for start in range(0, BINS * ROWS, self.at_a_time):
                part = slice(start, start + self.at_a_time)
                prediction = model(noised.x_t[part], noised.t[part], None, self.prompts[kind][part])
                errors.append(per_sample_errors(prediction, noised.target[part]))
            found[kind] = torch.cat(errors).view(BINS, ROWS).mean(1).tolist()
        return found
