"""Stable Diffusion XL: two text encoders, and the picture's size told to the denoiser."""

from collections.abc import Iterable
from itertools import chain
from typing import Any, ClassVar

import torch

from dreambooth_lib.families.base import DTYPE, Cond, Family
from dreambooth_lib.noise import DiscreteNoise

#: SDXL's own autoencoder gives NaN in float16; these weights draw the same and do not.
HALF_VAE = "madebyollin/sdxl-vae-fp16-fix"


class StableDiffusionXL(Family):
    """Adapter of a ``StableDiffusionXLPipeline`` (arXiv 2307.01952)."""

    denoiser_name = "unet"
    encoder_names = ("text_encoder", "text_encoder_2")
    call_names: ClassVar[dict[str, str]] = {
        "hidden": "prompt_embeds",
        "pooled": "pooled_prompt_embeds",
    }

    @classmethod
    def replaced(cls, path: str, half: torch.dtype, options: dict[str, Any]) -> dict[str, Any]:
        from diffusers import AutoencoderKL

        config = AutoencoderKL.load_config(path, subfolder="vae", **options)
        if half is not torch.float16 or not config.get("force_upcast"):
            return {}
        try:
            return {"vae": AutoencoderKL.from_pretrained(HALF_VAE, **{DTYPE: half})}
        except OSError as error:
            raise ValueError(
                f"'{path}' needs another autoencoder in float16, and '{HALF_VAE}' cannot be had "
                "from the Hub; check the network, or set mixed_precision to 'no' or 'bf16'."
            ) from error

    def forward_process(self, min_snr_gamma: float | None) -> DiscreteNoise:
        return DiscreteNoise.of_scheduler(self.pipeline.scheduler, min_snr_gamma)

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

    def without_effect(self) -> Iterable[torch.nn.Parameter]:
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
