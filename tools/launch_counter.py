"""Count what PyTorch asks of a GPU: kernels and copies launched, waits of the host, bytes moved.

No GPU is needed. All tensors are fake, with shapes and without values, and those of the GPU lie on
:data:`DEVICE`, another index of the CPU: a copy between both is seen as one, and an operation on
tensors of both fails, as it would with a GPU.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

import dreambooth_lib
from dreambooth_lib.training.allocation_counter import CudaAutocast

#: Where the GPU's tensors lie. For autocast and the autograd engine it is the CPU.
DEVICE = torch.device("cpu", 0)

#: Limits of one launch over many tensors, by how many lists of tensors it takes, as
#: ATen/native/cuda/MultiTensorApply.cuh has them for kernels with 4 KB of arguments. Newer
#: PyTorch, drivers and GPUs take up to seven times as much in some of these kernels.
MAX_TENSORS = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}
MAX_TENSORS_WITH_SCALARS = MAX_TENSORS | {1: 96}
MAX_BLOCKS, CHUNK = 320, 65536
MAX_JOINED = 128  #: tensors that one launch of ``cat`` copies, as in ATen/native/cuda/Shape.cu

_KIT = str(Path(dreambooth_lib.__file__).parent)
_NO_WORK = {"prim", "profiler"}  # namespaces of what no device sees
#: Operations that only make a tensor or another name of it.
_NO_LAUNCH = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "resize_",
              "set_", "_unsafe_view", "lift_fresh", "_local_scalar_dense", "is_pinned",
              "_pin_memory"}  # fmt: skip
#: Operations whose result's size or value the host has to know.
_WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim",
          "unique_consecutive"}  # fmt: skip
_INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
_ONLY_WRITTEN = {"zero_", "fill_", "copy_", "_foreach_zero_", "_foreach_copy_", "normal_",
                 "uniform_", "random_"}  # fmt: skip


@dataclass
class Counts:
    """What one phase of a step asks of a GPU."""

    launches: int = 0  #: kernels and copies, at least: one for each operation
    bytes: int = 0  #: read and written
    #: Waits of the host for the GPU, by what waits and by the library's line that asked for it.
    waits: Counter[tuple[str, str]] = field(default_factory=Counter)
    operations: Counter[str] = field(default_factory=Counter)  #: launches by operation


def multi_tensor_launches(sizes: Sequence[int], lists: int, with_scalars: bool = False) -> int:
    """Count the launches of an operation over tensors of these sizes, in ``lists`` such lists."""
    most = (MAX_TENSORS_WITH_SCALARS if with_scalars else MAX_TENSORS)[min(lists, 5)]
    launches = tensors = blocks = 0
    for size in filter(None, sizes):
        tensors += 1
        chunks = -(-size // CHUNK)
        while chunks:
            taken = min(chunks, MAX_BLOCKS - blocks)
            blocks, chunks = blocks + taken, chunks - taken
            if blocks == MAX_BLOCKS or (tensors == most and not chunks):
                launches, blocks = launches + 1, 0
                tensors = 1 if chunks else 0
    return launches + (blocks > 0)


class LaunchCounter(TorchDispatchMode):
    """Counts by phase; :meth:`phase` says which one it is."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, Counts] = {}
        self._phase = "rest"

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count under another name in here."""
        before, self._phase = self._phase, name
        try:
            yield
        finally:
            self._phase = before

    def during(self, name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that is counted under this name."""

        def counted(*args: Any, **kwargs: Any) -> Any:
            with self.phase(name):
                return work(*args, **kwargs)

        return counted

    def of_phase(self, name: str | None = None) -> Counts:
        """Return the counts of a phase, by default of the one that it is."""
        return self.counts.setdefault(name or self._phase, Counts())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.rpartition("::")[2]
        if name == "_local_scalar_dense":  # fake tensors have no values
            out: Any = _value(args[0])
        elif func.namespace == "bitsandbytes":  # changes its arguments, whose values are fake
            out = None
        else:
            made = (args[0], [_places(i) for i in args[1]], *args[2:]) if name in _INDEXED else args
            out = func(*made, **kwargs)
            _note_value(name, func, args, kwargs, out)
        if func.namespace not in _NO_WORK:
            self.add(func, name, args, kwargs, out)
        return out

    def add(self, func: Any, name: str, args: Any, kwargs: Any, out: Any) -> None:
        """Count one operation, unless the host does it by itself."""
        inputs, outputs = _tensors((args, kwargs)), _tensors(out)
        if not any(on_device(tensor) for tensor in (*inputs, *outputs)):
            return
        schema, line = func._schema, _line(2)
        # In the backward pass, what the library itself computes is the optimizer's.
        own = self._phase == "backward" and not line.endswith(" _backward")
        counts = self.of_phase("optimizer step" if own else self._phase)
        for why in _waits(name, args, kwargs, out):
            counts.waits[why, line] += 1
        is_view = any(r.alias_info and not r.alias_info.is_write for r in schema.returns)
        if is_view or name in _NO_LAUNCH or not any(t.numel() for t in (*inputs, *outputs)):
            return
        launches = _launches(name, args, kwargs)
        counts.launches += launches
        counts.operations[name] += launches
        counts.bytes += _bytes(schema, name, args, kwargs, outputs)


@contextmanager
def counting() -> Iterator[LaunchCounter]:
    """Let all tensors be fake in here, and count; the GPU's are those on :data:`DEVICE`."""
    counter = LaunchCounter()

    def tolist(tensor: torch.Tensor) -> Any:
        """Read a tensor at once; PyTorch reads a fake one number by number."""
        if on_device(tensor):
            counter.of_phase().waits["numbers read", _line(1)] += 1
        value = _value(tensor)
        return value if isinstance(value, list) else _nested([*tensor.shape], value)

    _foreach_utils._foreach_supported_types.append(FakeTensor)  # as the tensors that they stand for
    try:
        with (
            patch.object(FakeTensor, "tolist", tolist),
            patch.object(torch.Tensor, "backward", _backward),
            # PyTorch computes with constants of one element, and forgets their device.
            patch.object(fake_tensor, "CONSTANT_NUMEL_LIMIT", 0),
            FakeTensorMode(allow_non_fake_inputs=True), CudaAutocast(), counter,
        ):  # fmt: skip
            yield counter
    finally:
        _foreach_utils._foreach_supported_types.remove(FakeTensor)


def _backward(loss: torch.Tensor) -> None:
    """Do as PyTorch's own, which leaves CudaAutocast before checkpointed blocks are recomputed."""
    ones, engine = (torch.ones_like(loss),), torch.autograd.Variable._execution_engine
    engine.run_backward((loss,), ones, False, False, (), True, accumulate_grad=True)


def on_device(tensor: torch.Tensor) -> bool:
    """Return whether a tensor is one of the GPU's."""
    return tensor.device == DEVICE


def _note_value(name: str, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Keep the value of a small tensor that depends on nothing but numbers, such as a mask."""
    inputs = _tensors((args, kwargs))
    if not isinstance(out, FakeTensor) or out.numel() > 64 or not (inputs or name == "arange"):
        return
    known = [hasattr(one, "known") or not isinstance(one, FakeTensor) for one in inputs]
    if all(known) and not func._schema.is_mutable:
        args, kwargs = tree_map_only(FakeTensor, lambda tensor: tensor.known, (args, kwargs))
        with _disable_current_modes():
            out.known = func(*args, **kwargs)


def _places(index: torch.Tensor | None) -> torch.Tensor | None:
    """Return as many indices as a mask [B] has; a fake mask does not tell."""
    if index is None or index.dtype is not torch.bool:
        return index
    chosen = _value(index)
    size = sum(chosen) if isinstance(chosen, list) else index.numel()
    return torch.empty(size, dtype=torch.long, device=index.device)


def _value(tensor: torch.Tensor) -> Any:
    """Return what the host reads; of unknown values, that all is finite and nothing overflowed."""
    if hasattr(tensor, "known"):
        with _disable_current_modes():
            return tensor.known.tolist()
    if tensor.dtype is torch.bool:
        return on_device(tensor)  # the host's own masks choose what is seldom chosen
    return 0.0 if tensor.is_floating_point() else 1


def _nested(shape: list[int], value: Any) -> Any:
    return [_nested(shape[1:], value) for _ in range(shape[0])] if shape else value


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _line(depth: int) -> str:
    """Return the library's line that is executed: file, number and function."""
    frame = sys._getframe(depth + 1)
    while frame is not None:
        code = frame.f_code
        if code.co_filename.startswith(_KIT):
            file = code.co_filename.removeprefix(_KIT + "/")
            if file != "training/allocation_counter.py":
                return f"{file}:{frame.f_lineno} {code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]
    return "elsewhere"


def _waits(name: str, args: Any, kwargs: Any, out: Any) -> Iterator[str]:
    """Yield each reason for which the host waits for the GPU in an operation."""
    if name in _WAITS and on_device(args[0]):
        yield {"_local_scalar_dense": "a number read"}.get(name, name)
    elif name in ("_to_copy", "copy_"):
        source, target = (args[0], out) if name == "_to_copy" else (args[1], args[0])
        non_blocking = kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
        if on_device(source) != on_device(target) and not (non_blocking and on_device(target)):
            yield "a copy to the GPU" if on_device(target) else "a copy from the GPU"
    elif name in _INDEXED and on_device(args[0]):
        for index in filter(None.__ne__, args[1]):
            if index.dtype in (torch.bool, torch.uint8) and on_device(index):
                yield "a mask's size"
            elif not on_device(index):
                yield "a copy to the GPU"


def _launches(name: str, args: Any, kwargs: Any) -> int:
    """Return the kernels of an operation, at least."""
    if name.startswith(("_foreach_", "_fused_", "_amp_foreach_")):
        lists = [one for one in args if isinstance(one, list | tuple) and _tensors(one)]
        if name.startswith("_fused_"):
            lists = lists[:-1]  # the steps' addresses have room of their own
        scalars = any(isinstance(one, list | tuple) and one and not _tensors(one) for one in args)
        made = name.startswith("_foreach_") and not name.endswith("_") and name != "_foreach_norm"
        sizes = [tensor.numel() for tensor in lists[0]]
        cleanup = name == "_foreach_norm"  # adds up each tensor's chunks
        return multi_tensor_launches(sizes, len(lists) + made, scalars) + cleanup
    if name == "convolution_backward":
        return sum(args[-1])
    if name == "cat":
        return -(-len(args[0]) // MAX_JOINED)
    return 1


def _bytes(schema: Any, name: str, args: Any, kwargs: Any, outputs: list[torch.Tensor]) -> int:
    """Return the bytes that an operation reads and writes."""
    total = 0
    given = zip(schema.arguments, args, strict=False)
    named = ((a, kwargs[a.name]) for a in schema.arguments if a.name in kwargs)
    written = set()
    for argument, value in (*given, *named):
        own = _tensors(value)
        size = sum(tensor.nbytes for tensor in own)
        # bitsandbytes declares the gradient as written, which it is not.
        writes = argument.alias_info is not None and argument.alias_info.is_write
        writes = writes and argument.name != "g"
        reads = not (writes and name in _ONLY_WRITTEN)
        total += size * (writes + reads)
        written |= {id(tensor) for tensor in own} if writes else set()
    return total + sum(tensor.nbytes for tensor in outputs if id(tensor) not in written)
