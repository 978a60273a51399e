"""How a loss moves the weights: backward pass, clipping, optimizer, schedule and their average."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator

from dreambooth_lib import lora
from dreambooth_lib.batches import seeded
from dreambooth_lib.config import TrainConfig
from dreambooth_lib.optim import InBackward, make_optimizer, make_schedule
from dreambooth_lib.weights import Trainable, copy_weights


class Updater:
    """The optimizer of what is trained, and its state; one object in each process.

    Where the backward pass itself moves the weights, it waits for :meth:`move`.
    """

    def __init__(self, config: TrainConfig, accelerator: Accelerator, trainable: Trainable):
        self.config, self.accelerator = config, accelerator
        self.parameters = lora.trained(trainable)
        device_type = accelerator.device.type
        self.inside: InBackward | None = None
        self.pending: Any = None  # there, a loss whose backward pass is to come
        if config.steps_in_backward:
            scale = None if accelerator.scaler is None else accelerator.scaler.get_scale()
            self.inside = InBackward(config, self.parameters, device_type, scale)
            self.adam = self.inside.optimizer
            self.schedule = make_schedule(config, self.adam)
            self.model = accelerator.prepare(trainable)
        else:
            self.adam = make_optimizer(config, self.parameters, device_type)
            # Before accelerate wraps its step, as torch wants it.
            self.schedule = make_schedule(config, self.adam)
            self.model, self.optimizer = accelerator.prepare(trainable, self.adam)
        self.ema: Any = None
        if config.ema_decay is not None:
            from diffusers.training_utils import EMAModel

            whole: list[Any] = [parameter.detach().float() for parameter in self.parameters]
            self.ema = EMAModel(whole, decay=config.ema_decay)

    @property
    def trainable(self) -> Trainable:
        return self.accelerator.unwrap_model(self.model)

    @property
    def lr(self) -> float:
        """The rate of the update to come."""
        return self.schedule.get_last_lr()[0]

    def micro_batch(self, last: bool) -> Any:
        """The context of a micro-batch: gradients cross processes with the last one only."""
        return nullcontext() if last else self.accelerator.no_sync(self.model)

    def backward(self, loss: torch.Tensor) -> None:
        if self.inside is not None:
            self.pending = loss
        else:
            self.accelerator.backward(loss)

    def clip(self) -> float:
        """Cut the gradients to the config's norm; theirs before, 0 where it is not to be known.

        With an fp16 scaler an infinite gradient is no fault: it skips the update.
        """
        if self.inside is not None:
            return 0.0
        limit = 1.0 if self.config.max_grad_norm is None else self.config.max_grad_norm
        norm = float(self.accelerator.clip_grad_norm_(self.parameters, limit))
        return norm if self.accelerator.scaler is None else 0.0

    def move(self, step: int) -> bool:
        """Make update ``step``; False where fp16 loss scaling skips it.

        Raises FloatingPointError where a gradient turns out not to be finite.
        """
        if self.inside is None:
            scaler = self.accelerator.scaler
            scale = 0.0 if scaler is None else scaler.get_scale()
            self.optimizer.step()
            self.optimizer.zero_grad()
            # Not accelerate's optimizer_step_was_skipped: a fused optimizer's step is called even
            # where it moves nothing. The scale always falls then.
            if scaler is not None and scaler.get_scale() < scale:
                return False
        else:
            seed = seeded(self.config.seed, step, 4).initial_seed()
            generator = torch.Generator(self.accelerator.device).manual_seed(seed)
            loss, self.pending = self.pending, None
            if not self.inside.backward(loss, generator):
                return False
        self.schedule.step()
        if self.ema is not None:
            self.ema.step(self.parameters)
        return True

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The weights that the run would end with now, put back afterwards."""
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
        """All that a resumed run needs of it."""
        state: dict[str, Any] = {
            "model": self.trainable.state(),
            "optimizer": self.adam.state_dict(),
        }
        if self.ema is not None:
            state["ema"] = self.ema.state_dict()
        if self.inside is not None and self.inside.scale is not None:
            state["scale"] = [self.inside.scale, self.inside.clean, self.inside.trying]
        elif self.accelerator.scaler is not None:
            state["scaler"] = self.accelerator.scaler.state_dict()
        return state

    def _is_own(self, state: dict[str, Any] | None) -> bool:
        """Return whether a saved state is of this kind of optimizer: 8 bits have other moments."""
        if state is None:
            return False
        torchs = isinstance(self.adam, torch.optim.AdamW)
        return all(("exp_avg" in moments) == torchs for moments in state["state"].values())

    def restore(self, saved: dict[str, Any], step: int) -> None:
        """Take up a :meth:`state` of ``step`` updates, of any level of memory.

        The config may have been changed since: its rate and decay count, not the saved ones. A
        state without the optimizer's begins that anew, with a sentence.
        """
        self.trainable.put(saved["model"])
        own, names = self.adam.state_dict()["param_groups"], self.trainable.state().keys()
        if saved["model"].keys() == names and self._is_own(saved.get("optimizer")):
            # Groups are many or one by the level of memory; the parameters' order is the same.
            self.adam.load_state_dict(saved["optimizer"] | {"param_groups": own})
        else:
            self.accelerator.print(
                f"The checkpoint of step {step} has no state of this optimizer for these weights, "
                "so the optimizer starts afresh."
            )
        for group in self.adam.param_groups:
            group["initial_lr"] = group["lr"] = self.config.learning_rate
        self.schedule = make_schedule(self.config, self.adam, step)
        if self.ema is not None and "ema" in saved:
            averages = dict(zip(saved["model"], saved["ema"]["shadow_params"], strict=True))
            self.ema.load_state_dict(
                saved["ema"] | {"shadow_params": [averages[name] for name in names]}
            )
            # A copy on a drive may be in half precision.
            self.ema.to(self.accelerator.device, torch.float32)
        scale = saved.get("scale", [1.0, 0])
        # A pair with 1 was written where nothing is scaled.
        if self.inside is not None and self.inside.scale is not None and scale != [1.0, 0]:
            self.inside.scale, self.inside.clean, *trying = scale
            self.inside.trying = any(trying)
        elif self.accelerator.scaler is not None and "scaler" in saved:
            self.accelerator.scaler.load_state_dict(saved["scaler"])


@contextmanager
def interrupts_held() -> Iterator[None]:
    """An interrupt takes effect at the end of the block: what it writes, it writes whole."""
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
