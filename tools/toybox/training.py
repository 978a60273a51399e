"""What the base's trainings share: one resumable loop over optimizer steps."""

import math
import time
from collections.abc import Callable
from pathlib import Path

import torch

from dreambooth_lib.state import load_state, save_state


def learning_rate(step: int, steps: int, peak: float, warmup: int = 200) -> float:
    """Linear warm-up, then a cosine down to 2% of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def fit(
    model: torch.nn.Module,
    loss_at: Callable[[int], torch.Tensor],
    *,
    steps: int,
    peak_lr: float,
    folder: Path,
    ema_decay: float = 0.998,
    betas: tuple[float, float] = (0.9, 0.98),
    save_every_s: float = 120.0,
) -> torch.nn.Module:
    """Train ``model`` on ``loss_at(step)`` and leave its averaged weights in it.

    ``loss_at`` must draw everything random from the step number, so that a run that is stopped
    anywhere and started again draws what it would have drawn. State is saved in ``folder``.
    """
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=peak_lr, betas=betas, weight_decay=0.0, fused=True
    )
    average = {name: value.detach().clone() for name, value in model.named_parameters()}
    start = 0
    if (folder / "state.json").exists():
        saved = load_state(folder)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        average, start = saved["average"], saved["step"]
        print(f"{folder.name}: going on at step {start} of {steps}", flush=True)

    averaged = [average[name] for name, _ in model.named_parameters()]

    def save(step: int) -> None:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        save_state(folder, state | {"average": average, "step": step})

    model.train()
    saved_at = printed_at = time.monotonic()
    recent: list[float] = []
    for step in range(start, steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak_lr)
        loss = loss_at(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        decay = min(ema_decay, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(averaged, list(model.parameters()), 1 - decay)
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
    model.load_state_dict(average, strict=False)  # buffers never change
    return model.eval()
