"""Encode images once: a cache of latent posteriors that each training step samples from."""

import hashlib
from collections.abc import Sequence
from inspect import signature
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.core.tensor_cache import read_tensors, write_tensors
from dreambooth_lib.core.tensor_files import as_bytes
from dreambooth_lib.data.crops import FOLLOWING, Box, Size, center_for, crop_box
from dreambooth_lib.data.images import DataError, Photo
from dreambooth_lib.data.masks import read_mask
from dreambooth_lib.data.preprocessing import box_for, reduced, resized, to_tensor
from dreambooth_lib.families.base import Family, Posterior
from dreambooth_lib.families.device_copies import to_device
from dreambooth_lib.families.precision import NonFinite

#: For random crops, photos are kept with a shorter side of at most so many resolutions.
KEPT_RESOLUTIONS = 2
KEPT_PIXELS = 128_000_000  #: of these, in all; 384 MB. Others are decoded whenever they are drawn.


class Drawn(NamedTuple):
    """Latents that were drawn, and what was seen of each image."""

    x_0: torch.Tensor  # [B, C, h, w]
    coverage: torch.Tensor | None  # [B, 1, h, w] how much of each latent a mask covers, 0 to 1
    sizes_and_crops: torch.Tensor | None  # int64 [B, 4] of ``Family.size_conditioning``, on the CPU


class LatentCache:
    """Images as latents: ``sample`` draws from each posterior, so caching changes no statistics.

    A flipped image has a posterior of its own. They stay on the CPU, and a step moves those that it
    needs: together they may take gigabytes. Random crops are not cached, unless each image has only
    one: every draw is encoded afresh, of a photo that is kept reduced (:data:`KEPT_RESOLUTIONS`).
    ``shape`` is the size that images are cropped to, by default the family's; with ``masked`` their
    masks are read where the config uses any. With a ``folder`` the posteriors are saved there, in a
    file named by a digest of the images and the autoencoder, and loaded by the next run that needs
    them. Damaged files are replaced. Raises :class:`NonFinite` for latents that are not finite;
    such are neither saved nor loaded. Raises ``DataError`` for a mask that shows nothing in its
    photo's crop.
    """

    def __init__(
        self,
        photos: list[Photo],
        family: Family,
        config: TrainConfig,
        folder: Path | None = None,
        shape: Size | None = None,
        masked: bool = False,
    ):
        self.photos, self.family, self.config = photos, family, config
        self._device = family.denoiser.device
        self.shape = shape or family.size
        self._masks = self._read_masks() if masked and config.background_weight is not None else []
        self.is_masked = any(mask is not None for mask in self._masks)
        self._boxes = [
            crop_box(p.traits.size, self.shape, center_for(p, config.crop)) for p in photos
        ]
        whole = [(0, 0, *photo.traits.size) for photo in photos]
        fixed = config.crop != "random" or self._boxes == whole
        self._kept = [] if fixed else self._reduce()
        flips = [False, True][: 1 + config.flip] if fixed else []
        self.posteriors = [self._load_or_encode(flip, folder) for flip in flips]
        self.coverages: list[torch.Tensor] = []  #: of each flip, where there are masks
        if self.is_masked and fixed:
            everything, latents = range(len(photos)), self.posteriors[0].mean
            self.coverages = [
                self._coverage(everything, [flip] * len(photos), self._boxes, latents)
                for flip in flips
            ]
            self._check_masks()

    def __len__(self) -> int:
        return len(self.photos)

    def sample(self, index: list[int], generator: torch.Generator) -> Drawn:
        """Draw latents of the images at ``index`` on the device."""
        probability = 0.5 if self.config.flip else 0.0
        flips = (torch.rand(len(index), generator=generator) < probability).tolist()
        boxes = [self._boxes[i] for i in index]
        if self.config.crop == "random":  # drawn where there is only one too, as it always was
            sizes = [self.photos[i].traits.size for i in index]
            boxes = [box_for(size, self.shape, "random", generator) for size in sizes]
        if self.posteriors:
            mean, std, coverage = self.cached(index, flips)
        else:
            mean, std = self._encode(index, flips, boxes)
            coverage = self._coverage(index, flips, boxes, mean) if self.is_masked else None
        noise = to_device(torch.randn(mean.shape, generator=generator), mean.device)
        return Drawn(mean + std * noise, coverage, self._framings(index, flips, boxes))

    def cached(
        self, index: list[int], flips: list[bool]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Return the cached means, standard deviations and coverages of images, on the device."""

        def picked(by_flip: Sequence[torch.Tensor]) -> torch.Tensor:
            rows = [by_flip[flip][i] for flip, i in zip(flips, index, strict=True)]
            return to_device(torch.stack(rows), self._device)

        mean, std = map(picked, zip(*self.posteriors, strict=True))
        return mean, std, picked(self.coverages) if self.coverages else None

    def _read_masks(self) -> list[Image.Image | None]:
        side = KEPT_RESOLUTIONS * self.family.resolution
        masks = map(read_mask, self.photos)
        return [None if mask is None else reduced(mask, side) for mask in masks]

    def _check_masks(self) -> None:
        (shown, *_) = (coverage.amax((1, 2, 3)).tolist() for coverage in self.coverages)
        for photo, most in zip(self.photos, shown, strict=True):
            if most == 0:
                raise DataError(
                    f"the mask of {photo.name} shows nothing in its crop; set crop to 'subject', "
                    "or make the mask again."
                )

    def _coverage(
        self, index: Sequence[int], flips: list[bool], boxes: list[Box], latents: torch.Tensor
    ) -> torch.Tensor:
        """Return how much of each latent a mask covers; all of it without a mask."""
        *_, height, width = latents.shape
        parts = torch.ones(len(index), 1, height, width)
        for row, (i, flip, box) in enumerate(zip(index, flips, boxes, strict=True)):
            if (mask := self._masks[i]) is not None:
                size, box_filter = self.photos[i].traits.size, Image.Resampling.BOX
                levels = resized(mask, (width, height), box, size, box_filter)
                part = torch.from_numpy(np.asarray(levels).astype(np.float32) / 255)
                parts[row, 0] = part.flip(-1) if flip else part
        return to_device(parts, latents.device)

    def _framings(
        self, index: list[int], flips: list[bool], boxes: list[Box]
    ) -> torch.Tensor | None:
        """Return where crops lie that the config lets follow the subject; None for squares."""
        if self.config.crop not in FOLLOWING:
            return None
        rows = []
        for i, flip, (left, top, right, _) in zip(index, flips, boxes, strict=True):
            (width, height), scale = self.photos[i].traits.size, self.shape[0] / (right - left)
            left = width - right if flip else left  # of the flipped photo
            rows.append([height, width, round(top * scale), round(left * scale)])
        return torch.tensor(rows)

    def _load_or_encode(self, flip: bool, folder: Path | None) -> Posterior:
        """Load all images' posteriors from the folder, or encode and save them."""
        file = folder and folder / f"{self._digest(flip)}.safetensors"
        if file and (cached := read_tensors(file, Posterior._fields)):
            posterior = Posterior(**cached)
            if all(values.isfinite().all() for values in posterior):
                return posterior
        size = self.family.batch_size_in_training
        everything = range(len(self.photos))
        parts = []
        for batch in (everything[at : at + size] for at in everything[::size]):
            boxes = [self._boxes[i] for i in batch]
            parts.append([part.cpu() for part in self._encode(batch, [flip] * len(batch), boxes)])
        encoded = Posterior(*(torch.cat(values) for values in zip(*parts, strict=True)))
        if file:
            write_tensors(file, encoded._asdict())
        return encoded

    def _digest(self, flip: bool) -> str:
        digest = hashlib.sha256(f"{self.family.resolution} {flip}".encode())
        if self.config.crop in FOLLOWING:
            digest.update(f"{self.shape} {self._boxes}".encode())
        for photo in self.photos:
            digest.update(f"{photo.traits.size}".encode() + photo.traits.digest)
        vae = self.family.pipeline.vae
        defaults = {name: own.default for name, own in signature(type(vae)).parameters.items()}
        scale = {name: vae.config.get(name) for name in ("scaling_factor", "shift_factor")}
        if changed := {name: own for name, own in scale.items() if own != defaults.get(name)}:
            digest.update(f"{changed}".encode())
        for weights in vae.state_dict().values():
            digest.update(as_bytes(weights))
        return digest.hexdigest()[:16]

    def _reduce(self) -> list[Image.Image]:
        """Return the first photos, reduced, as many as are kept."""
        kept, pixels = [], 0
        for photo in self.photos:
            image = reduced(photo.image, KEPT_RESOLUTIONS * self.family.resolution)
            pixels += image.width * image.height
            if pixels > KEPT_PIXELS:
                break
            kept.append(image)
        return kept

    def _image(self, number: int) -> Image.Image:
        return self._kept[number] if number < len(self._kept) else self.photos[number].image

    def _encode(self, index: Sequence[int], flips: list[bool], boxes: Sequence[Box]) -> Posterior:
        family, photos = self.family, [self.photos[i] for i in index]
        pixels = [
            to_tensor(self._image(i), self.shape, box, flip, size=self.photos[i].traits.size)
            for i, flip, box in zip(index, flips, boxes, strict=True)
        ]
        posterior = family.encode_images(torch.stack(pixels))
        for photo, *latents in zip(photos, *posterior, strict=True):
            if not all(values.isfinite().all() for values in latents):
                gave = f"NaN or infinite latents for {photo.name}"
                dtype = family.pipeline.vae.dtype
                raise NonFinite.of("the VAE", self.config.base, gave, dtype)
        return posterior
