"""What tensors take, counted without their values: bytes alive at once, and numbers in files."""

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

#: What autocast computes in float32 on a GPU, and on a CPU in half precision: of torch's list for
#: CUDA those operations whose results are large in a diffusion model.
IN_FLOAT32 = {
    F.group_norm, F.layer_norm, F.rms_norm, F.interpolate, F.softmax, torch.softmax,
    torch.Tensor.softmax, torch.exp, torch.Tensor.exp,
}  # fmt: skip


class AllocationCounter(TorchDispatchMode):
    """Counts the bytes of tensors made under it, those alive now and the most at once, and work.

    The tensors of ``modules`` are left out. ``FlopCounterMode`` counts the work too, but holds on
    to every module's inputs.
    """

    def __init__(self, *modules: torch.nn.Module) -> None:
        super().__init__()
        self.now = self.most = self.flops = 0
        self._known: set[int] = set()
        for module in modules:
            for tensor in (*module.parameters(), *module.buffers()):
                self.without(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if count := flop_registry.get(func._overloadpacket):
            self.flops += count(*args, **kwargs, out_val=out)
        tree_map_only(torch.Tensor, self._hold, out)
        return out

    def without(self, tensor: torch.Tensor) -> None:
        """Leave a tensor out, such as a weight."""
        self._known.add(tensor.untyped_storage()._cdata)

    def _hold(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


class CudaAutocast(TorchFunctionMode):
    """Under a CPU's autocast, which tensors without values need, computes in what a GPU's would.

    The results of :data:`IN_FLOAT32` are float32 there, which training keeps for the backward pass.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = (args, kwargs or {})
        if func in IN_FLOAT32 and torch.is_autocast_enabled("cpu"):
            given = tree_map_only(
                torch.Tensor, lambda x: x.float() if x.is_floating_point() else x, given
            )
        return func(*given[0], **given[1])


def make_fake(module: torch.nn.Module) -> None:
    """Make tensors of the meta device ones without data on the CPU, which has autocast."""
    for part in module.modules():
        for name, one in part.named_parameters(recurse=False):
            empty = torch.empty(one.shape, dtype=one.dtype)
            setattr(part, name, torch.nn.Parameter(empty, requires_grad=one.requires_grad))
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, torch.empty(buffer.shape, dtype=buffer.dtype))


def count_numbers(files: Iterable[Path]) -> int:
    """Count the numbers in safetensors files by their headers."""
    from safetensors import safe_open

    count = 0
    for path in files:
        with safe_open(path, "np") as file:
            count += sum(prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    return count
