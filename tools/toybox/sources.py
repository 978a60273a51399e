"""Where a training's composites come from, and the noise that is put on them."""

from typing import Protocol

import numpy as np
import torch

from tools.toybox.world import Picture

#: uint8 [B, H, W, 3]: an array as a world composes it, or a tensor on the device that trains.
Pixels = np.ndarray | torch.Tensor


class Source(Protocol):
    """A world, which composes anew, or a pool (:mod:`tools.toybox.pool`) of what it composed."""

    def batch(self, count: int, rng: np.random.Generator) -> tuple[Pixels, list[Picture]]:
        """Return ``count`` composites and what each shows."""
        ...


def jittered(pixels: Pixels, rng: np.random.Generator, fine: float, coarse: float) -> Pixels:
    """Add normal noise to every value, and to every picture as a whole, on the pixels' device."""
    whole = (len(pixels), 1, 1, 3)
    if isinstance(pixels, np.ndarray):
        noisy = pixels + (rng.normal(0, fine, pixels.shape) + rng.normal(0, coarse, whole))
        return noisy.clip(0, 255).astype(np.uint8)
    generator = torch.Generator(pixels.device).manual_seed(int(rng.integers(2**62)))
    each, one = (
        torch.randn(shape, generator=generator, device=pixels.device)
        for shape in (pixels.shape, whole)
    )
    return (pixels + fine * each + coarse * one).clamp(0, 255).byte()
