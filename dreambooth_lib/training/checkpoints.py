"""Write and read a checkpoint: nested state dicts as safetensors and JSON, without pickle.

Every tensor goes to a safetensors file under its path in the dict; everything else goes to
``state.json``, which marks each tensor's place. The optimizer's tensors have a file of their own,
so that an older checkpoint can drop them and keep its weights. ``digests.json`` has a digest of
each file, and whatever reads a checkpoint compares them.
"""

import json
import shutil
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from dreambooth_lib.core.digests import changed_file, forget_digest, write_digests
from dreambooth_lib.core.disk import require_room
from dreambooth_lib.core.errors import KitError, one_line
from dreambooth_lib.core.files import recover_folder, replacing_folder
from dreambooth_lib.core.tensor_files import write_tensors

#: The tensors of a state's key "optimizer", and all others.
OPTIMIZER, TENSORS = "optimizer.safetensors", "tensors.safetensors"
STATE = "state.json"

#: Keys that mark in ``state.json`` what JSON has not.
_TENSOR, _TUPLE, _INT_KEYS = "__tensor__", "__tuple__", "__int_keys__"


class CheckpointError(KitError, ValueError):
    """A checkpoint with a missing, damaged or foreign file; the message names it."""


def save_state(folder: str | Path, state: dict[str, Any]) -> None:
    """Write a nested dict of tensors, numbers, strings, lists and tuples to ``folder``, atomically.

    Dict keys are strings or ints (optimizers index their state by int). Tensors are copied to the
    CPU one at a time, so that memory never holds them all twice. An older folder of that name is
    replaced once the new one is complete on disk. Raises :class:`DiskError` before anything is
    written if there is no room, ``ValueError`` for a dict with both kinds of keys and ``TypeError``
    for a value that JSON cannot hold.
    """
    tensors: dict[str, torch.Tensor] = {}
    tree = json.dumps(_split(state, "", tensors))
    files: dict[str, dict[str, torch.Tensor]] = {TENSORS: {}, OPTIMIZER: {}}
    for path, tensor in tensors.items():
        files[OPTIMIZER if path.startswith("/optimizer/") else TENSORS][path] = tensor
    require_room(Path(folder), sum(tensor.nbytes for tensor in tensors.values()) + len(tree))
    with replacing_folder(folder) as partial:
        digests = {
            name: write_tensors(partial / name, part)
            for name, part in files.items()
            if part or name == TENSORS
        }
        (partial / STATE).write_text(tree)
        write_digests(partial, digests)


def load_state(folder: str | Path, keys: Collection[str] | None = None) -> dict[str, Any]:
    """Load what :func:`save_state` wrote, its tensors on the CPU in their own dtypes.

    With ``keys``, load only those of them that exist. An optimizer's state that
    :func:`drop_optimizer` deleted is left out. Raises :class:`CheckpointError` where a file is not
    as it was written.
    """
    folder = Path(folder)
    with _explain_damage(folder), ExitStack() as stack:
        recover_folder(folder)
        needs_optimizer = keys is None or "optimizer" in keys
        check_digests(folder, () if needs_optimizer else (OPTIMIZER,))
        tree = json.loads((folder / STATE).read_text())
        stored = _Stored()
        for path in (folder / TENSORS, folder / OPTIMIZER):
            if path.exists():
                file = stack.enter_context(safe_open(path, "pt"))
                stored |= dict.fromkeys(file.keys(), file)
        state = {}
        for key in tree if keys is None else tree.keys() & keys:
            try:
                state[key] = _join(tree[key], stored)
            except KeyError:  # its tensors were deleted
                if key != "optimizer":
                    raise
        return state


def load_newest(checkpoints: Mapping[int, Path]) -> dict[str, Any] | None:
    """Load the newest whole checkpoint of those by step; None if there are none.

    Newer ones, which are damaged, are renamed to ``damaged-...``, with a warning. Raises
    :class:`CheckpointError` if there are checkpoints but none is whole.
    """
    damaged: dict[Path, CheckpointError] = {}
    for step, folder in sorted(checkpoints.items(), reverse=True):
        try:
            state = load_state(folder)
            if state.get("step") != step or not isinstance(state.get("model"), dict):
                raise CheckpointError(f"the checkpoint {folder} is not one of step {step}.")
        except CheckpointError as error:
            damaged[folder] = error
            continue
        for newer, damage in damaged.items():
            aside = newer.with_name(f"damaged-{newer.name}")
            shutil.rmtree(aside, ignore_errors=True)
            newer.rename(aside)
            text = f"{damage} It is now {aside}, and training continues from step {step}."
            warnings.warn(text, stacklevel=2)
        return state
    if damaged:
        newest, damage = next(iter(damaged.items()))
        raise CheckpointError(
            f"every checkpoint is damaged: {damage} To start again, delete {newest.parent}."
        ) from damage
    return None


def drop_optimizer(folder: Path) -> None:
    """Delete the optimizer's tensors of a saved state; its weights stay."""
    if (folder / OPTIMIZER).exists():
        forget_digest(folder, OPTIMIZER)  # first: a digest without its file would be damage
        (folder / OPTIMIZER).unlink()


def check_digests(folder: Path, unread: Collection[str] = ()) -> None:
    """Raise :class:`CheckpointError` where a checkpoint's file is not as it was written.

    Files that are not going to be read need no check. Without digests, all pass.
    """
    if changed := changed_file(folder, unread):
        raise CheckpointError(
            f"the checkpoint {folder} is damaged: its {changed} has changed since it was saved."
        )


@contextmanager
def _explain_damage(folder: Path) -> Iterator[None]:
    """Raise :class:`CheckpointError` for whatever reading a damaged file raises."""
    try:
        yield
    except KitError:
        raise
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError,
            SafetensorError) as error:  # fmt: skip
        text = f"the checkpoint {folder} is damaged ({one_line(error)})."
        raise CheckpointError(text) from error


def round_weights(source: Path, target: Path) -> str:
    """Copy a safetensors file with its float32 matrices in float16; return the copy's digest.

    Vectors (norms, biases) keep their dtype, and so does a matrix that overflows float16.
    """
    with safe_open(source, "pt") as file:
        tensors, dtypes = _Stored.fromkeys(file.keys(), file), {}
        for name in tensors:
            tensor = tensors[name]
            is_matrix = tensor.dtype is torch.float32 and tensor.ndim > 1
            if is_matrix and bool(tensor.half().isfinite().all()):
                dtypes[name] = torch.float16
        return write_tensors(target, tensors, dtypes)


class _Stored(dict[str, Any]):
    """Each tensor's open safetensors file; indexing loads the tensor."""

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
