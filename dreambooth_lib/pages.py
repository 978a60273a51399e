"""Pages of pictures to judge a run by eye: contact sheet, grid, best and worst, a matrix."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

# All in pixels.
_ENLARGE_TO = 128  # smaller pictures grow by the largest whole factor that stays within
_REDUCE_TO = 160  # larger ones shrink to it
_MARGIN = 32  # around a page, and between its parts
_MIDDLE = 48  # between the base's half and the tuned model's
_GAP = 8  # between pictures
_TITLE, _HEADING, _TEXT, _LABEL = 26, 18, 16, 13  # font sizes

_INK, _RULE = "#1a1a1a", "#d0d0d0"


def contact_sheet(
    path: str | Path | None,
    *,
    title: str,
    reference: list[Image.Image],
    rows: list[tuple[str, list[Image.Image], list[Image.Image]]],
    class_before: list[Image.Image],
    class_after: list[Image.Image],
    class_prompt: str = "",
) -> Image.Image:
    """One page: the subject, then base beside tuned for every prompt, then the class.

    Each row is ``(prompt, base pictures, tuned pictures)`` with one seed a column; all rows have
    equally many pictures. ``class_before`` and ``class_after`` pair up in the same way and may
    both be empty. Cells have one size: pictures below 128 pixels are enlarged by a whole factor,
    above 160 reduced, and none is cropped. With a ``path`` the RGB page is also written there as a
    PNG, whole or not at all. Raises ``ValueError`` for missing pictures and unequal counts.
    """
    _check(reference, "reference")
    _check_rows(rows, "rows", ("base", "tuned"))
    if class_before or class_after:
        _check_rows([("", class_before, class_after)], "class", ("before", "after"))
    generated = [p for _, base, tuned in rows for p in (*base, *tuned)]
    page = _Page(len(rows[0][1]), _cell_side(generated + class_before + class_after))

    page.text(title, _TITLE, bold=True)
    page.text("reference pictures", _HEADING, bold=True, above=16)
    page.pictures(2 * page.columns, reference)
    page.halves("base", "tuned")
    for index, (prompt, base, tuned) in enumerate(rows):
        page.text(prompt, _TEXT, above=20 if index else 0)
        page.pictures(page.columns, base, tuned)
    if class_before:
        caption = f"class pictures: {class_prompt}".removesuffix(": ")
        page.text(caption, _HEADING, bold=True, above=_MARGIN)
        page.halves("before", "after", above=4)
        page.pictures(page.columns, class_before, class_after)
    page.text("Pictures in the same place left and right have the same seed.", _LABEL, above=16)
    sheet = page.render()
    if path is not None:
        from dreambooth_lib.state import save_png

        save_png(sheet, path)
    return sheet


def grid(pictures: list[Image.Image], columns: int, labels: list[str] | None = None) -> Image.Image:
    """Pictures row by row on a white RGB picture, with an optional label under each.

    Cells are sized as in :func:`contact_sheet`; fewer pictures than ``columns`` make a narrower
    grid. Raises ``ValueError`` for no pictures, fewer than one column, or another number of labels.
    """
    _check(pictures, "pictures")
    if columns < 1:
        raise ValueError(f"columns is {columns}; it must be 1 or more.")
    if labels is not None and len(labels) != len(pictures):
        raise ValueError(f"labels has {len(labels)} for {len(pictures)} pictures; give one each.")
    columns, side = min(columns, len(pictures)), _cell_side(pictures)
    font = _font(_LABEL)
    texts = ["\n".join(_wrap(label, font, side)) for label in labels or []]
    below = max((text.count("\n") + 1 for text in texts), default=0) * _line(_LABEL)
    wide, high = side + _GAP, side + below + _GAP
    size = (columns * wide + _GAP, -(-len(pictures) // columns) * high + _GAP)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for index, picture in enumerate(pictures):
        x, y = _GAP + index % columns * wide, _GAP + index // columns * high
        _paste(sheet, picture, x, y, side)
        if texts:
            place = (x + side / 2, y + side + 2)
            draw.text(place, texts[index], _INK, font, anchor="ma", align="center")
    return sheet


def extremes(scored: Sequence[tuple[float, str, Image.Image]], columns: int = 4) -> Image.Image:
    """The best, the middle and the worst pictures, a row each: their scores and labels below.

    ``scored`` rows are (score, label, picture); with fewer than three rows' worth each row has a
    third of them. Raises ``ValueError`` for fewer than three pictures.
    """
    if len(scored) < 3:
        raise ValueError(f"there are {len(scored)} scored pictures; give three or more.")
    ordered = sorted(scored, key=lambda row: -row[0])
    columns = min(columns, len(ordered) // 3)
    middle = (len(ordered) - columns) // 2
    rows = [*ordered[:columns], *ordered[middle : middle + columns], *ordered[-columns:]]
    labels = [f"{score:.3f} {label}" for score, label, _ in rows]
    return grid([picture for *_, picture in rows], columns, labels)


def matrix(
    rows: Sequence[str],
    columns: Sequence[str],
    cells: Sequence[Sequence[Sequence[Image.Image]]],
    title: str = "",
) -> Image.Image:
    """A study's page: ``cells[row][column]`` are pictures side by side, the same seeds in each.

    ``rows`` and ``columns`` are their labels. Raises ``ValueError`` where a row has another number
    of cells than there are columns, or a cell has no picture.
    """
    for number, row in enumerate(cells):
        if len(row) != len(columns):
            raise ValueError(f"row {number} has {len(row)} cells for {len(columns)} columns.")
        for pictures in row:
            _check(pictures, f"a cell of row {number}")
    every = [picture for row in cells for pictures in row for picture in pictures]
    side = _cell_side(every)
    font = _font(_TEXT)
    most = [max(map(len, column)) for column in zip(*cells, strict=True)]
    wide = [max(count * (side + _GAP) - _GAP, round(font.getlength(label)))
            for count, label in zip(most, columns, strict=True)]  # fmt: skip
    left = _MARGIN + round(max(font.getlength(label) for label in rows)) + 2 * _GAP
    top = _MARGIN + (_line(_TITLE) + _GAP if title else 0)
    starts = [left + sum(wide[:number]) + number * _MARGIN for number in range(len(wide))]
    size = (starts[-1] + wide[-1] + _MARGIN, top + _line(_TEXT) + _GAP
            + len(rows) * (side + 2 * _GAP) + _MARGIN)  # fmt: skip
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((_MARGIN, _MARGIN), title, _INK, _font(_TITLE, bold=True))
    for start, label in zip(starts, columns, strict=True):
        draw.text((start, top), label, _INK, font)
    for number, (label, row) in enumerate(zip(rows, cells, strict=True)):
        y = top + _line(_TEXT) + _GAP + number * (side + 2 * _GAP)
        draw.text((_MARGIN, y + side / 2), label, _INK, font, anchor="lm")
        for start, pictures in zip(starts, row, strict=True):
            for place, picture in enumerate(pictures):
                _paste(sheet, picture, start + place * (side + _GAP), y, side)
    return sheet


class _Page:
    """Collects texts and pictures downwards from ``y``; draws them once the height is known."""

    def __init__(self, columns: int, side: int) -> None:
        self.columns, self.side, self.y = columns, side, _MARGIN
        self.half = columns * (side + _GAP) - _GAP
        self.left, self.right = _MARGIN, _MARGIN + self.half + _MIDDLE
        self.width = self.right + self.half + _MARGIN
        self._drawings: list[tuple[Any, ...]] = []  # a method of ImageDraw, its arguments
        self._pictures: list[tuple[Image.Image, int, int]] = []

    def text(self, text: str, size: int, *, bold: bool = False, above: int = 0) -> None:
        font = _font(size, bold)
        self.y += above
        for line in _wrap(text, font, self.width - 2 * _MARGIN):
            self._drawings.append(("text", (self.left, self.y), line, _INK, font))
            self.y += _line(size)
        self.y += 4

    def halves(self, left: str, right: str, above: int = _MARGIN) -> None:
        """The two halves' headers, each over a rule."""
        self.y += above
        for x, name in ((self.left, left), (self.right, right)):
            font, low = _font(_HEADING, bold=True), self.y + _line(_HEADING)
            self._drawings.append(("text", (x, self.y), name, _INK, font))
            self._drawings.append(("line", (x, low, x + self.half - 1, low), _RULE))
        self.y += _line(_HEADING) + 14

    def pictures(self, columns: int, *halves: list[Image.Image]) -> None:
        for x, half in zip((self.left, self.right), halves, strict=False):
            for index, picture in enumerate(half):
                row, column = divmod(index, columns)
                place = (x + column * (self.side + _GAP), self.y + row * (self.side + _GAP))
                self._pictures.append((picture, *place))
        self.y += -(-len(halves[0]) // columns) * (self.side + _GAP) - _GAP

    def render(self) -> Image.Image:
        sheet = Image.new("RGB", (self.width, self.y + _MARGIN), "white")
        draw = ImageDraw.Draw(sheet)
        for method, *arguments in self._drawings:
            getattr(draw, method)(*arguments)
        for picture, x, y in self._pictures:
            _paste(sheet, picture, x, y, self.side)
        return sheet


def _cell_side(pictures: list[Image.Image]) -> int:
    longest = max(max(picture.size) for picture in pictures)
    return _REDUCE_TO if longest > _REDUCE_TO else longest * max(1, _ENLARGE_TO // longest)


def _paste(sheet: Image.Image, picture: Image.Image, x: int, y: int, side: int) -> None:
    """Put a whole picture in the middle of the cell of ``side`` pixels at ``x, y``."""
    factor = side / max(picture.size)
    factor = int(factor) if factor >= 1 else factor
    size = [max(1, round(length * factor)) for length in picture.size]
    resized = picture.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    sheet.paste(resized, (x + (side - size[0]) // 2, y + (side - size[1]) // 2))


def _font(size: int, bold: bool = False) -> Any:
    """Matplotlib's own DejaVu Sans, since a machine may have no fonts at all."""
    import matplotlib

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts/ttf", name), size)


def _wrap(text: str, font: Any, width: float) -> list[str]:
    lines = [""]
    for word in text.split():
        while len(word) > 1 and font.getlength(word) > width:
            word = word[:-2] + "…"
        if lines[-1] and font.getlength(f"{lines[-1]} {word}") > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".lstrip()
    return lines


def _line(size: int) -> int:
    return round(size * 1.4)


def _check(pictures: Sequence[Any], name: str) -> None:
    if not pictures:
        raise ValueError(f"{name} has no pictures; give one or more.")
    for index, picture in enumerate(pictures):
        if not isinstance(picture, Image.Image):
            raise ValueError(f"{name}[{index}] is {picture!r}; give a PIL picture in its place.")


def _check_rows(rows: list[Any], place: str, names: tuple[str, str]) -> None:
    """All halves of all rows have equally many pictures, and one or more."""
    if not rows:
        raise ValueError("rows is empty; give a prompt with its base and tuned pictures.")
    for index, (_, *halves) in enumerate(rows):
        for name, pictures in zip(names, halves, strict=True):
            _check(pictures, f"{place}[{index}] {name}")
            if len(pictures) != len(rows[0][1]):
                raise ValueError(
                    f"{place}[{index}] {name} has {len(pictures)} pictures and {place}[0] "
                    f"{names[0]} {len(rows[0][1])}; give the same seeds everywhere."
                )
