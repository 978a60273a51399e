"""The optimizer step: backward pass, gradient clipping, AdamW, its schedule and the EMA weights."""

import math
from typing import Any

import torch
from accelerate import Accelerator

from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.training import lora
from dreambooth_lib.training.ema import EMA
from dreambooth_lib.training.flat_parameters import Bucket, make_buckets
from dreambooth_lib.training.optimizers import make_optimizer, make_schedule, resolve_optimizer
from dreambooth_lib.training.trainable import Trainable

#: Tries of one step in float16, each at half the loss scale of the one before.
MAX_SKIPPED_STEPS = 30


class NonFiniteStep(FloatingPointError):
    """The loss or a gradient is NaN or infinite: what it is, what was tried, what may help.

    ``step`` is None for the step that is being made.
    """

    def __init__(self, what: str, tried: str = "", fix: str | None = None, step: int | None = None):
        super().__init__(what)
        self.what, self.tried, self.fix, self.step = what, tried, fix, step


def check_finite(what: str, value: float) -> None:
    """Raise :class:`NonFiniteStep` unless a value is finite."""
    if not math.isfinite(value):
        raise NonFiniteStep(f"the {what} is {value}")


class Optimizer:
    """AdamW on the trained weights, with its schedule, loss scale and EMA; one in each process.

    A step is :meth:`backward` of each micro-batch's loss, :meth:`read`, then :meth:`step`. Only
    ``read`` waits for the GPU.
    """

    #: Most numbers in a bucket of weights, 512 MiB: so many gradients are copied at once.
    LARGEST_BUCKET = 2**27

    def __init__(self, config: TrainConfig, accelerator: Accelerator, trainable: Trainable):
        self.config, self.accelerator, self.trainable = config, accelerator, trainable
        self.parameters = lora.trained_parameters(trainable)
        has_own = config.text_encoder_learning_rate is not None
        has_own |= config.text_encoder_steps is not None
        of_text = set(trainable.text_parameters() if has_own else ())
        self.buckets = make_buckets(self.parameters, self.LARGEST_BUCKET, of_text)
        #: Of each bucket, whether it holds text encoders' weights, with settings of their own.
        self._is_text = [bucket.parameters[0] in of_text for bucket in self.buckets]
        if accelerator.device.type == "cpu" and not config.steps_in_backward:
            for bucket in self.buckets:
                bucket.keep_gradients()
        anchored = self.buckets if config.anchor_weight is not None else []
        #: What ``anchor_weight`` pulls each bucket's weights towards: as they are before training.
        self.anchors = [bucket.weights.clone() for bucket in anchored]
        self.completed_steps = 0
        self.skipped_steps = 0  #: since the last completed one
        groups = [
            {"params": [bucket.stepped], "lr": rate}
            | ({} if bucket.has_8bit_moments else {"optim_bits": 32})
            for bucket, rate in zip(self.buckets, self._learning_rates(), strict=True)
        ]
        #: By which a checkpoint tells whose state it has.
        self.name = resolve_optimizer(config, accelerator.device.type)
        self.adam = make_optimizer(config, groups, accelerator.device.type)
        self.schedule = make_schedule(config, self.adam)
        self.ema = EMA(self.parameters, self.buckets, config.ema_decay)
        scaler = accelerator.scaler
        #: What a loss in float16 is multiplied by, and after how many clean steps that doubles.
        self.scale = None if scaler is None else float(scaler.get_scale())
        self.growth_interval = 0 if scaler is None else scaler.get_growth_interval()
        self.clean_steps = 0  #: in a row, without an overflow
        self._gradients: list[torch.Tensor] = []  # of this step, by bucket
        self._norm = 0.0  # theirs, as it was read

    @property
    def lr(self) -> float:
        """Return the next step's learning rate, of the denoiser."""
        return self.schedule.get_last_lr()[self._is_text.index(False)]

    def _learning_rates(self) -> list[float]:
        """Return each bucket's learning rate, before warm-up and schedule."""
        own, of_text = self.config.learning_rate, self.config.text_encoder_learning_rate
        of_text = own if of_text is None else of_text
        return [of_text if is_text else own for is_text in self._is_text]

    def _is_stopped(self, number: int) -> bool:
        """Return whether a bucket's weights stay as they are from now on."""
        last = self.config.text_encoder_steps
        return self._is_text[number] and last is not None and self.completed_steps >= last

    def _stepped_buckets(self) -> list[Bucket]:
        return [b for number, b in enumerate(self.buckets) if not self._is_stopped(number)]

    def _free_stopped_text(self) -> None:
        """Compute no gradients of text encoders that have stopped.

        Several processes compute them all the same: each waits for the others' of every weight.
        """
        stopped = any(map(self._is_stopped, range(len(self.buckets))))
        self.trainable.text_is_frozen = stopped and self.accelerator.num_processes == 1

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate the gradients of a micro-batch's loss."""
        self._backward(loss)

    def _backward(self, loss: torch.Tensor) -> None:
        (loss if self.scale is None else loss * self.scale).backward()

    def read(self, losses: torch.Tensor) -> list[float]:
        """Wait for the step's losses [K] and return them.

        Raises :class:`NonFiniteStep` where the first is not finite, or else, where the loss is not
        scaled, a gradient.
        """
        *values, self._norm = torch.cat([losses, self._take_gradients()]).tolist()
        check_finite("loss", values[0])
        if self.scale is None:
            check_finite("gradient norm", self._norm)
        return values

    def step(self) -> bool:
        """Update the weights; False where float16 overflowed: retry, at the new loss scale.

        Raises :class:`NonFiniteStep` where no scale helps.
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
        self._free_stopped_text()
        return True

    def check_gradients(self) -> None:
        """Raise :class:`NonFiniteStep` if the last step's gradients were not finite.

        Called before its weights are used for anything but the next step. Here :meth:`read` has
        seen to it.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return all that a resumed run needs; raise as :meth:`check_gradients` does."""
        self.check_gradients()
        state = {"step": self.completed_steps, "model": self.trainable.trained_weights()}
        state["optimizer"] = self._moments()
        scale = {} if self.scale is None else {"scale": self._loss_scale()}
        return state | self.ema.state_dict() | scale

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Load a :meth:`state_dict`, of any memory level.

        The config may have changed since: its learning rate and weight decay count, not the saved
        ones. If the optimizer's state does not fit, the optimizer starts afresh and says so.
        """
        self.completed_steps = saved["step"]
        self.trainable.load_weights(saved["model"])
        names = self.trainable.trained_weights().keys()
        if self._is_own_state(saved.get("optimizer")):
            self._load_moments(saved["optimizer"]["state"])
        else:
            self.accelerator.print(
                f"The checkpoint of step {self.completed_steps} has no state of this optimizer for "
                "these weights, so the optimizer starts afresh."
            )
        for group, rate in zip(self.adam.param_groups, self._learning_rates(), strict=True):
            group["initial_lr"] = group["lr"] = rate
        self._free_stopped_text()
        self.schedule = make_schedule(self.config, self.adam, self.completed_steps)
        self.ema.load_state_dict(saved, names)
        if self.scale is not None:
            self._load_loss_scale(saved)

    def _moments(self) -> dict[str, Any]:
        """Return the optimizer's state with an entry for each parameter, in their order."""
        saved, number_of = self.adam.state_dict(), self._number_of()
        state: dict[int, Any] = {}
        for number, of_bucket in saved["state"].items():
            bucket = self.buckets[number]
            numbers = [number_of[parameter] for parameter in bucket.parameters]
            state |= zip(numbers, bucket.split_state(of_bucket), strict=True)
        group = saved["param_groups"][-1] | {"params": list(range(len(self.parameters)))}
        group.pop("optim_bits", None)
        state = dict(sorted(state.items()))
        return {"name": self.name, "state": state, "param_groups": [group]}

    def _load_moments(self, state: dict[int, Any]) -> None:
        """Reverse :meth:`_moments`."""
        number_of, joined = self._number_of(), {}
        for number, bucket in enumerate(self.buckets):
            numbers = [number_of[parameter] for parameter in bucket.parameters]
            if numbers[0] in state:  # a bucket that has not been stepped has none
                joined[number] = bucket.join_state([state[n] for n in numbers])
        groups = self.adam.state_dict()["param_groups"]
        self.adam.load_state_dict({"state": joined, "param_groups": groups})

    def _number_of(self) -> dict[torch.nn.Parameter, int]:
        return {parameter: number for number, parameter in enumerate(self.parameters)}

    def _is_own_state(self, saved: dict[str, Any] | None) -> bool:
        """Return whether a saved state is of this optimizer, and has all or nothing of each bucket.

        It has nothing of text encoders that had stopped when the optimizer last started afresh.
        """
        if saved is None or saved["name"] != self.name:
            return False
        state, number_of = saved["state"], self._number_of()
        of_buckets = [{number_of[p] in state for p in bucket.parameters} for bucket in self.buckets]
        return all(len(has) == 1 for has in of_buckets)

    def _take_gradients(self) -> torch.Tensor:
        """Copy the gradients side by side; return their norm as a tensor [1]."""
        self._gradients = [bucket.take_gradients() for bucket in self._stepped_buckets()]
        norms = [torch.linalg.vector_norm(gradient) for gradient in self._gradients]
        return torch.linalg.vector_norm(torch.stack(norms)).reshape(1)

    def _apply_gradients(self) -> bool:
        """Clip the gradients and step by them; False where float16 overflowed."""
        finite, scale = math.isfinite(self._norm), self.scale or 1.0
        if finite:
            limit = 1.0 if self.config.max_grad_norm is None else self.config.max_grad_norm
            factor = min(1.0, limit / (self._norm / scale + 1e-6)) / scale
            self._scale_gradients(factor, *self._gradients)
            for bucket, gradient in zip(self._stepped_buckets(), self._gradients, strict=True):
                bucket.stepped.grad = gradient
            self.adam.step()
            for number in range(len(self.anchors)):
                self._pull_to_anchor(number)
        self._gradients = []
        for bucket in self.buckets:
            bucket.clear_gradients()
        self._adapt_scale(finite)
        return finite

    @torch.no_grad()
    def _pull_to_anchor(self, number: int) -> None:
        """Shrink a bucket's change by its learning rate x ``anchor_weight``.

        That is weight decay, decoupled as AdamW's (arXiv 1711.05101), towards the base instead of
        towards 0: the gradient step of ||theta - theta_0||^2 (arXiv 2505.19519), without Adam.
        With LoRA it acts on the factors: B returns to 0, and their product with it.
        """
        if self._is_stopped(number):
            return
        assert self.config.anchor_weight is not None
        rate = self.schedule.get_last_lr()[number]
        weights, share = self.buckets[number].stepped.data, rate * self.config.anchor_weight
        weights.lerp_(self.anchors[number].to(weights.dtype), min(share, 1.0))

    def _scale_gradients(self, factor: float, *gradients: torch.Tensor) -> None:
        """Multiply gradients by a factor, or let the optimizer do it as it reads them."""
        if hasattr(self.adam, "gradient_scale"):
            self.adam.gradient_scale = factor
            return
        for gradient in gradients:
            gradient.mul_(factor)

    def _adapt_scale(self, finite: bool) -> None:
        """Halve the loss scale after an overflow; double it after enough steps without one."""
        if self.scale is None:
            return
        self.clean_steps = self.clean_steps + 1 if finite else 0
        if not finite:
            self.scale /= 2
        elif self.clean_steps % self.growth_interval == 0:
            self.scale *= 2

    def _loss_scale(self) -> list[Any]:
        return [self.scale, self.clean_steps]

    def _load_loss_scale(self, saved: dict[str, Any]) -> None:
        """Load the loss scale of a checkpoint that has one."""
        if "scale" in saved:
            self.scale, self.clean_steps = saved["scale"][:2]
