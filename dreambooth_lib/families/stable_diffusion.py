"""Stable Diffusion 1.x and 2.x, and all bases in their layout."""

from dataclasses import replace
from typing import Any, ClassVar

import torch
from packaging.version import Version

from dreambooth_lib.core.config import base_defaults
from dreambooth_lib.families.base import Cond, Family, vae_scale
from dreambooth_lib.families.device_copies import runs_on
from dreambooth_lib.families.inference_settings import (
    Config,
    Inference,
    Names,
    distilled_by_name,
    distilled_by_scheduler,
)
from dreambooth_lib.families.long_prompts import encode_in_chunks
from dreambooth_lib.families.noise_schedule import DiscreteNoise

#: The settings with which toybox's figures in README and docs were drawn.
TOYBOX = Inference(
    steps=25,
    guidance_scale=base_defaults("toybox")["guidance_scale"],
    fewest_steps=25,
    validation_steps=10,
    fast_steps=15,
    fast_validation_steps=7,
)


class StableDiffusion(Family):
    """Bases with a ``StableDiffusionPipeline``."""

    denoiser_name = "unet"
    #: The pipeline's own; half the steps are enough, as in diffusers' DreamBooth scripts.
    default_inference = Inference(
        steps=50, guidance_scale=7.5, fewest_steps=25, validation_steps=25,
        fast_steps=15, fast_validation_steps=12,
    )  # fmt: skip
    undistilled_base = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    card_dtype = "float16"
    scheduler_settings = ("beta_start",)
    most_chunks = 3
    skips_layers = True
    options: ClassVar[dict[str, Any]] = {
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }

    @classmethod
    def inference_for(
        cls, names: Names, scheduler: Config, denoiser: Config, index: Config
    ) -> Inference:
        if "toybox" in names:
            return TOYBOX
        own = cls.default_inference
        if scheduler.get("rescale_betas_zero_snr"):  # see drawing.fast_scheduler
            own = replace(own, fast_steps=None, fast_validation_steps=None)
        return distilled_by_scheduler(scheduler, denoiser) or distilled_by_name(names) or own

    @staticmethod
    def native_resolution(denoiser: dict[str, Any], vae: dict[str, Any]) -> int:
        size: int = denoiser["sample_size"]
        made_with = Version(denoiser.get("_diffusers_version", "0.9.0"))
        # Early conversions of bases of 512 pixels say 32; the pipeline corrects that, too.
        if made_with.release < (0, 9) and size < 64:
            size = 64
        return size * vae_scale(vae)

    def forward_process(self, min_snr_gamma: float | None) -> DiscreteNoise:
        return DiscreteNoise.of_scheduler(self.pipeline.scheduler, min_snr_gamma)

    def encode_prompts(self, prompts: list[str]) -> Cond:
        if self.reads_in_chunks(prompts):
            return encode_in_chunks(self, prompts, self.encode_short, self.encode_ids)
        return self.encode_short(prompts)

    def encode_short(self, prompts: list[str]) -> Cond:
        """Encode prompts as the pipeline does, which cuts them at the text encoder's length."""
        device = runs_on(self.pipeline.text_encoder)
        hidden, _ = self.pipeline.encode_prompt(prompts, device, 1, False)
        return {"encoder_hidden_states": hidden}

    def encode_ids(self, ids: list[torch.Tensor]) -> Cond:
        """Encode token ids [B, T] of each tokenizer as the pipeline encodes those of prompts."""
        encoder = self.pipeline.text_encoder
        return {"encoder_hidden_states": encoder(ids[0].to(encoder.device))[0]}

    def predict(self, x_t: torch.Tensor, t: torch.Tensor, cond: Cond) -> torch.Tensor:
        return self.denoiser(x_t, t, **cond).sample
