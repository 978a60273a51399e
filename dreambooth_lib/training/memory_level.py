"""The level of memory that ``memory="auto"`` means: decided once, written down, and kept.

RUN/memory.json       what was decided for a run
FOLDER/memory.json    for all runs in a study's folder, which only compare if they train alike

Both hold fields of the config in place of its "auto". Of several processes the first one decides.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from dreambooth_lib.core import gpu_memory
from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.core.config_checks import LOW_MEMORY, ConfigError
from dreambooth_lib.core.gpu_memory import GIB
from dreambooth_lib.core.processes import join_group
from dreambooth_lib.training.runs import LEVEL_FILE, Run, read_level

if TYPE_CHECKING:
    import torch

#: How much of the GPU's free memory an estimate may take; the allocator needs some of its own.
USABLE_SHARE = 0.9

#: Fields of a config that stand for "auto".
Level = dict[str, Any]
_STANDARD: Level = {"memory": "standard"}

T = TypeVar("T")


def first(ways: Iterable[T], fits: Callable[[T], bool]) -> T:
    """Return the first way that fits, or else the last; what comes after it is not asked for."""
    for way in ways:
        if fits(way):
            break
    return way


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


def decide_level(run: Run, device: "torch.device") -> TrainConfig:
    """Return the run's config with the level of memory that all its processes train at.

    It is decided, written into the run's folder and printed where that was not done before, for
    the run or the folder that it lies in, or where the GPU cannot hold what was decided.
    """
    if run.config.memory != "auto" or not is_gpu(device):
        return run.resolved_config

    def decide() -> Level:
        before = read_level(run.folder) or read_level(run.folder.parent)
        return _decide(run.folder, [_on(run.config, device)], before, "run", device)

    return run.config.replace(**_by_the_first(decide))


def with_level_for_now(config: TrainConfig, device: "torch.device") -> TrainConfig:
    """Resolve a config's level of memory as for a run that begins now, without a trace."""
    if config.memory != "auto" or not is_gpu(device):
        return config
    (free, _), processes = gpu_memory.gpu_bytes(device), join_group().num_processes
    return config.replace(**choose_level([_on(config, device)], USABLE_SHARE * free, processes))


def share_level(folder: str | Path, configs: Iterable[TrainConfig]) -> None:
    """Decide one level for all runs of a study in ``folder``, the first at which each of them fits.

    What was decided there before is kept, unless the GPU can no longer hold it. Nothing is done
    without a GPU, or where no config says "auto".
    """
    device, folder = join_group().device, Path(folder)
    asked = [_on(config, device) for config in configs if config.memory == "auto"]
    if asked and is_gpu(device):
        _by_the_first(lambda: _decide(folder, asked, read_level(folder), "study", device))


def choose_level(configs: Sequence[TrainConfig], free: float, processes: int = 1) -> Level:
    """Return the first level at which each config takes at most ``free`` bytes of a GPU.

    One that a config's other fields or its base rule out is passed over, and of several processes
    one that updates weights within the backward pass, before gradients could cross them; gradient
    checkpointing then saves what it can. If none fits it is the last. The configs'
    ``mixed_precision`` is what the GPU computes in.
    """
    levels = [_STANDARD, *({"memory": level} for level in LOW_MEMORY)]
    if processes > 1:
        levels.insert(1, _STANDARD | {"gradient_checkpointing": True})
    needs = ((level, _takes(configs, level, processes)) for level in levels)
    can = ((level, need) for level, need in needs if need < inf)
    nowhere = (_STANDARD, inf)  # training then says what is wrong
    return first(chain([nowhere], can), lambda one: one[1] <= free)[0]


def _takes(configs: Sequence[TrainConfig], level: Level, processes: int) -> float:
    """Return the most bytes that a config takes at a level; inf where one cannot train so."""
    from dreambooth_lib.training.memory_estimate import estimate

    needs = []
    for config in configs:
        rows = max(config.batch_size // processes, config.gradient_accumulation)
        try:
            one = config.replace(**level).replace(batch_size=rows)
            if one.steps_in_backward and processes > 1:
                return inf
            needs.append(estimate(one, one.mixed_precision).memory)
        except ConfigError:
            return inf
    return max(needs)


def _decide(
    folder: Path, configs: list[TrainConfig], before: Level, what: str, device: "torch.device"
) -> Level:
    """Keep the level of ``before`` if the GPU can hold it, or else decide; write that down."""
    from dreambooth_lib.core.files import replace_file

    (free, _), processes = gpu_memory.gpu_bytes(device), join_group().num_processes

    def takes(level: Level) -> float:
        return _takes(configs, level, processes)

    level, need = before, takes(before) if before else inf
    if need > free:
        level = choose_level(configs, USABLE_SHARE * free, processes)
    if level != before:
        now, standard, has = takes(level), takes(_STANDARD), f"this GPU has {_gib(free)} GiB free"
        which = _name(level) + (f", which takes about {_gib(now)} GiB" if now < inf else "")
        was = "cannot train here" if need == inf else f"takes about {_gib(need)} GiB"
        if before:
            begun = f"The {what} started with memory {_name(before)}. That {was}, and {has}"
            print(f"{begun}, so it continues with {which}.")
        else:
            told = standard < inf and level != _STANDARD
            more = f"; 'standard' would take {_gib(standard)}" if told else ""
            print(f"The {what} trains with memory {which}; {has}{more}.")
    if level != read_level(folder):
        replace_file(folder / LEVEL_FILE, json.dumps(level).encode())
    return level


def _name(level: Level) -> str:
    rest = " and gradient checkpointing" if level.get("gradient_checkpointing") else ""
    return f"'{level['memory']}'{rest}"


def _gib(count: float) -> str:
    return f"{count / GIB:.1f}"


def _on(config: TrainConfig, device: "torch.device") -> TrainConfig:
    return config.replace(mixed_precision=native_precision(config.mixed_precision, device))


def _by_the_first(decide: Callable[[], Level]) -> Level:
    """Share what the first process decides with every process; so is an error."""
    from accelerate.utils import broadcast_object_list

    found: list[Any] = [None]
    if join_group().is_main_process:
        try:
            found = [decide()]
        except Exception as error:  # whatever it is, the others must not wait for a level
            found = [error]
    broadcast_object_list(found)
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]
