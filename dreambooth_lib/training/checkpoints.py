"""Write and read a checkpoint: nested state dicts as safetensors and JSON, without pickle.

Every tensor goes to a safetensors file under its path, everything else to ``state.json``, with each
tensor's place marked. The optimizer's tensors have a file of their own, so that an older checkpoint
can drop them and keep its weights.
"""

import json
import math
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open

from dreambooth_lib.core.files import recover_folder, replacing_folder

if TYPE_CHECKING:
    pass

#: The tensors of a state's key "optimizer", and all others.
OPTIMIZER, TENSORS = "optimizer.safetensors", "tensors.safetensors"


#: How safetensors names the dtypes that a state may hold.
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


_TENSOR = "__tensor__"


_TUPLE = "__tuple__"


_INT_KEYS = "__int_keys__"


def save_state(folder: str | Path, state: dict[str, Any]) -> None:
    """Write a nested dict of tensors, numbers, strings, lists and tuples to ``folder``, atomically.

    Dict keys are strings or ints (optimizers index their state by int). One tensor at a time is
    brought to the CPU, so that memory need not hold them all twice. An older folder of that name is
    replaced only after the new one lies whole on disk.
    """
    tensors: dict[str, torch.Tensor] = {}
    tree = _split(state, "", tensors)
    files: dict[str, dict[str, torch.Tensor]] = {TENSORS: {}, OPTIMIZER: {}}
    for path, tensor in tensors.items():
        files[OPTIMIZER if path.startswith("/optimizer/") else TENSORS][path] = tensor
    with replacing_folder(folder) as partial:
        for name, held in files.items():
            if held or name == TENSORS:
                write_tensors(partial / name, held)
        (partial / "state.json").write_text(json.dumps(tree))


def write_tensors(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    dtypes: Mapping[str, torch.dtype] | None = None,
) -> None:
    """Write a safetensors file tensor by tensor: safetensors' own writer wants all on the CPU.

    ``tensors`` may be read lazily, as from an open safetensors file; ``dtypes`` says what to cast.
    """
    types = {name: tensors[name].dtype for name in tensors} | dict(dtypes or {})
    # The widest first, so that each begins at a multiple of its own width.
    types = dict(sorted(types.items(), key=lambda item: -item[1].itemsize))
    header: dict[str, Any] = {}
    end = 0
    for name, dtype in types.items():
        shape = list(tensors[name].shape)
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _DTYPES[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, dtype in types.items():
            tensor = tensors[name].detach().to("cpu", dtype).contiguous()
            file.write(tensor.flatten().view(torch.uint8).numpy().data)
    if path.stat().st_size != 8 + len(text) + end:
        raise OSError(f"{path} was cut short")


def load_state(folder: str | Path, keys: Collection[str] | None = None) -> dict[str, Any]:
    """Read what :func:`save_state` wrote; tensors come back on the CPU in their own dtypes.

    With ``keys`` only those entries are read, as far as they are there. What
    :func:`drop_optimizer` took away is left out.
    """
    folder = Path(folder)
    recover_folder(folder)
    tree = json.loads((folder / "state.json").read_text())
    with ExitStack() as stack:
        stored = _Stored()
        for path in (folder / TENSORS, folder / OPTIMIZER):
            if path.exists():
                file = stack.enter_context(safe_open(path, "pt"))
                stored |= dict.fromkeys(file.keys(), file)
        state = {}
        for key in tree if keys is None else tree.keys() & keys:
            try:
                state[key] = _join(tree[key], stored)
            except KeyError:  # its tensors were dropped
                if key != "optimizer":
                    raise
        return state


def drop_optimizer(folder: Path) -> None:
    """Drop the optimizer's tensors of a saved state: what is left can be drawn from."""
    (folder / OPTIMIZER).unlink(missing_ok=True)


def round_weights(source: Path, target: Path) -> None:
    """Copy a safetensors file with its float32 matrices in float16; half the bytes.

    Vectors stay as they are, such as norms and biases, which are near 1 and few. So does a matrix
    that float16 cannot hold.
    """
    with safe_open(source, "pt") as file:
        tensors, dtypes = _Stored.fromkeys(file.keys(), file), {}
        for name in tensors:
            tensor = tensors[name]
            moments = name.startswith("/optimizer/")  # of a state from before they had a file
            wide = tensor.dtype is torch.float32 and tensor.ndim > 1 and not moments
            if wide and bool(tensor.half().isfinite().all()):
                dtypes[name] = torch.float16
        write_tensors(target, tensors, dtypes)


class _Stored(dict[str, Any]):
    """The open safetensors file of each tensor; a tensor is read when it is asked for."""

    def __getitem__(self, name: str) -> torch.Tensor:
        return super().__getitem__(name).get_tensor(name)


def _split(value: Any, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        while path in tensors:  # as {"a/b": x, "a": {"b": y}} would have it
            path += "'"
        tensors[path] = value
        return {_TENSOR: path}
    if isinstance(value, dict):
        tree = {str(k): _split(v, f"{path}/{k}", tensors) for k, v in value.items()}
        ints = [isinstance(k, int) for k in value]
        if any(ints) and not all(ints):
            raise ValueError(f"state at '{path}' mixes int and str keys; use one kind.")
        return {_INT_KEYS: tree} if ints and all(ints) else tree
    if isinstance(value, tuple):
        return {_TUPLE: [_split(v, f"{path}/{i}", tensors) for i, v in enumerate(value)]}
    if isinstance(value, list):
        return [_split(v, f"{path}/{i}", tensors) for i, v in enumerate(value)]
    return value


def _join(tree: Any, tensors: _Stored) -> Any:
    """Reverse :func:`_split`."""
    if isinstance(tree, list):
        return [_join(v, tensors) for v in tree]
    if not isinstance(tree, dict):
        return tree
    if _TENSOR in tree:
        return tensors[tree[_TENSOR]]
    if _TUPLE in tree:
        return tuple(_join(v, tensors) for v in tree[_TUPLE])
    if _INT_KEYS in tree:
        return {int(k): _join(v, tensors) for k, v in tree[_INT_KEYS].items()}
    return {k: _join(v, tensors) for k, v in tree.items()}
