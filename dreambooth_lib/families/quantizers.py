"""Keep peft from stopping at installed quantizers that it cannot use, such as Colab's torchao."""

import sys
from functools import cache

#: What peft asks for each layer that gets a LoRA, though it be a plain one. It raises where the
#: package is too old, and where it is so new that a part of it is gone.
_CHECKS = (
    "is_torchao_available",
    "is_gptqmodel_available",
    "is_auto_gptq_available",
    "is_auto_awq_available",
)


@cache
def ignore_unusable() -> None:
    """Make peft take quantizers that it cannot use to be absent; call it before peft adds a LoRA.

    Where peft can add one to a plain layer, nothing is changed. No base of this kit is quantized by
    any of these, but by bitsandbytes.
    """
    for name in _CHECKS:
        if _takes_a_plain_layer():
            return
        # Modules that have imported the check hold it by its name.
        for module in [m for key, m in sys.modules.items() if key.partition(".")[0] == "peft"]:
            if name in vars(module):
                setattr(module, name, _absent)


def _takes_a_plain_layer() -> bool:
    import torch
    from peft import LoraConfig, inject_adapter_in_model

    layer = torch.nn.Sequential(torch.nn.Linear(1, 1, device="meta"))
    try:
        inject_adapter_in_model(LoraConfig(target_modules=["0"]), layer, low_cpu_mem_usage=True)
    except Exception:  # a package that does not fit raises whatever it raises
        return False
    return True


def _absent() -> bool:
    return False
