"""Train the parts of a base: one resumable loop over optimizer steps, and its optimizer."""

import math
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dreambooth_lib.training.checkpoints import load_state, save_state


@dataclass(frozen=True)
class Way:
    """Say how long a training runs, where, and in what precision.

    It ends after ``steps`` or after ``seconds`` of training, in all the calls that it takes.
    bfloat16 and float16 are by autocast, the latter with loss scaling; the weights stay float32.
    """

    steps: int
    seconds: float | None = None
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    save_every_s: float = 120.0

    def whole(self, step: int, spent: float) -> int:
        """Return how many steps the training will have, by its pace over ``spent`` seconds."""
        if self.seconds is None or step == 0:
            return self.steps
        return min(self.steps, max(step, math.ceil(step * self.seconds / spent)))

    def autocast(self) -> torch.autocast:
        """Return the context of a loss in this precision."""
        enabled = self.dtype is not torch.float32
        return torch.autocast(self.device, self.dtype if enabled else None, enabled=enabled)


MOMENTUM, ITERATIONS = 0.95, 5  #: of Muon


class Muon(torch.optim.Optimizer):
    """Steps along the nearest orthogonal matrix to each weight's momentum.

    Keller Jordan's Muon (https://kellerjordan.github.io/posts/muon/), in float32 and for
    convolutions too, whose weights count as matrices [out, in * height * width]. torch's own takes
    only two-dimensional weights and iterates in bfloat16, which CPUs are slow at.
    """

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            alike: dict[tuple[int, ...], list[tuple[torch.nn.Parameter, torch.Tensor]]]
            alike = defaultdict(list)
            for weight in group["params"]:
                state = self.state[weight]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(weight)
                buffer = state["momentum_buffer"]
                buffer.lerp_(weight.grad, 1 - MOMENTUM)
                update = weight.grad.lerp(buffer, MOMENTUM).flatten(1)
                alike[tuple(update.shape)].append((weight, update))
            for (out, into), members in alike.items():  # together, for few and large GPU kernels
                scale = max(1.0, out / into) ** 0.5
                updates = orthogonalized(torch.stack([update for _, update in members]))
                for (weight, _), update in zip(members, updates, strict=True):
                    weight.add_(update.reshape(weight.shape), alpha=-group["lr"] * scale)


def orthogonalized(matrices: torch.Tensor) -> torch.Tensor:
    """``U V^T`` of each ``U S V^T`` [B, M, N], roughly: singular values end between 0.7 and 1.2.

    Muon's Newton-Schulz iteration of fifth order and its coefficients. It runs on the square Gram
    matrix of the shorter side, which for a convolution is a third of the work.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    wide = matrices.mT if tall else matrices
    wide = wide / (torch.stack([one.norm() for one in wide])[:, None, None] + 1e-7)
    gram = wide @ wide.mT
    whole = identity = torch.eye(gram.shape[-1], device=gram.device)
    for iteration in range(ITERATIONS):
        factor = 3.4445 * identity - 4.7750 * gram + 2.0315 * gram @ gram
        whole = factor @ whole if iteration else factor
        if iteration < ITERATIONS - 1:
            gram = factor @ gram @ factor
    wide = whole @ wide
    return wide.mT if tall else wide


def learning_rate(
    step: int, steps: int, peak: float, warmup: int = 200, cooldown: float = 0.3
) -> float:
    """Linear warm-up, a plateau, then a linear way down to 2% of the peak.

    Only the last ``cooldown`` of the steps knows how many there are: a training can be prolonged
    on its plateau at no loss (arXiv 2405.18392).
    """
    left = (steps - step) / max(1.0, cooldown * steps)
    return peak * min((step + 1) / warmup, max(0.02, left), 1.0)


def fit(
    model: torch.nn.Module,
    loss_at: Callable[[int], torch.Tensor],
    way: Way,
    *,
    peak_lr: float,
    folder: Path,
    muon_lr: float = 0.02,
    cooldown: float = 0.3,
    ema_decay: float = 0.998,
) -> torch.nn.Module:
    """Train ``model`` on ``loss_at(step)`` and leave its averaged weights in it.

    Muon trains the matrices at ``muon_lr``; AdamW trains embeddings, biases, norms and the
    layers of a few channels at ``peak_lr``. ``loss_at`` must draw everything random from the step
    number, so that a run of a set number of steps that is stopped anywhere and started again draws
    what it would have drawn. State is saved in ``folder``.
    """
    model.to(way.device)
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    matrices = [p for n, p in named if _is_matrix(n, p)]
    others = [p for n, p in named if not _is_matrix(n, p)]
    optimizers = {
        "muon": (Muon(matrices, lr=muon_lr), muon_lr),
        "adamw": (
            torch.optim.AdamW(others, lr=peak_lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
            peak_lr,
        ),
    }
    scaler = torch.amp.GradScaler(way.device, enabled=way.dtype is torch.float16)
    average = {name: value.detach().clone() for name, value in named}
    step, before = 0, 0.0
    if (folder / "state.json").exists():
        saved = load_state(folder)
        model.load_state_dict(saved["model"])
        for name, (optimizer, _) in optimizers.items():
            optimizer.load_state_dict(saved[name])
        scaler.load_state_dict(saved["scaler"])
        average = {name: value.to(way.device) for name, value in saved["average"].items()}
        step, before = saved["step"], saved["spent"]
        print(f"{folder.name}: going on at step {step} of {way.whole(step, before)}", flush=True)

    averaged, current = [average[name] for name, _ in named], [value for _, value in named]
    began = saved_at = printed_at = time.monotonic()

    def save() -> None:
        state: dict[str, Any] = {name: one.state_dict() for name, (one, _) in optimizers.items()}
        state |= {"scaler": scaler.state_dict(), "spent": before + time.monotonic() - began}
        save_state(folder, state | {"model": model.state_dict(), "average": average, "step": step})

    def check(losses: list[torch.Tensor]) -> float:
        mean = torch.stack(losses).mean().item()
        if not math.isfinite(mean):
            raise FloatingPointError(f"{folder.name}: the loss is {mean} at step {step - 1}.")
        return mean

    def tell(mean: float) -> None:
        rate = len(recent) / max(time.monotonic() - printed_at, 1e-9)
        print(f"{folder.name}: step {step}/{steps} loss {mean:.4f} {rate:.2f}/s", flush=True)

    model.train()
    recent: list[torch.Tensor] = []
    while step < (steps := way.whole(step, before + time.monotonic() - began)):
        with way.autocast():
            loss = loss_at(step)
        scaler.scale(loss).backward()
        for optimizer, peak in optimizers.values():
            scaler.unscale_(optimizer)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, peak, cooldown=cooldown)
        torch.nn.utils.clip_grad_norm_(current, 1.0)
        for optimizer, _ in optimizers.values():
            scaler.step(optimizer)
            optimizer.zero_grad()
        scaler.update()
        decay = min(ema_decay, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(averaged, current, 1 - decay)
        step += 1
        recent.append(loss.detach())
        if way.device != "cpu" and step % 16:
            continue  # reading a loss waits for the GPU, which else works while the next is queued
        mean = check(recent)
        now = time.monotonic()
        if now - printed_at > 30:
            tell(mean)
            recent, printed_at = [], now
        if now - saved_at > way.save_every_s:
            save()
            saved_at = now
    # The clock may have ended the loop after any step, so the last losses are read here.
    if recent:
        tell(check(recent))
    save()
    model.load_state_dict(average, strict=False)  # buffers stay as trained
    return model.eval()


def _is_matrix(name: str, parameter: torch.Tensor) -> bool:
    return (
        parameter.ndim > 1
        and min(len(parameter), parameter[0].numel()) >= 16
        and "embedding" not in name
    )
