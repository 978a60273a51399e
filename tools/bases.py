"""Print the figures of `dreambooth_lib/notebook/base_models.json`: parameters and memory.

``python -m tools.bases`` prints those of all published architectures in that file's format,
``python -m tools.bases sd15 sdxl`` those of some. Nothing is downloaded: the figures are computed
from the architectures' configs.
"""

import argparse
import json
import logging
import tempfile
from pathlib import Path
from typing import Any

from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.core.config_types import ConfigError
from dreambooth_lib.core.gpu_memory import GIB
from dreambooth_lib.core.subject import Subject
from dreambooth_lib.families import loading
from dreambooth_lib.notebook.base_models import METHODS
from dreambooth_lib.training.memory_estimate import estimate
from tools import architectures


def configs(name: str, folder: Path) -> str:
    """Write an architecture as a base without weights; return its path."""
    architectures.save(architectures.ALL[name], folder, weights=False)
    return str(folder)


def parameters(base: str) -> tuple[int, int, int]:
    """Count the parameters that are loaded, the denoiser's, and those of too large encoders."""
    family = loading.load_meta(base)
    large = [getattr(family.pipeline, name) for name in family.large_encoder_names]
    models = [family.denoiser, *family.text_encoders, *family.frozen]

    def count(*models: Any) -> int:
        return sum(parameter.numel() for model in models for parameter in model.parameters())

    return count(*models), count(family.denoiser), count(*large)


def needed(base: str, method: str, level: str, precision: str) -> float | None:
    """Return the GiB, at least 0.1, that a method needs at a memory level by default.

    None if the family cannot train at that level in ``precision``.
    """
    fields = METHODS[method].fields | {"memory": level}
    config = TrainConfig(Subject("photos", "dog"), base, **fields)
    try:
        return max(0.1, round(estimate(config, precision).memory / GIB, 1))
    except ConfigError:
        return None


def main() -> None:
    logging.disable()  # diffusers logs each component that it builds
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    names = ["toybox", *architectures.ALL]
    parser.add_argument("names", nargs="*", choices=[[], *names])
    for name in parser.parse_args().names or names:
        with tempfile.TemporaryDirectory() as folder:
            base = name if name == "toybox" else configs(name, Path(folder))
            counts = zip(("parameters", "denoiser", "large"), parameters(base), strict=True)
            print(name, ", ".join(f'"{key}": {n}' for key, n in counts), sep="\n", flush=True)
            for precision in ("fp16", "bf16"):
                gib = [
                    [needed(base, name, level, precision) for level in method.levels]
                    for name, method in METHODS.items()
                ]
                print(f'  "{precision}": {json.dumps(gib)},', flush=True)


if __name__ == "__main__":
    main()
