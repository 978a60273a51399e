"""An optimizer that steps during the backward pass, to save memory.

Each gradient is freed soon after it is computed, so that they never all exist at once.
"""

from contextlib import AbstractContextManager
from typing import Any

import torch
from accelerate import Accelerator

from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.training.batches import seeded_generator
from dreambooth_lib.training.interrupts import defer_interrupts
from dreambooth_lib.training.optimizer_step import NonFiniteStep, Optimizer, check_finite
from dreambooth_lib.training.trainable import Trainable

#: Gradient elements that are checked and applied together, 64 MiB in float32: the host waits for
#: the GPU once for each such chunk instead of once for each parameter.
CHUNK = 2**24


class FusedBackwardOptimizer(Optimizer):
    """Steps while ``backward`` runs, a chunk of gradients at a time.

    A bfloat16 parameter is updated in float32 and rounded stochastically: up or down with a
    probability that preserves the mean, so that updates smaller than its spacing still add up.

    In float16 the loss is scaled, and gradients that overflow halve the scale. So that no step
    updates some weights and skips others, a new scale is probed first: backward passes update
    nothing until one shows that it fits. The scale is doubled, and probed again, after
    ``GROWTH_INTERVAL`` steps without an overflow. Chunks that overflow all the same are skipped.
    """

    GROWTH_INTERVAL = 2000

    def __init__(self, config: TrainConfig, accelerator: Accelerator, trainable: Trainable):
        super().__init__(config, accelerator, trainable)
        scaler = accelerator.scaler
        self.scale = None if scaler is None else scaler.get_scale()
        self.clean_steps = 0  # in a row, without an overflow
        self.probing, self.overflowed = self.scale is not None, False
        self._stepped = False  # by the last backward pass
        self._pending: list[torch.nn.Parameter] = []  # those whose gradients are not applied yet
        self._pending_elements = 0
        self._group_index = {parameter: index for index, parameter in enumerate(self.parameters)}
        for parameter in self.parameters:
            parameter.register_post_accumulate_grad_hook(self._collect)

    def _param_groups(self) -> list[Any]:
        # A group for each parameter, so that it can be stepped without the others. AdamW steps the
        # parameter itself, or a float32 stand-in for one in bfloat16.
        stepped = [
            parameter
            if parameter.dtype is torch.float32
            else torch.nn.Parameter(parameter.new_empty(0, dtype=torch.float32))
            for parameter in self.parameters
        ]
        return [{"params": [parameter]} for parameter in stepped]

    def backward_context(self) -> AbstractContextManager[None]:
        """Defer interrupts: these backward passes update the weights."""
        return defer_interrupts()

    def backward(self, loss: torch.Tensor) -> None:
        """Update the weights by a loss, or only probe the loss scale in float16.

        Raises :class:`NonFiniteStep`; for a non-finite loss, before any weight is updated.
        """
        check_finite("loss", loss.item())
        # Stochastic rounding is a function of seed and step.
        seed = seeded_generator(self.config.seed, self.completed_steps, 4).initial_seed()
        self._generator = torch.Generator(self.accelerator.device).manual_seed(seed)
        self._pending, self._pending_elements, self.overflowed = [], 0, False
        (loss if self.scale is None else loss * self.scale).backward()
        self._apply_pending()
        self._stepped = not self.probing
        if self.scale is None:
            return
        self.clean_steps = self.clean_steps + 1 if self._stepped and not self.overflowed else 0
        self.probing = self.overflowed
        if self.overflowed:
            self.scale /= 2
        elif self._stepped and self.clean_steps % self.GROWTH_INTERVAL == 0:
            self.scale, self.probing = self.scale * 2, True

    def _apply_gradients(self) -> bool:
        return self._stepped

    def _collect(self, parameter: torch.nn.Parameter) -> None:
        if parameter.grad is not None:
            self._pending.append(parameter)
            self._pending_elements += parameter.numel()
        if self._pending_elements >= CHUNK:
            self._apply_pending()

    def _apply_pending(self) -> None:
        """Step by the pending gradients, and free them."""
        parameters = self._pending
        self._pending, self._pending_elements = [], 0
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
        elif not self.probing:
            self._step_parameters(parameters, gradients)

    @torch.no_grad()
    def _step_parameters(
        self, parameters: list[torch.nn.Parameter], gradients: list[torch.Tensor]
    ) -> None:
        # By index: loading a state replaces the groups' dicts.
        all_groups = self.adam.param_groups
        groups = [all_groups[self._group_index[parameter]] for parameter in parameters]
        stepped = [group["params"][0] for group in groups]
        for parameter, own, gradient in zip(parameters, stepped, gradients, strict=True):
            if own is not parameter:
                own.data = parameter.float()
            own.grad = gradient
        self.adam.param_groups = groups
        try:
            self.adam.step()
        finally:
            self.adam.param_groups = all_groups
        for parameter, own in zip(parameters, stepped, strict=True):
            own.grad = None
            if own is not parameter:
                parameter.copy_(round_stochastically(own.data, self._generator))
                own.data = own.data.new_empty(0)

    def _loss_scale_state(self) -> dict[str, Any]:
        if self.scale is None:
            return {}
        return {"scale": [self.scale, self.clean_steps, self.probing]}

    def _load_loss_scale(self, saved: dict[str, Any]) -> None:
        scale = saved.get("scale", [1.0, 0])  # as earlier versions wrote it without scaling
        if self.scale is not None and scale != [1.0, 0]:
            self.scale, self.clean_steps, *probing = scale
            self.probing = any(probing)


def round_stochastically(value: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Round float32 to bfloat16 stochastically (arXiv 2010.06192), keeping the shape.

    A bfloat16 is the upper half of a float32's bits: add random lower bits, then truncate.
    """
    bits = value.view(torch.int32)
    noise = torch.randint(
        1 << 16, bits.shape, generator=generator, device=bits.device, dtype=torch.int32
    )
    return ((bits + noise) & -(1 << 16)).view(torch.float32).bfloat16()
