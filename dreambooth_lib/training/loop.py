"""The training loop: a generator that yields a :class:`Step` after each optimizer update.

Everything random is drawn from (seed, step), never from a generator that lives on: a resumed run,
a run on two processes and a run in two micro-batches all see the same pictures, timesteps and
noise as the run that was never stopped, on one process, in one piece.
"""

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.training.batches import Batch
from dreambooth_lib.training.losses import Loss, dreambooth_loss, per_sample_errors
from dreambooth_lib.training.optimizer_step import NonFiniteStep, check_finite, defer_interrupts
from dreambooth_lib.training.runs import Run
from dreambooth_lib.training.setup import Trainer
from dreambooth_lib.training.validation_record import ValidationResult


class NonFiniteLoss(FloatingPointError):
    """The loss became NaN or infinite; the last good checkpoint is kept."""


class OutOfMemory(RuntimeError):
    """The GPU's memory ran out; the message says what would take less, and by how much."""


@dataclass(frozen=True)
class Step:
    """One update, in plain numbers; losses are those of the whole batch before the update."""

    step: int  #: updates made so far, 1 after the first
    loss: float
    instance_loss: float
    prior_loss: float | None
    lr: float
    seconds: float
    memory_mb: float | None  #: peak GPU memory so far; None on a CPU
    validation: ValidationResult | None = (
        None  #: what a look after this update found, where one was due
    )


#: From the denoiser's output [B, C, h, w] for a batch, and that batch, to the loss.
Objective = Callable[[torch.Tensor, Batch, TrainConfig], Loss]


def prior_preservation(prediction: torch.Tensor, batch: Batch, config: TrainConfig) -> Loss:
    """The paper's objective: squared errors, weighed by timestep, the class's times lambda."""
    errors = per_sample_errors(prediction, batch.noised.target)
    return dreambooth_loss(errors, batch.is_prior, config.prior_weight, batch.noised.weight)


def train(run: Run, objective: Objective = prior_preservation) -> Generator[Step, None, None]:
    """Train a run from its newest checkpoint to ``config.steps``, then save its pipeline.

    With ``config.early_stop`` it ends once looks no longer find it better, and the pipeline has the
    best checkpoint's weights; without, it has the last step's.

    ``objective`` is called under autocast; what it gives must have gradients to the prediction.
    The caller owns the loop: leaving it (``break``, an exception, interrupting a notebook's cell)
    saves a checkpoint first, and ``train(resume(folder))`` goes on from there. Raises
    :class:`NonFiniteLoss`, and what reading the pictures and loading the base raise.
    """
    trainer = Trainer(run)
    try:
        trainer.warn()
        trainer.validate()  # the frozen base, as the reference
        yield from training_steps(trainer, objective)
        trainer.save_pipeline()
    except torch.OutOfMemoryError as error:
        from dreambooth_lib.training.memory_estimate import suggest_savings

        raise OutOfMemory(
            f"the GPU's memory ran out at step {trainer.step + 1} of {run.folder}: "
            f"{suggest_savings(trainer.config, trainer.precision)}; resume the run with another "
            "memory or resolution, or begin one with another method."
        ) from error
    except (GeneratorExit, KeyboardInterrupt):
        with defer_interrupts():  # a launcher sends its processes the terminal's once more
            trainer.save_checkpoint(together=False)
        raise


def training_steps(
    trainer: Trainer, objective: Objective = prior_preservation
) -> Generator[Step, None, None]:
    """Make the updates that are left of a trainer: the loop of :func:`train`."""
    config, optimizer = trainer.config, trainer.optimizer
    while not trainer.finished():
        began, lr, losses = time.perf_counter(), optimizer.lr, []
        with _explained(trainer), optimizer.guard():
            for part in trainer.micro_batches():
                noised = part.noised
                with trainer.accelerator.autocast():
                    prediction = trainer.model(noised.x_t, noised.t, part.cond, part.prompts)
                    loss = objective(prediction, part, config)
                optimizer.backward(loss.total / config.gradient_accumulation)
                losses.append(loss)
            values = _mean(losses, trainer)
            check_finite("loss", *values)
            del prediction, loss, losses  # the graph must not outlive the update
            with defer_interrupts():  # what is moved is counted and logged
                if not optimizer.step():  # float16 overflowed: the same update again
                    continue
                step = Step(trainer.step, *values, lr, time.perf_counter() - began, _peak_mb())
                trainer.log({name: v for name, v in vars(step).items() if name != "validation"})
        validation = trainer.validate()
        trainer.save_checkpoint_if_due()
        yield replace(step, validation=validation)


def _peak_mb() -> float | None:
    return torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else None


def _mean(losses: list[Loss], trainer: Trainer) -> tuple[float, float, float | None]:
    """Return total, instance and prior loss over all micro-batches and processes."""
    kinds = [kind for kind in zip(*losses, strict=True) if kind[0] is not None]
    means = torch.stack([torch.stack(kind).mean().detach() for kind in kinds])
    total, instance, *prior = trainer.accelerator.reduce(means, "mean").tolist()
    return total, instance, prior[0] if prior else None


@contextmanager
def _explained(trainer: Trainer) -> Iterator[None]:
    """Say in a :class:`NonFiniteLoss` where a loss or gradient was not finite, and what to do."""
    try:
        yield
    except NonFiniteStep as error:
        fix = error.fix or "lower learning_rate, or use mixed_precision 'no'"
        if error.fix is None and trainer.step == 0 and trainer.half is torch.float16:
            fix = (  # no weight has moved yet
                "float16 ends at 65,504: set mixed_precision to 'no', use a GPU with bfloat16, "
                f"or choose another base than '{trainer.config.base}'"
            )
        raise NonFiniteLoss(
            f"{error.what} at step {trainer.step + 1} of {trainer.run.folder}{error.tried}; the "
            f"last good checkpoint is kept: {fix}."
        ) from None
