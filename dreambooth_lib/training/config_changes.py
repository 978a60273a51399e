"""Compare the configs of runs, in words, and make their paths absolute."""

import os
from collections.abc import Collection, Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from dreambooth_lib.core.config import SAMPLING_FIELDS, VALIDATION_SHARE, TrainConfig
from dreambooth_lib.core.config_types import MODELS, shown
from dreambooth_lib.core.subject import Subject

#: The fields of a subject, as :func:`flat_fields` names them.
SUBJECT_FIELDS = tuple(f"subject.{field.name}" for field in fields(Subject))


def with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """Return a config with absolute paths, so that its run can be resumed from any folder."""
    return config.replace(
        subject=replace(config.subject, photos=_absolute(config.subject.photos)),
        class_folder=config.class_folder and _absolute(config.class_folder),
        **{name: absolute_base(value) for name in MODELS if (value := getattr(config, name))},
    )


def absolute_base(base: str) -> str:
    """Return a base, or another model, with an absolute path if it is a local folder."""
    return _absolute(base) if base != "toybox" and Path(base).exists() else base


def _absolute(path: str) -> str:
    return os.path.realpath(Path(path).expanduser())


def flat_fields(config: TrainConfig) -> dict[str, Any]:
    """Return a config's fields by name, such as "subject.photos", with absolute paths.

    The values are as JSON reads them back, so that they compare with those in a file.
    """
    values = asdict(with_absolute_paths(config))
    values["prior_prompts"] = values["prior_prompts"] and [*values["prior_prompts"]]
    left_out = values["subject"]["left_out"]
    values["subject"]["left_out"] = left_out and [*left_out]
    subject = {f"subject.{name}": value for name, value in values.pop("subject").items()}
    return subject | values


def with_settings_of(run: TrainConfig, config: TrainConfig) -> TrainConfig:
    """Return a config with a run's own settings where it leaves them to the defaults."""
    settings = (*SAMPLING_FIELDS, "checkpoint_every")
    names = [name for name in settings if getattr(config, name) is None]
    same_interval = config.validate_every == run.validate_every
    if same_interval and config.validation_share == VALIDATION_SHARE:
        names.append("validation_share")
    return config.replace(**{name: getattr(run, name) for name in names})


def identifying_fields(config: TrainConfig) -> dict[str, Any]:
    """Return a config's fields; of the subject only its words, as its photos may be moved."""
    left_out = {*SUBJECT_FIELDS} - {"subject.identifier", "subject.class_noun"}
    return {name: value for name, value in flat_fields(config).items() if name not in left_out}


def describe(config: TrainConfig) -> str:
    """Describe a config in a sentence's words: "patch_dog on toybox"."""
    return f"{config.subject.name} on {config.base}"


class Difference(NamedTuple):
    """A field that differs; in words "with steps 4, but your settings have 8"."""

    name: str
    old: Any
    new: Any

    def __str__(self) -> str:
        name = self.name.removeprefix("subject.").replace("class_noun", "class noun")
        old = f"without {name}" if self.old is None else f"with {name} {_in_words(self.old)}"
        new = "none" if self.new is None else _in_words(self.new)
        return f"{old}, but your settings have {new}"


def _in_words(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return ", ".join(map(shown, value)) if isinstance(value, list | tuple) else shown(value)


def changed_fields(old: TrainConfig, new: TrainConfig) -> dict[str, list[Any]]:
    """Return the settings that differ, by name as in :func:`flat_fields`: old and new value.

    A new place of the photos or of other folders is no such setting.
    """
    before, after = flat_fields(old), flat_fields(new)
    for name in ("subject.photos", "subject.left_out", "class_folder", "base", "draw_base"):
        after[name] = before[name]
    return {n: [before.get(n), v] for n, v in after.items() if before.get(n) != v}


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
