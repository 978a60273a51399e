"""Ways to train that a kill or a fault must not change the result of, and what a result is."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import torch
from safetensors import safe_open

from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.core.files import visible_files
from dreambooth_lib.core.made_with import MADE_WITH_FILE
from dreambooth_lib.core.processes import join_group
from dreambooth_lib.training import runs
from dreambooth_lib.training.loop import train
from dreambooth_lib.training.runs import Run
from hostile.run_folders import tiny_config

#: Settings by name; all have class images and latents but where they say otherwise.
METHODS: dict[str, dict[str, Any]] = {
    "full": {"flip": True},
    "validated": {"validate_every": 3, "ema_decay": 0.9, "early_stop": True},
    "lora": {"method": "lora", "lora_rank": 2, "train_text_encoder": True},
    "text_encoder": {"train_text_encoder": True, "prior": "none"},
    "token": {"method": "lora", "lora_rank": 2, "train_token": True, "prior": "none"},
    "low_memory": {"memory": "low"},
    "accumulation": {"gradient_accumulation": 2, "lr_schedule": "cosine", "dropout": 0.1},
    "distilled": {"prior": "distilled"},
    "prior_prompts": {"prior": "distilled_images", "prior_prompts": ("a car",), "anchor_weight": 1},
    "two_processes": {"validate_every": 3},
}


def config_of(method: str, material: Path) -> TrainConfig:
    config = tiny_config(material, **METHODS[method])
    if config.train_token:
        config = replace(config, subject=replace(config.subject, identifier="<rex>"))
    return config


def train_to_end(config: TrainConfig, folder: Path) -> None:
    """Start or resume a run, alone or in a group of processes, and train it to its end."""
    torch.set_num_threads(1)
    state = join_group()
    if state.is_main_process:
        runs.start_or_resume(config, folder)
    state.wait_for_everyone()
    for _ in train(runs.resume(folder)):
        pass
    state.destroy_process_group()


def result(folder: Path) -> dict[str, str]:
    """Return what a run and the caches beside it hold, by file, without seconds and memory taken.

    An optimizer's state counts with the newest checkpoint only: the others' is of no use.
    """
    left_out = ("digests.json", MADE_WITH_FILE)
    files = [name for name in visible_files(folder) if name.name not in left_out]
    newest = max(folder.glob("run/checkpoints/*"), default=folder).name
    files = [f for f in files if f.name != "optimizer.safetensors" or f.parent.name == newest]
    return {name.as_posix(): digest(folder / name) for name in files}


def digest(file: Path) -> str:
    content = file.read_bytes()
    if file.suffix == ".jsonl":
        rows = Run(file.parent, None).rows(file.stem)  # type: ignore[arg-type]
        rows = [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
        content = json.dumps(rows).encode()
    elif file.suffix == ".zip":  # its members have the times of their files
        with ZipFile(file) as archive:
            content = str([(info.filename, info.CRC) for info in archive.infolist()]).encode()
    elif file.suffix == ".safetensors":  # safetensors' own writer has no fixed order
        with safe_open(file, "pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in sorted(opened.keys())}
            content = json.dumps(opened.metadata(), sort_keys=True).encode()
        for name, tensor in tensors.items():
            content += f"{name} {tensor.dtype} {[*tensor.shape]}".encode()
            content += tensor.flatten().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(content).hexdigest()
