"""The batch of each training step: noised latents of instance and class images, with prompts.

Every draw is a function of (seed, step), never of a generator that lives on.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.data.crops import Size
from dreambooth_lib.data.images import Photo
from dreambooth_lib.data.preprocessing import shuffled
from dreambooth_lib.families.base import Cond, Family
from dreambooth_lib.families.device_copies import pick, rows, to_device
from dreambooth_lib.families.noise_schedule import Noised
from dreambooth_lib.families.prompt_cache import PromptCache
from dreambooth_lib.training.image_sizes import shapes_of
from dreambooth_lib.training.latent_cache import Drawn, LatentCache


class Batch(NamedTuple):
    """Noised latents and their conditioning, row by row, by the base's own text encoders."""

    noised: Noised
    is_prior: torch.Tensor  # bool [B], true for class images; on the CPU, to be read at once
    prompts: list[str]
    cond: Cond
    coverage: torch.Tensor | None = None  # [B, 1, h, w] how much of each latent a mask covers


def seeded_generator(seed: int, step: int, purpose: int) -> torch.Generator:
    """Make a CPU generator for one purpose of one step."""
    from numpy.random import SeedSequence

    (state,) = SeedSequence([seed, step, purpose]).generate_state(1, "uint64")
    return torch.Generator().manual_seed(int(state) >> 1)


class Batches:
    """All images as cached latents, and their captions as cached conditioning.

    ``instance`` are the subject's photos, ``classes`` the class images, none without a prior, or
    the subject's photos to be distilled on. ``prompts`` are more prompts for these, which take half
    of their rows. With ``crop`` "buckets" the photos of a step are of one bucket, and all photos
    are seen equally often; class images are cropped into it. ``folder`` keeps the latents for other
    runs. A ``teacher`` replaces the targets of a batch.
    """

    def __init__(
        self,
        config: TrainConfig,
        family: Family,
        instance: list[Photo],
        classes: list[Photo],
        folder: Path | None = None,
        teacher: Callable[[Batch], Noised] | None = None,
        prompts: Sequence[str] = (),
    ):
        self.config, self.size, self.teacher = config, config.batch_size, teacher
        self.process = family.forward_process(config.min_snr_gamma)
        self.size_conditioning = family.size_conditioning
        self.shapes = shapes_of(instance, family, config)
        #: Of each shape and kind of image, instance first: the latents, and pairs of an image and
        #: its prompt.
        self.by_shape: dict[Size, list[tuple[LatentCache, list[tuple[int, str]]]]] = {}
        for shape in dict.fromkeys(self.shapes):
            self.by_shape[shape] = []
            own = [p for p, other in zip(instance, self.shapes, strict=True) if other == shape]
            for photos in (own, classes):
                pairs = [(i, photo.caption or "") for i, photo in enumerate(photos)]
                if photos is classes:
                    pairs = pairs * max(1, len(prompts))
                    pairs += [(i, p) for i in range(len(photos)) for p in prompts]
                if photos:
                    cache = LatentCache(photos, family, config, folder, shape, photos is own)
                    self.by_shape[shape].append((cache, pairs))
        known = {
            prompt for kinds in self.by_shape.values() for _, pairs in kinds for _, prompt in pairs
        }
        self.prompt_cache = family.prompt_cache or PromptCache(family, known | {""})

    def at(self, step: int) -> Batch:
        """Return the whole batch of a step, instance rows first, the same in every process."""
        config, generator = self.config, seeded_generator(self.config.seed, step, 0)
        drawn, prompts = list[Drawn](), list[str]()
        shape, earlier = self._shape_at(step)
        for stream, (cache, pairs) in enumerate(self.by_shape[shape]):
            # Each kind cycles through all of its images in an order of its own.
            seed, start = 2 * config.seed + stream, (step if stream else earlier) * self.size
            chosen = [pairs[i] for i in shuffled(len(pairs), seed, start, self.size)]
            drawn.append(cache.sample([i for i, _ in chosen], generator))
            prompts += [prompt for _, prompt in chosen]
        x_0 = torch.cat([images.x_0 for images in drawn])
        noise = to_device(torch.randn(x_0.shape, generator=generator), x_0.device)
        t = to_device(self._sample_timesteps(len(x_0), generator), x_0.device)
        dropped = torch.rand(len(x_0), generator=generator) < config.prompt_dropout
        prompts = ["" if drop else p for p, drop in zip(prompts, dropped.tolist(), strict=True)]
        is_prior = torch.arange(len(x_0)) >= self.size
        noised, cond = self.process(x_0, noise, t), self.prompt_cache(prompts)
        known = [own for images in drawn if (own := images.sizes_and_crops) is not None]
        if known:
            cond |= self.size_conditioning(torch.cat(known), shape)
        coverage = drawn[0].coverage
        if coverage is not None:  # of the instance rows; class images have no masks
            coverage = torch.cat([coverage, *(torch.ones_like(coverage) for _ in drawn[1:])])
        return Batch(noised, is_prior, prompts, cond, coverage)

    def _shape_at(self, step: int) -> tuple[Size, int]:
        """Return a step's shape, and how many earlier steps have it.

        In as many steps as there are photos, each shape comes as often as photos have it.
        """
        count = len(self.shapes)
        if len(self.by_shape) == 1:
            return self.shapes[0], step
        epoch, place = divmod(step, count)
        order = shuffled(count, 2 * self.config.seed, epoch * count, place + 1)
        *before, shape = [self.shapes[i] for i in order]
        return shape, epoch * self.shapes.count(shape) + before.count(shape)

    def _sample_timesteps(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """Draw timesteps [count]; with a bias b at the quantiles u ^ exp(-b), u uniform."""
        bias = self.config.timestep_bias
        if bias is None:
            return self.process.sample_timesteps(count, generator)
        quantiles = torch.rand(count, generator=generator) ** math.exp(-bias)
        return self.process.timesteps_at(quantiles.clamp(max=1 - 2**-23))

    def split(self, batch: Batch, part: int, parts: int) -> Batch:
        """Return one of ``parts`` equal parts of a batch, with as much of either kind."""
        starts = range(0, len(batch.prompts), self.size)
        index = [start + i for start in starts for i in range(part, self.size, parts)]
        prompts = [batch.prompts[i] for i in index]
        noised = Noised(*(pick(value, index) for value in batch.noised))
        coverage = batch.coverage if batch.coverage is None else pick(batch.coverage, index)
        split = Batch(noised, batch.is_prior[index], prompts, rows(batch.cond, index), coverage)
        return split if self.teacher is None else split._replace(noised=self.teacher(split))
