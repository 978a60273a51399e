"""AdamW and its learning-rate schedule: 8-bit on a GPU, torch's fused one on a CPU."""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.core.errors import KitError

if TYPE_CHECKING:
    import torch


class OptimizerUnavailable(KitError, RuntimeError):
    """bitsandbytes is missing or does not load; the message says what to do."""


def resolve_optimizer(config: TrainConfig, device_type: str) -> str:
    """Return the optimizer that ``config.optimizer`` means on ``device_type``.

    "auto" is 8-bit AdamW on a GPU by NVIDIA or AMD. On a CPU bitsandbytes works too, but a step
    takes about ten times as long as with torch's fused AdamW, so "auto" is the latter.
    """
    if config.optimizer != "auto":
        return config.optimizer
    return "adamw8bit" if device_type == "cuda" else "adamw"


def make_optimizer(
    config: TrainConfig, groups: "Iterable[torch.nn.Parameter] | list[dict[str, Any]]", device: str
) -> "torch.optim.Optimizer":
    """Make the config's optimizer for parameters, or for groups of them.

    AdamW has a ``gradient_scale`` by which a step multiplies the gradients as it reads them.
    Raises :class:`OptimizerUnavailable` where 8-bit AdamW is asked for and does not load; nothing
    else ever takes its place.
    """
    make = OPTIMIZERS[resolve_optimizer(config, device)]
    return make(groups, lr=config.learning_rate, weight_decay=config.weight_decay)


def _adamw(groups: Any, **settings: Any) -> "torch.optim.Optimizer":
    import torch

    class AdamW(torch.optim.AdamW):
        gradient_scale = 1.0

        def step(self, closure: Any = None) -> Any:
            self.grad_scale = None  # by which torch's fused step divides
            if self.gradient_scale != 1:
                device = self.param_groups[0]["params"][0].device
                self.grad_scale = torch.full((), 1 / self.gradient_scale, device=device)
            return super().step(closure)

    return AdamW(groups, fused=True, **settings)


def _adamw8bit(groups: Any, **settings: Any) -> "torch.optim.Optimizer":
    try:
        adamw8bit = _unsynchronized_adamw8bit()
    except Exception as error:  # a broken native library raises whatever its loader raises
        raise OptimizerUnavailable(
            f"8-bit AdamW is not available because bitsandbytes does not load ({error}); "
            "run 'pip install -U bitsandbytes' or set optimizer to 'adamw'."
        ) from error
    return adamw8bit(groups, **settings)


#: Functions that make an optimizer from parameters or groups, lr and weight_decay, by the names of
#: ``config_checks.CHOICES``. Add one here to add an optimizer (docs/architecture.md). It must step
#: each number by itself, as AdamW does: many weights come as one (:mod:`.flat_parameters`).
OPTIMIZERS: "dict[str, Callable[..., torch.optim.Optimizer]]" = {
    "adamw": _adamw,
    "adamw8bit": _adamw8bit,
}


def _unsynchronized_adamw8bit() -> Any:
    """Return bitsandbytes' 8-bit AdamW without its wait for the GPU after every parameter.

    All kernels are launched on one stream, so there is nothing to wait for. A group may have
    ``optim_bits`` of its own, and gradients are scaled by the kernel that reads them.
    """
    import torch
    from bitsandbytes.functional import optimizer_update_8bit_blockwise
    from bitsandbytes.optim import AdamW8bit as Synchronized

    class AdamW8bit(Synchronized):
        gradient_scale = 1.0

        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            if not self.initialized:
                self.check_overrides()
                self.to_gpu()
                self.initialized = True
            for group_index, group in enumerate(self.param_groups):
                for index, parameter in enumerate(group["params"]):
                    if parameter.grad is None:
                        continue
                    if not self.state[parameter]:
                        self.init_state(group, parameter, group_index, index)
                    self.update_step(group, parameter, group_index, index)

        def update_step(self, group: Any, p: Any, gindex: int, pindex: int) -> None:
            state, (beta1, beta2) = self.state[p], group["betas"]
            if state["state1"].dtype is not torch.uint8:
                p.grad.mul_(self.gradient_scale)
                super().update_step(group, p, gindex, pindex)
                return
            state["step"] += 1
            optimizer_update_8bit_blockwise(
                "adam", p.grad, p, state["state1"], state["state2"], beta1, beta2, 0.0, 0.0,
                group["eps"], state["step"], group["lr"], state["qmap1"], state["qmap2"],
                state["absmax1"], state["absmax2"], group["weight_decay"],
                gnorm_scale=self.gradient_scale,
            )  # fmt: skip

        def get_config(self, gindex: int, pindex: int, group: dict[str, Any]) -> dict[str, Any]:
            config = super().get_config(gindex, pindex, group)
            return config | {"optim_bits": group.get("optim_bits", config["optim_bits"])}

    return AdamW8bit


def make_schedule(config: TrainConfig, optimizer: "torch.optim.Optimizer", step: int = 0) -> Any:
    """Make the learning-rate schedule over optimizer steps, with its warm-up, from ``step`` on."""
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
