"""The jobs that ``make ram`` measures, each of which has a process of its own.

What a GPU would hold lies in mapped files with holes, which are no memory that the system cannot
drop; a copy of it to the CPU is a copy here too.
"""

from collections.abc import Callable
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.overrides import TorchFunctionMode

from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.core.files import save_png
from dreambooth_lib.core.subject import Subject
from dreambooth_lib.export import comfyui_checkpoint, comfyui_lora, pipeline_folder
from dreambooth_lib.families import loading, pretrained
from dreambooth_lib.notebook import drive_backup
from dreambooth_lib.training import runs, validation_record
from dreambooth_lib.training.best_checkpoint import best_checkpoint
from dreambooth_lib.training.setup import Trainer
from dreambooth_lib.training.trainable import load, training_load_options
from dreambooth_lib.training.validation import PROMPTS
from tools.ram import Kind, measured

STEPS = (250, 500)  # with a checkpoint and a validation each; the earlier one is the best


class Device(TorchFunctionMode):
    """Under it a copy of what :meth:`hold` put onto the device takes memory, as from a GPU."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        folder.mkdir(exist_ok=True)
        self.folder, self.numbers = folder, count()
        self.held: set[int] = set()

    def zeros(self, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """Return what a GPU would hold: zeros in a mapped file, which is nothing but a hole."""
        if shape.numel() == 0:
            return torch.empty(shape, dtype=dtype)
        file = self.folder / f"{next(self.numbers)}"
        storage = torch.UntypedStorage.from_file(str(file), True, shape.numel() * dtype.itemsize)
        file.unlink()
        self.held.add(storage.data_ptr())
        strides = torch.empty(shape, device="meta").stride()
        return torch.empty(0, dtype=dtype).set_(storage, 0, shape, strides)

    def hold(self, *modules: torch.nn.Module) -> None:
        """Put modules onto the device."""
        tensors = {id(t): t for m in modules for t in (*m.parameters(), *m.buffers())}
        for tensor in tensors.values():
            tensor.data = self.zeros(tensor.shape, tensor.dtype)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in (torch.Tensor.cpu, torch.Tensor.to) and out is args[0]:
            given = [*args[1:], *(kwargs or {}).values()]
            moves = any(isinstance(one, (str, torch.device)) for one in given)
            held = out.untyped_storage().data_ptr() in self.held
            if held and (moves or func is torch.Tensor.cpu):
                return out.clone()
        return out


def config_of(kind: Kind, work: Path, tiny: bool) -> TrainConfig:
    """Return a default config, but for what only a GPU or the real scorer would need."""
    settings: dict[str, Any] = {
        "resolution": 16 if tiny else 64, "mixed_precision": "bf16", "optimizer": "adamw8bit",
        "class_folder": str(work / "class"), "scorer": "toybox",
    } | kind.settings  # fmt: skip
    return TrainConfig(Subject(str(work / "instance"), "dog"), str(work / "base"), **settings)


def train(kind: Kind, work: Path, tiny: bool) -> None:
    """Load a base for training, write a run's checkpoints and pipeline, and take it up again."""
    run = runs.start(config_of(kind, work, tiny), work / "run")
    with measured("load"):
        trainer = Trainer(run)
    device = Device(work / "device")
    on_device(trainer, device)
    for step in (0, *STEPS):
        note_look(run, step)
    written = 0
    with device:
        with measured("checkpoint") as told:
            for step in STEPS:
                trainer.optimizer.completed_steps = step
                trainer.save_checkpoint()
                written += size(run.checkpoints()[step])
            told |= {"bytes": written / len(STEPS), "runs": written / len(STEPS) * due(run.config)}
        with measured("pipeline") as told:
            trainer.save_pipeline()
            told["bytes"] = size(run.pipeline)
        with measured("resume"):
            trainer.optimizer.load_state_dict(run.load_checkpoint())


def on_device(trainer: Trainer, device: Device) -> None:
    """Put what a GPU would hold there: all models, and the state of an optimizer that stepped."""
    parts = trainer.family.pipeline.components.values()
    device.hold(trainer.trainable, *(p for p in parts if isinstance(p, torch.nn.Module)))
    adam: Any = trainer.optimizer.adam
    for number, group in enumerate(adam.param_groups):
        for index, parameter in enumerate(group["params"]):
            adam.init_state(group, parameter, number, index)
    for state in adam.state.values():
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and "qmap" not in name:
                state[name] = device.zeros(value.shape, value.dtype)


def due(config: TrainConfig) -> int:
    """Return how many checkpoints a whole run writes."""
    every = [one for one in (config.validate_every, config.checkpoint_every) if one]
    steps = range(1, config.steps + 1)
    return sum(step == config.steps or any(step % one == 0 for one in every) for step in steps)


def note_look(run: runs.Run, step: int) -> None:
    """Record a validation of grey images; the first of STEPS scores best."""
    found: dict[str, Any] = dict.fromkeys(
        validation_record.ValidationResult.__dataclass_fields__, 0.5
    )
    found["subject_fidelity"] = {0: 0.4, STEPS[0]: 0.9}.get(step, 0.5)
    rows = {"subject": [0.1], "class": [0.1]}
    kinds = {"subject": len(PROMPTS), "class": 3, "unrelated": 1}
    for name, pictures in kinds.items():
        for number in range(pictures):
            grey = Image.new("RGB", (64, 64), "grey")
            save_png(grey, validation_record.images_folder(run, step) / f"{name}-{number}.png")
    found |= {"step": step, "held_out": rows}
    run.append("validation", asdict(validation_record.ValidationResult(**found)))
    run.append("log", {"step": step, "loss": 0.1, "instance_loss": 0.1, "prior_loss": 0.1,
                       "lr": 1e-6, "seconds": 1.0, "memory_mb": None})  # fmt: skip


def quantize(kind: Kind, work: Path, tiny: bool) -> None:
    """Load a base as QLoRA does, each weight that is quantized being put onto the device at once.

    As in training the text encoders come first and alone, and are let go of. The libraries ask for
    a GPU, and are told that the device is one; neither the numbers of a quantized weight nor what
    the prompts say is computed, since only where weights lie matters.
    """
    import bitsandbytes
    from diffusers.quantizers.bitsandbytes.bnb_quantizer import BnB4BitDiffusersQuantizer
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

    device = Device(work / "device")
    scales = bitsandbytes.functional.quantize_4bit(torch.zeros(64), quant_type="nf4")[1]

    def put(weight: Any, _: Any) -> Any:
        numbers = weight.data.contiguous().numel()
        weight.data = device.zeros(torch.Size([numbers // 2, 1]), torch.uint8)
        weight.quant_state, weight.bnb_quantized = scales, True
        if weight.module is not None:
            weight.module.quant_state = scales
        return weight

    bitsandbytes.nn.Params4bit._quantize = put
    for quantizer in (BnB4BitDiffusersQuantizer, Bnb4BitHfQuantizer):
        quantizer.validate_environment = lambda *_, **__: None
        quantizer.update_device_map = lambda *_: {"": "cpu"}
    loading._has_gpu = lambda: True
    pretrained.PromptCache = lambda *_: None
    config = config_of(kind, work, tiny).replace(base=str(work / "whole"), quantize="nf4")
    with measured("load"):
        load(config, prompts={""}, **training_load_options(config, torch.float16))


def drive(kind: Kind, work: Path, tiny: bool) -> None:
    """Mirror the run."""
    with measured("drive") as told:
        problem = drive_backup.backup(runs.resume(work / "run"), work / "drive")
        if problem is not None:
            raise RuntimeError(problem)
        told["bytes"] = size(work / "drive")


def keep(kind: Kind, work: Path, tiny: bool) -> None:
    """Keep the best checkpoint as a model."""
    run = runs.resume(work / "run")
    with measured("keep") as told:
        packed = pipeline_folder.write_model(
            run, best_checkpoint(run).step, work / "kept" / "model"
        )
        told["bytes"] = packed.stat().st_size


def export(kind: Kind, work: Path, tiny: bool) -> None:
    """Write one file of what was kept."""
    folder, file = work / "kept" / "model", work / "exported.safetensors"
    with measured("export") as told:
        if kind.settings.get("method") == "lora":
            comfyui_lora.write_lora(folder / "pytorch_lora_weights.safetensors", file)
        else:
            comfyui_checkpoint.write_checkpoint(folder, file)
        told["bytes"] = file.stat().st_size


DO: dict[str, Callable[[Kind, Path, bool], None]] = {
    "train": train, "quantize": quantize, "drive": drive, "keep": keep, "export": export,
}  # fmt: skip


def size(place: Path) -> int:
    """Count the bytes of the files in a folder."""
    return sum(file.stat().st_size for file in place.rglob("*") if file.is_file())
