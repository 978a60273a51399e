"""The original (CompVis, SGM, OpenCLIP) names of what a Stable Diffusion pipeline consists of.

They follow from the structure of the models, whatever their depth and width; no file is read here.
"""

from collections.abc import Iterable, Mapping
from typing import Any

_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
_LINEAR = {"linear_1": "0", "linear_2": "2"}
#: Of the autoencoder's attention; the second names are those of diffusers' early files.
_ATTENTION = {
    "group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out": "proj_out",
    "query": "q", "key": "k", "value": "v", "proj_attn": "proj_out",
}  # fmt: skip
_OPEN_CLIP = {
    "layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}  # fmt: skip


def checkpoint_keys(
    component: str, names: Iterable[str], config: Mapping[str, Any], xl: bool = False
) -> dict[str, str]:
    """Where the tensors ``names`` of a component go in a one-file checkpoint: {name: key}.

    ``component`` is "unet", "vae", "text_encoder" or, of SDXL, "text_encoder_2", ``config`` its
    ``config.json``; ``xl`` says that the pipeline is SDXL. Names that share a key, as OpenCLIP's
    queries, keys and values do, come in the order in which they are stacked there. A name without
    a place raises ``KeyError``; the positions' indices, which some files hold, are left out.
    """
    if component == "unet":
        prefix, rename = "model.diffusion_model.", lambda name: unet_name(name, config)
    elif component == "vae":
        prefix, rename = "first_stage_model.", lambda name: _vae_name(name, config)
    elif component == "text_encoder_2":
        prefix, rename = "conditioner.embedders.1.model.", _open_clip_name
    elif xl:
        prefix, rename = "conditioner.embedders.0.transformer.", clip_name
    elif config.get("hidden_act", "quick_gelu") == "quick_gelu":  # OpenAI's CLIP, of SD 1.x
        prefix, rename = "cond_stage_model.transformer.", clip_name
    else:
        prefix, rename = "cond_stage_model.model.", _open_clip_name
    ordered = sorted(names, key=lambda name: name.replace("q_proj", "_"))  # q before k before v
    keys = {}
    for name in ordered:
        if not name.endswith("position_ids"):
            try:
                keys[name] = prefix + rename(name)
            except (KeyError, IndexError):
                raise KeyError(name) from None
    return keys


def unet_name(name: str, config: Mapping[str, Any]) -> str:
    """LDM's name of a module or a tensor of the U-Net; ``KeyError`` where it has none."""
    layers, levels = config["layers_per_block"], len(config["block_out_channels"])
    rows = [n + 1 for n in ([layers] * levels if isinstance(layers, int) else layers)]
    match name.split("."):
        case ["conv_in", *rest]:
            place = "input_blocks.0.0"
        case ["time_embedding", ("linear_1" | "linear_2") as linear, *rest]:
            place = f"time_embed.{_LINEAR[linear]}"
        case ["add_embedding" | "class_embedding", ("linear_1" | "linear_2") as linear, *rest]:
            place = f"label_emb.0.{_LINEAR[linear]}"
        case ["conv_norm_out", *rest]:
            place = "out.0"
        case ["conv_out", *rest]:
            place = "out.2"
        case ["mid_block", "resnets", j, part, *rest]:
            place = f"middle_block.{2 * int(j)}.{_RESNET[part]}"
        case ["mid_block", "attentions", j, *rest]:
            place = f"middle_block.{2 * int(j) + 1}"
        case ["down_blocks", i, "resnets", j, part, *rest]:
            place = f"input_blocks.{1 + sum(rows[: int(i)]) + int(j)}.0.{_RESNET[part]}"
        case ["down_blocks", i, "attentions", j, *rest]:
            place = f"input_blocks.{1 + sum(rows[: int(i)]) + int(j)}.1"
        case ["down_blocks", i, "downsamplers", "0", "conv", *rest]:
            place = f"input_blocks.{sum(rows[: int(i) + 1])}.0.op"
        case ["up_blocks", i, "resnets", j, part, *rest]:
            place = f"output_blocks.{sum(rows[::-1][: int(i)]) + int(j)}.0.{_RESNET[part]}"
        case ["up_blocks", i, "attentions", j, *rest]:
            place = f"output_blocks.{sum(rows[::-1][: int(i)]) + int(j)}.1"
        case ["up_blocks", i, "upsamplers", "0", "conv", *rest]:
            after = 2 if "Attn" in config["up_block_types"][int(i)] else 1
            place = f"output_blocks.{sum(rows[::-1][: int(i) + 1]) - 1}.{after}.conv"
        case _:
            raise KeyError(name)
    return ".".join([place, *rest])


def _vae_name(name: str, config: Mapping[str, Any]) -> str:
    last = len(config["block_out_channels"]) - 1
    name = name.replace("to_out.0.", "to_out.").replace("conv_shortcut", "nin_shortcut")
    match name.split("."):
        case ["quant_conv" | "post_quant_conv", *_] | [_, "conv_in" | "conv_out", _]:
            return name
        case [side, "conv_norm_out", *rest]:
            place = f"{side}.norm_out"
        case [side, "mid_block", "resnets", j, *rest]:
            place = f"{side}.mid.block_{int(j) + 1}"
        case [side, "mid_block", "attentions", j, part, *rest]:
            place = f"{side}.mid.attn_{int(j) + 1}.{_ATTENTION[part]}"
        case ["encoder", "down_blocks", i, "resnets", j, *rest]:
            place = f"encoder.down.{i}.block.{j}"
        case ["encoder", "down_blocks", i, "downsamplers", "0", "conv", *rest]:
            place = f"encoder.down.{i}.downsample.conv"
        case ["decoder", "up_blocks", i, "resnets", j, *rest]:
            place = f"decoder.up.{last - int(i)}.block.{j}"
        case ["decoder", "up_blocks", i, "upsamplers", "0", "conv", *rest]:
            place = f"decoder.up.{last - int(i)}.upsample.conv"
        case _:
            raise KeyError(name)
    return ".".join([place, *rest])


def clip_name(name: str) -> str:
    """OpenAI's name of a module or a tensor of the text encoder: with ``text_model.``.

    Which transformers leaves out from version 5.6 on, where the model has no projection.
    """
    inside = name.startswith(("embeddings.", "encoder.layers.", "final_layer_norm."))
    return f"text_model.{name}" if inside else name


def _open_clip_name(name: str) -> str:
    match clip_name(name).split("."):
        case ["text_projection", "weight"]:
            return "text_projection"
        case ["text_model", "embeddings", "token_embedding", "weight"]:
            return "token_embedding.weight"
        case ["text_model", "embeddings", "position_embedding", "weight"]:
            return "positional_embedding"
        case ["text_model", "final_layer_norm", kind]:
            return f"ln_final.{kind}"
        case ["text_model", "encoder", "layers", i, "self_attn", "q_proj" | "k_proj" | "v_proj", k]:
            return f"transformer.resblocks.{i}.attn.in_proj_{k}"
        case ["text_model", "encoder", "layers", i, *part, kind]:
            return f"transformer.resblocks.{i}.{_OPEN_CLIP['.'.join(part)]}.{kind}"
        case _:
            raise KeyError(name)
