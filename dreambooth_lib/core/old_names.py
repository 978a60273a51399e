"""Read what earlier versions wrote under names that have changed since.

A folder keeps the names that it began with; whatever is new gets the current ones.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

#: Fields of configs, plans, protocols and tables: what they were called, and are called now.
FIELDS = {
    "class_pictures": "class_images",
    "watch_every": "validate_every",
    "judge": "scorer",
    "standing": "score",
}
#: The same of a subject's fields, and of an evaluation's protocol.
SUBJECT_FIELDS = {"pictures": "photos"}
PROTOCOL_FIELDS = {"pictures": "images_per_prompt"}
#: Files and folders: what they are called now, and were called.
PLACES = {
    "validation": "watch",
    "validation.jsonl": "watch.jsonl",
    "plan.json": "view.json",
    "class_images": "class_pictures",
}


def old_names(fields: Mapping[str, Any]) -> dict[str, str]:
    """Return the old names among a config's fields, and what they are called now."""
    subject = fields.get("subject")
    of_subject = SUBJECT_FIELDS.keys() & subject.keys() if isinstance(subject, Mapping) else ()
    return {name: now for name, now in FIELDS.items() if name in fields} | {
        f"subject.{name}": f"subject.{SUBJECT_FIELDS[name]}" for name in of_subject
    }


def current_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return fields under their current names, a subject's too: nested, or as "subject.photos"."""
    flat = {f"subject.{old}": f"subject.{now}" for old, now in SUBJECT_FIELDS.items()}
    current = {(FIELDS | flat).get(name, name): value for name, value in fields.items()}
    if isinstance(subject := current.get("subject"), Mapping):
        current["subject"] = {SUBJECT_FIELDS.get(k, k): value for k, value in subject.items()}
    return current


def current_protocol(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return a protocol's fields under their current names."""
    return {PROTOCOL_FIELDS.get(k, k): value for k, value in current_fields(fields).items()}


def locate(folder: str | Path, name: str) -> Path:
    """Return the path of ``name`` in a folder: the old name's if an earlier version made it."""
    old = Path(folder) / PLACES.get(name, name)
    return old if old.exists() else Path(folder) / name
