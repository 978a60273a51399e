"""One measurement of the benchmark on a GPU, in a process that does nothing else.

Seconds are medians with the GPU waited for. Beside them stand, by the profiler, the seconds that
the GPU is busy, without what it waits for, and how often the host starts work and waits for it; and
the floor, which is the denoiser's own forward and backward pass of the same batch, with the same
autocast and checkpointing.
"""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from dreambooth_lib.core.config import TrainConfig
from tools.gpu_table import Line

ROUNDS, WARMUP = 20, 5  # updates timed, and made before
PROFILED = 3  # updates that the profiler follows
#: How the names begin of the calls by which the host starts work, and waits for it. A copy that
#: waits, such as a number read, calls cudaStreamSynchronize.
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch", "cudaMemcpy", "cudaMemset")
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


def measure(line: Line, config: TrainConfig, folder: Path) -> Iterator[dict[str, float]]:
    """Pace and peak memory of this kit; then, one after the other, what explains the pace."""
    if line.draws:
        from dreambooth_lib.training.class_images import draw_class_images
        from dreambooth_lib.training.sampling import load_source

        family = load_source(config)
        times = sorted(path.stat().st_mtime for path in draw_class_images(config, family, folder))
        yield {"pictures_per_second": pace(times, family.default_batch_size), "peak": peak()}
        return
    from dreambooth_lib.training import runs
    from dreambooth_lib.training.loop import training_steps
    from dreambooth_lib.training.setup import Trainer

    trainer = Trainer(runs.start(config, folder / "run"))
    made = training_steps(trainer)
    before = peak()
    seconds: list[float] = []
    for _ in range(WARMUP + ROUNDS):
        began = now()
        next(made)  # in fp16 the first one takes several tries
        seconds.append(now() - began)
    yield {"seconds": median(seconds[WARMUP:]), "peak": peak(), "before_training": before}
    yield busy(lambda: next(made))
    passes = passes_of(trainer)
    yield {"floor": median(timed(passes, WARMUP + ROUNDS)[WARMUP:])}
    yield {f"floor_{name}": value for name, value in busy(passes).items()}


def passes_of(trainer: Any) -> Callable[[], None]:
    """Return the forward and backward pass of a trainer's denoiser alone, on its first batch.

    The gradients are given back and dropped: nothing that waits for them moves a weight.
    """
    import torch

    batch = trainer.batches.at(0)
    moved = [p for p in trainer.family.denoiser.parameters() if p.requires_grad]

    def passes() -> None:
        with trainer.accelerator.autocast():
            made = trainer.family.predict(batch.noised.x_t, batch.noised.t, batch.cond)
            loss = made.float().square().mean()
        torch.autograd.grad(loss, moved, allow_unused=True)

    return passes


def timed(
    work: Callable[[], Any], times: int, clock: Callable[[], float] | None = None
) -> list[float]:
    """Return the seconds of each call by ``clock``, by default :func:`now`."""
    seconds, clock = [], clock or now
    for _ in range(times):
        began = clock()
        work()
        seconds.append(clock() - began)
    return seconds


def busy(work: Callable[[], Any]) -> dict[str, float]:
    """Return the seconds of a call in which the device computes, its launches and its waits.

    ``launches`` are kernels and copies that the host starts, ``waits`` its waits for the device. On
    a CPU, which has neither, it computes all the time.
    """
    import torch
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    if not torch.cuda.is_available():
        return {"busy": median(timed(work, PROFILED))}
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(PROFILED):
            work()
        torch.cuda.synchronize()
    spent = {"busy": 0.0, "launches": 0.0, "waits": -1.0}  # its own wait is none of the work's
    for event in seen.events() or ():
        if event.device_type is DeviceType.CUDA:
            # Not its device_time_total, which is 0 for what it takes as asynchronous.
            busy = 0 if event.is_user_annotation else event.time_range.elapsed_us()
            spent["busy"] += busy / 1e6
        elif event.name.startswith(LAUNCHES):
            spent["launches"] += 1
        elif event.name.startswith(WAITS):
            spent["waits"] += 1
    return {name: value / PROFILED for name, value in spent.items()}


def reference(
    line: Line, config: TrainConfig, folder: Path, scripts: Path
) -> Iterator[dict[str, float]]:
    """Measure diffusers' script alike, left after as many updates, in a process of its own."""
    updates = 1 if line.draws else WARMUP + ROUNDS + 1
    seconds = run_script(scripts / str(line.script), arguments(line, config, folder), updates)
    if line.draws:
        files = sorted(file.stat().st_mtime for file in (folder / "class").iterdir())
        yield {"pictures_per_second": pace(files, 4), "peak": peak()}  # it draws 4 at a time
        return
    yield {"seconds": median(seconds[1 + WARMUP :]), "peak": peak()}


def run_script(
    script: Path,
    arguments: Sequence[str],
    updates: int,
    told: Callable[[float], Any] = lambda seconds: None,
    clock: Callable[[], float] | None = None,
) -> list[float]:
    """Run a script until its optimizer made so many updates; return the seconds of each.

    The first takes in all that goes before it. ``told`` is called after each but the last, with
    its seconds by ``clock``, by default :func:`now`; what it takes is not timed.
    """
    import runpy

    from torch.optim.optimizer import register_optimizer_step_post_hook

    seconds: list[float] = []
    clock = clock or now
    began = clock()

    def leave(*_: Any) -> None:
        nonlocal began
        seconds.append(clock() - began)
        if len(seconds) == updates:
            raise SystemExit(0)
        told(seconds[-1])
        began = clock()

    register_optimizer_step_post_hook(leave)
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.parent))
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as left:
        if len(seconds) < updates:
            after = f"after {len(seconds)} updates"
            raise RuntimeError(f"{script.name} ended ({left}) {after}") from left
    return seconds


def arguments(line: Line, config: TrainConfig, folder: Path) -> list[str]:
    """Return what diffusers' script is told, to do what the kit does by this config."""
    subject, own = config.subject, config.class_folder
    precision = "no" if config.mixed_precision == "auto" else config.mixed_precision
    return [
        f"--pretrained_model_name_or_path={config.base}",
        f"--instance_data_dir={subject.photos}",
        f"--class_data_dir={own or folder / 'class'}",
        f"--num_class_images={len(list(Path(own).iterdir())) if own else config.class_images}",
        "--with_prior_preservation",
        f"--instance_prompt={subject.instance_prompt}",
        f"--class_prompt={subject.class_prompt}",
        f"--output_dir={folder / 'out'}",
        f"--resolution={config.resolution}",
        f"--mixed_precision={precision}",
        f"--learning_rate={config.learning_rate}",
        f"--train_batch_size={config.batch_size}",
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

    from dreambooth_lib.core.made_with import peak_memory_mb

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return int(peak_memory_mb() * 2**20)


def predict(line: Line, config: TrainConfig) -> Iterator[dict[str, float]]:
    """Return what ``estimate`` says before anything is loaded; of drawing it says nothing."""
    if line.draws:
        yield {}
        return
    from dreambooth_lib.training.memory_estimate import estimate

    precision = config.mixed_precision
    found = estimate(config, "bf16" if precision == "auto" else precision)
    yield asdict(found) | {"peak": found.memory}
