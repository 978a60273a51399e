"""Adapt λ, the weight of the prior, during training: the multiplier of "keep the class: 95%".

The class is kept to 95% where the frozen base's loss on held-out class images is 95% of the trained
model's, which is the class loss ratio. λ is the Lagrange multiplier of that constraint, moved by
dual ascent: it rises while the class is kept to less, and falls while it is kept to more, by a
factor at each measurement, so that it stays positive. Without ``keep_class`` λ is the config's.

The measure is of the weights that a run ends with, the EMA weights if there are any: one step moves
the loss of the others by 5%, and theirs by 1%. It takes as many rows as a training batch has, with
no gradient, in turn from a fixed pool, and the means of both losses over the last measurements.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator

from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.core.config_checks import PRIOR_WEIGHTS
from dreambooth_lib.core.errors import InputError
from dreambooth_lib.data.images import Photo
from dreambooth_lib.families.base import Family
from dreambooth_lib.training import lora
from dreambooth_lib.training.class_images import prepare_class_images
from dreambooth_lib.training.held_out_loss import BINS, HeldOutLoss
from dreambooth_lib.training.optimizer_step import Optimizer, check_finite
from dreambooth_lib.training.runs import Run
from dreambooth_lib.training.trainable import Trainable

IMAGES = 16  #: held-out class images; each is measured in every timestep bin
FEWEST = 16  #: of one's own class images, of which a quarter is then held out
SEED = 1_000_000  #: of the first of them, after the config's: no class image to train on is near
INTERVAL = 10  #: steps between measurements
SMOOTHING = 0.3  #: the share of the newest measurement in the means
INTEGRAL = 0.1  #: by how much the logarithm of the multiplier moves at most, at each measurement
PROPORTIONAL = 0.7  #: by how much that of λ is at most above it while the class is kept to less
TOLERANCE = 0.02  #: a class kept to so much less than was asked for is still as asked for

#: Returns the mean loss of the trained model and of the base on the same rows of the pool.
Measure = Callable[[Sequence[int]], tuple[float, float]]
_POOL = range(BINS * IMAGES)


class _State(NamedTuple):
    """Hold what a checkpoint has of λ; it is replaced as a whole, so no interrupt can split it."""

    weight: float  #: λ
    multiplier: float  #: its integral part
    step: int = 0  #: of the last measurement; at step 0 there is none
    trained: float = 0.0  #: smoothed loss of the trained model
    base: float = 0.0  #: and of the frozen base on the same rows


class PriorWeight:
    """λ before each step, constant without a ``measure``.

    That is of the model as it is; in the context of ``final_weights`` it is as a run would end.
    """

    def __init__(
        self,
        config: TrainConfig,
        measure: Measure | None,
        final_weights: Callable[[], AbstractContextManager[None]] = nullcontext,
    ):
        self.config, self.measure, self.final_weights = config, measure, final_weights
        self._state = _State(config.prior_weight, config.prior_weight)

    def config_at(self, step: int) -> TrainConfig:
        """Return the config for the step after ``step``, with λ of then; measure if that is due.

        Raises :class:`.NonFiniteStep` where the measured loss is not finite.
        """
        if self.measure is not None and step % INTERVAL == 0 and step > self._state.step:
            rows = rows_at(step // INTERVAL, 2 * self.config.batch_size)
            with self.final_weights():
                trained, base = self.measure(rows)
            check_finite("loss on held-out class images", trained)
            self._state = self._moved(step, trained, base)
        if self._state.weight != self.config.prior_weight:
            self.config = dataclasses.replace(self.config, prior_weight=self._state.weight)
        return self.config

    def _moved(self, step: int, trained: float, base: float) -> _State:
        _, multiplier, before, *smoothed = self._state
        if before:
            trained = smoothed[0] + SMOOTHING * (trained - smoothed[0])
            base = smoothed[1] + SMOOTHING * (base - smoothed[1])
        assert self.config.keep_class is not None
        # 0 where the class is kept as asked for, -1 where it is as the base has it.
        excess = (trained / base - 1) / (1 / self.config.keep_class - 1) - 1
        excess = max(-1.0, min(1.0, excess))
        multiplier = _bounded(multiplier * math.exp(INTEGRAL * excess))
        weight = _bounded(multiplier * math.exp(PROPORTIONAL * excess))
        return _State(weight, multiplier, step, trained, base)

    def row(self, step: int) -> dict[str, float]:
        """Return λ and the class loss ratio for the log, if they were measured at ``step``."""
        if step == 0 or self._state.step != step:
            return {}
        kept = self._state.base / self._state.trained
        return {"prior_weight": self._state.weight, "class_kept": kept}

    def kept(self) -> dict[str, float]:
        """Return the class loss ratio, on the whole pool, by its name in files."""
        if self.measure is None:
            return {}
        trained, base = self.measure(_POOL)
        return {"class_kept": base / trained}

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint holds of it: nothing where λ is constant."""
        return {} if self.measure is None else {"prior_weight": self._state._asdict()}

    def load_state_dict(self, checkpoint: dict[str, Any]) -> None:
        """Go on from a checkpoint; from the config's λ where it has no state of this."""
        if self.measure is not None and "prior_weight" in checkpoint:
            self._state = _State(**checkpoint["prior_weight"])


def _bounded(weight: float) -> float:
    lowest, highest = PRIOR_WEIGHTS
    return max(lowest, min(highest, weight))


def rows_at(number: int, count: int) -> list[int]:
    """Return the rows of the pool for a measurement, from all timestep bins in turn.

    The next measurement goes on where this one ends, with other images and timesteps.
    """
    places = [at % len(_POOL) for at in range(number * count, (number + 1) * count)]
    # 5 and 16 have no common factor: each image and timestep comes once in a round of the pool.
    return [at % BINS * IMAGES + at // BINS * 5 % IMAGES for at in places]


class ClassLoss:
    """The loss of a model in training on held-out class images, and the frozen base's.

    Made before training starts: then the model is the frozen base.
    """

    def __init__(
        self,
        config: TrainConfig,
        family: Family,
        images: list[Photo],
        model: Trainable,
        accelerator: Accelerator,
    ):
        self.accelerator = accelerator
        self.held_out = HeldOutLoss(config, family, {"class": images}, IMAGES)
        with accelerator.autocast(), lora.exact_base(family, config):
            self.base = self._errors(model, _POOL)

    def __call__(self, model: Trainable, rows: Sequence[int]) -> tuple[float, float]:
        """Return the model's mean loss on rows of the pool, and the base's.

        Each process measures its part, and all return the same.
        """
        accelerator = self.accelerator
        own = list(rows)[accelerator.process_index :: accelerator.num_processes]
        with accelerator.autocast():
            sums = torch.stack([self._errors(model, own).sum(), self.base[own].sum()])
        trained, base = accelerator.reduce(sums, "sum").tolist()
        return trained / len(rows), base / len(rows)

    def _errors(self, model: Trainable, rows: Sequence[int]) -> torch.Tensor:
        was_training = model.training
        errors = self.held_out.errors(model.eval(), "class", rows)
        model.train(was_training)
        return errors


def make_prior_weight(
    config: TrainConfig, family: Family, images: list[Photo], optimizer: Optimizer
) -> PriorWeight:
    """Return λ for a run of this config, which is measured on these held-out class images.

    Called before a checkpoint is loaded.
    """
    if config.keep_class is None:
        return PriorWeight(config, None)
    class_loss = ClassLoss(config, family, images, optimizer.trainable, optimizer.accelerator)

    def final_weights() -> AbstractContextManager[None]:
        optimizer.check_gradients()
        return optimizer.ema.swapped_in()

    return PriorWeight(config, partial(class_loss, optimizer.trainable), final_weights)


def hold_out_class_images(
    config: TrainConfig,
    family: Family,
    accelerator: Accelerator,
    folder: Path,
    own: list[Photo],
) -> tuple[list[Photo], list[Photo]]:
    """Return the class images to train on, and those to measure the class on.

    The base draws the second ones, with seeds of their own, unless the class images are the user's:
    then they are the last of them. ``folder`` holds the class images of all runs. Raises
    ``InputError`` where one's own are too few.
    """
    if config.keep_class is None:
        return own, []
    if config.uses_class_images and config.class_folder is not None:
        if len(own) < FEWEST:
            raise InputError(
                f"keep_class is set, which holds out a part of the class images, and "
                f"{config.class_folder} has {len(own)} of them; put {FEWEST} or more there, or "
                "leave keep_class out."
            )
        end = len(own) - min(IMAGES, len(own) // 4)
        return own[:end], own[end:]
    seed = config.seed + SEED
    measured = dataclasses.replace(config, seed=seed, class_images=IMAGES, prior_prompts=None)
    return own, prepare_class_images(measured, family, accelerator, folder)


def class_shortfall(run: Run) -> str | None:
    """Say in a sentence how far a run fell short of ``keep_class``; None if it did not.

    It is of the pipeline of a finished run, else of the last measurement.
    """
    asked, rows = run.config.keep_class, [row for row in run.log() if "class_kept" in row]
    if asked is None or not rows:
        return None
    found = run.trained() if run.finished else {}
    kept, weight = found.get("class_kept", rows[-1]["class_kept"]), rows[-1]["prior_weight"]
    if not all(isinstance(value, float) for value in (kept, weight)):
        return None
    if kept >= asked - TOLERANCE:
        return None
    at_limit = weight >= PRIOR_WEIGHTS[1]
    reached = f"λ reached its maximum of {weight:g}, and the" if at_limit else "The"
    return (
        f"{reached} class loss ratio ended at {kept:.0%}, below the target of {asked:.0%}: train "
        "for fewer steps, or lower the learning rate."
    )
