"""Stable Diffusion 1.x and 2.x, and every base in their layout."""

from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTokenizer

from dreambooth_lib.families.base import Cond, Outline, Posterior
from dreambooth_lib.noise import DiscreteNoise


class StableDiffusion:
    """Adapter of a ``StableDiffusionPipeline``; its members are those of ``base.Family``."""

    def __init__(self, pipeline: Any):
        self.pipeline = pipeline  # a StableDiffusionPipeline
        self.denoiser = pipeline.unet
        self.text_encoders = [pipeline.text_encoder]
        self.frozen = [pipeline.vae]
        self.lora_targets = ["to_k", "to_q", "to_v", "to_out.0"]
        self.resolution = pipeline.unet.config.sample_size * pipeline.vae_scale_factor

    @classmethod
    def from_pretrained(cls, path: str, **options: object) -> "StableDiffusion":
        pipeline = StableDiffusionPipeline.from_pretrained(
            path,
            use_safetensors=True,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
            **options,
        )
        # Files may hold half precision, and what a missing dtype means differs between versions.
        for module in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
            module.float()
        return cls(pipeline)

    @staticmethod
    def outline(path: str, **options: Any) -> Outline:
        unet = UNet2DConditionModel.load_config(path, subfolder="unet", **options)
        vae = AutoencoderKL.load_config(path, subfolder="vae", **options)
        scale = 2 ** (len(vae["block_out_channels"]) - 1)
        tokenizer = CLIPTokenizer.from_pretrained(path, subfolder="tokenizer", **options)
        return Outline(unet["sample_size"] * scale, tokenizer)

    def forward_process(self, min_snr_gamma: float | None) -> DiscreteNoise:
        return DiscreteNoise.of_scheduler(self.pipeline.scheduler, min_snr_gamma)

    @torch.no_grad()
    def encode_images(self, pixels: torch.Tensor) -> Posterior:
        vae = self.pipeline.vae
        posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
        scale = vae.config.scaling_factor
        return Posterior(posterior.mean.float() * scale, posterior.std.float() * scale)

    def encode_prompts(self, prompts: list[str]) -> Cond:
        tokenizer, encoder = self.pipeline.tokenizer, self.pipeline.text_encoder
        tokens = tokenizer(
            prompts,
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        mask = None
        if getattr(encoder.config, "use_attention_mask", False):
            mask = tokens.attention_mask.to(encoder.device)
        hidden = encoder(tokens.input_ids.to(encoder.device), attention_mask=mask)[0]
        return {"encoder_hidden_states": hidden}

    def predict(self, x_t: torch.Tensor, t: torch.Tensor, cond: Cond) -> torch.Tensor:
        return self.denoiser(x_t, t, **cond).sample
