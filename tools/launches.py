"""``make launches``: what a training step asks of a GPU, counted without one.

One step of SD 1.5 at its published size, 1 + 1 images of 512 pixels: the launches, the waits of the
host and the bytes of each phase, as a table in Markdown. Everything that runs is the library's own
code, on tensors without values (:mod:`tools.launch_counter`).

What stands in for a GPU: autocast is the CPU's, with the layers that CUDA computes in float32 in
float32; GradScaler is the CPU's, which works on the host's side as on a GPU; attention is one
operation. An operation of the model counts as one launch, though some are several.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import accelerate
import torch
from accelerate.state import AcceleratorState, PartialState, is_initialized
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._pytree import tree_leaves

from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.core.subject import Subject
from dreambooth_lib.families import loading
from dreambooth_lib.families.base import Family
from dreambooth_lib.families.prompt_cache import PromptCache
from dreambooth_lib.training import accelerator, runs, setup
from dreambooth_lib.training.flat_parameters import Bucket
from dreambooth_lib.training.latent_cache import LatentCache
from tools import architectures
from tools.bench_gpu import save_photos
from tools.gpu_table import cells
from tools.launch_counter import DEVICE, Counts, counting
from tools.phases import PHASES, follow

#: Steps before the one that is counted: the first makes the optimizer's state, and at the low
#: levels in float16 it only tries the loss scale.
BEFORE = 2


@dataclass(frozen=True)
class Line:
    """A way to train SD 1.5, and at most how many launches its optimizer should take."""

    title: str
    settings: dict[str, Any] = field(default_factory=dict)
    most: int | None = None


LINES = {
    "standard": Line("SD 1.5, U-Net, standard", {"memory": "standard"}, 60),
    "standard-adamw": Line(
        "SD 1.5, U-Net, standard, torch's AdamW", {"memory": "standard", "optimizer": "adamw"}
    ),
    "low": Line("SD 1.5, U-Net, low", {"memory": "low"}),
    "text-low": Line(
        "SD 1.5, U-Net and text encoder, low", {"memory": "low", "train_text_encoder": True}
    ),
    "lora-low": Line("SD 1.5, LoRA of rank 16, low", {"memory": "low", "method": "lora"}),
}


class Float16Accelerator(accelerate.Accelerator):
    """An accelerator that scales losses on a CPU, where accelerate itself refuses float16."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        if self.mixed_precision == "fp16":
            self.native_amp = True
            self.scaler = torch.amp.GradScaler("cpu")


@dataclass(frozen=True)
class Counted:
    """What one step asks of a GPU by phase, and the bytes of what it trains."""

    counts: dict[str, Counts]
    trained: int  #: bytes of the trained weights
    checkpoint: int  #: bytes of a checkpoint's tensors


def count(settings: dict[str, Any], tiny: bool = False, precision: str = "fp16") -> Counted:
    """Count one training step of SD 1.5 with these settings, phase by phase."""
    with TemporaryDirectory() as folder:
        work = Path(folder)
        architectures.save(architectures.SD15, work / "base", tiny=tiny, weights=False)
        save_photos(work, 64)
        config = TrainConfig(
            Subject(str(work / "instance"), "dog"), str(work / "base"),
            **{"resolution": 16 if tiny else 512, "optimizer": "adamw8bit", "validate_every": 0,
               "class_folder": str(work / "class"), "mixed_precision": precision} | settings,
        )  # fmt: skip
        with fake_gpu(precision), counting() as counter:
            trainer = setup.Trainer(runs.start(config, work / "run"))
            made = follow(trainer, counter.during)
            for _ in range(BEFORE):
                next(made)
            counter.counts.clear()
            next(made)
            counts = deepcopy(counter.counts)
            state = tree_leaves(trainer.optimizer.state_dict())
            saved = sum(leaf.nbytes for leaf in state if isinstance(leaf, torch.Tensor))
            trained = sum(p.nbytes for p in trainer.trainable.trained_weights().values())
            return Counted(counts, trained, saved)


@contextmanager
def fake_gpu(precision: str) -> Iterator[None]:
    """Let a trainer train on :data:`DEVICE`, in a half precision as on a GPU."""
    state, made = PartialState(), setup.Batches
    before, state.device = state.device, DEVICE
    # Nothing is read from or written to the disk that has no value.
    with ExitStack() as stack:
        if is_initialized():
            AcceleratorState._reset_state()
        for of, name, value in (
            (setup, "native_precision", lambda *_: precision),
            (accelerator, "Accelerator", Float16Accelerator),
            (setup, "Batches", lambda *args: made(*args[:4], None, *args[5:])),
            (loading, "load_model", load_fake),
            (torch.nn.Module, "_apply", _apply),
            (LatentCache, "_check_masks", lambda _: None),  # reads values
            (Bucket, "keep_gradients", lambda _: None),  # as on a GPU
        ):
            stack.enter_context(patch.object(of, name, value))
        try:
            yield
        finally:
            state.device = before
            AcceleratorState._reset_state()


def load_fake(base: str, revision: str | None, variant: str | None, **options: Any) -> Family:
    """Load a base as ``loading.load_model``, its weights as fake tensors on :data:`DEVICE`."""
    prompts, _ = options.pop("prompts", None), options.pop("device", None)
    with unset_fake_temporarily():
        family = loading.load_meta(base, revision, **options)
    for module in (family.denoiser, *family.text_encoders, *family.frozen):
        for own in module.modules():
            for name, weight in own.named_parameters(recurse=False):
                empty = torch.empty(weight.shape, dtype=weight.dtype, device=DEVICE)
                setattr(own, name, torch.nn.Parameter(empty))
            for name, buffer in own.named_buffers(recurse=False):
                setattr(own, name, torch.empty(buffer.shape, dtype=buffer.dtype, device=DEVICE))
    if prompts is not None:
        family.prompt_cache = PromptCache(family, {*prompts, ""})
        family.text_encoders = []
    return family


@torch.no_grad()
def _apply(module: torch.nn.Module, fn: Any, recurse: bool = True) -> torch.nn.Module:
    """Replace a module's tensors; torch's own way swaps them, which fake ones do not allow."""
    for own in module.modules() if recurse else [module]:
        for name, weight in own.named_parameters(recurse=False):
            if (moved := fn(weight)) is not weight:
                setattr(own, name, torch.nn.Parameter(moved, weight.requires_grad))
        for name, buffer in own.named_buffers(recurse=False):
            setattr(own, name, fn(buffer))
    return module


def markdown(found: dict[str, dict[str, Counts]]) -> str:
    """Return a table of phases for each line, and below it what waits where."""
    head = ("line", "phase", "launches", "waits of the host", "MB read and written")
    lines = [cells(head), cells(["---"] * len(head))]
    for name, counts in found.items():
        lines += [
            cells([LINES[name].title, phase, str(one.launches), str(one.waits.total()),
                   f"{one.bytes / 1e6:,.1f}"])
            for phase in PHASES if (one := counts.get(phase))
        ]  # fmt: skip
    for name, counts in found.items():
        line, step = LINES[name], counts.get("optimizer step", Counts())
        lines += ["", f"{line.title}:"]
        if line.most is not None:
            met = "met" if step.launches <= line.most else "not met"
            lines.append(
                f"- launches of the optimizer: {step.launches}, at most {line.most}: {met}"
            )
        waits = sum(one.waits.total() for one in counts.values())
        told = "met" if waits <= 1 else "not met"
        lines.append(f"- waits of the host: {waits}, at most 1, which reads the losses: {told}")
        lines += [
            f"  - {phase}: {times} x {why}, {where}"
            for phase, one in counts.items()
            for (why, where), times in one.waits.most_common()
        ]
        for phase in ("batch", "optimizer step", "EMA", "rest"):
            if phase in counts:
                most = counts[phase].operations.most_common(8)
                lines.append(f"- {phase}: " + ", ".join(f"{n} {what}" for what, n in most))
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=LINES, default=list(LINES), metavar="NAME")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try the script")
    parser.add_argument("--precision", choices=("fp16", "bf16"), default="fp16")
    given = parser.parse_args(argv)
    found = {
        name: count(LINES[name].settings, given.tiny, given.precision).counts for name in given.only
    }
    table = markdown(found)
    Path("outputs").mkdir(exist_ok=True)
    Path("outputs/launches.md").write_text(table)
    plain = {
        name: {
            phase: {"launches": one.launches, "waits": one.waits.total(), "bytes": one.bytes}
            for phase, one in counts.items()
        }
        for name, counts in found.items()
    }
    Path("outputs/launches.json").write_text(json.dumps(plain, indent=2))
    print(table)


if __name__ == "__main__":
    main()
