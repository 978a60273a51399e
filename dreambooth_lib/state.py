"""Training state on disk: nested state dicts as safetensors and JSON, written beside and renamed.

No pickle: every tensor goes to ``tensors.safetensors`` under its path, everything else to
``state.json``, with each tensor's place marked. A folder therefore either exists whole or not at
all, whatever moment the process is killed at.
"""

import io
import json
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

if TYPE_CHECKING:
    from PIL import Image

_TENSOR = "__tensor__"
_TUPLE = "__tuple__"
_INT_KEYS = "__int_keys__"


def save_state(folder: str | Path, state: dict[str, Any]) -> None:
    """Write a nested dict of tensors, numbers, strings, lists and tuples to ``folder``, atomically.

    Dict keys are strings or ints (optimizers index their state by int). An older folder of that
    name is replaced only after the new one lies whole on disk.
    """
    tensors: dict[str, torch.Tensor] = {}
    tree = _split(state, "", tensors)
    with replacing_folder(folder) as partial:
        save_file(tensors, partial / "tensors.safetensors")
        (partial / "state.json").write_text(json.dumps(tree))


def load_state(folder: str | Path, keys: Collection[str] | None = None) -> dict[str, Any]:
    """Read what :func:`save_state` wrote; tensors come back on the CPU in their own dtypes.

    With ``keys`` only those entries are read, as far as they are there.
    """
    folder = Path(folder)
    replacing_folder(folder).recover()
    tree = json.loads((folder / "state.json").read_text())
    if keys is not None:
        tree = {key: value for key, value in tree.items() if key in keys}
    with safe_open(folder / "tensors.safetensors", "pt") as tensors:
        return _join(tree, tensors)


class replacing_folder:
    """``with replacing_folder(path) as partial``: fill ``partial``; it becomes ``path`` on success.

    On an exception the partial folder is removed and ``path`` stays as it was.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.partial = self.folder.with_name(f".{self.folder.name}.partial")
        self.old = self.folder.with_name(f".{self.folder.name}.old")

    def recover(self) -> None:
        """Put the older folder back where a kill came between the two renames."""
        if self.old.exists() and not self.folder.exists():
            self.old.rename(self.folder)

    def __enter__(self) -> Path:
        self.recover()
        for leftover in (self.partial, self.old):
            shutil.rmtree(leftover, ignore_errors=True)
        self.partial.mkdir(parents=True)
        return self.partial

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is not None:
            shutil.rmtree(self.partial, ignore_errors=True)
            return
        for path in self.partial.rglob("*"):
            if path.is_file():
                _flush(path)
        if self.folder.exists():
            self.folder.rename(self.old)
        self.partial.rename(self.folder)
        shutil.rmtree(self.old, ignore_errors=True)


@contextmanager
def replacing_file(path: str | Path) -> Iterator[Path]:
    """``with replacing_file(path) as partial``: write ``partial``; it becomes ``path`` on success.

    On an exception the partial file is removed and ``path`` stays as it was.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")  # others may write it too
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        _flush(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def replace_file(path: str | Path, data: bytes) -> None:
    """Write ``data`` to ``path`` so that the file is whole or, on failure, as it was before."""
    with replacing_file(path) as partial:
        partial.write_bytes(data)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _split(value: Any, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        while path in tensors:  # as {"a/b": x, "a": {"b": y}} would have it
            path += "'"
        tensors[path] = value.detach().cpu().clone().contiguous()
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


def _join(tree: Any, tensors: Any) -> Any:
    """The reverse of :func:`_split`; ``tensors`` is an open safetensors file."""
    if isinstance(tree, list):
        return [_join(v, tensors) for v in tree]
    if not isinstance(tree, dict):
        return tree
    if _TENSOR in tree:
        return tensors.get_tensor(tree[_TENSOR])
    if _TUPLE in tree:
        return tuple(_join(v, tensors) for v in tree[_TUPLE])
    if _INT_KEYS in tree:
        return {int(k): _join(v, tensors) for k, v in tree[_INT_KEYS].items()}
    return {k: _join(v, tensors) for k, v in tree.items()}


def save_png(image: "Image.Image", path: str | Path) -> None:
    """Write a picture as PNG to ``path``, whole or not at all."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    replace_file(path, buffer.getvalue())
