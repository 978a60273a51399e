"""Read and write what a backup records about itself, and whose it is.

Both files are in the backup; the identity is also in the run, so that no other run of its name
overwrites its backup.
"""

import json
import re
import uuid
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dreambooth_lib.core.files import Fingerprint, replace_file
from dreambooth_lib.training.runs import Run

STATE, IDENTITY = ".backup.json", ".backup"
#: Of this process: a run that is trained in two at a time has one identity in both.
SESSION = uuid.uuid4().hex


@dataclass
class State:
    """Record what a backup holds: whose it is, whether the run has finished, and each part's files.

    ``session`` is that of the process that last wrote parts. A file's row has its name, its size
    and time in the run, and its size in the backup.
    """

    identity: str | None = None
    session: str | None = None
    finished: bool = False
    parts: dict[str, Fingerprint] = field(default_factory=dict)


def read_state(folder: Path) -> State | None:
    """Return a backup's state; None if there is none. What is damaged in it is left out."""
    fields = _parse(_read(folder / STATE))
    if fields is None:
        return None
    parts = fields.get("parts")
    rows = parts if isinstance(parts, dict) else {}
    return State(
        identity=_whole_identity(fields.get("identity")),
        session=_whole_identity(fields.get("session")),
        finished=fields.get("finished") is True,
        parts={name: part for name, part in rows.items() if _is_part(part)},
    )


def write_state(folder: Path, state: State) -> None:
    """Write a backup's state, and whose it is, which is known even if the state is damaged."""
    if state.identity is not None and _read(folder / IDENTITY) != state.identity:
        replace_file(folder / IDENTITY, state.identity.encode())
    replace_file(folder / STATE, json.dumps(asdict(state)).encode())


def open_state(folder: Path, identity: str) -> State | None:
    """Return the state of this run's backup, a new one for an empty folder; None for another's."""
    folder.mkdir(exist_ok=True)
    state, known = read_state(folder), read_identity(folder)
    # Hidden files may remain from a first write that failed.
    if known is None and all(path.name.startswith(".") for path in folder.iterdir()):
        known = identity
    if known != identity:
        return None
    if state is None or state.identity is None:
        state = State(identity)
        write_state(folder, state)
    return state


def read_identity(folder: Path) -> str | None:
    """Return the identity in a run's or a backup's folder; None if there is none."""
    state = read_state(folder)
    return (state and state.identity) or _whole_identity(_read(folder / IDENTITY))


def own_identity(run: Run) -> str:
    """Return the run's identity; a new one is written to its folder."""
    identity = read_identity(run.folder) or uuid.uuid4().hex
    if _read(run.folder / IDENTITY) != identity:
        replace_file(run.folder / IDENTITY, identity.encode())
    return identity


def _read(file: Path) -> str | None:
    return file.read_text(errors="replace") if file.is_file() else None


def _parse(text: str | None) -> dict[str, Any] | None:
    try:
        fields = json.loads(text) if text else None
    except (ValueError, RecursionError):
        return None
    return fields if isinstance(fields, dict) else None


def _whole_identity(value: Any) -> str | None:
    return value if isinstance(value, str) and re.fullmatch("[0-9a-f]{32}", value) else None


def _is_part(rows: Any) -> bool:
    """Return whether each row has a name, a size, a time and perhaps the copy's size, or None."""

    def is_number(value: Any) -> bool:
        return isinstance(value, int) and 0 <= value < 2**63

    return isinstance(rows, list) and all(
        isinstance(row, list)
        and len(row) in (3, 4)
        and isinstance(row[0], str)
        and all(map(is_number, row[1:3]))
        and (row[3:] in ([], [None]) or is_number(row[3]))
        for row in rows
    )
