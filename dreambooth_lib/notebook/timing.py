"""What training costs on this machine: a few updates, one look and a file, measured."""

import os
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from dreambooth_lib.core import gpu_memory
from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.core.processes import join_group
from dreambooth_lib.training import memory_level, runs

_NEVER = 10**6  # updates
_UPDATES = 3
_RARELY = 250  # updates between checkpoints where a config asks for none and for no looks
_WRITTEN = 2**28  # bytes at most, to measure the disk by


@dataclass(frozen=True)
class Pace:
    """Seconds of one update, one look (0 without looks) and one checkpoint."""

    update: float
    validation: float
    checkpoint: float = 0.0

    def seconds(self, config: TrainConfig) -> float:
        """Add up a run's updates, looks and checkpoints; an early stop may end it before."""
        looks = 1 + -(-config.steps // config.validate_every) if config.validate_every else 0
        saves = checkpoints(config) * self.checkpoint
        return config.steps * self.update + looks * self.validation + saves


def checkpoints(config: TrainConfig) -> int:
    """Count a run's checkpoints: after each look, every so many steps, and at its end."""
    own = config.checkpoint_every or (0 if config.validate_every else _RARELY)
    every = filter(None, (config.validate_every, own))
    return len({config.steps}.union(*(range(each, config.steps, each) for each in every)))


def measure(config: TrainConfig) -> Pace:
    """Train for a moment beside all runs, and leave nothing behind.

    A checkpoint is told from its size and the pace of the disk; loading the base and drawing a
    batch of class images are no part of it. Raises as :func:`train` does.
    """
    import torch
    from torch.utils._pytree import tree_leaves

    from dreambooth_lib.training.loop import training_steps
    from dreambooth_lib.training.setup import Trainer

    gpu_memory.free_memory()
    brief = memory_level.resolve_memory(config, join_group().device).replace(
        steps=_NEVER,
        checkpoint_every=_NEVER,
        validate_every=_NEVER if config.validate_every else 0,
        class_images=min(config.class_images, config.batch_size),
    )
    with TemporaryDirectory() as folder:
        trainer = Trainer(runs.start(brief, Path(folder) / "run"))
        look = trainer.validate_if_due()
        # The first one also warms up.
        seconds = [step.seconds for step in islice(training_steps(trainer), 1, 1 + _UPDATES)]
        leaves = tree_leaves(trainer.optimizer.state_dict())
        size = sum(leaf.nbytes for leaf in leaves if isinstance(leaf, torch.Tensor))
        checkpoint = _seconds_to_write(size, Path(folder))
    return Pace(median(seconds), look.seconds if look else 0.0, checkpoint)


def _seconds_to_write(size: int, folder: Path) -> float:
    """Time a file of ``size`` bytes, told from a part of it, until it lies on the disk."""
    block = os.urandom(min(size, 2**22))
    blocks, began = max(1, min(size, _WRITTEN) // len(block)), time.perf_counter()
    with (folder / "written").open("wb") as file:
        for _ in range(blocks):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return (time.perf_counter() - began) * size / (blocks * len(block))
