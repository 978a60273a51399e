"""Distilled prior: preserve the frozen base's own predictions for the class, with no class images.

On the subject's noised latents, given the class prompt, the trained denoiser must predict what the
base predicts: L_prior = |f(x_t, t, class) - f_base(x_t, t, class)|^2. Also known as differential
output preservation.

With ``background_prior`` it is also the target of the subject's photos outside their masks.
"""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch

from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.core.subject import Subject
from dreambooth_lib.data.captions import class_caption
from dreambooth_lib.data.images import Photo
from dreambooth_lib.families.base import Family
from dreambooth_lib.families.device_copies import pick, rows, to_device
from dreambooth_lib.families.noise_schedule import Noised
from dreambooth_lib.training import lora
from dreambooth_lib.training.batches import Batch


def with_class_captions(photos: list[Photo], subject: Subject) -> list[Photo]:
    """Return the subject's captioned photos with captions of the class: without the identifier."""
    return [replace(p, caption=class_caption(p.caption or "", subject)) for p in photos]


class Teacher:
    """The frozen base: with LoRA the denoiser without its adapters, else a copy of the denoiser.

    Made before training starts; it predicts within the context that ``autocast`` returns.
    """

    def __init__(
        self,
        family: Family,
        config: TrainConfig,
        dtype: torch.dtype,
        autocast: Callable[[], AbstractContextManager[None]],
    ):
        self.family, self.uses_lora, self.autocast = family, config.method == "lora", autocast
        self.config = config
        if not self.uses_lora:
            self.family = copy.copy(family)
            # diffusers' own ``to`` warns of every cast.
            teacher = torch.nn.Module.to(copy.deepcopy(family.denoiser), dtype)
            self.family.denoiser = teacher.eval()

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Noised:
        """Return the batch's noised rows, the base's prediction as the class rows' target.

        Of the subject's rows with masks the target is a mixture, m t + (1 - m) b f over
        m + (1 - m) b: an error that it is weighted by has the gradient of the subject's and the
        background's errors together, m |p - t|^2 + (1 - m) b |p - f|^2.
        """
        noised, config = batch.noised, self.config
        own = config.background_prior and batch.coverage is not None
        asked = [config.distills if prior else own for prior in batch.is_prior.tolist()]
        index = [row for row, is_asked in enumerate(asked) if is_asked]
        if not index:
            return noised
        inputs = pick(noised.x_t, index), pick(noised.t, index), rows(batch.cond, index)
        without_lora = lora.disabled_lora(self.family) if self.uses_lora else nullcontext()
        with self.autocast(), without_lora:
            prediction = self.family.predict(*inputs)
        target = noised.target
        rows_asked = to_device(index, target.device)
        target = target.index_copy(0, rows_asked, prediction.to(target.dtype))
        if own and batch.coverage is not None and config.background_weight is not None:
            subject = batch.coverage / (
                batch.coverage + (1 - batch.coverage) * config.background_weight
            )
            is_prior = to_device(batch.is_prior, target.device).view(-1, 1, 1, 1)
            target = torch.where(is_prior, target, target.lerp(noised.target, subject))
        return noised._replace(target=target)
