"""Train text encoders at a rate of their own, and stop them after a step."""

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.core.config_types import ConfigError
from dreambooth_lib.core.subject import Subject
from dreambooth_lib.training import runs
from dreambooth_lib.training.checkpoints import drop_optimizer, load_state
from dreambooth_lib.training.loop import train, training_steps
from dreambooth_lib.training.memory_estimate import estimate
from dreambooth_lib.training.runs import Run
from dreambooth_lib.training.setup import Trainer
from dreambooth_lib.training.trainable import Trainable

Weights = dict[str, torch.Tensor]
TEXT = "text_encoders."

#: Every way of stepping: all at once, in the backward pass, with bfloat16 weights, 8-bit moments,
#: adapters, a token.
WAYS: dict[str, dict[str, Any]] = {
    "standard": {"memory": "standard"},
    "anchored": {"memory": "standard", "anchor_weight": 20.0},
    "8-bit": {"memory": "standard", "optimizer": "adamw8bit"},
    "micro-batches": {"memory": "standard", "gradient_accumulation": 2},
    "low": {"memory": "low"},
    "lowest": {"memory": "lowest", "mixed_precision": "bf16"},
    "lora": {"method": "lora", "learning_rate": 1e-2},
    "token": {"method": "lora", "train_token": True, "train_text_encoder": False,
              "subject_identifier": "newword"},
}  # fmt: skip


@pytest.fixture
def started(start_run: Callable[..., Run]) -> Callable[..., Run]:
    def start(name: str, way: str = "standard", family: str = "sd1", **changes: Any) -> Run:
        fields = {"steps": 4, "train_text_encoder": True, "checkpoints_kept": 9} | WAYS[way]
        if identifier := fields.pop("subject_identifier", None):
            run = start_run(f"{name}-photos", family)
            fields["subject"] = Subject(run.config.subject.photos, "dog", str(identifier))
        return start_run(name, family, **(fields | changes))

    return start


def weights_at(run: Run, step: int) -> tuple[Weights, Weights]:
    """Return the denoiser's and the text encoders' weights of a checkpoint."""
    weights = load_state(run.checkpoints()[step], ("model",))["model"]
    text = {name: value for name, value in weights.items() if name.startswith(TEXT)}
    return {name: v for name, v in weights.items() if name not in text}, text


def moved(first: Weights, second: Weights) -> bool:
    return any(not torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("way", WAYS)
def test_text_encoders_do_not_move_after_their_last_step(
    way: str, started: Callable[..., Run]
) -> None:
    run = started("run", way, text_encoder_steps=2)
    list(train(run))
    at = {step: weights_at(run, step) for step in (1, 2, 3, 4)}
    assert moved(at[1][1], at[2][1])
    assert not moved(at[2][1], at[3][1]) and not moved(at[2][1], at[4][1])
    assert moved(at[2][0], at[3][0]) and moved(at[3][0], at[4][0])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("leave_at", [1, 2])
def test_a_run_that_is_left_before_or_after_that_step_resumes_bit_for_bit(
    way: str, leave_at: int, started: Callable[..., Run]
) -> None:
    own = {"text_encoder_steps": 2, "text_encoder_learning_rate": 2e-3, "lr_schedule": "cosine"}
    complete, left = started("complete", way, **own), started("left", way, **own)
    list(train(complete))
    list(islice(train(left), leave_at))
    rest = list(train(runs.resume(left.folder)))
    assert [step.step for step in rest] == [*range(leave_at + 1, 5)]
    for first, second in zip(weights_at(complete, 4), weights_at(left, 4), strict=True):
        assert first.keys() == second.keys() and not moved(first, second)
    assert not moved(weights_at(left, 2)[1], weights_at(left, 4)[1])


@pytest.mark.parametrize("way", ["standard", "8-bit", "low"])
def test_an_optimizer_that_started_afresh_after_that_step_is_resumed(
    way: str, started: Callable[..., Run], capsys: pytest.CaptureFixture[str]
) -> None:
    run = started("run", way, steps=5, text_encoder_steps=1)
    list(islice(train(run), 2))
    drop_optimizer(run.checkpoints()[2])
    for is_afresh in (True, False):
        list(islice(train(runs.resume(run.folder)), 1))
        assert ("afresh" in capsys.readouterr().out) == is_afresh
    list(train(runs.resume(run.folder)))
    assert "afresh" not in capsys.readouterr().out
    assert moved(weights_at(run, 4)[0], weights_at(run, 5)[0])


@pytest.mark.parametrize("way", ["standard", "8-bit", "low", "lora"])
def test_text_encoders_take_steps_of_their_own_size(way: str, started: Callable[..., Run]) -> None:
    """Adam's first step is the rate, for a gradient of any size."""
    changes = {"steps": 1, "weight_decay": 0.0, "learning_rate": 1e-3}
    alike = started("alike", way, **changes)
    slower = started("slower", way, text_encoder_learning_rate=1e-4, **changes)
    trained = Trainer(alike).trainable.trained_weights()
    before = {name: value.detach().clone() for name, value in trained.items()}
    for run in (alike, slower):
        (step,) = train(run)
        assert step.lr == 1e-3  # the denoiser's
    (denoiser, text), (own_denoiser, own_text) = (weights_at(run, 1) for run in (alike, slower))
    assert all(torch.allclose(own_denoiser[n], v, atol=1e-7) for n, v in denoiser.items())
    for name, value in text.items():
        change, own_change = value - before[name], own_text[name] - before[name]
        assert torch.allclose(own_change, change / 10, rtol=1e-3, atol=1e-7), name
    assert moved(text, {name: before[name] for name in text})


def test_a_rate_changed_on_resume_is_used_and_a_run_can_be_given_one(
    started: Callable[..., Run],
) -> None:
    run = started("run", weight_decay=0.0)
    list(islice(train(run), 2))
    resumed = runs.resume(run.folder, text_encoder_learning_rate=1e-12)
    list(train(resumed))
    before, after = weights_at(run, 2)[1], weights_at(run, 4)[1]
    assert max(float((after[n] - v).abs().max()) for n, v in before.items()) < 1e-7
    assert moved(weights_at(run, 2)[0], weights_at(run, 4)[0])


def test_a_rate_equal_to_the_denoisers_trains_the_same(started: Callable[..., Run]) -> None:
    plain = started("plain", max_grad_norm=1e9)
    own = started("own", text_encoder_learning_rate=1e-3, max_grad_norm=1e9)
    for first, second in zip(train(plain), train(own), strict=True):
        assert first.loss == second.loss and first.lr == second.lr
    for first, second in zip(weights_at(plain, 4), weights_at(own, 4), strict=True):
        assert all(torch.allclose(value, second[name], atol=1e-6) for name, value in first.items())


@pytest.mark.parametrize("way", ["standard", "micro-batches", "lora"])
def test_whether_stopped_gradients_are_computed_makes_no_difference(
    way: str, started: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several processes compute them; clipping must not count them."""
    fields = {"text_encoder_steps": 1, "max_grad_norm": 1e-3}
    frozen, computed = started("frozen", way, **fields), started("computed", way, **fields)
    list(train(frozen))
    never = property(lambda self: False, lambda self, value: None)
    monkeypatch.setattr(Trainable, "text_is_frozen", never, raising=False)
    list(train(computed))
    for first, second in zip(weights_at(frozen, 4), weights_at(computed, 4), strict=True):
        assert not moved(first, second)


def test_no_gradients_are_computed_of_stopped_text_encoders(started: Callable[..., Run]) -> None:
    trainer = Trainer(started("run", text_encoder_steps=1))
    needed = []
    forward = trainer.family.conditioning

    def conditioning(prompts: list[str]) -> dict[str, torch.Tensor]:
        cond = forward(prompts)
        needed.append(cond["encoder_hidden_states"].requires_grad)
        return cond

    trainer.family.conditioning = conditioning  # type: ignore[method-assign]
    list(training_steps(trainer))
    assert needed == [True, False, False, False]


@pytest.mark.parametrize("name", ["text_encoder_learning_rate", "text_encoder_steps"])
def test_settings_of_text_encoders_that_do_not_train_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} is set, but no text encoder is trained; set"):
        TrainConfig(Subject("photos", "dog"), **{name: 1})
    with pytest.raises(ConfigError, match=f"{name} is 0"):
        TrainConfig(Subject("photos", "dog"), train_text_encoder=True, **{name: 0})
    TrainConfig(Subject("photos", "dog"), train_token=True, method="lora", **{name: 1})


def test_the_estimate_is_that_of_text_encoders_trained_to_the_end(
    started: Callable[..., Run], tmp_path: Path
) -> None:
    config = started("run").config
    own = config.replace(text_encoder_steps=2, text_encoder_learning_rate=1e-6)
    assert estimate(own) == estimate(config)
