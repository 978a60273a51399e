"""A run's folder: its config, its log, its checkpoints and the tuned pipeline.

RUN/config.toml
RUN/memory.json             what memory "auto" was resolved to (see memory_level.py)
RUN/log.jsonl               one row per training step
RUN/validation.jsonl, validation/   scores and validation images (see validation_record.py)
RUN/checkpoints/000100/     weights; the newest also has the optimizer's state (see checkpoints.py)
RUN/pipeline/               the tuned pipeline in diffusers' layout, or its LoRA weights
"""

import json
import shutil
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from dreambooth_lib.core.config import SAMPLING_FIELDS, TrainConfig
from dreambooth_lib.core.errors import KitError
from dreambooth_lib.core.files import replace_file
from dreambooth_lib.core.old_names import locate

#: Fields that a run cannot change: its checkpoints would no longer fit, or mean something else.
_FIXED = ("subject", "base", "revision", "variant", "train_text_encoder", "method",
          "lora_rank", "lora_alpha", "lora_layers", "dora", "quantize", "train_token")  # fmt: skip


class RunError(KitError, ValueError):
    """A run's folder is missing, not empty or not readable."""


#: In the folder of a run or a study: what memory "auto" was resolved to, as fields of the config.
LEVEL_FILE = "memory.json"


@dataclass(frozen=True)
class Run:
    """A run on disk, from :func:`start` or :func:`resume`."""

    folder: Path
    config: TrainConfig

    @property
    def resolved_config(self) -> TrainConfig:
        """Return the config with memory "auto" resolved, once that has been decided."""
        if self.config.memory != "auto":
            return self.config
        return self.config.replace(**read_level(self.folder))

    @property
    def pipeline(self) -> Path:
        """Return the folder of the tuned pipeline, which is there once the run has finished."""
        return self.folder / "pipeline"

    @property
    def finished(self) -> bool:
        """Return whether training has finished."""
        return self.pipeline.is_dir() and any(self.pipeline.iterdir())

    def log(self) -> list[dict[str, Any]]:
        """Return the log, one row per training step, oldest first."""
        return self.rows("log")

    def rows(self, name: str) -> list[dict[str, Any]]:
        """Return the rows of ``name.jsonl``, oldest first, without a half-written last line."""
        path = locate(self.folder, f"{name}.jsonl")
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def append(self, name: str, row: dict[str, Any]) -> None:
        """Append a row to ``name.jsonl``."""
        with locate(self.folder, f"{name}.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")

    def truncate(self, name: str, step: int) -> None:
        """Drop the rows of ``name.jsonl`` after ``step``: a resumed run makes those steps again."""
        rows = [row for row in self.rows(name) if row["step"] <= step]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        replace_file(locate(self.folder, f"{name}.jsonl"), text.encode())

    def checkpoints(self) -> dict[int, Path]:
        """Return the checkpoints by step, oldest first; half-written ones are left out."""
        places = [p for p in self.folder.glob("checkpoints/*") if p.name.isdigit() and p.is_dir()]
        folders = {int(path.name): path for path in places}
        return dict(sorted(folders.items()))

    def save_checkpoint(self, step: int, state: dict[str, Any], best: int | None = None) -> None:
        """Write the checkpoint of ``step``, then delete the oldest beyond ``checkpoints_kept``.

        The checkpoint of the ``best`` step is always kept. Only the newest keeps the optimizer's
        state; images can be drawn from the others all the same.
        """
        from dreambooth_lib.training.checkpoints import drop_optimizer, save_state

        save_state(self.folder / "checkpoints" / f"{step:06d}", state)
        checkpoints = self.checkpoints()
        surplus = len(checkpoints) - self.config.checkpoints_kept
        for number, (earlier, path) in enumerate(checkpoints.items()):
            if earlier >= step:
                break
            if number < surplus and earlier != best:
                shutil.rmtree(path)
            else:
                drop_optimizer(path)

    def load_checkpoint(self) -> dict[str, Any] | None:
        """Return the state of the newest checkpoint, or None if the run has none yet.

        It has no "optimizer" if a newer checkpoint was deleted by hand.
        """
        from dreambooth_lib.training.checkpoints import load_state

        folders = list(self.checkpoints().values())
        return load_state(folders[-1]) if folders else None


def read_level(folder: Path) -> dict[str, Any]:
    """Return what memory "auto" was resolved to in a folder; empty if that is undecided."""
    file = folder / LEVEL_FILE
    return json.loads(file.read_text()) if file.exists() else {}


def start(config: TrainConfig, folder: str | Path) -> Run:
    """Create a run's folder. Raises :class:`RunError` if the folder is not empty."""
    folder, config = Path(folder), with_absolute_paths(config)
    if (folder / "config.toml").exists():
        raise RunError(
            f"{folder} already holds a run; resume it with resume('{folder}'), or choose another "
            "folder."
        )
    if folder.exists() and any(folder.iterdir()):
        raise RunError(f"{folder} is not empty; choose a new folder for the run.")
    replace_file(folder / "config.toml", config.to_toml().encode())
    return Run(folder, config)


def start_or_resume(config: TrainConfig, folder: str | Path) -> Run:
    """Start a run, or resume the run in the folder, which trains with this config from now on.

    Inference settings stay the run's own where the config leaves them to the base. Raises
    :class:`RunError` if the run trains another subject or other weights, if it is already past
    ``config.steps``, or if it has finished and anything but ``steps`` and ``early_stop`` would
    change: its config would no longer say how it was trained.
    """
    if not (Path(folder) / "config.toml").exists():
        return start(config, folder)
    if why := why_not_resumable(config, folder):
        raise RunError(why)
    settings = vars(with_settings_of(resume(folder), with_absolute_paths(config)))
    return resume(folder, **{field.name: settings[field.name] for field in fields(config)})


def why_not_resumable(config: TrainConfig, folder: str | Path) -> str | None:
    """Say in a sentence why :func:`start_or_resume` would refuse the run in the folder, or None."""
    if not (Path(folder) / "config.toml").exists():
        return None
    run = resume(folder)
    old, new = vars(run.config), vars(with_settings_of(run, with_absolute_paths(config)))
    changeable = {"steps", "early_stop"} if run.finished else old.keys()
    difference = first_difference(old, new, changeable - {*_FIXED})
    if difference and difference.name in _FIXED:
        return f"{folder} holds a run whose {difference}; choose another folder for a new run."
    if difference:
        return (
            f"{folder} holds a run that finished with {difference.name} {difference.old!r}, not "
            f"{difference.new!r}; start a new run, or change only steps to resume this one."
        )
    reached = max(run.checkpoints(), default=0)
    if config.steps < reached:
        return (
            f"{folder} is already at step {reached}, beyond steps {config.steps}; raise steps to "
            "resume it, or start a new run."
        )
    return None


def with_settings_of(run: Run, config: TrainConfig) -> TrainConfig:
    """Return the config with the run's own settings where it leaves them to the defaults.

    Runs of earlier versions have numbers there: inference settings and ``checkpoint_every``.
    """
    names = [
        name for name in (*SAMPLING_FIELDS, "checkpoint_every") if getattr(config, name) is None
    ]
    return config.replace(**{name: getattr(run.config, name) for name in names})


def with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """Return a config with absolute paths, so that its run can be resumed from any folder."""
    return config.replace(
        subject=replace(config.subject, pictures=_absolute(config.subject.pictures)),
        class_folder=config.class_folder and _absolute(config.class_folder),
        base=absolute_base(config.base),
    )


def absolute_base(base: str) -> str:
    """Return a base with an absolute path if it is a local folder."""
    return _absolute(base) if base != "toybox" and Path(base).exists() else base


def _absolute(path: str) -> str:
    return str(Path(path).resolve())


def resume(folder: str | Path, **changes: Any) -> Run:
    """Open a run, to train it further or to sample from it; save ``changes`` to its config.

    Raises :class:`RunError` if the folder is not a run.
    """
    folder = Path(folder)
    if not (folder / "config.toml").exists():
        raise RunError(f"{folder} is not a run: it has no config.toml; check the path.")
    config = TrainConfig.from_toml(folder / "config.toml")
    if changes:
        config = config.replace(**changes)
        replace_file(folder / "config.toml", config.to_toml().encode())
    return Run(folder, config)


def flat_fields(config: TrainConfig) -> dict[str, Any]:
    """Return a config's fields by name, such as "subject.pictures", with absolute paths.

    The values are as JSON reads them back, so that they compare with those in a file.
    """
    values = asdict(with_absolute_paths(config))
    subject = {f"subject.{name}": value for name, value in values.pop("subject").items()}
    return subject | values | {"others": []}  # which studies of earlier versions wrote


def describe(config: TrainConfig) -> str:
    """Describe a config in a sentence's words: "patch_dog on toybox"."""
    return f"{config.subject.name} on {config.base}"


class Difference(NamedTuple):
    """A field that differs; in words "steps is 4, not 8"."""

    name: str
    old: Any
    new: Any

    def __str__(self) -> str:
        old, new = ("left out" if v is None else repr(v) for v in (self.old, self.new))
        return f"{self.name} is {old}, not {new}"


def first_difference(
    old: Mapping[str, Any], new: Mapping[str, Any], ignored: Collection[str] = ()
) -> Difference | None:
    """Return the first field that differs and is not ``ignored``; None if there is none.

    A missing field counts as None.
    """
    for name in {**new, **old}:
        if name not in ignored and old.get(name) != new.get(name):
            return Difference(name, old.get(name), new.get(name))
    return None
