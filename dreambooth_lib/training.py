"""The training loop: a generator that yields a :class:`Step` after each optimizer update.

Everything random is drawn from (seed, step), never from a generator that lives on: a resumed run,
a run on two processes and a run in two micro-batches all see the same pictures, timesteps and
noise as the run that was never stopped, on one process, in one piece.
"""

import math
import shutil
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, is_initialized
from accelerate.utils import AutocastKwargs

from dreambooth_lib import families, lora
from dreambooth_lib.batches import Batch, Batches, seeded
from dreambooth_lib.choice import best_of, has_peaked
from dreambooth_lib.config import LOW, TrainConfig
from dreambooth_lib.data import hold_out
from dreambooth_lib.distill import as_class, teacher_of
from dreambooth_lib.families.base import Family
from dreambooth_lib.families.inference import warning
from dreambooth_lib.families.precision import save
from dreambooth_lib.heldout import ROWS, HeldOut
from dreambooth_lib.levels import is_gpu, native_precision, settle
from dreambooth_lib.losses import Loss, dreambooth_loss, per_sample_errors
from dreambooth_lib.pictures import Photo, captioned, read_pictures
from dreambooth_lib.prior import class_pictures, set_folder
from dreambooth_lib.processes import join_group
from dreambooth_lib.runs import Run
from dreambooth_lib.updates import Updater, interrupts_held
from dreambooth_lib.watch import Watch, Watched, history, judge, view_of
from dreambooth_lib.weights import (
    lets_go,
    precisions,
    put_back,
    to_be_saved,
    trainable_of,
    what_is_trained,
)


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
    watched: Watched | None = None  #: what a look after this update found, where one was due


#: Tries of one update in float16, each at half the loss scale, before it is given up.
SKIPS = 30

#: Updates between checkpoints of a run that never validates and says nothing else.
RARELY = 250

#: Total, instance and prior loss, the last None without a prior.
Losses = tuple[float, float, float | None]

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
    trainer = Trainer(run, objective)
    try:
        trainer.warn()
        trainer.look()
        while not trainer.finished():
            step = trainer.update()
            if step is not None:
                yield step
        trainer.save_pipeline()
    except torch.OutOfMemoryError as error:
        from dreambooth_lib.estimate import ways_out

        raise OutOfMemory(
            f"the GPU's memory ran out at step {trainer.step + 1} of {run.folder}: "
            f"{ways_out(trainer.config, trainer.precision)}; resume the run with another memory or "
            "resolution, or begin one with another method."
        ) from error
    except (GeneratorExit, KeyboardInterrupt):
        with interrupts_held():  # a launcher sends its processes the terminal's once more
            trainer.save_checkpoint(together=False)
        raise


class Trainer:
    """One process's live objects of a run; :func:`train` drives it."""

    def __init__(self, run: Run, objective: Objective = prior_preservation):
        device = join_group().device
        if is_gpu(device):
            torch.cuda.reset_peak_memory_stats(device)  # an earlier run's
        config = settle(run, device)
        precision = native_precision(config.mixed_precision, device)
        self.run, self.config, self.objective, self.step = run, config, objective, 0
        self.skipped = 0  # updates in a row that fp16 loss scaling left out
        if config.method == "full" and config.memory == "lowest" and precision == "no":
            precision = "bf16"  # what its weights are
        if is_initialized() and AcceleratorState().mixed_precision != precision:
            AcceleratorState._reset_state()  # an earlier run's, in this process
        # Copies of the weights in half precision are quicker kept than made anew, but take memory.
        keep = AutocastKwargs(cache_enabled=config.memory not in LOW)
        self.accelerator = accelerator = Accelerator(
            mixed_precision=precision, kwargs_handlers=[keep]
        )
        if config.steps_in_backward and accelerator.num_processes > 1:
            raise ValueError(
                f"memory is '{config.memory}', which updates weights before their gradients could "
                f"cross {accelerator.num_processes} processes; set it to 'standard'."
            )
        self.precision = precision
        shares = accelerator.num_processes * config.gradient_accumulation
        if config.batch_size % shares:
            raise ValueError(
                f"batch_size {config.batch_size} does not split into {shares} equal parts "
                f"({accelerator.num_processes} processes x gradient_accumulation "
                f"{config.gradient_accumulation}); make it a multiple."
            )
        self.half = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision, torch.float32)
        hub = config.base, config.revision, config.variant
        subject = config.subject
        instance = captioned(read_pictures(subject.pictures), subject.instance_prompt)
        loading = precisions(config, self.half)
        if lets_go(config):
            loading |= {"prompts": self._prompts(instance), "device": accelerator.device}
        family = families.load(*hub, **loading)
        self.family: Family = family
        family.pipeline.to(accelerator.device)
        classes = self._class_pictures()
        instance, classes = self._watch(instance, classes)
        if config.prior == "distilled" and config.prior_weight > 0:
            classes = as_class(instance, subject)
        self.batches = Batches(config, family, instance, classes, run.folder.parent / "latents")
        self.teacher = teacher_of(family, config, self.half)
        accelerator.wait_for_everyone()
        trainable = trainable_of(family, config).to(accelerator.device)
        self.updater = Updater(config, accelerator, trainable)
        saved = run.load_checkpoint()
        if saved is not None:
            self.step = saved["step"]
            self.updater.restore(saved, self.step)
        if accelerator.is_main_process:
            run.cut("log", self.step)
            run.cut("watch", self.step)
            if self.step < config.steps:  # an earlier, shorter end must not be drawn from
                shutil.rmtree(run.pipeline, ignore_errors=True)

    def _prompts(self, instance: list[Photo]) -> set[str]:
        """Every prompt that this run will ever ask for."""
        config, subject = self.config, self.config.subject
        own = read_pictures(config.class_folder) if config.class_folder else []
        photos = [*own, *instance, *as_class(instance, subject)]
        watched = view_of(self.run).prompts(subject) if config.watch_every else []
        captions = {photo.caption for photo in photos if photo.caption}
        return {subject.class_prompt, *watched, *captions}

    def _class_pictures(self) -> list[Photo]:
        config, accelerator = self.config, self.accelerator
        if config.prior_weight == 0 or config.prior != "generated":
            return []
        place: str | Path | None = config.class_folder
        if place is None:
            folder = self.run.folder.parent / "class_pictures"
            rank, processes = accelerator.process_index, accelerator.num_processes
            with accelerator.autocast():
                for _ in class_pictures(config, self.family, folder, rank, processes):
                    pass
            accelerator.wait_for_everyone()
            place = set_folder(config, self.family, folder)
        count = None if config.class_folder else config.class_pictures
        return captioned(read_pictures(place)[:count], config.subject.class_prompt)

    def _watch(
        self, instance: list[Photo], classes: list[Photo]
    ) -> tuple[list[Photo], list[Photo]]:
        """Begin to watch, if the config asks for it; gives what is left to train on."""
        config = self.config
        self.watch: Watch | None = None
        if not config.watch_every:
            return instance, classes
        left, held = hold_out(instance) if config.hold_out else (instance, [])
        end = len(classes) - min(ROWS, len(classes) // 8)
        if self.accelerator.is_main_process:
            rows = HeldOut(config, self.family, {"subject": held, "class": classes[end:]})
            place = "cpu" if config.memory in LOW else self.accelerator.device
            photos = [photo.image for photo in instance]
            self.watch = Watch(self.run, photos, rows, judge(config, place))
        return left, classes[:end]

    def update(self) -> Step | None:
        """One optimizer update; None where fp16 loss scaling skipped it, to be made again."""
        config = self.config
        started = time.perf_counter()
        if config.dropout > 0 or config.lora_dropout > 0:
            torch.manual_seed(seeded(config.seed, self.step, 3).initial_seed())
        batch, lr = self.batches.at(self.step), self.updater.lr
        total, instance, prior = self._gradients(batch)
        with interrupts_held():
            try:
                made = self.updater.move(self.step)
            except FloatingPointError:
                self._check_finite("gradient", [math.nan])
            if not made:
                self._skip()
                return None
            self.skipped = 0
            self.step += 1
            gpu = torch.cuda.is_available()
            memory = torch.cuda.max_memory_allocated() / 2**20 if gpu else None
            seconds = time.perf_counter() - started
            step = Step(self.step, total, instance, prior, lr, seconds, memory)
            if self.accelerator.is_main_process:
                self.run.append("log", {k: v for k, v in asdict(step).items() if k != "watched"})
        watched = self.look()
        if self._look_due() or self._due(config.checkpoint_every or config.watch_every or RARELY):
            self.save_checkpoint()
        return replace(step, watched=watched)

    def _skip(self) -> None:
        """Count an update that loss scaling left out. Raises where a smaller scale is no help."""
        self.skipped += 1
        if self.skipped == SKIPS:
            raise NonFiniteLoss(
                f"the gradients overflow float16 at step {self.step + 1} of {self.run.folder}, "
                f"however the loss is scaled ({SKIPS} tries); the last good checkpoint is kept: "
                "use mixed_precision 'no', or 'bf16' where the GPU has it."
            )

    def _gradients(self, batch: Batch) -> Losses:
        """A batch's losses, with their gradients ready for the updater to move the weights."""
        accelerator, parts = self.accelerator, self.config.gradient_accumulation
        shares = accelerator.num_processes * parts
        losses = []
        for part in range(parts):
            share = accelerator.process_index * parts + part
            with self.updater.micro_batch(last=part == parts - 1):
                loss = self._loss(self.batches.split(batch, share, shares))
                self.updater.backward(loss.total / parts)
            losses.append(loss)
        values = self._mean(losses)
        self._check_finite("loss", values)
        self._check_finite("gradient's norm", [self.updater.clip()])
        return values

    def _due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.config.steps

    def _look_due(self) -> bool:
        return bool(self.config.watch_every) and self._due(self.config.watch_every)

    def look(self) -> Watched | None:
        """Look at the model if that is due and was not done before a stop."""
        found = None
        if not self._look_due():
            return None
        if self.watch is not None and self.step not in {row.step for row in history(self.run)}:
            with self.updater.averaged(), self.accelerator.autocast():
                found = self.watch.look(self.step, self.updater.trainable, self.family)
        self.accelerator.wait_for_everyone()
        return found

    def warn(self) -> None:
        """Print what a person should know of the base before its training begins."""
        family = self.family
        sentence = warning(self.config.base, family.inference, family.undistilled)
        if sentence is not None and self.step == 0:
            self.accelerator.print(sentence)

    def finished(self) -> bool:
        """Whether the last step is made, or no better one is to be expected."""
        if self.step >= self.config.steps:
            return True
        return self.config.early_stop and has_peaked(history(self.run))

    def _check_finite(self, what: str, values: Sequence[float | None]) -> None:
        if not all(math.isfinite(value) for value in values if value is not None):
            fix = "lower learning_rate, or use mixed_precision 'no'"
            if self.step == 0 and self.half is torch.float16:  # no weight has moved yet
                fix = (
                    "float16 ends at 65,504: set mixed_precision to 'no', use a GPU with bfloat16, "
                    f"or choose another base than '{self.config.base}'"
                )
            raise NonFiniteLoss(
                f"the {what} is {values[0]} at step {self.step + 1} of {self.run.folder}; the last "
                f"good checkpoint is kept: {fix}."
            )

    def _loss(self, batch: Batch) -> Loss:
        with self.accelerator.autocast():
            if self.teacher is not None:
                batch = batch._replace(noised=self.teacher(batch))
            noised = batch.noised
            cond = None if self.config.trains_text else batch.cond
            prediction = self.updater.model(noised.x_t, noised.t, cond, batch.prompts)
            return self.objective(prediction, batch, self.config)

    def _mean(self, losses: list[Loss]) -> Losses:
        """Total, instance and prior loss over all micro-batches and processes."""
        kinds = [kind for kind in zip(*losses, strict=True) if kind[0] is not None]
        means = torch.stack([torch.stack(kind).mean().detach() for kind in kinds])
        total, instance, *prior = self.accelerator.reduce(means, "mean").tolist()
        return total, instance, prior[0] if prior else None

    def save_checkpoint(self, together: bool = True) -> None:
        """Write a checkpoint of this moment, unless it lies there already.

        ``together`` waits for the other processes: one that leaves alone would wait in vain.
        """
        accelerator = self.accelerator
        if accelerator.is_main_process and self.step not in self.run.checkpoints() and self.step:
            state = {"step": self.step, **self.updater.state()}
            self.run.save_checkpoint(self.step, state, self._best())
        if together:
            accelerator.wait_for_everyone()

    def _best(self) -> int | None:
        rows = history(self.run)
        return best_of(rows).step if len(rows) > 1 else None

    def save_pipeline(self) -> None:
        """Write the tuned pipeline in diffusers' layout, with the averaged weights if there are."""
        from dreambooth_lib.state import replacing_folder

        model = self.updater.trainable.eval()
        if self.config.early_stop:
            put_back(model, self.run, self._best() or self.step)
        else:
            self.updater.take_average()
        if self.accelerator.is_main_process:
            family, config = self.family, self.config
            with replacing_folder(self.run.pipeline) as partial:
                if config.method == "lora":
                    lora.save(family, config, partial)
                else:
                    # Its frozen parts may be rounded, or let go of: the base's own are taken.
                    if self.half is not torch.float32 or family.known is not None:
                        family = to_be_saved(config)
                        what_is_trained(family, config).put(model.state())
                    save(family.pipeline, partial)
        self.accelerator.wait_for_everyone()
