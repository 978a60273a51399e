"""The lines of the benchmark on a GPU: what each measures, aims at and found, as a table."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.core.subject import Subject

CLASS_PICTURES = 24  # drawn; the first batch warms up
GIB = 2**30
CLOSE = 0.1  # how far a prediction may be off
_LORA = {"method": "lora", "lora_rank": 16, "memory": "low", "mixed_precision": "bf16"}


@dataclass(frozen=True)
class Line:
    """One line of the table: a base, the settings it is trained with, and what is aimed at."""

    base: str
    title: str
    settings: dict[str, Any]
    #: ("GiB", peak memory at most), ("share", of the reference's seconds per step at most),
    #: ("floor", times the floor's seconds at most) or ("times", the reference's images per second
    #: at least)
    targets: tuple[tuple[str, float], ...]
    script: str | None = None  #: diffusers' of the same
    flags: tuple[str, ...] = ()
    draws: bool = False  #: class images, in place of training

    def config(self, folder: Path, work: Path, tiny: bool) -> TrainConfig:
        """Return a config for one instance and one class image, without drawing or validation."""
        fields: dict[str, Any] = {
            "batch_size": 1, "steps": 10**6, "checkpoint_every": 10**6, "validate_every": 0,
            "class_folder": str(work / "class"), "optimizer": "adamw8bit",
        } | self.settings  # fmt: skip
        if tiny:  # bits need a GPU, and a CPU computes in float32
            fields |= {"resolution": 16, "mixed_precision": "auto", "quantize": None}
            fields |= {"optimizer": "adamw", "prior_inference_steps": 2}
        subject = Subject(str(work / "instance"), "dog")
        return TrainConfig(subject=subject, base=str(folder), **fields)


LINES = {
    "sd15-unet": Line(
        "sd15", "SD 1.5, U-Net",
        {"resolution": 512, "memory": "standard", "mixed_precision": "fp16"},
        (("share", 0.5), ("floor", 1.15)), "train_dreambooth.py",
    ),
    "sd15-unet-low": Line(
        "sd15", "SD 1.5, U-Net, low",
        {"resolution": 512, "memory": "low", "mixed_precision": "fp16"},
        (("share", 0.8), ("GiB", 5.90)), "train_dreambooth.py", ("--gradient_checkpointing",),
    ),
    "sd15-class-images": Line(
        "sd15", "SD 1.5, class images, 50 steps",
        {"resolution": 512, "mixed_precision": "fp16", "prior_inference_steps": 50,
         "prior_guidance_scale": 7.5, "class_images": CLASS_PICTURES, "class_folder": None},
        (("times", 1.3),), "train_dreambooth.py", draws=True,
    ),
    "sd15-class-images-default": Line(
        "sd15", "SD 1.5, class images, the default steps against 50",
        {"resolution": 512, "mixed_precision": "fp16", "class_images": CLASS_PICTURES,
         "class_folder": None},
        (("times", 3.0),), "train_dreambooth.py", draws=True,
    ),
    "sd15-text-low": Line(
        "sd15", "SD 1.5, U-Net and text encoder, low",
        {"resolution": 512, "memory": "low", "mixed_precision": "fp16",
         "train_text_encoder": True},
        (("share", 0.8), ("GiB", 6.61)), "train_dreambooth.py",
        ("--gradient_checkpointing", "--train_text_encoder"),
    ),
    "sdxl-lora": Line(
        "sdxl", "SDXL, LoRA of rank 16, low", _LORA | {"resolution": 1024},
        (("share", 0.7), ("GiB", 8.0)), "train_dreambooth_lora_sdxl.py",
        ("--rank=16", "--gradient_checkpointing"),
    ),
    "sdxl-full": Line(
        "sdxl", "SDXL, U-Net, lowest",
        {"resolution": 1024, "memory": "lowest", "mixed_precision": "bf16"}, (("GiB", 14.0),),
    ),
    "flux-qlora": Line(
        "flux", "Flux.1, QLoRA (nf4), low", _LORA | {"resolution": 512, "quantize": "nf4"},
        (("GiB", 10.0),),
    ),
    "sd35-lora": Line(
        "sd35", "SD 3.5 medium, LoRA, low", _LORA | {"resolution": 1024}, (("GiB", 12.0),),
        "train_dreambooth_lora_sd3.py", ("--rank=16", "--gradient_checkpointing"),
    ),
}  # fmt: skip


BASES = list(dict.fromkeys(line.base for line in LINES.values()))
SIDES = ("kit", "reference", "predicted")


def rank(name: str, side: str) -> int:
    """Return when to measure a side of a line: 0, SD 1.5's with what its targets ask, then 1, 2.

    That is the kit's side of the other bases, and at last the reference of what compares nothing.
    """
    line = LINES[name]
    compares = any(kind in ("share", "times") for kind, _ in line.targets)
    if side == "kit" or compares:
        return 0 if line.base == "sd15" else 1
    return 2


def row(name: str, found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Format one line's figures from its results by side."""
    line, kit, other = LINES[name], found["kit"], found["reference"]
    quantity = "pictures_per_second" if line.draws else "seconds"
    compared = kit.get(quantity) and other.get(quantity) and kit[quantity] / other[quantity]
    predicted = found["predicted"].get("peak")
    off = kit.get("peak") and predicted and kit["peak"] / predicted
    floor = kit.get("floor")
    measured = {
        "GiB": kit.get("peak") and kit["peak"] / GIB,
        "floor": floor and kit[quantity] / floor,
        "share": compared,
        "times": compared,
    }
    met = [_met(kind, bound, measured[kind]) for kind, bound in line.targets]
    return {
        "name": name,
        "title": line.title,
        "target": " and ".join(_target(kind, bound) for kind, bound in line.targets),
        "peak": kit.get("peak"),
        "before_training": kit.get("before_training"),
        "predicted": predicted,
        "measured_of_predicted": off,
        "close": off and abs(off - 1) <= CLOSE,
        "pace": kit.get(quantity),
        "busy": kit.get("busy"),
        "floor": kit.get("floor"),
        "floor_busy": kit.get("floor_busy"),
        "pace_of_floor": measured["floor"],
        "launches": kit.get("launches"),
        "waits": kit.get("waits"),
        "ram": kit.get("ram"),
        "reference_pace": other.get(quantity),
        "pace_of_reference": compared,
        "reference_peak": other.get("peak"),
        "met": False if False in met else None if None in met else True,
        "draws": line.draws,
        "device": kit.get("device"),
        "errors": {side: one["error"] for side, one in found.items() if "error" in one},
    }


def _target(kind: str, bound: float) -> str:
    return {
        "GiB": f"at most {bound:g} GiB",
        "share": f"at most {bound:.0%} of the reference's seconds per step",
        "floor": f"at most {bound:g} times the floor",
        "times": f"at least {bound:g} times the reference's images per second",
    }[kind]


def _met(kind: str, bound: float, measured: float | None) -> bool | None:
    """Return whether a target is met; None where it is not known yet."""
    if measured is None:
        return None
    return measured >= bound if kind == "times" else measured <= bound


_HEAD = ("line", "target", "met", "peak GiB", "peak before training, GiB", "predicted GiB",
         "measured / predicted", "speed", "GPU busy", "floor", "GPU busy in the floor",
         "speed / floor", "launches per step", "waits per step", "reference's speed",
         "speed / reference's", "reference's peak GiB", "RAM GiB")  # fmt: skip


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Return the table; a cell without a figure says whether it is to come, failed or has none."""
    devices = sorted({one["device"] for one in rows if one["device"]})
    lines = [f"Measured on: {', '.join(devices) or 'nothing yet'}.", ""]
    lines += [cells(_HEAD), cells(["---"] * len(_HEAD)), *(cells(_row(one)) for one in rows)]
    errors = [(one["name"], side, text) for one in rows for side, text in one["errors"].items()]
    lines += ["", *(f"- {name}, {side}: {text}" for name, side, text in errors)]
    return "\n".join(lines).rstrip() + "\n"


def _row(one: dict[str, Any]) -> list[str]:
    unit = "{:.2f} images/s" if one["draws"] else "{:.3f} s/step"

    def cell(value: Any, form: str, side: str, there: bool = True) -> str:
        if value is not None:
            return form.format(value)
        return "failed" if side in one["errors"] else "not yet" if there else "none"

    def gib(name: str, side: str, there: bool = True) -> str:
        return cell(one[name] and one[name] / GIB, "{:.2f}", side, there)

    compared, trains = LINES[one["name"]].script is not None, not one["draws"]
    gpu = one["device"] != "a CPU"
    return [
        one["title"],
        one["target"],
        cell(None if one["met"] is None else ["no", "yes"][one["met"]], "{}", "kit"),
        gib("peak", "kit"),
        gib("before_training", "kit", trains),
        gib("predicted", "predicted", trains),
        cell(one["measured_of_predicted"], "{:.2f}", "kit", trains),
        cell(one["pace"], unit, "kit"),
        *(cell(one[part], unit, "kit", trains) for part in ("busy", "floor", "floor_busy")),
        cell(one["pace_of_floor"], "{:.2f}", "kit", trains),
        # A CPU has neither.
        *(cell(one[part], "{:.0f}", "kit", trains and gpu) for part in ("launches", "waits")),
        cell(one["reference_pace"], unit, "reference", compared),
        cell(one["pace_of_reference"], "{:.2f}", "reference", compared),
        gib("reference_peak", "reference", compared),
        gib("ram", "kit"),
    ]


def cells(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
