"""Stable Diffusion 3 and 3.5: three text encoders, and rectified flow."""

import torch

from dreambooth_lib.families.base import Cond, Family
from dreambooth_lib.noise import FlowNoise

_ADDED = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


class StableDiffusion3(Family):
    """Adapter of a ``StableDiffusion3Pipeline`` (arXiv 2403.03206); T5 may be absent."""

    encoder_names = ("text_encoder", "text_encoder_2")
    large_encoder_names = ("text_encoder_3",)
    loads_words = False
    mixes = False  # it joins what its norms gave in the weights' type, which autocast refuses
    attention_layers = (*Family.attention_layers, *_ADDED)
    feed_forward_layers = (
        *Family.feed_forward_layers, "ff_context.net.0.proj", "ff_context.net.2"
    )  # fmt: skip

    def forward_process(self, min_snr_gamma: float | None) -> FlowNoise:
        patches = self.resolution // self.pipeline.vae_scale_factor // self.pipeline.patch_size
        return FlowNoise.of_scheduler(self.pipeline.scheduler, patches**2, min_snr_gamma)

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
