"""Silence notices of diffusers, transformers and bitsandbytes that a user can do nothing about."""

import logging
import os
import warnings
from importlib import import_module

#: bitsandbytes says this at every 8-bit layer in every call.
_CAST = "MatMul8bitLt: inputs will be cast from"


def quiet() -> None:
    """Turn off notices and loading bars of diffusers, transformers and bitsandbytes.

    Call it before they are imported: they print what they miss for speed at import. Errors and
    downloads from the Hub still show. A verbosity set in the environment is respected.
    """
    # If flax is installed, as on Colab, diffusers imports it and warns that it is deprecated.
    os.environ.setdefault("USE_FLAX", "0")
    # They print what they miss for speed on a CPU when they are imported.
    for name in ("bitsandbytes", "torchao"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for library in ("diffusers", "transformers"):
        # The variable is for its import and for child processes.
        name = f"{library.upper()}_VERBOSITY"
        level = os.environ.setdefault(name, "error")
        own = import_module(f"{library}.utils.logging")
        if level == "error":
            own.set_verbosity_error()
        own.disable_progress_bar()
    from huggingface_hub.utils import enable_progress_bars

    if "HF_HUB_DISABLE_PROGRESS_BARS" not in os.environ:
        enable_progress_bars()  # transformers has disabled them too


def hide_casts() -> None:
    """Silence bitsandbytes about the casts in its 8-bit layers; they are intended."""
    logger = logging.getLogger("bitsandbytes.autograd._functions")
    if not any(isinstance(entry, _NoCasts) for entry in logger.filters):
        logger.addFilter(_NoCasts())
        warnings.filterwarnings("ignore", message=_CAST)  # older versions warn instead


class _NoCasts(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith(_CAST)
