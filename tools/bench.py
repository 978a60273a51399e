"""``make bench``: a training step beside the U-Net alone, an evaluation's pace and memory.

Into ``outputs/bench.json``. Step and U-Net are timed in turn in one process, so that a slow moment
of the machine hits both.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image

from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.evaluation.demo import BUNDLED_SUBJECTS, bundled_subjects
from dreambooth_lib.evaluation.dreambench import Protocol, draw_all, load_benchmark
from dreambooth_lib.evaluation.scores import score
from dreambooth_lib.metrics.encoders import Encoder, embed_files
from dreambooth_lib.training import runs
from dreambooth_lib.training.loop import training_steps
from dreambooth_lib.training.setup import Trainer
from dreambooth_lib.training.validation import TOYBOX_SCORER

ROUNDS, WARMUP = 30, 3
PROMPTS, FEW, MANY = 25, 512, 2048  # of an evaluation: prompts drawn, pictures embedded


def unet_seconds(trainer: Trainer) -> float:
    """Time one forward and backward of the U-Net at the size of the run's batch."""
    rows = 2 * trainer.config.batch_size
    unet = trainer.family.denoiser
    side, channels = unet.config.sample_size, unet.config.in_channels
    x_t, t = torch.randn(rows, channels, side, side), torch.randint(0, 1000, (rows,))
    context = trainer.batches.prompt_cache([""] * rows)["encoder_hidden_states"]
    began = time.perf_counter()
    unet(x_t, t, context).sample.square().mean().backward()
    seconds = time.perf_counter() - began
    unet.zero_grad()
    return seconds


def measure(batch_size: int, optimizer: str, folder: Path) -> dict[str, float]:
    config = TrainConfig(
        subject=bundled_subjects()[0], batch_size=batch_size, optimizer=optimizer,
        class_images=8, prior_inference_steps=2, steps=10_000, checkpoint_every=10_000,
        validate_every=0,
    )  # fmt: skip
    trainer = Trainer(runs.start(config, folder / f"{optimizer}-{batch_size}"))
    made = training_steps(trainer)
    steps, alone = [], []
    for number in range(WARMUP + ROUNDS):
        began = time.perf_counter()
        next(made)
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


def evaluation(folder: Path) -> dict[str, float]:
    """Pictures a second through the paper's protocol, and what four times as many cost in memory.

    ``drawn``: by the bundled base, 25 steps. ``embedded``: from files, by the scorer. ``scored``:
    from kept embeddings to a table's rows.
    """
    bundled = load_benchmark(BUNDLED_SUBJECTS)
    few = {kind: prompts[:PROMPTS] for kind, prompts in bundled.prompts.items()}
    one = replace(bundled, subjects=bundled.subjects[:1], prompts=few)
    protocol = Protocol(pictures=2, class_images=8)
    methods = {"base": lambda _: "toybox"}
    began = time.perf_counter()
    for at in draw_all(one, methods, folder, protocol):
        drawn = at.total
    drawn_in = time.perf_counter() - began
    encoder = Encoder(TOYBOX_SCORER)
    rng = np.random.default_rng(0)
    files = [folder / f"noise{i}.png" for i in range(MANY)]
    for file in files:
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(file)
    began = time.perf_counter()
    embed_files(encoder, files[:FEW], folder / "kept")
    embedded_in = time.perf_counter() - began
    before = peak_mb()
    embed_files(encoder, files, folder / "kept")
    grown = peak_mb() - before
    list(score(one, methods, folder, {"scorer": encoder}, protocol))
    began = time.perf_counter()
    rows = list(score(one, methods, folder, {"scorer": encoder}, protocol))
    assert rows
    return {
        "drawn_per_second": drawn / drawn_in,
        "embedded_per_second": FEW / embedded_in,
        "scored_per_second": drawn / (time.perf_counter() - began),
        f"mb_more_for_{MANY}_pictures_than_for_{FEW}": grown,
    }


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def import_seconds() -> float:
    """Measure the median time of ``import dreambooth_lib`` in processes of their own."""
    code = (
        "from time import perf_counter as now; t = now(); import dreambooth_lib; print(now() - t)"
    )
    command = [sys.executable, "-c", code]
    return median(float(subprocess.check_output(command)) for _ in range(5))


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        settings = [(1, "adamw"), (2, "adamw"), (1, "adamw8bit")]
        training = [measure(size, name, Path(folder)) for size, name in settings]
        of_evaluation = evaluation(Path(folder) / "evaluation")
    figures = {
        "import_seconds": import_seconds(),
        "training": training,
        "evaluation": of_evaluation,
    }
    Path("outputs").mkdir(exist_ok=True)
    Path("outputs/bench.json").write_text(json.dumps(figures, indent=2))
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
