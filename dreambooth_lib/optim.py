"""Optimizers: 8-bit AdamW from bitsandbytes on a GPU, torch's fused AdamW on a CPU.

And one that steps within the backward pass, for little memory: each gradient is used and freed as
soon as it is there, so that all of them never exist together.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from dreambooth_lib.config import TrainConfig

if TYPE_CHECKING:
    import torch


class OptimizerUnavailable(RuntimeError):
    """bitsandbytes is missing or cannot load; the message says what to do."""


def choose(config: TrainConfig, device_type: str) -> str:
    """The optimizer's name that ``config.optimizer`` means on ``device_type``.

    "auto" is 8-bit AdamW on a GPU. On a CPU bitsandbytes works too, but a step there takes about
    ten times as long as torch's fused AdamW, so "auto" is the latter.
    """
    if config.optimizer != "auto":
        return config.optimizer
    return "adamw" if device_type == "cpu" else "adamw8bit"


def make_optimizer(
    config: TrainConfig, parameters: Iterable["torch.nn.Parameter"], device_type: str
) -> "torch.optim.Optimizer":
    """AdamW over ``parameters`` with the config's learning rate and weight decay.

    Each parameter is a group of its own, so that one can be stepped without the others. Raises
    :class:`OptimizerUnavailable` where 8-bit AdamW is asked for and cannot load; nothing else is
    ever taken in its place.
    """
    import torch

    settings: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    groups = [{"params": [parameter]} for parameter in parameters]
    if choose(config, device_type) == "adamw":
        return torch.optim.AdamW(groups, fused=True, **settings)
    try:
        from bitsandbytes.optim import AdamW8bit
    except Exception as error:  # a broken native library raises whatever its loader raises
        raise OptimizerUnavailable(
            f"8-bit AdamW is not available because bitsandbytes does not load ({error}); "
            "run 'pip install -U bitsandbytes' or set optimizer to 'adamw'."
        ) from error
    return AdamW8bit(groups, **settings)


def make_schedule(config: TrainConfig, optimizer: "torch.optim.Optimizer", step: int = 0) -> Any:
    """The learning-rate schedule over optimizer updates, warm-up included, from ``step`` on."""
    from diffusers.optimization import get_scheduler

    name = config.lr_schedule
    if name == "constant" and config.warmup_steps:
        name = "constant_with_warmup"
    return get_scheduler(
        name,
        optimizer,
        num_warmup_steps=config.warmup_steps,
        num_training_steps=config.steps,
        last_epoch=step - 1,
    )


class InBackward:
    """Steps an optimizer parameter by parameter while ``backward`` runs.

    A parameter in bfloat16 is stepped in float32 and rounded stochastically: up or down with a
    probability that keeps the mean, so that updates smaller than its spacing still add up. The
    loss may be scaled by ``scale``, as float16 needs: a parameter whose gradient overflows is left
    out of that update, the scale is halved, and doubled after ``GROWTH`` updates without one.
    """

    GROWTH = 2000

    def __init__(
        self,
        config: TrainConfig,
        parameters: "list[torch.nn.Parameter]",
        device_type: str,
        scale: float = 1.0,
    ):
        import torch

        self.scale, self.clean, self.overflowed = scale, 0, False
        #: What the optimizer steps: the parameter itself, or what stands for one in bfloat16.
        stepped = [
            parameter
            if parameter.dtype is torch.float32
            else torch.nn.Parameter(parameter.new_empty(0, dtype=torch.float32))
            for parameter in parameters
        ]
        self.optimizer = make_optimizer(config, stepped, device_type)
        self.group_of = dict(zip(parameters, self.optimizer.param_groups, strict=True))
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._step)

    def begin(self, generator: "torch.Generator") -> None:
        """Before an update's backward pass; all rounding is drawn from ``generator``."""
        self.generator, self.overflowed = generator, False

    def end(self) -> None:
        """After it: adapt the scale, where there is one."""
        if self.scale == 1.0:
            return
        self.clean = 0 if self.overflowed else self.clean + 1
        if self.overflowed:
            self.scale = max(1.0, self.scale / 2)
        elif self.clean % self.GROWTH == 0:
            self.scale *= 2

    def _step(self, parameter: "torch.nn.Parameter") -> None:
        import torch

        gradient, parameter.grad = parameter.grad, None
        if gradient is None:
            return
        gradient = gradient.float() / self.scale
        if not gradient.isfinite().all():
            if self.scale == 1.0:
                raise FloatingPointError("a gradient is not finite")
            self.overflowed = True
            return
        group = self.group_of[parameter]
        (stepped,) = group["params"]
        with torch.no_grad():
            if stepped is not parameter:
                stepped.data = parameter.float()
            stepped.grad = gradient
            every, self.optimizer.param_groups = self.optimizer.param_groups, [group]
            try:
                self.optimizer.step()
            finally:
                self.optimizer.param_groups = every
            stepped.grad = None
            if stepped is not parameter:
                parameter.copy_(rounded(stepped.data, self.generator))
                stepped.data = stepped.data.new_empty(0)


def rounded(value: "torch.Tensor", generator: "torch.Generator") -> "torch.Tensor":
    """float32 to bfloat16 by stochastic rounding (arXiv 2010.06192), of the same shape.

    A bfloat16 is the upper half of a float32's bits: random lower bits are added and cut off.
    """
    import torch

    bits = value.view(torch.int32)
    noise = torch.randint(
        1 << 16, bits.shape, generator=generator, device=bits.device, dtype=torch.int32
    )
    return ((bits + noise) & -(1 << 16)).view(torch.float32).bfloat16()
