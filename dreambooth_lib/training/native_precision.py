"""Tell what a device computes in where mixed precision is "auto"."""

from typing import TYPE_CHECKING

from dreambooth_lib.core.config_types import ConfigError

if TYPE_CHECKING:  # imported late: the check of a machine runs before torch is there
    import torch


def native_precision(mixed_precision: str, device: "torch.device") -> str:
    """Resolve mixed precision "auto": bf16 where the GPU has it, else fp16; "no" on a CPU.

    Raises :class:`ConfigError` for fp16 on a CPU, where most of torch's layers lack it.
    """
    if mixed_precision == "fp16" and device.type == "cpu":
        raise ConfigError(
            "mixed_precision is 'fp16', which needs a GPU, and there is none here; set it to "
            "'auto' or 'no'."
        )
    if mixed_precision != "auto":
        return mixed_precision
    if device.type != "cuda":
        return "no"
    import torch

    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def dtype_of(precision: str) -> "torch.dtype":
    """Return the dtype that a :func:`native_precision` computes in."""
    import torch

    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision, torch.float32)
