"""Keep tensors that can be computed again in files that are checked when they are read."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from dreambooth_lib.core.files import replacing_file

if TYPE_CHECKING:
    import torch

_DIGEST = "digest"  #: the key in the file's metadata


def write_tensors(path: Path, tensors: "Mapping[str, torch.Tensor]") -> None:
    """Write tensors to a safetensors file with a digest of them and of its name."""
    from dreambooth_lib.core import tensor_files

    digest = _digest(path.name, tensors)
    with replacing_file(path) as partial:
        tensor_files.write_tensors(partial, tensors, metadata={_DIGEST: digest})


def read_tensors(path: Path, names: tuple[str, ...]) -> "dict[str, torch.Tensor] | None":
    """Return the tensors of a file, on the CPU; None where it is missing, damaged or another's.

    ``names`` are the tensors that it must have. A file's name stands for what they were made of, so
    that a file that was renamed is another's.
    """
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in names}
            written = (file.metadata() or {}).get(_DIGEST)
    except (OSError, SafetensorError):
        return None
    return tensors if written == _digest(path.name, tensors) else None


def _digest(file_name: str, tensors: "Mapping[str, torch.Tensor]") -> str:
    from dreambooth_lib.core.tensor_files import as_bytes

    digest = hashlib.blake2b(file_name.encode(), digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {[*tensor.shape]}".encode())
        digest.update(as_bytes(tensor))
    return digest.hexdigest()
