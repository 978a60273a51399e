"""What the libraries below say of themselves, kept out of what a person reads."""

import logging
import os
import warnings
from importlib import import_module

#: What bitsandbytes says at every layer of every call in 8 bits: its way, and nothing to be done.
_CAST = "MatMul8bitLt: inputs will be cast from"


def quiet() -> None:
    """Leave out the notices and loading bars of diffusers, transformers and bitsandbytes.

    For the command and the notebooks, before these are imported: what they lack for speed is told
    as they are. Errors still show, as do downloads from the Hub; a level that the environment names
    for a library is kept.
    """
    # Where flax is installed, as on Colab, diffusers imports it and says that it is deprecated.
    os.environ.setdefault("USE_FLAX", "0")
    # What they lack for speed on a CPU is told at their import.
    for name in ("bitsandbytes", "torchao"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for library in ("diffusers", "transformers"):
        # For its import, which other modules may come before, and for processes started from here.
        name = f"{library.upper()}_VERBOSITY"
        level = os.environ.setdefault(name, "error")
        own = import_module(f"{library}.utils.logging")
        if level == "error":
            own.set_verbosity_error()
        own.disable_progress_bar()
    from huggingface_hub.utils import enable_progress_bars

    if "HF_HUB_DISABLE_PROGRESS_BARS" not in os.environ:
        enable_progress_bars()  # which transformers has disabled too


def hide_casts() -> None:
    """Leave out what bitsandbytes says of each cast of its 8-bit layers: it is as it should be."""
    logger = logging.getLogger("bitsandbytes.autograd._functions")
    if not any(isinstance(kept, _NoCasts) for kept in logger.filters):
        logger.addFilter(_NoCasts())
        warnings.filterwarnings("ignore", message=_CAST)  # as older versions say it


class _NoCasts(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith(_CAST)
