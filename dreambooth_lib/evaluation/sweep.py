"""Sweep over settings: train many configs, validate each at the same steps, write one table.

FOLDER/class_images/, latents/   made once, shared by all cells
FOLDER/memory.json               the memory level that all cells train at
FOLDER/CELL/                     a run; its validations are the table's rows
FOLDER/table.csv                 a row per cell and step
FOLDER/failures.json             the cells that failed

A folder holds one sweep. It can be extended by steps and cells; another config is refused.
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
from dreambooth_lib.core.checked_json import write_object
from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.core.errors import InputError, one_line
from dreambooth_lib.core.files import replace_file
from dreambooth_lib.core.subject import Subject
from dreambooth_lib.core.user_text import folder_name, problem_with_name
from dreambooth_lib.evaluation import sweep_table
from dreambooth_lib.evaluation.same_run import check_same
from dreambooth_lib.evaluation.tables import to_csv
from dreambooth_lib.training import class_images, early_stopping, memory_level, runs, sampling
from dreambooth_lib.training.config_changes import first_difference
from dreambooth_lib.training.loop import train
from dreambooth_lib.training.runs import Run, RunError
from dreambooth_lib.training.trainable import BASE_FIELDS
from dreambooth_lib.training.validation import ValidationPlan
from dreambooth_lib.training.validation_record import history, plan_file, read_plan

#: Enough images that other seeds move a mean little.
PLAN = ValidationPlan(seeds=4, class_images=12)
#: These fields set when a run ends and is validated, and change nothing that it has done so far.
_LENGTH = ("steps", "validate_every", "checkpoint_every")


@dataclass(frozen=True)
class CellDone:
    cell: str
    done: int
    total: int
    error: str | None  #: why the cell failed, if it did; the others continue


def grid(config: TrainConfig, **values: Sequence[Any]) -> dict[str, TrainConfig]:
    """Return a config for every combination of the fields' values, by a name fit for a folder.

    ``grid(config, prior_weight=[0, 1], seed=[0, 1, 2])`` gives six configs. A subject goes by its
    name. Names that would be alike are numbered. Raises ``ConfigError`` for a value that is out of
    range.
    """
    configs: dict[str, TrainConfig] = {}
    for combination in product(*values.values()):
        changes = dict(zip(values, combination, strict=True))
        changed, number = config.replace(**changes), 1
        words = (f"{k}={v.name if isinstance(v, Subject) else v}" for k, v in changes.items())
        name = plain = folder_name("-".join(words))
        while configs.get(name, changed) != changed:
            number += 1
            name = f"{plain}-{number}"
        configs[name] = changed
    return configs


def sweep(
    configs: Mapping[str, TrainConfig],
    folder: str | Path,
    steps: Sequence[int],
    plan: ValidationPlan = PLAN,
    executor: Executor | None = None,
    threads: int | None = None,
) -> Iterator[CellDone]:
    """Train every config to the largest of ``steps``, validate it at each; yield after each cell.

    An interrupted cell resumes, and a finished one trains on if there are more steps. Cells run
    here, one by one, or on the workers of an ``executor`` (processes, dask's
    ``Client.get_executor()``, submitit), which must see ``folder``. ``threads`` are torch's in each
    cell; tables are bit for bit equal only for equal numbers of them. ``table.csv`` is written
    after each cell. A cell that fails is recorded in ``failures.json``, and the others continue.
    Raises :class:`RunError` if the folder holds another sweep, or a run that passed one of
    ``steps`` without a validation; ``InputError`` for a plan that draws too few images, and for
    a cell's name that is none of a folder.
    """
    plan.check()
    for name in configs:
        if problem := problem_with_name(name):  # a cell shares what is in its folder's parent
            raise InputError(f"the name of a cell {problem}")
    folder, every = Path(folder).resolve(), gcd(*steps)
    configs = {
        name: config.replace(steps=max(steps), validate_every=every, checkpoint_every=every)
        for name, config in configs.items()
    }
    for name, config in configs.items():
        _check_same(folder / name, config, steps, _plan_of(plan, config, folder / name))
    if executor is None:
        memory_level.share_level(folder, configs.values())
    else:  # its workers have the GPU
        executor.submit(memory_level.share_level, folder, list(configs.values())).result()
    _draw_class_images(configs.values(), folder)
    errors: dict[str, str] = {}
    cells = {name: (folder / name, config, plan, threads) for name, config in configs.items()}
    for done, (name, error) in enumerate(run_all(run_cell, cells, executor), 1):
        if error is not None:
            errors[name] = error
        if rows := sweep_table.table(configs, folder, steps):
            replace_file(folder / "table.csv", to_csv(rows).encode())
        replace_file(folder / "failures.json", json.dumps(errors, indent=2).encode())
        yield CellDone(name, done, len(cells), error)


def run_all(
    work: Callable[..., Any], cells: Mapping[str, tuple[Any, ...]], executor: Executor | None
) -> Iterator[tuple[str, Any]]:
    """Yield each cell's name and result of ``work``, in turn or as an executor's workers finish."""
    if executor is None:
        yield from ((name, work(*cell)) for name, cell in cells.items())
        return
    futures = {executor.submit(work, *cell): name for name, cell in cells.items()}
    for future in as_completed(futures):
        yield futures[future], future.result()


def run_cell(
    folder: Path, config: TrainConfig, plan: ValidationPlan, threads: int | None
) -> str | None:
    """Train one cell to its end; return the error if it failed, in one line."""
    import torch

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
            write_object(place, asdict(_plan_of(plan, config, folder)))
        peaked = run.config.early_stop and early_stopping.should_stop_early(history(run))
        # A finished run may still have to train on: its pipeline may be of fewer steps.
        if not run.finished or not (peaked or _reached(run) >= run.config.steps):
            for _ in train(run):
                pass
    except Exception as error:  # whatever it is, the other cells must run
        return one_line(error)
    finally:
        torch.set_num_threads(before)
    return None


def _plan_of(plan: ValidationPlan, config: TrainConfig, folder: Path) -> ValidationPlan:
    """Return the plan with the base's guidance scale, and its inference steps if none are set.

    A cell that has started keeps its own.
    """
    place = plan_file(folder)
    if place.exists():
        started = read_plan(place)
        scale, steps = started.guidance_scale, started.inference_steps
    else:
        own = sampling.inference_settings(config)
        scale, steps = own.guidance_scale, own.fewest_steps
    return replace(plan, guidance_scale=scale, inference_steps=plan.inference_steps or steps)


def _check_same(
    folder: Path, config: TrainConfig, steps: Sequence[int], plan: ValidationPlan
) -> None:
    """Raise :class:`RunError` if a cell's folder holds a run that this sweep would not make."""
    if not (folder / "config.toml").exists():
        return
    run, place = runs.resume(folder), plan_file(folder)
    # A schedule spans the run: in a longer one, the earlier steps would have been different.
    free = _LENGTH if config.lr_schedule == "constant" else _LENGTH[1:]
    of_plan = first_difference(asdict(read_plan(place)), asdict(plan)) if place.exists() else None
    check_same(run, config, f"{folder.parent} holds a sweep", free, of_plan)
    validated, reached = {row.step for row in history(run)}, _reached(run)
    missed = [str(step) for step in steps if step <= reached and step not in validated]
    if missed:
        raise RunError(
            f"{folder} is at step {reached} and was not validated at step {', '.join(missed)}; "
            "leave such steps out, or choose another folder."
        )


def _reached(run: Run) -> int:
    """Return the step that the run would resume from: its end, or its newest checkpoint."""
    rows = run.log() if run.finished else []  # none where the log is damaged
    return rows[-1]["step"] if rows else max(run.checkpoints(), default=0)


def _draw_class_images(configs: Iterable[TrainConfig], folder: Path) -> None:
    """Draw all cells' class images before they run, so that no two workers draw the same ones.

    It runs on all cores and shows its progress, since it may take most of a sweep's time.
    """
    from tqdm.auto import tqdm

    of_base = ("base", "revision", "variant", *BASE_FIELDS)
    by_base: dict[tuple[Any, ...], list[TrainConfig]] = {}
    for config in configs:
        if config.draws_class_images:
            by_base.setdefault(tuple(getattr(config, n) for n in of_base), []).append(config)
    for alike in by_base.values():
        prompts = {prompt for config in alike for prompt in class_images.prior_prompts(config)}
        family = sampling.load_source(alike[0], prompts=prompts)
        for config in alike:
            images = class_images.draw_class_images(config, family, folder / "class_images")
            for _ in tqdm(images, "class images", config.class_images, unit="image"):
                pass
        del family, images  # the cells need the memory
        gpu_memory.free_memory()
