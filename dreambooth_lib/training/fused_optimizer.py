"""An optimizer that steps during the backward pass, to save memory.

Each gradient is freed soon after it is computed, so that they never all exist at once.
"""

import math
import weakref
from typing import Any

import torch
from accelerate import Accelerator

from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.training.batches import seeded_generator
from dreambooth_lib.training.flat_parameters import Bucket
from dreambooth_lib.training.optimizer_step import NonFiniteStep, Optimizer, check_finite
from dreambooth_lib.training.trainable import Trainable


class FusedBackwardOptimizer(Optimizer):
    """Steps while the backward pass runs, a bucket of weights as soon as it has its gradients.

    A bfloat16 parameter is updated in float32 and rounded stochastically: up or down with a
    probability that preserves the mean, so that updates smaller than its spacing still add up.

    In float16 the loss is scaled, and gradients that overflow halve the scale. So that no step
    updates some weights and not others, a new scale is probed first: backward passes update
    nothing until one shows that it fits. The scale is doubled, and probed again, after enough
    steps without an overflow. Gradients that overflow all the same count as 0.

    The host never waits for gradients: whether a step's were finite, it reads with the next one's
    losses, before that changes a weight.
    """

    LARGEST_BUCKET = 2**23  # 32 MiB in float32

    def __init__(self, config: TrainConfig, accelerator: Accelerator, trainable: Trainable):
        super().__init__(config, accelerator, trainable)
        self.probing = self.scale is not None
        self._loss: torch.Tensor | None = None  # of the step, until it is made
        #: The norm of the last backward pass's gradients [1], until it is read.
        self._unread: torch.Tensor | None = None
        self._missing: list[int] = []  # gradients of each bucket that the backward pass still owes
        self._norms: list[torch.Tensor] = []  # of the buckets that have theirs
        # A parameter's hooks are out of the garbage collector's sight, so a hook that held the
        # optimizer would keep it, and all that it trains, for the rest of the session.
        collect = weakref.WeakMethod(self._collect)
        for number, bucket in enumerate(self.buckets):
            for parameter in bucket.parameters:
                parameter.register_post_accumulate_grad_hook(
                    lambda _, collect=collect, number=number: collect()(number)
                )

    def backward(self, loss: torch.Tensor) -> None:
        """Keep the step's loss; :meth:`step` runs its backward pass, which updates the weights."""
        self._loss = loss

    def read(self, losses: torch.Tensor) -> list[float]:
        """Wait for the step's losses [K] and return them.

        Raises :class:`NonFiniteStep` where the first is not finite, or where the loss is not
        scaled and the last step's gradients were not.
        """
        unread = losses.new_zeros(1) if self._unread is None else self._unread
        *values, norm = torch.cat([losses, unread]).tolist()
        self._judge(norm)
        check_finite("loss", values[0])
        return values

    def check_gradients(self) -> None:
        """Read whether the last step's gradients were finite; raise if they were not."""
        if self._unread is not None:
            self._judge(self._unread.item())

    def _judge(self, norm: float) -> None:
        """Adapt the loss scale to the last backward pass by its gradients' norm."""
        if self._unread is None:
            return
        if self.scale is None and not math.isfinite(norm):
            raise NonFiniteStep("the gradient is nan", step=self.completed_steps)
        self._unread, stepped = None, not self.probing
        if self.scale is None:
            return
        finite, scale = math.isfinite(norm), self.scale
        if stepped or not finite:
            self._adapt_scale(finite)
        self.probing = not finite or self.scale > scale

    def _apply_gradients(self) -> bool:
        """Run the backward pass; return whether it updated the weights."""
        assert self._loss is not None
        loss, self._loss = self._loss, None
        # Stochastic rounding is a function of seed and step.
        seed = seeded_generator(self.config.seed, self.completed_steps, 4).initial_seed()
        self._generator = torch.Generator(self.accelerator.device).manual_seed(seed)
        self._missing = [len(bucket.parameters) for bucket in self.buckets]
        self._norms = []
        probing = self.probing
        self._backward(loss)
        for number, bucket in enumerate(self.buckets):  # those of weights without a gradient
            if any(parameter.grad is not None for parameter in bucket.parameters):
                self._step_bucket(number)
        self._unread = torch.linalg.vector_norm(torch.stack(self._norms)).reshape(1)
        return not probing

    def _collect(self, number: int) -> None:
        self._missing[number] -= 1
        if self._missing[number] == 0:
            self._step_bucket(number)

    @torch.no_grad()
    def _step_bucket(self, number: int) -> None:
        """Step a bucket by its gradients, and free them."""
        bucket: Bucket = self.buckets[number]
        gradient, own = bucket.take_gradients(), bucket.stepped
        self._norms.append(torch.linalg.vector_norm(gradient))
        if self.probing:
            return
        if self.scale is not None:
            self._scale_gradients(1 / self.scale, gradient.nan_to_num_(0.0, 0.0, 0.0))
        if bucket.weights.dtype is not torch.float32:
            own.data = bucket.weights.float()
        own.grad = gradient
        groups = self.adam.param_groups
        self.adam.param_groups = [groups[number]]
        try:
            self.adam.step()
        finally:
            self.adam.param_groups = groups
        if self.anchors:
            self._pull_to_anchor(number)
        bucket.clear_gradients()
        if bucket.weights.dtype is not torch.float32:
            bucket.weights.copy_(round_stochastically(own.data, self._generator))
            own.data = own.data.new_empty(0)

    def _loss_scale(self) -> list[Any]:
        return [*super()._loss_scale(), self.probing]

    def _load_loss_scale(self, saved: dict[str, Any]) -> None:
        super()._load_loss_scale(saved)
        if len(scale := saved.get("scale", ())) > 2:
            self.probing = scale[2]


def round_stochastically(value: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Round float32 to bfloat16 stochastically (arXiv 2010.06192), keeping the shape.

    A bfloat16 is the upper half of a float32's bits: add random lower bits, then truncate.
    """
    bits = value.view(torch.int32)
    noise = torch.randint(
        1 << 16, bits.shape, generator=generator, device=bits.device, dtype=torch.int32
    )
    return ((bits + noise) & -(1 << 16)).view(torch.float32).bfloat16()
