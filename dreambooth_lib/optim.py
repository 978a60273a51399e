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
    config: TrainConfig, groups: "Iterable[torch.nn.Parameter] | list[dict[str, Any]]", device: str
) -> "torch.optim.Optimizer":
    """AdamW over parameters or groups of them, with the config's learning rate and weight decay.

    Raises :class:`OptimizerUnavailable` where 8-bit AdamW is asked for and cannot load; nothing
    else is ever taken in its place.
    """
    import torch

    settings: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    if choose(config, device) == "adamw":
        return torch.optim.AdamW(groups, fused=True, **settings)
    try:
        adamw8bit = _eight_bit()
    except Exception as error:  # a broken native library raises whatever its loader raises
        raise OptimizerUnavailable(
            f"8-bit AdamW is not available because bitsandbytes does not load ({error}); "
            "run 'pip install -U bitsandbytes' or set optimizer to 'adamw'."
        ) from error
    return adamw8bit(groups, **settings)


def _eight_bit() -> Any:
    """bitsandbytes' 8-bit AdamW without the wait for the GPU after every single parameter.

    Its own ``step`` synchronizes several hundred times an update. All kernels are launched on one
    stream, so that nothing has to be waited for.
    """
    import torch
    from bitsandbytes.optim import AdamW8bit as Waiting

    class AdamW8bit(Waiting):
        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            if not self.initialized:
                self.check_overrides()
                self.to_gpu()
                self.initialized = True
            for number, group in enumerate(self.param_groups):
                for index, parameter in enumerate(group["params"]):
                    if parameter.grad is None:
                        continue
                    if not self.state[parameter]:
                        self.init_state(group, parameter, number, index)
                    self.update_step(group, parameter, number, index)

    return AdamW8bit


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


#: Numbers of gradients that are checked and used together, 64 MiB in float32: the host waits for
#: the GPU once for each such heap instead of once for each parameter.
HEAP = 2**24


class InBackward:
    """Steps an optimizer while ``backward`` runs, a heap of gradients at a time.

    A parameter in bfloat16 is stepped in float32 and rounded stochastically: up or down with a
    probability that keeps the mean, so that updates smaller than its spacing still add up.

    With a ``scale`` the loss is scaled by it, as float16 needs, and gradients that overflow halve
    it. So that no update moves some weights and leaves others, backward passes move nothing until
    one has shown that the scale fits; it is doubled after ``GROWTH`` updates without an overflow,
    and tried anew then. What overflows all the same is left out of its update.
    """

    GROWTH = 2000

    def __init__(
        self,
        config: TrainConfig,
        parameters: "list[torch.nn.Parameter]",
        device_type: str,
        scale: float | None = None,
    ):
        import torch

        self.scale, self.clean = scale, 0
        self.trying, self.overflowed = scale is not None, False
        self._waiting: list[torch.nn.Parameter] = []
        self._numbers = 0  # of their gradients
        #: What the optimizer steps: the parameter itself, or what stands for one in bfloat16.
        stepped = [
            parameter
            if parameter.dtype is torch.float32
            else torch.nn.Parameter(parameter.new_empty(0, dtype=torch.float32))
            for parameter in parameters
        ]
        # Each is a group of its own, so that it can be stepped without the others.
        self.optimizer = make_optimizer(config, [{"params": [p]} for p in stepped], device_type)
        self._number = {parameter: number for number, parameter in enumerate(parameters)}
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._take)

    def backward(self, loss: "torch.Tensor", generator: "torch.Generator") -> bool:
        """Make an update by a loss; False where it only tried a scale. Rounds by ``generator``.

        Raises FloatingPointError for a gradient that is not finite where there is no scale.
        """
        self._generator, self.overflowed = generator, False
        self._waiting, self._numbers = [], 0  # of a pass that was interrupted
        (loss if self.scale is None else loss * self.scale).backward()
        self._step()
        if self.scale is None:
            return True
        made = not self.trying
        self.clean = 0 if self.overflowed or not made else self.clean + 1
        self.trying = self.overflowed
        if self.overflowed:
            self.scale /= 2
        elif made and self.clean % self.GROWTH == 0:
            self.scale, self.trying = self.scale * 2, True
        return made

    def _take(self, parameter: "torch.nn.Parameter") -> None:
        if parameter.grad is not None:
            self._waiting.append(parameter)
            self._numbers += parameter.numel()
        if self._numbers >= HEAP:
            self._step()

    def _step(self) -> None:
        """Use the gradients that wait, and free them."""
        import torch

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
                raise FloatingPointError("a gradient is not finite")
            self.overflowed = True
        elif not self.trying:
            self._move(parameters, gradients)

    def _move(
        self, parameters: "list[torch.nn.Parameter]", gradients: "list[torch.Tensor]"
    ) -> None:
        import torch

        # By number: loading a state puts other dicts in the groups' place.
        every = self.optimizer.param_groups
        groups = [every[self._number[parameter]] for parameter in parameters]
        with torch.no_grad():
            for parameter, gradient, group in zip(parameters, gradients, groups, strict=True):
                (stepped,) = group["params"]
                if stepped is not parameter:
                    stepped.data = parameter.float()
                stepped.grad = gradient
            self.optimizer.param_groups = groups
            try:
                self.optimizer.step()
            finally:
                self.optimizer.param_groups = every
            for parameter, group in zip(parameters, groups, strict=True):
                (stepped,) = group["params"]
                stepped.grad = None
                if stepped is not parameter:
                    parameter.copy_(rounded(stepped.data, self._generator))
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
