"""A T4's arithmetic on a CPU: what would compute in float16 there does so here."""

from collections.abc import Iterator
from typing import Any

import accelerate
import pytest
import torch
from accelerate.state import AcceleratorState, is_initialized

from dreambooth_lib.families.base import Family
from dreambooth_lib.training import fused_optimizer, sampling, setup


class T4Accelerator(accelerate.Accelerator):
    """One that means "fp16" on a CPU too: with autocast, and a scaler that grows at each update."""

    def __init__(self, **given: Any):
        super().__init__(**given)
        if self.mixed_precision == "fp16":
            self.native_amp = True
            self.scaler = torch.amp.GradScaler("cpu", growth_interval=1)


class Seen:
    """The precisions that layers computed in: those of denoisers, and of autoencoders."""

    def __init__(self) -> None:
        self.denoiser: set[torch.dtype] = set()
        self.autoencoder: set[torch.dtype] = set()

    def watch(self, family: Family) -> None:
        parts = ((family.denoiser, self.denoiser), (family.pipeline.vae, self.autoencoder))
        for part, found in parts:
            for layer in part.modules() if part is not None else ():
                if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear):
                    layer.register_forward_hook(lambda *of, found=found: found.add(of[2].dtype))


@pytest.fixture
def t4(monkeypatch: pytest.MonkeyPatch) -> Iterator[Seen]:
    """Training, validation and sampling compute as on a GPU that has float16 and no bfloat16."""

    def precision(mixed_precision: str, device: torch.device) -> str:
        return "fp16" if mixed_precision == "auto" else mixed_precision

    seen, begin = Seen(), Family.__init__

    def validation(family: Family, *given: Any, **named: Any) -> None:
        begin(family, *given, **named)
        seen.watch(family)

    monkeypatch.setattr(Family, "__init__", validation)
    monkeypatch.setattr(setup, "native_precision", precision)
    monkeypatch.setattr(setup, "Accelerator", T4Accelerator)
    monkeypatch.setattr(fused_optimizer.FusedBackwardOptimizer, "GROWTH_INTERVAL", 1)
    monkeypatch.setattr(sampling, "_half", lambda: torch.float16)
    yield seen
    if is_initialized():
        AcceleratorState._reset_state()
