"""A run's folder: its config, its log, its checkpoints and the pipeline it ends with.

RUN/config.toml
RUN/memory.json             what its memory "auto" was decided to mean (see levels.py)
RUN/log.jsonl               one row an update
RUN/watch.jsonl, watch/     what was seen on the way (see watch.py)
RUN/checkpoints/000100/     weights, and the newest one's optimizer state (see state.py)
RUN/pipeline/               the tuned pipeline in diffusers' layout, or its LoRA weights
"""

import dataclasses
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreambooth_lib.config import DRAWING, TrainConfig

#: What a run is of: with another, its checkpoints would not fit or mean something else.
_FIXED = ("subject", "base", "revision", "variant", "train_text_encoder", "method",
          "lora_rank", "lora_alpha", "lora_layers", "dora", "quantize", "train_token")  # fmt: skip


class RunError(ValueError):
    """A run's folder that is not there, not empty or not readable."""


#: In a run's folder or a study's: what memory "auto" means there, as fields of the config.
DECIDED = "memory.json"


@dataclass(frozen=True)
class Run:
    """A run on disk; made by :func:`start` or :func:`resume`."""

    folder: Path
    config: TrainConfig

    @property
    def settled(self) -> TrainConfig:
        """The config that it trains with: with what "auto" was decided to mean, once it was."""
        if self.config.memory != "auto":
            return self.config
        return self.config.replace(**decided(self.folder))

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

        The ``best`` step's is kept besides. Only the newest keeps the optimizer's state, without
        which the others can still be drawn from.
        """
        from dreambooth_lib.state import drop_optimizer, save_state

        save_state(self.folder / "checkpoints" / f"{step:06d}", state)
        older = [(old, path) for old, path in self.checkpoints().items() if old < step]
        spare = len(self.checkpoints()) - self.config.checkpoints_kept
        for number, (old, path) in enumerate(older):
            if number < spare and old != best:
                shutil.rmtree(path)
            else:
                drop_optimizer(path)

    def load_checkpoint(self) -> dict[str, Any] | None:
        """Return the newest checkpoint's state, or None where the run has none yet.

        It lacks "optimizer" where a newer checkpoint was removed by hand.
        """
        from dreambooth_lib.state import load_state

        found = list(self.checkpoints().values())
        return load_state(found[-1]) if found else None


def decided(folder: Path) -> dict[str, Any]:
    """Return what memory "auto" was decided to mean in a folder; empty where nothing was."""
    file = folder / DECIDED
    return json.loads(file.read_text()) if file.exists() else {}


def start(config: TrainConfig, folder: str | Path) -> Run:
    """Make a run's folder. Raises :class:`RunError` where the folder holds something already."""
    from dreambooth_lib.state import replace_file

    folder, config = Path(folder), with_whole_paths(config)
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

    How pictures are drawn stays as it was where the config leaves that to the base. Raises
    :class:`RunError` where that run is of another subject or trains other weights, where it has
    come further than ``config.steps``, and where it has finished and more than its steps and its
    early stop is to be changed: its config would no longer say how it was trained.
    """
    if not (Path(folder) / "config.toml").exists():
        return start(config, folder)
    if why := refusal(config, folder):
        raise RunError(why)
    news = vars(as_begun(resume(folder), with_whole_paths(config)))
    return resume(folder, **{field.name: news[field.name] for field in dataclasses.fields(config)})


def refusal(config: TrainConfig, folder: str | Path) -> str | None:
    """Why :func:`begin` would not go on with the run in the folder, in a sentence, or None."""
    if not (Path(folder) / "config.toml").exists():
        return None
    begun = resume(folder)
    olds, news = vars(begun.config), vars(as_begun(begun, with_whole_paths(config)))
    for field in [name for name in olds if olds[name] != news[name]]:
        if field in _FIXED:
            return (
                f"{folder} holds a run whose {field} is {olds[field]!r}, and not {news[field]!r}; "
                "begin a new run for this one: choose another folder."
            )
        if begun.finished and field not in ("steps", "early_stop"):
            return (
                f"{folder} holds a run that has finished with {field} {olds[field]!r}, and not "
                f"{news[field]!r}; begin a new run, or change nothing but steps to go on with it."
            )
    reached = max(begun.checkpoints(), default=0)
    if config.steps < reached:
        return (
            f"{folder} has come to step {reached}, beyond steps {config.steps}; raise steps to go "
            "on with it, or begin a new run."
        )
    return None


def as_begun(begun: Run, config: TrainConfig) -> TrainConfig:
    """Return the config, with a run's own settings where it leaves these to the kit.

    Runs of earlier versions have numbers there: how pictures are drawn, and how often it is saved.
    """
    left = [name for name in (*DRAWING, "checkpoint_every") if getattr(config, name) is None]
    return config.replace(**{name: getattr(begun.config, name) for name in left})


def with_whole_paths(config: TrainConfig) -> TrainConfig:
    """As a run keeps it, which must find its pictures and its base whatever folder it is in."""
    subject = dataclasses.replace(config.subject, pictures=_absolute(config.subject.pictures))
    own = config.class_folder and _absolute(config.class_folder)
    base = whole_base(config.base)
    return config.replace(subject=subject, class_folder=own, base=base)


def whole_base(base: str) -> str:
    """A base as a run's config has it: a local one by its whole path."""
    return _absolute(base) if base != "toybox" and Path(base).exists() else base


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
