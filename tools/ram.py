"""``make ram``: what a run takes of a session's memory beside the GPU's, into ``WORK/table.md``.

Real architectures, in a process for each kind of run and job, under a limit. What counts is memory
that the system cannot drop: anonymous and shared pages. Pages of a file that is mapped, as
safetensors maps weights, are read again when they are wanted, so that they are not counted.

No GPU is needed. What would lie on one is put into files with holes that are mapped, so that it is
not counted either, and a copy of it to the CPU is a copy here too. The process that is measured is
sampled from outside, every few milliseconds, since what writes a file may hold Python's lock. The
bases' weights are zeros, in files with holes, and pictures are 64 pixels a side: neither changes
the shape of a weight. A CUDA process's own memory, which there is none of here, comes on top.

    --tiny       tiny architectures in seconds, to try the script itself
    --only NAME  some of the kinds of runs
"""

import argparse
import ctypes
import gc
import json
import queue
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

GB = 10**9
EVERY = 0.005  # seconds between samples
LIMIT = 10.0  # GB; a session of 12.7 has as much beside the process of CUDA
_LORA = {"method": "lora", "memory": "low"}


class TooMuch(MemoryError):
    """A job that took more memory than it may; its process was ended."""


@dataclass(frozen=True)
class Kind:
    """A kind of run: its base, the precision of the base's files, and its settings."""

    title: str
    base: str
    files: str  #: as they are published
    settings: dict[str, Any] = field(default_factory=dict)
    #: whether its base is quantized, which a job of its own loads; to write the run it lies as it
    #: is, with a T5 of one layer, which encodes the prompts in seconds and is let go of then
    quantized: bool = False


KINDS = {
    "sd15": Kind("SD 1.5, full model", "sd15", "float32", {"memory": "standard"}),
    "sdxl": Kind("SDXL, LoRA", "sdxl", "float32", _LORA),
    "flux": Kind("Flux.1, QLoRA", "flux", "bfloat16", _LORA, quantized=True),
}
#: What each process does; those that are measured, in order, with their rows in the table.
JOBS = {
    "train": ("load", "checkpoint", "pipeline", "resume"),
    "quantize": ("load",),
    "drive": ("drive",),
    "keep": ("keep",),
    "export": ("export",),
}
ROWS = {
    "load": "load the base to train it",
    "checkpoint": "write a checkpoint",
    "pipeline": "write the pipeline at the end",
    "resume": "resume from the newest checkpoint",
    "drive": "copy the run to Drive",
    "keep": "save a checkpoint as a model with its zip",
    "export": "write the file for A1111 and ComfyUI",
}


# What is measured, from outside.


def held(pid: int) -> int:
    """Count the bytes of a process's memory that the system cannot drop; 0 once it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    kinds = dict(line.split(":", 1) for line in status)
    return 1024 * sum(int(kinds.get(one, "0").split()[0]) for one in ("RssAnon", "RssShmem"))


def watch(command: Sequence[str], limit: float, log: Path) -> dict[str, dict[str, Any]]:
    """Run a command that calls :func:`measured`; for each name its peak in bytes, and what it told.

    Raises :class:`TooMuch` where more than ``limit`` bytes are held while it measures, and
    RuntimeError where it fails; ``log`` has what it printed.
    """
    found: dict[str, dict[str, Any]] = {}
    lines: queue.Queue[str | None] = queue.Queue()
    with (
        log.open("w") as errors,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
        ) as child,
    ):
        assert child.stdin is not None and child.stdout is not None
        output = child.stdout

        def read() -> None:
            for line in output:
                lines.put(line)
            lines.put(None)

        threading.Thread(target=read, daemon=True).start()
        now = None
        while True:
            try:
                line = lines.get(timeout=EVERY)
            except queue.Empty:
                line = ""
            if line is None:
                break
            if now is not None:
                peak = found[now]["peak"] = max(found[now]["peak"], held(child.pid))
                if peak > limit:
                    child.kill()
                    raise TooMuch(
                        f"'{now}' holds {peak / GB:.1f} GB of memory, and may hold "
                        f"{limit / GB:.1f}; its process was ended."
                    )
            if line.startswith("{"):
                told = json.loads(line)
                now = told.pop("begin", None)
                if now is not None:
                    found[now] = {"before": held(child.pid), "peak": 0}
                else:
                    found[told.pop("end")] |= told
                child.stdin.write("\n")
                child.stdin.flush()
        if child.wait():
            last = (log.read_text().strip() or "it said nothing").splitlines()[-1]
            raise RuntimeError(f"{' '.join(command[-3:])}: {last}")
    return found


@contextmanager
def measured(name: str) -> Iterator[dict[str, Any]]:
    """Measure this, in a process that :func:`watch` runs; what the dict is given is told too."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    _tell({"begin": name})
    told: dict[str, Any] = {}
    yield told
    _tell({"end": name} | told)


def _tell(what: dict[str, Any]) -> None:
    print(json.dumps(what), flush=True)
    sys.stdin.readline()  # until it was taken note of


# All of it.


def prepare(kind: Kind, work: Path, tiny: bool) -> None:
    import torch

    from tools import architectures
    from tools.bench_gpu import save_photos

    shutil.rmtree(work, ignore_errors=True)
    made = replace(architectures.ALL[kind.base], dtype=getattr(torch, kind.files))
    if kind.quantized:
        architectures.save(made, work / "whole", tiny=tiny, zeros=True)
        encoder = made.models["text_encoder_2"]
        shallow = replace(encoder, config=encoder.config | {"num_layers": 1})
        made = replace(made, models=made.models | {"text_encoder_2": shallow})
    architectures.save(made, work / "base", tiny=tiny, zeros=True)
    save_photos(work, 64)


def measure(name: str, folder: Path, limit: float, tiny: bool) -> dict[str, dict[str, Any]]:
    """Run all jobs of a kind of run, in processes of their own; a row's dict for each of ROWS."""
    work, found = folder / name, {}
    own = [sys.executable, "-m", "tools.ram", "--work", str(folder), *(["--tiny"] * tiny)]
    subprocess.run([*own, "--one", name, "prepare"], check=True)
    for job, rows in JOBS.items():
        if job == "quantize" and not KINDS[name].quantized:
            continue
        log = folder / f"{name}.{job}.log"
        try:
            found |= watch([*own, "--one", name, job], limit, log)
            shutil.rmtree(work / "drive", ignore_errors=True)
        except (TooMuch, RuntimeError) as error:
            found |= {row: {"error": f"{error}"} for row in rows}
    shutil.rmtree(work)
    return found


def markdown(found: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Return the tables: GB at the peak of each job, then what is written."""
    titles = [KINDS[name].title for name in found]
    lines = [cells(["peak GB of RAM", *titles]), cells(["---"] * (1 + len(titles)))]
    lines += [
        cells([title, *(_gb(of.get(row, {}), "peak") for of in found.values())])
        for row, title in ROWS.items()
    ]
    lines += ["", cells(["GB written", *titles]), cells(["---"] * (1 + len(titles)))]
    written = {
        "a checkpoint": ("checkpoint", "bytes"),
        "checkpoints, in a run of the default length": ("checkpoint", "runs"),
        "the pipeline": ("pipeline", "bytes"),
        "the run's copy on Drive": ("drive", "bytes"),
        "a saved model's zip": ("keep", "bytes"),
        "the file for A1111 and ComfyUI": ("export", "bytes"),
    }
    lines += [
        cells([title, *(_gb(of.get(row, {}), key) for of in found.values())])
        for title, (row, key) in written.items()
    ]
    errors = [
        f"- {KINDS[name].title}, {ROWS[row]}: {of['error']}"
        for name, rows in found.items()
        for row, of in rows.items()
        if "error" in of
    ]
    return "\n".join([*lines, "", *errors]).rstrip() + "\n"


def _gb(of: dict[str, Any], key: str) -> str:
    return f"{of[key] / GB:.2f}" if key in of else "none"


def cells(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("outputs/ram"), help="30 GB free")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS), metavar="NAME")
    parser.add_argument("--limit", type=float, default=LIMIT, help="GB of memory of a process")
    parser.add_argument("--tiny", action="store_true", help="tiny models, to try the script")
    parser.add_argument("--one", nargs=2, metavar=("NAME", "JOB"), help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    work = given.work.resolve()
    if given.one:
        name, job = given.one
        if job == "prepare":
            prepare(KINDS[name], work / name, given.tiny)
        else:
            from tools.ram_jobs import DO

            DO[job](KINDS[name], work / name, given.tiny)
        return
    work.mkdir(parents=True, exist_ok=True)
    file = work / "table.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    for name in given.only:
        found[name] = measure(name, work, given.limit * GB, given.tiny)
        file.write_text(json.dumps(found, indent=2))
        (work / "table.md").write_text(markdown(found))
    print((work / "table.md").read_text())


if __name__ == "__main__":
    main()
