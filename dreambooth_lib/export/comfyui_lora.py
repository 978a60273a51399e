"""Write a LoRA with the names that A1111 and ComfyUI know (kohya's)."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from dreambooth_lib.core.files import replacing_file
from dreambooth_lib.export.original_names import clip_name, unet_name

if TYPE_CHECKING:
    pass

#: What kohya calls the models, and the layout of SDXL's U-Net, by whose original names it goes.
_KOHYA = {"unet": "lora_unet", "text_encoder": "lora_te", "text_encoder_2": "lora_te2"}


_XL = {
    "layers_per_block": 2,
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
}


#: A LoRA's tensor in diffusers' files, past and present: its model, module and part.
_TENSOR = re.compile(
    r"(\w+)\.(.+?)\.(?:lora_|lora\.|lora_linear_layer\.)"
    r"(?:(?P<down>A|down)\.weight|(?P<up>B|up)\.weight|(?P<dora_scale>magnitude_vector)(\.weight)?)"
)


class ExportError(ValueError):
    """What has no place in another tool's file."""


def lora_file(
    lora: str | Path | Mapping[str, torch.Tensor],
    path: str | Path,
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """Write a LoRA in diffusers' format, a file or its tensors, as A1111 and ComfyUI load it.

    ``metadata`` is the adapter's, which a file brings along: ``{"unet.lora_alpha": 8, ...}``;
    without it the scale is 1. A U-Net's LoRA becomes kohya's: diffusers' names with underscores for
    1.x and 2.x and the original ones for SDXL, known by its second text encoder or by attention of
    more than one layer, with an ``alpha`` that gives each module its scale. A transformer's keeps
    the names ``transformer...lora_A.weight``, which ComfyUI reads; its scale goes into ``lora_B``,
    as not every reader takes an ``alpha`` there. (diffusers' ``convert_state_dict_to_kohya`` writes
    the rank for each ``alpha``, ``lora_te1`` for 1.x's encoder too, and no original names.)

    Of a DoRA the magnitudes go along as ``dora_scale``, one for each output. ComfyUI divides by the
    base weight's norm, where training did by the sum's, and A1111 takes them for the inputs', so
    that for the same pictures it is better fused and exported by :func:`single_file`. Raises
    :class:`ExportError` for what is no such LoRA; ``path`` is then as before.
    """
    if isinstance(lora, (str, Path)):
        with safe_open(lora, "pt") as file:
            own = json.loads((file.metadata() or {}).get("lora_adapter_metadata") or "{}")
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    else:
        own, tensors = {}, dict(lora)
    modules = _modules(tensors)
    models = {model for model, _ in modules}
    if not models or not models <= {*_KOHYA, "transformer"}:
        raise ExportError(
            f"a LoRA of {', '.join(sorted(models)) or 'nothing'} has no layout that A1111 or "
            f"ComfyUI documents; give one of {', '.join(_KOHYA)} or transformer."
        )
    xl = "text_encoder_2" in models or any(".transformer_blocks.1." in name for _, name in modules)
    written: dict[str, torch.Tensor] = {}
    for (model, module), parts in modules.items():
        down, up = parts["down"], parts["up"]
        alpha = _alpha(model, module, len(down), own if metadata is None else metadata)
        name = clip_name(module) if model.startswith("text_encoder") else module
        if "transformer" in models:
            name = f"{model}.{name}"
            up = (up.float() * (alpha / len(down))).to(up.dtype)
            written |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
        else:
            name = _kohya_name(model, name, xl)
            written |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
            written[f"{name}.alpha"] = torch.tensor(alpha)
        if "dora_scale" in parts:
            magnitudes = parts["dora_scale"].reshape(-1, *[1] * (down.ndim - 1))
            written[f"{name}.dora_scale"] = magnitudes
    with replacing_file(path) as partial:  # without metadata, by which A1111 would call it 1.x's
        save_file({key: t.detach().contiguous() for key, t in written.items()}, partial)
    return Path(path)


def _modules(
    tensors: Mapping[str, torch.Tensor],
) -> dict[tuple[str, str], dict[str, torch.Tensor]]:
    """Group a LoRA's tensors by model and module, under kohya's endings."""
    modules: dict[tuple[str, str], dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        found = _TENSOR.fullmatch(key)
        if not found:
            raise ExportError(
                f"the LoRA's tensor '{key}' is not one of a pair of down and up weights in "
                "diffusers' format; give what save_lora_weights writes."
            )
        part = next(name for name, text in found.groupdict().items() if text)
        modules.setdefault((found[1], found[2]), {})[part] = tensor
    for (model, module), parts in modules.items():
        if not {"down", "up"} <= parts.keys():
            raise ExportError(
                f"the LoRA's module '{model}.{module}' lacks its down or its up weight; "
                "write the LoRA anew with save_lora_weights."
            )
    return modules


def _alpha(model: str, module: str, rank: int, metadata: Mapping[str, Any]) -> float:
    """Return the number whose share of the rank is the module's scale."""
    from peft.utils.other import get_pattern_key

    own = metadata.get(f"{model}.alpha_pattern") or {}
    alpha = metadata.get(f"{model}.lora_alpha", rank)
    alpha = own.get(get_pattern_key(list(own), module), alpha)
    return float(alpha * rank**0.5 if metadata.get(f"{model}.use_rslora") else alpha)


def _kohya_name(model: str, module: str, xl: bool) -> str:
    if xl and model == "unet":
        try:
            module = unet_name(f"{module}.weight", _XL).removesuffix(".weight")
        except (KeyError, IndexError) as error:
            raise ExportError(
                f"the LoRA's module 'unet.{module}' has no original name in SDXL's U-Net; "
                "give a LoRA of SDXL."
            ) from error
    prefix = "lora_te1" if xl and model == "text_encoder" else _KOHYA[model]
    return f"{prefix}_{module}".replace(".", "_")
