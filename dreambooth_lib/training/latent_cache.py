"""Encode images once: a cache of latent posteriors that each training step samples from."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.core.tensor_cache import read_tensors, write_tensors
from dreambooth_lib.data.images import Photo
from dreambooth_lib.data.preprocessing import reduced, to_tensor
from dreambooth_lib.families.base import Family, Posterior
from dreambooth_lib.families.device_copies import to_device
from dreambooth_lib.families.precision import NonFinite

#: For random crops, photos are kept with a shorter side of at most so many resolutions.
KEPT_RESOLUTIONS = 2
KEPT_PIXELS = 128_000_000  #: of these, in all; 384 MB. Others are decoded whenever they are drawn.


class LatentCache:
    """Images as latents: ``sample`` draws from each posterior, so caching changes no statistics.

    A flipped image has a posterior of its own. Random crops are never cached: every draw is encoded
    afresh, of a photo that is kept reduced (:data:`KEPT_RESOLUTIONS`). With a ``folder`` the
    posteriors are saved there, in a file named by a digest of the images and the autoencoder, and
    loaded by the next run that needs them. Damaged files are replaced. Raises :class:`NonFinite`
    for latents that are not finite; such are neither saved nor loaded.
    """

    def __init__(
        self,
        photos: list[Photo],
        family: Family,
        config: TrainConfig,
        folder: Path | None = None,
    ):
        self.photos, self.family, self.config = photos, family, config
        flips = [False, True][: 1 + config.flip] if config.crop == "center" else []
        self._kept = [] if flips else self._reduce()
        self.posteriors = [self._load_or_encode(flip, folder) for flip in flips]

    def __len__(self) -> int:
        return len(self.photos)

    def sample(self, index: list[int], generator: torch.Generator) -> torch.Tensor:
        """Draw latents [len(index), C, h, w] of the images at ``index`` on the device."""
        probability = 0.5 if self.config.flip else 0.0
        flips = (torch.rand(len(index), generator=generator) < probability).tolist()
        if self.posteriors:
            posteriors = [self.posteriors[flip] for flip in flips]
            mean = torch.stack([p.mean[i] for p, i in zip(posteriors, index, strict=True)])
            std = torch.stack([p.std[i] for p, i in zip(posteriors, index, strict=True)])
        else:
            mean, std = self._encode(index, flips, generator)
        return mean + std * to_device(torch.randn(mean.shape, generator=generator), mean.device)

    def _load_or_encode(self, flip: bool, folder: Path | None) -> Posterior:
        """Load all images' posteriors from the folder, or encode and save them."""
        file = folder and folder / f"{self._digest(flip)}.safetensors"
        if file and (cached := read_tensors(file, Posterior._fields)):
            posterior = Posterior(**cached)
            if all(values.isfinite().all() for values in posterior):
                return Posterior(*(values.to(self.family.denoiser.device) for values in posterior))
        size = self.family.batch_size_in_training
        everything = range(len(self.photos))
        batches = [everything[at : at + size] for at in everything[::size]]
        parts = [self._encode(batch, [flip] * len(batch)) for batch in batches]
        encoded = Posterior(*(torch.cat(values) for values in zip(*parts, strict=True)))
        if file:
            write_tensors(file, encoded._asdict())
        return encoded

    def _digest(self, flip: bool) -> str:
        digest = hashlib.sha256(f"{self.family.resolution} {flip}".encode())
        for photo in self.photos:
            digest.update(f"{photo.traits.size}".encode() + photo.traits.digest)
        for weights in self.family.pipeline.vae.state_dict().values():
            # As bytes: NumPy has no bfloat16.
            digest.update(weights.cpu().contiguous().flatten().view(torch.uint8).numpy())
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

    def _encode(
        self, index: Sequence[int], flips: list[bool], generator: torch.Generator | None = None
    ) -> Posterior:
        family, photos = self.family, [self.photos[i] for i in index]
        pixels = [
            to_tensor(
                self._image(i), family.resolution, self.config.crop, flip, generator,
                size=self.photos[i].traits.size,
            )
            for i, flip in zip(index, flips, strict=True)
        ]  # fmt: skip
        posterior = family.encode_images(torch.stack(pixels))
        for photo, *latents in zip(photos, *posterior, strict=True):
            if not all(values.isfinite().all() for values in latents):
                gave = f"latents that are not finite for {photo.name}"
                dtype = family.pipeline.vae.dtype
                raise NonFinite.of("the autoencoder", self.config.base, gave, dtype)
        return posterior
