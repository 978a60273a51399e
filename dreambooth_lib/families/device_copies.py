"""Copy small tensors to a device, and pick rows there, without waiting for its queue of work.

``tensor.to(device)``, ``torch.tensor(values, device=device)`` and indexing by a list all wait until
a GPU has done everything before.
"""

from typing import Any

import torch


def to_device(values: Any, device: torch.device) -> torch.Tensor:
    """Return a tensor, or a tensor of numbers, on ``device``."""
    tensor = torch.as_tensor(values)
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()  # else CUDA may wait to copy it
    return tensor.to(device, non_blocking=True)


def runs_on(module: torch.nn.Module) -> torch.device:
    """Return the device that a model computes on; an offloaded one waits on another."""
    device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    return next(module.parameters()).device if device is None else torch.device(device)


def pick(tensor: torch.Tensor, index: list[int]) -> torch.Tensor:
    """Return rows of a tensor in the order of ``index``, with gradients."""
    return tensor.index_select(0, to_device(index, tensor.device))


def rows(tensors: dict[str, torch.Tensor], index: list[int]) -> dict[str, torch.Tensor]:
    """Return rows of each of some named tensors, as :func:`pick` does."""
    return {name: pick(tensor, index) for name, tensor in tensors.items()}
