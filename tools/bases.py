"""Print what `dreambooth_lib/notebook/base_models.json` says of each base: parameters and memory.

``python -m tools.bases`` prints the figures of all published architectures as they stand there,
``python -m tools.bases sd15 sdxl`` of some. Nothing is downloaded: the figures are counted from
configs alone, which have the architectures' numbers.
"""

import argparse
import json
import logging
import tempfile
from pathlib import Path
from typing import Any

from dreambooth_lib.core.config import Subject, TrainConfig
from dreambooth_lib.core.config_checks import ConfigError
from dreambooth_lib.core.gpu_memory import GIB
from dreambooth_lib.families import loading
from dreambooth_lib.notebook.base_models import WAYS
from dreambooth_lib.training.memory_estimate import estimate
from tools import architectures


def configs(name: str, folder: Path) -> str:
    """Write an architecture as a base without weights; return its path."""
    architectures.save(architectures.ALL[name], folder, weights=False)
    return str(folder)


def parameters(base: str) -> tuple[int, int, int]:
    """Count those of all parts that are loaded, of the denoiser, and of too large encoders."""
    family = loading.load_meta(base)
    large = [getattr(family.pipeline, name) for name in family.large_encoder_names]
    every = [family.denoiser, *family.text_encoders, *family.frozen]

    def count(*parts: Any) -> int:
        return sum(parameter.numel() for part in parts for parameter in part.parameters())

    return count(*every), count(family.denoiser), count(*large)


def needed(base: str, method: str, level: str, precision: str) -> float | None:
    """Return the GiB, at least 0.1, that a way takes at a level of memory by default.

    None where the family cannot compute at that level in ``precision``.
    """
    fields = WAYS[method].fields | {"memory": level}
    config = TrainConfig(Subject("photos", "dog"), base, **fields)
    try:
        return max(0.1, round(estimate(config, precision).memory / GIB, 1))
    except ConfigError:
        return None


def main() -> None:
    logging.disable()  # diffusers notes each part that is made
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    names = ["toybox", *architectures.ALL]
    parser.add_argument("names", nargs="*", choices=[[], *names])
    for name in parser.parse_args().names or names:
        with tempfile.TemporaryDirectory() as folder:
            base = name if name == "toybox" else configs(name, Path(folder))
            counts = zip(("parameters", "denoiser", "large"), parameters(base), strict=True)
            print(name, ", ".join(f'"{of}": {count}' for of, count in counts), sep="\n", flush=True)
            for precision in ("fp16", "bf16"):
                gib = [
                    [needed(base, method, level, precision) for level in way.levels]
                    for method, way in WAYS.items()
                ]
                print(f'  "{precision}": {json.dumps(gib)},', flush=True)


if __name__ == "__main__":
    main()
