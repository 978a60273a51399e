"""How a loss moves the weights: backward pass, clipping, AdamW, its schedule, and EMA weights.

:class:`Optimizer` steps after the backward pass; :class:`InBackward`, for little memory, within it.
An update of either is ``backward`` of each micro-batch's loss, then ``step``.
"""

import math
import signal
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator

from dreambooth_lib import lora
from dreambooth_lib.batches import seeded
from dreambooth_lib.config import TrainConfig
from dreambooth_lib.optim import make_optimizer, make_schedule, rounded
from dreambooth_lib.weights import Trainable, copy_weights


class NotFinite(FloatingPointError):
    """The loss or a gradient is NaN or infinite; the message says which."""


def check_finite(what: str, *values: float | None) -> None:
    """Raise :class:`NotFinite` unless all values are finite; None counts as finite."""
    if not all(math.isfinite(value) for value in values if value is not None):
        raise NotFinite(f"the {what} is {values[0]}")


class Optimizer:
    """AdamW on what is trained, with all that a resumed run needs of it; one in each process."""

    def __init__(self, config: TrainConfig, accelerator: Accelerator, trainable: Trainable):
        self.config, self.accelerator, self.trainable = config, accelerator, trainable
        self.parameters = lora.trained(trainable)
        self.updates = 0  #: made so far
        self.adam = make_optimizer(config, self._groups(), accelerator.device.type)
        self.schedule = make_schedule(config, self.adam)
        self.ema: Any = None
        if config.ema_decay is not None:
            from diffusers.training_utils import EMAModel

            whole: list[Any] = [parameter.detach().float() for parameter in self.parameters]
            self.ema = EMAModel(whole, decay=config.ema_decay)

    @property
    def lr(self) -> float:
        """The rate of the update to come."""
        return self.schedule.get_last_lr()[0]

    def guard(self) -> AbstractContextManager[None]:
        """Hold interrupts during backward passes, where these move weights."""
        return nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of a micro-batch's loss."""
        self.accelerator.backward(loss)

    def step(self) -> bool:
        """Make the update; False where fp16 overflowed, so that it has to be tried again.

        The loss scale is a smaller one by then. Raises :class:`NotFinite` where nothing is scaled.
        """
        if not self._move():
            return False
        self.updates += 1
        self.schedule.step()
        if self.ema is not None:
            self.ema.step(self.parameters)
        return True

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Swap in the weights that the run would end with now, and put its own back afterwards."""
        if self.ema is None:
            yield
            return
        own = [parameter.detach().to("cpu", copy=True) for parameter in self.parameters]
        try:
            self.ema.copy_to(self.parameters)
            yield
        finally:
            with interrupts_held():
                copy_weights(own, self.parameters)

    def take_average(self) -> None:
        """End with the averaged weights, where they are kept."""
        if self.ema is not None:
            self.ema.copy_to(self.parameters)

    def state(self) -> dict[str, Any]:
        """Return all that a resumed run needs."""
        state = {"step": self.updates, "model": self.trainable.state()}
        state["optimizer"] = self.adam.state_dict()
        if self.ema is not None:
            state["ema"] = self.ema.state_dict()
        return state | self._scale_state()

    def restore(self, saved: dict[str, Any]) -> None:
        """Take up a :meth:`state`, of any level of memory.

        The config may have been changed since: its rate and decay count, not the saved ones. A
        state without the optimizer's begins that anew, with a sentence.
        """
        self.updates = saved["step"]
        self.trainable.put(saved["model"])
        own, names = self.adam.state_dict()["param_groups"], self.trainable.state().keys()
        if saved["model"].keys() == names and self._is_own(saved.get("optimizer")):
            # Groups are many or one by the level of memory; the parameters' order is the same.
            self.adam.load_state_dict(saved["optimizer"] | {"param_groups": own})
        else:
            self.accelerator.print(
                f"The checkpoint of step {self.updates} has no state of this optimizer for these "
                "weights, so the optimizer starts afresh."
            )
        for group in self.adam.param_groups:
            group["initial_lr"] = group["lr"] = self.config.learning_rate
        self.schedule = make_schedule(self.config, self.adam, self.updates)
        if self.ema is not None and "ema" in saved:
            averages = dict(zip(saved["model"], saved["ema"]["shadow_params"], strict=True))
            shadow = {"shadow_params": [averages[name] for name in names]}
            self.ema.load_state_dict(saved["ema"] | shadow)
            # A copy on a drive may be in half precision.
            self.ema.to(self.accelerator.device, torch.float32)
        self._restore_scale(saved)

    def _is_own(self, state: dict[str, Any] | None) -> bool:
        """Return whether a saved state is of this kind of optimizer: 8 bits have other moments."""
        if state is None:
            return False
        torchs = isinstance(self.adam, torch.optim.AdamW)
        return all(("exp_avg" in moments) == torchs for moments in state["state"].values())

    def _groups(self) -> list[Any]:
        return self.parameters

    def _move(self) -> bool:
        scaler = self.accelerator.scaler
        if scaler is not None:
            scaler.unscale_(self.adam)
        limit = 1.0 if self.config.max_grad_norm is None else self.config.max_grad_norm
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, limit))
        if scaler is None:
            check_finite("gradient's norm", norm)
            self.adam.step()
        else:
            scale = scaler.get_scale()
            scaler.step(self.adam)
            scaler.update()
        self.adam.zero_grad()
        # Whether it stepped only the scale tells: a fused optimizer's step is called even where it
        # moves nothing. The scale always falls then.
        return scaler is None or scaler.get_scale() >= scale

    def _scale_state(self) -> dict[str, Any]:
        scaler = self.accelerator.scaler
        return {} if scaler is None else {"scaler": scaler.state_dict()}

    def _restore_scale(self, saved: dict[str, Any]) -> None:
        if self.accelerator.scaler is not None and "scaler" in saved:
            self.accelerator.scaler.load_state_dict(saved["scaler"])


#: Numbers of gradients that are checked and used together, 64 MiB in float32: the host waits for
#: the GPU once for each such heap instead of once for each parameter.
HEAP = 2**24


class InBackward(Optimizer):
    """Steps while ``backward`` runs, a heap of gradients at a time: they never exist together.

    A parameter in bfloat16 is stepped in float32 and rounded stochastically: up or down with a
    probability that keeps the mean, so that updates smaller than its spacing still add up.

    In float16 the loss is scaled, and gradients that overflow halve the scale. So that no update
    moves some weights and leaves others, backward passes move nothing until one has shown that the
    scale fits; it is doubled after ``GROWTH`` updates without an overflow, and tried anew then.
    What overflows all the same is left out of its update.
    """

    GROWTH = 2000

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
        return interrupts_held()

    def backward(self, loss: torch.Tensor) -> None:
        """Move the weights by a loss, or in float16 only try the scale.

        Raises :class:`NotFinite`: for a loss before any weight is moved.
        """
        check_finite("loss", loss.item())
        # The rounding is a function of seed and step.
        seed = seeded(self.config.seed, self.updates, 4).initial_seed()
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
        elif self._made and self.clean % self.GROWTH == 0:
            self.scale, self.trying = self.scale * 2, True

    def _move(self) -> bool:
        return self._made

    def _take(self, parameter: torch.nn.Parameter) -> None:
        if parameter.grad is not None:
            self._waiting.append(parameter)
            self._numbers += parameter.numel()
        if self._numbers >= HEAP:
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
                raise NotFinite("the gradient is nan")
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
                parameter.copy_(rounded(own.data, self._generator))
                own.data = own.data.new_empty(0)

    def _scale_state(self) -> dict[str, Any]:
        return {} if self.scale is None else {"scale": [self.scale, self.clean, self.trying]}

    def _restore_scale(self, saved: dict[str, Any]) -> None:
        scale = saved.get("scale", [1.0, 0])  # what was written where nothing is scaled
        if self.scale is not None and scale != [1.0, 0]:
            self.scale, self.clean, *trying = scale
            self.trying = any(trying)


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Let an interrupt take effect at the end of the block: what it writes, it writes whole."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: caught.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if caught:
        signal.raise_signal(caught[0])
