"""Whether what lies in a folder is of the config in hand, and if not, what differs."""

from collections.abc import Collection, Mapping
from dataclasses import asdict
from typing import Any

from dreambooth_lib.config import TrainConfig
from dreambooth_lib.runs import with_whole_paths


def plain(config: TrainConfig) -> dict[str, Any]:
    """Every field by name, as "steps" or "subject.pictures", with whole paths as a run has them.

    As JSON would give it back: what is written down can be compared with it.
    """
    fields = asdict(with_whole_paths(config))
    subject = {f"subject.{name}": value for name, value in fields.pop("subject").items()}
    return subject | fields | {"others": []}  # as studies of earlier versions wrote it down


def difference(
    old: Mapping[str, Any], new: Mapping[str, Any], but: Collection[str] = ()
) -> str | None:
    """The first field that differs, as "whose steps is 4, and not 8"; None where none does.

    Fields in ``but`` may differ.
    """
    for name in {**new, **old}:
        one, other = old.get(name), new.get(name)
        if name not in but and one != other:
            return f"whose {name} is {_said(one)}, and not {_said(other)}"
    return None


def _said(value: Any) -> str:
    return "left out" if value is None else repr(value)


def named(config: TrainConfig) -> str:
    """What a config is of, for a sentence: "patch_dog on toybox"."""
    return f"{config.subject.name} on {config.base}"
