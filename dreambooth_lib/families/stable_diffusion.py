"""Stable Diffusion 1.x and 2.x, and every base in their layout."""

from typing import Any, ClassVar

import torch

from dreambooth_lib.families.base import Cond, Family
from dreambooth_lib.noise import DiscreteNoise


class StableDiffusion(Family):
    """Adapter of a ``StableDiffusionPipeline``."""

    denoiser_name = "unet"
    options: ClassVar[dict[str, Any]] = {
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }

    def forward_process(self, min_snr_gamma: float | None) -> DiscreteNoise:
        return DiscreteNoise.of_scheduler(self.pipeline.scheduler, min_snr_gamma)

    def encode_prompts(self, prompts: list[str]) -> Cond:
        device = self.pipeline.text_encoder.device
        hidden, _ = self.pipeline.encode_prompt(prompts, device, 1, False)
        return {"encoder_hidden_states": hidden}

    def predict(self, x_t: torch.Tensor, t: torch.Tensor, cond: Cond) -> torch.Tensor:
        return self.denoiser(x_t, t, **cond).sample
