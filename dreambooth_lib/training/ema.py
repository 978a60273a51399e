"""EMA weights: an exponential moving average of the trained weights, by diffusers' EMAModel."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from dreambooth_lib.training.flat_parameters import Bucket
from dreambooth_lib.training.interrupts import defer_interrupts

#: What a checkpoint has of an EMAModel that is not loaded into it as it is.
_NOT_LOADED = ("shadow_params", "decay")


class EMA:
    """The EMA of ``parameters``, in float32; without a ``decay`` there is none to keep.

    diffusers' ``EMAModel`` keeps a tensor for each parameter: here they are views of one for each
    of the parameters' ``buckets``, so that an update takes a call or two.
    """

    def __init__(
        self, parameters: list[torch.nn.Parameter], buckets: list[Bucket], decay: float | None
    ):
        self.parameters, self.buckets, self.ema_model = parameters, buckets, None
        if decay is not None:
            from diffusers.training_utils import EMAModel

            self.ema_model = EMAModel([], decay=decay)
            self._average = [bucket.weights.detach().float().clone() for bucket in buckets]
            by_parameter = {
                parameter: view
                for bucket, average in zip(buckets, self._average, strict=True)
                for parameter, view in zip(bucket.parameters, bucket.split(average), strict=True)
            }
            self.ema_model.shadow_params = [by_parameter[parameter] for parameter in parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Average in the weights of the optimizer step just made."""
        if self.ema_model is None:
            return
        self.ema_model.optimization_step += 1
        decay = self.ema_model.get_decay(self.ema_model.optimization_step)
        for average, bucket in zip(self._average, self.buckets, strict=True):
            average.lerp_(bucket.weights.float(), 1 - decay)

    def by_name(self, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the EMA weights, if there are any, in place of the trained ``weights``."""
        if self.ema_model is None:
            return weights
        return dict(zip(weights, self.ema_model.shadow_params, strict=True))

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Swap in the EMA weights, if there are any, and restore the trained ones afterwards."""
        if self.ema_model is None:
            yield
            return
        self.ema_model.store(self.parameters)
        try:
            self.ema_model.copy_to(self.parameters)
            yield
        finally:
            with defer_interrupts():
                self.ema_model.restore(self.parameters)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint holds of the EMA: its state under "ema", or nothing."""
        return {} if self.ema_model is None else {"ema": self.ema_model.state_dict()}

    def load_state_dict(self, checkpoint: dict[str, Any], names: Iterable[str]) -> None:
        """Load the EMA of a checkpoint, or begin one with its weights where it has none.

        ``names`` are those of the parameters. The decay stays the config's.
        """
        if self.ema_model is None:
            return
        own = self.ema_model.shadow_params
        by_name = ema_by_name(checkpoint) if "ema" in checkpoint else checkpoint["model"]
        for average, name in zip(own, names, strict=True):  # a Drive backup may have rounded them
            average.copy_(by_name[name])
        kept = {k: v for k, v in checkpoint.get("ema", {}).items() if k not in _NOT_LOADED}
        self.ema_model.load_state_dict(kept)


def ema_by_name(checkpoint: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return a checkpoint's EMA weights by the names of its parameters."""
    return dict(zip(checkpoint["model"], checkpoint["ema"]["shadow_params"], strict=True))
