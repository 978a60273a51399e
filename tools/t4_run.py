"""``make t4``: the minutes of a default run of SD 1.5 on a T4, from photos to the saved model.

Counted, not measured: how many evaluations, decoded images, steps and bytes a run with the
library's own defaults takes, each at a T4's rate. The evaluations are counted on a tiny model that
the library draws and validates with; their FLOPs on the real shapes; an optimizer's bytes by
:mod:`tools.launches`. ``RATES`` says where each rate comes from.

    --set FIELD=VALUE   another config, such as class_images=100
"""

import argparse
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.core.subject import Subject
from dreambooth_lib.evaluation.tables import table
from dreambooth_lib.families import loading
from dreambooth_lib.families.base import Family
from dreambooth_lib.notebook.timing import Pace, checkpoints
from dreambooth_lib.training.class_images import draw_class_images
from dreambooth_lib.training.held_out_loss import BINS, ROWS
from dreambooth_lib.training.memory_estimate import estimate
from dreambooth_lib.training.validation import draw_images, plan_for
from tools import architectures, launches
from tools.bench_gpu import save_photos

TARGET = 25.0  # minutes
PHOTOS = 5
GB, TERA = 1e9, 1e12
PARTS = architectures.SD15.models

#: What a step is assumed to take, and the bytes that its optimizer moved when this was assumed.
STEP_SECONDS, STEP_OPTIMIZER_BYTES = 0.7, 31.0e9
#: The same of a class image: 25 guided steps by PNDM, which evaluates once more, and one decoding
#: in float16. Neither time was measured by this project.
IMAGE_SECONDS, IMAGE_ROWS = 3.0, 52


@dataclass(frozen=True)
class Rate:
    """How fast a T4's session does something, and how that is known."""

    value: float
    unit: str
    source: str


def rates() -> dict[str, Rate]:
    """Return the rates; those of FLOPs follow from two assumed times and the FLOPs counted."""
    memory = 260 * GB
    training = step_flops({}) / (STEP_SECONDS - STEP_OPTIMIZER_BYTES / memory)
    drawing = (IMAGE_ROWS * flops("unet") + flops("decode")) / IMAGE_SECONDS
    return {
        "memory": Rate(memory / GB, "GB/s", "a T4's memory, of 320 GB/s by its data sheet"),
        "training": Rate(
            training / TERA, "TFLOP/s",
            f"a step of {STEP_SECONDS} s at 1 + 1, 512 pixels, fp16, without its optimizer, which "
            f"then moved {STEP_OPTIMIZER_BYTES / GB:.0f} GB; assumed",
        ),
        "drawing": Rate(
            drawing / TERA, "TFLOP/s",
            f"a class image of {IMAGE_ROWS} rows of the U-Net in {IMAGE_SECONDS:g} s, assumed",
        ),
        "float32": Rate(4.0, "TFLOP/s", "half of a T4's 8.1 by its data sheet, estimated"),
        "network": Rate(0.047, "GB/s", "4.27 GB downloaded in 90 s, estimated"),
        "disk": Rate(0.173, "GB/s", "a checkpoint of 5.19 GB written in 30 s, estimated"),
        "reading": Rate(0.5, "GB/s", "files that were just written or downloaded, estimated"),
        "drive": Rate(0.075, "GB/s", "50 to 100 MB/s, estimated"),
    }  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """A part of a run: how often what happens, and its seconds."""

    name: str
    count: str
    seconds: float
    beside: bool = False  #: in the background, while training goes on


@cache
def flops(what: str) -> float:
    """Count the FLOPs of one row of 512 pixels: of the U-Net, or encoding or decoding an image."""
    latents = torch.empty(1, 4, 64, 64, device="meta")
    work: dict[str, Callable[[], Any]] = {
        "unet": lambda: architectures.on_meta(PARTS["unet"])(
            latents, torch.ones(1, device="meta"), torch.empty(1, 77, 768, device="meta")
        ),
        "decode": lambda: architectures.on_meta(PARTS["vae"]).decode(latents),
        "encode": lambda: architectures.on_meta(PARTS["vae"]).encode(
            torch.empty(1, 3, 512, 512, device="meta")
        ),
    }
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        work[what]()
    return float(counter.get_total_flops())


def with_base(use: Callable[[TrainConfig, Path], Any], changes: dict[str, Any], tiny: bool) -> Any:
    """Call a function with a default config of SD 1.5, real but without weights, or tiny."""
    with TemporaryDirectory() as folder:
        work = Path(folder)
        architectures.save(architectures.SD15, work / "base", tiny=tiny, weights=tiny)
        save_photos(work, 64)
        subject = Subject(str(work / "instance"), "dog")
        return use(TrainConfig(subject, str(work / "base"), **changes), work)


def step_flops(changes: dict[str, Any]) -> float:
    """Count the FLOPs of a training step, by the library's own estimate."""
    settings = changes | {"resolution": 512, "validate_every": 0, "class_folder": "class"}
    return with_base(lambda config, _: estimate(config, "fp16").flops, settings, tiny=False)


def rows_drawn(changes: dict[str, Any]) -> dict[str, Counter[str]]:
    """Count the rows of U-Net and decoder of one class image, and of one validation's images."""
    return with_base(_rows_drawn, changes, tiny=True)


def _rows_drawn(config: TrainConfig, work: Path) -> dict[str, Counter[str]]:
    config = config.replace(resolution=16, class_images=1)
    family = loading.load_model(config.base, resolution=16)
    drawn = {}
    with torch.no_grad(), torch.autocast("cpu", torch.float16):  # as on a T4
        rows = follow_rows(family)
        for _ in draw_class_images(config, family, work / "class_images"):
            pass
        drawn["class image"] = Counter(rows)
        rows.clear()
        draw_images(family, config.subject, plan_for(config))
        drawn["validation"] = Counter(rows)
    return drawn


def follow_rows(family: Family) -> Counter[str]:
    """Return a count that follows the rows of a family's denoiser and decoder."""
    rows: Counter[str] = Counter()
    family.denoiser.register_forward_pre_hook(
        lambda _, args, kwargs: rows.update(unet=len((*args, *kwargs.values())[0])),
        with_kwargs=True,
    )

    def decoded(_: Any, args: Any, made: torch.Tensor) -> None:
        rows["decode32" if made.dtype is torch.float32 else "decode"] += len(made)

    family.pipeline.vae.decoder.conv_in.register_forward_hook(decoded)
    return rows


def stages(changes: dict[str, Any]) -> list[Stage]:
    """Return the stages of a run in their order; a T4 trains SD 1.5 at memory "standard"."""
    at = {name: rate.value for name, rate in rates().items()}
    config = with_base(lambda config, _: config, changes, tiny=False)
    drawn = rows_drawn(changes)
    counted = launches.count({"memory": "standard"} | _of_step(changes))
    optimizer = sum(
        counted.counts[p].bytes for p in ("optimizer step", "EMA") if p in counted.counts
    )

    def drawing(rows: Counter[str]) -> float:
        half = rows["unet"] * flops("unet") + rows["decode"] * flops("decode")
        return (half / at["drawing"] + rows["decode32"] * flops("decode") / at["float32"]) / TERA

    step = step_flops(_of_step(changes)) / TERA / at["training"] + optimizer / GB / at["memory"]
    held_out = BINS * ROWS * 2 * bool(config.hold_out)  # the subject's and the class's
    drawn["validation"]["unet"] += held_out
    validation = drawing(drawn["validation"])
    validations = Pace(step, validation).seconds(config) - config.steps * step
    images = config.class_images if config.draws_class_images else 0
    encoded = (images + PHOTOS) * flops("encode")
    weights = 4 * sum(architectures.parameters(part) for part in PARTS.values())
    saves, kept = checkpoints(config), weights // 2
    copied = counted.checkpoint - counted.trained // 2  # float16 weights on Drive
    return [
        Stage("download the base", _gb(weights), weights / GB / at["network"]),
        Stage("load the base", _gb(weights), weights / GB / at["reading"]),
        Stage(
            "class images", f"{images} x {told(drawn['class image'])}",
            images * drawing(drawn["class image"]),
        ),
        Stage("latents", f"{images + PHOTOS} images", encoded / TERA / at["float32"]),
        Stage("training", f"{config.steps} steps of {step:.2f} s", config.steps * step),
        Stage(
            "validation",
            f"{validations / validation if validation else 0:.0f} x "
            f"{told(drawn['validation'])}",
            validations,
        ),
        Stage(
            "checkpoints", f"{saves} x {_gb(counted.checkpoint)}",
            saves * counted.checkpoint / GB / at["disk"],
        ),
        Stage("the pipeline at the end", _gb(weights), weights / GB / at["disk"]),
        Stage(
            "Drive, while it trains", f"{saves - 1} x {_gb(copied)}",
            (saves - 1) * copied / GB / at["drive"], beside=True,
        ),
        Stage("Drive, the last checkpoint", _gb(copied), copied / GB / at["drive"]),
        Stage(
            "keep the model, with its zip", f"2 x {_gb(kept)}",
            (weights / at["reading"] + 2 * kept / at["disk"]) / GB,
        ),
    ]  # fmt: skip


def _of_step(changes: dict[str, Any]) -> dict[str, Any]:
    """Return the changes that a single step depends on."""
    return {k: v for k, v in changes.items() if k in ("batch_size", "optimizer", "ema_decay")}


def told(rows: Counter[str]) -> str:
    """Say how many rows there are of each kind."""
    names = {"unet": "U-Net", "decode": "decoded in float16", "decode32": "decoded in float32"}
    return ", ".join(f"{rows[kind]} {name}" for kind, name in names.items() if rows[kind])


def _gb(size: float) -> str:
    return f"{size / GB:.2f} GB"


def markdown(found: Sequence[Stage]) -> str:
    """Return the stages with their minutes, and the rates with their sources."""
    rows = [
        (
            one.name,
            one.count,
            f"({one.seconds / 60:.1f})" if one.beside else f"{one.seconds / 60:.1f}",
        )
        for one in found
    ]
    total = minutes(found)
    rows.append(
        ("all", f"at most {TARGET:g}: {'met' if total <= TARGET else 'not met'}", f"{total:.1f}")
    )
    of_rates = [(name, f"{r.value:.3g} {r.unit}", r.source) for name, r in rates().items()]
    of_stages = table(("stage", "counted", "minutes"), rows)
    return f"{of_stages}\n{table(('rate', 'value', 'source'), of_rates)}"


def minutes(found: Sequence[Stage]) -> float:
    """Add up the minutes; what goes on beside training does not count."""
    return sum(one.seconds for one in found if not one.beside) / 60


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--set", nargs="+", default=[], metavar="FIELD=VALUE", dest="changes")
    given = parser.parse_args(argv)
    changes: dict[str, Any] = {}
    for change in given.changes:
        name, _, value = change.partition("=")
        changes[name] = json.loads(value)
    found = stages(changes)
    Path("outputs").mkdir(exist_ok=True)
    Path("outputs/t4_run.json").write_text(json.dumps([asdict(one) for one in found], indent=2))
    table = markdown(found)
    Path("outputs/t4_run.md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
