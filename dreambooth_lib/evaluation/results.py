"""Keep results as data that others can add to: one JSON file a run, and a table of them.

FOLDER/<name>.json    one run's or evaluation's config, versions, device, seeds, scores and cost
FOLDER/README.md      a table of them all, made from those files

A result names no place on a machine: of a path the last part is kept. Scores stand with the name of
their encoder or judge, and the table has a section for each base and each of those: scores of two
encoders are not to be compared.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import quote

from dreambooth_lib.core.errors import KitError
from dreambooth_lib.core.files import replace_file
from dreambooth_lib.core.user_text import TOKEN, markdown
from dreambooth_lib.evaluation.scores import REAL
from dreambooth_lib.evaluation.tables import table
from dreambooth_lib.figures.labels import heading

#: Methods that have no step and cost nothing, and what the table calls them.
UNTRAINED = {"base": "the base", REAL: "the photos"}
FORMAT = 1  #: of the files, to change with the schema
MOST_BYTES = 2**18  #: of a file; others are refused unread
_MOST_CHARACTERS = 300  # of a text
_MOST_ITEMS = 1000  # of a list
#: What a file has. A type, a list of what its items are, or a dict of what its fields are; the
#: field "" stands for any name.
_SCALAR = (str, int, float, bool, type(None))
_NUMBER = (int, float)
SCHEMA: dict[str, Any] = {
    "format": int,
    "title": str,
    "date": str,  #: of the end of training: "2026-11-27"
    "benchmark": str,  #: the subject's name, or the data set's
    "subjects": [str],
    "step": int,  #: the training step that was scored; where those of runs differ, the largest
    "config": {"": (*_SCALAR, list)},  #: fields of TrainConfig, without the subject and places
    "versions": {"": str},
    "device": str,
    "seeds": {"training": [int], "images": [int]},
    "scores": [
        {
            "method": str,
            "encoder": str,
            "measure": str,
            "value": _NUMBER,
            "low": (*_NUMBER, type(None)),  #: of the 95% interval, where there is one
            "high": (*_NUMBER, type(None)),
            "count": int,  #: of the values that it is the mean of
        }
    ],
    #: Of one run, on average: training steps with their validations; what it needed; its weights.
    "cost": {"seconds": _NUMBER, "peak_memory_mb": _NUMBER, "weights_mb": _NUMBER},
}
_PLACE = re.compile(r"(^|[\s\"'=(])(/|~/|\\\\|[A-Za-z]:[\\/])[^\s/]|file://")


class ResultError(KitError, ValueError):
    """A file that is not a result, or a run that cannot be one."""


def check(result: Any) -> None:
    """Raise :class:`ResultError` unless a value is a result as :data:`SCHEMA` says."""
    _check(result, SCHEMA, "")
    if result["format"] != FORMAT:
        raise ResultError(f"format is {result['format']}, not {FORMAT}; use the kit that wrote it.")
    if not re.fullmatch(r"\d{4}-\d\d-\d\d", result["date"]):
        raise ResultError(f"date is {result['date']!r}; write it as 2026-11-27.")
    for name in ("base", "method"):
        if not isinstance(result["config"].get(name), str):
            raise ResultError(f"config.{name} is missing; give the run's.")


def _check(value: Any, shape: Any, where: str) -> None:
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            raise ResultError(f"{where or 'the file'} is not a JSON object; make it one.")
        for name in shape.keys() - value.keys() - {""}:
            raise ResultError(f"{_join(where, name)} is missing; add it.")
        if len(value) > _MOST_ITEMS:
            raise ResultError(f"{where} has {len(value)} fields; leave out some.")
        for name, item in value.items():
            if name not in shape and "" not in shape:
                raise ResultError(
                    f"{_join(where, name)[:100]!r} is not a field of a result; remove it."
                )
            _check(name, str, f"a name in {where or 'the file'}")
            _check(item, shape.get(name, shape.get("")), _join(where, name))
        return
    types = shape if isinstance(shape, tuple) else (shape,)
    if isinstance(shape, list) or (isinstance(value, list) and list in types):
        if not isinstance(value, list) or len(value) > _MOST_ITEMS:
            raise ResultError(f"{where} is not a list of at most {_MOST_ITEMS} items; make it one.")
        for number, item in enumerate(value):
            _check(item, shape[0] if isinstance(shape, list) else _SCALAR, f"{where}[{number}]")
    else:
        _check_scalar(value, types, where)


def _check_scalar(value: Any, types: tuple[type, ...], where: str) -> None:
    if type(value) not in types:
        names = " or ".join(
            "null" if t is type(None) else t.__name__ for t in types if t is not list
        )
        raise ResultError(f"{where} is {json.dumps(value)[:60]}; it has to be of type {names}.")
    if isinstance(value, int | float) and not abs(value) < 1e15:  # a NaN is not, either
        raise ResultError(f"{where} is {json.dumps(value)[:20]}; give a number below 1e15.")
    if isinstance(value, str):
        if len(value) > _MOST_CHARACTERS or not value.isprintable():
            raise ResultError(f"{where} is longer than a line of text; shorten it.")
        if _PLACE.search(value):
            raise ResultError(
                f"{where} names a place on a machine; keep the last part of the path."
            )
        if TOKEN.search(value):
            raise ResultError(f"{where} looks like a token; remove it, and revoke it.")


def _join(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def read(file: Path) -> dict[str, Any]:
    """Read a result. Raises :class:`ResultError`, which names the file, for anything else."""
    try:
        with file.open("rb") as opened:
            data = opened.read(MOST_BYTES + 1)
    except OSError as error:
        raise ResultError(f"{file} cannot be read ({error.strerror}); check the path.") from error
    if len(data) > MOST_BYTES:
        raise ResultError(f"{file} is larger than any result; remove it.")
    try:
        result = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ResultError(
            f"{file} is not valid JSON; write it again with 'results add'."
        ) from error
    try:
        check(result)
    except ResultError as error:
        raise ResultError(f"{file}: {error}") from None
    return result


def read_all(folder: Path) -> dict[str, dict[str, Any]]:
    """Read all results of a folder by their files' names, sorted by base, then by title."""
    found = {file.name: read(file) for file in sorted(folder.glob("*.json"))}
    order = sorted(found, key=lambda n: (found[n]["config"]["base"], found[n]["title"], n))
    return {name: found[name] for name in order}


def write(result: dict[str, Any], folder: Path) -> Path:
    """Write a result to the folder, without its table; return the result's file.

    The file is named by its base, benchmark and method and a digest of the whole, so that the same
    result has one file.
    """
    check(result)
    text = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
    config = result["config"]
    words = f"{config['base']}-{result['benchmark']}-{config['method']}"
    name = re.sub(r"[^A-Za-z0-9_.]+", "-", words).strip("-.")[:80]
    file = folder / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}.json"
    replace_file(file, text.encode())
    return file


def write_table(folder: Path) -> Path:
    """Write the table of a folder's results; return its file."""
    file = folder / "README.md"
    replace_file(file, render(read_all(folder)).encode())
    return file


def render(results: dict[str, dict[str, Any]]) -> str:
    """Return results, by their files' names, as Markdown: a table for each base and encoder."""
    parts = [
        "# Results\n\nEach file in this folder holds the scores of one run or evaluation. "
        "`python -m dreambooth_lib results add RUN` adds a file, and `results table` writes this "
        "page from all of them. Compare scores only within one table, which has one base and one "
        "encoder or judge. Intervals are at 95%. Seconds count a run's training steps and "
        "validations.\n"
    ]
    bases = dict.fromkeys(result["config"]["base"] for result in results.values())
    for base in bases:
        of_base = {n: r for n, r in results.items() if r["config"]["base"] == base}
        parts.append(f"\n## Base: {markdown(base)}\n")
        for encoder in sorted({s["encoder"] for r in of_base.values() for s in r["scores"]}):
            parts.append(f"\n### Scored by {markdown(encoder)}\n\n{_table_of(of_base, encoder)}")
    return "".join(parts)


def _table_of(results: dict[str, dict[str, Any]], encoder: str) -> str:
    scores = [s for r in results.values() for s in r["scores"] if s["encoder"] == encoder]
    measures = list(dict.fromkeys(score["measure"] for score in scores))
    heads = ["result", "images of", "step", *map(heading, measures), "seconds", "peak MB",
             "weights MB", "device"]  # fmt: skip
    return table([*map(markdown, heads)], _rows(results, encoder, measures))


def _rows(
    results: dict[str, dict[str, Any]], encoder: str, measures: list[str]
) -> Iterable[list[str]]:
    for name, result in results.items():
        own = [score for score in result["scores"] if score["encoder"] == encoder]
        link = f"[{markdown(result['title'])}]({quote(name)})"  # in a result's first row
        for method in dict.fromkeys(score["method"] for score in own):
            by_measure = {s["measure"]: s for s in own if s["method"] == method}
            cells = [_cell(by_measure[m]) if m in by_measure else "" for m in measures]
            cost = [f"{result['cost'][part]:.0f}" for part in SCHEMA["cost"]]
            step = str(result["step"])
            if method in UNTRAINED:
                step, *cost = [""] * (1 + len(cost))
            images_of = markdown(UNTRAINED.get(method, method))
            yield [link, images_of, step, *cells, *cost, markdown(result["device"])]
            link = ""


def _cell(score: dict[str, Any]) -> str:
    value, *interval = [
        None if score[part] is None else f"{round(score[part], 3) + 0.0:.3f}"  # no "-0.000"
        for part in ("value", "low", "high")
    ]
    return f"{value} [{', '.join(map(str, interval))}]" if all(interval) else f"{value}"
