"""The loss on held-out photos and class images: the smooth curve that turns up with overfitting.

The training loss says little, since each step draws its own timesteps. Here noise and timesteps are
fixed, one bin each of the noise schedule, and training's random generators stay untouched. The
subject's losses fall and then rise again; the class's stay near the frozen base's, which is step 0,
as long as the prior is preserved.
"""

from collections.abc import Sequence

import torch

from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.data.images import Photo
from dreambooth_lib.families.base import Family
from dreambooth_lib.families.device_copies import pick
from dreambooth_lib.families.noise_schedule import Noised
from dreambooth_lib.training.latent_cache import LatentCache
from dreambooth_lib.training.losses import latent_weights, per_sample_errors
from dreambooth_lib.training.trainable import Trainable

BINS = 4  #: equal parts of the schedule, least noise first
ROWS = 4  #: noised images of each bin and kind: one image several times, or several images


class HeldOutLoss:
    """Fixed noised latents of each kind of image, ``{"subject": photos, "class": images}``.

    Each bin has as many ``rows`` of a kind.
    """

    def __init__(
        self,
        config: TrainConfig,
        family: Family,
        kinds: dict[str, list[Photo]],
        rows: int = ROWS,
    ):
        everything = BINS * rows
        process, self.batch_size = family.forward_process(None), family.batch_size_in_training
        not_augmented = config.replace(flip=False)
        if config.crop == "random":  # where there are masks, of what they show
            crop = "center" if config.background_weight is None else "subject"
            not_augmented = not_augmented.replace(crop=crop)
        self.weights: dict[str, torch.Tensor | None] = {}  #: of latents, where photos have masks
        self.noised: dict[str, Noised] = {}
        self.prompts: dict[str, list[str]] = {}
        for kind, photos in kinds.items():
            if not photos:
                continue
            indices = [i % len(photos) for _ in range(BINS) for i in range(rows)]
            cache = LatentCache(photos, family, not_augmented, masked=kind == "subject")
            x_0, _, coverage = cache.cached(indices, [False] * everything)
            self.weights[kind] = latent_weights(coverage, config.background_weight)
            noise = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(0))
            # Each in the middle of its own part of the bin.
            quantiles = (torch.arange(everything) + 0.5) / everything
            t = process.timesteps_at(quantiles)
            self.noised[kind] = process(x_0, noise.to(x_0.device), t.to(x_0.device))
            self.prompts[kind] = [photos[i].caption or "" for i in indices]

    @torch.no_grad()
    def losses(self, model: Trainable) -> dict[str, list[float]]:
        """Return the mean squared error of the prediction by kind, one value per timestep bin."""
        everything = {kind: range(len(prompts)) for kind, prompts in self.prompts.items()}
        errors = {kind: self.errors(model, kind, rows) for kind, rows in everything.items()}
        return {kind: values.view(BINS, -1).mean(1).tolist() for kind, values in errors.items()}

    @torch.no_grad()
    def errors(self, model: Trainable, kind: str, rows: Sequence[int]) -> torch.Tensor:
        """Return the squared error of each of these rows of a kind: [len(rows)]."""
        errors = []
        for start in range(0, len(rows), self.batch_size):
            part = list(rows[start : start + self.batch_size])
            noised = Noised(*(pick(value, part) for value in self.noised[kind]))
            prediction = model(noised.x_t, noised.t, None, [self.prompts[kind][i] for i in part])
            weights = self.weights[kind]
            own = weights if weights is None else pick(weights, part)
            errors.append(per_sample_errors(prediction, noised.target, own))
        return torch.cat(errors)
