"""Forward processes: what a denoiser is shown, what it must predict, and the weight of its error.

Discrete: x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps, with abar_t of the base's noise schedule.
Flow: x_t = (1 - sigma) x_0 + sigma eps, with sigma shifted as the base's sampler shifts it.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch


class Noised(NamedTuple):
    """A noised batch; rows belong together."""

    x_t: torch.Tensor  # [B, C, H, W] what the denoiser sees
    t: torch.Tensor  # [B] timesteps: int64, or float in [0, 1000] of a flow
    target: torch.Tensor  # [B, C, H, W] what it must predict
    weight: torch.Tensor  # [B] w_t, the weight of each row's error


@dataclass(frozen=True)
class DiscreteNoise:
    """The discrete variance-preserving process of Stable Diffusion, predicting epsilon or v.

    ``alphas_cumprod`` is abar_t, float32 [T]. v = sqrt(abar) eps - sqrt(1 - abar) x_0
    (arXiv 2202.00512, appendix D). ``min_snr_gamma`` None gives every row weight 1.
    """

    alphas_cumprod: torch.Tensor
    prediction_type: str = "epsilon"
    min_snr_gamma: float | None = None

    def __post_init__(self) -> None:
        if self.prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(
                f"the base's scheduler has prediction_type '{self.prediction_type}'; "
                "only 'epsilon' and 'v_prediction' can be trained."
            )

    @classmethod
    def of_scheduler(cls, scheduler: Any, min_snr_gamma: float | None = None) -> "DiscreteNoise":
        """The process that a diffusers scheduler of any kind was configured for."""
        from diffusers import DDPMScheduler

        schedule = DDPMScheduler.from_config(scheduler.config)
        prediction_type = schedule.config.prediction_type
        return cls(schedule.alphas_cumprod.float(), prediction_type, min_snr_gamma)

    def sample_timesteps(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """int64 [count], uniform over all timesteps, independent for every row."""
        return torch.randint(0, len(self.alphas_cumprod), (count,), generator=generator)

    def timesteps_at(self, quantiles: torch.Tensor) -> torch.Tensor:
        """int64 [B]: the timesteps at ``quantiles`` in [0, 1) of those that are trained on."""
        return (quantiles * len(self.alphas_cumprod)).long()

    def __call__(self, x_0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> Noised:
        """Noise x_0 [B, C, H, W] with ``noise`` of the same shape to timesteps t [B]."""
        abar = self.alphas_cumprod.to(x_0.device)[t]
        snr = abar / (1 - abar)
        signal, sigma = (c.sqrt().view(-1, 1, 1, 1) for c in (abar, 1 - abar))
        x_t = signal * x_0 + sigma * noise
        target = noise if self.prediction_type == "epsilon" else signal * noise - sigma * x_0
        if self.min_snr_gamma is None:
            weight = torch.ones_like(snr)
        else:
            weight = min_snr_weights(snr, self.min_snr_gamma, self.prediction_type)
        return Noised(x_t, t, target, weight)


@dataclass(frozen=True)
class FlowNoise:
    """Rectified flow (arXiv 2403.03206, section 3): straight from picture to noise, t = 1000 sigma.

    The target is the velocity eps - x_0. u is logit-normal, and sigma = s u / (1 + (s - 1) u) with
    ``shift`` s, so that training visits the noise that sampling does. Every row weighs 1.
    """

    shift: float = 1.0

    @classmethod
    def of_scheduler(
        cls, scheduler: Any, patches: int, min_snr_gamma: float | None = None
    ) -> "FlowNoise":
        """The process of a flow-matching scheduler, for pictures of so many patches.

        Raises ValueError for min-SNR weights, which are of epsilon and v.
        """
        if min_snr_gamma is not None:
            raise ValueError(
                f"min_snr_gamma is {min_snr_gamma} but the base predicts a flow, whose errors it "
                "does not weigh; leave it out."
            )
        config = scheduler.config
        if not config.use_dynamic_shifting:
            return cls(config.shift)
        # Linear in the number of patches, between two sizes that the base's makers chose.
        sizes = config.base_image_seq_len, config.max_image_seq_len
        share = (patches - sizes[0]) / (sizes[1] - sizes[0])
        return cls(math.exp(config.base_shift + share * (config.max_shift - config.base_shift)))

    def sample_timesteps(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """float32 [count] in (0, 1000), independent for every row."""
        return self._timesteps(torch.randn(count, generator=generator))

    def timesteps_at(self, quantiles: torch.Tensor) -> torch.Tensor:
        """float32 [B]: the timesteps at ``quantiles`` in (0, 1) of those that are trained on."""
        return self._timesteps(torch.special.ndtri(quantiles))

    def _timesteps(self, normal: torch.Tensor) -> torch.Tensor:
        u = normal.sigmoid()
        return 1000 * self.shift * u / (1 + (self.shift - 1) * u)

    def __call__(self, x_0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> Noised:
        """Noise x_0 [B, C, H, W] with ``noise`` of the same shape to timesteps t [B]."""
        sigma = (t / 1000).view(-1, 1, 1, 1)
        return Noised((1 - sigma) * x_0 + sigma * noise, t, noise - x_0, torch.ones_like(t))


def min_snr_weights(snr: torch.Tensor, gamma: float, prediction_type: str) -> torch.Tensor:
    """Min-SNR-gamma weights (arXiv 2303.09556) of rows with signal-to-noise ratios ``snr`` [B].

    min(snr, gamma) / snr on epsilon's error, min(snr, gamma) / (snr + 1) on v's: both are
    min(snr, gamma) on the error of x_0.
    """
    clipped = snr.clamp(max=gamma)
    if prediction_type == "epsilon":
        return torch.where(snr > 0, clipped / snr.clamp(min=1e-20), torch.ones_like(snr))
    if prediction_type == "v_prediction":
        return clipped / (snr + 1)
    raise ValueError(f"no min-SNR weights for prediction_type '{prediction_type}'.")
