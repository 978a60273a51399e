"""Weights side by side in flat tensors are updated, saved and resumed as weights by themselves."""

from collections.abc import Callable
from copy import deepcopy
from itertools import count
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.core.config_checks import CHOICES
from dreambooth_lib.training.flat_parameters import BLOCK, make_buckets
from dreambooth_lib.training.fused_optimizer import FusedBackwardOptimizer
from dreambooth_lib.training.optimizer_step import Optimizer
from dreambooth_lib.training.optimizers import OPTIMIZERS, make_optimizer

Make = Callable[..., TrainConfig]
Kind = type[Optimizer]

#: Beside whole blocks: a rest, moments in float32, a single number.
SHAPES = [(64, 65), (5,), (128, 64), (3, 7, 11), (80, 80), ()]


class Weights(torch.nn.Module):
    """Weights of any shape, with what the optimizer asks of a trainable."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.all = torch.nn.ParameterList([torch.randn(shape).to(dtype) for shape in SHAPES])

    def trained_weights(self) -> dict[str, torch.Tensor]:
        return dict(self.named_parameters())

    @torch.no_grad()
    def load_weights(self, weights: dict[str, torch.Tensor]) -> None:
        for name, parameter in self.named_parameters():
            parameter.copy_(weights[name])

    def loss(self, number: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(number)
        targets = [torch.randn(shape, generator=generator) for shape in SHAPES]
        # Small gradients, so that none is clipped.
        pairs = zip(self.all, targets, strict=True)
        return torch.stack([(w.float() * x).mean() for w, x in pairs]).sum() * 1e-2


def optimizer_of(kind: Kind, config: TrainConfig, weights: Weights) -> Optimizer:
    return kind(config, Accelerator(), weights)  # type: ignore[arg-type]


def step(optimizer: Optimizer, loss: torch.Tensor) -> None:
    optimizer.backward(loss)
    optimizer.read(loss.detach().reshape(1))
    assert optimizer.step()


@pytest.fixture(params=[(Optimizer, 2**28), (Optimizer, 9000), (FusedBackwardOptimizer, 9000)])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Kind:
    kind, largest = request.param
    monkeypatch.setattr(kind, "LARGEST_BUCKET", largest)
    return kind


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_a_step_is_that_of_each_weight_by_itself(
    name: str, kind: Kind, make_config: Make, photos: str
) -> None:
    """The moments too; so a checkpoint of weights stepped one by one is resumed.

    8-bit AdamW's bit by bit. torch's computes the last numbers of a tensor by other instructions.
    """
    exact = name == "adamw8bit"
    memory = "low" if kind is FusedBackwardOptimizer else "standard"
    config = make_config("toybox", photos, optimizer=name, memory=memory, learning_rate=0.01)
    flat, plain = Weights(), Weights()
    optimizer, by_itself = (
        optimizer_of(kind, config, flat),
        make_optimizer(config, plain.parameters(), "cpu"),
    )

    def both(number: int) -> None:
        step(optimizer, flat.loss(number))
        plain.loss(number).backward()
        by_itself.step()
        by_itself.zero_grad()
        assert_same(flat.trained_weights(), plain.trained_weights(), exact)

    numbers = count()
    for _ in range(3):
        both(next(numbers))
    saved, expected = optimizer.state_dict()["optimizer"]["state"], by_itself.state_dict()["state"]
    assert_same(saved, expected, exact)
    state = optimizer.state_dict()
    state["optimizer"] |= {"state": deepcopy(expected)}
    flat = Weights()
    optimizer = optimizer_of(kind, config, flat)
    optimizer.load_state_dict(state)
    for _ in range(3):
        both(next(numbers))


def assert_same(value: Any, other: Any, exact: bool) -> None:
    if isinstance(value, dict):
        assert value.keys() == other.keys()
        for name in value:
            assert_same(value[name], other[name], exact)
    elif isinstance(value, torch.Tensor):
        assert value.shape == other.shape
        assert torch.equal(value, other) if exact else torch.allclose(value, other, 1e-5, 1e-6)
    else:
        assert value == other


@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.NAdam])
def test_an_optimizer_of_ones_own_is_resumed(
    make: Any,
    kind: Kind,
    make_config: Make,
    photos: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """NAdam keeps a product of its own, one number for all weights."""
    monkeypatch.setitem(OPTIMIZERS, "own", make)
    monkeypatch.setitem(CHOICES, "optimizer", ("adamw", "own"))
    memory = "low" if kind is FusedBackwardOptimizer else "standard"
    config = make_config("toybox", photos, optimizer="own", memory=memory, learning_rate=0.01)
    complete, left = Weights(), Weights()
    throughout, optimizer = (optimizer_of(kind, config, w) for w in (complete, left))
    for number in range(5):
        if number == 3:
            saved = deepcopy(optimizer.state_dict())
            optimizer = optimizer_of(kind, config, left := Weights())
            optimizer.load_state_dict(saved)
        step(throughout, complete.loss(number))
        step(optimizer, left.loss(number))
    assert_same(left.trained_weights(), complete.trained_weights(), exact=True)
    assert "afresh" not in capsys.readouterr().out
    optimizer_of(kind, config.replace(optimizer="adamw"), left).load_state_dict(saved)
    assert "no state of this optimizer" in capsys.readouterr().out


def test_the_rest_of_a_bucket_stays_zero_after_a_resume(make_config: Make, photos: str) -> None:
    config = make_config("toybox", photos, optimizer="adamw8bit", learning_rate=0.01)
    weights = Weights()
    optimizer = optimizer_of(Optimizer, config, weights)
    for number in range(6):
        step(optimizer, weights.loss(number))
        if number == 2:
            saved = deepcopy(optimizer.state_dict())
            optimizer = optimizer_of(Optimizer, config, weights)
            optimizer.load_state_dict(saved)
    for bucket in optimizer.buckets:
        rest = bucket.weights.clone()
        for place in bucket.places:
            rest[place] = 0
        assert rest.abs().max() < 1e-3


def test_a_weight_without_a_gradient_keeps_its_value(make_config: Make, photos: str) -> None:
    config = make_config("toybox", photos, weight_decay=0.0)
    weights = Weights()
    optimizer = optimizer_of(Optimizer, config, weights)
    before = weights.all[1].detach().clone()
    step(optimizer, weights.all[0].mean())
    assert torch.equal(weights.all[1], before)


def test_buckets_hold_all_weights_once_by_dtype_and_size() -> None:
    weights, halves = Weights(), Weights(torch.bfloat16)
    parameters = [*weights.parameters(), *halves.parameters()]
    before = [parameter.detach().clone() for parameter in parameters]
    buckets = make_buckets(parameters, 9000)
    held = [parameter for bucket in buckets for parameter in bucket.parameters]
    assert {*map(id, held)} == {*map(id, parameters)} and len(held) == len(parameters)
    assert all(map(torch.equal, parameters, before))
    for bucket in buckets:
        assert bucket.weights.numel() % BLOCK == 0
        assert {parameter.dtype for parameter in bucket.parameters} == {bucket.weights.dtype}
        small = {parameter.numel() < 4096 for parameter in bucket.parameters}
        assert small == {not bucket.has_8bit_moments}
        bucket.weights.zero_()
    assert not any(parameter.any() for parameter in parameters)  # they are views
