"""``make growth``: what ten times as much of something costs, in seconds and memory.

    python -m tools.growth class-images     one table; without a name all of them

class-images and photos  drawing or reading them, setting up the training, and its steps
validation               drawing and scoring a validation's images
resolution               a step of 512 and of 1024 pixels; of the tiny model an eighth of them
rank                     a step with adapters of a rank

Each size runs in a fresh process on a tiny Stable Diffusion with random weights. Beside its peak
of resident memory stands what is computed: the bytes that have to be there for that size. What
depends on the model itself, resolution and rank, is computed for the real SD 1.5 by the library's
own estimate. A step should take the same whatever is in the cache; the rest should be linear.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.core.made_with import peak_memory_mb
from dreambooth_lib.core.subject import Subject

STEPS = 15
SIDE = 64  # pixels of the tiny model's images, but of those whose resolution grows
MB = 1e6


@dataclass
class Measured:
    """One size's seconds by what is done, and the bytes that it has to hold, and more figures."""

    seconds: dict[str, float]
    computed: int  #: bytes that grow with the size, at least
    more: dict[str, float]


class Job:
    """One measurement, in a folder with a tiny base."""

    def __init__(self, work: Path) -> None:
        self.work, self.base = work, work / "base"
        self.seconds: dict[str, float] = {}

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Time this under a name."""
        began = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - began

    def config(self, **changes: Any) -> TrainConfig:
        """Return a config of the tiny base; its photos and class images are those of the job."""
        fields: dict[str, Any] = {
            "resolution": SIDE, "validate_every": 0, "steps": 10**6, "checkpoint_every": 10**6,
            "class_folder": str(self.work / "class"), "optimizer": "adamw",
        } | changes  # fmt: skip
        return TrainConfig(Subject(str(self.work / "instance"), "dog"), str(self.base), **fields)

    def train(self, config: TrainConfig) -> Any:
        """Set a training up and make some steps; return its trainer."""
        from dreambooth_lib.training import runs
        from dreambooth_lib.training.loop import training_steps
        from dreambooth_lib.training.setup import Trainer

        with self.timed("set-up"):
            trainer = Trainer(runs.start(config, self.work / "run"))
        made = training_steps(trainer)
        seconds = [next(made).seconds for _ in range(STEPS)]
        self.seconds["a step"] = median(seconds[STEPS // 3 :])
        return trainer


def latents(trainer: Any) -> int:
    """Return the bytes of a trainer's cached latents."""
    caches = [cache for kinds in trainer.batches.by_shape.values() for cache, _ in kinds]
    return sum(t.nbytes for cache in caches for part in cache.posteriors for t in part)


def class_images(job: Job, size: int) -> Measured:
    from dreambooth_lib.training.class_images import draw_class_images
    from dreambooth_lib.training.sampling import load_source

    config = job.config(class_folder=None, class_images=size, prior_inference_steps=2)
    family = load_source(config)
    with job.timed("drawing"):
        for _ in draw_class_images(config, family, job.work / "class_images"):
            pass
    trainer = job.train(config)
    return Measured(job.seconds, latents(trainer) + 3 * size * SIDE**2, {})


def photos(job: Job, size: int) -> Measured:
    from dreambooth_lib.data.images import read_photos

    save_noise(job.work / "instance", size)
    with job.timed("reading"):
        read_photos(job.work / "instance")
    trainer = job.train(job.config())
    return Measured(job.seconds, latents(trainer) + 3 * size * SIDE**2, {})


def validation(job: Job, size: int) -> Measured:
    from dreambooth_lib.metrics.encoders import Encoder
    from dreambooth_lib.training.sampling import load_source
    from dreambooth_lib.training.validation import (
        TOYBOX_SCORER,
        Scorers,
        ValidationPlan,
        draw_images,
        score_images,
    )

    config = job.config()
    family, encoder = load_source(config), Encoder(TOYBOX_SCORER)
    # Half of them are of the subject's four prompts, and of the others one is unrelated.
    plan = ValidationPlan(size // 8, size // 2 - 1, 1, inference_steps=2, guidance_scale=7.5)
    with job.timed("drawing"):
        images = draw_images(family, config.subject, plan)
    with job.timed("scoring"):
        reference = encoder.embed_images(images.subject[:4])
        score_images(Scorers(encoder, encoder), reference, config.subject, images, images)
    return Measured(job.seconds, 3 * size * SIDE**2, {})


def resolution(job: Job, size: int) -> Measured:
    from dreambooth_lib.training.memory_estimate import estimate

    # The tiny model's latents are four times as many a side as the real one's.
    job.train(job.config(resolution=size // 8))
    real = estimate(real_config(job.work).replace(resolution=size))
    return Measured(job.seconds, real.working, {"TFLOPs of a step": real.flops / 1e12})


def rank(job: Job, size: int) -> Measured:
    from dreambooth_lib.training.memory_estimate import estimate

    lora: dict[str, Any] = {"method": "lora", "lora_rank": size}
    job.train(job.config(**lora))
    real = estimate(real_config(job.work).replace(**lora))
    return Measured(
        job.seconds, real.moments + real.working, {"TFLOPs of a step": real.flops / 1e12}
    )


#: What grows, its sizes, and what is measured of it.
TABLES: dict[str, tuple[tuple[int, ...], Callable[[Job, int], Measured]]] = {
    "class-images": ((20, 200), class_images),
    "photos": ((3, 30, 300), photos),
    "validation": ((8, 80), validation),
    "resolution": ((512, 1024), resolution),
    "rank": ((4, 40), rank),
}


def real_config(work: Path) -> TrainConfig:
    """Return a config of the real SD 1.5, of which only configs are written."""
    from tools import architectures

    folder = work / "real"
    architectures.save(architectures.SD15, folder, weights=False)
    subject = Subject(str(work / "instance"), "dog")
    return TrainConfig(subject, str(folder), validate_every=0, class_folder=str(work / "class"))


def save_noise(folder: Path, count: int) -> None:
    """Write so many different photos."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for number in range(count):
        pixels = rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"noise{number}.png")


def one(name: str, size: int) -> dict[str, Any]:
    """Measure one size in this process."""
    from tools import architectures
    from tools.bench_gpu import save_photos

    with TemporaryDirectory() as folder:
        job = Job(Path(folder))
        architectures.save(architectures.SD15, job.base, tiny=True)
        save_photos(job.work, SIDE)
        if name == "photos":
            for photo in (job.work / "instance").iterdir():
                photo.unlink()
        found = TABLES[name][1](job, size)
    peak = int(peak_memory_mb() * 2**20)
    return {"size": size, "peak": peak, **vars(found)}


def measure(name: str, sizes: Sequence[int]) -> list[dict[str, Any]]:
    """Measure each size in a process of its own."""
    rows = []
    for size in sizes:
        command = [sys.executable, "-m", "tools.growth", "--one", name, str(size)]
        printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        rows.append(json.loads(printed.splitlines()[-1]))
    return rows


def markdown(name: str, rows: Sequence[dict[str, Any]]) -> str:
    """Return a table with a line for each size, and one for how much more the last one takes."""
    from dreambooth_lib.evaluation.tables import table

    first, last = rows[0], rows[-1]
    timed, more = list(first["seconds"]), list(first["more"])
    head = [name, *(f"{what}, s" for what in timed), "peak MB", "computed MB", *more]
    lines = []
    for row in rows:
        lines.append([
            str(row["size"]), *(f"{row['seconds'][what]:.3f}" for what in timed),
            f"{row['peak'] / MB:.0f}", f"{row['computed'] / MB:.2f}",
            *(f"{row['more'][what]:.2f}" for what in more),
        ])  # fmt: skip
    lines.append([
        f"x {last['size'] / first['size']:g}",
        *(f"x {last['seconds'][what] / first['seconds'][what]:.1f}" for what in timed),
        f"{(last['peak'] - first['peak']) / MB:+.0f}",
        f"{(last['computed'] - first['computed']) / MB:+.2f}",
        *(f"x {last['more'][what] / first['more'][what]:.1f}" for what in more),
    ])  # fmt: skip
    return table(head, lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(TABLES)}")
    parser.add_argument("--sizes", nargs="+", type=int, help="others than the usual ones")
    parser.add_argument("--one", nargs=2, metavar=("NAME", "SIZE"), help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if given.one:
        print(json.dumps(one(given.one[0], int(given.one[1]))))
        return
    if unknown := set(given.names) - set(TABLES):
        parser.error(f"there is no table {', '.join(unknown)}; choose of {', '.join(TABLES)}")
    Path("outputs").mkdir(exist_ok=True)
    for name in given.names or TABLES:
        table = markdown(name, measure(name, given.sizes or TABLES[name][0]))
        Path(f"outputs/growth-{name}.md").write_text(table)
        print(table, flush=True)


if __name__ == "__main__":
    main()
