"""What the training loop needs to know of a model family, and no more."""

from typing import Any, NamedTuple, Protocol

import torch

from dreambooth_lib.noise import Noised

#: Prompt conditioning: named tensors whose first dimension is the batch.
Cond = dict[str, torch.Tensor]


class Posterior(NamedTuple):
    """Scaled latents of pictures as a normal distribution; both [B, C, h, w]."""

    mean: torch.Tensor
    std: torch.Tensor


class Outline(NamedTuple):
    """What of a base is known without its weights."""

    resolution: int  # pixels a side that the base was made for
    tokenizer: Any


class ForwardProcess(Protocol):
    """See :class:`dreambooth_lib.noise.DiscreteNoise`."""

    def sample_timesteps(self, count: int, generator: torch.Generator) -> torch.Tensor: ...

    def timesteps_at(self, quantiles: torch.Tensor) -> torch.Tensor: ...

    def __call__(self, x_0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> Noised: ...


class Family(Protocol):
    """One loaded base. The six things that differ between families are its members."""

    pipeline: Any  #: the diffusers pipeline that all parts belong to
    denoiser: Any  #: a diffusers model
    text_encoders: list[Any]  #: transformers models
    frozen: list[Any]  #: what never trains, such as the autoencoder
    resolution: int  #: pixels a side that the base was made for
    lora_targets: list[str]

    def forward_process(self, min_snr_gamma: float | None) -> ForwardProcess: ...

    def encode_images(self, pixels: torch.Tensor) -> Posterior:
        """Pixels [B, 3, H, W] in [-1, 1] to latents, scaled as the denoiser expects them."""
        ...

    def encode_prompts(self, prompts: list[str]) -> Cond: ...

    def predict(self, x_t: torch.Tensor, t: torch.Tensor, cond: Cond) -> torch.Tensor:
        """The denoiser's output [B, C, h, w] for noisy latents, timesteps [B] and prompts."""
        ...


def rows(cond: Cond, index: list[int]) -> Cond:
    """Some rows of prompt conditioning, in the order of ``index``."""
    return {name: value[index] for name, value in cond.items()}
