"""``make gpu``: what training costs on a GPU, and which ways of it work there.

Into ``WORK/table.md``. Real architectures with random weights, a fresh process for each
measurement, the prediction of ``training.memory_estimate`` beside it, and with ``--reference``
diffusers' own script on the same files; then ``tools.check_gpu``. What lies measured in WORK is
not measured again; a line that fails is told and the rest goes on.

    --predict           only the predictions, which need no GPU
    --tiny              every line on tiny models in seconds, to try the script itself
    --reference PATH    diffusers' folder examples/dreambooth
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dreambooth_lib.core.files import replace_file
from tools import check_gpu
from tools.gpu_measure import measure, predict, reference
from tools.gpu_table import BASES, LINES, SIDES, markdown, rank, row
from tools.ram import held

#: Bases that are made while the checks run; the others would not fit a disk of 64 GB beside them.
AHEAD = ("sdxl", "flux")


@dataclass
class Bench:
    """Measurements in a folder: ``bases/``, ``configs/``, ``results/``, ``checks/``, the table."""

    work: Path
    tiny: bool = False
    scripts: Path | None = None
    limit: float = 240.0  #: seconds that one measurement may take
    asked: list[str] = field(default_factory=lambda: list(LINES))
    checked: list[str] = field(default_factory=lambda: list(check_gpu.WAYS))
    until: float = float("inf")  #: the moment after which nothing begins, and nothing goes on

    def result(self, name: str, side: str) -> dict[str, Any]:
        file = self.work / "results" / f"{name}.{side}.json"
        return json.loads(file.read_text()) if file.exists() else {}

    def sides(self, name: str) -> list[str]:
        """Return what there is to measure for a line."""
        compared = self.scripts is not None and LINES[name].script is not None
        return ["kit", "reference"] if compared else ["kit"]

    def missing(self, name: str, sides: Sequence[str]) -> list[str]:
        """Return those of these that were not measured, or that failed."""
        found = {side: self.result(name, side) for side in sides}
        return [side for side in sides if not found[side] or "error" in found[side]]

    def to_do(self) -> list[tuple[str, str]]:
        """Return the measurements that are asked for and missing, what is worth most first."""
        missing = [(n, side) for n in self.asked for side in self.missing(n, self.sides(n))]
        return sorted(missing, key=lambda one: rank(*one))

    def base(self, name: str, weights: bool = True) -> Path:
        """Return a base's folder; make it if it is missing, with weights or configs alone."""
        folder = self.work / ("bases" if weights else "configs") / name
        if not (folder / "model_index.json").exists():
            from tools import architectures

            shutil.rmtree(folder, ignore_errors=True)
            made = architectures.ALL[name]
            architectures.save(made, folder, tiny=self.tiny, weights=weights)
        return folder

    def one(self, name: str, side: str) -> None:
        """Make one measurement here and now, and write it down part by part."""
        line, folder = LINES[name], self.work / "scratch" / f"{name}.{side}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        config = line.config(self.base(line.base, side != "predicted"), self.work, self.tiny)
        measuring: dict[str, Callable[[], Iterator[dict[str, float]]]] = {
            "kit": lambda: measure(line, config, folder),
            "reference": lambda: reference(line, config, folder, Path(str(self.scripts))),
            "predicted": lambda: predict(line, config),
        }
        began = time.perf_counter()
        found: dict[str, Any] = {"device": device()}
        for part in measuring[side]():
            found |= part | {"took": time.perf_counter() - began}
            self._write(name, side, found)
        shutil.rmtree(folder)

    def tried(self, name: str, side: str) -> None:
        """Make one measurement, and write down what fails beside what was measured until then.

        In a process of its own, so that peaks do not mix; only predictions, which measure nothing,
        and tiny models are tried in this one.
        """
        here = side == "predicted" or (self.tiny and side == "kit")
        (self.work / "results" / f"{name}.{side}.json").unlink(missing_ok=True)
        told: dict[str, Any] = {}
        try:
            if here:
                self.one(name, side)
                told |= {"ram": held(os.getpid())} if side == "kit" else {}
            else:
                self._make(LINES[name].base)
                log = self.work / "results" / f"{name}.{side}.log"
                told["ram"] = self._apart(["--one", name, side], log)
        except Exception as error:  # whatever it is, the other lines go on
            told["error"] = f"{type(error).__name__}: {error}"[:300]
        if told:
            self._write(name, side, self.result(name, side) | told)

    def _make(self, *bases: str) -> None:
        """Make bases that are not there, in a process of their own."""
        there = [self.work / "bases" / base / "model_index.json" for base in bases]
        if not all(file.exists() for file in there):
            self._apart(["--base", *bases], self.work / "results" / f"{'-'.join(bases)}.log")

    def _apart(self, arguments: Sequence[str], log: Path) -> int:
        """Run this script in its own process; return the peak of its memory, without mapped files.

        Raises RuntimeError with its last words.
        """
        most, began = 0, time.monotonic()
        with log.open("w") as output:
            child = subprocess.Popen(
                self.command(*arguments), stdout=output, stderr=subprocess.STDOUT
            )
            while child.poll() is None:
                most = max(most, held(child.pid))
                late = time.monotonic() > self.until
                if late or time.monotonic() - began > self.limit:
                    child.kill()
                    child.wait()
                    raise RuntimeError(
                        "the time was up; it is measured by the next call"
                        if late
                        else f"it took longer than {self.limit:.0f} s"
                    )
                time.sleep(0.01)
        if child.returncode:
            raise RuntimeError((log.read_text().strip() or "it said nothing").splitlines()[-1])
        return most

    def command(self, *arguments: str) -> list[str]:
        own = [sys.executable, "-m", "tools.bench_gpu", "--work", str(self.work), *arguments]
        own += ["--reference", str(self.scripts)] if self.scripts else []
        return own + (["--tiny"] if self.tiny else [])

    def _write(self, name: str, side: str, found: dict[str, Any]) -> None:
        file = self.work / "results" / f"{name}.{side}.json"
        replace_file(file, json.dumps(found, indent=2).encode())

    def run(self, keep: bool = False) -> None:
        """Measure all that is asked for and missing, and check the ways after the first lines."""
        (self.work / "results").mkdir(parents=True, exist_ok=True)
        save_photos(self.work, 64 if self.tiny else 1024)
        self._measure([one for one in self.to_do() if rank(*one) == 0], keep)
        self._check()
        self._measure(self.to_do(), keep)
        self.write_tables()

    def _measure(self, what: Sequence[tuple[str, str]], keep: bool) -> None:
        for name, side in what:
            if time.monotonic() >= self.until:
                return
            self.tried(name, side)
            print(name, side, json.dumps(self.result(name, side)), flush=True)
            self.write_tables()
            if LINES[name].base not in {LINES[n].base for n, _ in self.to_do()} and not keep:
                shutil.rmtree(self.work / "bases" / LINES[name].base, ignore_errors=True)

    def _check(self) -> None:
        """Check the ways of training; meanwhile the next bases are made, which takes no GPU."""
        if time.monotonic() >= self.until:
            return
        wanted = list(dict.fromkeys(LINES[name].base for name, _ in self.to_do()))
        making = None
        if not self.tiny and (ahead := [b for b in wanted if b in AHEAD]):
            making = subprocess.Popen(self.command("--base", *ahead), stdout=subprocess.DEVNULL)
        check_gpu.run(self.work / "checks", self.checked, self.tiny, self.until)
        self.write_tables()
        if making is not None:
            try:
                making.wait(max(0.0, self.until - time.monotonic()))
            except subprocess.TimeoutExpired:
                making.kill()
                making.wait()

    def predictions(self) -> None:
        """Predict those that are missing, without a GPU."""
        (self.work / "results").mkdir(parents=True, exist_ok=True)
        for name in self.asked:
            for side in self.missing(name, ["predicted"]):
                self.tried(name, side)

    def rows(self) -> list[dict[str, Any]]:
        """Return the table, figures only; what is unknown is None."""
        return [row(name, {s: self.result(name, s) for s in SIDES}) for name in LINES]

    def write_tables(self) -> None:
        rows = self.rows()
        replace_file(self.work / "table.json", json.dumps(rows, indent=2).encode())
        ways = check_gpu.markdown(self.work / "checks")
        replace_file(self.work / "table.md", f"{markdown(rows)}\n{ways}".encode())


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
    parser.add_argument("--lines-alone", action="store_true", help="leave out the ways of training")
    parser.add_argument("--keep", action="store_true", help="keep the bases that are done with")
    parser.add_argument("--minutes", type=float, default=9.0, help="all is over after so many")
    parser.add_argument("--limit", type=float, default=240.0, help="seconds of one measurement")
    parser.add_argument("--one", nargs=2, metavar=("NAME", "SIDE"), help=argparse.SUPPRESS)
    parser.add_argument("--base", nargs="+", choices=BASES, help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    bench = Bench(
        given.work.resolve(), given.tiny, given.reference and given.reference.resolve(),
        given.limit, given.only, [] if given.lines_alone else list(check_gpu.WAYS),
        until=time.monotonic() + 60 * given.minutes,
    )  # fmt: skip
    if given.one:
        return bench.one(*given.one)
    if given.base:
        for name in given.base:
            bench.base(name)
        return None
    if given.predict:
        bench.predictions()
    elif device() == "a CPU" and not given.tiny:
        parser.error("there is no NVIDIA GPU here to measure; --predict and --tiny need none.")
    else:  # predictions are made on the CPU meanwhile
        predicting = subprocess.Popen(
            bench.command("--predict", "--only", *given.only), stdout=subprocess.DEVNULL
        )
        bench.run(given.keep)
        try:
            predicting.wait(max(0.0, bench.until - time.monotonic()))
        except subprocess.TimeoutExpired:  # the next call predicts what is missing
            predicting.kill()
            predicting.wait()
    bench.write_tables()
    print((bench.work / "table.md").read_text())
    return None


if __name__ == "__main__":
    main()
