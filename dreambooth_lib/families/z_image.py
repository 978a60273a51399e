"""Z-Image: one transformer over image and text, and prompts of different lengths."""

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

#: The scheduler's shift lies below this for Turbo (3), above it for the undistilled base (6).
TURBO_SHIFT = 4.5
LENGTH = 32  #: tokens of a short prompt in the chat template


class ZImage(Family):
    """Bases with a ``ZImagePipeline`` (arXiv 2511.22699)."""

    half_dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.bfloat16,)  # NaN in float16
    encoder_names = ()
    large_encoder_names = ("text_encoder",)
    #: The pipeline's default of 512 less the three with which the chat template begins.
    tokens_read: ClassVar[dict[str, int]] = {"tokenizer": 509}
    #: By its card: 28 to 50 steps, guidance 3 to 5, which this pipeline adds to 1.
    default_inference = Inference(
        steps=50, guidance_scale=4.0, fewest_steps=28, validation_steps=28
    )
    undistilled_base = "Tongyi-MAI/Z-Image"
    feed_forward_layers = ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3")

    @classmethod
    def inference_for(
        cls, names: Names, scheduler: Config, denoiser: Config, index: Config
    ) -> Inference:
        turbo = distilled_inference(9)  # by its card; diffusers before 0.41 makes 8 calls of them
        if scheduler.get("shift", TURBO_SHIFT) < TURBO_SHIFT:
            return turbo
        return distilled_by_name(names, turbo.steps) or cls.default_inference

    @staticmethod
    def native_resolution(denoiser: dict[str, Any], vae: dict[str, Any]) -> int:
        return 128 * vae_scale(vae)  # the pipeline's default; no config has it

    def encode_prompts(self, prompts: list[str]) -> Cond:
        device = self.pipeline.text_encoder.device
        # A copy: the pipeline writes the chat template's text into the list.
        embeddings, _ = self.pipeline.encode_prompt([*prompts], device, False)
        lengths = torch.tensor([len(tokens) for tokens in embeddings], device=device)
        padded = torch.nn.utils.rnn.pad_sequence(embeddings, batch_first=True)
        return {"embeddings": padded, "lengths": lengths}

    def meta_prompts(self, prompts: list[str]) -> Cond:
        width = self.pipeline.text_encoder.config.hidden_size
        return {"embeddings": torch.zeros(len(prompts), LENGTH, width)}

    def pipeline_arguments(self, cond: Cond) -> dict[str, Any]:
        return {"prompt_embeds": _without_padding(cond)}

    def predict(self, x_t: torch.Tensor, t: torch.Tensor, cond: Cond) -> torch.Tensor:
        frames = list(x_t.unsqueeze(2).unbind())
        # Its time runs from noise to image, and so does the velocity that it predicts.
        velocity = self.denoiser(frames, 1 - t / 1000, _without_padding(cond), return_dict=False)[0]
        return -torch.stack(velocity).squeeze(2)


def _without_padding(cond: Cond) -> list[torch.Tensor]:
    """Return each prompt's embeddings without their padding."""
    if "lengths" not in cond:
        return list(cond["embeddings"])
    lengths = cond["lengths"].tolist()
    return [row[:length] for row, length in zip(cond["embeddings"], lengths, strict=True)]
