"""Memory that earlier models still hold, given back before the next one is loaded."""

import gc
import sys
import traceback


def free() -> None:
    """Collect what nobody uses any more; a trainer's parts hold each other until then."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def forget(error: BaseException) -> None:
    """Empty the frames that an error, and those it came from, fell through.

    A notebook keeps the last error, and its frames would keep the models that they had in hand.
    """
    found: BaseException | None = error
    while found is not None:
        traceback.clear_frames(found.__traceback__)
        found = found.__context__
