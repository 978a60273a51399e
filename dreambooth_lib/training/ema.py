"""EMA weights: an exponential moving average of the trained weights, by diffusers' EMAModel."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from dreambooth_lib.training.interrupts import defer_interrupts


class EMA:
    """The EMA of ``parameters``, in float32; without a ``decay`` there is none to keep."""

    def __init__(self, parameters: list[torch.nn.Parameter], decay: float | None):
        self.parameters, self.ema_model = parameters, None
        if decay is not None:
            from diffusers.training_utils import EMAModel

            initial: list[Any] = [parameter.detach().float() for parameter in parameters]
            self.ema_model = EMAModel(initial, decay=decay)

    def update(self) -> None:
        """Average in the weights of the optimizer step just made."""
        if self.ema_model is not None:
            self.ema_model.step(self.parameters)

    def load_weights(self) -> None:
        """Overwrite the trained weights with the EMA weights, if there are any."""
        if self.ema_model is not None:
            self.ema_model.copy_to(self.parameters)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Swap in the EMA weights, if there are any, and restore the trained ones afterwards."""
        if self.ema_model is None:
            yield
            return
        self.ema_model.store(self.parameters)
        try:
            self.load_weights()
            yield
        finally:
            with defer_interrupts():
                self.ema_model.restore(self.parameters)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint holds of the EMA: its state under "ema", or nothing."""
        return {} if self.ema_model is None else {"ema": self.ema_model.state_dict()}

    def load_state_dict(self, checkpoint: dict[str, Any], names: Iterable[str]) -> None:
        """Load the EMA of a checkpoint that has one; ``names`` are those of the parameters."""
        if self.ema_model is None or "ema" not in checkpoint:
            return
        by_name = ema_by_name(checkpoint)
        shadow = {"shadow_params": [by_name[name] for name in names]}
        self.ema_model.load_state_dict(checkpoint["ema"] | shadow)
        # A Drive backup may be in half precision.
        self.ema_model.to(self.parameters[0].device, torch.float32)


def ema_by_name(checkpoint: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return a checkpoint's EMA weights by the names of its parameters."""
    return dict(zip(checkpoint["model"], checkpoint["ema"]["shadow_params"], strict=True))
