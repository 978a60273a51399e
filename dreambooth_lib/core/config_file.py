"""Read and write a config: TOML files and plain dicts."""

import dataclasses
import difflib
import os
import tomllib
import warnings
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dreambooth_lib.core.config_types import MODELS, ConfigError, shown
from dreambooth_lib.core.files import replace_file
from dreambooth_lib.core.user_text import problem_with_path

if TYPE_CHECKING:
    from dreambooth_lib.core.config import TrainConfig

MOST_BYTES = 2**20  #: of a config file; others are refused unread


def to_dict(config: "TrainConfig") -> dict[str, Any]:
    """Return a plain dict for TOML or JSON, without fields that are None or empty."""
    fields = {k: [*v] if isinstance(v, tuple) else v
              for k, v in dataclasses.asdict(config).items() if v is not None}  # fmt: skip
    return fields | {"subject": {k: v for k, v in vars(config.subject).items() if v}}


def to_toml(config: "TrainConfig") -> str:
    import tomli_w

    return tomli_w.dumps(to_dict(config))


def from_toml(path: str | Path) -> dict[str, Any]:
    """Read a TOML file's fields; paths in it are relative to the file's folder.

    Raises :class:`ConfigError` for a file that cannot be read, or is no TOML.
    """
    path = Path(path)
    fields = _parse(path)
    subject = fields.get("subject")
    for table, key in ((subject, "photos"), (fields, "class_folder")):
        if isinstance(table, dict) and key in table:
            table[key] = _beside(path, table[key])
    for name in MODELS:
        found = None if fields.get(name) == "toybox" else _beside(path, fields.get(name))
        if isinstance(found, str) and os.path.exists(found):
            fields[name] = found
    return fields


def write(path: Path, config: "TrainConfig") -> None:
    """Write a run's config, with a checksum."""
    text = to_toml(config)
    replace_file(path, f"{text}# crc32 {zlib.crc32(text.encode())}\n".encode())


def warn_of_edits(path: Path) -> None:
    """Warn if a run's config is not as it was written: by hand, or by a damaged disk."""
    text, mark, checksum = path.read_text(encoding="utf-8").rpartition("# crc32 ")
    if mark and checksum.strip() != str(zlib.crc32(text.encode())):
        warnings.warn(f"{path} was changed after it was written; its new values are used.",
                      stacklevel=3)  # fmt: skip


def _parse(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(f"there is no config file {path}; check the path.") from None
    except (OSError, ValueError) as error:  # a ValueError for a NUL in the path
        cause = getattr(error, "strerror", None) or error
        raise ConfigError(f"{path} cannot be read ({cause}); give a config file.") from error
    if len(data) > MOST_BYTES:
        raise ConfigError(f"{path} is larger than any config; give a config file.")
    try:
        return tomllib.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8; save it in that encoding.") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}; fix that line.") from None
    except (ValueError, RecursionError) as error:  # too many digits, or brackets
        raise ConfigError(
            f"{path} has a number or a table that is far too long; shorten it."
        ) from error


def _beside(file: Path, value: Any) -> Any:
    """Return a path in a file as an absolute one; leave what is no path to the checks."""
    if not isinstance(value, str) or not value.strip() or problem_with_path(value):
        return value
    return os.path.realpath(file.parent / os.path.expanduser(value))


def from_dict(cls: "type[TrainConfig]", fields: dict[str, Any]) -> "TrainConfig":
    """Make a config from its fields; raise :class:`ConfigError` for unknown and wrong ones."""
    fields = dict(fields)
    subject = fields.pop("subject", None)
    if not isinstance(subject, dict):
        raise ConfigError("the config has no [subject] table; add one with photos and class_noun.")
    kind: Any = cls.__dataclass_fields__["subject"].type
    own = [field.name for field in dataclasses.fields(cls)]
    of_subject = [f"subject.{field.name}" for field in dataclasses.fields(kind)]
    _check_names([f"subject.{name}" for name in subject], of_subject, own)
    _check_names(fields, own, of_subject)
    for field in dataclasses.fields(kind):
        if field.default is dataclasses.MISSING and field.name not in subject:
            raise ConfigError(f"subject.{field.name} is missing; add it to the config.")
    return cls(subject=kind(**subject), **fields)


def _check_names(names: Iterable[str], known: list[str], elsewhere: list[str]) -> None:
    """Raise :class:`ConfigError` for a name that is unknown; it may belong to the other table."""
    for name in map(str, names):
        if name in known:
            continue
        ends = {one.rpartition(".")[2]: one for one in (*elsewhere, *known)}
        near = difflib.get_close_matches(name.rpartition(".")[2], ends, n=1, cutoff=0.75)
        hint = f"did you mean '{ends[near[0]]}'?" if near else f"the fields are {', '.join(known)}."
        raise ConfigError(f"unknown field {shown(name)}; {hint}")
