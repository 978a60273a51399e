"""Print what `dreambooth_lib.bases` says of each base: parameters and memory, of configs alone.

``python -m tools.bases`` prints the figures of all published architectures, ``python -m tools.bases
sd15 sdxl`` of some. Nothing is downloaded: what follows are the architectures' numbers.
"""

import argparse
import json
import logging
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

from dreambooth_lib import families
from dreambooth_lib.bases import WAYS
from dreambooth_lib.config import Subject, TrainConfig
from dreambooth_lib.estimate import GIB, estimate

_UNET_NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
_CLIP_L = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "projection_dim": 768, "hidden_act": "quick_gelu",
}  # fmt: skip
_CLIP_H = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23,
    "num_attention_heads": 16, "projection_dim": 512, "hidden_act": "gelu",
}  # fmt: skip
_CLIP_G = {
    "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32,
    "num_attention_heads": 20, "projection_dim": 1280, "hidden_act": "gelu",
}  # fmt: skip
_T5_XXL = {
    "d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_layers": 24, "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}  # fmt: skip
_QWEN3_4B = {
    "vocab_size": 151936, "hidden_size": 2560, "intermediate_size": 9728,
    "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
}  # fmt: skip
_VAE = {
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
}  # fmt: skip
_VAE_16 = _VAE | {
    "latent_channels": 16, "sample_size": 1024, "shift_factor": 0.1, "scaling_factor": 0.36,
    "use_quant_conv": False, "use_post_quant_conv": False,
}  # fmt: skip
_FLOW = ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0})

#: By a short name: the pipeline's class, and its parts with their classes and configs.
ARCHITECTURES: dict[str, tuple[str, dict[str, tuple[str, dict[str, Any]]]]] = {
    "sd15": ("StableDiffusionPipeline", {
        "unet": ("UNet2DConditionModel", {
            "sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}),
        "vae": ("AutoencoderKL", _VAE),
        "text_encoder": ("CLIPTextModel", _CLIP_L),
        "scheduler": ("DDIMScheduler", _UNET_NOISE),
    }),
    "sd21": ("StableDiffusionPipeline", {
        "unet": ("UNet2DConditionModel", {
            "sample_size": 96, "cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20),
            "use_linear_projection": True}),
        "vae": ("AutoencoderKL", _VAE),
        "text_encoder": ("CLIPTextModel", _CLIP_H),
        "scheduler": ("DDIMScheduler", _UNET_NOISE | {"prediction_type": "v_prediction"}),
    }),
    "sdxl": ("StableDiffusionXLPipeline", {
        "unet": ("UNet2DConditionModel", {
            "sample_size": 128, "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10), "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048, "use_linear_projection": True,
            "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816}),
        "vae": ("AutoencoderKL", _VAE | {"sample_size": 1024}),
        "text_encoder": ("CLIPTextModel", _CLIP_L),
        "text_encoder_2": ("CLIPTextModelWithProjection", _CLIP_G),
        "scheduler": ("EulerDiscreteScheduler", _UNET_NOISE),
    }),
    "sd35m": ("StableDiffusion3Pipeline", {
        "transformer": ("SD3Transformer2DModel", {
            "sample_size": 128, "num_layers": 24, "num_attention_heads": 24,
            "attention_head_dim": 64, "joint_attention_dim": 4096, "caption_projection_dim": 1536,
            "pooled_projection_dim": 2048, "pos_embed_max_size": 384, "qk_norm": "rms_norm",
            "dual_attention_layers": tuple(range(13))}),
        "vae": ("AutoencoderKL", _VAE_16),
        "text_encoder": ("CLIPTextModelWithProjection", _CLIP_L),
        "text_encoder_2": ("CLIPTextModelWithProjection", _CLIP_G),
        "text_encoder_3": ("T5EncoderModel", _T5_XXL),
        "scheduler": _FLOW,
    }),
    "flux": ("FluxPipeline", {
        "transformer": ("FluxTransformer2DModel", {"guidance_embeds": True}),
        "vae": ("AutoencoderKL", _VAE_16),
        "text_encoder": ("CLIPTextModel", _CLIP_L),
        "text_encoder_2": ("T5EncoderModel", _T5_XXL),
        "scheduler": ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}),
    }),
    "z_image": ("ZImagePipeline", {
        "transformer": ("ZImageTransformer2DModel", {}),
        "vae": ("AutoencoderKL", _VAE_16),
        "text_encoder": ("Qwen3Model", _QWEN3_4B),
        "scheduler": _FLOW,
    }),
}  # fmt: skip


def save_configs(name: str, folder: Path) -> str:
    """Write an architecture as a base without weights, in diffusers' layout; gives its path.

    Its tokenizers are small ones of the right length: the memory does not depend on their words.
    """
    import diffusers
    import transformers

    pipeline, parts = ARCHITECTURES[name]
    index: dict[str, Any] = {"_class_name": pipeline}
    for part, (kind, values) in parts.items():
        library = diffusers if hasattr(diffusers, kind) else transformers
        index[part] = [library.__name__, kind]
        (folder / part).mkdir(parents=True)
        if library is diffusers:
            config = json.dumps({"_class_name": kind} | values)
            file = "scheduler_config.json" if part == "scheduler" else "config.json"
            (folder / part / file).write_text(config)
        else:
            getattr(transformers, kind).config_class(**values).save_pretrained(folder / part)
            tokenizer = part.replace("text_encoder", "tokenizer")
            index[tokenizer] = ["transformers", "CLIPTokenizer"]
            small = transformers.CLIPTokenizer.from_pretrained(
                families.locate("toybox"), subfolder="tokenizer", model_max_length=77
            )
            small.save_pretrained(folder / tokenizer)
    (folder / "model_index.json").write_text(json.dumps(index))
    return str(folder)


def parameters(base: str) -> int:
    """Of all parts that are loaded."""
    family = families.skeleton(base)
    parts = [family.denoiser, *family.text_encoders, *family.frozen]
    return sum(parameter.numel() for part in parts for parameter in part.parameters())


def needed(base: str, method: str, level: str, precision: str) -> float | None:
    """GiB that a way to train a base takes at a level of memory, with the default settings.

    None where it does not work: autocast to float16 of bfloat16 weights ends in some layers of SD3.
    """
    fields = WAYS[method].fields | {"memory": level}
    config = TrainConfig(Subject("photos", "dog"), base, **fields)
    try:
        return round(estimate(config, precision).memory / GIB, 1)
    except RuntimeError as error:
        if "autocast" not in str(error):
            raise
        return None


def main() -> None:
    logging.disable()  # diffusers notes each part that is made
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", choices=[[], *ARCHITECTURES, "toybox"])
    for name in parser.parse_args().names or ["toybox", *ARCHITECTURES]:
        with tempfile.TemporaryDirectory() as folder:
            base = name if name == "toybox" else save_configs(name, Path(folder))
            print(name, f"{parameters(base):_} parameters", flush=True)
            for precision, (method, way) in product(("fp16", "bf16"), WAYS.items()):
                gib = [needed(base, method, level, precision) for level in way.levels]
                print(f"    {precision} {method}:", *gib, flush=True)


if __name__ == "__main__":
    main()
