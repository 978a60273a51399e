"""Studies of settings: many configs, one table. Steps are free: each run is scored on its way.

FOLDER/class_pictures/, latents/   made once, shared by all cells
FOLDER/CELL/                       a run; its looks are the table's rows
FOLDER/table.csv                   a row a cell and step; FOLDER/failures.json where cells failed
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, as_completed
from dataclasses import asdict, dataclass, fields
from itertools import product
from math import gcd
from pathlib import Path
from statistics import fmean
from typing import Any

from dreambooth_lib import choice, prior, runs, watch
from dreambooth_lib.config import TrainConfig
from dreambooth_lib.training import train
from dreambooth_lib.watch import View, Watched
from dreambooth_lib.weights import base_of

#: Enough pictures that another draw of seeds moves a mean little.
VIEW = View(seeds=4, class_pictures=12, unrelated=1, inference_steps=25)
#: A table's columns after the settings: standing by the rule of ``choice``, then what it is of.
MEASURES = ("standing", "subject_fidelity", "reference_fidelity", "prompt_adherence",
            "base_adherence", "class_diversity", "base_diversity", "prior_drift", "pres",
            "base_pres", "unrelated_drift")  # fmt: skip


@dataclass(frozen=True)
class Progress:
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
    view: View = VIEW,
    executor: Executor | None = None,
    threads: int | None = None,
) -> Iterator[Progress]:
    """Train every config to the largest of ``steps`` and look at it in each of them.

    Cells that are finished are not run again and a stopped one goes on. Without an ``executor``
    they run here, one by one; with one (processes, dask's ``Client.get_executor()``, submitit) on
    its workers, which must see ``folder``. ``threads`` are torch's in each cell; tables are equal
    bit by bit only for equal numbers of threads. A cell that fails is recorded in
    ``failures.json``, and the rest goes on. Writes ``table.csv`` after each cell.
    """
    folder, every = Path(folder).resolve(), gcd(*steps)
    wanted = {
        name: config.replace(steps=max(steps), watch_every=every, checkpoint_every=every)
        for name, config in configs.items()
    }
    _share_class_pictures(wanted.values(), folder)
    errors: dict[str, str] = {}
    cells = {name: (folder / name, config, view, threads) for name, config in wanted.items()}
    for done, (name, error) in enumerate(_run_all(cells, executor), 1):
        if error is not None:
            errors[name] = error
        _write(folder, wanted, steps, errors)
        yield Progress(name, done, len(cells), error)


def _run_all(
    cells: Mapping[str, tuple[Any, ...]], executor: Executor | None
) -> Iterator[tuple[str, str | None]]:
    if executor is None:
        for name, cell in cells.items():
            yield name, run_cell(*cell)
        return
    futures = {executor.submit(run_cell, *cell): name for name, cell in cells.items()}
    for future in as_completed(futures):
        yield futures[future], future.result()


def run_cell(folder: Path, config: TrainConfig, view: View, threads: int | None) -> str | None:
    """Train one cell to its end; gives what went wrong, in one line, or None."""
    import torch

    from dreambooth_lib.state import replace_file

    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        if (folder / "config.toml").exists():
            run = runs.resume(folder)
        else:
            run = runs.start(config, folder)
        view = View(**asdict(view) | {"guidance_scale": config.guidance_scale})
        place = folder / "watch" / "view.json"
        if not place.exists():
            replace_file(place, json.dumps(asdict(view)).encode())
        if not run.finished:
            for _ in train(run):
                pass
    except Exception as error:  # whatever it is, the other cells must go on
        return f"{type(error).__name__}: {error}"
    finally:
        torch.set_num_threads(before)
    return None


def _share_class_pictures(configs: Iterable[TrainConfig], folder: Path) -> None:
    """Before the cells are shared out, so that no two workers draw the same ones."""
    loaded: dict[tuple[Any, ...], Any] = {}
    for config in configs:
        if config.draws_class_pictures:
            key = (config.base, config.revision, config.variant, config.resolution)
            if key not in loaded:
                loaded[key] = base_of(config)
            for _ in prior.class_pictures(config, loaded[key], folder / "class_pictures"):
                pass


def table(
    configs: Mapping[str, TrainConfig], folder: str | Path, steps: Sequence[int]
) -> list[dict[str, Any]]:
    """A row a cell and step that is there: what varies among the configs, then the measures.

    Plain dicts, as ``pandas.DataFrame`` takes them.
    """
    varied = _varied(configs.values())
    rows = []
    for name, config in configs.items():
        if not (Path(folder) / name / "config.toml").exists():
            continue
        looks = watch.history(runs.resume(Path(folder) / name))
        of_cell = {"cell": name} | {field: getattr(config, field) for field in varied}
        for seen in looks[1:]:
            if seen.step in steps:
                rows.append(of_cell | {"step": seen.step} | measures(seen, looks[0]))
    return rows


def measures(seen: Watched, base: Watched) -> dict[str, float]:
    """A look's figures beside the base's, in the order of :data:`MEASURES`."""
    values = (
        choice.standing(choice.shares_of(seen, base)),
        seen.subject_fidelity, seen.reference_fidelity,
        seen.prompt_adherence, base.prompt_adherence, seen.class_diversity, base.class_diversity,
        seen.prior_drift, seen.pres, base.pres, seen.unrelated_drift,
    )  # fmt: skip
    return dict(zip(MEASURES, values, strict=True))


def _varied(configs: Iterable[TrainConfig]) -> list[str]:
    every = list(configs)
    plain = [f.name for f in fields(TrainConfig) if f.name != "subject"]
    return [f for f in plain if len({getattr(config, f) for config in every}) > 1]


def _write(
    folder: Path, configs: Mapping[str, TrainConfig], steps: Sequence[int], errors: dict[str, str]
) -> None:
    from dreambooth_lib.state import replace_file
    from dreambooth_lib.tables import to_csv

    rows = table(configs, folder, steps)
    if rows:
        replace_file(folder / "table.csv", to_csv(rows).encode())
    replace_file(folder / "failures.json", json.dumps(errors, indent=2).encode())


@dataclass(frozen=True)
class Recommendation:
    """Settings, how they stand, and why."""

    settings: dict[str, Any]
    standing: float
    reason: str


def recommend(rows: Sequence[Mapping[str, Any]]) -> Recommendation:
    """The setting with the highest standing, a mean over seeds; of equals the fewest steps.

    ``rows`` are of :func:`table` or read back from its CSV. Raises ``ValueError`` for none.
    """
    if not rows:
        raise ValueError("the table has no rows; run a sweep first.")
    fixed = {"cell", "seed", *MEASURES}
    found: dict[tuple[tuple[str, Any], ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        key = tuple((name, value) for name, value in row.items() if name not in fixed)
        found.setdefault(key, []).append(row)

    def mean(key: tuple[tuple[str, Any], ...], measure: str) -> float:
        return fmean(float(row[measure]) for row in found[key])

    best = max(found, key=lambda key: (round(mean(key, "standing"), 6), -int(dict(key)["step"])))
    named = ", ".join(f"{name} {value}" for name, value in best)
    fidelity = mean(best, "subject_fidelity") / mean(best, "reference_fidelity")
    adherence = mean(best, "prompt_adherence") / mean(best, "base_adherence")
    reason = (
        f"{named} stands highest of {len(found)} settings ({mean(best, 'standing'):.3f}, mean of "
        f"{len(found[best])}): fidelity {fidelity:.0%} of the photos' own, adherence "
        f"{adherence:.0%} of the base's, prior drift {mean(best, 'prior_drift'):.3f}."
    )
    return Recommendation(dict(best), mean(best, "standing"), reason)
