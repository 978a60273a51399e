"""Training on tiny random bases: learning, saving, resuming, and equal results however split."""

import json
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.families import loading
from dreambooth_lib.training import (
    accelerator,
    latent_cache,
    loop,
    memory_estimate,
    runs,
    sampling,
    setup,
)
from dreambooth_lib.training.batches import Batch
from dreambooth_lib.training.interrupts import defer_interrupts
from dreambooth_lib.training.loop import (
    NonFiniteLoss,
    OutOfMemory,
    Step,
    _save_and_explain,
    prior_preservation,
    train,
    training_steps,
)
from dreambooth_lib.training.losses import Loss
from dreambooth_lib.training.runs import Run, RunError
from dreambooth_lib.training.setup import Trainer
from dreambooth_lib.training.trainable import Trainable

Make = Callable[..., TrainConfig]


def curve(steps: list[Step]) -> list[tuple[float, float, float | None, float]]:
    """Return what is equal in equal runs: all of a step but its time and memory."""
    return [(s.loss, s.instance_loss, s.prior_loss, s.lr) for s in steps]


def weights(folder: str | Path, part: str = "unet") -> dict[str, torch.Tensor]:
    (file,) = (Path(folder) / part).glob("*.safetensors")
    return load_file(file)


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Compare bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@pytest.fixture
def started(tmp_path: Path, photos: str, make_config: Make) -> Callable[..., Run]:
    """Start a run in a folder of its own; runs of the same test share their class images."""

    def start(name: str, base: str, **changes: Any) -> Run:
        return runs.start(make_config(base, photos, **changes), tmp_path / name)

    return start


@pytest.mark.parametrize("base", ["tiny_sd1", "tiny_sd2"])
def test_both_prediction_types_train_and_save_by_the_same_code(
    base: str, started: Callable[..., Run], request: pytest.FixtureRequest
) -> None:
    path = request.getfixturevalue(base)
    run = started("run", path)
    steps = list(train(run))
    assert [step.step for step in steps] == [1, 2, 3, 4]
    assert all(s.loss > 0 and s.seconds > 0 and s.lr == 1e-3 for s in steps)
    for step in steps:
        assert step.loss == pytest.approx(step.instance_loss + step.prior_loss, rel=1e-6)
    before, after = weights(path), weights(run.pipeline)
    assert before.keys() == after.keys()
    changed = [k for k in before if not torch.equal(before[k], after[k])]
    assert len(changed) > 0.9 * len(before)
    for frozen in ("vae", "text_encoder"):
        assert same(weights(path, frozen), weights(run.pipeline, frozen))
    assert list(run.checkpoints()) == [4]
    assert [row["loss"] for row in run.log()] == [step.loss for step in steps]


def test_the_loss_falls_when_one_photo_is_learnt(
    tmp_path: Path, tiny_sd1: str, photos: str, make_config: Make
) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    Image.open(Path(photos) / "0.png").save(alone / "0.png")
    config = make_config(
        tiny_sd1, str(alone), steps=40, batch_size=8, prior_weight=0.0, learning_rate=1e-2
    )
    losses = [step.loss for step in train(runs.start(config, tmp_path / "run"))]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


def test_without_prior_weight_there_is_no_prior_loss_and_no_class_image(
    tmp_path: Path, tiny_sd1: str, started: Callable[..., Run]
) -> None:
    steps = list(train(started("run", tiny_sd1, prior_weight=0.0, class_images=0)))
    assert all(step.prior_loss is None and step.loss == step.instance_loss for step in steps)
    assert not (tmp_path / "class_images").exists()


def test_prior_weight_scales_the_prior_term_of_the_loss(
    tiny_sd1: str, started: Callable[..., Run]
) -> None:
    (step,) = train(started("run", tiny_sd1, prior_weight=0.25, steps=1))
    assert step.loss == pytest.approx(step.instance_loss + 0.25 * step.prior_loss, rel=1e-6)


def test_a_custom_objective_replaces_the_papers(tiny_sd1: str, started: Callable[..., Run]) -> None:
    seen = []

    def doubled(prediction: torch.Tensor, batch: Batch, config: TrainConfig) -> Loss:
        seen.append((prediction.shape == batch.noised.target.shape, config.prior_weight))
        return Loss(*(2 * part for part in prior_preservation(prediction, batch, config)))

    (own, *_) = train(started("own", tiny_sd1, prior_weight=0.25), doubled)
    (step, *_) = train(started("plain", tiny_sd1, prior_weight=0.25))
    assert seen == [(True, 0.25)] * 4
    assert own.loss == pytest.approx(2 * step.loss) and own.prior_loss == 2 * step.prior_loss


def test_every_photo_and_every_class_image_is_used(
    tiny_sd1: str, started: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    used: dict[int, list[int]] = {}
    sample = latent_cache.LatentCache.sample

    def spy(cache: Any, index: list[int], generator: torch.Generator) -> torch.Tensor:
        used.setdefault(id(cache), []).extend(index)
        return sample(cache, index, generator)

    monkeypatch.setattr(latent_cache.LatentCache, "sample", spy)
    list(train(started("run", tiny_sd1, class_images=6, steps=6)))
    photos_used, class_used = used.values()
    assert sorted(photos_used) == sorted([0, 1, 2, 3] * 3)
    assert sorted(class_used) == sorted([0, 1, 2, 3, 4, 5] * 2)


def test_micro_batches_give_the_same_losses_and_steps_count_optimizer_steps(
    tiny_sd1: str, started: Callable[..., Run]
) -> None:
    plain = list(train(started("plain", tiny_sd1, batch_size=4, steps=5)))
    split = list(train(started("split", tiny_sd1, batch_size=4, steps=5, gradient_accumulation=2)))
    assert [step.step for step in split] == [1, 2, 3, 4, 5]
    for first, second in zip(plain, split, strict=True):
        assert first.loss == pytest.approx(second.loss, rel=1e-4)
        assert first.prior_loss == pytest.approx(second.prior_loss, rel=1e-4)


RESUMABLE: dict[str, dict[str, Any]] = {
    "plain": {},
    "text encoder": {"train_text_encoder": True, "prompt_dropout": 0.3},
    "ema": {"ema_decay": 0.9},
    "schedule": {"lr_schedule": "cosine", "warmup_steps": 2},
    "dropout": {"dropout": 0.2},
    "crop and flip": {"crop": "random", "flip": True},
    "8-bit": {"optimizer": "adamw8bit"},
    "bf16": {"mixed_precision": "bf16"},
}


@pytest.mark.parametrize("name", RESUMABLE)
def test_an_interrupted_run_resumes_bit_for_bit(
    name: str, tiny_sd1: str, started: Callable[..., Run]
) -> None:
    changes = RESUMABLE[name] | {"steps": 5, "batch_size": 1, "gradient_accumulation": 1}
    complete_run = started("complete", tiny_sd1, **changes)
    complete = list(train(complete_run))
    run = started("interrupted", tiny_sd1, **changes)
    steps = []
    for step in train(run):
        steps.append(step)
        if step.step == 2:
            break
    assert list(run.checkpoints()) == [2]
    rest = list(train(runs.resume(run.folder)))
    assert [step.step for step in rest] == [3, 4, 5]
    assert curve(steps + rest) == curve(complete)
    for part in ("unet", "text_encoder", "vae"):
        assert same(weights(complete_run.pipeline, part), weights(run.pipeline, part)), part
    first, second = complete_run.load_checkpoint(), run.load_checkpoint()
    assert first is not None and second is not None
    equal_states(first, second)


def equal_states(first: Any, second: Any, path: str = "") -> None:
    assert type(first) is type(second), path
    if isinstance(first, dict):
        assert first.keys() == second.keys(), path
        for key in first:
            equal_states(first[key], second[key], f"{path}/{key}")
    elif isinstance(first, list | tuple):
        assert len(first) == len(second), path
        for number, pair in enumerate(zip(first, second, strict=True)):
            equal_states(*pair, f"{path}/{number}")
    elif isinstance(first, torch.Tensor):
        assert first.dtype == second.dtype and torch.equal(first, second), path
    else:
        assert first == second, path


def test_the_eight_bit_optimizer_saves_eight_bit_states(
    tiny_sd1: str, started: Callable[..., Run]
) -> None:
    run = started("run", tiny_sd1, optimizer="adamw8bit", steps=2)
    list(train(run))
    saved = run.load_checkpoint()
    assert saved is not None

    def dtypes(value: Any) -> set[torch.dtype]:
        if isinstance(value, torch.Tensor):
            return {value.dtype}
        values = value.values() if isinstance(value, dict) else ()
        return set().union(*(dtypes(v) for v in values))

    assert torch.uint8 in dtypes(saved["optimizer"]["state"])


def test_an_exception_in_the_callers_loop_saves_a_checkpoint(
    tiny_sd1: str, started: Callable[..., Run]
) -> None:
    run = started("run", tiny_sd1)

    def caller() -> None:
        for step in train(run):
            if step.step == 3:
                raise RuntimeError("raised by the caller")

    with pytest.raises(RuntimeError):
        caller()
    assert list(run.checkpoints()) == [3]


OPTIMIZER_HOOKS = {
    "before": register_optimizer_step_pre_hook,
    "after": register_optimizer_step_post_hook,
}


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("memory", ["standard", "low"])
@pytest.mark.parametrize("moment", OPTIMIZER_HOOKS)
def test_an_interrupt_around_the_optimizer_step_waits_until_the_step_is_complete(
    moment: str, memory: str, tiny_sd1: str, started: Callable[..., Run]
) -> None:
    complete_run = started("complete", tiny_sd1, steps=5, memory=memory)
    complete = list(train(complete_run))
    run = started("interrupted", tiny_sd1, steps=5, memory=memory)
    stepper = train(run)
    first = list(islice(stepper, 3))
    hook = OPTIMIZER_HOOKS[moment](lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        with pytest.raises(KeyboardInterrupt):
            next(stepper)
    finally:
        hook.remove()
    assert max(run.checkpoints()) == len(run.log()) == 4
    rest = list(train(runs.resume(run.folder)))
    assert curve(first + rest) == curve(complete[:3] + complete[4:])
    assert same(weights(complete_run.pipeline), weights(run.pipeline))


@pytest.mark.usefixtures("interruptible")
def test_interrupts_are_deferred_within_the_block_only() -> None:
    with pytest.raises(KeyboardInterrupt), defer_interrupts():
        signal.raise_signal(signal.SIGINT)
    handler = signal.getsignal(signal.SIGINT)
    with defer_interrupts():
        assert signal.getsignal(signal.SIGINT) is not handler
    assert signal.getsignal(signal.SIGINT) is handler


def test_training_the_text_encoder_changes_and_saves_it(
    tiny_sd1: str, started: Callable[..., Run]
) -> None:
    run = started("run", tiny_sd1, train_text_encoder=True)
    list(train(run))
    assert not same(weights(tiny_sd1, "text_encoder"), weights(run.pipeline, "text_encoder"))
    assert same(weights(tiny_sd1, "vae"), weights(run.pipeline, "vae"))


def test_the_ema_weights_are_saved_instead_of_the_last_ones(
    tiny_sd1: str, started: Callable[..., Run]
) -> None:
    run = started("run", tiny_sd1, ema_decay=0.5, steps=3, checkpoint_every=1, checkpoints_kept=9)
    list(train(run))
    name = "conv_in.weight"
    by_step = [weights(tiny_sd1)[name]] + [
        training_state(run, step)[f"denoiser.{name}"] for step in (1, 2, 3)
    ]
    # diffusers' decay at step k is min(decay, (1 + k) / (10 + k)), counted from 0 at the second.
    average = by_step[0]
    for k, value in enumerate(by_step[1:]):
        decay = 0.0 if k == 0 else min(0.5, (1 + k) / (10 + k))
        average = decay * average + (1 - decay) * value
    saved = weights(run.pipeline)[name]
    assert torch.allclose(saved, average, atol=1e-6)
    assert not torch.allclose(saved, by_step[-1], atol=1e-5)


def test_an_ema_begun_on_resume_begins_with_the_weights_of_then(
    tiny_sd1: str, started: Callable[..., Run]
) -> None:
    run = started("run", tiny_sd1, steps=2, ema_decay=None)
    list(train(run))
    before = weights(run.pipeline)
    assert list(train(runs.resume(run.folder, ema_decay=0.5))) == [], "it was at its end"
    assert same(weights(run.pipeline), before)


def test_an_ema_decay_changed_on_resume_is_used(tiny_sd1: str, started: Callable[..., Run]) -> None:
    run = started("run", tiny_sd1, steps=2, ema_decay=0.5)
    list(train(run))
    ema = Trainer(runs.resume(run.folder, steps=3, ema_decay=0.25)).optimizer.ema.ema_model
    assert ema is not None and (ema.decay, ema.optimization_step) == (0.25, 2)


def test_a_class_folder_given_on_resume_is_found_from_anywhere(
    tiny_sd1: str, started: Callable[..., Run], photos: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = started("run", tiny_sd1, steps=2, checkpoint_every=1)
    next(train(run))
    monkeypatch.chdir(Path(photos).parent)
    runs.resume(run.folder, class_folder=Path(photos).name)
    assert runs.resume(run.folder).config.class_folder == os.path.realpath(photos)


def test_a_run_is_not_resumed_to_a_step_that_it_is_past(
    tiny_sd1: str, started: Callable[..., Run]
) -> None:
    run = started("run", tiny_sd1, steps=2)
    list(train(run))
    with pytest.raises(RunError, match=r"is already at step 2, beyond steps 1; raise steps"):
        runs.resume(run.folder, steps=1)
    assert runs.resume(run.folder).config.steps == 2


def test_memory_that_runs_out_before_the_first_step_is_told(
    tiny_sd1: str, started: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_out(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(setup, "fit_to_photos", run_out)
    said = r"out of memory before the first step of .*; resume with memory="
    with pytest.raises(OutOfMemory, match=said):
        next(train(started("run", tiny_sd1)))


def test_memory_that_ran_out_is_told_before_and_without_the_estimates(
    tiny_sd1: str, started: Callable[..., Run], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def run_out(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    def interrupt(*_: Any) -> str:
        assert "ran out of memory; estimating" in capsys.readouterr().out
        raise KeyboardInterrupt

    monkeypatch.setattr(setup, "fit_to_photos", run_out)
    monkeypatch.setattr(memory_estimate, "suggest_savings", interrupt)
    with pytest.raises(KeyboardInterrupt):  # so that a study stops, too
        next(train(started("run", tiny_sd1)))
    printed = capsys.readouterr().out
    assert printed.startswith("The GPU ran out of memory before the first step of ")
    assert "; resume the run with another memory level or a lower resolution" in printed


def training_state(run: Run, step: int) -> dict[str, torch.Tensor]:
    from dreambooth_lib.training.checkpoints import load_state

    return load_state(run.checkpoints()[step])["model"]


def test_bf16_trains_float32_weights(tiny_sd1: str, started: Callable[..., Run]) -> None:
    run = started("run", tiny_sd1, mixed_precision="bf16")
    half = list(train(run))
    full = list(train(started("full", tiny_sd1, mixed_precision="no")))
    for first, second in zip(half, full, strict=True):
        assert first.loss == pytest.approx(second.loss, rel=0.05)
    assert curve(half) != curve(full)
    assert {v.dtype for v in weights(run.pipeline).values()} == {torch.float32}
    after, before = weights(run.pipeline), weights(tiny_sd1)
    rounded = after["conv_in.weight"].bfloat16().float()
    assert not torch.equal(after["conv_in.weight"], rounded)
    assert not torch.equal(after["conv_in.weight"], before["conv_in.weight"])


def test_a_run_in_half_precision_saves_the_frozen_parts_unrounded(
    tiny_sd1: str, started: Callable[..., Run]
) -> None:
    run = started("run", tiny_sd1, mixed_precision="bf16", steps=1)
    list(train(run))
    for part in ("vae", "text_encoder"):
        assert same(weights(tiny_sd1, part), weights(run.pipeline, part)), part


def test_gradient_checkpointing_gives_the_same_losses(
    tiny_sd1: str, started: Callable[..., Run]
) -> None:
    both = [
        list(train(started(str(on), tiny_sd1, gradient_checkpointing=on, train_text_encoder=True)))
        for on in (False, True)
    ]
    for first, second in zip(*both, strict=True):
        assert first.loss == pytest.approx(second.loss, rel=1e-5)


@pytest.mark.parametrize("changes", [{"flip": True}, {"crop": "random"}, {"min_snr_gamma": 0.1}])
def test_each_of_these_settings_changes_the_losses(
    changes: dict[str, Any], tiny_sd1: str, started: Callable[..., Run]
) -> None:
    plain = curve(list(train(started("plain", tiny_sd1))))
    changed = curve(list(train(started("changed", tiny_sd1, **changes))))
    assert changed != plain
    assert all(0 < loss < 1e3 for loss, *_ in changed)


def seen_prompts(run: Run, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Train a run and return every prompt that its steps were conditioned on."""
    seen: list[str] = []
    forward = Trainable.forward

    def spy(module: Any, x_t: Any, t: Any, cond: Any, prompts: list[str]) -> torch.Tensor:
        seen.extend(prompts)
        return forward(module, x_t, t, cond, prompts)

    with monkeypatch.context() as patch:
        patch.setattr(Trainable, "forward", spy)
        list(train(run))
    return seen


def test_prompts_are_the_papers_unless_a_photo_has_a_caption(
    tmp_path: Path,
    tiny_sd1: str,
    photos: str,
    make_config: Make,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = tmp_path / "own"
    own.mkdir()
    for number in range(2):
        Image.open(Path(photos) / f"{number}.png").save(own / f"{number}.png")
    (own / "1.txt").write_text("a ohwx dog in snow")
    config = make_config(tiny_sd1, str(own), steps=2)
    seen = seen_prompts(runs.start(config, tmp_path / "run"), monkeypatch)
    assert sorted(seen) == sorted(["a ohwx dog", "a ohwx dog in snow", "a dog", "a dog"] * 2)


def test_prompt_dropout_empties_about_that_ratio_of_prompts(
    tiny_sd1: str, started: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = started("run", tiny_sd1, steps=10, batch_size=8, prompt_dropout=0.4)
    seen = seen_prompts(run, monkeypatch)
    assert len(seen) == 160
    assert 0.25 < seen.count("") / 160 < 0.55
    assert {"a ohwx dog", "a dog", ""} == set(seen)


def test_a_caption_changes_the_conditioning_and_so_the_loss(
    tmp_path: Path, tiny_sd1: str, photos: str, make_config: Make
) -> None:
    losses = []
    for name in ("plain", "captioned"):
        own = tmp_path / name / "photos"
        own.mkdir(parents=True)
        Image.open(Path(photos) / "0.png").save(own / "0.png")
        if name == "captioned":
            (own / "0.txt").write_text("red cat beach")
        config = make_config(tiny_sd1, str(own), steps=1, prior_weight=0.0)
        losses += [step.loss for step in train(runs.start(config, tmp_path / name / "run"))]
    assert losses[0] != losses[1]


def test_only_the_loss_that_is_trained_must_be_finite(
    tiny_sd1: str, started: Callable[..., Run]
) -> None:
    def objective(prediction: torch.Tensor, batch: Batch, config: TrainConfig) -> Loss:
        return prior_preservation(prediction, batch, config)._replace(prior=torch.tensor(torch.nan))

    steps = list(train(started("run", tiny_sd1, steps=2), objective))
    assert all(step.loss > 0 for step in steps), "a term for the log alone says nothing of it"


def test_a_non_finite_loss_raises_and_keeps_the_last_good_checkpoint(
    tiny_sd1: str, started: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = started("run", tiny_sd1, checkpoint_every=2, steps=6)
    stepper = train(run)
    first = list(islice(stepper, 3))
    errors = loop.per_sample_errors
    monkeypatch.setattr(loop, "per_sample_errors", lambda *args: errors(*args) * float("nan"))
    with pytest.raises(NonFiniteLoss, match=r"step 4.*learning_rate"):
        next(stepper)
    assert list(run.checkpoints()) == [2]
    assert len(first) == 3 and len(run.log()) == 3
    monkeypatch.undo()
    rest = list(train(runs.resume(run.folder)))
    assert [step.step for step in rest] == [3, 4, 5, 6]
    assert rest[0].loss == first[2].loss
    assert [row["step"] for row in run.log()] == [1, 2, 3, 4, 5, 6]


def test_a_non_finite_gradient_never_reaches_weights_or_checkpoints(
    tiny_sd1: str, started: Callable[..., Run]
) -> None:
    run = started("run", tiny_sd1, checkpoint_every=1, steps=6)
    trainer = Trainer(run)
    steps = training_steps(trainer)
    next(steps)
    trainer.optimizer.parameters[0].register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(NonFiniteLoss):
        next(steps)
    assert list(run.checkpoints()) == [1]
    assert all(torch.isfinite(value).all() for value in training_state(run, 1).values())
    assert all(torch.isfinite(value).all() for value in trainer.optimizer.parameters)


def test_leaving_after_a_non_finite_gradient_at_low_memory_saves_nothing_and_says_so(
    tiny_sd1: str, started: Callable[..., Run]
) -> None:
    """There the host reads whether it was finite only with the next step's losses."""
    run = started("run", tiny_sd1, checkpoint_every=2, steps=6, memory="low", prior_weight=0.0)
    trainer = Trainer(run)
    with _save_and_explain(trainer):  # as train() does
        steps = training_steps(trainer)
        assert [next(steps).step for _ in range(2)] == [1, 2]
        weight = trainer.optimizer.parameters[0]
        weight.register_hook(lambda gradient: gradient * float("inf"))
        assert next(steps).step == 3
    said = pytest.raises(NonFiniteLoss, match="the gradient is nan at step 3")
    with said, _save_and_explain(trainer):
        raise KeyboardInterrupt
    assert list(run.checkpoints()) == [2]


def test_a_learning_rate_changed_on_resume_is_used(
    tiny_sd1: str, started: Callable[..., Run]
) -> None:
    run = started("run", tiny_sd1, lr_schedule="linear", steps=4)
    next(islice(train(run), 1, None))
    rest = list(train(runs.resume(run.folder, learning_rate=1e-4, weight_decay=0.5, steps=8)))
    assert [step.lr for step in rest] == pytest.approx([1e-4 * (8 - k) / 8 for k in range(2, 8)])
    saved = run.load_checkpoint()
    assert saved is not None
    assert saved["optimizer"]["param_groups"][0]["weight_decay"] == 0.5


def test_training_a_finished_run_again_makes_no_step_and_keeps_its_pipeline(
    tiny_sd1: str, started: Callable[..., Run]
) -> None:
    run = started("run", tiny_sd1, steps=2)
    list(train(run))
    before = weights(run.pipeline)
    assert list(train(runs.resume(run.folder))) == []
    assert same(before, weights(run.pipeline))
    assert [row["step"] for row in run.log()] == [1, 2]


def test_a_run_interrupted_at_its_last_step_saves_its_pipeline_on_resume(
    tiny_sd1: str, started: Callable[..., Run]
) -> None:
    run = started("run", tiny_sd1, steps=2)
    for step in train(run):
        if step.step == 2:
            break
    assert not run.pipeline.exists()
    assert list(train(runs.resume(run.folder))) == []
    assert not same(weights(tiny_sd1), weights(run.pipeline))


def test_steps_contain_plain_numbers(tiny_sd1: str, started: Callable[..., Run]) -> None:
    (step,) = train(started("run", tiny_sd1, steps=1))
    for value in (step.loss, step.instance_loss, step.prior_loss, step.lr, step.seconds):
        assert type(value) is float
    assert type(step.step) is int
    assert step.memory_mb is None or type(step.memory_mb) is float


def test_the_same_seed_gives_the_same_run_and_another_seed_another(
    tiny_sd1: str, started: Callable[..., Run]
) -> None:
    first, again, other = (
        curve(list(train(started(name, tiny_sd1, seed=seed))))
        for name, seed in (("first", 3), ("again", 3), ("other", 4))
    )
    assert first == again
    assert first != other


def test_a_batch_that_does_not_split_across_processes_is_rejected(
    tiny_sd1: str, started: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = started("run", tiny_sd1, batch_size=3)
    monkeypatch.setattr(accelerator.Accelerator, "num_processes", 2)
    with pytest.raises(ValueError, match=r"batch_size 3 .*2 processes"):
        next(train(run))


def test_a_run_serves_as_the_base_of_another(tiny_sd1: str, started: Callable[..., Run]) -> None:
    first = started("first", tiny_sd1, steps=1)
    list(train(first))
    family = loading.load_model(str(first.folder))
    assert same(family.denoiser.state_dict(), weights(first.pipeline))
    second = started("second", str(first.folder), steps=1)
    list(train(second))
    assert not same(weights(first.pipeline), weights(second.pipeline))


PLAIN_DIFFUSERS = """
import sys
from diffusers import StableDiffusionPipeline
pipeline = StableDiffusionPipeline.from_pretrained(sys.argv[1])
pipeline.set_progress_bar_config(disable=True)
image = pipeline("a ohwx dog", num_inference_steps=2).images[0]
assert "dreambooth_lib" not in sys.modules
print(image.size)
"""


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_runs_pipeline_draws_in_plain_diffusers_without_this_library(
    precision: str, tmp_path: Path, tiny_sd1: str, started: Callable[..., Run]
) -> None:
    run = started("run", tiny_sd1, steps=1, mixed_precision=precision)
    list(train(run))
    command = [sys.executable, "-c", PLAIN_DIFFUSERS, str(run.pipeline)]
    # Another folder and no PYTHONPATH, so that nothing in this checkout can be imported.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(16, 16)"


def test_a_finished_run_that_is_extended_keeps_its_pipeline_until_its_new_end(
    tiny_sd1: str, photos: str, tmp_path: Path, make_config: Callable[..., TrainConfig]
) -> None:
    run = runs.start(make_config(tiny_sd1, photos, steps=2), tmp_path / "run")
    list(train(run))
    longer = train(runs.resume(run.folder, steps=4))
    assert next(longer).step == 3
    before = weights(run.folder / "pipeline", "unet")
    longer.close()
    run = runs.resume(run.folder)
    assert not run.finished
    with pytest.warns(UserWarning, match="has more steps to train"):
        sampling.sample(run, ["a {} dog"], [0], steps=1)
    assert [step.step for step in train(run)] == [4]
    assert run.finished and not same(weights(run.folder / "pipeline", "unet"), before)


@pytest.mark.usefixtures("interruptible")
def test_a_second_interrupt_does_not_truncate_the_checkpoint(
    started: Callable[..., Run], tiny_sd1: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As under a launcher: one interrupt from the terminal, and one from the launcher.
    write = Run.save_checkpoint

    def interrupted(run: Run, *args: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        write(run, *args)

    monkeypatch.setattr(Run, "save_checkpoint", interrupted)
    run = started("run", tiny_sd1)
    steps = train(run)
    next(steps)
    with pytest.raises(KeyboardInterrupt):
        steps.throw(KeyboardInterrupt)
    assert list(run.checkpoints()) == [1]


#: Runs the command line in forks of one process that has imported everything, and kills them.
KILLER = '''
import json, os, random, runpy, shutil, signal, sys, time, tomllib
from pathlib import Path

import accelerate, bitsandbytes, diffusers, torch, transformers
from dreambooth_lib.training import batches, runs, checkpoints
from dreambooth_lib.core import files
from dreambooth_lib.families import loading

config, folder, reference, seed = sys.argv[1:]
random.seed(int(seed))
loading.load_model(tomllib.loads(Path(config).read_text())["base"])  # imports what loads one


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def in_a_class_image():
    real = files.replace_file

    def killing(path, data):
        if path.name == "00002.png":
            path.with_name(".00002.png.partial").write_bytes(data[:20])
            die()
        real(path, data)

    files.replace_file = killing


def in_a_log_row():
    def killing(run, name, row):
        with (run.folder / f"{name}.jsonl").open("a") as file:
            file.write(json.dumps(row)[:15])
        die()

    runs.Run.append = killing


def in_the_tensors():
    real = checkpoints.write_tensors

    def killing(path, tensors):
        real(path, tensors)
        if "000004" in str(path):
            os.truncate(path, os.path.getsize(path) // 2)
            die()

    checkpoints.write_tensors = killing


def before_the_rename():
    real = Path.rename

    def killing(path, target):
        if path.name == ".000004.partial":
            die()
        return real(path, target)

    Path.rename = killing


def in_dropping_a_checkpoint():
    real = shutil.rmtree

    def killing(path, *args, **kwargs):
        if Path(path).name == "000002":
            next(Path(path).iterdir()).unlink()
            die()
        return real(path, *args, **kwargs)

    shutil.rmtree = killing


def at_any_time():
    """Tell the parent that the steps begin; it kills this process soon after."""
    real = batches.Batches.at

    def telling(own, step):
        os.write(pipe[1], b"x")
        return real(own, step)

    batches.Batches.at = telling


def in_the_pipeline():
    real = diffusers.StableDiffusionPipeline.save_pretrained

    def killing(pipeline, path, **kwargs):
        real(pipeline, path, **kwargs)
        shutil.rmtree(Path(path) / "vae")
        die()

    diffusers.StableDiffusionPipeline.save_pretrained = killing


def attempt(moment, *command):
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(pipe[0])
            if moment is not None:
                moment()
            sys.argv = ["dreambooth_lib", *command]
            runpy.run_module("dreambooth_lib", run_name="__main__")
            code = 0
        finally:
            sys.stdout.flush()
            os._exit(code)
    if moment is at_any_time:
        os.read(pipe[0], 1)
        delay = random.uniform(0, 0.2)
        print("killed after", delay, flush=True)
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    name = getattr(moment, "__name__", "none")
    _, status = os.waitpid(child, 0)
    print("attempt", name, os.WTERMSIG(status), os.WEXITSTATUS(status), flush=True)


pipe = os.pipe()
attempt(None, "train", config, "--out", reference)
attempt(in_a_class_image, "train", config, "--out", folder)
for moment in (in_a_log_row, in_the_tensors, before_the_rename, in_dropping_a_checkpoint):
    attempt(moment, "resume", folder)
for _ in range(2):
    attempt(at_any_time, "resume", folder)
attempt(in_the_pipeline, "resume", folder)
'''


def logged(run: Path) -> list[dict[str, Any]]:
    """Return the log's rows without time, memory and checksum."""
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    left_out = ("seconds", "memory_mb", "crc32")
    return [{k: v for k, v in row.items() if k not in left_out} for row in rows]


def one_thread() -> dict[str, str]:
    return dict(os.environ) | {"OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_a_run_killed_at_any_moment_resumes_to_the_same_bits(
    tmp_path: Path, tiny_sd1: str, photos: str, make_config: Make
) -> None:
    config = make_config(
        tiny_sd1, photos, steps=12, checkpoint_every=2, ema_decay=0.9, lr_schedule="cosine"
    )
    (tmp_path / "config.toml").write_text(config.to_toml())
    # In folders of their own, so that the class images are drawn twice too.
    killed, reference = tmp_path / "killed" / "run", tmp_path / "reference" / "run"
    seed = random.randrange(1000)
    print("seed", seed)
    arguments = [str(tmp_path / "config.toml"), str(killed), str(reference), str(seed)]
    done = subprocess.run(
        [sys.executable, "-c", KILLER, *arguments],
        env=one_thread(),
        capture_output=True,
        text=True,
        check=False,
    )
    # Behind half a line, if the child was killed while it printed.
    attempts = re.findall(r"attempt (\S+) (\S+) (\S+)", done.stdout)
    kill = str(int(signal.SIGKILL))
    assert done.returncode == 0, done.stderr
    assert [signalled for _, signalled, _ in attempts] == ["0"] + [kill] * 8, done.stdout
    assert attempts[0][2] == "0"
    assert not (killed / "pipeline").exists()
    resume = [sys.executable, "-m", "dreambooth_lib", "resume", str(killed)]
    subprocess.run(resume, env=one_thread(), check=True, capture_output=True)
    assert [row["step"] for row in logged(killed)] == list(range(1, 13))
    assert logged(killed) == logged(reference), done.stdout
    for part in ("unet", "vae", "text_encoder"):
        assert same(weights(killed / "pipeline", part), weights(reference / "pipeline", part))
    left = [path.name for path in killed.rglob(".*")] + [
        path.name for path in (killed / "checkpoints").iterdir()
    ]
    assert sorted(left) == [".lock", "000010", "000012"]
