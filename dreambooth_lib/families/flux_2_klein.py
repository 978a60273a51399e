"""FLUX.2 klein: latents in patches, normalised by the autoencoder, and a language model's text."""

from typing import Any, ClassVar

import torch

from dreambooth_lib.families.base import Cond, Family, Posterior, vae_scale
from dreambooth_lib.families.inference_settings import (
    Config,
    Inference,
    Names,
    distilled_by_name,
    distilled_inference,
)

LENGTH = 512  #: tokens of each prompt in the chat template, padded: the pipeline's default


class Flux2Klein(Family):
    """Bases with a ``Flux2KleinPipeline``: klein-base 4B and 9B, and klein, distilled from them.

    Latents are patches of 2 x 2 of the autoencoder's, [B, 128, h, w] for 16 x 16 pixels each. The
    training's shift is that of FLUX.1, which the pipeline's empirical one is at 200 steps; images
    are drawn with the pipeline's own, which is higher for fewer steps.
    """

    encoder_names = ()
    large_encoder_names = ("text_encoder",)
    loads_textual_inversion = False
    #: The chat template begins with three.
    tokens_read: ClassVar[dict[str, int]] = {"tokenizer": LENGTH - 3}
    #: The pipeline's own.
    default_inference = Inference(
        steps=50, guidance_scale=4.0, fewest_steps=28, validation_steps=28
    )
    undistilled_base = "black-forest-labs/FLUX.2-klein-base-4B"
    attention_layers = (
        *Family.attention_layers, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
        "to_qkv_mlp_proj",
    )  # fmt: skip
    feed_forward_layers = (
        "ff.linear_in", "ff.linear_out", "ff_context.linear_in", "ff_context.linear_out"
    )  # fmt: skip

    @classmethod
    def inference_for(
        cls, names: Names, scheduler: Config, denoiser: Config, index: Config
    ) -> Inference:
        if index.get("is_distilled"):  # klein: 4 steps by its card; 1.0 is no guidance
            return distilled_inference(4, 1.0)
        return distilled_by_name(names, 4, 1.0) or cls.default_inference

    @staticmethod
    def native_resolution(denoiser: dict[str, Any], vae: dict[str, Any]) -> int:
        return 128 * vae_scale(vae)  # the pipeline's default; no config has it

    @property
    def latent_size(self) -> tuple[int, int]:
        channels, side = super().latent_size
        return 4 * channels, side // 2

    def lora_layers(self, feed_forward: bool) -> list[str]:
        # The single blocks' outputs by their whole names: in the others, "to_out" is a list.
        blocks = range(self.denoiser.config.num_single_layers)
        outputs = [f"single_transformer_blocks.{block}.attn.to_out" for block in blocks]
        return [*super().lora_layers(feed_forward), *outputs]

    def encode_images(self, pixels: torch.Tensor) -> Posterior:
        patchify, vae = self.pipeline._patchify_latents, self.pipeline.vae
        mean, std = (patchify(part.contiguous()) for part in self.encode_unscaled(pixels))
        centre, variance = (
            value.float().view(1, -1, 1, 1) for value in (vae.bn.running_mean, vae.bn.running_var)
        )
        scale = (variance + vae.config.batch_norm_eps).sqrt()
        return Posterior((mean - centre) / scale, std / scale)

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> Cond:
        # One at a time, as the language model also gives a number for each word that it knows.
        hidden = {one: self.pipeline.encode_prompt([one])[0] for one in {*prompts}}
        return {"encoder_hidden_states": torch.cat([hidden[prompt] for prompt in prompts])}

    def meta_prompts(self, prompts: list[str]) -> Cond:
        width = self.denoiser.config.joint_attention_dim
        return {"encoder_hidden_states": torch.zeros(len(prompts), LENGTH, width)}

    def prompt_arguments(self, prompts: list[str], negative: str = "") -> dict[str, Any]:
        # The pipeline takes a negative prompt only as it is encoded.
        return self.encoded_arguments(prompts, negative)

    def predict(self, x_t: torch.Tensor, t: torch.Tensor, cond: Cond) -> torch.Tensor:
        pipeline, hidden = self.pipeline, cond["encoder_hidden_states"]
        packed = self.denoiser(
            hidden_states=pipeline._pack_latents(x_t),
            timestep=t / 1000,
            img_ids=pipeline._prepare_latent_ids(x_t).to(x_t.device),
            txt_ids=pipeline._prepare_text_ids(hidden).to(x_t.device),
            **cond,
        ).sample
        return packed.mT.reshape(x_t.shape)
