"""What training costs on a GPU: ``python -m tools.bench_gpu --work DIR``, into ``DIR/table.md``.

Real architectures with random weights, a fresh process for each measurement, the prediction of
``dreambooth_lib.estimate`` beside it, and with ``--reference`` diffusers' own script on the same
files. What lies measured in ``DIR`` is not measured again; a line that fails is told and the rest
goes on.

    --predict           only the predictions, which need no GPU
    --tiny              every line on tiny models in seconds, to try the script itself
    --reference PATH    diffusers' folder examples/dreambooth
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from dreambooth_lib.config import TrainConfig
from dreambooth_lib.state import replace_file
from tools.gpu_table import BASES, LINES, SIDES, Line, markdown, row

ROUNDS, WARMUP, TRIES = 20, 5, 60  # updates timed, made before, and tried at most


def measure(line: Line, config: TrainConfig, folder: Path) -> dict[str, float]:
    """Peak memory and pace of this kit, in a process that does nothing else."""
    if line.draws:
        from dreambooth_lib.prior import class_pictures
        from dreambooth_lib.sampling import alone, load_source

        family = load_source(config)
        times = [time.perf_counter() for _ in class_pictures(config, family, folder)]
        return {"pictures_per_second": pace(times, alone(family)), "peak": peak()}
    from dreambooth_lib import runs
    from dreambooth_lib.training import Trainer

    trainer = Trainer(runs.start(config, folder / "run"))
    before = peak()
    seconds: list[float] = []
    for _ in range(TRIES):  # in fp16 the first ones are skipped
        began = now()
        if trainer.update() is not None:
            seconds.append(now() - began)
        if len(seconds) == WARMUP + ROUNDS:
            break
    return {"seconds": median(seconds[WARMUP:]), "peak": peak(), "before_training": before}


def reference(line: Line, config: TrainConfig, folder: Path, scripts: Path) -> dict[str, float]:
    """The same of diffusers' script, left after as many updates, in a process of its own."""
    import runpy

    from torch.optim.optimizer import register_optimizer_step_post_hook

    times: list[float] = []
    updates = 1 if line.draws else WARMUP + ROUNDS + 1

    def leave(*_: Any) -> None:
        times.append(now())
        if len(times) == updates:
            raise SystemExit(0)

    register_optimizer_step_post_hook(leave)
    drawn = folder / "class"
    sys.argv = [str(scripts / str(line.script)), *arguments(line, config, folder)]
    sys.path.insert(0, str(scripts))
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as left:
        if len(times) < updates:
            raise RuntimeError(f"{line.script} ended ({left}) after {len(times)} updates") from left
    if line.draws:
        files = sorted(file.stat().st_mtime for file in drawn.iterdir())
        return {"pictures_per_second": pace(files, 4), "peak": peak()}  # it draws 4 at a time
    seconds = [later - earlier for earlier, later in pairwise(times)]
    return {"seconds": median(seconds[WARMUP:]), "peak": peak()}


def arguments(line: Line, config: TrainConfig, folder: Path) -> list[str]:
    """What diffusers' script is told, to do what the kit does by this config."""
    subject, own = config.subject, config.class_folder
    precision = "no" if config.mixed_precision == "auto" else config.mixed_precision
    return [
        f"--pretrained_model_name_or_path={config.base}",
        f"--instance_data_dir={subject.pictures}",
        f"--class_data_dir={own or folder / 'class'}",
        f"--num_class_images={len(list(Path(own).iterdir())) if own else config.class_pictures}",
        "--with_prior_preservation",
        f"--instance_prompt={subject.instance_prompt}",
        f"--class_prompt={subject.class_prompt}",
        f"--output_dir={folder / 'out'}",
        f"--resolution={config.resolution}",
        f"--mixed_precision={precision}",
        f"--learning_rate={config.learning_rate}",
        "--train_batch_size=1",
        "--max_train_steps=100000",
        "--checkpointing_steps=100000",
        "--lr_warmup_steps=0",
        "--seed=0",
        *(["--use_8bit_adam"] if config.optimizer == "adamw8bit" else []),
        *line.flags,
    ]


def pace(times: Sequence[float], batch: int) -> float:
    """Pictures a second from the moments at which each was there, the first batch left out."""
    return (len(times) - batch) / (times[-1] - times[batch - 1])


def now() -> float:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def peak() -> int:
    """Most bytes of GPU memory allocated so far; of a process without a GPU, resident ones."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def predict(line: Line, config: TrainConfig) -> dict[str, float]:
    """What ``estimate`` says before anything is loaded; of drawing it says nothing."""
    if line.draws:
        return {}
    from dreambooth_lib.estimate import estimate

    precision = config.mixed_precision
    found = estimate(config, "bf16" if precision == "auto" else precision)
    return asdict(found) | {"peak": found.memory}


@dataclass
class Bench:
    """Measurements in a folder: ``bases/``, ``configs/``, ``results/`` and the table."""

    work: Path
    tiny: bool = False
    scripts: Path | None = None
    limit: float = 240.0  #: seconds that one measurement may take
    asked: list[str] = field(default_factory=lambda: list(LINES))

    def result(self, name: str, side: str) -> dict[str, Any]:
        file = self.work / "results" / f"{name}.{side}.json"
        return json.loads(file.read_text()) if file.exists() else {}

    def sides(self, name: str) -> list[str]:
        """What there is to measure of a line."""
        compared = self.scripts is not None and LINES[name].script is not None
        return ["kit", "reference"] if compared else ["kit"]

    def missing(self, name: str, sides: Sequence[str]) -> list[str]:
        """Of these, what has not been measured, or failed."""
        found = {side: self.result(name, side) for side in sides}
        return [side for side in sides if not found[side] or "error" in found[side]]

    def base(self, name: str, weights: bool = True) -> Path:
        """A base's folder, made if it is not there, with weights or of configs alone."""
        folder = self.work / ("bases" if weights else "configs") / name
        if not (folder / "model_index.json").exists():
            from tools import architectures

            shutil.rmtree(folder, ignore_errors=True)
            made = architectures.ALL[name]
            architectures.save(made, folder, tiny=self.tiny, weights=weights)
        return folder

    def one(self, name: str, side: str) -> None:
        """Make one measurement here and now, and write it down."""
        line, folder = LINES[name], self.work / "scratch" / f"{name}.{side}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        config = line.config(self.base(line.base, side != "predicted"), self.work, self.tiny)
        measuring: dict[str, Callable[[], dict[str, float]]] = {
            "kit": lambda: measure(line, config, folder),
            "reference": lambda: reference(line, config, folder, Path(str(self.scripts))),
            "predicted": lambda: predict(line, config),
        }
        began = time.perf_counter()
        found = measuring[side]()
        self._write(name, side, found | {"device": device(), "took": time.perf_counter() - began})
        shutil.rmtree(folder)

    def tried(self, name: str, side: str) -> None:
        """Make one measurement, and write down what fails.

        In a process of its own, so that peaks do not mix; only predictions, which measure nothing,
        and tiny models are tried in this one.
        """
        here = side == "predicted" or (self.tiny and side == "kit")
        try:
            if here:
                self.one(name, side)
            else:
                base = LINES[name].base
                if not (self.work / "bases" / base / "model_index.json").exists():
                    self._apart(["--base", base], self.work / "results" / f"{base}.log")
                self._apart(["--one", name, side], self.work / "results" / f"{name}.{side}.log")
        except Exception as error:  # whatever it is, the other lines go on
            self._write(name, side, {"error": f"{type(error).__name__}: {error}"[:300]})

    def _apart(self, arguments: Sequence[str], log: Path) -> None:
        """This script in a process of its own. Raises RuntimeError with its last words."""
        try:
            done = subprocess.run(
                self.command(*arguments), capture_output=True, text=True, timeout=self.limit
            )
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"it took longer than {self.limit:.0f} s") from None
        log.write_text(done.stdout + done.stderr)
        if done.returncode:
            raise RuntimeError((done.stderr.strip() or "it said nothing").splitlines()[-1])

    def command(self, *arguments: str) -> list[str]:
        own = [sys.executable, "-m", "tools.bench_gpu", "--work", str(self.work), *arguments]
        own += ["--reference", str(self.scripts)] if self.scripts else []
        return own + (["--tiny"] if self.tiny else [])

    def _write(self, name: str, side: str, found: dict[str, Any]) -> None:
        file = self.work / "results" / f"{name}.{side}.json"
        replace_file(file, json.dumps(found, indent=2).encode())

    def run(self, until: float = float("inf"), keep: bool = False) -> None:
        """Measure all that is asked for and missing; nothing begins after the moment ``until``."""
        (self.work / "results").mkdir(parents=True, exist_ok=True)
        save_photos(self.work, 64 if self.tiny else 1024)
        for name in self.asked:
            for side in self.missing(name, self.sides(name)):
                if time.monotonic() < until:
                    self.tried(name, side)
                    print(name, side, json.dumps(self.result(name, side)), flush=True)
            self.write_tables()
            still = {LINES[n].base for n in self.asked if self.missing(n, self.sides(n))}
            if LINES[name].base not in still and not keep:
                shutil.rmtree(self.work / "bases" / LINES[name].base, ignore_errors=True)

    def predictions(self) -> None:
        """Those that are missing, without a GPU."""
        (self.work / "results").mkdir(parents=True, exist_ok=True)
        for name in self.asked:
            for side in self.missing(name, ["predicted"]):
                self.tried(name, side)

    def rows(self) -> list[dict[str, Any]]:
        """The table, figures only; what is not known is None."""
        return [row(name, {s: self.result(name, s) for s in SIDES}) for name in LINES]

    def write_tables(self) -> None:
        rows = self.rows()
        replace_file(self.work / "table.json", json.dumps(rows, indent=2).encode())
        replace_file(self.work / "table.md", markdown(rows).encode())


def device() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "a CPU"


def save_photos(work: Path, side: int) -> None:
    """Four smooth random pictures of each kind, as large as a photo made ready is."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for kind in ("instance", "class"):
        (work / kind).mkdir(parents=True, exist_ok=True)
        for number in range(4):
            coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
            coarse.resize((side, side), Image.Resampling.BICUBIC).save(
                work / kind / f"{number}.jpg"
            )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="a folder on a disk with room")
    parser.add_argument("--reference", type=Path, help="diffusers' folder examples/dreambooth")
    parser.add_argument("--only", nargs="+", choices=LINES, default=list(LINES), metavar="NAME")
    parser.add_argument("--tiny", action="store_true", help="tiny models, to try the script")
    parser.add_argument("--predict", action="store_true", help="only predict; needs no GPU")
    parser.add_argument("--keep", action="store_true", help="keep the bases that are done with")
    parser.add_argument("--minutes", type=float, default=9.0, help="nothing begins after so many")
    parser.add_argument("--limit", type=float, default=240.0, help="seconds of one measurement")
    parser.add_argument("--one", nargs=2, metavar=("NAME", "SIDE"), help=argparse.SUPPRESS)
    parser.add_argument("--base", choices=BASES, help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    bench = Bench(
        given.work.resolve(), given.tiny, given.reference and given.reference.resolve(),
        given.limit, given.only,
    )  # fmt: skip
    if given.one:
        return bench.one(*given.one)
    if given.base:
        bench.base(given.base)
        return None
    until = time.monotonic() + 60 * given.minutes
    if given.predict:
        bench.predictions()
    else:  # predictions are made on the CPU meanwhile
        predicting = subprocess.Popen(
            bench.command("--predict", "--only", *given.only), stdout=subprocess.DEVNULL
        )
        bench.run(until, given.keep)
        predicting.wait()
    bench.write_tables()
    print((bench.work / "table.md").read_text())
    return None


if __name__ == "__main__":
    main()
