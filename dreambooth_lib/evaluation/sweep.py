"""Studies of settings: many configs, one table. Steps are free: each run is scored on its way.

FOLDER/class_images/, latents/   made once, shared by all cells
FOLDER/memory.json                 the level of memory that all cells train at (see levels.py)
FOLDER/CELL/                       a run; its looks are the table's rows
FOLDER/table.csv                   a row a cell and step; FOLDER/failures.json where cells failed

A folder holds one study: it goes on with more steps and more cells, and refuses another config.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, as_completed
from dataclasses import asdict, dataclass, replace
from itertools import product
from math import gcd
from pathlib import Path
from typing import Any

from dreambooth_lib.core import gpu_memory
from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.core.old_names import locate
from dreambooth_lib.evaluation import sweep_table
from dreambooth_lib.training import class_images, early_stopping, memory_level, runs, sampling
from dreambooth_lib.training.loop import train
from dreambooth_lib.training.runs import Run, RunError, describe, first_difference, flat_fields
from dreambooth_lib.training.validation import ValidationPlan
from dreambooth_lib.training.validation_record import history, plan_file, read_plan

#: Enough pictures that another draw of seeds moves a mean little.
VIEW = ValidationPlan(seeds=4, class_images=12, unrelated=1)
#: What a run's end and its looks hang on, and nothing that it has done so far.
_LENGTH = ("steps", "validate_every", "checkpoint_every")


@dataclass(frozen=True)
class CellDone:
    cell: str
    done: int
    total: int
    error: str | None  #: of a cell that failed; the others go on


def grid(config: TrainConfig, **values: Sequence[Any]) -> dict[str, TrainConfig]:
    """Every combination of some fields' values, by a name that is fit for a folder.

    ``grid(config, prior_weight=[0, 1], seed=[0, 1, 2])`` gives six configs. Raises ``ConfigError``
    for a value that is out of range.
    """
    found = {}
    for chosen in product(*values.values()):
        changes = dict(zip(values, chosen, strict=True))
        found["-".join(f"{k}={v}" for k, v in changes.items())] = config.replace(**changes)
    return found


def sweep(
    configs: Mapping[str, TrainConfig],
    folder: str | Path,
    steps: Sequence[int],
    view: ValidationPlan = VIEW,
    executor: Executor | None = None,
    threads: int | None = None,
) -> Iterator[CellDone]:
    """Train every config to the largest of ``steps`` and look at it in each of them.

    A stopped cell goes on, and so does a finished one to more steps. Cells run here, one by one, or
    on the workers of an ``executor`` (processes, dask's ``Client.get_executor()``, submitit), which
    must see ``folder``. ``threads`` are torch's in each cell; tables are equal bit by bit only for
    equal numbers of them. ``table.csv`` is written after each cell; one that fails is recorded in
    ``failures.json``, and the rest goes on. Raises :class:`RunError` where the folder holds another
    study, or a run that went past one of ``steps`` without a look.
    """
    from dreambooth_lib.core.files import replace_file
    from dreambooth_lib.evaluation.tables import to_csv

    folder, every = Path(folder).resolve(), gcd(*steps)
    wanted = {
        name: config.replace(steps=max(steps), validate_every=every, checkpoint_every=every)
        for name, config in configs.items()
    }
    for name, config in wanted.items():
        _check_same(folder / name, config, steps, _view_of(view, config, folder / name))
    if executor is None:
        memory_level.share_level(folder, wanted.values())
    else:  # its workers have the GPU
        executor.submit(memory_level.share_level, folder, list(wanted.values())).result()
    _share_class_pictures(wanted.values(), folder)
    errors: dict[str, str] = {}
    cells = {name: (folder / name, config, view, threads) for name, config in wanted.items()}
    for done, (name, error) in enumerate(each(run_cell, cells, executor), 1):
        if error is not None:
            errors[name] = error
        if rows := sweep_table.table(wanted, folder, steps):
            replace_file(folder / "table.csv", to_csv(rows).encode())
        replace_file(folder / "failures.json", json.dumps(errors, indent=2).encode())
        yield CellDone(name, done, len(cells), error)


def each(
    work: Callable[..., Any], cells: Mapping[str, tuple[Any, ...]], executor: Executor | None
) -> Iterator[tuple[str, Any]]:
    """Yield each cell's name and what ``work`` gives for it, here or as the workers finish."""
    if executor is None:
        yield from ((name, work(*cell)) for name, cell in cells.items())
        return
    futures = {executor.submit(work, *cell): name for name, cell in cells.items()}
    for future in as_completed(futures):
        yield futures[future], future.result()


def run_cell(
    folder: Path, config: TrainConfig, view: ValidationPlan, threads: int | None
) -> str | None:
    """Train one cell to its end; return what went wrong, in one line, or None."""
    import torch

    from dreambooth_lib.core.files import replace_file

    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        if (folder / "config.toml").exists():
            length = {name: getattr(config, name) for name in _LENGTH}
            length["steps"] = max(config.steps, _reached(runs.resume(folder)))
            run = runs.resume(folder, **length)
        else:
            run = runs.start(config, folder)
        place = plan_file(folder)
        if not place.exists():
            replace_file(place, json.dumps(asdict(_view_of(view, config, folder))).encode())
        peaked = run.config.early_stop and early_stopping.should_stop_early(history(run))
        # A pipeline alone does not say that nothing is left to do: it may be of fewer steps.
        if not run.finished or not (peaked or _reached(run) >= run.config.steps):
            for _ in train(run):
                pass
    except Exception as error:  # whatever it is, the other cells must go on
        return f"{type(error).__name__}: {error}"
    finally:
        torch.set_num_threads(before)
    return None


def _view_of(view: ValidationPlan, config: TrainConfig, folder: Path) -> ValidationPlan:
    """Return the study's view with the guidance of the base, and in its steps if none are given.

    A cell that was begun keeps those that it began with.
    """
    place = plan_file(folder)
    if place.exists():
        begun = read_plan(place)
        scale, steps = begun.guidance_scale, begun.inference_steps
    else:
        own = sampling.inference_settings(config)
        scale, steps = own.guidance_scale, own.fewest_steps
    return replace(view, guidance_scale=scale, inference_steps=view.inference_steps or steps)


def _check_same(
    folder: Path, config: TrainConfig, steps: Sequence[int], view: ValidationPlan
) -> None:
    """Raise where a cell's folder holds what the study in hand would not have made."""
    if not (folder / "config.toml").exists():
        return
    run, place = runs.resume(folder), plan_file(folder)
    # A schedule spans the run: made longer, its earlier steps would have been others.
    free = _LENGTH if config.lr_schedule == "constant" else _LENGTH[1:]
    other = first_difference(
        flat_fields(run.config), flat_fields(runs.with_settings_of(run, config)), free
    )
    if other is None and place.exists():
        other = first_difference(asdict(read_plan(place)), asdict(view))
    if other is not None:
        raise RunError(
            f"{folder.parent} holds a study of {describe(run.config)} whose {other}; choose "
            "another folder for this one."
        )
    seen, reached = {row.step for row in history(run)}, _reached(run)
    unseen = [str(step) for step in steps if step <= reached and step not in seen]
    if unseen:
        raise RunError(
            f"{folder} is at step {reached} and was not looked at in step {', '.join(unseen)}; "
            "leave that out of the steps, or choose another folder."
        )


def _reached(run: Run) -> int:
    """The step that the run goes on from: its end, or its newest checkpoint."""
    return run.log()[-1]["step"] if run.finished else max(run.checkpoints(), default=0)


def _share_class_pictures(configs: Iterable[TrainConfig], folder: Path) -> None:
    """Before the cells are shared out, so that no two workers draw the same ones.

    As quickly as the machine can, and with their progress: it may be most of a study's time.
    """
    from tqdm.auto import tqdm

    of_base: dict[tuple[Any, ...], list[TrainConfig]] = {}
    for config in configs:
        if config.draws_class_images:
            key = (config.base, config.revision, config.variant, config.resolution, config.quantize)
            of_base.setdefault(key, []).append(config)
    for alike in of_base.values():
        family = sampling.load_source(alike[0])
        for config in alike:
            made = class_images.draw_class_images(config, family, locate(folder, "class_images"))
            for _ in tqdm(made, "class images", config.class_images, unit="picture"):
                pass
        del family, made  # the cells need the memory
        gpu_memory.free_memory()
