"""A run's folder: its config, its log, its checkpoints and the pipeline it ends with.

RUN/config.toml
RUN/memory.json             what its memory "auto" was decided to mean (see levels.py)
RUN/log.jsonl               one row an update
RUN/validation.jsonl, watch/     what was seen on the way (see watch_record.py)
RUN/checkpoints/000100/     weights, and the newest one's optimizer state (see state.py)
RUN/pipeline/               the tuned pipeline in diffusers' layout, or its LoRA weights
"""

import json
import shutil
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from dreambooth_lib.core.config import SAMPLING_FIELDS, TrainConfig
from dreambooth_lib.core.old_names import locate

#: What a run is of: with another, its checkpoints would not fit or mean something else.
_FIXED = ("subject", "base", "revision", "variant", "train_text_encoder", "method",
          "lora_rank", "lora_alpha", "lora_layers", "dora", "quantize", "train_token")  # fmt: skip


class RunError(ValueError):
    """A run's folder that is not there, not empty or not readable."""


#: In a run's folder or a study's: what memory "auto" means there, as fields of the config.
LEVEL_FILE = "memory.json"


@dataclass(frozen=True)
class Run:
    """A run on disk; made by :func:`start` or :func:`resume`."""

    folder: Path
    config: TrainConfig

    @property
    def resolved_config(self) -> TrainConfig:
        """The config that it trains with: with what "auto" was decided to mean, once it was."""
        if self.config.memory != "auto":
            return self.config
        return self.config.replace(**read_level(self.folder))

    @property
    def pipeline(self) -> Path:
        """Where the tuned pipeline is once the run has finished."""
        return self.folder / "pipeline"

    @property
    def finished(self) -> bool:
        """Whether it was trained to its end."""
        return self.pipeline.is_dir() and any(self.pipeline.iterdir())

    def log(self) -> list[dict[str, Any]]:
        """Return every logged update, oldest first."""
        return self.rows("log")

    def rows(self, name: str) -> list[dict[str, Any]]:
        """Return the rows of ``name.jsonl``, oldest first, but for a last line cut by a kill."""
        path = locate(self.folder, f"{name}.jsonl")
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def append(self, name: str, row: dict[str, Any]) -> None:
        with locate(self.folder, f"{name}.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")

    def truncate(self, name: str, step: int) -> None:
        """Drop what was written after ``step``: the updates that a resumed run makes again."""
        from dreambooth_lib.core.files import replace_file

        rows = [row for row in self.rows(name) if row["step"] <= step]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        replace_file(locate(self.folder, f"{name}.jsonl"), text.encode())

    def checkpoints(self) -> dict[int, Path]:
        """Return whole checkpoints by step, oldest first."""
        found = {int(p.name): p for p in self.folder.glob("checkpoints/[0-9]*") if p.is_dir()}
        return dict(sorted(found.items()))

    def save_checkpoint(self, step: int, state: dict[str, Any], best: int | None = None) -> None:
        """Write the state of ``step``, then drop the oldest ones beyond those to keep.

        The ``best`` step's is kept besides. Only the newest keeps the optimizer's state, without
        which the others can still be drawn from.
        """
        from dreambooth_lib.training.checkpoints import drop_optimizer, save_state

        save_state(self.folder / "checkpoints" / f"{step:06d}", state)
        found = self.checkpoints()
        spare = len(found) - self.config.checkpoints_kept
        for number, (old, path) in enumerate(found.items()):
            if old >= step:
                break
            if number < spare and old != best:
                shutil.rmtree(path)
            else:
                drop_optimizer(path)

    def load_checkpoint(self) -> dict[str, Any] | None:
        """Return the newest checkpoint's state, or None where the run has none yet.

        It lacks "optimizer" where a newer checkpoint was removed by hand.
        """
        from dreambooth_lib.training.checkpoints import load_state

        found = list(self.checkpoints().values())
        return load_state(found[-1]) if found else None


def read_level(folder: Path) -> dict[str, Any]:
    """Return what memory "auto" was decided to mean in a folder; empty where nothing was."""
    file = folder / LEVEL_FILE
    return json.loads(file.read_text()) if file.exists() else {}


def start(config: TrainConfig, folder: str | Path) -> Run:
    """Make a run's folder. Raises :class:`RunError` where the folder holds something already."""
    from dreambooth_lib.core.files import replace_file

    folder, config = Path(folder), with_absolute_paths(config)
    if (folder / "config.toml").exists():
        raise RunError(
            f"{folder} holds a run already; go on with it by resume('{folder}'), "
            "or choose another folder."
        )
    if folder.exists() and any(folder.iterdir()):
        raise RunError(f"{folder} is not empty; choose a new folder for the run.")
    replace_file(folder / "config.toml", config.to_toml().encode())
    return Run(folder, config)


def start_or_resume(config: TrainConfig, folder: str | Path) -> Run:
    """Start a run, or go on with the one in the folder, from now on with this config.

    How pictures are drawn stays as it was where the config leaves that to the base. Raises
    :class:`RunError` where that run is of another subject or trains other weights, where it has
    come further than ``config.steps``, and where it has finished and more than its steps and its
    early stop is to be changed: its config would no longer say how it was trained.
    """
    if not (Path(folder) / "config.toml").exists():
        return start(config, folder)
    if why := why_not_resumable(config, folder):
        raise RunError(why)
    news = vars(with_settings_of(resume(folder), with_absolute_paths(config)))
    return resume(folder, **{field.name: news[field.name] for field in fields(config)})


def why_not_resumable(config: TrainConfig, folder: str | Path) -> str | None:
    """Say in a sentence why :func:`begin` would not go on with the run in the folder, or None."""
    if not (Path(folder) / "config.toml").exists():
        return None
    begun = resume(folder)
    olds, news = vars(begun.config), vars(with_settings_of(begun, with_absolute_paths(config)))
    free = {"steps", "early_stop"} if begun.finished else olds.keys()
    other = first_difference(olds, news, free - {*_FIXED})
    if other and other.name in _FIXED:
        return (
            f"{folder} holds a run whose {other}; begin a new run for this one: choose another "
            "folder."
        )
    if other:
        return (
            f"{folder} holds a run that has finished with {other.name} {other.old!r}, and not "
            f"{other.new!r}; begin a new run, or change nothing but steps to go on with it."
        )
    reached = max(begun.checkpoints(), default=0)
    if config.steps < reached:
        return (
            f"{folder} has come to step {reached}, beyond steps {config.steps}; raise steps to go "
            "on with it, or begin a new run."
        )
    return None


def with_settings_of(begun: Run, config: TrainConfig) -> TrainConfig:
    """Return the config, with a run's own settings where it leaves these to the kit.

    Runs of earlier versions have numbers there: how pictures are drawn, and how often it is saved.
    """
    left = [
        name for name in (*SAMPLING_FIELDS, "checkpoint_every") if getattr(config, name) is None
    ]
    return config.replace(**{name: getattr(begun.config, name) for name in left})


def with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """Return a config as a run keeps it, which must find its pictures and base from any folder."""
    subject = replace(config.subject, pictures=_absolute(config.subject.pictures))
    own = config.class_folder and _absolute(config.class_folder)
    base = absolute_base(config.base)
    return config.replace(subject=subject, class_folder=own, base=base)


def absolute_base(base: str) -> str:
    """Return a base as a run's config has it: a local one by its whole path."""
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
        from dreambooth_lib.core.files import replace_file

        config = config.replace(**changes)
        replace_file(folder / "config.toml", config.to_toml().encode())
    return Run(folder, config)


def flat_fields(config: TrainConfig) -> dict[str, Any]:
    """Return every field by name, as "steps" or "subject.pictures", with a run's whole paths.

    As JSON would give it back: what is written down can be compared with it.
    """
    of_config = asdict(with_absolute_paths(config))
    subject = {f"subject.{name}": value for name, value in of_config.pop("subject").items()}
    return subject | of_config | {"others": []}  # as studies of earlier versions wrote it down


def describe(config: TrainConfig) -> str:
    """Return what a config is of, for a sentence: "patch_dog on toybox"."""
    return f"{config.subject.name} on {config.base}"


class Difference(NamedTuple):
    """A field that differs; as text "steps is 4, and not 8"."""

    name: str
    old: Any
    new: Any

    def __str__(self) -> str:
        old, new = ("left out" if v is None else repr(v) for v in (self.old, self.new))
        return f"{self.name} is {old}, and not {new}"


def first_difference(
    old: Mapping[str, Any], new: Mapping[str, Any], but: Collection[str] = ()
) -> Difference | None:
    """Return the first field that differs, of those that ``but`` does not name; None if none does.

    A field that is missing counts as None.
    """
    for name in {**new, **old}:
        if name not in but and old.get(name) != new.get(name):
            return Difference(name, old.get(name), new.get(name))
    return None
