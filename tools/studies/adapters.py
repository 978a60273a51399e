"""The configs of a study of peft's adapters at equal parameter counts, and their files' sizes.

On the embedded base each has within 17% of the parameters of a LoRA of rank 8, 279,552.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.core.files import replace_file
from dreambooth_lib.core.subject import Subject
from dreambooth_lib.training import runs
from dreambooth_lib.training.checkpoints import load_state

STEPS = 300
#: By name: the config's fields that make each about as large as the others.
_KINDS: dict[str, dict[str, Any]] = {
    "LoRA": {"lora_rank": 8},
    "LoKr": {"adapter": "lokr", "lora_rank": 16, "adapter_settings": {"decompose_factor": 2}},
    "LoHa": {"adapter": "loha", "lora_rank": 4},
    "OFT": {"adapter": "oft", "lora_rank": 32},
    "DoRA": {"lora_rank": 8, "dora": True},
    "GraLoRA": {"adapter": "gralora", "lora_rank": 8},
    "DEFT": {"adapter": "deft", "lora_rank": 8},
    "DeLoRA": {"adapter": "delora", "lora_rank": 8},
    "MiSS": {"adapter": "miss", "lora_rank": 14},
    "HiRA": {"adapter": "hira", "lora_rank": 8},
    "C3A": {"adapter": "c3a", "lora_rank": 16},
    "GLoRA": {"adapter": "glora", "lora_rank": 3},
    "PEANUT": {"adapter": "peanut", "lora_rank": 7},
    "HRA": {"adapter": "hra", "lora_rank": 18},
}


def adapters(subject: Subject) -> dict[str, TrainConfig]:
    """Return a config for each adapter, with class images and the learning rate of LoRA."""
    lora = TrainConfig(subject, method="lora", prior="generated", hold_out=False, steps=STEPS)
    return {name: lora.replace(**fields) for name, fields in _KINDS.items()}


def sizes(cells: Mapping[str, Path], file: Path) -> list[str]:
    """Return and write a table of each kind's trained parameters and its saved bytes."""
    lines = ["| | trained parameters | bytes of its files |", "|---|---|---|"]
    for name, folder in cells.items():
        run = runs.resume(folder)
        trained = load_state(max(run.checkpoints().items())[1], ("model",))["model"]
        weights = run.pipeline.rglob("*.safetensors")
        numbers, written = (
            sum(w.numel() for w in trained.values()),
            sum(f.stat().st_size for f in weights),
        )
        lines.append(f"| {name} | {numbers:,} | {written:,} |")
    replace_file(file, ("\n".join(lines) + "\n").encode())
    return lines
