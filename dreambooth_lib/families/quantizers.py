"""Keep peft from failing on installed quantizers that it cannot use, such as Colab's torchao."""

import sys
from functools import cache

#: Checks that peft makes for each layer that gets a LoRA, even a plain one. They raise where the
#: package is too old, or so new that peft imports a name that is gone.
_CHECKS = ("is_torchao_available", "is_gptqmodel_available")


@cache
def ignore_unusable() -> None:
    """Make peft treat quantizers that it cannot use as missing; call it before adding a LoRA.

    Changes nothing if peft can add a LoRA to a plain layer. The kit quantizes by bitsandbytes
    only, so it needs none of these packages.
    """
    for name in _CHECKS:
        if _can_add_lora():
            return
        # Each of peft's modules imports the check under the same name.
        for module in [m for key, m in sys.modules.items() if key.partition(".")[0] == "peft"]:
            if name in vars(module):
                setattr(module, name, _missing)


def _can_add_lora() -> bool:
    import torch
    from peft import LoraConfig, inject_adapter_in_model

    layer = torch.nn.Sequential(torch.nn.Linear(1, 1, device="meta"))
    try:
        inject_adapter_in_model(LoraConfig(target_modules=["0"]), layer, low_cpu_mem_usage=True)
    except Exception:  # the packages raise errors of many kinds
        return False
    return True


def _missing() -> bool:
    return False
