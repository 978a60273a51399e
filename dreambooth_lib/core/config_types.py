"""Give the fields of a config their types, or say which type each must have."""

import dataclasses
import math
import os
from typing import Any, get_args

from dreambooth_lib.core.errors import KitError
from dreambooth_lib.core.user_text import problem_with_path, problem_with_words

LARGEST = 2**62  #: Whole numbers above it are typing errors.
_MOST_PROMPTS = 1000
#: Fields that name a model: a local folder, or what it is called elsewhere.
MODELS = ("base", "draw_base", "scorer", "image_scorer")
_PATHS = ("photos", "class_folder", *MODELS)
#: What a field's type is called.
_KINDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
}


class Settings(dict[str, float]):
    """Hold numbers by name in a frozen config, which can be a key of a cache."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))


class ConfigError(KitError, ValueError):
    """A field has an impossible value; the message names it and says what to write instead."""


def take_types(fields: Any, prefix: str = "") -> None:
    """Give the fields of a frozen dataclass their types: whole numbers as floats, paths as text.

    None is allowed where it is the default. In paths, ``~`` is expanded. Raises
    :class:`ConfigError` for another type and for a path that no file system allows.
    """
    for field in dataclasses.fields(fields):
        value, wanted = getattr(fields, field.name), field.type
        name = f"{prefix}{field.name}"
        if value is None and field.default is None:
            continue
        if wanted == tuple[str, ...] | None:
            take = _file_names if field.name == "left_out" else _prompts
            object.__setattr__(fields, field.name, take(name, value))
            continue
        if wanted == dict[str, float] | None:
            object.__setattr__(fields, field.name, _numbers(name, value))
            continue
        is_number = isinstance(value, int) and not isinstance(value, bool)
        if is_number and abs(value) > LARGEST:
            raise ConfigError(f"{name} has more than 18 digits; write a smaller number.")
        if is_number and wanted in (float, float | None):
            value = float(value)
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):  # type: ignore[arg-type]
            kind = _KINDS[next(iter(get_args(wanted)), wanted)]
            left_out = ", or left out" if field.default is None else ""
            raise ConfigError(f"{name} is {shown(value)}; it must be {kind}{left_out}.")
        if isinstance(value, str) and (problem := problem_with_path(value)):
            raise ConfigError(f"{name} {problem}")
        if field.name in _PATHS and isinstance(value, str):
            if not value.strip():
                raise ConfigError(f"{name} is empty; give a path, or leave it out.")
            value = os.path.expanduser(value)
        object.__setattr__(fields, field.name, value)


def _prompts(name: str, value: Any) -> tuple[str, ...] | None:
    """Return prompts as a tuple, None for none; raise :class:`ConfigError` for anything else."""
    if not isinstance(value, list | tuple) or not all(isinstance(text, str) for text in value):
        raise ConfigError(f"{name} is {shown(value)}; write a list of prompts, or 'generic'.")
    if len(value) > _MOST_PROMPTS:
        raise ConfigError(f"{name} has {len(value)} prompts; give at most {_MOST_PROMPTS}.")
    for text in value:
        if text and (problem := problem_with_words(text)):
            raise ConfigError(f"a prompt of {name} {problem}")
    return tuple(value) or None


def _numbers(name: str, value: Any) -> Settings | None:
    """Return numbers by name, None for none; raise :class:`ConfigError` for anything else.

    Text is refused: peft imports what some of its settings name.
    """
    if not isinstance(value, dict) or not all(
        isinstance(key, str) and isinstance(number, int | float) and math.isfinite(number)
        for key, number in value.items()
    ):
        raise ConfigError(
            f"{name} is {shown(value)}; write numbers by name, such as {{'decompose_factor': 8}}."
        )
    return Settings(value) or None


def _file_names(name: str, value: Any) -> tuple[str, ...] | None:
    """Return names of files as a tuple, None for none; raise :class:`ConfigError` for others."""
    if not isinstance(value, list | tuple) or not all(isinstance(text, str) for text in value):
        raise ConfigError(f"{name} is {shown(value)}; write a list of files, such as ['b.jpg'].")
    for text in value:
        if problem := problem_with_path(text):
            raise ConfigError(f"a file of {name} {problem}")
    return tuple(value) or None


def shown(value: Any) -> str:
    """Return a value as Python would show it, cut short where it is long."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
