"""Pictures encoded once: a cache of latent posteriors that is sampled anew at each step."""

import hashlib
from pathlib import Path

import torch

from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.data.images import Photo
from dreambooth_lib.data.preprocessing import to_tensor
from dreambooth_lib.families.base import Family, Posterior
from dreambooth_lib.families.precision import NonFinite


class LatentCache:
    """Pictures as latents. ``sample`` draws from each posterior, so caching changes no statistic.

    A mirrored picture has a posterior of its own. With random crops every draw is encoded afresh,
    since no two are the same picture. With a ``folder`` the posteriors are kept there, in a file
    named by the pictures' and the autoencoder's content, and read by the next run that needs them.
    Raises :class:`NonFinite` for latents that are not finite; such are neither kept nor read.
    """

    def __init__(
        self,
        photos: list[Photo],
        family: Family,
        config: TrainConfig,
        folder: Path | None = None,
    ):
        self.photos, self.family, self.config = photos, family, config
        mirrors = [False, True][: 1 + config.flip] if config.crop == "center" else []
        self.posteriors = [self._kept(mirror, folder) for mirror in mirrors]

    def __len__(self) -> int:
        return len(self.photos)

    def sample(self, index: list[int], generator: torch.Generator) -> torch.Tensor:
        """Draw latents [len(index), C, h, w] of the pictures at ``index`` on the device."""
        share = 0.5 if self.config.flip else 0.0
        mirrored = (torch.rand(len(index), generator=generator) < share).tolist()
        if self.posteriors:
            found = [self.posteriors[m] for m in mirrored]
            mean = torch.stack([p.mean[i] for p, i in zip(found, index, strict=True)])
            std = torch.stack([p.std[i] for p, i in zip(found, index, strict=True)])
        else:
            mean, std = self._encode([self.photos[i] for i in index], mirrored, generator)
        return mean + std * torch.randn(mean.shape, generator=generator).to(mean.device)

    def _kept(self, mirror: bool, folder: Path | None) -> Posterior:
        """Read all pictures' posteriors from the folder, or encode and write them."""
        from safetensors.torch import load_file, save

        from dreambooth_lib.core.files import replace_file

        file = folder and folder / f"{self._digest(mirror)}.safetensors"
        if file and file.exists():
            kept = Posterior(**load_file(file, str(self.family.denoiser.device)))
            if all(values.isfinite().all() for values in kept):
                return kept
        size = self.family.batch_size_in_training
        batches = [self.photos[at : at + size] for at in range(0, len(self.photos), size)]
        parts = [self._encode(batch, [mirror] * len(batch)) for batch in batches]
        made = Posterior(*(torch.cat(values) for values in zip(*parts, strict=True)))
        if file:
            replace_file(file, save({k: v.contiguous() for k, v in made._asdict().items()}))
        return made

    def _digest(self, mirror: bool) -> str:
        digest = hashlib.sha256(f"{self.family.resolution} {mirror}".encode())
        for photo in self.photos:
            digest.update(f"{photo.image.size}".encode() + photo.image.tobytes())
        for weights in self.family.pipeline.vae.state_dict().values():
            # As bytes: NumPy knows no bfloat16.
            digest.update(weights.cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()[:16]

    def _encode(
        self, photos: list[Photo], mirrored: list[bool], generator: torch.Generator | None = None
    ) -> Posterior:
        family = self.family
        pixels = [
            to_tensor(photo.image, family.resolution, self.config.crop, mirror, generator)
            for photo, mirror in zip(photos, mirrored, strict=True)
        ]
        posterior = family.encode_images(torch.stack(pixels))
        for photo, *latents in zip(photos, *posterior, strict=True):
            if not all(values.isfinite().all() for values in latents):
                gave = f"latents that are not finite of {photo.name}"
                dtype = family.pipeline.vae.dtype
                raise NonFinite.of("the autoencoder", self.config.base, gave, dtype)
        return posterior
