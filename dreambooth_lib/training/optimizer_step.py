"""The optimizer step: backward pass, gradient clipping, AdamW, its schedule and the EMA weights."""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator

from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.training import lora
from dreambooth_lib.training.ema import EMA
from dreambooth_lib.training.optimizers import make_optimizer, make_schedule
from dreambooth_lib.training.trainable import Trainable

#: Tries of one step in float16, each at half the loss scale of the one before.
MAX_SKIPPED_STEPS = 30


class NonFiniteStep(FloatingPointError):
    """The loss or a gradient is NaN or infinite: what it is, what was tried, what may help."""

    def __init__(self, what: str, tried: str = "", fix: str | None = None):
        super().__init__(what)
        self.what, self.tried, self.fix = what, tried, fix


def check_finite(what: str, *values: float | None) -> None:
    """Raise :class:`NonFiniteStep` unless all values are finite; None counts as finite."""
    if not all(math.isfinite(value) for value in values if value is not None):
        raise NonFiniteStep(f"the {what} is {values[0]}")


class Optimizer:
    """AdamW on the trained weights, with its schedule, loss scale and EMA; one in each process.

    A step is :meth:`backward` of each micro-batch's loss, then :meth:`step`.
    """

    def __init__(self, config: TrainConfig, accelerator: Accelerator, trainable: Trainable):
        self.config, self.accelerator, self.trainable = config, accelerator, trainable
        self.parameters = lora.trained_parameters(trainable)
        self.completed_steps = 0
        self.skipped_steps = 0  #: since the last completed one
        self.adam = make_optimizer(config, self._param_groups(), accelerator.device.type)
        self.schedule = make_schedule(config, self.adam)
        self.ema = EMA(self.parameters, config.ema_decay)

    @property
    def lr(self) -> float:
        """Return the learning rate of the next step."""
        return self.schedule.get_last_lr()[0]

    def backward_context(self) -> AbstractContextManager[None]:
        """Return the context for the backward passes: here none is needed."""
        return nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate the gradients of a micro-batch's loss."""
        self.accelerator.backward(loss)

    def step(self) -> bool:
        """Update the weights; False where float16 overflowed: retry, at the new loss scale.

        Raises :class:`NonFiniteStep` where the loss is not scaled, or no scale helps.
        """
        if not self._apply_gradients():
            self.skipped_steps += 1
            if self.skipped_steps == MAX_SKIPPED_STEPS:
                raise NonFiniteStep(
                    "the gradients overflow float16",
                    f", even after {MAX_SKIPPED_STEPS} tries at smaller and smaller loss scales",
                    "use mixed_precision 'no', or 'bf16' where the GPU supports it",
                )
            return False
        self.completed_steps, self.skipped_steps = self.completed_steps + 1, 0
        self.schedule.step()
        self.ema.update()
        return True

    def state_dict(self) -> dict[str, Any]:
        """Return all that a resumed run needs."""
        state = {"step": self.completed_steps, "model": self.trainable.trained_weights()}
        state["optimizer"] = self.adam.state_dict()
        return state | self.ema.state_dict() | self._loss_scale_state()

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Load a :meth:`state_dict`, of any memory level.

        The config may have changed since: its learning rate and weight decay count, not the saved
        ones. If the optimizer's state does not fit, the optimizer starts afresh and says so.
        """
        self.completed_steps = saved["step"]
        self.trainable.load_weights(saved["model"])
        own, names = self.adam.state_dict()["param_groups"], self.trainable.trained_weights().keys()
        if saved["model"].keys() == names and self._is_own_state(saved.get("optimizer")):
            # The memory level decides whether groups are many or one, never the parameters' order.
            self.adam.load_state_dict(saved["optimizer"] | {"param_groups": own})
        else:
            self.accelerator.print(
                f"The checkpoint of step {self.completed_steps} has no state of this optimizer for "
                "these weights, so the optimizer starts afresh."
            )
        for group in self.adam.param_groups:
            group["initial_lr"] = group["lr"] = self.config.learning_rate
        self.schedule = make_schedule(self.config, self.adam, self.completed_steps)
        self.ema.load_state_dict(saved, names)
        self._load_loss_scale(saved)

    def _is_own_state(self, state: dict[str, Any] | None) -> bool:
        """Return whether a saved state is of this kind of optimizer: 8-bit moments differ."""
        if state is None:
            return False
        is_torch = isinstance(self.adam, torch.optim.AdamW)
        return all(("exp_avg" in moments) == is_torch for moments in state["state"].values())

    def _param_groups(self) -> list[Any]:
        return self.parameters

    def _apply_gradients(self) -> bool:
        """Clip the gradients and step by them; False where float16 overflowed."""
        scaler = self.accelerator.scaler
        if scaler is not None:
            scaler.unscale_(self.adam)
        limit = 1.0 if self.config.max_grad_norm is None else self.config.max_grad_norm
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, limit))
        if scaler is None:
            check_finite("gradient norm", norm)
            self.adam.step()
        else:
            scale = scaler.get_scale()
            scaler.step(self.adam)
            scaler.update()
        self.adam.zero_grad()
        # Only the scale tells whether the weights changed: a fused optimizer's step is called even
        # where it changes nothing. The scale always falls then.
        return scaler is None or scaler.get_scale() >= scale

    def _loss_scale_state(self) -> dict[str, Any]:
        scaler = self.accelerator.scaler
        return {} if scaler is None else {"scaler": scaler.state_dict()}

    def _load_loss_scale(self, saved: dict[str, Any]) -> None:
        if self.accelerator.scaler is not None and "scaler" in saved:
            self.accelerator.scaler.load_state_dict(saved["scaler"])
