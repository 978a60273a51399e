"""Count the memory of tensors without values: bytes allocated at once, and numbers in files."""

import weakref
from collections.abc import Iterable
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry

#: Operations that autocast computes in float32 on a GPU, but in half precision on a CPU: those of
#: torch's list for CUDA whose results are large in a diffusion model.
IN_FLOAT32 = {
    F.group_norm, F.layer_norm, F.rms_norm, F.interpolate, F.softmax, torch.softmax,
    torch.Tensor.softmax, torch.exp, torch.Tensor.exp,
}  # fmt: skip


class AllocationCounter(TorchDispatchMode):
    """Counts the current and peak bytes of the tensors created under it, and the FLOPs.

    The tensors of ``modules`` do not count. ``FlopCounterMode`` counts FLOPs too, but keeps every
    module's inputs alive.
    """

    def __init__(self, *modules: torch.nn.Module) -> None:
        super().__init__()
        self.current_bytes = self.peak_bytes = self.flops = 0
        self._known: set[int] = set()
        for module in modules:
            for tensor in (*module.parameters(), *module.buffers()):
                self.exclude(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if count := flop_registry.get(func._overloadpacket):
            self.flops += count(*args, **kwargs, out_val=out)
        tree_map_only(torch.Tensor, self._add, out)
        return out

    def exclude(self, tensor: torch.Tensor) -> None:
        """Exclude a tensor, such as a weight, from the count."""
        self._known.add(tensor.untyped_storage()._cdata)

    def _add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.current_bytes += size
            self.peak_bytes = max(self.peak_bytes, self.current_bytes)
            weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.current_bytes -= size


class CudaAutocast(TorchFunctionMode):
    """Makes a CPU's autocast, which tensors without values need, compute as a GPU's would.

    The results of :data:`IN_FLOAT32` are float32 on a GPU, and kept for the backward pass.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        arguments = (args, kwargs or {})
        if func in IN_FLOAT32 and torch.is_autocast_enabled("cpu"):
            arguments = tree_map_only(
                torch.Tensor, lambda x: x.float() if x.is_floating_point() else x, arguments
            )
        return func(*arguments[0], **arguments[1])


def make_fake(module: torch.nn.Module) -> None:
    """Replace a module's meta tensors by fake ones on the CPU, which has autocast."""
    for submodule in module.modules():
        for name, weight in submodule.named_parameters(recurse=False):
            empty = torch.empty(weight.shape, dtype=weight.dtype)
            parameter = torch.nn.Parameter(empty, requires_grad=weight.requires_grad)
            setattr(submodule, name, parameter)
        for name, buffer in submodule.named_buffers(recurse=False):
            setattr(submodule, name, torch.empty(buffer.shape, dtype=buffer.dtype))


def count_numbers(files: Iterable[Path]) -> int:
    """Return how many numbers safetensors files hold, by their headers."""
    from safetensors import safe_open

    count = 0
    for path in files:
        with safe_open(path, "np") as file:
            count += sum(prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    return count
