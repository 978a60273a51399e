"""Write an evaluation's scores as CSV, and their means as Markdown beside the paper's."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from dreambooth_lib.core.errors import one_line
from dreambooth_lib.core.files import replace_file
from dreambooth_lib.core.user_text import markdown as markdown_text
from dreambooth_lib.data.images import DataError
from dreambooth_lib.evaluation.scores import Mean, Row
from dreambooth_lib.figures.labels import EXPLAINED, heading

#: Table 1 of arXiv 2208.12242, on 30 subjects: DINO, CLIP-I, CLIP-T.
PUBLISHED: dict[str, tuple[float, float, float | None]] = {
    "real images": (0.774, 0.885, None),
    "DreamBooth (Imagen)": (0.696, 0.812, 0.306),
    "DreamBooth (Stable Diffusion)": (0.668, 0.803, 0.305),
    "Textual Inversion (Stable Diffusion)": (0.569, 0.780, 0.255),
}


def write_csv(rows: Iterable[Row], path: str | Path) -> None:
    """Write every row, one column per field; a cell is empty where a row covers all of them."""
    text = to_csv([asdict(row) for row in rows], [f.name for f in fields(Row)])
    replace_file(path, text.encode())


def to_csv(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> str:
    """Return rows as CSV; ``columns`` default to the first row's."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns or list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def read_csv(path: str | Path) -> list[Row]:
    """Read back what :func:`write_csv` wrote. Raises :class:`DataError` for anything else."""
    rows: list[Row] = []
    try:
        with Path(path).open(newline="", encoding="utf-8") as file:
            for line in csv.DictReader(file, strict=True):
                prompt, seed = line.pop("prompt") or None, line.pop("seed")
                value = float(line.pop("value"))
                row = Row(**line, prompt=prompt, seed=int(seed) if seed else None, value=value)
                rows.append(row)
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise DataError(
            f"{path} has no scores after its row {len(rows)} ({one_line(error)}); score again."
        ) from error
    return rows


def markdown(means: Sequence[Mean], published: bool = False) -> str:
    """Return a table with a row per method and a column per measure and encoder.

    Intervals over seeds are in brackets. Measures have plain names, with an arrow in the direction
    that is better, and the order of :data:`labels.EXPLAINED`; a measure of your own keeps its name
    and comes last. ``published`` adds the paper's rows below: they
    are by DINO ViT-S/16 and a CLIP that the paper does not name, on 30 subjects, so compare them
    only with the same encoders on those.
    """
    found = dict.fromkeys((mean.measure, mean.encoder) for mean in means)
    columns = sorted(found, key=lambda column: _place(column[0]))
    heads = [
        "",
        *(markdown_text(f"{heading(measure)} ({encoder})") for measure, encoder in columns),
    ]
    rows = {mean.method: [markdown_text(mean.method), *[""] * len(columns)] for mean in means}
    for mean in means:
        place = 1 + columns.index((mean.measure, mean.encoder))
        interval = f" [{mean.low:.3f}, {mean.high:.3f}]" if mean.over_seeds else ""
        rows[mean.method][place] = f"{mean.value:.3f}{interval}"
    text = table(heads, rows.values())
    if published:
        heads = ["arXiv 2208.12242, Table 1", "DINO", "CLIP-I", "CLIP-T"]
        shown = {
            name: ["" if v is None else f"{v:.3f}" for v in values]
            for name, values in PUBLISHED.items()
        }
        text += "\n" + table(heads, [[name, *values] for name, values in shown.items()])
    return text


def explain(means: Sequence[Mean]) -> str:
    """Return a list in Markdown that explains each measure of a table in a sentence."""
    measures = sorted({mean.measure for mean in means} & EXPLAINED.keys(), key=_place)
    return "".join(f"- *{heading(measure)}*: {EXPLAINED[measure]}.\n" for measure in measures)


def _place(measure: str) -> int:
    order = list(EXPLAINED)
    return order.index(measure) if measure in EXPLAINED else len(order)


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
