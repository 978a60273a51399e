"""A run's folder: its config, its log, its checkpoints and the tuned pipeline.

RUN/config.toml, memory.json        and what memory "auto" was resolved to (see memory_level.py)
RUN/photo_digests.json      of the photos that it trains on (see photo_record.py)
RUN/log.jsonl               one row per training step
RUN/changes.jsonl           the settings that changed when it was resumed, and at which step
RUN/chosen_checkpoint.json  the step that a person chose in a notebook, if one did
RUN/validation.jsonl, validation/   scores and validation images (see validation_record.py)
RUN/checkpoints/000100/     weights; the newest also has the optimizer's state (see checkpoints.py)
RUN/pipeline/, made_with.json   the tuned pipeline in diffusers' layout, or its LoRA weights
"""

import re
import shutil
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from dreambooth_lib.core import config_file
from dreambooth_lib.core.checked_json import append_row, read_object, read_rows, write_rows
from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.core.config_types import ConfigError
from dreambooth_lib.core.disk import explain_disk_errors
from dreambooth_lib.core.errors import KitError
from dreambooth_lib.core.files import recover_folder
from dreambooth_lib.core.locks import lock
from dreambooth_lib.core.made_with import MADE_WITH_FILE
from dreambooth_lib.training.config_changes import (
    SUBJECT_FIELDS,
    changed_fields,
    first_difference,
    flat_fields,
    identifying_fields,
    with_absolute_paths,
    with_settings_of,
)
from dreambooth_lib.training.photo_record import PHOTOS_FILE, why_other_photos

#: Fields that a run that has ended can still change, and those that its pipeline is saved by.
_FREE = {"steps", "early_stop"}
_FREE_UNSAVED = {"memory", "gradient_checkpointing", "mixed_precision", "checkpoints_kept"}
#: Fields that a run cannot change: its checkpoints would no longer fit, or mean something else.
_FIXED = (*SUBJECT_FIELDS, "base", "revision", "variant", "prediction_type", "clip_skip",
          "quantize", "method", "train_text_encoder", "train_token", "lora_rank", "lora_alpha",
          "lora_layers", "dora", "adapter", "adapter_settings")  # fmt: skip
#: Fields that a run cannot change once it has validated: later scores would not compare.
_FIXED_BY_VALIDATION = ("scorer", "image_scorer", "validation_inference_steps", "draw_base")


class RunError(KitError, ValueError):
    """A run's folder is missing, not empty or not readable."""


LEVEL_FILE = "memory.json"  #: of a run or a study: what memory "auto" was resolved to, as fields
GOAL_FILE = "trained.json"  #: in a run's pipeline: what it was trained to
#: What lies in a run's folder before the first checkpoint.
_FIRST_FILES = ("config.toml", LEVEL_FILE, PHOTOS_FILE, "log.jsonl", "validation.jsonl",
                "validation")  # fmt: skip
PHOTOS, CLASS_PHOTOS = "photos", "class_photos"  #: that a restored run brought with it


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
    def has_pipeline(self) -> bool:
        """Return whether there is a pipeline: this run's, or that of its earlier, shorter goal."""
        return self.pipeline.is_dir() and any(self.pipeline.iterdir())

    @property
    def finished(self) -> bool:
        """Return whether training has reached the config's goal."""
        if not self.has_pipeline:
            return False
        reached = self.trained()
        return not reached or self.goal().items() <= reached.items()

    def trained(self) -> dict[str, Any]:
        """Return what the pipeline notes of its training; nothing where that is damaged."""
        return read_object(self.pipeline / GOAL_FILE) or {}

    def goal(self) -> dict[str, Any]:
        """Return what decides when training is finished."""
        return {"steps": self.config.steps, "early_stop": self.config.early_stop}

    def log(self) -> list[dict[str, Any]]:
        """Return the log, one row per training step, oldest first."""
        numbers = ("loss", "instance_loss", "lr", "seconds")
        return [r for r in self.rows("log") if all(isinstance(r.get(n), float) for n in numbers)]

    def rows(self, name: str) -> list[dict[str, Any]]:
        """Return the rows of ``name.jsonl``, oldest first, without damaged ones."""
        rows = read_rows(self.folder / f"{name}.jsonl").rows
        return [row for row in rows if isinstance(row.get("step"), int)]

    def append(self, name: str, row: dict[str, Any]) -> None:
        """Append a row to ``name.jsonl``."""
        append_row(self.folder / f"{name}.jsonl", row)

    def truncate(self, name: str, step: int) -> int:
        """Drop the rows of ``name.jsonl`` after ``step``: a resumed run makes those steps again.

        Damaged rows are dropped too; return how many there were.
        """
        file = self.folder / f"{name}.jsonl"
        rows, damaged = read_rows(file)
        by_step = {n: row for row in rows if isinstance(n := row.get("step"), int) and n <= step}
        write_rows(file, [by_step[number] for number in sorted(by_step)])
        return damaged

    def checkpoints(self) -> dict[int, Path]:
        """Return the checkpoints by step, oldest first; other folders beside them are left out."""
        folders = (self.folder / "checkpoints").glob("*")
        named = {int(p.name): p for p in folders if re.fullmatch("[0-9]{6,12}", p.name)}
        return dict(sorted((step, path) for step, path in named.items() if path.is_dir()))

    def save_checkpoint(self, step: int, state: dict[str, Any], best: int | None = None) -> None:
        """Write the checkpoint of ``step``, then delete the oldest beyond ``checkpoints_kept``.

        The checkpoint of the ``best`` step is always kept. Only the newest keeps the optimizer's
        state; images can be generated from the others all the same.
        """
        from dreambooth_lib.training.checkpoints import drop_optimizer, save_state

        save_state(self.folder / "checkpoints" / f"{step:06d}", state)
        checkpoints = self.checkpoints()
        surplus = len(checkpoints) - self.config.checkpoints_kept
        with explain_disk_errors(self.folder):
            for number, (earlier, path) in enumerate(checkpoints.items()):
                if earlier >= step:
                    break
                if number < surplus and earlier != best:
                    shutil.rmtree(path)
                else:
                    drop_optimizer(path)

    def load_checkpoint(self) -> dict[str, Any] | None:
        """Return the state of the newest whole checkpoint, or None if the run has none yet.

        It has no "optimizer" if a newer checkpoint was deleted or is damaged. Sets damaged ones
        aside and raises as :func:`.checkpoints.load_newest` does.
        """
        from dreambooth_lib.training.checkpoints import load_newest

        return load_newest(self.checkpoints())


def read_level(folder: Path) -> dict[str, Any]:
    """Return what memory "auto" was resolved to in a folder; empty if that is undecided."""
    level = read_object(folder / LEVEL_FILE) or {}
    known = {"memory": str, "gradient_checkpointing": bool}
    sound = all(name in known and type(v) is known[name] for name, v in level.items())
    return level if sound else {}


def start(config: TrainConfig, folder: str | Path) -> Run:
    """Create a run's folder, or use that of a run that has no checkpoint yet.

    Raises :class:`RunError` if the folder holds anything else, and ``LockError`` if another process
    trains there.
    """
    folder, config = Path(folder).absolute(), with_absolute_paths(config)
    with explain_disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    # Hidden files may be left of a try that was killed.
    names = {path.name for path in folder.glob("[!.]*")} - {PHOTOS, CLASS_PHOTOS}
    if has_begun(folder):
        raise RunError(
            f"{folder} already holds a run; resume it with resume('{folder}'), or choose another "
            "folder."
        )
    if names and ("config.toml" not in names or names - {*_FIRST_FILES, "checkpoints"}):
        raise RunError(f"{folder} is not empty; choose a new folder for the run.")
    with explain_disk_errors(folder), lock(folder):
        if names and not _is_same(config, folder):
            for place in (folder / name for name in names):  # of a try with another config
                shutil.rmtree(place) if place.is_dir() else place.unlink()
        config_file.write(folder / "config.toml", config)
    return Run(folder, config)


def has_begun(folder: Path) -> bool:
    """Return whether a run's folder holds a checkpoint, even a damaged one, or a pipeline."""
    places = (folder / "checkpoints", folder / "pipeline")
    return any(path for place in places if place.is_dir() for path in place.glob("[!.]*"))


def _is_same(config: TrainConfig, folder: Path) -> bool:
    try:
        return flat_fields(resume(folder).config) == flat_fields(config)
    except ConfigError:
        return False


def start_or_resume(config: TrainConfig, folder: str | Path) -> Run:
    """Start a run, or resume the run in the folder, which trains with this config from now on.

    Inference settings stay the run's own where the config leaves them to the base. Raises
    :class:`RunError` if the run trains another subject or other weights, if it is already past
    ``config.steps``, or if it has finished and anything but ``steps`` and ``early_stop`` would
    change, its photos too: its folder would no longer say how it was trained.
    """
    if not has_begun(Path(folder)):
        return start(config, folder)
    if why := why_not_resumable(config, folder):
        raise RunError(why)
    settings = vars(with_settings_of(resume(folder).config, with_absolute_paths(config)))
    return resume(folder, **{field.name: settings[field.name] for field in fields(config)})


def why_not_resumable(config: TrainConfig, folder: str | Path) -> str | None:
    """Say why :func:`start_or_resume` would refuse the run in the folder, or return None."""
    if not has_begun(Path(folder)):
        return None
    run = resume(folder)
    old, new = flat_fields(run.config), flat_fields(with_settings_of(run.config, config))
    fixed = _fixed_fields(run)
    ended = run.finished or _has_ended(run, config)
    changeable = old.keys() if not ended else _FREE | (set() if run.finished else _FREE_UNSAVED)
    difference = first_difference(old, new, changeable - {*fixed})
    if difference and difference.name in fixed:
        return f"{folder} holds a run {difference}; choose another folder for a new run."
    if difference:
        reached = "finished" if run.finished else "reached its last step"
        return (
            f"{folder} holds a run that {reached} {difference}; start a new run, or change only "
            "steps to resume this one."
        )
    why = why_other_photos(run.folder, run.config) if ended else None
    return why or _why_beyond(run, config.steps)


def _has_ended(run: Run, config: TrainConfig) -> bool:
    """Return whether a run would train no further step with a config; it may lack its pipeline."""
    reached = max(run.checkpoints(), default=0)
    ended = (read_object(run.folder / MADE_WITH_FILE) or {}).get("step")
    stopped_early = run.config.early_stop and ended == reached and config.early_stop
    return stopped_early or reached >= min(run.config.steps, config.steps)


def _why_beyond(run: Run, steps: int) -> str | None:
    """Say in a sentence that a run is past the step that it would now end at, or return None."""
    reached = max(run.checkpoints(), default=0)
    why = (
        f"{run.folder} is already at step {reached}, beyond steps {steps}; raise steps to resume "
        "it, or start a new run."
    )
    return why if steps < reached else None


def _fixed_fields(run: Run) -> tuple[str, ...]:
    """Return the fields that a run that has begun cannot change."""
    return _FIXED + (_FIXED_BY_VALIDATION if run.rows("validation") else ())


def resume(folder: str | Path | Run, **changes: Any) -> Run:
    """Open a run, to train it further or to sample from it; save ``changes`` to its config.

    Raises :class:`RunError` if the folder is not a run, or if its checkpoints would not fit the
    changes, ``LockError`` if another process trains it and ``ConfigError`` for a bad config.
    """
    folder = folder.folder if isinstance(folder, Run) else Path(folder).absolute()
    if not (folder / "config.toml").exists():
        raise RunError(f"{folder} is not a run: it has no config.toml; check the path.")
    recover_folder(folder / "pipeline")
    run = Run(folder, TrainConfig.from_toml(folder / "config.toml"))
    config_file.warn_of_edits(folder / "config.toml")
    if not changes:
        return run
    changed = Run(folder, with_absolute_paths(run.config.replace(**changes)))
    old, new = (identifying_fields(config) for config in (run.config, changed.config))
    difference = first_difference(old, new, old.keys() - {*_fixed_fields(run)})
    if difference and has_begun(folder):
        raise RunError(f"{folder} holds a run {difference}; start a new run for that.")
    if "steps" in changes and (why := _why_beyond(run, changed.config.steps)):
        raise RunError(why)
    with lock(folder):
        config_file.write(folder / "config.toml", changed.config)
        if has_begun(folder) and (fields := changed_fields(run.config, changed.config)):
            step = max(run.checkpoints(), default=0)
            changed.append("changes", {"step": step, "fields": fields})
    return changed
