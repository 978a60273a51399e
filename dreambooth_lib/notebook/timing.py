"""Predict a run's time on this machine from a few training steps, one validation and a file."""

import os
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from dreambooth_lib.core import gpu_memory
from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.core.processes import join_group
from dreambooth_lib.training import memory_level, runs
from dreambooth_lib.training.validation_pace import checkpoint_intervals, count_validations

if TYPE_CHECKING:
    from dreambooth_lib.training.setup import Trainer

_NEVER = 10**6  # steps
_STEPS = 3
_WRITTEN = 2**28  # bytes at most to measure the disk with


@dataclass(frozen=True)
class Pace:
    """Seconds of one training step, one validation (0 if there is none) and one checkpoint."""

    step: float
    validation: float
    checkpoint: float = 0.0
    class_image: float = 0.0  #: roughly, from the validation's images; 0 if there are none

    def seconds(self, config: TrainConfig) -> float:
        """Add up a run's steps, validations and checkpoints; early stopping may end it sooner."""
        validations = count_validations(config, self.step, self.validation)
        saving = checkpoints(config) * self.checkpoint
        return config.steps * self.step + validations * self.validation + saving

    def describe_class_images(self, config: TrainConfig) -> str:
        """Say in a sentence how long a run's class images take; empty if it draws none."""
        if not config.draws_class_images:
            return ""
        if not self.class_image:
            return " Generating class images takes extra time."
        words = in_words(config.class_images * self.class_image)
        return (
            f" Generating {config.class_images} class images takes <b>{words}</b> more, unless an "
            "earlier run has generated them."
        )


def in_words(seconds: float) -> str:
    """Return a time in words, such as "about 5 min" or "about 1 h 20 min"."""
    minutes = round(seconds / 60)
    if seconds < 50:
        return "less than a minute"
    if seconds < 165:
        return f"about {round(seconds / 30) / 2:g} min"
    if minutes < 60:
        return f"about {minutes} min"
    minutes = 5 * round(minutes / 5)
    return f"about {minutes // 60} h {minutes % 60} min"


def checkpoints(config: TrainConfig) -> int:
    """Count a run's checkpoints: after each validation, every ``checkpoint_every``, at its end."""
    every = checkpoint_intervals(config)
    return len({config.steps}.union(*(range(each, config.steps, each) for each in every)))


def measure(config: TrainConfig) -> Pace:
    """Train for a few steps in a temporary folder and return the pace.

    A checkpoint's time follows from its size and the speed of the disk, and a class image's from
    the validation's; loading the base is not included. Raises as :func:`.loop.train` does.
    """
    import torch
    from torch.utils._pytree import tree_leaves

    from dreambooth_lib.training.loop import training_steps
    from dreambooth_lib.training.setup import Trainer
    from dreambooth_lib.training.validation_record import history

    gpu_memory.free_memory()
    short = memory_level.resolve_memory(config, join_group().device).replace(
        steps=_NEVER,
        checkpoint_every=_NEVER,
        validate_every=_NEVER if config.validate_every else 0,
        keep_class=None,  # it takes less than a twentieth of the time
        class_images=min(config.class_images, config.batch_size),
    )
    with TemporaryDirectory() as folder:
        run = runs.start(short, Path(folder) / "run")
        trainer = Trainer(run)  # which validates the base
        validation = sum(result.seconds for result in history(run))
        class_image = _class_image_seconds(trainer, validation) if config.draws_class_images else 0
        # The first step also warms up.
        seconds = [step.seconds for step in islice(training_steps(trainer), 1, 1 + _STEPS)]
        leaves = tree_leaves(trainer.optimizer.state_dict())
        size = sum(leaf.nbytes for leaf in leaves if isinstance(leaf, torch.Tensor))
        checkpoint = _seconds_to_write(size, Path(folder))
    return Pace(median(seconds), validation, checkpoint, class_image)


def _class_image_seconds(trainer: "Trainer", validation: float) -> float:
    """Estimate the seconds of a class image by those of a validation's images."""
    from dreambooth_lib.training.class_images import inference_steps
    from dreambooth_lib.training.validation import plan_for

    config, folder = trainer.config, trainer.run.folder.parent / "class_images"
    plan, steps = plan_for(config), inference_steps(trainer.config, trainer.family, folder)
    seconds = validation / len(plan.prompts(config.subject)) * steps / (plan.inference_steps or 1)
    # A distilled model generates in one pass; guidance takes two.
    return seconds if config.draw_base is None else 2 * seconds


def _seconds_to_write(size: int, folder: Path) -> float:
    """Estimate the seconds to write ``size`` bytes to the disk by writing some of them."""
    block = os.urandom(min(size, 2**22))
    blocks, began = max(1, min(size, _WRITTEN) // len(block)), time.perf_counter()
    with (folder / "written").open("wb") as file:
        for _ in range(blocks):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return (time.perf_counter() - began) * size / (blocks * len(block))
