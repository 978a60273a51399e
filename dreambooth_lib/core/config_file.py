"""Read and write a config: TOML files and plain dicts."""

import dataclasses
import tomllib
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dreambooth_lib.core.config_checks import ConfigError
from dreambooth_lib.core.old_names import FIELDS, current_fields

if TYPE_CHECKING:
    from dreambooth_lib.core.config import TrainConfig


def to_dict(config: "TrainConfig") -> dict[str, Any]:
    """Return a plain dict for TOML or JSON, without fields that are None or empty."""
    fields = {k: v for k, v in dataclasses.asdict(config).items() if v is not None}
    return fields | {"subject": {k: v for k, v in vars(config.subject).items() if v}}


def to_toml(config: "TrainConfig") -> str:
    import tomli_w

    return tomli_w.dumps(to_dict(config))


def from_toml(path: str | Path) -> dict[str, Any]:
    """Read a TOML file's fields; paths in it are relative to the file's folder."""
    path = Path(path)
    try:
        fields = tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"there is no config file {path}; check the path.") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}; fix that line.") from None
    for table, key in ((fields.get("subject"), "pictures"), (fields, "class_folder")):
        if isinstance(table, dict) and key in table:
            table[key] = str((path.parent / table[key]).resolve())
    base = path.parent / str(fields.get("base", "toybox"))
    if base.name != "toybox" and base.exists():
        fields["base"] = str(base.resolve())
    return fields


def from_dict(cls: "type[TrainConfig]", fields: dict[str, Any]) -> "TrainConfig":
    """Make a config from its fields; warn about fields that still have an old name.

    Raises :class:`ConfigError` for unknown fields and values of the wrong type.
    """
    if old := [name for name in FIELDS if name in fields]:
        renamed = ", ".join(f"{name} is now called {FIELDS[name]}" for name in old)
        warnings.warn(f"In the config, {renamed}; the next version will not read the old names.",
                      stacklevel=3)  # fmt: skip
    fields = current_fields(fields)
    subject = fields.pop("subject", None)
    if not isinstance(subject, dict):
        raise ConfigError(
            "the config has no [subject] table; add one with pictures and class_noun."
        )
    if "others" in fields:
        raise ConfigError(
            "others is set, but a run no longer trains several subjects; train one run for each, "
            "and combine their LoRAs with db.compose."
        )
    kind: Any = cls.__dataclass_fields__["subject"].type
    subject = _checked(kind, subject, "subject.")
    for field in dataclasses.fields(kind):
        if field.default is dataclasses.MISSING and field.name not in subject:
            raise ConfigError(f"subject.{field.name} is missing; add it to the config.")
    return cls(subject=kind(**subject), **_checked(cls, fields, ""))


def _checked(cls: Any, fields: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Return the fields with the types that ``cls`` wants; whole numbers become floats."""
    types: dict[str, Any] = {field.name: field.type for field in dataclasses.fields(cls)}
    checked = dict(fields)
    for name, value in fields.items():
        if name not in types:
            raise ConfigError(f"unknown field '{prefix}{name}'; the fields are {', '.join(types)}.")
        wanted = types[name]
        number = isinstance(value, int) and not isinstance(value, bool)
        if number and wanted in (float, float | None):
            checked[name] = float(value)
        elif not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
            wanted_name = getattr(wanted, "__name__", str(wanted))
            raise ConfigError(f"{prefix}{name} is {value!r}; it must be of type {wanted_name}.")
    return checked
