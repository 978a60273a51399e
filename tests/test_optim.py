"""Which optimizer is taken, what happens where it cannot load, and rates by hand."""

import builtins
import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from dreambooth_lib.config import TrainConfig
from dreambooth_lib.optim import OptimizerUnavailable, choose, make_optimizer, make_schedule

Make = Callable[..., TrainConfig]


@pytest.mark.parametrize(
    ("asked", "device", "name"),
    [
        ("auto", "cpu", "adamw"),
        ("auto", "cuda", "adamw8bit"),
        ("adamw", "cuda", "adamw"),
        ("adamw8bit", "cpu", "adamw8bit"),
    ],
)
def test_auto_is_eight_bit_on_a_gpu_only_and_a_name_is_taken_at_its_word(
    asked: str, device: str, name: str, photos: str, make_config: Make
) -> None:
    assert choose(make_config("toybox", photos, optimizer=asked), device) == name


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_the_optimizer_has_the_configs_settings_and_moves_weights(
    name: str, photos: str, make_config: Make
) -> None:
    config = make_config("toybox", photos, optimizer=name, learning_rate=0.5, weight_decay=0.25)
    weight = torch.nn.Parameter(torch.ones(8))
    optimizer = make_optimizer(config, iter([weight]), "cpu")
    assert type(optimizer).__name__.lower() == name
    (group,) = optimizer.param_groups
    assert (group["lr"], group["weight_decay"]) == (0.5, 0.25)
    weight.grad = torch.ones(8)
    optimizer.step()
    # AdamW's first update is the rate against the gradient's sign, after the decay.
    expected = torch.full((8,), 1 - 0.5 * 0.25 - 0.5)
    assert torch.allclose(weight.detach(), expected, atol=1e-4)


@pytest.mark.parametrize("error", [ImportError("No module"), OSError("libcudart.so"), RuntimeError])
def test_where_bitsandbytes_does_not_load_the_error_names_both_ways_out(
    error: Any, photos: str, make_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def failing(name: str, *given: Any, **named: Any) -> Any:
        if name.startswith("bitsandbytes"):
            raise error
        return real(name, *given, **named)

    for module in [name for name in sys.modules if name.startswith("bitsandbytes")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(builtins, "__import__", failing)
    parameters = [torch.nn.Parameter(torch.ones(2))]
    config = make_config("toybox", photos, optimizer="adamw8bit")
    with pytest.raises(OptimizerUnavailable, match=r"pip install -U bitsandbytes.*'adamw'"):
        make_optimizer(config, parameters, "cpu")
    # "auto" on a GPU is no softer, and torch's AdamW needs no bitsandbytes.
    with pytest.raises(OptimizerUnavailable):
        make_optimizer(config.replace(optimizer="auto"), parameters, "cuda")
    assert type(make_optimizer(config.replace(optimizer="auto"), parameters, "cpu")) is (
        torch.optim.AdamW
    )


def rates(config: TrainConfig) -> list[float]:
    """The learning rate that each of the run's updates is made with."""
    optimizer = make_optimizer(config, [torch.nn.Parameter(torch.ones(1))], "cpu")
    schedule = make_schedule(config, optimizer)
    found = []
    for _ in range(config.steps or 0):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize(
    ("schedule", "warmup", "shares"),
    [
        ("constant", 0, [1, 1, 1, 1, 1, 1]),
        ("constant", 3, [0, 1 / 3, 2 / 3, 1, 1, 1]),
        ("linear", 0, [1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
        ("linear", 2, [0, 1 / 2, 1, 3 / 4, 2 / 4, 1 / 4]),
        ("cosine", 0, [(1 + math.cos(math.pi * k / 6)) / 2 for k in range(6)]),
        ("cosine", 2, [0, 1 / 2, *((1 + math.cos(math.pi * k / 4)) / 2 for k in range(4))]),
    ],
)
def test_rates_are_those_computed_by_hand(
    schedule: str, warmup: int, shares: list[float], photos: str, make_config: Make
) -> None:
    config = make_config(
        "toybox", photos, steps=6, lr_schedule=schedule, warmup_steps=warmup, learning_rate=0.01
    )
    assert rates(config) == pytest.approx([0.01 * share for share in shares], abs=1e-12)
