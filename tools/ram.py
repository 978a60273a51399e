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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

GB = 10**9
EVERY = 0.005  # seconds between samples
LIMIT = 10.0  # GB; a session of 12.7 has as much beside the process of CUDA
STEPS = (250, 500)  # with a checkpoint and a look each, the earlier one being the best
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
    #: whether a CPU loads it as a GPU does; what does not is given a T5 of one layer, which encodes
    #: the prompts in seconds and is let go of before anything else
    loads: bool = True


KINDS = {
    "sd15": Kind("SD 1.5, whole", "sd15", "float32", {"memory": "standard"}),
    "sdxl": Kind("SDXL, LoRA", "sdxl", "float32", _LORA),
    # A quantized base needs a GPU; its LoRA is the same one.
    "flux": Kind("Flux.1, LoRA as of QLoRA", "flux", "bfloat16", _LORA, loads=False),
}
#: What each process does; those that are measured, in order, with their rows in the table.
JOBS = {
    "train": ("load", "checkpoint", "pipeline"),
    "drive": ("drive",),
    "keep": ("keep",),
    "export": ("export",),
}
ROWS = {
    "load": "load the base to train it",
    "checkpoint": "write a checkpoint",
    "pipeline": "write the pipeline at the end",
    "drive": "copy the run to Drive",
    "keep": "keep a checkpoint as a model, with its zip",
    "export": "write the file for A1111 and ComfyUI",
}


# What is measured, from outside.


def held(pid: int) -> int:
    """Bytes of a process's memory that the system cannot drop; 0 once it has ended."""
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
    """In a process that :func:`watch` runs: measure this; what the dict is given is told too."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    _tell({"begin": name})
    told: dict[str, Any] = {}
    yield told
    _tell({"end": name} | told)


def _tell(what: dict[str, Any]) -> None:
    print(json.dumps(what), flush=True)
    sys.stdin.readline()  # until it was taken note of


# What a GPU would hold.


def as_device(folder: Path) -> Any:
    """A torch mode with ``hold``: what is put there lies on no CPU, until it is copied."""
    import torch
    from torch.overrides import TorchFunctionMode

    class Device(TorchFunctionMode):
        def __init__(self) -> None:
            super().__init__()
            self.held: set[int] = set()
            self.numbers = count()

        def hole(self, tensor: torch.Tensor) -> torch.Tensor:
            """Zeros of a tensor's shape, in a mapped file."""
            file = folder / f"{next(self.numbers)}"
            size = tensor.numel() * tensor.itemsize
            if size == 0:
                return tensor
            storage = torch.UntypedStorage.from_file(str(file), True, size)
            file.unlink()
            self.held.add(storage.data_ptr())
            made = torch.empty(0, dtype=tensor.dtype)
            return made.set_(
                storage, 0, tensor.shape, torch.empty(tensor.shape, device="meta").stride()
            )

        def hold(self, *modules: torch.nn.Module) -> None:
            done: set[int] = set()
            for module in modules:
                for tensor in (*module.parameters(), *module.buffers()):
                    if id(tensor) not in done:
                        done.add(id(tensor))
                        tensor.data = self.hole(tensor)

        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            out = func(*args, **(kwargs or {}))
            if func in (torch.Tensor.cpu, torch.Tensor.to) and out is args[0]:
                places = [*args[1:], *(kwargs or {}).values()]
                place = any(isinstance(one, (str, torch.device)) for one in places)
                kept = out.untyped_storage().data_ptr() in self.held
                if kept and (place or func is torch.Tensor.cpu):
                    return out.clone()
            return out

    return Device()


# The jobs, each in a process of its own.


def config_of(kind: Kind, work: Path, tiny: bool) -> Any:
    from dreambooth_lib.config import Subject, TrainConfig

    settings: dict[str, Any] = {
        "resolution": 16 if tiny else 64, "mixed_precision": "bf16", "optimizer": "adamw8bit",
        "class_folder": str(work / "class"), "judge": "toybox",
    } | kind.settings  # fmt: skip
    return TrainConfig(Subject(str(work / "instance"), "dog"), str(work / "base"), **settings)


def train(kind: Kind, work: Path, tiny: bool) -> None:
    """Load a base for training, and write the checkpoints and the pipeline of a run."""
    from dreambooth_lib import runs
    from dreambooth_lib.training import Trainer

    run = runs.start(config_of(kind, work, tiny), work / "run")
    with measured("load"):
        trainer = Trainer(run)
    (work / "device").mkdir()
    device = as_device(work / "device")
    on_device(trainer, device)
    for step in (0, *STEPS):
        note_look(run, step)
    written = 0
    with device:
        with measured("checkpoint") as told:
            for step in STEPS:
                trainer.step = step
                trainer.save_checkpoint()
                written += size(run.checkpoints()[step])
            told |= {"bytes": written / len(STEPS), "runs": written / len(STEPS) * due(run.config)}
        with measured("pipeline") as told:
            trainer.save_pipeline()
            told["bytes"] = size(run.pipeline)


def on_device(trainer: Any, device: Any) -> None:
    """Put what a GPU would hold there: all models, and the state of an optimizer that stepped."""
    import torch

    parts = trainer.family.pipeline.components.values()
    device.hold(trainer.updater.trainable, *(p for p in parts if isinstance(p, torch.nn.Module)))
    adam = trainer.updater.adam
    for number, group in enumerate(adam.param_groups):
        for index, parameter in enumerate(group["params"]):
            adam.init_state(group, parameter, number, index)
    for state in adam.state.values():
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and "qmap" not in name:
                state[name] = device.hole(value)


def due(config: Any) -> int:
    """How many checkpoints a whole run writes."""
    every = [one for one in (config.watch_every, config.checkpoint_every) if one]
    steps = range(1, config.steps + 1)
    return sum(step == config.steps or any(step % one == 0 for one in every) for step in steps)


def note_look(run: Any, step: int) -> None:
    """Write down a look that was not taken, of grey pictures; the first of STEPS is best."""
    from PIL import Image

    from dreambooth_lib import watch as looks
    from dreambooth_lib.state import save_png

    found = dict.fromkeys(looks.Watched.__dataclass_fields__, 0.5)
    found["subject_fidelity"] = {0: 0.4, STEPS[0]: 0.9}.get(step, 0.5)
    rows = {"subject": [0.1], "class": [0.1]}
    kinds = {"subject": len(looks.PROMPTS), "class": 3, "unrelated": 1}
    for name, pictures in kinds.items():
        for number in range(pictures):
            grey = Image.new("RGB", (64, 64), "grey")
            save_png(grey, looks.folder(run, step) / f"{name}-{number}.png")
    found |= {"step": step, "held_out": rows, "fidelity": {}, "bleeding": {}}
    run.append("watch", asdict(looks.Watched(**found)))
    run.append("log", {"step": step, "loss": 0.1, "instance_loss": 0.1, "prior_loss": 0.1,
                       "lr": 1e-6, "seconds": 1.0, "memory_mb": None})  # fmt: skip


def drive(kind: Kind, work: Path, tiny: bool) -> None:
    """Mirror the run."""
    from dreambooth_lib import mirrors, runs

    with measured("drive") as told:
        problem = mirrors.mirror(runs.resume(work / "run"), work / "drive")
        if problem is not None:
            raise RuntimeError(problem)
        told["bytes"] = size(work / "drive")


def keep(kind: Kind, work: Path, tiny: bool) -> None:
    """Keep the best checkpoint as a model."""
    from dreambooth_lib import kept, runs
    from dreambooth_lib.choice import best_checkpoint

    run = runs.resume(work / "run")
    with measured("keep") as told:
        packed = kept.keep(run, best_checkpoint(run).step, work / "kept" / "model")
        told["bytes"] = packed.stat().st_size


def export(kind: Kind, work: Path, tiny: bool) -> None:
    """Write one file of what was kept."""
    from dreambooth_lib import exports

    folder, file = work / "kept" / "model", work / "exported.safetensors"
    with measured("export") as told:
        if kind.settings.get("method") == "lora":
            exports.lora_file(folder / "pytorch_lora_weights.safetensors", file)
        else:
            exports.single_file(folder, file)
        told["bytes"] = file.stat().st_size


DO: dict[str, Callable[[Kind, Path, bool], None]] = {
    "train": train, "drive": drive, "keep": keep, "export": export,
}  # fmt: skip


def size(place: Path) -> int:
    """Bytes of the files in a folder."""
    return sum(file.stat().st_size for file in place.rglob("*") if file.is_file())


# All of it.


def prepare(kind: Kind, work: Path, tiny: bool) -> None:
    import torch

    from tools import architectures
    from tools.bench_gpu import save_photos

    shutil.rmtree(work, ignore_errors=True)
    made = replace(architectures.ALL[kind.base], dtype=getattr(torch, kind.files))
    if not kind.loads:
        encoder = made.models["text_encoder_2"]
        shallow = replace(encoder, config=encoder.config | {"num_layers": 1})
        made = replace(made, models=made.models | {"text_encoder_2": shallow})
    architectures.save(made, work / "base", tiny=tiny, zeros=True)
    save_photos(work, 64)


def measure(name: str, folder: Path, limit: float, tiny: bool) -> dict[str, dict[str, Any]]:
    """All jobs of a kind of run, in processes of their own; a row's dict for each of ROWS."""
    work, found = folder / name, {}
    own = [sys.executable, "-m", "tools.ram", "--work", str(folder), *(["--tiny"] * tiny)]
    subprocess.run([*own, "--one", name, "prepare"], check=True)
    for job, rows in JOBS.items():
        log = folder / f"{name}.{job}.log"
        try:
            found |= watch([*own, "--one", name, job], limit, log)
        except (TooMuch, RuntimeError) as error:
            found |= {row: {"error": f"{error}"} for row in rows if row not in found}
        if job == "drive":
            shutil.rmtree(work / "drive", ignore_errors=True)
    if not KINDS[name].loads:
        found["load"] = {"error": "not measured here, as a quantized base needs a GPU"}
    shutil.rmtree(work)
    return found


def markdown(found: dict[str, dict[str, dict[str, Any]]]) -> str:
    """The tables: GB at the peak of each job, then what is written."""
    titles = [KINDS[name].title for name in found]
    lines = [_cells(["peak GB of RAM", *titles]), _cells(["---"] * (1 + len(titles)))]
    lines += [
        _cells([title, *(_gb(of.get(row, {}), "peak") for of in found.values())])
        for row, title in ROWS.items()
    ]
    lines += ["", _cells(["GB written", *titles]), _cells(["---"] * (1 + len(titles)))]
    written = {
        "a checkpoint": ("checkpoint", "bytes"),
        "checkpoints, in a run of the default length": ("checkpoint", "runs"),
        "the pipeline": ("pipeline", "bytes"),
        "Drive, after the run": ("drive", "bytes"),
        "a kept model's zip": ("keep", "bytes"),
        "the file for A1111 and ComfyUI": ("export", "bytes"),
    }
    lines += [
        _cells([title, *(_gb(of.get(row, {}), key) for of in found.values())])
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


def _cells(cells: Sequence[str]) -> str:
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
        (prepare if job == "prepare" else DO[job])(KINDS[name], work / name, given.tiny)
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
