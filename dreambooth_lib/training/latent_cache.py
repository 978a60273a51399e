"""Encode images once: a cache of latent posteriors that each training step samples from."""

import hashlib
from pathlib import Path

import torch

from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.core.tensor_cache import read_tensors, write_tensors
from dreambooth_lib.data.images import Photo
from dreambooth_lib.data.preprocessing import to_tensor
from dreambooth_lib.families.base import Family, Posterior
from dreambooth_lib.families.precision import NonFinite


class LatentCache:
    """Images as latents: ``sample`` draws from each posterior, so caching changes no statistics.

    A flipped image has a posterior of its own. Random crops are never cached: every draw is encoded
    afresh. With a ``folder`` the posteriors are saved there, in a file named by a digest of the
    images and the autoencoder, and loaded by the next run that needs them. Damaged files are
    replaced. Raises :class:`NonFinite` for latents that are not finite; such are neither saved
    nor loaded.
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
            mean, std = self._encode([self.photos[i] for i in index], flips, generator)
        return mean + std * torch.randn(mean.shape, generator=generator).to(mean.device)

    def _load_or_encode(self, flip: bool, folder: Path | None) -> Posterior:
        """Load all images' posteriors from the folder, or encode and save them."""
        file = folder and folder / f"{self._digest(flip)}.safetensors"
        if file and (cached := read_tensors(file, Posterior._fields)):
            posterior = Posterior(**cached)
            if all(values.isfinite().all() for values in posterior):
                return Posterior(*(values.to(self.family.denoiser.device) for values in posterior))
        size = self.family.batch_size_in_training
        batches = [self.photos[at : at + size] for at in range(0, len(self.photos), size)]
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

    def _encode(
        self, photos: list[Photo], flips: list[bool], generator: torch.Generator | None = None
    ) -> Posterior:
        family = self.family
        pixels = [
            to_tensor(photo.image, family.resolution, self.config.crop, flip, generator)
            for photo, flip in zip(photos, flips, strict=True)
        ]
        posterior = family.encode_images(torch.stack(pixels))
        for photo, *latents in zip(photos, *posterior, strict=True):
            if not all(values.isfinite().all() for values in latents):
                gave = f"latents that are not finite for {photo.name}"
                dtype = family.pipeline.vae.dtype
                raise NonFinite.of("the autoencoder", self.config.base, gave, dtype)
        return posterior
