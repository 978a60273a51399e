"""Damage bytes, JSON, TOML, safetensors headers and folders, each by a seeded generator."""

import json
import os
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import tomli_w

#: What a reader does not expect in place of a value.
VALUES: tuple[Any, ...] = (
    None, True, False, [], {}, "", 0, -1, 10**30, -(10**30), 1e308, float("nan"), float("inf"),
    0.5, "x" * 3000, "../../x", "/etc/passwd", "\x1b[31m\x00\n\r\x07", "\ud800", "\u202e", ["a"],
    {"a": 1}, [[]], "null", "1", "NaN", "trust_remote_code", [1, 2], "000006 (1)",
)  # fmt: skip
#: Names of files that users, systems and drives leave behind.
FOREIGN = (
    "000009 (1)", "000008", "1e3", "-1", "９", "stray.png", ".DS_Store", "desktop.ini", "Icon\r",
    "a\x1b[31mb\n.json", "Thumbs.db", ".x.partial", ".x.old", "config (1).toml", "evil.py",
)  # fmt: skip


def damage_bytes(data: bytes, rng: Random, other: bytes = b"") -> bytes:
    """Return bytes with one to four kinds of damage; parts of ``other`` may be spliced in."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        data = rng.choice(_BYTES)(data, rng, other or data)
    return data


def _span(data: bytes, rng: Random) -> tuple[int, int]:
    start = rng.randrange(len(data) + 1)
    return start, min(len(data), start + 2 ** rng.randrange(12))


def _flip(data: bytes, rng: Random, other: bytes) -> bytes:
    changed = bytearray(data)
    # Headers decide more than pixels and weights do: half of all flips hit the first bytes.
    end = len(data) if rng.random() < 0.5 else min(len(data), 128)
    for _ in range(rng.choice((1, 1, 3, 20)) if end else 0):
        changed[rng.randrange(end)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _cut(data: bytes, rng: Random, other: bytes) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def _zero(data: bytes, rng: Random, other: bytes) -> bytes:
    start, end = _span(data, rng)
    return data[:start] + bytes(end - start) + data[end:]


def _splice(data: bytes, rng: Random, other: bytes) -> bytes:
    (start, end), (first, last) = _span(data, rng), _span(other, rng)
    return data[:start] + other[first:last] + data[end:]


def _double(data: bytes, rng: Random, other: bytes) -> bytes:
    start, end = _span(data, rng)
    return data[:end] + data[start:end] * rng.choice((1, 1, 50)) + data[end:]


def _number(data: bytes, rng: Random, other: bytes) -> bytes:
    size, start = rng.choice((1, 2, 4, 8)), rng.randrange(min(len(data), 400) + 1)
    value = rng.choice((b"\xff", b"\x7f", b"\x00", b"\x80")) * size
    return data[:start] + value + data[start + size :]


def _random(data: bytes, rng: Random, other: bytes) -> bytes:
    start, end = _span(data, rng)
    return data[:start] + rng.randbytes(end - start) + data[end:]


_BYTES: tuple[Callable[[bytes, Random, bytes], bytes], ...] = (
    _flip, _flip, _cut, _zero, _splice, _double, _number, _random,
)  # fmt: skip


def damage_tree(value: Any, rng: Random) -> Any:
    """Return a JSON value with a value, a key or an entry replaced, dropped, added or renamed."""
    children = list(value) if isinstance(value, dict) else []
    children = list(range(len(value))) if isinstance(value, list) else children
    if not children or rng.random() < 0.2:
        return rng.choice(VALUES)
    key, changed = rng.choice(children), value.copy()
    match rng.randrange(5):
        case 0:
            del changed[key]
        case 1 if isinstance(value, dict):
            changed[str(rng.choice(VALUES))[:200]] = changed.pop(key)
        case 2 if isinstance(value, dict):
            changed[str(rng.choice(VALUES))[:200]] = rng.choice(VALUES)
        case _:
            changed[key] = damage_tree(value[key], rng)
    return changed


def damage_json(text: bytes, rng: Random) -> bytes:
    """Damage a JSON text's values, its nesting, its encoding or its bytes."""
    match rng.randrange(8):
        case 0:
            return rng.choice((b"[", b'{"a":', b'{"w":[')) * 100_000
        case 1:
            return rng.choice((b"\xef\xbb\xbf", b"\xff\xfe", b"\x00\x00")) + text
        case 2 | 3:
            return damage_bytes(text, rng)
    try:
        return json.dumps(damage_tree(json.loads(text), rng)).encode()
    except ValueError:
        return damage_bytes(text, rng)


def damage_lines(text: bytes, rng: Random) -> bytes:
    """Damage a JSON-lines text: a row's values, or rows dropped, doubled, moved or blank."""
    lines = text.splitlines(keepends=True)
    if not lines or rng.random() < 0.2:
        return damage_bytes(text, rng)
    at = rng.randrange(len(lines))
    row = lines.pop(at)
    changed = {
        0: [],
        1: [row, row],
        2: [row, b"\n"],
        3: [b"\x00" * len(row) + b"\n"],
        4: [row.rstrip(b"\n")],
        5: [rng.choice((b"{}\n", b"[]\n", b"null\n", b'{"step": "x"}\n', b"{\n"))],
    }.get(rng.randrange(9), [damage_json(row.rstrip(b"\n"), rng) + b"\n"])
    return b"".join(lines[:at] + changed + lines[at:])


def damage_toml(text: bytes, rng: Random) -> bytes:
    """Damage a TOML text's values, its nesting, its encoding or its bytes."""
    match rng.randrange(8):
        case 0:
            return text + b"deep = " + b"[" * 100_000
        case 1:
            return rng.choice((b"\xef\xbb\xbf", b"\xff\xfe")) + text
        case 2:
            return text + rng.choice(text.splitlines(keepends=True) or [b"\n"])
        case 3:
            return damage_bytes(text, rng)
    try:
        return tomli_w.dumps(damage_tree(tomllib.loads(text.decode()), rng)).encode()
    except (ValueError, TypeError, AttributeError):
        return damage_bytes(text, rng)


def damage_safetensors(data: bytes, rng: Random) -> bytes:
    """Damage a safetensors file's header by its JSON, or the whole by its bytes."""
    size = int.from_bytes(data[:8], "little")
    if rng.random() < 0.5 or size > len(data):
        return damage_bytes(data, rng)
    header = damage_json(data[8 : 8 + size], rng)
    said = len(header) if rng.random() < 0.8 else rng.choice((0, 1, 2**31, 2**63))
    return said.to_bytes(8, "little") + header + data[8 + size :]


_BY_SUFFIX: dict[str, Callable[[bytes, Random], bytes]] = {
    ".json": damage_json,
    ".jsonl": damage_lines,
    ".toml": damage_toml,
    ".safetensors": damage_safetensors,
    ".backup": damage_bytes,
}


def damage_folder(folder: Path, rng: Random, pattern: str = "**/*") -> Path:
    """Damage one of the folder's files that match a pattern, and return its path.

    It is changed, emptied, deleted, swapped with another, doubled, or made a folder or a link; or
    a foreign file appears beside it. Links lead nowhere, to themselves or to another of the files.
    """
    files = sorted(path for path in folder.glob(pattern) if path.is_file())
    file, other = rng.choice(files), rng.choice(files)
    match rng.randrange(16):
        case 0:
            file.write_bytes(b"")
        case 1:
            file.unlink()
        case 2:
            file.unlink()
            file.mkdir()
        case 3:
            file.unlink()
            file.symlink_to(rng.choice((file.name, "nowhere", os.path.abspath(other))))
        case 4 | 5:
            data = file.read_bytes()
            file.write_bytes(other.read_bytes())
            other.write_bytes(data)
        case 6:
            shutil.copy(file, file.with_name(f"{file.stem} (1){file.suffix}"))
        case 7:
            _add_foreign(file.parent, rng)
        case 8:
            shutil.rmtree(file.parent) if file.parent != folder else file.unlink()
        case _:
            damage = _BY_SUFFIX.get(file.suffix or file.name, damage_bytes)
            file.write_bytes(damage(file.read_bytes(), rng))
    return file


def _add_foreign(folder: Path, rng: Random) -> None:
    path = folder / rng.choice(FOREIGN)
    if rng.random() < 0.5:
        path.mkdir(exist_ok=True)
    else:
        path.write_bytes(rng.randbytes(rng.choice((0, 10, 1000))))
