"""All that a run trains with, made ready: base, pictures, batches, optimizer, newest checkpoint."""

import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, is_initialized
from accelerate.utils import AutocastKwargs

from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.core.config_checks import LOW_MEMORY
from dreambooth_lib.core.old_names import locate
from dreambooth_lib.core.processes import join_group
from dreambooth_lib.data.images import Photo, captioned, read_pictures
from dreambooth_lib.data.quality_checks import hold_out
from dreambooth_lib.families import loading
from dreambooth_lib.families.base import Family
from dreambooth_lib.families.inference_settings import distillation_warning
from dreambooth_lib.families.precision import save_pipeline
from dreambooth_lib.training import lora
from dreambooth_lib.training.batches import Batch, Batches, seeded
from dreambooth_lib.training.best_checkpoint import select_best
from dreambooth_lib.training.class_images import draw_class_images, set_folder
from dreambooth_lib.training.early_stopping import should_stop_early
from dreambooth_lib.training.fused_optimizer import FusedBackwardOptimizer
from dreambooth_lib.training.held_out_loss import ROWS, HeldOutLoss
from dreambooth_lib.training.memory_level import decide_level, is_gpu, native_precision
from dreambooth_lib.training.optimizer_step import Optimizer
from dreambooth_lib.training.prior_distillation import Teacher, with_class_captions
from dreambooth_lib.training.runs import Run
from dreambooth_lib.training.trainable import (
    load_base_to_save,
    load_checkpoint_weights,
    load_dtypes,
    make_trainable,
    offloads_text_encoders,
    wrap_trained_parts,
)
from dreambooth_lib.training.validation import load_scorer
from dreambooth_lib.training.validation_record import ValidationResult, Validator, history, plan_of

#: Updates between checkpoints of a run that never validates and says nothing else.
RARELY = 250


class Session:
    """One process's live objects of a run, and what it does between updates."""

    def __init__(self, run: Run):
        device = join_group().device
        if is_gpu(device):
            torch.cuda.reset_peak_memory_stats(device)  # an earlier run's
        self.run, self.config = run, decide_level(run, device)
        config, subject = self.config, self.config.subject
        self.precision = native_precision(config.mixed_precision, device)
        if config.method == "full" and config.memory == "lowest" and self.precision == "no":
            self.precision = "bf16"  # what its weights are
        dtypes = {"fp16": torch.float16, "bf16": torch.bfloat16}
        self.half = dtypes.get(self.precision, torch.float32)
        self.accelerator = accelerator = _accelerator(config, self.precision)
        instance = captioned(read_pictures(subject.pictures), subject.instance_prompt)
        self.family = self._load(instance)
        instance, classes = self._hold_out(instance, self._class_pictures())
        teacher = None
        if config.prior == "distilled" and config.prior_weight > 0:
            classes = with_class_captions(instance, subject)
            teacher = Teacher(self.family, config, self.half, accelerator.autocast)
        latents = run.folder.parent / "latents"
        self.batches = Batches(config, self.family, instance, classes, latents, teacher)
        accelerator.wait_for_everyone()
        self.trainable = make_trainable(self.family, config).to(accelerator.device)
        kind = FusedBackwardOptimizer if config.steps_in_backward else Optimizer
        self.optimizer = kind(config, accelerator, self.trainable)
        #: What is trained, as its processes call it.
        self.model = accelerator.prepare(self.trainable)
        saved = run.load_checkpoint()
        if saved is not None:
            self.optimizer.restore(saved)
        if accelerator.is_main_process:
            run.truncate("log", self.step)
            run.truncate("validation", self.step)
            if self.step < config.steps:  # an earlier, shorter end must not be drawn from
                shutil.rmtree(run.pipeline, ignore_errors=True)

    @property
    def step(self) -> int:
        """The number of updates made so far."""
        return self.optimizer.updates

    def _load(self, instance: list[Photo]) -> Family:
        """Load the base; where its text encoders make room, with all prompts of the run encoded."""
        config, subject = self.config, self.config.subject
        load_options = load_dtypes(config, self.half)
        if offloads_text_encoders(config):
            own = read_pictures(config.class_folder) if config.class_folder else []
            photos = [*own, *instance, *with_class_captions(instance, subject)]
            prompts = {photo.caption for photo in photos if photo.caption} | {subject.class_prompt}
            if config.validate_every:
                prompts |= set(plan_of(self.run).prompts(subject))
            load_options |= {"prompts": prompts, "device": self.accelerator.device}
        family = loading.load_model(config.base, config.revision, config.variant, **load_options)
        family.pipeline.to(self.accelerator.device)
        return family

    def _class_pictures(self) -> list[Photo]:
        """Read the class images, after this process has drawn its share of the missing ones."""
        config, accelerator = self.config, self.accelerator
        if config.prior_weight == 0 or config.prior != "generated":
            return []
        if config.class_folder:
            return captioned(read_pictures(config.class_folder), config.subject.class_prompt)
        folder = locate(self.run.folder.parent, "class_images")
        rank, processes = accelerator.process_index, accelerator.num_processes
        with accelerator.autocast():
            for _ in draw_class_images(config, self.family, folder, rank, processes):
                pass
        accelerator.wait_for_everyone()
        photos = read_pictures(set_folder(config, self.family, folder))
        return captioned(photos[: config.class_images], config.subject.class_prompt)

    def _hold_out(
        self, instance: list[Photo], classes: list[Photo]
    ) -> tuple[list[Photo], list[Photo]]:
        """Begin to watch, if the config asks for it; return what is left to train on."""
        config = self.config
        self.watch: Validator | None = None
        if not config.validate_every:
            return instance, classes
        left, held = hold_out(instance) if config.hold_out else (instance, [])
        end = len(classes) - min(ROWS, len(classes) // 8)
        if self.accelerator.is_main_process:
            rows = HeldOutLoss(config, self.family, {"subject": held, "class": classes[end:]})
            place = "cpu" if config.memory in LOW_MEMORY else self.accelerator.device
            photos = [photo.image for photo in instance]
            self.watch = Validator(self.run, photos, rows, load_scorer(config, place))
        return left, classes[:end]

    def micro_batches(self) -> Iterator[Batch]:
        """Yield this process's parts of the next update's batch, one after the other."""
        config, accelerator = self.config, self.accelerator
        if config.dropout > 0 or config.lora_dropout > 0:
            torch.manual_seed(seeded(config.seed, self.step, 3).initial_seed())
        batch, parts = self.batches.at(self.step), config.gradient_accumulation
        first, shares = accelerator.process_index * parts, accelerator.num_processes * parts
        for part in range(parts):
            # Gradients cross processes with the last one only.
            last = part == parts - 1
            with nullcontext() if last else accelerator.no_sync(self.model):
                yield self.batches.split(batch, first + part, shares)

    def warn(self) -> None:
        """Print what a person should know of the base before its training begins."""
        family = self.family
        sentence = distillation_warning(self.config.base, family.inference, family.undistilled_base)
        if sentence is not None and self.step == 0:
            self.accelerator.print(sentence)

    def log(self, row: dict[str, Any]) -> None:
        """Write down an update, once for all processes."""
        if self.accelerator.is_main_process:
            self.run.append("log", row)

    def finished(self) -> bool:
        """Return whether the last step is made, or no better one is to be expected."""
        if self.step >= self.config.steps:
            return True
        return self.config.early_stop and should_stop_early(history(self.run))

    def _due(self, every: int) -> bool:
        return every > 0 and (self.step % every == 0 or self.step == self.config.steps)

    def validate(self) -> ValidationResult | None:
        """Look at the model if that is due and was not done before a stop."""
        found = None
        if not self._due(self.config.validate_every):
            return None
        if self.watch is not None and self.step not in {row.step for row in history(self.run)}:
            with self.optimizer.ema_weights(), self.accelerator.autocast():
                found = self.watch.validate(self.step, self.trainable, self.family)
        self.accelerator.wait_for_everyone()
        return found

    def save_checkpoint_if_due(self) -> None:
        """Save at each look, every so many steps, and at the end."""
        looks = self.config.validate_every
        if self._due(looks) or self._due(self.config.checkpoint_every or looks or RARELY):
            self.save_checkpoint()

    def save_checkpoint(self, together: bool = True) -> None:
        """Write a checkpoint of this moment, unless it lies there already.

        ``together`` waits for the other processes: one that leaves alone would wait in vain.
        """
        accelerator = self.accelerator
        if accelerator.is_main_process and self.step not in self.run.checkpoints() and self.step:
            self.run.save_checkpoint(self.step, self.optimizer.state(), self._best())
        if together:
            accelerator.wait_for_everyone()

    def _best(self) -> int | None:
        rows = history(self.run)
        return select_best(rows).step if len(rows) > 1 else None

    def save_pipeline(self) -> None:
        """Write the tuned pipeline in diffusers' layout, or its LoRA weights.

        After an early stop they are the best checkpoint's, else the averaged ones if there are.
        """
        from dreambooth_lib.core.files import replacing_folder

        model, config, family = self.trainable.eval(), self.config, self.family
        if config.early_stop:
            load_checkpoint_weights(model, self.run, self._best() or self.step)
        else:
            self.optimizer.load_ema_weights()
        if self.accelerator.is_main_process:
            with replacing_folder(self.run.pipeline) as partial:
                if config.method == "lora":
                    lora.save_lora(family, config, partial)
                else:
                    # Its frozen parts may be rounded, or let go of: the base's own are taken.
                    if self.half is not torch.float32 or family.prompt_cache is not None:
                        family = load_base_to_save(config)
                        wrap_trained_parts(family, config).put(model.state())
                    save_pipeline(family.pipeline, partial)
        self.accelerator.wait_for_everyone()


def _accelerator(config: TrainConfig, precision: str) -> Accelerator:
    """Join the processes that train together. Raises ValueError where they cannot share a batch."""
    if is_initialized() and AcceleratorState().mixed_precision != precision:
        AcceleratorState._reset_state()  # an earlier run's, in this process
    # Copies of the weights in half precision are quicker kept than made anew, but take memory.
    keep = AutocastKwargs(cache_enabled=config.memory not in LOW_MEMORY)
    accelerator = Accelerator(mixed_precision=precision, kwargs_handlers=[keep])
    processes, parts = accelerator.num_processes, config.gradient_accumulation
    if config.steps_in_backward and processes > 1:
        raise ValueError(
            f"memory is '{config.memory}', which updates weights before their gradients could "
            f"cross {processes} processes; set it to 'standard'."
        )
    if config.batch_size % (processes * parts):
        raise ValueError(
            f"batch_size {config.batch_size} does not split into {processes * parts} equal parts "
            f"({processes} processes x gradient_accumulation {parts}); make it a multiple."
        )
    return accelerator
