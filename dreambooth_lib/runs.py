"""A run's folder: its config, its log, its checkpoints and the pipeline it ends with.

RUN/config.toml
RUN/log.jsonl               one row an update
RUN/watch.jsonl, watch/     what was seen on the way (see watch.py)
RUN/checkpoints/000100/     weights, optimizer state (see state.py)
RUN/pipeline/               the tuned pipeline in diffusers' layout, or its LoRA weights
"""

import dataclasses
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreambooth_lib.config import TrainConfig

#: What a run is of: with another, its checkpoints would not fit or mean something else.
_FIXED = ("subject", "base", "revision", "variant", "train_text_encoder", "method",
          "lora_rank", "lora_alpha", "lora_layers", "dora")  # fmt: skip


class RunError(ValueError):
    """A run's folder that is not there, not empty or not readable."""


@dataclass(frozen=True)
class Run:
    """A run on disk; made by :func:`start` or :func:`resume`."""

    folder: Path
    config: TrainConfig

    @property
    def pipeline(self) -> Path:
        """Where the tuned pipeline is once the run has finished."""
        return self.folder / "pipeline"

    @property
    def finished(self) -> bool:
        """Whether it was trained to its end."""
        return self.pipeline.is_dir() and any(self.pipeline.iterdir())

    def log(self) -> list[dict[str, Any]]:
        """Every logged update, oldest first."""
        return self.rows("log")

    def rows(self, name: str) -> list[dict[str, Any]]:
        """The rows of ``name.jsonl``, oldest first; a last line cut by a kill is left out."""
        rows = []
        path = self.folder / f"{name}.jsonl"
        for line in path.read_text().splitlines(keepends=True) if path.exists() else ():
            if line.endswith("\n"):
                rows.append(json.loads(line))
        return rows

    def append(self, name: str, row: dict[str, Any]) -> None:
        with (self.folder / f"{name}.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")

    def cut(self, name: str, step: int) -> None:
        """Drop what was written after ``step``: the updates that a resumed run makes again."""
        from dreambooth_lib.state import replace_file

        rows = [row for row in self.rows(name) if row["step"] <= step]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        replace_file(self.folder / f"{name}.jsonl", text.encode())

    def checkpoints(self) -> dict[int, Path]:
        """Whole checkpoints by step, oldest first."""
        folder = self.folder / "checkpoints"
        found = [p for p in folder.glob("[0-9]*") if p.is_dir()] if folder.exists() else []
        return {int(p.name): p for p in sorted(found, key=lambda p: int(p.name))}

    def save_checkpoint(self, step: int, state: dict[str, Any], best: int | None = None) -> None:
        """Write the state of ``step``, then drop the oldest ones beyond those to keep.

        The ``best`` step's is kept besides.
        """
        from dreambooth_lib.state import save_state

        save_state(self.folder / "checkpoints" / f"{step:06d}", state)
        for old, path in list(self.checkpoints().items())[: -self.config.checkpoints_kept]:
            if old != best:
                shutil.rmtree(path)

    def load_checkpoint(self) -> dict[str, Any] | None:
        """The newest checkpoint's state, or None where the run has none yet."""
        from dreambooth_lib.state import load_state

        found = list(self.checkpoints().values())
        return load_state(found[-1]) if found else None


def start(config: TrainConfig, folder: str | Path) -> Run:
    """Make a run's folder. Raises :class:`RunError` where the folder holds something already."""
    from dreambooth_lib.state import replace_file

    folder, config = Path(folder), _with_whole_paths(config)
    if (folder / "config.toml").exists():
        raise RunError(
            f"{folder} holds a run already; go on with it by resume('{folder}'), "
            "or choose another folder."
        )
    if folder.exists() and any(folder.iterdir()):
        raise RunError(f"{folder} is not empty; choose a new folder for the run.")
    replace_file(folder / "config.toml", config.to_toml().encode())
    return Run(folder, config)


def begin(config: TrainConfig, folder: str | Path) -> Run:
    """Start a run, or go on with the one in the folder, from now on with this config.

    Raises :class:`RunError` where that run is of another subject, trains other weights, or was
    trained to its end with other settings: more ``steps`` are all that it takes then.
    """
    if not (Path(folder) / "config.toml").exists():
        return start(config, folder)
    begun, config = resume(folder), _with_whole_paths(config)
    field = _in_the_way(begun, config)
    if field is not None:
        old, new = getattr(begun.config, field), getattr(config, field)
        raise RunError(
            f"{folder} holds a {'finished ' if begun.finished else ''}run whose {field} is "
            f"{old!r}, and not {new!r}; choose another folder for this one."
        )
    fields = dataclasses.fields(config)
    return resume(folder, **{field.name: getattr(config, field.name) for field in fields})


def place(
    config: TrainConfig, name: str, *folders: str | Path | None, last: Path | None = None
) -> Path:
    """Where a run of ``config`` goes: ``last`` if that can be gone on with, else a new place.

    A new place is ``name`` in the first of ``folders``, or ``name-2`` and so on where one of them
    has that already. A folder that is None, as Drive may be, has none.
    """
    if (
        last is not None
        and (last / "config.toml").exists()
        and _in_the_way(resume(last), _with_whole_paths(config)) is None
    ):
        return last
    known = [Path(folder) for folder in folders if folder is not None]
    number = 1
    while any((folder / _numbered(name, number)).exists() for folder in known):
        number += 1
    return known[0] / _numbered(name, number)


def _numbered(name: str, number: int) -> str:
    return name if number == 1 else f"{name}-{number}"


def _in_the_way(run: Run, config: TrainConfig) -> str | None:
    """A field by which a run cannot be gone on with as ``config`` says, if there is one."""
    fixed = list(_FIXED)
    if run.finished:
        more = config.steps > run.config.steps
        free = {"steps", "early_stop"} if more else {"early_stop"}
        fixed += [f.name for f in dataclasses.fields(config) if f.name not in {*free, *_FIXED}]
    return next((f for f in fixed if getattr(run.config, f) != getattr(config, f)), None)


def _with_whole_paths(config: TrainConfig) -> TrainConfig:
    """A run must find its pictures and its base whatever folder it is resumed from."""
    subject = dataclasses.replace(config.subject, pictures=_absolute(config.subject.pictures))
    own = config.class_folder and _absolute(config.class_folder)
    local = config.base != "toybox" and Path(config.base).exists()
    base = _absolute(config.base) if local else config.base
    return config.replace(subject=subject, class_folder=own, base=base)


def _absolute(path: str) -> str:
    return str(Path(path).resolve())


def resume(folder: str | Path, **changes: Any) -> Run:
    """Open a run to go on with, or to sample from; ``changes`` to its config are kept.

    Raises :class:`RunError` where the folder is not a run.
    """
    folder = Path(folder)
    if not (folder / "config.toml").exists():
        raise RunError(f"{folder} is not a run: it has no config.toml; check the path.")
    config = TrainConfig.from_toml(folder / "config.toml")
    if changes:
        from dreambooth_lib.state import replace_file

        config = config.replace(**changes)
        replace_file(folder / "config.toml", config.to_toml().encode())
    return Run(folder, config)
