"""Flux.1: latents packed into a sequence, and guidance as an input of the denoiser."""

from typing import Any, ClassVar

import torch

from dreambooth_lib.families.base import Cond, Family, vae_scale
from dreambooth_lib.families.inference_settings import (
    Config,
    Inference,
    Names,
    distilled_by_name,
    distilled_inference,
)

#: The guidance input while training; sampling may use another.
TRAINING_GUIDANCE = 1.0


class Flux(Family):
    """Bases with a ``FluxPipeline``: Flux.1 dev and schnell."""

    large_encoder_names = ("text_encoder_2",)
    tokens_read: ClassVar[dict[str, int]] = {"tokenizer_2": 512}  # the pipeline's default
    #: The pipeline's own; dev's card has guidance 3.5 too.
    default_inference = Inference(
        steps=28, guidance_scale=3.5, fewest_steps=28, validation_steps=28
    )
    undistilled_base = "black-forest-labs/FLUX.1-dev"
    attention_layers = (
        *Family.attention_layers, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"
    )  # fmt: skip
    feed_forward_layers = (
        *Family.feed_forward_layers, "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp"
    )  # fmt: skip

    @classmethod
    def inference_for(
        cls, names: Names, scheduler: Config, denoiser: Config, index: Config
    ) -> Inference:
        if not denoiser.get("guidance_embeds"):  # schnell: 4 steps, guidance 0 by its card
            return distilled_inference(4)
        # A distilled dev, such as Hyper-SD's, takes dev's guidance as its input.
        return (
            distilled_by_name(names, guidance_scale=cls.default_inference.guidance_scale)
            or cls.default_inference
        )

    @staticmethod
    def native_resolution(denoiser: dict[str, Any], vae: dict[str, Any]) -> int:
        return 128 * vae_scale(vae)  # the pipeline's default; no config has it

    def encode_prompts(self, prompts: list[str]) -> Cond:
        hidden, pooled, _ = self.pipeline.encode_prompt(
            prompts, prompts, device=self.pipeline.text_encoder.device
        )
        return {"encoder_hidden_states": hidden, "pooled_projections": pooled}

    def reads_negative(self, guidance_scale: float) -> bool:
        return False  # the pipeline does only at a true_cfg_scale

    def predict(self, x_t: torch.Tensor, t: torch.Tensor, cond: Cond) -> torch.Tensor:
        pipeline, (batch, channels, height, width) = self.pipeline, x_t.shape
        hidden = cond["encoder_hidden_states"]
        guidance = None
        if self.denoiser.config.guidance_embeds:
            guidance = torch.full([batch], TRAINING_GUIDANCE, device=x_t.device)
        packed = self.denoiser(
            hidden_states=pipeline._pack_latents(x_t, batch, channels, height, width),
            timestep=t / 1000,
            guidance=guidance,
            img_ids=pipeline._prepare_latent_image_ids(
                batch, height // 2, width // 2, x_t.device, x_t.dtype
            ),
            txt_ids=torch.zeros(hidden.shape[1], 3, device=x_t.device, dtype=x_t.dtype),
            **cond,
        ).sample
        pixels = (side * pipeline.vae_scale_factor for side in (height, width))
        return pipeline._unpack_latents(packed, *pixels, pipeline.vae_scale_factor)
