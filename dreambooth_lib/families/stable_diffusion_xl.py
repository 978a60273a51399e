"""Stable Diffusion XL: two text encoders, and the picture's size told to the denoiser."""

from collections.abc import Iterable
from itertools import chain
from typing import Any, ClassVar

import torch

from dreambooth_lib.families.base import Cond
from dreambooth_lib.families.inference_settings import Inference
from dreambooth_lib.families.stable_diffusion import StableDiffusion


class StableDiffusionXL(StableDiffusion):
    """Adapter of a ``StableDiffusionXLPipeline`` (arXiv 2307.01952)."""

    encoder_names = ("text_encoder", "text_encoder_2")
    #: The pipeline's own; half of its steps are enough, as in diffusers' scripts for DreamBooth.
    default_inference = Inference(
        steps=50, guidance_scale=5.0, fewest_steps=25, validation_steps=25
    )
    undistilled_base = "stabilityai/stable-diffusion-xl-base-1.0"
    options: ClassVar[dict[str, Any]] = {}
    pipeline_argument_names: ClassVar[dict[str, str]] = {
        "hidden": "prompt_embeds",
        "pooled": "pooled_prompt_embeds",
    }

    def encode_prompts(self, prompts: list[str]) -> Cond:
        pipeline = self.pipeline
        device = pipeline.text_encoder_2.device
        hidden, _, pooled, _ = pipeline.encode_prompt(
            prompts, device=device, do_classifier_free_guidance=False
        )
        if pipeline.config.force_zeros_for_empty_prompt:
            said = torch.tensor([prompt != "" for prompt in prompts], device=device)
            hidden, pooled = hidden * said[:, None, None], pooled * said[:, None]
        return {"hidden": hidden, "pooled": pooled}

    def unused_parameters(self) -> Iterable[torch.nn.Parameter]:
        # Of both encoders the last layer but one is read; of the second one, what pools too.
        encoder = self.pipeline.text_encoder
        if encoder is None:
            return ()
        text = getattr(encoder, "text_model", encoder)  # it has none since transformers 5
        return chain(text.encoder.layers[-1].parameters(), text.final_layer_norm.parameters())

    def predict(self, x_t: torch.Tensor, t: torch.Tensor, cond: Cond) -> torch.Tensor:
        height, width = (side * self.pipeline.vae_scale_factor for side in x_t.shape[-2:])
        # Original size, the crop's corner and the target size, as of a picture that was not cut.
        sizes = torch.tensor([height, width, 0, 0, height, width], device=x_t.device)
        told = {"text_embeds": cond["pooled"], "time_ids": sizes.expand(len(x_t), -1)}
        return self.denoiser(x_t, t, cond["hidden"], added_cond_kwargs=told).sample
