"""Which optimizer is used, what happens if it does not load, and learning rates by hand."""

import builtins
import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from dreambooth_lib.core.config import TrainConfig
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
    ("optimizer", "device", "name"),
    [
        ("auto", "cpu", "adamw"),
        ("auto", "cuda", "adamw8bit"),
        ("adamw", "cuda", "adamw"),
        ("adamw8bit", "cpu", "adamw8bit"),
    ],
)
def test_auto_is_eight_bit_only_on_a_gpu_and_a_name_is_used_as_it_is(
    optimizer: str, device: str, name: str, photos: str, make_config: Make
) -> None:
    assert resolve_optimizer(make_config("toybox", photos, optimizer=optimizer), device) == name


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_the_optimizer_has_the_configs_settings_and_updates_weights(
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
    # AdamW's first step is the learning rate against the gradient's sign, after the decay.
    expected = torch.full((8,), 1 - 0.5 * 0.25 - 0.5)
    assert torch.allclose(weight.detach(), expected, atol=1e-4)


@pytest.mark.parametrize("error", [ImportError("No module"), OSError("libcudart.so"), RuntimeError])
def test_if_bitsandbytes_does_not_load_the_error_names_both_remedies(
    error: Any, photos: str, make_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def failing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("bitsandbytes"):
            raise error
        return real(name, *args, **kwargs)

    for module in [name for name in sys.modules if name.startswith("bitsandbytes")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(builtins, "__import__", failing)
    parameters = [torch.nn.Parameter(torch.ones(2))]
    config = make_config("toybox", photos, optimizer="adamw8bit")
    with pytest.raises(OptimizerUnavailable, match=r"pip install -U bitsandbytes.*'adamw'"):
        make_optimizer(config, parameters, "cpu")
    # "auto" on a GPU does not fall back, and torch's AdamW needs no bitsandbytes.
    with pytest.raises(OptimizerUnavailable):
        make_optimizer(config.replace(optimizer="auto"), parameters, "cuda")
    on_a_cpu = make_optimizer(config.replace(optimizer="auto"), parameters, "cpu")
    assert isinstance(on_a_cpu, torch.optim.AdamW)


def learning_rates(config: TrainConfig) -> list[float]:
    """Return the learning rate of each step of a run."""
    optimizer = make_optimizer(config, [torch.nn.Parameter(torch.ones(1))], "cpu")
    schedule = make_schedule(config, optimizer)
    rates = []
    for _ in range(config.steps or 0):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


@pytest.mark.parametrize(
    ("schedule", "warmup", "factors"),
    [
        ("constant", 0, [1, 1, 1, 1, 1, 1]),
        ("constant", 3, [0, 1 / 3, 2 / 3, 1, 1, 1]),
        ("linear", 0, [1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
        ("linear", 2, [0, 1 / 2, 1, 3 / 4, 2 / 4, 1 / 4]),
        ("cosine", 0, [(1 + math.cos(math.pi * k / 6)) / 2 for k in range(6)]),
        ("cosine", 2, [0, 1 / 2, *((1 + math.cos(math.pi * k / 4)) / 2 for k in range(4))]),
    ],
)
def test_learning_rates_match_those_computed_by_hand(
    schedule: str, warmup: int, factors: list[float], photos: str, make_config: Make
) -> None:
    config = make_config(
        "toybox", photos, steps=6, lr_schedule=schedule, warmup_steps=warmup, learning_rate=0.01
    )
    assert learning_rates(config) == pytest.approx([0.01 * factor for factor in factors], abs=1e-12)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_stochastic_rounding_preserves_the_mean_and_picks_a_neighbour() -> None:
    value = torch.full((200_000,), 1 + 2**-10)  # an eighth of bfloat16's spacing above 1
    rounded = round_stochastically(value, generator())
    assert rounded.dtype is torch.bfloat16
    assert set(rounded.tolist()) == {1.0, 1 + 2**-7}
    assert rounded.double().mean() == pytest.approx(1 + 2**-10, abs=3e-5)
    below = round_stochastically(-value, generator()).double().mean()
    assert below == pytest.approx(-(1 + 2**-10), abs=3e-5)


def test_values_that_bfloat16_represents_are_unchanged() -> None:
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


def step(optimizer: FusedBackwardOptimizer, loss: torch.Tensor) -> bool:
    optimizer.backward(loss)
    optimizer.read(loss.detach().reshape(1))
    stepped = optimizer.step()
    optimizer.check_gradients()
    return stepped


@pytest.mark.parametrize("chunk", [1, 10**9], ids=["one by one", "together"])
@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
@pytest.mark.parametrize("scale", [None, 1024.0])
def test_steps_during_the_backward_pass_equal_those_after_it(
    name: str,
    scale: float | None,
    chunk: int,
    photos: str,
    make_config: Make,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(FusedBackwardOptimizer, "LARGEST_BUCKET", chunk)
    config = make_config("toybox", photos, optimizer=name, memory="low", learning_rate=0.01)
    layer, fused = small_layer(config, torch.float32, scale)
    torch.manual_seed(0)
    plain = torch.nn.Linear(8, 8)
    optimizer = make_optimizer(config, plain.parameters(), "cpu")
    if scale is not None:  # the first pass only probes the scale
        before = layer.weight.detach().clone()
        assert not step(fused, layer(torch.ones(4, 8)).sum())
        assert torch.equal(layer.weight, before) and not fused.adam.state
    for number in range(5):
        x = torch.randn(4, 8, generator=generator(number))
        assert step(fused, layer(x).square().mean())
        assert all(parameter.grad is None for parameter in layer.parameters())
        plain(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert torch.allclose(layer.weight, plain.weight, atol=1e-6)
        assert torch.allclose(layer.bias, plain.bias, atol=1e-6)


def test_bfloat16_weights_change_by_less_than_their_spacing_on_average(
    photos: str, make_config: Make
) -> None:
    # Steps of 1e-4 on weights near 1, whose spacing is 8e-3: rounding to nearest loses them all.
    config = make_config("toybox", photos, memory="lowest", learning_rate=1e-4, weight_decay=0.0)
    weight = torch.nn.Parameter(torch.ones(20_000, dtype=torch.bfloat16))
    fused = optimizer_of(config, torch.nn.ParameterList([weight]))
    for _ in range(20):
        assert step(fused, weight.float().sum())
    assert weight.dtype is torch.bfloat16
    assert weight.double().mean().item() == pytest.approx(1 - 20e-4, abs=2e-4)


def overflowing(layer: Any, infinite: bool) -> torch.Tensor:
    """Return a loss whose gradient is infinite for the weight, not the bias, if asked."""
    loss = layer(torch.ones(1, 8)).sum()
    if infinite:
        handle = layer.weight.register_hook(lambda gradient: gradient * float("inf"))
        layer.weight.register_post_accumulate_grad_hook(lambda _: handle.remove())
    return loss


def test_no_weight_changes_before_a_pass_shows_that_the_scale_fits(
    photos: str, make_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, fused = small_layer(
        make_config("toybox", photos, memory="low"), torch.float32, scale=1024.0
    )
    before = [parameter.detach().clone() for parameter in layer.parameters()]
    for scale in (512.0, 256.0):
        assert not step(fused, overflowing(layer, True))
        assert fused.scale == scale
    assert not step(fused, overflowing(layer, False))
    assert all(map(torch.equal, layer.parameters(), before)) and fused.scale == 256.0
    assert step(fused, overflowing(layer, False))
    changed = [parameter.detach().clone() for parameter in layer.parameters()]
    assert not torch.equal(changed[0], before[0]) and not torch.equal(changed[1], before[1])
    # A scale that fitted so far and overflows: what did counts as 0, and the scale is probed anew.
    assert step(fused, overflowing(layer, True))
    assert layer.weight.isfinite().all() and not torch.equal(layer.bias, changed[1])
    assert fused.scale == 128.0 and fused.probing


@pytest.mark.parametrize("scale", [8.0, 1.0])
def test_the_scale_is_doubled_and_probed_after_enough_clean_steps(
    scale: float, photos: str, make_config: Make
) -> None:
    layer, fused = small_layer(
        make_config("toybox", photos, memory="low"), torch.float32, scale=scale
    )
    fused.growth_interval = 3
    completed = [step(fused, overflowing(layer, False)) for _ in range(5)]
    assert completed == [False, True, True, True, False] and fused.scale == 2 * scale


def test_without_a_scale_a_non_finite_gradient_is_an_error(photos: str, make_config: Make) -> None:
    layer, fused = small_layer(make_config("toybox", photos, memory="low"), torch.float32)
    before = layer.weight.detach().clone()
    with pytest.raises(NonFiniteStep, match="the loss is nan"):
        step(fused, layer(torch.ones(1, 8)).sum() * float("nan"))
    assert torch.equal(layer.weight, before)
    with pytest.raises(NonFiniteStep, match="the gradient is nan"):
        step(fused, overflowing(layer, True))


def test_weights_of_a_non_finite_gradient_are_never_saved(photos: str, make_config: Make) -> None:
    layer, fused = small_layer(make_config("toybox", photos, memory="low"), torch.float32)
    loss = overflowing(layer, True)
    fused.backward(loss)
    fused.read(loss.detach().reshape(1))
    assert fused.step()  # the host has not waited for the gradient
    with pytest.raises(NonFiniteStep, match="the gradient is nan"):
        fused.state_dict()


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_after_a_state_is_loaded_the_schedules_learning_rates_are_used(
    name: str, photos: str, make_config: Make
) -> None:
    config = make_config("toybox", photos, memory="low", optimizer=name, learning_rate=0.01)
    layer, fused = small_layer(config, torch.float32)
    step(fused, layer(torch.ones(1, 8)).sum())
    fused.adam.load_state_dict(fused.adam.state_dict())
    for group in fused.adam.param_groups:
        group["lr"] = 0.0
    before = layer.weight.detach().clone()
    step(fused, layer(torch.ones(1, 8)).sum())
    assert torch.equal(layer.weight, before)
