"""Set up training: load the base, images and newest checkpoint, and make batches and optimizer."""

import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch

from dreambooth_lib.core.checked_json import write_object
from dreambooth_lib.core.config_checks import LOW_MEMORY
from dreambooth_lib.core.digests import write_digests
from dreambooth_lib.core.files import replacing_folder
from dreambooth_lib.core.made_with import MADE_WITH_FILE, made_with
from dreambooth_lib.core.processes import join_group
from dreambooth_lib.data import captions
from dreambooth_lib.data.images import Photo, captioned
from dreambooth_lib.data.masks import check_masks
from dreambooth_lib.data.quality_checks import hold_out
from dreambooth_lib.families.base import Family
from dreambooth_lib.families.inference_settings import distillation_warning
from dreambooth_lib.families.precision import NonFinite, save_pipeline
from dreambooth_lib.training import lora, run_photos
from dreambooth_lib.training.accelerator import make_accelerator
from dreambooth_lib.training.batches import Batch, Batches, seeded_generator
from dreambooth_lib.training.best_checkpoint import select_best
from dreambooth_lib.training.class_images import prepare_class_images, prior_prompts
from dreambooth_lib.training.early_stopping import should_stop_early
from dreambooth_lib.training.fused_optimizer import FusedBackwardOptimizer
from dreambooth_lib.training.held_out_loss import ROWS, HeldOutLoss
from dreambooth_lib.training.image_sizes import fit_to_photos, size_to_save
from dreambooth_lib.training.memory_level import (
    check_adapter,
    decide_level,
    is_gpu,
)
from dreambooth_lib.training.native_precision import dtype_of, native_precision
from dreambooth_lib.training.optimizer_step import Optimizer
from dreambooth_lib.training.prior_distillation import Teacher, with_class_captions
from dreambooth_lib.training.prior_weight import hold_out_class_images, make_prior_weight
from dreambooth_lib.training.runs import GOAL_FILE, Run
from dreambooth_lib.training.trainable import (
    checkpoint_weights,
    load,
    load_base_to_save,
    load_drawing_family,
    make_trainable,
    offloads_text_encoders,
    precision_of_weights,
    training_load_options,
)
from dreambooth_lib.training.validation import Scorers, load_scorers
from dreambooth_lib.training.validation_pace import checkpoint_intervals, is_wanted, note_skipped
from dreambooth_lib.training.validation_record import ValidationResult, Validator, history, plan_of


class Trainer:
    """One process's model, data and optimizer of a run, and what it does between steps."""

    def __init__(self, run: Run):
        device = join_group().device
        if is_gpu(device):
            torch.cuda.reset_peak_memory_stats(device)  # an earlier run's
        self.run, self.config = run, decide_level(run, device)
        config = self.config
        precision = native_precision(config.mixed_precision, device)
        check_adapter(config.adapter, precision)
        self.precision = precision_of_weights(config, precision)
        self.dtype = dtype_of(self.precision)  #: that autocast computes in
        self.accelerator = accelerator = make_accelerator(config, self.precision)
        subject = config.subject
        photos = run_photos.read_subject_photos(run)
        photos = captioned(photos, subject.instance_prompt, subject.identifier)
        check_masks(photos, config)
        self.family = self._load_base(photos)
        fit_to_photos(self.family, config)
        family = self.family
        reads, more = family.tokenizers, family.how_to_read_more
        messages = captions.check_lengths(photos, subject, reads, more)
        if not config.has_lora_prior:  # whose prompts nobody wrote
            messages += [
                captions.warning_of_length(text, reads, more) for text in config.prior_prompts or ()
            ]
        for message in filter(None, messages):
            warnings.warn(message, stacklevel=2)
        scorers = self._load_scorers()  # if one is missing, before class images take their time
        self._class_folder = run.folder.parent / "class_images"
        classes, measured = hold_out_class_images(
            config, self.family, accelerator, self._class_folder, self._class_images()
        )
        instance, classes = self._set_up_validation(photos, classes, scorers)
        teacher, prompts = None, tuple[str, ...]()
        if config.asks_base:
            teacher = Teacher(self.family, config, self.dtype, accelerator.autocast)
        if config.distills and not config.uses_class_images:
            classes = with_class_captions(instance, config.subject)
            prompts = config.prior_prompts or ()
        latents = run.folder.parent / "latents"
        self.batches = Batches(config, self.family, instance, classes, latents, teacher, prompts)
        accelerator.wait_for_everyone()
        self.trainable = make_trainable(self.family, config).to(accelerator.device)
        #: What is trained, as accelerate wraps it; before the optimizer, since it may move weights.
        self.model = accelerator.prepare(self.trainable)
        optimizer = FusedBackwardOptimizer if config.steps_in_backward else Optimizer
        self.optimizer = optimizer(config, accelerator, self.trainable)
        #: What draws validation images: the family, or a distilled model with its adapters.
        self.drawing = self.family
        if self.validator is not None:
            self.drawing = load_drawing_family(config, self.family, self.dtype)
        self._validate_base()
        self.prior_weight = make_prior_weight(config, self.family, measured, self.optimizer)
        with accelerator.main_process_first():  # which sets damaged checkpoints aside
            checkpoint = run.load_checkpoint()
        if checkpoint is not None:
            self.optimizer.load_state_dict(checkpoint)
            self.prior_weight.load_state_dict(checkpoint)
        self.saved_step = self.step  #: of the newest checkpoint; 0 if there is none
        if accelerator.is_main_process:
            for name in ("log", "validation"):
                if damaged := run.truncate(name, self.step):
                    warnings.warn(f"{damaged} damaged rows of {name}.jsonl in {run.folder} were "
                                  "left out.", stacklevel=2)  # fmt: skip
            run_photos.note_photos(run, photos, ended=self.finished())

    @property
    def step(self) -> int:
        """Return the number of completed steps."""
        return self.optimizer.completed_steps

    def _load_base(self, instance: list[Photo]) -> Family:
        """Load the base; encode all prompts of the run if its text encoders are offloaded."""
        config, subject = self.config, self.config.subject
        load_options = training_load_options(config, self.dtype)
        if offloads_text_encoders(config):
            own = run_photos.read_own_class_images(self.run)
            photos = [*own, *instance, *with_class_captions(instance, subject)]
            prompts = {p.caption for p in photos if p.caption} | {*prior_prompts(config)}
            if config.validate_every:
                prompts |= set(plan_of(self.run).prompts(subject))
            load_options |= {"prompts": prompts, "device": self.accelerator.device}
        family = load(config, **load_options)
        family.pipeline.to(self.accelerator.device)
        return family

    def _class_images(self) -> list[Photo]:
        """Read the class images, once every process has drawn its part of the missing ones."""
        config = self.config
        if not config.uses_class_images:
            return []
        if config.class_folder:
            own, subject = run_photos.read_own_class_images(self.run), config.subject
            reads, more = self.family.tokenizers, self.family.how_to_read_more
            messages = captions.check_class_captions(own, subject)
            messages += captions.check_class_lengths(own, reads, more)
            for message in messages:
                warnings.warn(message, stacklevel=2)
            return captioned(own, subject.class_prompt)
        return prepare_class_images(config, self.family, self.accelerator, self._class_folder)

    def _load_scorers(self) -> Scorers | None:
        """Load what scores validation images, on the first process, if the config asks for it."""
        config, accelerator = self.config, self.accelerator
        if not config.validate_every or not accelerator.is_main_process:
            return None
        return load_scorers(config, "cpu" if config.memory in LOW_MEMORY else accelerator.device)

    def _set_up_validation(
        self, photos: list[Photo], classes: list[Photo], scorers: Scorers | None
    ) -> tuple[list[Photo], list[Photo]]:
        """Make the validator if the config asks for one; return the photos and images to train on.

        The others are held out.
        """
        config = self.config
        self.validator: Validator | None = None
        if not config.validate_every:
            return photos, classes
        instance, held_out = hold_out(photos) if config.hold_out else (photos, [])
        end = len(classes) - min(ROWS, len(classes) // 8)
        if scorers is not None:
            loss = HeldOutLoss(config, self.family, {"subject": held_out, "class": classes[end:]})
            self.validator = Validator(self.run, photos, loss, scorers)
        return instance, classes[:end]

    def _validate_base(self) -> None:
        """Validate the frozen base, as the reference, unless its scores and images are there.

        It must happen before a checkpoint's weights are loaded.
        """
        if self.validator is not None and not self.validator.has_base(self.drawing):
            as_base = [lora.exact_base(part, self.config) for part in (self.family, self.drawing)]
            with self.accelerator.autocast(), as_base[0], as_base[1]:
                self.validator.validate(0, self.trainable, self.drawing)
        self.accelerator.wait_for_everyone()

    def micro_batches(self) -> Iterator[Batch]:
        """Yield this process's micro-batches of the next step."""
        config, accelerator = self.config, self.accelerator
        if config.dropout > 0 or config.lora_dropout > 0 or config.adapter_settings:
            torch.manual_seed(seeded_generator(config.seed, self.step, 3).initial_seed())
        batch, count = self.batches.at(self.step), config.gradient_accumulation
        first, parts = accelerator.process_index * count, accelerator.num_processes * count
        for number in range(count):
            # Processes exchange gradients with the last micro-batch only.
            last = number == count - 1
            with nullcontext() if last else accelerator.no_sync(self.model):
                yield self.batches.split(batch, first + number, parts)

    def warn_of_distillation(self) -> None:
        """Print a warning before the first step if the base is a distilled one."""
        family = self.family
        warning = distillation_warning(self.config.base, family.inference, family.undistilled_base)
        if warning is not None and self.step == 0:
            self.accelerator.print(warning)

    def log(self, row: dict[str, Any]) -> None:
        """Append a step to the run's log, once for all processes."""
        if self.accelerator.is_main_process:
            self.run.append("log", row)

    def finished(self) -> bool:
        """Return whether the last step is completed, or training should stop early."""
        if self.step >= self.config.steps:
            return True
        return self.config.early_stop and should_stop_early(history(self.run))

    def _is_due(self, interval: int) -> bool:
        return interval > 0 and (self.step % interval == 0 or self.step == self.config.steps)

    def validate_if_due(self) -> ValidationResult | None:
        """Validate with the EMA weights if it is due, affordable and not done yet."""
        result = None
        if not self._is_due(self.config.validate_every):
            return None
        self.optimizer.check_gradients()
        if self.validator is not None and is_wanted(self.run, self.step):
            try:
                with self.optimizer.ema.swapped_in(), self.accelerator.autocast():
                    result = self.validator.validate(self.step, self.trainable, self.drawing)
            except NonFinite as error:  # the base's own images were sound: training goes on
                note_skipped(self.run, self.step, str(error))
                warnings.warn(f"step {self.step} is not validated: {error}", stacklevel=2)
        self.accelerator.wait_for_everyone()
        return result

    def save_checkpoint_if_due(self) -> bool:
        """Save a checkpoint where one or a validation is due, even if skipped; tell if it was."""
        due = any(map(self._is_due, checkpoint_intervals(self.config)))
        if due:
            self.save_checkpoint()
        return due

    def save_checkpoint(self, wait: bool = True) -> None:
        """Save a checkpoint of this step, unless there is one.

        With ``wait`` all processes wait for it; a process that stops alone would wait in vain.
        """
        accelerator = self.accelerator
        if accelerator.is_main_process and self.step not in self.run.checkpoints() and self.step:
            state = self.optimizer.state_dict() | self.prior_weight.state_dict()
            state |= size_to_save(self.family)
            self.run.save_checkpoint(self.step, state, self._best_step())
            self.saved_step = self.step
        if wait:
            accelerator.wait_for_everyone()

    def _best_step(self) -> int | None:
        results = history(self.run)
        return select_best(results).step if len(results) > 1 else None

    def save_pipeline(self) -> None:
        """Save the trained pipeline in diffusers' layout, or its LoRA weights.

        With early stopping they are the best checkpoint's, else the EMA weights if there are any.
        """
        model, config, family = self.trainable.eval(), self.config, self.family
        best = (config.early_stop and self._best_step()) or self.step
        if best != self.step:
            weights = checkpoint_weights(self.run, best)
        else:
            weights = self.optimizer.ema.by_name(model.trained_weights())
        model.load_weights(weights)
        kept = self.prior_weight.kept() | size_to_save(self.family)
        if self.accelerator.is_main_process:
            # An earlier, shorter run's pipeline stays until this one is complete.
            with replacing_folder(self.run.pipeline) as partial:
                if config.method == "lora":
                    lora.save_lora(family, config, partial)
                else:
                    # Frozen parts may be rounded or offloaded here: save the base's own.
                    if self.dtype is not torch.float32 or family.prompt_cache is not None:
                        family = load_base_to_save(config, family, model, weights)
                    save_pipeline(family.pipeline, partial)
                write_object(partial / GOAL_FILE, self.run.goal() | kept | {"step": best})
                write_digests(partial)
            write_object(self.run.folder / MADE_WITH_FILE, made_with() | {"step": self.step})
        self.accelerator.wait_for_everyone()
