"""Stable Diffusion 3 and 3.5: three text encoders, and rectified flow."""

from typing import ClassVar

import torch

from dreambooth_lib.families.base import Cond, Family
from dreambooth_lib.families.inference_settings import Config, Inference, Names, distilled_by_name

#: Stable Diffusion 3 medium, by its pipeline; 3.5 large, by its card.
_FIRST = Inference(steps=28, guidance_scale=7.0, fewest_steps=28, validation_steps=28)
_LARGE = Inference(steps=28, guidance_scale=3.5, fewest_steps=28, validation_steps=28)
_ADDED = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


class StableDiffusion3(Family):
    """Bases with a ``StableDiffusion3Pipeline`` (arXiv 2403.03206); T5 may be missing."""

    encoder_names = ("text_encoder", "text_encoder_2")
    large_encoder_names = ("text_encoder_3",)
    loads_textual_inversion = False
    tokens_read: ClassVar[dict[str, int]] = {"tokenizer_3": 256}  # the pipeline's default
    #: It concatenates its norms' outputs, which are in the weights' dtype; autocast rejects that.
    bf16_weights_ok = False
    #: 3.5 medium, by its card; the pipeline's own 28 steps are enough.
    default_inference = Inference(
        steps=40, guidance_scale=4.5, fewest_steps=28, validation_steps=28
    )
    undistilled_base = "stabilityai/stable-diffusion-3.5-medium"
    attention_layers = (*Family.attention_layers, *_ADDED)
    feed_forward_layers = (
        *Family.feed_forward_layers, "ff_context.net.0.proj", "ff_context.net.2"
    )  # fmt: skip

    @classmethod
    def inference_for(
        cls, names: Names, scheduler: Config, denoiser: Config, index: Config
    ) -> Inference:
        if distilled := distilled_by_name(names, steps=4):  # 3.5 large turbo's card: 4, guidance 0
            return distilled
        if not denoiser.get("qk_norm"):
            return _FIRST
        return cls.default_inference if denoiser.get("dual_attention_layers") else _LARGE

    def encode_prompts(self, prompts: list[str]) -> Cond:
        hidden, _, pooled, _ = self.pipeline.encode_prompt(
            prompts,
            prompts,
            prompts,
            device=self.pipeline.text_encoder.device,
            do_classifier_free_guidance=False,
        )
        return {"encoder_hidden_states": hidden, "pooled_projections": pooled}

    def predict(self, x_t: torch.Tensor, t: torch.Tensor, cond: Cond) -> torch.Tensor:
        return self.denoiser(x_t, timestep=t, **cond).sample
