"""``make bench``: what a training step costs beside the U-Net alone, into ``outputs/bench.json``.

Both are timed in turn in one process, so that a slow moment of the machine hits both.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

from dreambooth_lib import runs
from dreambooth_lib.config import TrainConfig
from dreambooth_lib.demo import bundled_subjects
from dreambooth_lib.training import Trainer

ROUNDS, WARMUP = 30, 3


def unet_seconds(trainer: Trainer) -> float:
    """One forward and backward of the U-Net at the size of the trainer's batch."""
    rows = 2 * trainer.config.batch_size
    unet = trainer.family.denoiser
    side, channels = unet.config.sample_size, unet.config.in_channels
    x_t, t = torch.randn(rows, channels, side, side), torch.randint(0, 1000, (rows,))
    context = trainer.batches.cond["encoder_hidden_states"][:1].expand(rows, -1, -1)
    began = time.perf_counter()
    unet(x_t, t, context).sample.square().mean().backward()
    seconds = time.perf_counter() - began
    unet.zero_grad()
    return seconds


def measure(batch_size: int, optimizer: str, folder: Path) -> dict[str, float]:
    config = TrainConfig(
        subject=bundled_subjects()[0], batch_size=batch_size, optimizer=optimizer,
        class_pictures=8, prior_inference_steps=2, steps=10_000, checkpoint_every=10_000,
    )  # fmt: skip
    trainer = Trainer(runs.start(config, folder / f"{optimizer}-{batch_size}"))
    steps, alone = [], []
    for number in range(WARMUP + ROUNDS):
        began = time.perf_counter()
        trainer.update()
        seconds = time.perf_counter() - began
        if number >= WARMUP:
            steps.append(seconds)
            alone.append(unet_seconds(trainer))
    return {
        "batch": f"{batch_size} instance + {batch_size} class",
        "optimizer": optimizer,
        "steps_per_second": 1 / median(steps),
        "unet_alone_per_second": 1 / median(alone),
        "ratio": median(a / b for a, b in zip(steps, alone, strict=True)),
    }


def import_seconds() -> float:
    """The median time of ``import dreambooth_lib`` in processes of their own."""
    code = (
        "from time import perf_counter as now; t = now(); import dreambooth_lib; print(now() - t)"
    )
    command = [sys.executable, "-c", code]
    return median(float(subprocess.check_output(command)) for _ in range(5))


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        settings = [(1, "adamw"), (2, "adamw"), (1, "adamw8bit")]
        training = [measure(size, name, Path(folder)) for size, name in settings]
    figures = {"import_seconds": import_seconds(), "training": training}
    Path("outputs").mkdir(exist_ok=True)
    Path("outputs/bench.json").write_text(json.dumps(figures, indent=2))
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
