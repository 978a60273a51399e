"""The training loop: a generator that yields a :class:`Step` after each training step.

Every random draw is a function of (seed, step), never of a generator that lives on: a resumed run,
two processes and two micro-batches all see the same images, timesteps and noise as one process
that trains without a break on whole batches.
"""

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from math import inf

import torch

from dreambooth_lib.core import gpu_memory
from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.core.disk import DiskError, explain_disk_errors
from dreambooth_lib.core.errors import KitError
from dreambooth_lib.core.files import remove_partials
from dreambooth_lib.core.locks import lock
from dreambooth_lib.core.processes import join_group
from dreambooth_lib.families.precision import OVERFLOWED
from dreambooth_lib.training.batches import Batch
from dreambooth_lib.training.interrupts import defer_interrupts, raise_on_termination
from dreambooth_lib.training.losses import Loss, dreambooth_loss, latent_weights, per_sample_errors
from dreambooth_lib.training.memory_level import USABLE_SHARE, is_gpu
from dreambooth_lib.training.native_precision import native_precision
from dreambooth_lib.training.optimizer_step import NonFiniteStep
from dreambooth_lib.training.runs import Run
from dreambooth_lib.training.setup import Trainer
from dreambooth_lib.training.validation_record import ValidationResult


class NonFiniteLoss(KitError, FloatingPointError):
    """The loss became NaN or infinite; the last good checkpoint is kept."""


class OutOfMemory(KitError, RuntimeError):
    """The GPU ran out of memory; the message says what would take less, and by how much."""


@dataclass(frozen=True)
class Step:
    """One training step, in plain numbers; losses are the whole batch's, before the update."""

    step: int  #: steps completed so far, 1 after the first
    loss: float
    instance_loss: float
    prior_loss: float | None
    lr: float
    seconds: float
    memory_mb: float | None  #: peak GPU memory so far; None on a CPU
    prior_weight: float | None = None  #: λ, and
    class_kept: float | None = None  #: the class loss ratio, where it was measured
    validation: ValidationResult | None = None  #: of this step, where it was validated
    saved: bool = False  #: whether a checkpoint of this step was due, and is on disk


#: Fields that are not in every row of the log.
_NOT_LOGGED = ("validation", "saved", "prior_weight", "class_kept")

#: Maps the denoiser's output [B, C, h, w] for a batch, and that batch, to the loss. The batch's
#: ``is_prior`` is on the CPU: it can be read, and index a tensor on the GPU. The config has the
#: step's λ.
Objective = Callable[[torch.Tensor, Batch, TrainConfig], Loss]


def prior_preservation(prediction: torch.Tensor, batch: Batch, config: TrainConfig) -> Loss:
    """Return the paper's loss: squared errors weighted by timestep, the class term by lambda.

    With masks, by latent too.
    """
    weights = latent_weights(batch.coverage, config.background_weight)
    errors = per_sample_errors(prediction, batch.noised.target, weights)
    return dreambooth_loss(errors, batch.is_prior, config.prior_weight, batch.noised.weight)


def train(run: Run, objective: Objective = prior_preservation) -> Generator[Step, None, None]:
    """Train a run from its newest checkpoint to ``config.steps``, then save its pipeline.

    With ``config.early_stop`` training ends once validation no longer improves, and the pipeline
    has the best checkpoint's weights; otherwise it has the last step's.

    ``objective`` is called under autocast; the loss it returns must be differentiable with respect
    to the prediction. The caller owns the loop: leaving it (``break``, an exception, interrupting a
    notebook's cell) saves a checkpoint first, and ``train(resume(folder))`` continues from there.
    So do SIGTERM and SIGHUP. Give your own ``objective`` again, as no file records it. If you
    keep the generator in a variable, call its ``close()`` after ``break``; only then does it save.
    Raises :class:`NonFiniteLoss`, :class:`OutOfMemory`, ``DiskError``, ``LockError`` if another
    process trains the run, and what reading the images and loading the base raise.
    """
    is_first = join_group().is_main_process
    with raise_on_termination(), lock(run.folder) if is_first else nullcontext():
        for folder in ("class_images", "latents", run.folder.name) if is_first else ():
            remove_partials(run.folder.parent / folder)
        with explain_disk_errors(run.folder), _explain_out_of_memory(run, "before the first step"):
            trainer = Trainer(run)
        with _save_and_explain(trainer):
            trainer.warn_of_distillation()
            trainer.validate_if_due()
            yield from training_steps(trainer, objective)
            trainer.save_pipeline()


@contextmanager
def _save_and_explain(trainer: Trainer) -> Iterator[None]:
    """Save a checkpoint where training is left; say what to do where it cannot go on."""
    try:
        with explain_disk_errors(trainer.run.folder):
            yield
    except DiskError as error:
        saved = trainer.saved_step
        safe = f"The checkpoint of step {saved} is safe" if saved else "No checkpoint was due yet"
        raise DiskError(f"{error} {safe}; resume the run to continue.") from error
    except torch.OutOfMemoryError:
        with _explain_out_of_memory(trainer.run, f"at step {trainer.step + 1}"):
            raise
    except (GeneratorExit, KeyboardInterrupt):
        # A launcher passes the terminal's interrupt on a second time.
        with defer_interrupts(), _explain_non_finite(trainer):
            trainer.save_checkpoint(wait=False)
        raise


@contextmanager
def _explain_out_of_memory(run: Run, when: str) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        said = f"the GPU ran out of memory {when} of {run.folder}"
        fix = (
            "resume the run with another memory level or a lower resolution, or start a new one "
            "with another method."
        )
        print("The GPU ran out of memory; estimating which settings take less…", flush=True)
        try:  # which takes minutes for the largest bases
            savings = _suggest_savings(run.resolved_config)
        except KeyboardInterrupt:
            print(f"{said[0].upper()}{said[1:]}; {fix}", flush=True)
            raise
        raise OutOfMemory(f"{said}, {savings}.") from error


def _suggest_savings(config: TrainConfig) -> str:
    from dreambooth_lib.training.memory_estimate import suggest_savings

    device, room = join_group().device, inf
    if is_gpu(device):
        room = USABLE_SHARE * gpu_memory.gpu_bytes(device)[1]
    return suggest_savings(config, native_precision(config.mixed_precision, device), room)


def training_steps(
    trainer: Trainer, objective: Objective = prior_preservation
) -> Generator[Step, None, None]:
    """Yield the remaining steps of a run: the loop of :func:`train`."""
    optimizer = trainer.optimizer
    while not trainer.finished():
        start, lr, losses = time.perf_counter(), optimizer.lr, []
        with _explain_non_finite(trainer):
            config = trainer.prior_weight.config_at(trainer.step)
            measured = trainer.prior_weight.row(trainer.step)
            for batch in trainer.micro_batches():
                noised = batch.noised
                with trainer.accelerator.autocast():
                    prediction = trainer.model(noised.x_t, noised.t, batch.cond, batch.prompts)
                    loss = objective(prediction, batch, config)
                optimizer.backward(loss.total / config.gradient_accumulation)
                losses.append(loss)
            means = _mean_losses(losses, trainer)
            del prediction, loss, losses  # free the graph before the optimizer step
            total, instance, *prior = optimizer.read(means)
            values = total, instance, prior[0] if prior else None
            with defer_interrupts():  # a step that changed the weights is always logged
                if not optimizer.step():  # float16 overflowed: retry the step
                    continue
                seconds = time.perf_counter() - start
                step = Step(trainer.step, *values, lr, seconds, _peak_memory_mb())
                row = {name: v for name, v in vars(step).items() if name not in _NOT_LOGGED}
                trainer.log(row | measured)
            validation = trainer.validate_if_due()
            saved = trainer.save_checkpoint_if_due()
        weight, kept = measured.get("prior_weight"), measured.get("class_kept")
        yield replace(
            step, validation=validation, saved=saved, prior_weight=weight, class_kept=kept
        )


def _peak_memory_mb() -> float | None:
    return torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else None


def _mean_losses(losses: list[Loss], trainer: Trainer) -> torch.Tensor:
    """Return total, instance and, if any, prior loss over all micro-batches and processes: [K]."""
    terms = [term for term in zip(*losses, strict=True) if term[0] is not None]
    means = torch.stack([torch.stack(term).mean().detach() for term in terms])
    return trainer.accelerator.reduce(means, "mean")


@contextmanager
def _explain_non_finite(trainer: Trainer) -> Iterator[None]:
    """Raise :class:`NonFiniteLoss` for a :class:`NonFiniteStep`: say where, and what to do."""
    try:
        yield
    except NonFiniteStep as error:
        fix = error.fix or "lower learning_rate, or use mixed_precision 'no'"
        if error.fix is None and trainer.step == 0 and trainer.dtype is torch.float16:
            fix = OVERFLOWED  # no step has changed the weights yet
        step = error.step or trainer.step + 1
        raise NonFiniteLoss(
            f"{error.what} at step {step} of {trainer.run.folder}{error.tried}: {fix}. "
            "The last good checkpoint is kept."
        ) from None
