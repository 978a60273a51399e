"""Write safetensors files without a second copy of their tensors in memory."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dreambooth_lib.core.digests import DigestWriter

#: How safetensors names the dtypes that a state may hold.
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """Return a tensor's bytes, of any dtype: NumPy has no bfloat16."""
    return tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data


def write_tensors(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    dtypes: Mapping[str, torch.dtype] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> str:
    """Write a safetensors file one tensor at a time, and return its digest.

    safetensors' own writers need all on the CPU, or all of the file in memory. ``tensors`` may load
    lazily, as from an open safetensors file; ``dtypes`` says what to cast. Raises ``OSError`` if
    the file is cut short.
    """
    types = {name: tensors[name].dtype for name in tensors} | dict(dtypes or {})
    # Widest first, so that each starts at a multiple of its own width.
    types = dict(sorted(types.items(), key=lambda item: -item[1].itemsize))
    header: dict[str, Any] = {"__metadata__": {**metadata}} if metadata else {}
    end = 0
    for name, dtype in types.items():
        shape = list(tensors[name].shape)
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _DTYPES[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        writer = DigestWriter(file)
        writer.write(len(text).to_bytes(8, "little") + text)
        for name, dtype in types.items():
            writer.write(as_bytes(tensors[name].detach().to("cpu", dtype)))
    if path.stat().st_size != 8 + len(text) + end:
        raise OSError(f"{path} was cut short")
    return writer.digest
