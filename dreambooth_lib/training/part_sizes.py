"""Count the bytes of a base's weights on the meta device, as they will be once it is loaded."""

import torch

from dreambooth_lib.families.base import Family

#: Bytes per quantized weight: "nf4" has a scale per 64 weights, itself in 8 bits with a scale per
#: 256 of those; "int8" has few scales.
QUANTIZED = {"nf4": 0.5 + 1 / 64 + 4 / (64 * 256), "int8": 1.0}


def sizes_of_parts(
    family: Family, quantize: str | None, half: torch.dtype
) -> dict[torch.nn.Module, float]:
    """Return the bytes of each part's weights, of a family on the meta device in ``half``."""
    packed_bytes = QUANTIZED.get(quantize or "")
    quantized = [getattr(family.pipeline, name, None) for name in family.quantized_names()]
    modules = [family.denoiser, *family.text_encoders, *family.frozen]
    return {m: module_bytes(m, packed_bytes if m in quantized else None, half) for m in modules}


def module_bytes(module: torch.nn.Module, packed_bytes: float | None, half: torch.dtype) -> float:
    """Return the bytes of a module's tensors; quantized weights take ``packed_bytes`` each."""
    tensors = dict.fromkeys([*module.parameters(), *module.buffers()])  # shared ones once
    size = float(sum(tensor.nbytes for tensor in tensors))
    if packed_bytes is not None:
        # Layers that would overflow in float16 are not quantized in any precision.
        unquantized = getattr(module, "_keep_in_fp32_modules", None) or ()
        packed = [
            layer.weight
            for name, layer in linears(module).items()
            if layer.weight.dtype is half and name.rpartition(".")[2] not in unquantized
        ]
        size -= sum(weight.nbytes - packed_bytes * weight.numel() for weight in packed)
    return size


def linears(module: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    """Return the linear layers by name, without a LoRA's own."""
    named = module.named_modules()
    return {name: m for name, m in named if isinstance(m, torch.nn.Linear) and "lora_" not in name}
