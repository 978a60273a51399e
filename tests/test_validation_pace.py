"""Test validation's share of the training time: what is skipped, and that weights are the same."""

import json
from collections.abc import Callable
from dataclasses import asdict
from itertools import count, islice, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.core.subject import Subject
from dreambooth_lib.training import loop, runs, validation_pace, validation_record
from dreambooth_lib.training.checkpoints import load_state
from dreambooth_lib.training.loop import train
from dreambooth_lib.training.runs import Run
from dreambooth_lib.training.validation import ValidationPlan
from dreambooth_lib.training.validation_pace import count_validations, is_wanted, skipped_steps
from dreambooth_lib.training.validation_record import ValidationResult, history, time_share

DOG = Subject("/photos", "dog")
Make = Callable[..., TrainConfig]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that sets how many seconds each step and each validation takes."""

    def tell(step: float, validation: float) -> None:
        for module, seconds in ((loop, step), (validation_record, validation)):
            ticks = count(0.0, seconds)
            fake = SimpleNamespace(perf_counter=lambda ticks=ticks: next(ticks))
            monkeypatch.setattr(module, "time", fake)

    return tell


@pytest.fixture
def started(
    tmp_path: Path, photos: str, make_config: Make, tiny_sd2: str, clip_folder: Path
) -> Callable[..., Run]:
    """Start runs of ten steps with a validation due after each, of at most 15% of the time."""

    def start(name: str, **changes: Any) -> Run:
        fields = {"steps": 10, "scorer": str(clip_folder), "validate_every": 1,
                  "validation_share": 0.15, "ema_decay": 0.5, "dropout": 0.2}  # fmt: skip
        run = runs.start(make_config(tiny_sd2, photos, **(fields | changes)), tmp_path / name)
        (run.folder / "validation").mkdir()
        plan = ValidationPlan(class_images=2, inference_steps=1)
        (run.folder / "validation" / "plan.json").write_text(json.dumps(asdict(plan)))
        return run

    return start


def validated(run: Run) -> list[int]:
    return [result.step for result in history(run)]


def weights(run: Run) -> dict[str, torch.Tensor]:
    state = load_state(run.checkpoints()[10])
    return state["model"] | dict(enumerate(state["ema"]["shadow_params"]))


def test_slow_and_quick_validations_give_the_same_weights(
    started: Callable[..., Run], clock: Callable[..., None]
) -> None:
    quick, slow = started("quick"), started("slow")
    clock(step=1.0, validation=0.1)
    list(train(quick))
    assert validated(quick) == [*range(11)] and skipped_steps(quick) == []
    clock(step=1.0, validation=0.5)  # three of them take 15% of ten seconds
    assert all(step.saved for step in train(slow)), "also where no validation was affordable"
    assert validated(slow) == [0, 5, 10] and time_share(slow) == pytest.approx(0.15)
    assert skipped_steps(slow) == [1, 2, 3, 4, 6, 7, 8, 9]
    for name, tensor in weights(quick).items():
        assert torch.equal(tensor, weights(slow)[name])
    assert [*quick.checkpoints()][-2:] == [*slow.checkpoints()][-2:] == [9, 10]


def test_base_and_last_step_are_validated_however_long_it_takes(
    started: Callable[..., Run], clock: Callable[..., None]
) -> None:
    run = started("run")
    clock(step=1.0, validation=100.0)
    list(train(run))
    assert validated(run) == [0, 10]


@pytest.mark.parametrize(
    "changes", [{"validation_share": None}, {"early_stop": True}], ids=["interval set", "stops"]
)
def test_a_set_interval_and_early_stopping_validate_at_each(
    changes: dict[str, Any], started: Callable[..., Run], clock: Callable[..., None]
) -> None:
    run = started("run", steps=3, **changes)
    clock(step=1.0, validation=100.0)
    list(train(run))
    assert validated(run) == [0, 1, 2, 3] and skipped_steps(run) == []


def test_a_resumed_run_goes_on_with_what_was_skipped(
    started: Callable[..., Run], clock: Callable[..., None]
) -> None:
    run, whole = started("run"), started("whole")
    clock(step=1.0, validation=0.5)
    list(train(whole))
    clock(step=1.0, validation=0.5)
    for _ in islice(train(run), 3):
        pass
    assert skipped_steps(run) == [1, 2, 3]
    # Interrupted at a step that was skipped, whose validation would cost nothing by now.
    clock(step=1.0, validation=0.0)
    resumed = train(runs.resume(run.folder))
    next(resumed)
    assert skipped_steps(run)[:3] == [1, 2, 3] and 3 not in validated(run)
    resumed.close()
    clock(step=1.0, validation=0.5)
    list(train(runs.resume(run.folder)))
    assert validated(run) == validated(whole)


@pytest.mark.parametrize("changes", [{"steps": 3}, {"early_stop": True}], ids=["end", "stops"])
def test_a_skipped_validation_is_made_where_the_run_now_needs_it(
    changes: dict[str, Any], started: Callable[..., Run], clock: Callable[..., None]
) -> None:
    run = started("run")
    clock(step=1.0, validation=0.5)
    for _ in islice(train(run), 3):
        pass
    assert 3 in skipped_steps(run)
    for _ in islice(train(runs.resume(run.folder, **changes)), 1):
        pass
    assert 3 in validated(run)


@pytest.mark.parametrize("step", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("one", [0.3, 2.0, 5.0, 40.0])
@pytest.mark.parametrize(("steps", "every"), [(500, 100), (1000, 250), (1000, 400), (130, 20)])
def test_validations_are_as_many_as_predicted_and_even(
    step: float, one: float, steps: int, every: int, tmp_path: Path
) -> None:
    config = TrainConfig(DOG, steps=steps, validate_every=every, validation_share=0.15)
    run = Run(tmp_path, config)

    def validate(number: int) -> None:
        row = ValidationResult(number, 0.5, 0.9, 0.3, 0.5, 0.0, 0.1, 0.0, {}, one)
        run.append("validation", asdict(row))

    validate(0)
    for number in range(1, steps + 1):
        row = {"step": number, "loss": 0.1, "instance_loss": 0.1, "lr": 0.1, "seconds": step}
        run.append("log", row)
        if (number % every == 0 or number == steps) and is_wanted(run, number):
            validate(number)
    found = validated(run)
    assert len(found) == count_validations(config, step, one) and found[-1] == steps
    assert time_share(run) <= 0.15 or found == [0, steps]
    gaps = [b - a for a, b in pairwise(found[:-1])]
    assert not gaps or max(gaps) - min(gaps) <= every


def test_only_a_default_interval_is_limited() -> None:
    default = TrainConfig(DOG)
    assert default.validation_share == 0.15 and default.validate_every == 125
    assert TrainConfig(DOG, validate_every=100).validation_share is None
    assert TrainConfig(DOG, validate_every=100, validation_share=0.3).validation_share == 0.3
    assert default.replace(validate_every=50).validation_share is None
    assert default.replace(validate_every=None).validation_share == 0.15
    assert default.replace(steps=9).validation_share == 0.15


def test_a_run_of_an_earlier_version_keeps_its_interval(started: Callable[..., Run]) -> None:
    old = started("old", steps=1, validation_share=None)
    list(train(old))
    now = old.config.replace(validation_share=0.15)
    assert runs.start_or_resume(now, old.folder).config == old.config
    assert validation_pace.share_limit(runs.resume(old.folder).config) is None
