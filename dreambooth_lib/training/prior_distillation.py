"""The distilled prior: the frozen base's own prediction for the class is what must be kept.

On the subject's noised pictures, told the class prompt, the trained denoiser must predict what the
base predicts: L_prior = |f(x_t, t, class) - f_base(x_t, t, class)|^2. It needs no class images.
The same is known elsewhere as differential output preservation.
"""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch

from dreambooth_lib.core.config import Subject, TrainConfig
from dreambooth_lib.data.images import Photo
from dreambooth_lib.families.base import Family, rows
from dreambooth_lib.families.noise_schedule import Noised
from dreambooth_lib.training import lora
from dreambooth_lib.training.batches import Batch


def with_class_captions(photos: list[Photo], subject: Subject) -> list[Photo]:
    """Return the subject's captioned pictures with the class noun in place of the subject."""
    noun = subject.class_noun
    return [replace(p, caption=(p.caption or "").replace(subject.token, noun)) for p in photos]


class Teacher:
    """The frozen base: under LoRA the adapted one switched off, else a copy of its denoiser.

    Made before anything is trained; ``autocast`` gives the context that it predicts in.
    """

    def __init__(
        self,
        family: Family,
        config: TrainConfig,
        half: torch.dtype,
        autocast: Callable[[], AbstractContextManager[None]],
    ):
        self.family, self.adapted, self.autocast = family, config.method == "lora", autocast
        if not self.adapted:
            self.family = copy.copy(family)
            self.family.denoiser = copy.deepcopy(family.denoiser).to(half).eval()

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Noised:
        """Return the batch's noised rows, the base's prediction as the class rows' target."""
        noised, index = batch.noised, batch.is_prior.nonzero().flatten().tolist()
        asked = noised.x_t[index], noised.t[index], rows(batch.cond, index)
        with self.autocast(), lora.disabled_lora(self.family) if self.adapted else nullcontext():
            kept = self.family.predict(*asked)
        target = noised.target.clone()
        target[index] = kept.to(target.dtype)
        return noised._replace(target=target)
