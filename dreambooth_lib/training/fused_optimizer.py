"""An optimizer that steps within the backward pass, for little memory.

Each gradient is used and freed soon after it is there, so that all of them never exist together.
"""

from contextlib import AbstractContextManager
from typing import Any

import torch
from accelerate import Accelerator

from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.training.batches import seeded_generator
from dreambooth_lib.training.optimizer_step import (
    NonFiniteStep,
    Optimizer,
    check_finite,
    defer_interrupts,
)
from dreambooth_lib.training.trainable import Trainable

#: Numbers of gradients that are checked and used together, 64 MiB in float32: the host waits for
#: the GPU once for each such heap instead of once for each parameter.
CHUNK = 2**24


class FusedBackwardOptimizer(Optimizer):
    """Steps while ``backward`` runs, a heap of gradients at a time.

    A parameter in bfloat16 is stepped in float32 and rounded stochastically: up or down with a
    probability that keeps the mean, so that updates smaller than its spacing still add up.

    In float16 the loss is scaled, and gradients that overflow halve the scale. So that no update
    moves some weights and leaves others, backward passes move nothing until one has shown that the
    scale fits; it is doubled after ``GROWTH_INTERVAL`` updates without an overflow, and tried anew then.
    What overflows all the same is left out of its update.
    """

    GROWTH_INTERVAL = 2000

    def __init__(self, config: TrainConfig, accelerator: Accelerator, trainable: Trainable):
        super().__init__(config, accelerator, trainable)
        scaler = accelerator.scaler
        self.scale = None if scaler is None else scaler.get_scale()
        self.clean = 0  # updates in a row without an overflow
        self.trying, self.overflowed, self._made = self.scale is not None, False, False
        self._waiting: list[torch.nn.Parameter] = []
        self._numbers = 0  # of their gradients
        self._number = {parameter: number for number, parameter in enumerate(self.parameters)}
        for parameter in self.parameters:
            parameter.register_post_accumulate_grad_hook(self._take)

    def _groups(self) -> list[Any]:
        # Each is a group of its own, so that it can be stepped without the others. What AdamW steps
        # is the parameter itself, or what stands for one in bfloat16.
        stepped = [
            parameter
            if parameter.dtype is torch.float32
            else torch.nn.Parameter(parameter.new_empty(0, dtype=torch.float32))
            for parameter in self.parameters
        ]
        return [{"params": [parameter]} for parameter in stepped]

    def guard(self) -> AbstractContextManager[None]:
        return defer_interrupts()

    def backward(self, loss: torch.Tensor) -> None:
        """Move the weights by a loss, or in float16 only try the scale.

        Raises :class:`NotFinite`: for a loss before any weight is moved.
        """
        check_finite("loss", loss.item())
        # The rounding is a function of seed and step.
        seed = seeded_generator(self.config.seed, self.updates, 4).initial_seed()
        self._generator = torch.Generator(self.accelerator.device).manual_seed(seed)
        self._waiting, self._numbers, self.overflowed = [], 0, False
        (loss if self.scale is None else loss * self.scale).backward()
        self._use()
        self._made = not self.trying
        if self.scale is None:
            return
        self.clean = self.clean + 1 if self._made and not self.overflowed else 0
        self.trying = self.overflowed
        if self.overflowed:
            self.scale /= 2
        elif self._made and self.clean % self.GROWTH_INTERVAL == 0:
            self.scale, self.trying = self.scale * 2, True

    def _move(self) -> bool:
        return self._made

    def _take(self, parameter: torch.nn.Parameter) -> None:
        if parameter.grad is not None:
            self._waiting.append(parameter)
            self._numbers += parameter.numel()
        if self._numbers >= CHUNK:
            self._use()

    def _use(self) -> None:
        """Step by the gradients that wait, and free them."""
        parameters = self._waiting
        self._waiting, self._numbers = [], 0
        gradients = [p.grad.float() for p in parameters if p.grad is not None]
        for parameter in parameters:
            parameter.grad = None
        if not gradients:
            return
        if self.scale is not None:
            torch._foreach_div_(gradients, self.scale)
        if not torch.nn.utils.get_total_norm(gradients).isfinite():
            if self.scale is None:
                raise NonFiniteStep("the gradient is nan")
            self.overflowed = True
        elif not self.trying:
            self._step(parameters, gradients)

    @torch.no_grad()
    def _step(self, parameters: list[torch.nn.Parameter], gradients: list[torch.Tensor]) -> None:
        # By number: loading a state puts other dicts in the groups' place.
        every = self.adam.param_groups
        groups = [every[self._number[parameter]] for parameter in parameters]
        stepped = [group["params"][0] for group in groups]
        for parameter, own, gradient in zip(parameters, stepped, gradients, strict=True):
            if own is not parameter:
                own.data = parameter.float()
            own.grad = gradient
        self.adam.param_groups = groups
        try:
            self.adam.step()
        finally:
            self.adam.param_groups = every
        for parameter, own in zip(parameters, stepped, strict=True):
            own.grad = None
            if own is not parameter:
                parameter.copy_(round_stochastically(own.data, self._generator))
                own.data = own.data.new_empty(0)

    def _scale_state(self) -> dict[str, Any]:
        return {} if self.scale is None else {"scale": [self.scale, self.clean, self.trying]}

    def _restore_scale(self, saved: dict[str, Any]) -> None:
        scale = saved.get("scale", [1.0, 0])  # what was written where nothing is scaled
        if self.scale is not None and scale != [1.0, 0]:
            self.scale, self.clean, *trying = scale
            self.trying = any(trying)


def round_stochastically(value: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """float32 to bfloat16 by stochastic rounding (arXiv 2010.06192), of the same shape.

    A bfloat16 is the upper half of a float32's bits: random lower bits are added and cut off.
    """
    bits = value.view(torch.int32)
    noise = torch.randint(
        1 << 16, bits.shape, generator=generator, device=bits.device, dtype=torch.int32
    )
    return ((bits + noise) & -(1 << 16)).view(torch.float32).bfloat16()
