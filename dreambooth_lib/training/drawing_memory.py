"""Tell whether a base fits into RAM to draw with, and if not, load its text encoders first.

A large base's text encoders and denoiser take more RAM together than a free Colab session has, and
the system would kill the session without a word.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import psutil
import torch

from dreambooth_lib.core import gpu_memory
from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.core.errors import KitError
from dreambooth_lib.core.processes import drawing_gpu
from dreambooth_lib.families import loading
from dreambooth_lib.training.part_sizes import sizes_of_parts
from dreambooth_lib.training.runs import Run
from dreambooth_lib.training.trainable import drawing_config

#: Bytes of RAM that the rest of a process may take meanwhile.
SPARE = 1e9


class NotEnoughMemory(KitError, RuntimeError):
    """A base needs more RAM to draw with than is free; the message says what to do."""


def options_that_fit(
    source: "Run | TrainConfig | str",
    dtype: torch.dtype,
    at: int | None = None,
    prompts: Collection[str] | None = None,
) -> dict[str, Any]:
    """Return options to load a source on a GPU, such as ``prompts`` for its encoders to come first.

    None where all of it fits, where it is of a small base, and without a GPU. Raises
    :class:`NotEnoughMemory` if, in float16, it does not fit even so, or not without ``prompts``.
    """
    device = drawing_gpu()
    if device is None:
        return {}
    if isinstance(source, str):
        lora = next(iter(loading.resolve(source).loras[-1:]), None)
        base, revision = source, None
        quantize = lora.trained_on.get("quantize") if lora else None
        plain = lora is None
    else:
        config = drawing_config(source.config if isinstance(source, Run) else source)
        base, revision, quantize = config.base, config.revision, config.quantize
        if isinstance(source, Run) and at is None and config.method == "full":
            base, revision = str(source.folder), None  # its base may have been deleted
        # Trained text encoders, and those with LoRAs on them, are needed for longer.
        plain = not config.trains_text and not loading.resolve(base, revision).loras
    family = loading.resolve(base, revision).family
    if not family.large_encoder_names or not family.supports_dtype(dtype):
        return {}
    whole, in_parts = _ram(base, revision, quantize, dtype, gpu_memory.gpu_bytes(device)[0])
    free = psutil.virtual_memory().available - SPARE
    if whole <= free:
        return {}
    encoders_first = prompts is not None and plain
    needed = in_parts if encoders_first else whole
    # Large bases are published in bfloat16: weights that stay so remain in their files, whose pages
    # the system can drop. Others are copies.
    if needed <= free or dtype is torch.bfloat16:
        return {"prompts": prompts, "device": device} if encoders_first else {}
    raise NotEnoughMemory(
        f"generating with '{Path(base).name}' takes about {(needed + SPARE) / 1e9:.1f} GB of RAM, "
        f"but only {(free + SPARE) / 1e9:.1f} GB is free; restart the session to free RAM, or use "
        "a machine with more (on Colab, Runtime > Change runtime type > High-RAM)."
    )


def _ram(
    base: str, revision: str | None, quantize: str | None, dtype: torch.dtype, gpu: int
) -> tuple[float, float]:
    """Return the bytes of RAM to load a base: all of it, and with its text encoders first.

    Quantized parts are loaded on the GPU, of which ``gpu`` bytes are free, and are in RAM only
    where the base is offloaded.
    """
    family = loading.load_meta(base, revision, dtype=dtype, trained=())
    sizes = sizes_of_parts(family, quantize, dtype)
    on_gpu = [getattr(family.pipeline, name, None) for name in family.quantized_names()]
    in_ram = {m: 0.0 if quantize and m in on_gpu else size for m, size in sizes.items()}
    rest = [family.denoiser, family.pipeline.vae]

    def needed(*modules: Any) -> float:
        total = sum(sizes[module] for module in modules)
        return total if total > gpu / 2 else sum(in_ram[module] for module in modules)

    encoders = sum(size for module, size in in_ram.items() if module not in rest)
    return needed(*sizes), max(encoders, needed(*rest))
