"""Write a LoRA with kohya's names, which A1111 and ComfyUI load."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from dreambooth_lib.core.errors import KitError
from dreambooth_lib.core.files import replacing_file
from dreambooth_lib.export.original_names import unet_name
from dreambooth_lib.training.lora import clip_name

_KOHYA = {"unet": "lora_unet", "text_encoder": "lora_te", "text_encoder_2": "lora_te2"}
#: The layout of SDXL's U-Net, for which kohya uses the original names.
_XL = {
    "layers_per_block": 2,
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
}
#: A LoRA tensor's name in diffusers' files, old and new: its model, module and part.
_TENSOR = re.compile(
    r"(\w+)\.(.+?)\.(?:lora_|lora\.|lora_linear_layer\.)"
    r"(?:(?P<down>A|down)\.weight|(?P<up>B|up)\.weight|(?P<dora_scale>magnitude_vector)(\.weight)?)"
)


class ExportError(KitError, ValueError):
    """A model that cannot be written in another program's format."""


def write_lora(
    lora: str | Path | Mapping[str, torch.Tensor],
    path: str | Path,
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """Write a LoRA in diffusers' format, a file or its tensors, in the format of A1111 and ComfyUI.

    ``metadata`` is the adapter's, ``{"unet.lora_alpha": 8, ...}``; a file has its own, and without
    any the scale is 1. A U-Net's LoRA gets kohya's names: diffusers' names with underscores for
    1.x and 2.x, and the original names for SDXL, which is recognised by its second text encoder or
    by attention blocks of more than one layer. Each module's ``alpha`` gives its scale. A
    transformer's LoRA keeps the names ``transformer...lora_A.weight``, which ComfyUI reads; its
    scale is multiplied into ``lora_B``, as not every reader supports an ``alpha`` there.
    (diffusers' ``convert_state_dict_to_kohya`` writes the rank as every ``alpha``, ``lora_te1``
    for 1.x's encoder too, and no original names.)

    A DoRA's magnitudes are written as ``dora_scale``, one per output. ComfyUI divides by the norm
    of the base weight, where training divided by the norm of the sum, and A1111 applies them to
    the inputs; for the same images, fuse the DoRA and export it with
    :func:`.comfyui_checkpoint.write_checkpoint`. Raises :class:`ExportError` for anything that is
    not such a LoRA; ``path`` is then left as it was.
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
            f"a LoRA of {', '.join(sorted(models)) or 'nothing'} has no format that A1111 or "
            f"ComfyUI documents; give a LoRA of {', '.join(_KOHYA)} or transformer."
        )
    xl = "text_encoder_2" in models or any(".transformer_blocks.1." in name for _, name in modules)
    kohya: dict[str, torch.Tensor] = {}
    for (model, module), parts in modules.items():
        down, up = parts["down"], parts["up"]
        alpha = _alpha(model, module, len(down), own if metadata is None else metadata)
        name = clip_name(module) if model.startswith("text_encoder") else module
        if "transformer" in models:
            name = f"{model}.{name}"
            up = (up.float() * (alpha / len(down))).to(up.dtype)
            kohya |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
        else:
            name = _kohya_name(model, name, xl)
            kohya |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
            kohya[f"{name}.alpha"] = torch.tensor(alpha)
        if "dora_scale" in parts:
            magnitudes = parts["dora_scale"].reshape(-1, *[1] * (down.ndim - 1))
            kohya[f"{name}.dora_scale"] = magnitudes
    with replacing_file(path) as partial:  # A1111 would take metadata as a sign of 1.x
        save_file({key: t.detach().contiguous() for key, t in kohya.items()}, partial)
    return Path(path)


def _modules(
    tensors: Mapping[str, torch.Tensor],
) -> dict[tuple[str, str], dict[str, torch.Tensor]]:
    """Group a LoRA's tensors by model and module, as "down", "up" and "dora_scale"."""
    modules: dict[tuple[str, str], dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        match = _TENSOR.fullmatch(key)
        if not match:
            raise ExportError(
                f"the LoRA's tensor '{key}' is not a down or up weight in diffusers' format; give "
                "what save_lora_weights writes."
            )
        part = next(name for name, text in match.groupdict().items() if text)
        modules.setdefault((match[1], match[2]), {})[part] = tensor
    for (model, module), parts in modules.items():
        if not {"down", "up"} <= parts.keys():
            raise ExportError(
                f"the LoRA's module '{model}.{module}' lacks its down or its up weight; "
                "save the LoRA again with save_lora_weights."
            )
    return modules


def _alpha(model: str, module: str, rank: int, metadata: Mapping[str, Any]) -> float:
    """Return a module's alpha: its scale is alpha / rank (arXiv 2106.09685, section 4.1)."""
    from peft.utils.other import get_pattern_key

    patterns = metadata.get(f"{model}.alpha_pattern") or {}
    alpha = metadata.get(f"{model}.lora_alpha", rank)
    alpha = patterns.get(get_pattern_key(list(patterns), module), alpha)
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
