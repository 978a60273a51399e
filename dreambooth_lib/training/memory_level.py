"""Resolve ``memory="auto"`` to a memory level: decided once, written to a file, and kept.

RUN/memory.json       the level of a run
FOLDER/memory.json    the level of all runs in a study's folder, which only compare at the same one

Both hold the config's fields in place of "auto". Of several processes the first one decides.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from dreambooth_lib.core import gpu_memory
from dreambooth_lib.core.checked_json import write_object
from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.core.config_checks import LOW_MEMORY
from dreambooth_lib.core.config_types import ConfigError
from dreambooth_lib.core.gpu_memory import GIB
from dreambooth_lib.core.processes import join_group
from dreambooth_lib.training.native_precision import native_precision
from dreambooth_lib.training.runs import LEVEL_FILE, Run, read_level

if TYPE_CHECKING:
    import torch

#: How much of the GPU's free memory an estimate may take; the allocator itself needs some.
USABLE_SHARE = 0.9

#: Fields of a config in place of memory "auto".
Level = dict[str, Any]
_STANDARD: Level = {"memory": "standard"}

T = TypeVar("T")


def first(ways: Iterable[T], fits: Callable[[T], bool]) -> T:
    """Return the first way that fits, or else the last; later ones are not tried."""
    for way in ways:
        if fits(way):
            break
    return way


def check_adapter(adapter: str | None, precision: str) -> None:
    """Raise :class:`ConfigError` for an adapter that cannot train in what the GPU computes in.

    DeLoRA multiplies A x by λ / (rank |A| |B|). B starts at 0, so that peft takes 1e-4 for |B|, and
    the product overflows float16.
    """
    if adapter == "delora" and precision == "fp16":
        raise ConfigError(
            "adapter is 'delora', which produces NaN in float16, which this GPU computes in; use a "
            "GPU with bfloat16, such as an L4 or A100, set mixed_precision to 'no' if GPU memory "
            "allows, or choose another adapter."
        )


def is_gpu(device: "torch.device") -> bool:
    """Return whether a device needs a memory level; without a GPU "auto" is "standard"."""
    return device.type == "cuda"


def decide_level(run: Run, device: "torch.device") -> TrainConfig:
    """Return the run's config with the memory level that all its processes train at.

    It is decided, written to the run's folder and printed unless that was done before, for the run
    or for the folder it is in, and again if the GPU cannot hold the earlier level.
    """
    if run.config.memory != "auto" or not is_gpu(device):
        return run.resolved_config

    def decide() -> Level:
        before = read_level(run.folder) or read_level(run.folder.parent)
        return _decide(run.folder, [_with_precision(run.config, device)], before, "run", device)

    return run.config.replace(**_on_main_process(decide))


def resolve_memory(config: TrainConfig, device: "torch.device") -> TrainConfig:
    """Return a config with the memory level that a run would start at now; write nothing."""
    if config.memory != "auto" or not is_gpu(device):
        return config
    configs, (free, _) = [_with_precision(config, device)], gpu_memory.gpu_bytes(device)
    level = choose_level(configs, USABLE_SHARE * free, join_group().num_processes)
    return config.replace(**level)


def share_level(folder: str | Path, configs: Iterable[TrainConfig]) -> None:
    """Decide one memory level for all runs of a study in ``folder``: the first that fits them all.

    An earlier decision stays, unless the GPU can no longer hold it. Without a GPU, or if no config
    has memory "auto", nothing is decided.
    """
    device, folder = join_group().device, Path(folder)
    autos = [_with_precision(config, device) for config in configs if config.memory == "auto"]
    if autos and is_gpu(device):
        _on_main_process(lambda: _decide(folder, autos, read_level(folder), "study", device))


def choose_level(configs: Sequence[TrainConfig], free: float, processes: int = 1) -> Level:
    """Return the first level at which each config takes at most ``free`` bytes, or else the last.

    Levels that a config's other fields or its base rule out are skipped. So are, on several
    processes, those that step the optimizer in the backward pass, before gradients could be
    exchanged; gradient checkpointing then saves what it can. The configs' ``mixed_precision`` is
    what the GPU computes in.
    """
    levels = [_STANDARD, *({"memory": level} for level in LOW_MEMORY)]
    if processes > 1:
        levels.insert(1, _STANDARD | {"gradient_checkpointing": True})
    needs = ((level, _peak_memory(configs, level, processes)) for level in levels)
    possible = ((level, need) for level, need in needs if need < inf)
    fallback = (_STANDARD, inf)  # training then says what is wrong
    return first(chain([fallback], possible), lambda level_and_need: level_and_need[1] <= free)[0]


def _peak_memory(configs: Sequence[TrainConfig], level: Level, processes: int) -> float:
    """Return the most bytes that any config takes at a level; inf if one cannot train at it."""
    from dreambooth_lib.training.memory_estimate import estimate

    peaks = []
    for config in configs:
        rows = max(config.batch_size // processes, config.gradient_accumulation)
        try:
            config = config.replace(**level).replace(batch_size=rows)
            if config.steps_in_backward and processes > 1:
                return inf
            peaks.append(estimate(config, config.mixed_precision).memory)
        except ConfigError:
            return inf
    return max(peaks)


def _decide(
    folder: Path, configs: list[TrainConfig], before: Level, kind: str, device: "torch.device"
) -> Level:
    """Return the level of ``before`` if the GPU can hold it, or else decide; write it down."""
    (free, _), processes = gpu_memory.gpu_bytes(device), join_group().num_processes

    def peak(level: Level) -> float:
        return _peak_memory(configs, level, processes)

    level, need = before, peak(before) if before else inf
    if need > free:
        level = choose_level(configs, USABLE_SHARE * free, processes)
    if level != before:
        now, standard, has = peak(level), peak(_STANDARD), f"GPU has {_gib(free)} free"
        name = _name(level) + (f" (about {_gib(now)})" if now < inf else "")
        if before:
            takes = f"which takes about {_gib(need)}"
            why = "at which it cannot train here" if need == inf else takes
            started = f"The {kind} started at memory level {_name(before)}, {why}."
            print(f"{started} This {has}, so the {kind} continues at level {name}.")
        else:
            without = " without it" if level.get("gradient_checkpointing") else ""
            other = f", and 'standard'{without} would take about {_gib(standard)}"
            more = other if level != _STANDARD and standard < inf else ""
            print(f"The {kind} trains at memory level {name}; this {has}{more}.")
    if level != read_level(folder):
        write_object(folder / LEVEL_FILE, level)
    return level


def _name(level: Level) -> str:
    rest = " with gradient checkpointing" if level.get("gradient_checkpointing") else ""
    return f"'{level['memory']}'{rest}"


def _gib(count: float) -> str:
    return f"{count / GIB:.1f} GiB"


def _with_precision(config: TrainConfig, device: "torch.device") -> TrainConfig:
    precision = native_precision(config.mixed_precision, device)
    check_adapter(config.adapter, precision)
    return config.replace(mixed_precision=precision)


def _on_main_process(decide: Callable[[], Level]) -> Level:
    """Decide on the first process; return the level, or raise the error, on every process."""
    from accelerate.utils import broadcast_object_list

    box: list[Any] = [None]
    if join_group().is_main_process:
        try:
            box = [decide()]
        except Exception as error:  # of any kind: the other processes must not wait for a level
            box = [error]
    broadcast_object_list(box)
    if isinstance(box[0], Exception):
        raise box[0]
    return box[0]
