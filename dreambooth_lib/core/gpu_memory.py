"""Free the memory of earlier models, and ask how much GPU memory is free."""

import gc
import sys
import traceback
from typing import Any

GIB = 2**30


def free_memory() -> None:
    """Free what an earlier cell left: objects that refer to each other, and torch's cache.

    What the last error's frames hold goes too: of an interrupted cell, its models.
    """
    if (last := getattr(sys, "last_value", None)) is not None:
        clear_frames(last)
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def gpu_bytes(device: Any = None) -> tuple[int, int]:
    """Return the free and total bytes of a GPU, after :func:`free_memory`.

    Memory that torch's allocator has reserved but no tensor uses counts as free.
    """
    import torch

    free_memory()
    unused, total = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return unused + cached, total


def clear_frames(error: BaseException) -> None:
    """Clear the local variables in the traceback of an error and of the errors it came from.

    A notebook holds on to the last error, and through its frames to the models in them.
    """
    cause: BaseException | None = error
    while cause is not None:
        traceback.clear_frames(cause.__traceback__)
        cause = cause.__context__
