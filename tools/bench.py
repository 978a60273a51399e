"""``make bench``: a training step on a CPU beside its floor and a reference, and its phases.

Into ``outputs/bench.json``, and as tables in Markdown. The bundled base is trained on one photo and
one class image at a time (1 + 1) and on two of each. In turn, so that a slow moment of the machine
hits all: a step without EMA, a step with it, and the floor, which is one forward and backward pass
of the U-Net alone on the same batch; then an update of diffusers' script on the same base, photos
and class images, in a process that waits for its turn.

    --reference DIR   diffusers' folder examples/dreambooth; its script needs torchvision
    --demo            also time ``make demo``
    --cpu-time        a processor's seconds in place of the clock's, for a machine that does other
                      work as well; with OMP_NUM_THREADS=1, as waiting threads count too
    --only-steps      no evaluation's pace
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image

from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.core.made_with import peak_memory_mb
from dreambooth_lib.evaluation.demo import BUNDLED_SUBJECTS, bundled_subjects
from dreambooth_lib.evaluation.dreambench import Protocol, draw_all, load_benchmark
from dreambooth_lib.evaluation.scores import score
from dreambooth_lib.evaluation.tables import table
from dreambooth_lib.families import loading
from dreambooth_lib.metrics.encoders import Encoder, embed_files
from dreambooth_lib.training import runs
from dreambooth_lib.training.loop import training_steps
from dreambooth_lib.training.setup import Trainer
from dreambooth_lib.training.validation import TOYBOX_SCORER
from dreambooth_lib.training.validation_record import time_share
from tools import gpu_measure
from tools.gpu_table import Line
from tools.phases import PHASES, Stopwatch, follow

STEPS, WARMUP = 60, 5  # updates of the profile, and made before
#: Rounds, and updates of each side in a row in one; the first of a row is not counted, as it meets
#: cold caches. Threads that wait for work keep a processor busy for up to ``PAUSE`` seconds.
ROUNDS, TURN, PAUSE = 17, 3, 0.3
PROMPTS, FEW, MANY = 25, 512, 2048  # of an evaluation: prompts drawn, pictures embedded
EMA_DECAY = 0.98
SCRIPT = "train_dreambooth.py"
LINE = Line("toybox", "the bundled base on a CPU", {}, ("share", 0.62), SCRIPT)
#: At most: a step over the floor, over the reference's; seconds of the demo; of it validation.
TARGETS = {"floor": 1.15, "reference": 0.62, "demo": 120.0, "validation": 0.15}
SIZES = (1, 2)
UPDATE = "update: "  #: with which the reference's process tells its seconds


def config_of(batch_size: int, work: Path, ema: bool) -> TrainConfig:
    """Return a config that the reference can follow: the bundled base, given as a folder."""
    return TrainConfig(
        bundled_subjects()[0], str(loading.BUNDLED / "toybox"), batch_size=batch_size,
        class_folder=str(work / "class"), resolution=64, optimizer="adamw", validate_every=0,
        steps=10**6, checkpoint_every=10**6, ema_decay=EMA_DECAY if ema else None,
    )  # fmt: skip


def measure(
    batch_size: int,
    work: Path,
    scripts: Path | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """Time in turn a step with and without EMA, the floor and, if there is one, the reference."""
    trainers = {
        side: Trainer(runs.start(config_of(batch_size, work, ema), work / f"{side}-{batch_size}"))
        for side, ema in (("step", False), ("step_with_ema", True))
    }
    sides: dict[str, Callable[[], Any]] = {
        side: training_steps(trainer).__next__ for side, trainer in trainers.items()
    }
    sides["floor"] = gpu_measure.passes_of(trainers["step"])
    seconds: dict[str, list[float]] = {side: [] for side in (*sides, "reference")}
    with _reference(batch_size, work, scripts, clock) as reference:
        for _ in range(ROUNDS):
            for side, do in sides.items():
                seconds[side] += gpu_measure.timed(do, TURN, clock)[1:]
            time.sleep(PAUSE)
            turn = [took for _ in range(TURN) if (took := reference.update()) is not None]
            seconds["reference"] += turn[1:]
            time.sleep(PAUSE)
    found: dict[str, Any] = {"batch": batch_size, "failed": reference.failed}
    if reference.failed:
        seconds["reference"] = []
    skipped = 2 * (TURN - 1)  # of the first two rounds
    found |= {side: median(times[skipped:]) if times else None for side, times in seconds.items()}
    for side in trainers:
        for other in ("floor", "reference"):
            found[f"{side}/{other}"] = found[other] and found[side] / found[other]
    return found | {"profile": profile(batch_size, work, clock)}


class Reference:
    """Diffusers' script in a process of its own, which makes an update when it is told to."""

    def __init__(self, child: "subprocess.Popen[str] | None", log: Path) -> None:
        self.child, self.log = child, log
        self.failed: str | None = None  #: its last words
        self._read()  # it starts up

    def update(self) -> float | None:
        """Let it make one update; return its seconds, or None where there is no reference."""
        if self.child is None or self.failed:
            return None
        assert self.child.stdin is not None
        self.child.stdin.write("\n")
        self.child.stdin.flush()
        return self._read()

    def _read(self) -> float | None:
        if self.child is None:
            return None
        assert self.child.stdout is not None
        for line in self.child.stdout:
            if line.startswith(UPDATE):
                return float(line.removeprefix(UPDATE))
        self.child.wait()
        self.failed = (self.log.read_text().strip() or "it said nothing").splitlines()[-1]
        return None


@contextmanager
def _reference(
    batch_size: int, work: Path, scripts: Path | None, clock: Callable[[], float]
) -> Iterator[Reference]:
    log = work / "reference.log"
    if scripts is None:
        yield Reference(None, log)
        return
    command = [sys.executable, "-m", "tools.bench", "--one", str(batch_size), str(work)]
    command += ["--cpu-time"] if clock is time.process_time else []
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with log.open("w") as errors:
        child = subprocess.Popen([*command, "--reference", str(scripts)], stderr=errors, **pipes)
    try:
        yield Reference(child, log)
    finally:
        child.kill()
        child.wait()


def one(batch_size: int, work: Path, scripts: Path, clock: Callable[[], float]) -> None:
    """Be the reference's process: tell the seconds of each update, and wait until the next."""

    def told(seconds: float) -> None:
        print(f"{UPDATE}{seconds}", flush=True)
        sys.stdin.readline()

    arguments = gpu_measure.arguments(LINE, config_of(batch_size, work, False), work)
    gpu_measure.run_script(scripts / SCRIPT, arguments, 10**6, told, clock)


def profile(batch_size: int, work: Path, clock: Callable[[], float]) -> dict[str, float]:
    """Return the mean seconds of a step with EMA, by phase."""
    trainer = Trainer(
        runs.start(config_of(batch_size, work, True), work / f"profiled-{batch_size}")
    )
    watch = Stopwatch(clock)
    step = watch.during("rest", follow(trainer, watch.during).__next__)
    for _ in range(WARMUP):
        step()
    watch.seconds.clear()
    for _ in range(STEPS):
        step()
    return {phase: watch.seconds[phase] / STEPS for phase in PHASES}


def evaluation(folder: Path) -> dict[str, float]:
    """Pictures a second through the paper's protocol, and what four times as many cost in memory.

    ``drawn``: by the bundled base, 25 steps. ``embedded``: from files, by the scorer. ``scored``:
    from kept embeddings to a table's rows.
    """
    bundled = load_benchmark(BUNDLED_SUBJECTS)
    few = {kind: prompts[:PROMPTS] for kind, prompts in bundled.prompts.items()}
    one = replace(bundled, subjects=bundled.subjects[:1], prompts=few)
    protocol = Protocol(images_per_prompt=2, class_images=8)
    methods = {"base": lambda _: "toybox"}
    began = time.perf_counter()
    for at in draw_all(one, methods, folder, protocol):
        drawn = at.total
    drawn_in = time.perf_counter() - began
    encoder = Encoder(TOYBOX_SCORER)
    rng = np.random.default_rng(0)
    files = [folder / f"noise{i}.png" for i in range(MANY)]
    for file in files:
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(file)
    began = time.perf_counter()
    embed_files(encoder, files[:FEW], folder / "kept")
    embedded_in = time.perf_counter() - began
    before = peak_memory_mb()
    embed_files(encoder, files, folder / "kept")
    grown = peak_memory_mb() - before
    list(score(one, methods, folder, {"scorer": encoder}, protocol))
    began = time.perf_counter()
    rows = list(score(one, methods, folder, {"scorer": encoder}, protocol))
    assert rows
    return {
        "drawn_per_second": drawn / drawn_in,
        "embedded_per_second": FEW / embedded_in,
        "scored_per_second": drawn / (time.perf_counter() - began),
        f"mb_more_for_{MANY}_pictures_than_for_{FEW}": grown,
    }


def import_seconds() -> float:
    """Measure the median time of ``import dreambooth_lib`` in processes of their own."""
    code = (
        "from time import perf_counter as now; t = now(); import dreambooth_lib; print(now() - t)"
    )
    command = [sys.executable, "-c", code]
    return median(float(subprocess.check_output(command)) for _ in range(5))


def demo(work: Path) -> dict[str, float]:
    """Time the demo in a process of its own, and its validation's share of the training time."""
    out = work / "demo"
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "dreambooth_lib", "demo", "--out", str(out)], check=True)
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "validation": time_share(runs.resume(out / "run"))}


def markdown(figures: dict[str, Any]) -> str:
    """Return the tables: ratios beside their targets, the phases of a step, and the rest."""
    rows = []
    for found in figures["training"]:
        size = f"{found['batch']} + {found['batch']}"
        none = "failed" if found["failed"] else "not asked"
        for side in ("step", "step_with_ema"):
            title = f"{size}, a step" + (" with EMA" if side == "step_with_ema" else "")
            rows.append((title, f"{found[side]:.4f}", "", ""))
            for other in ("floor", "reference"):
                ratio, target = found[f"{side}/{other}"], TARGETS[other]
                rows.append((
                    f"{title}, over the {other}'s", f"{ratio:.2f}" if ratio else none,
                    f"at most {target:g}", _met(ratio, target) if ratio else none,
                ))  # fmt: skip
        rows.append((f"{size}, the floor: the U-Net alone", f"{found['floor']:.4f}", "", ""))
        reference = found["reference"]
        rows.append((f"{size}, the reference", f"{reference:.4f}" if reference else none, "", ""))
    if demo := figures["demo"]:
        seconds, share = demo["seconds"], demo["validation"]
        rows += [
            ("the demo", f"{seconds:.0f}", f"at most {TARGETS['demo']:.0f}",
             _met(seconds, TARGETS["demo"])),
            ("validation's share of its training time", f"{share:.0%}",
             f"at most {TARGETS['validation']:.0%}", _met(share, TARGETS["validation"])),
        ]  # fmt: skip
    else:
        rows.append(("the demo", "not asked", f"at most {TARGETS['demo']:.0f}", "not asked"))
    rows.append(("import dreambooth_lib", f"{figures['import_seconds']:.3f}", "", ""))
    head = ("milliseconds of a step with EMA", *PHASES, "all")
    phases = []
    for found in figures["training"]:
        parts = [1000 * found["profile"][phase] for phase in PHASES]
        size = f"{found['batch']} + {found['batch']}"
        phases.append((size, *(f"{part:.1f}" for part in (*parts, sum(parts)))))
    told = [f"- the reference failed: {f['failed']}" for f in figures["training"] if f["failed"]]
    paces = [f"- {name}: {value:.1f}" for name, value in figures["evaluation"].items()]
    tables = f"{table(('work', 'seconds', 'target', 'met'), rows)}\n{table(head, phases)}"
    return "\n".join([tables, *told, *paces]) + "\n"


def _met(value: float, target: float) -> str:
    return "yes" if value <= target else "no"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--reference", type=Path, help="diffusers' folder examples/dreambooth")
    parser.add_argument("--demo", action="store_true", help="also time the demo")
    parser.add_argument("--cpu-time", action="store_true", help="a processor's seconds")
    parser.add_argument("--only-steps", action="store_true", help="no evaluation's pace")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    clock = time.process_time if given.cpu_time else time.perf_counter
    if given.one:
        return one(int(given.one[0]), Path(given.one[1]), given.reference, clock)
    from tools.bench_gpu import save_photos

    scripts = given.reference and given.reference.resolve()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        save_photos(work, 64)
        figures: dict[str, Any] = {
            "threads": torch.get_num_threads(),
            "clock": clock.__name__,
            "training": [measure(size, work, scripts, clock) for size in SIZES],
            "demo": demo(work) if given.demo else None,
            "evaluation": {} if given.only_steps else evaluation(work / "evaluation"),
            "import_seconds": import_seconds(),
        }
    Path("outputs").mkdir(exist_ok=True)
    Path("outputs/bench.json").write_text(json.dumps(figures, indent=2))
    table = markdown(figures)
    Path("outputs/bench.md").write_text(table)
    print(table)
    return None


if __name__ == "__main__":
    main()
