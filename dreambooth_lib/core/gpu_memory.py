"""Memory that earlier models still hold, given back before the next one is loaded; what is free."""

import gc
import sys
import traceback
from typing import Any

GIB = 2**30


def free_memory() -> None:
    """Collect what nobody uses any more; a trainer's parts hold each other until then."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def gpu_bytes(device: Any = None) -> tuple[int, int]:
    """Return the free and the total bytes of a GPU, asked of it after :func:`free`.

    What torch's allocator has kept of the GPU and no tensor fills is free for the next model too.
    """
    import torch

    free_memory()
    unused, total = torch.cuda.mem_get_info(device)
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return unused + kept, total


def clear_frames(error: BaseException) -> None:
    """Empty the frames that an error, and those it came from, fell through.

    A notebook keeps the last error, and its frames would keep the models that they had in hand.
    """
    found: BaseException | None = error
    while found is not None:
        traceback.clear_frames(found.__traceback__)
        found = found.__context__
