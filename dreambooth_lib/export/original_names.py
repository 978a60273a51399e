"""Map diffusers' names of Stable Diffusion's weights to the original ones (CompVis, SGM, OpenCLIP).

The names follow from the structure of the models, whatever their depth and width; no file is read
here. diffusers has tables for the names that the structure does not give, but converts in the
other direction only.
"""

import re
from collections import ChainMap
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from diffusers.loaders.single_file_utils import DIFFUSERS_TO_LDM_MAPPING

from dreambooth_lib.training.lora import clip_name

_TABLES: dict[str, Any] = DIFFUSERS_TO_LDM_MAPPING
_UNET, _VAE = ChainMap(*_TABLES["unet"].values()), _TABLES["vae"]
_OPEN_CLIP, _OPEN_CLIP_LAYER = _TABLES["openclip"]["layers"], _TABLES["openclip"]["transformer"]
_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
#: The VAE's attention; the second row has the names in diffusers' early files.
_ATTENTION = {
    "group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out": "proj_out",
    "query": "q", "key": "k", "value": "v", "proj_attn": "proj_out",
}  # fmt: skip


def checkpoint_keys(
    component: str, names: Iterable[str], config: Mapping[str, Any], xl: bool = False
) -> dict[str, str]:
    """Map a component's tensor names to their keys in a single-file checkpoint: {name: key}.

    ``component`` is "unet", "vae", "text_encoder" or, for SDXL, "text_encoder_2", ``config`` its
    ``config.json``; ``xl`` says whether the pipeline is SDXL. Names that share a key, such as
    OpenCLIP's queries, keys and values, come in the order in which the tensors are concatenated.
    The position ids, which some files have, are left out. Raises ``KeyError`` for a name that has
    no key.
    """
    rename: Callable[[str], str]
    if component == "unet":
        prefix, rename = "model.diffusion_model.", lambda name: unet_name(name, config)
    elif component == "vae":
        prefix, rename = "first_stage_model.", lambda name: _vae_name(name, config)
    elif component == "text_encoder_2":
        prefix, rename = "conditioner.embedders.1.model.", _open_clip_name
    elif xl:
        prefix, rename = "conditioner.embedders.0.transformer.", clip_name
    elif config.get("hidden_act", "quick_gelu") == "quick_gelu":  # SD 1.x's OpenAI CLIP
        prefix, rename = "cond_stage_model.transformer.", clip_name
    else:
        prefix, rename = "cond_stage_model.model.", _open_clip_name
    keys = {}
    for name in sorted(names, key=lambda name: name.replace("q_proj", "_")):  # q before k before v
        if not name.endswith("position_ids"):
            try:
                keys[name] = prefix + rename(name)
            except (KeyError, IndexError, TypeError):
                raise KeyError(name) from None
    return keys


def unet_name(name: str, config: Mapping[str, Any]) -> str:
    """Return LDM's name of a U-Net tensor. Raises ``KeyError`` if it has none."""
    if name in _UNET:
        return _UNET[name]
    stride = config["layers_per_block"] + 1
    name = re.sub(r"(\.resnets\.\d+\.)(\w+)", lambda match: match[1] + _RESNET[match[2]], name)
    match name.split("."):
        case ["mid_block", "resnets" | "attentions" as kind, j, *rest]:
            place = f"middle_block.{2 * int(j) + int(kind == 'attentions')}"
        case ["down_blocks", i, "resnets" | "attentions" as kind, j, *rest]:
            place = f"input_blocks.{1 + stride * int(i) + int(j)}.{int(kind == 'attentions')}"
        case ["down_blocks", i, "downsamplers", "0", "conv", *rest]:
            place = f"input_blocks.{stride * (int(i) + 1)}.0.op"
        case ["up_blocks", i, "resnets" | "attentions" as kind, j, *rest]:
            place = f"output_blocks.{stride * int(i) + int(j)}.{int(kind == 'attentions')}"
        case ["up_blocks", i, "upsamplers", "0", "conv", *rest]:
            layer = 2 if "Attn" in config["up_block_types"][int(i)] else 1
            place = f"output_blocks.{stride * (int(i) + 1) - 1}.{layer}.conv"
        case _:
            raise KeyError(name)
    return ".".join([place, *rest])


def _vae_name(name: str, config: Mapping[str, Any]) -> str:
    if name in _VAE:
        return _VAE[name]
    last = len(config["block_out_channels"]) - 1
    name = name.replace("to_out.0.", "to_out.").replace("conv_shortcut", "nin_shortcut")
    name = name.replace("resnets.", "block.").replace("samplers.0.", "sample.")
    match name.split("."):
        case [side, "mid_block", "block", j, *rest]:
            place = f"{side}.mid.block_{int(j) + 1}"
        case [side, "mid_block", "attentions", j, part, *rest]:
            place = f"{side}.mid.attn_{int(j) + 1}.{_ATTENTION[part]}"
        case ["encoder", "down_blocks", i, "block" | "downsample" as kind, *rest]:
            place = f"encoder.down.{i}.{kind}"
        case ["decoder", "up_blocks", i, "block" | "upsample" as kind, *rest]:
            place = f"decoder.up.{last - int(i)}.{kind}"
        case _:
            raise KeyError(name)
    return ".".join([place, *rest])


def _open_clip_name(name: str) -> str:
    name = clip_name(name)
    if name in _OPEN_CLIP:
        return _OPEN_CLIP[name]
    part = r"(layer_norm[12]|self_attn\.(q|k|v|out)_proj|mlp\.fc[12])"
    if not re.fullmatch(rf"text_model\.encoder\.layers\.\d+\.{part}\.\w+", name):
        raise KeyError(name)
    for new, old in _OPEN_CLIP_LAYER.items():
        name = name.replace(new, old)
    return f"transformer.{re.sub(r'[qkv]_proj.', 'in_proj_', name)}"
