"""Forward processes: noise latents, and give the denoiser's target and the weight of its error.

Discrete: x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps, with abar_t from the base's noise schedule.
Flow: x_t = (1 - sigma) x_0 + sigma eps, with sigma shifted as in the base's scheduler.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from dreambooth_lib.core.errors import InputError
from dreambooth_lib.families.device_copies import to_device

_PROCESS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas",
            "prediction_type", "rescale_betas_zero_snr")  # fmt: skip


class Noised(NamedTuple):
    """A batch of noisy latents."""

    x_t: torch.Tensor  # [B, C, H, W] the denoiser's input
    t: torch.Tensor  # [B] timesteps: int64, or float in [0, 1000] for a flow
    target: torch.Tensor  # [B, C, H, W] what the denoiser must predict
    weight: torch.Tensor  # [B] w_t, the weight of each row's error


@dataclass(frozen=True)
class DiscreteNoise:
    """The discrete variance-preserving process of Stable Diffusion; the target is epsilon or v.

    ``alphas_cumprod`` is abar_t, float32 [T]. v = sqrt(abar) eps - sqrt(1 - abar) x_0
    (arXiv 2202.00512, appendix D). Every row has weight 1 if ``min_snr_gamma`` is None.
    """

    alphas_cumprod: torch.Tensor
    prediction_type: str = "epsilon"
    min_snr_gamma: float | None = None

    def __post_init__(self) -> None:
        if self.prediction_type not in ("epsilon", "v_prediction"):
            raise InputError(
                f"the base's scheduler has prediction_type '{self.prediction_type}'; "
                "the kit can train 'epsilon' and 'v_prediction' only."
            )

    @classmethod
    def of_scheduler(cls, scheduler: Any, min_snr_gamma: float | None = None) -> "DiscreteNoise":
        """Return the process that any diffusers scheduler's config describes."""
        from diffusers import DDPMScheduler

        schedule = DDPMScheduler.from_config(scheduler.config, **process_settings(scheduler.config))
        prediction_type = schedule.config.prediction_type
        return cls(schedule.alphas_cumprod.float(), prediction_type, min_snr_gamma)

    def sample_timesteps(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """Draw timesteps, int64 [count], uniform and independent."""
        return torch.randint(0, len(self.alphas_cumprod), (count,), generator=generator)

    def timesteps_at(self, quantiles: torch.Tensor) -> torch.Tensor:
        """Return the timesteps at ``quantiles`` [B] in [0, 1) of the training's: int64 [B]."""
        return (quantiles * len(self.alphas_cumprod)).long()

    def __call__(self, x_0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> Noised:
        """Add ``noise`` [B, C, H, W] to x_0 [B, C, H, W] up to timesteps t [B]."""
        abar = to_device(self.alphas_cumprod, x_0.device)[t]
        snr = abar / (1 - abar)
        signal, sigma = (c.sqrt().view(-1, 1, 1, 1) for c in (abar, 1 - abar))
        x_t = signal * x_0 + sigma * noise
        target = noise if self.prediction_type == "epsilon" else signal * noise - sigma * x_0
        if self.min_snr_gamma is None:
            weight = torch.ones_like(snr)
        else:
            weight = min_snr_weights(snr, self.min_snr_gamma, self.prediction_type)
        return Noised(x_t, t, target, weight)


def process_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of the noise process in a loaded scheduler's config.

    Pass them on to another class of scheduler: of those that the base's file does not give,
    diffusers would take the other class's defaults instead.
    """
    return {name: config[name] for name in _PROCESS if name in config}


@dataclass(frozen=True)
class FlowNoise:
    """Rectified flow (arXiv 2403.03206, section 3): straight from image to noise, t = 1000 sigma.

    The target is the velocity eps - x_0. u is logit-normal, and sigma = s u / (1 + (s - 1) u) with
    ``shift`` s, so that training sees the noise levels of sampling. Every row has weight 1.
    """

    shift: float = 1.0

    @classmethod
    def of_scheduler(
        cls, scheduler: Any, patches: int, min_snr_gamma: float | None = None
    ) -> "FlowNoise":
        """Return the process of a flow-matching scheduler, for images of ``patches`` patches.

        Raises ``InputError`` for min-SNR weights, which are defined for epsilon and v only.
        """
        if min_snr_gamma is not None:
            raise InputError(
                f"min_snr_gamma is {min_snr_gamma} but the base predicts a flow, for which min-SNR "
                "weights are not defined; leave it out."
            )
        config = scheduler.config
        if not config.use_dynamic_shifting:
            return cls(config.shift)
        # The log of the shift is linear in the number of patches.
        least, most = config.base_image_seq_len, config.max_image_seq_len
        ratio = (patches - least) / (most - least)
        return cls(math.exp(config.base_shift + ratio * (config.max_shift - config.base_shift)))

    def sample_timesteps(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """Draw timesteps, float32 [count] in (0, 1000), independent."""
        return self._timesteps(torch.randn(count, generator=generator))

    def timesteps_at(self, quantiles: torch.Tensor) -> torch.Tensor:
        """Return the timesteps at ``quantiles`` [B] in (0, 1) of the training's: float32 [B]."""
        return self._timesteps(torch.special.ndtri(quantiles))

    def _timesteps(self, normal: torch.Tensor) -> torch.Tensor:
        u = normal.sigmoid()
        return 1000 * self.shift * u / (1 + (self.shift - 1) * u)

    def __call__(self, x_0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> Noised:
        """Add ``noise`` [B, C, H, W] to x_0 [B, C, H, W] up to timesteps t [B]."""
        sigma = (t / 1000).view(-1, 1, 1, 1)
        return Noised((1 - sigma) * x_0 + sigma * noise, t, noise - x_0, torch.ones_like(t))


def min_snr_weights(snr: torch.Tensor, gamma: float, prediction_type: str) -> torch.Tensor:
    """Return min-SNR-gamma weights (arXiv 2303.09556) [B] at signal-to-noise ratios ``snr`` [B].

    They are min(snr, gamma) / snr for epsilon and min(snr, gamma) / (snr + 1) for v; both amount to
    min(snr, gamma) on the error of x_0. Raises ``InputError`` for another ``prediction_type``.
    """
    clipped = snr.clamp(max=gamma)
    if prediction_type == "epsilon":
        return torch.where(snr > 0, clipped / snr.clamp(min=1e-20), torch.ones_like(snr))
    if prediction_type == "v_prediction":
        return clipped / (snr + 1)
    raise InputError(f"there are no min-SNR weights for prediction_type '{prediction_type}'.")
