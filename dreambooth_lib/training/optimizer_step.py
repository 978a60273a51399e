"""How a loss moves the weights: backward pass, clipping, AdamW, its schedule, and EMA weights."""

import math
import signal
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator

from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.training import lora
from dreambooth_lib.training.optimizers import make_optimizer, make_schedule
from dreambooth_lib.training.trainable import Trainable, copy_weights

#: Tries of one update in float16, each at half the loss scale, before it is given up.
MAX_SKIPPED_STEPS = 30


class NonFiniteStep(FloatingPointError):
    """The loss or a gradient is NaN or infinite: what it is, what was tried, what may help."""

    def __init__(self, what: str, tried: str = "", fix: str | None = None):
        super().__init__(what)
        self.what, self.tried, self.fix = what, tried, fix


def check_finite(what: str, *values: float | None) -> None:
    """Raise :class:`NotFinite` unless all values are finite; None counts as finite."""
    if not all(math.isfinite(value) for value in values if value is not None):
        raise NonFiniteStep(f"the {what} is {values[0]}")


class Optimizer:
    """AdamW on what is trained, with all that a resumed run needs of it; one in each process.

    An update is :meth:`backward` of each micro-batch's loss, then :meth:`step`.
    """

    def __init__(self, config: TrainConfig, accelerator: Accelerator, trainable: Trainable):
        self.config, self.accelerator, self.trainable = config, accelerator, trainable
        self.parameters = lora.trained_parameters(trainable)
        self.updates = 0  #: made so far
        self.skipped = 0  #: tries in a row of the update to come
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
        """Make the update; False where float16 overflowed: try it again, at the new loss scale.

        Raises :class:`NotFinite` where nothing is scaled, or no scale helps.
        """
        if not self._move():
            self.skipped += 1
            if self.skipped == MAX_SKIPPED_STEPS:
                raise NonFiniteStep(
                    "the gradients overflow float16",
                    f", however the loss is scaled ({MAX_SKIPPED_STEPS} tries)",
                    "use mixed_precision 'no', or 'bf16' where the GPU has it",
                )
            return False
        self.updates, self.skipped = self.updates + 1, 0
        self.schedule.step()
        if self.ema is not None:
            self.ema.step(self.parameters)
        return True

    @contextmanager
    def ema_weights(self) -> Iterator[None]:
        """Swap in the weights that the run would end with now, and put its own back afterwards."""
        if self.ema is None:
            yield
            return
        own = [parameter.detach().to("cpu", copy=True) for parameter in self.parameters]
        try:
            self.ema.copy_to(self.parameters)
            yield
        finally:
            with defer_interrupts():
                copy_weights(own, self.parameters)

    def load_ema_weights(self) -> None:
        """End with the averaged weights, where they are kept."""
        if self.ema is not None:
            self.ema.copy_to(self.parameters)

    def state(self) -> dict[str, Any]:
        """Return all that a resumed run needs."""
        state = {"step": self.updates, "model": self.trainable.trained_weights()}
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
        self.trainable.load_weights(saved["model"])
        own, names = self.adam.state_dict()["param_groups"], self.trainable.trained_weights().keys()
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


@contextmanager
def defer_interrupts() -> Iterator[None]:
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
