"""What the base's trainings share: one resumable loop over optimizer steps, and its optimizer."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dreambooth_lib.training.checkpoints import load_state, save_state


class Muon(torch.optim.Optimizer):
    """Steps along the nearest orthogonal matrix to each weight's momentum.

    Keller Jordan's Muon (https://kellerjordan.github.io/posts/muon/), in float32 and for
    convolutions too, whose weights count as matrices [out, in * height * width]. torch's own takes
    only two-dimensional weights and iterates in bfloat16, which CPUs are slow at.
    """

    def __init__(self, params: Any, lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for weight in group["params"]:
                state = self.state[weight]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(weight)
                buffer = state["momentum_buffer"]
                buffer.lerp_(weight.grad, 1 - group["momentum"])
                update = weight.grad.lerp(buffer, group["momentum"]).flatten(1)
                scale = max(1.0, update.shape[0] / update.shape[1]) ** 0.5
                update = orthogonalized(update).reshape(weight.shape)
                weight.add_(update, alpha=-group["lr"] * scale)


def orthogonalized(matrix: torch.Tensor, iterations: int = 5) -> torch.Tensor:
    """``U V^T`` of ``matrix = U S V^T``, roughly: singular values end between 0.7 and 1.2.

    Muon's Newton-Schulz iteration of fifth order and its coefficients. It runs on the square Gram
    matrix of the shorter side, which for a convolution is a third of the work.
    """
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    wide = wide / (wide.norm() + 1e-7)
    gram = wide @ wide.T
    whole = identity = torch.eye(len(gram))
    for iteration in range(iterations):
        factor = 3.4445 * identity - 4.7750 * gram + 2.0315 * gram @ gram
        whole = factor @ whole if iteration else factor
        if iteration < iterations - 1:
            gram = factor @ gram @ factor
    wide = whole @ wide
    return wide if matrix.shape[0] <= matrix.shape[1] else wide.T


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
    *,
    steps: int,
    peak_lr: float,
    folder: Path,
    muon_lr: float = 0.02,
    cooldown: float = 0.3,
    ema_decay: float = 0.998,
    betas: tuple[float, float] = (0.9, 0.98),
    save_every_s: float = 120.0,
) -> torch.nn.Module:
    """Train ``model`` on ``loss_at(step)`` and leave its averaged weights in it.

    Muon trains the matrices at ``muon_lr``; AdamW trains embeddings, biases, norms and the
    layers of a few channels at ``peak_lr``. ``loss_at`` must draw everything random from the step
    number, so that a run that is stopped anywhere and started again draws what it would have
    drawn. State is saved in ``folder``.
    """
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    matrices = [p for n, p in named if _is_matrix(n, p)]
    others = [p for n, p in named if not _is_matrix(n, p)]
    optimizers = {
        "muon": (Muon(matrices, lr=muon_lr), muon_lr),
        "adamw": (
            torch.optim.AdamW(others, lr=peak_lr, betas=betas, weight_decay=0.0, fused=True),
            peak_lr,
        ),
    }
    average = {name: value.detach().clone() for name, value in named}
    start = 0
    if (folder / "state.json").exists():
        saved = load_state(folder)
        model.load_state_dict(saved["model"])
        for name, (optimizer, _) in optimizers.items():
            optimizer.load_state_dict(saved[name])
        average, start = saved["average"], saved["step"]
        print(f"{folder.name}: going on at step {start} of {steps}", flush=True)

    averaged, current = [average[name] for name, _ in named], [value for _, value in named]

    def save(step: int) -> None:
        state: dict[str, Any] = {name: one.state_dict() for name, (one, _) in optimizers.items()}
        save_state(folder, state | {"model": model.state_dict(), "average": average, "step": step})

    model.train()
    saved_at = printed_at = time.monotonic()
    recent: list[float] = []
    for step in range(start, steps):
        loss = loss_at(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(current, 1.0)
        for optimizer, peak in optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, peak, cooldown=cooldown)
            optimizer.step()
            optimizer.zero_grad()
        decay = min(ema_decay, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(averaged, current, 1 - decay)
        recent.append(loss.item())
        if not math.isfinite(recent[-1]):
            raise FloatingPointError(f"{folder.name}: the loss is {recent[-1]} at step {step}.")
        now = time.monotonic()
        if now - printed_at > 30 or step == steps - 1:
            mean = sum(recent) / len(recent)
            rate = len(recent) / (now - printed_at)
            print(
                f"{folder.name}: step {step + 1}/{steps} loss {mean:.4f} {rate:.2f}/s", flush=True
            )
            recent, printed_at = [], now
        if now - saved_at > save_every_s:
            save(step + 1)
            saved_at = now
    save(steps)
    model.load_state_dict(average, strict=False)  # buffers stay as trained
    return model.eval()


def _is_matrix(name: str, parameter: torch.Tensor) -> bool:
    return (
        parameter.ndim > 1
        and min(len(parameter), parameter[0].numel()) >= 16
        and "embedding" not in name
    )
