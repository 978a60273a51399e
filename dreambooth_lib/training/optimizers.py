"""AdamW, of 8 bits on a GPU, torch's fused one on a CPU, and its schedule."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from dreambooth_lib.core.config import TrainConfig

if TYPE_CHECKING:
    import torch


class OptimizerUnavailable(RuntimeError):
    """bitsandbytes is missing or cannot load; the message says what to do."""


def resolve_optimizer(config: TrainConfig, device_type: str) -> str:
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
    if resolve_optimizer(config, device) == "adamw":
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
