"""The level of memory that ``memory="auto"`` means: decided once, written down, and kept.

RUN/memory.json       what was decided for a run
FOLDER/memory.json    for all runs in a study's folder, which only compare if they train alike

Both hold fields of the config in place of its "auto". Of several processes the first one decides.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dreambooth_lib import memory
from dreambooth_lib.config import LOW, ConfigError, TrainConfig
from dreambooth_lib.processes import join_group
from dreambooth_lib.runs import DECIDED, Run, decided

if TYPE_CHECKING:
    import torch

#: How much of the GPU's free memory an estimate may take; the allocator needs some of its own.
FILLED = 0.9
_GIB = 2**30

#: Fields of a config that stand for "auto".
Level = dict[str, Any]


def native_precision(mixed_precision: str, device: "torch.device") -> str:
    """Resolve "auto" on a device: bf16 where it is native, else fp16; "no" on a CPU."""
    import torch

    if mixed_precision != "auto":
        return mixed_precision
    if device.type != "cuda":
        return "no"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def is_gpu(device: "torch.device") -> bool:
    """Return whether a level of memory is decided at all; without a GPU "auto" is "standard"."""
    return device.type == "cuda"


def settle(run: Run, device: "torch.device") -> TrainConfig:
    """Return the run's config with the level of memory that all its processes train at.

    Decides it where that was not done before, for the run or for the folder that it lies in, or
    where the GPU cannot hold what was decided; writes that into the run's folder and prints it.
    """
    if run.config.memory != "auto" or not is_gpu(device):
        return run.settled
    return run.config.replace(**_by_the_first(lambda: _of_run(run, device)))


def fresh(config: TrainConfig, device: "torch.device") -> TrainConfig:
    """Resolve a config's level of memory as for a run that begins now, without a trace."""
    if config.memory != "auto" or not is_gpu(device):
        return config
    free, _ = memory.gpu_bytes(device)
    return config.replace(**first_fitting([_on(config, device)], FILLED * free, _processes()))


def share(folder: str | Path, configs: Iterable[TrainConfig]) -> None:
    """Decide one level for all runs of a study in ``folder``, the first at which each of them fits.

    What was decided there before is kept, unless the GPU can no longer hold it. Nothing is done
    without a GPU, or where no config says "auto".
    """
    device, folder = join_group().device, Path(folder)
    asked = [_on(config, device) for config in configs if config.memory == "auto"]
    if asked and is_gpu(device):
        _by_the_first(lambda: _decide(folder, asked, decided(folder), "study", device))


def first_fitting(configs: Sequence[TrainConfig], free: float, processes: int = 1) -> Level:
    """Return the first level at which each config takes at most ``free`` bytes of a GPU.

    One that a config's other fields or its base rule out is passed over, and of several processes
    one that updates weights within the backward pass, before gradients could cross them; gradient
    checkpointing then saves what it can. If none fits it is the last. The configs'
    ``mixed_precision`` is what the GPU computes in.
    """
    found: Level = {"memory": "standard"}
    for level in _levels(processes):
        need = _takes(configs, level, processes)
        if need is not None:
            found = level
            if need <= free:
                break
    return found


def _levels(processes: int) -> list[Level]:
    checkpointing = [{"memory": "standard", "gradient_checkpointing": True}]
    lower: list[Level] = [{"memory": level} for level in LOW]
    return [{"memory": "standard"}, *(checkpointing if processes > 1 else []), *lower]


def _takes(configs: Sequence[TrainConfig], level: Level, processes: int) -> int | None:
    """Count the most bytes that a config takes at a level; None where one cannot train so."""
    from dreambooth_lib.estimate import estimate

    needs = []
    for config in configs:
        rows = max(config.batch_size // processes, config.gradient_accumulation)
        try:
            one = config.replace(**level).replace(batch_size=rows)
            if one.steps_in_backward and processes > 1:
                return None
            needs.append(estimate(one, one.mixed_precision).memory)
        except ConfigError:
            return None
    return max(needs)


def _of_run(run: Run, device: "torch.device") -> Level:
    asked, own = [_on(run.config, device)], decided(run.folder)
    of_study = decided(run.folder.parent)
    return _decide(run.folder, asked, own or of_study, "run", device)


def _decide(
    folder: Path, configs: list[TrainConfig], before: Level, what: str, device: "torch.device"
) -> Level:
    """Keep the level of ``before`` if the GPU can hold it, or else decide; write that down."""
    from dreambooth_lib.state import replace_file

    (free, _), processes = memory.gpu_bytes(device), _processes()
    need = _takes(configs, before, processes) if before else None
    level = before
    if need is None or need > free:
        level = first_fitting(configs, FILLED * free, processes)
    if level != before:
        print(_said(configs, level, before, need, what, free, processes))
    if level != decided(folder):
        replace_file(folder / DECIDED, json.dumps(level).encode())
    return level


def _said(
    configs: list[TrainConfig], level: Level, before: Level, need: int | None, what: str,
    free: int, processes: int,
) -> str:  # fmt: skip
    """Write the sentence that tells a person which level it is, and why."""
    takes = _takes(configs, level, processes)
    now = "" if takes is None else f", which takes about {takes / _GIB:.1f} GiB"
    has = f"this GPU has {free / _GIB:.1f} GiB free"
    if before:
        was = "cannot train here" if need is None else f"takes about {need / _GIB:.1f} GiB"
        return (
            f"The {what} started with memory {_name(before)}. That {was}, and {has}, so it "
            f"continues with {_name(level)}{now}."
        )
    more = _takes(configs, {"memory": "standard"}, processes)
    short = level != {"memory": "standard"} and more is not None
    why = f"; 'standard' would take {more / _GIB:.1f}" if short and more is not None else ""
    return f"The {what} trains with memory {_name(level)}{now}; {has}{why}."


def _name(level: Level) -> str:
    rest = " and gradient checkpointing" if level.get("gradient_checkpointing") else ""
    return f"'{level['memory']}'{rest}"


def _on(config: TrainConfig, device: "torch.device") -> TrainConfig:
    return config.replace(mixed_precision=native_precision(config.mixed_precision, device))


def _processes() -> int:
    return join_group().num_processes


def _by_the_first(decide: Callable[[], Level]) -> Level:
    """Share what the first process decides with every process; so is an error."""
    from accelerate.utils import broadcast_object_list

    state = join_group()
    if state.num_processes == 1:
        return decide()
    found: list[Any] = [None]
    if state.is_main_process:
        try:
            found = [decide()]
        except Exception as error:  # whatever it is, the others must not wait for a level
            found = [error]
    broadcast_object_list(found)
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]
