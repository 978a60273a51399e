"""Stable Diffusion XL: two text encoders, and the image's size as an input of the denoiser."""

from collections.abc import Iterable
from itertools import chain
from typing import Any, ClassVar

import torch

from dreambooth_lib.families.base import Cond
from dreambooth_lib.families.device_copies import runs_on, to_device
from dreambooth_lib.families.inference_settings import Inference
from dreambooth_lib.families.stable_diffusion import StableDiffusion


class StableDiffusionXL(StableDiffusion):
    """Bases with a ``StableDiffusionXLPipeline`` (arXiv 2307.01952)."""

    encoder_names = ("text_encoder", "text_encoder_2")
    #: The pipeline's own; half the steps are enough, as in diffusers' DreamBooth scripts.
    default_inference = Inference(
        steps=50, guidance_scale=5.0, fewest_steps=25, validation_steps=25,
        fast_steps=15, fast_validation_steps=12,
    )  # fmt: skip
    undistilled_base = "stabilityai/stable-diffusion-xl-base-1.0"
    skips_layers = False  # it reads by the last layer but one as it is
    options: ClassVar[dict[str, Any]] = {}
    pipeline_argument_names: ClassVar[dict[str, str]] = {
        "hidden": "prompt_embeds",
        "pooled": "pooled_prompt_embeds",
    }

    def encode_short(self, prompts: list[str]) -> Cond:
        pipeline = self.pipeline
        device = runs_on(pipeline.text_encoder_2)
        hidden, _, pooled, _ = pipeline.encode_prompt(
            prompts, device=device, do_classifier_free_guidance=False
        )
        if pipeline.config.force_zeros_for_empty_prompt:
            filled = to_device([prompt != "" for prompt in prompts], device)
            hidden, pooled = hidden * filled[:, None, None], pooled * filled[:, None]
        return {"hidden": hidden, "pooled": pooled}

    def encode_ids(self, ids: list[torch.Tensor]) -> Cond:
        outputs = [
            encoder(own.to(encoder.device), output_hidden_states=True)
            for encoder, own in zip(self.text_encoders, ids, strict=True)
        ]
        hidden = torch.cat([output.hidden_states[-2] for output in outputs], -1)
        return {"hidden": hidden, "pooled": outputs[-1][0]}

    def size_conditioning(self, sizes_and_crops: torch.Tensor, shape: tuple[int, int]) -> Cond:
        width, height = shape
        target = torch.tensor([height, width]).expand(len(sizes_and_crops), -1)
        sizes = torch.cat([sizes_and_crops, target], 1)
        return {"time_ids": to_device(sizes, self.denoiser.device)}

    def unused_parameters(self) -> Iterable[torch.nn.Parameter]:
        # The pipeline reads the penultimate layer of both encoders, and the second one's pooled
        # output: the first one's last layer and norm are unused.
        encoder = self.pipeline.text_encoder
        if encoder is None:
            return ()
        text = getattr(encoder, "text_model", encoder)  # one with a projection has it
        return chain(text.encoder.layers[-1].parameters(), text.final_layer_norm.parameters())

    def predict(self, x_t: torch.Tensor, t: torch.Tensor, cond: Cond) -> torch.Tensor:
        sizes = cond.get("time_ids")
        if sizes is None:
            height, width = (side * self.pipeline.vae_scale_factor for side in x_t.shape[-2:])
            # Original size, the crop's corner and target size of an image that was not cropped.
            sizes = to_device([height, width, 0, 0, height, width], x_t.device).expand(len(x_t), -1)
        added = {"text_embeds": cond["pooled"], "time_ids": sizes}
        return self.denoiser(x_t, t, cond["hidden"], added_cond_kwargs=added).sample
