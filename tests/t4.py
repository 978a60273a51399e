"""A T4's arithmetic on a CPU: compute in float16 whatever would do so there."""

from collections.abc import Iterator
from typing import Any

import accelerate
import pytest
import torch
from accelerate.state import AcceleratorState, is_initialized

from dreambooth_lib.families.base import Family
from dreambooth_lib.metrics.encoders import Encoder
from dreambooth_lib.training import accelerator, sampling, setup


class T4Accelerator(accelerate.Accelerator):
    """An accelerator that allows "fp16" on a CPU, with a loss scale that grows at each step."""

    def __init__(self, **settings: Any):
        super().__init__(**settings)
        if self.mixed_precision == "fp16":
            self.native_amp = True
            self.scaler = torch.amp.GradScaler("cpu", growth_interval=1)


class Seen:
    """The dtypes that layers computed in: of denoisers, autoencoders' halves, and scorers."""

    def __init__(self) -> None:
        self.denoiser: set[torch.dtype] = set()
        self.encoder: set[torch.dtype] = set()
        self.decoder: set[torch.dtype] = set()
        self.scorer: set[torch.dtype] = set()

    def record(self, family: Family) -> None:
        vae = family.pipeline.vae
        _hook(family.denoiser, self.denoiser)
        if vae is not None:
            _hook(vae.encoder, self.encoder)
            _hook(vae.decoder, self.decoder)

    def record_scorer(self, encoder: Encoder) -> None:
        _hook(encoder._model, self.scorer)


def _hook(part: torch.nn.Module | None, dtypes: set[torch.dtype]) -> None:
    for layer in part.modules() if part is not None else ():
        if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear):
            layer.register_forward_hook(lambda _, inputs, output: dtypes.add(output.dtype))


@pytest.fixture
def t4(monkeypatch: pytest.MonkeyPatch) -> Iterator[Seen]:
    """Train, validate and sample as on a GPU that has float16 and no bfloat16."""

    def precision(mixed_precision: str, device: torch.device) -> str:
        return "fp16" if mixed_precision == "auto" else mixed_precision

    seen, init, read = Seen(), Family.__init__, Encoder.__init__

    def recorded(family: Family, *args: Any, **kwargs: Any) -> None:
        init(family, *args, **kwargs)
        seen.record(family)

    def recorded_scorer(encoder: Encoder, *args: Any, **kwargs: Any) -> None:
        read(encoder, *args, **kwargs)
        seen.record_scorer(encoder)

    monkeypatch.setattr(Family, "__init__", recorded)
    monkeypatch.setattr(Encoder, "__init__", recorded_scorer)
    monkeypatch.setattr(setup, "native_precision", precision)
    monkeypatch.setattr(accelerator, "Accelerator", T4Accelerator)
    monkeypatch.setattr(sampling, "sampling_dtype", lambda: torch.float16)
    yield seen
    if is_initialized():
        AcceleratorState._reset_state()
