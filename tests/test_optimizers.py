"""Which optimizer is taken, what happens where it cannot load, and rates by hand."""

import builtins
import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.training import fused_optimizer
from dreambooth_lib.training.fused_optimizer import FusedBackwardOptimizer, round_stochastically
from dreambooth_lib.training.optimizer_step import NonFiniteStep
from dreambooth_lib.training.optimizers import (
    OptimizerUnavailable,
    make_optimizer,
    make_schedule,
    resolve_optimizer,
)

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
    assert resolve_optimizer(make_config("toybox", photos, optimizer=asked), device) == name


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


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_stochastic_rounding_keeps_the_mean_and_takes_a_neighbour() -> None:
    value = torch.full((200_000,), 1 + 2**-10)  # an eighth of bfloat16's spacing above 1
    found = round_stochastically(value, generator())
    assert found.dtype is torch.bfloat16
    assert set(found.tolist()) == {1.0, 1 + 2**-7}
    assert found.double().mean() == pytest.approx(1 + 2**-10, abs=3e-5)
    below = round_stochastically(-value, generator()).double().mean()
    assert below == pytest.approx(-(1 + 2**-10), abs=3e-5)


def test_what_bfloat16_can_hold_is_not_moved() -> None:
    exact = torch.randn(1000, generator=generator()).bfloat16().float()
    exact = torch.cat([exact, torch.tensor([0.0, -0.0, 1e-30, 3e38])]).bfloat16().float()
    assert torch.equal(round_stochastically(exact, generator(1)).float(), exact)


def small_layer(config: TrainConfig, dtype: torch.dtype, scale: float | None = None) -> Any:
    torch.manual_seed(0)
    layer = torch.nn.Linear(8, 8).to(dtype)
    return layer, optimizer_of(config, layer, scale)


def optimizer_of(
    config: TrainConfig, trainable: Any, scale: float | None = None
) -> FusedBackwardOptimizer:
    accelerator = Accelerator()
    if scale is not None:  # as on a GPU in float16
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    return FusedBackwardOptimizer(config, accelerator, trainable)


def update(optimizer: FusedBackwardOptimizer, loss: torch.Tensor) -> bool:
    optimizer.backward(loss)
    return optimizer.step()


@pytest.mark.parametrize("heap", [1, 10**9], ids=["one by one", "together"])
@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
@pytest.mark.parametrize("scale", [None, 1024.0])
def test_steps_within_the_backward_pass_are_those_after_it(
    name: str,
    scale: float | None,
    heap: int,
    photos: str,
    make_config: Make,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fused_optimizer, "CHUNK", heap)
    config = make_config("toybox", photos, optimizer=name, memory="low", learning_rate=0.01)
    layer, inside = small_layer(config, torch.float32, scale)
    torch.manual_seed(0)
    plain = torch.nn.Linear(8, 8)
    optimizer = make_optimizer(config, plain.parameters(), "cpu")
    if scale is not None:  # the first pass only shows that the scale fits
        before = layer.weight.detach().clone()
        assert not update(inside, layer(torch.ones(4, 8)).sum())
        assert torch.equal(layer.weight, before) and not inside.adam.state
    for step in range(5):
        x = torch.randn(4, 8, generator=generator(step))
        assert update(inside, layer(x).square().mean())
        assert all(parameter.grad is None for parameter in layer.parameters())
        plain(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert torch.allclose(layer.weight, plain.weight, atol=1e-6)
        assert torch.allclose(layer.bias, plain.bias, atol=1e-6)


def test_bfloat16_weights_move_by_less_than_their_spacing_on_average(
    photos: str, make_config: Make
) -> None:
    # Updates of 1e-4 on weights near 1, whose spacing is 8e-3: rounding to nearest loses them all.
    config = make_config("toybox", photos, memory="lowest", learning_rate=1e-4, weight_decay=0.0)
    weight = torch.nn.Parameter(torch.ones(20_000, dtype=torch.bfloat16))
    inside = optimizer_of(config, torch.nn.ParameterList([weight]))
    for _ in range(20):
        assert update(inside, weight.float().sum())
    assert weight.dtype is torch.bfloat16
    assert weight.double().mean().item() == pytest.approx(1 - 20e-4, abs=2e-4)


def overflowing(layer: Any, infinite: bool) -> torch.Tensor:
    """A loss whose gradient to the weight, but not to the bias, is infinite if asked."""
    loss = layer(torch.ones(1, 8)).sum()
    if infinite:
        handle = layer.weight.register_hook(lambda gradient: gradient * float("inf"))
        layer.weight.register_post_accumulate_grad_hook(lambda _: handle.remove())
    return loss


def test_nothing_moves_before_a_pass_has_shown_that_the_scale_fits(
    photos: str, make_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused_optimizer, "CHUNK", 1)  # else weight and bias are left out together
    layer, inside = small_layer(
        make_config("toybox", photos, memory="low"), torch.float32, scale=1024.0
    )
    before = [parameter.detach().clone() for parameter in layer.parameters()]
    for scale in (512.0, 256.0):
        assert not update(inside, overflowing(layer, True))
        assert inside.scale == scale
    assert not update(inside, overflowing(layer, False))
    assert all(map(torch.equal, layer.parameters(), before)) and inside.scale == 256.0
    assert update(inside, overflowing(layer, False))
    moved = [parameter.detach().clone() for parameter in layer.parameters()]
    assert not torch.equal(moved[0], before[0]) and not torch.equal(moved[1], before[1])
    # One that fitted so far and overflows is left out of its update, and tried again.
    assert update(inside, overflowing(layer, True))
    assert torch.equal(layer.weight, moved[0]) and not torch.equal(layer.bias, moved[1])
    assert inside.scale == 128.0 and inside.trying


@pytest.mark.parametrize("scale", [8.0, 1.0])
def test_the_scale_is_doubled_and_tried_after_enough_clean_updates(
    scale: float, photos: str, make_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FusedBackwardOptimizer, "GROWTH_INTERVAL", 3)
    layer, inside = small_layer(
        make_config("toybox", photos, memory="low"), torch.float32, scale=scale
    )
    made = [update(inside, overflowing(layer, False)) for _ in range(5)]
    assert made == [False, True, True, True, False] and inside.scale == 2 * scale


def test_without_a_scale_a_gradient_that_is_not_finite_is_an_error(
    photos: str, make_config: Make
) -> None:
    layer, inside = small_layer(make_config("toybox", photos, memory="low"), torch.float32)
    before = layer.weight.detach().clone()
    with pytest.raises(NonFiniteStep, match="the loss is nan"):
        update(inside, layer(torch.ones(1, 8)).sum() * float("nan"))
    with pytest.raises(NonFiniteStep, match="the gradient is nan"):
        update(inside, overflowing(layer, True))
    assert torch.equal(layer.weight, before)


def test_the_host_waits_for_a_gpu_once_a_heap_and_never_for_a_parameter(
    photos: str, make_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config("toybox", photos, memory="low", optimizer="adamw8bit")
    from bitsandbytes.optim import optimizer as of_bitsandbytes

    waits: list[str] = []
    monkeypatch.setattr(of_bitsandbytes, "sync_gpu", lambda _: waits.append("parameter"))
    asked = torch.Tensor.__bool__

    def counted(tensor: torch.Tensor) -> bool:
        waits.append("heap")
        return asked(tensor)

    layers = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(20)))
    inside = optimizer_of(config, layers)
    loss = layers(torch.ones(1, 64)).sum()
    monkeypatch.setattr(torch.Tensor, "__bool__", counted)
    update(inside, loss)
    assert waits == ["heap"]


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_after_a_state_is_loaded_the_schedules_rates_are_used(
    name: str, photos: str, make_config: Make
) -> None:
    config = make_config("toybox", photos, memory="low", optimizer=name, learning_rate=0.01)
    layer, inside = small_layer(config, torch.float32)
    update(inside, layer(torch.ones(1, 8)).sum())
    inside.adam.load_state_dict(inside.adam.state_dict())
    for group in inside.adam.param_groups:
        group["lr"] = 0.0
    before = layer.weight.detach().clone()
    update(inside, layer(torch.ones(1, 8)).sum())
    assert torch.equal(layer.weight, before)
