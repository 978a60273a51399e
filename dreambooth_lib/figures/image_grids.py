"""Lay images out on a page: a grid, best and worst, or a matrix of a sweep."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from dreambooth_lib.core.errors import InputError, printable
from dreambooth_lib.core.files import open_image

# All in pixels.
_ENLARGE_TO = 128  # smaller images grow by the largest integer factor that stays within
_REDUCE_TO = 160  # larger ones shrink to it
MARGIN = 32  # around a page, and between its parts
_GAP = 8  # between images
_MANY = 6  # images in a matrix's cell, from which they come in two rows
_SHOWN_WIDTH = 800  # of a notebook's or a site's column, about
TITLE, HEADING, TEXT, LABEL = 26, 18, 16, 13  # font sizes

Images = Sequence[Image.Image]


def grid(images: list[Image.Image], columns: int, labels: list[str] | None = None) -> Image.Image:
    """Lay images out row by row on white, with an optional label under each.

    All cells have one size: images below 128 pixels are enlarged by an integer factor, those above
    160 reduced, and none is cropped. Fewer images than ``columns`` make a narrower grid. Raises
    ``InputError`` for no images, fewer than one column, or another number of labels.
    """
    check(images, "images")
    if columns < 1:
        raise InputError(f"columns is {columns}; it must be 1 or more.")
    if labels is not None and len(labels) != len(images):
        raise InputError(f"there are {len(labels)} labels for {len(images)} images; give one each.")
    columns, layout = min(columns, len(images)), Layout(images)
    bottom = layout.images(_GAP, _GAP, images, columns, labels or [])
    return layout.render(layout.across(columns) + 2 * _GAP, bottom + _GAP)


def extremes(
    scored: Sequence[tuple[float, str, Image.Image | Path]], columns: int = 4
) -> Image.Image:
    """Lay out the best, the middle and the worst images, a row each, with scores and labels.

    ``scored`` rows are (score, label, image or its file). Where there are too few for three full
    rows, each row has a third of them. Raises ``InputError`` for fewer than three images.
    """
    if len(scored) < 3:
        raise InputError(f"there are {len(scored)} scored images; give three or more.")
    ordered = sorted(scored, key=lambda row: -row[0])
    columns = min(columns, len(ordered) // 3)
    middle = (len(ordered) - columns) // 2
    rows = [*ordered[:columns], *ordered[middle : middle + columns], *ordered[-columns:]]
    kinds = [kind for kind in ("best", "middle", "worst") for _ in range(columns)]
    pairs = zip(kinds, rows, strict=True)
    labels = [f"{kind}: {score:.3f} {label}" for kind, (score, label, _) in pairs]
    # Of thousands of files, only those that are shown fit into memory.
    images = [open_image(one) if isinstance(one, Path) else one for *_, one in rows]
    return grid(images, columns, labels)


def matrix(
    rows: Sequence[str],
    columns: Sequence[str],
    cells: Sequence[Sequence[Images]],
    title: str = "",
) -> Image.Image:
    """Lay out a matrix: ``cells[row][column]`` are images side by side, the same seeds in each.

    A cell of more than six images has two rows of them at half the size. ``rows`` and ``columns``
    are labels. Raises ``InputError`` where a row has another number
    of cells than there are columns, or a cell has no image.
    """
    for number, row in enumerate(cells):
        if len(row) != len(columns):
            raise InputError(f"row {number} has {len(row)} cells for {len(columns)} columns.")
        for images in row:
            check(images, f"a cell of row {number}")
    layout = Layout([image for row in cells for images in row for image in images])
    across = [layout.across_cell(max(map(len, column))) for column in zip(*cells, strict=True)]
    # A wide page is shown reduced, and its labels must be legible then.
    larger = max(1.0, sum(across) / _SHOWN_WIDTH)
    title_size, size = round(TITLE * larger), round(TEXT * larger)
    x = MARGIN + max(_width(label, size) for label in rows) + 2 * _GAP
    y = MARGIN + (line_height(title_size) + _GAP if title else 0)
    layout.text(MARGIN, MARGIN, title, title_size, bold=True)
    starts = []
    for label, width in zip(columns, across, strict=True):
        layout.text(x, y, label, size)
        starts.append(x)
        x += max(width, _width(label, size)) + MARGIN
    y += line_height(size) + _GAP
    for label, row in zip(rows, cells, strict=True):
        layout.text(MARGIN, y + layout.side / 2, label, size, anchor="lm")
        for start, images in zip(starts, row, strict=True):
            layout.cell(start, y, images)
        y += layout.side + 2 * _GAP
    return layout.render(x, y + MARGIN)


class Layout:
    """Texts, rules and images at their places, drawn once the page's size is known.

    The ``images`` decide how large its cells are.
    """

    def __init__(self, images: Images) -> None:
        longest = max(max(image.size) for image in images)
        enlarged = longest * max(1, _ENLARGE_TO // longest)
        self.side = _REDUCE_TO if longest > _REDUCE_TO else enlarged
        self._parts: list[Callable[[Image.Image, ImageDraw.ImageDraw], None]] = []

    def across(self, count: int) -> int:
        """Return the width of ``count`` cells side by side."""
        return count * (self.side + _GAP) - _GAP

    def across_cell(self, count: int) -> int:
        """Return the width of a matrix's cell of ``count`` images."""
        half = (self.side - _GAP) // 2 + _GAP
        return self.across(count) if count <= _MANY else -(-count // 2) * half - _GAP

    def cell(self, x: int, y: int, images: Images) -> None:
        """Place the images of a matrix's cell: side by side, or many in two rows of half size."""
        if len(images) <= _MANY:
            self.images(x, y, images, len(images))
            return
        half, columns = (self.side - _GAP) // 2, -(-len(images) // 2)
        for index, image in enumerate(images):
            row, column = divmod(index, columns)
            self._image(x + column * (half + _GAP), y + row * (half + _GAP), image, half)

    def text(
        self, x: float, y: float, text: str, size: int, bold: bool = False, **options: Any
    ) -> None:
        font, text = _font(size, bold), "\n".join(map(printable, text.split("\n")))
        self._parts.append(lambda _, draw: draw.text((x, y), text, "#1a1a1a", font, **options))

    def rule(self, x: int, y: int, width: int) -> None:
        self._parts.append(lambda _, draw: draw.line((x, y, x + width - 1, y), "#d0d0d0"))

    def images(
        self, x: int, y: int, images: Images, columns: int, labels: Sequence[str] = ()
    ) -> int:
        """Place images row by row, each over its label; return where the last row ends."""
        texts = ["\n".join(wrap(label, LABEL, self.side)) for label in labels]
        below = max((text.count("\n") + 1 for text in texts), default=0) * line_height(LABEL)
        height = self.side + below + _GAP
        for index, image in enumerate(images):
            row, column = divmod(index, columns)
            left, top = x + column * (self.side + _GAP), y + row * height
            self._image(left, top, image)
            if texts:
                place = (left + self.side / 2, top + self.side + 2)
                self.text(*place, texts[index], LABEL, anchor="ma", align="center")
        return y + -(-len(images) // columns) * height - _GAP

    def _image(self, x: int, y: int, image: Image.Image, side: int | None = None) -> None:
        """Place an uncropped image in the middle of its cell, of ``side`` pixels."""
        side = side or self.side
        factor = side / max(image.size)
        factor = int(factor) if factor >= 1 else factor
        width, height = (max(1, round(length * factor)) for length in image.size)
        resized = image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
        place = (x + (side - width) // 2, y + (side - height) // 2)
        self._parts.append(lambda sheet, _: sheet.paste(resized, place))

    def render(self, width: int, height: int) -> Image.Image:
        sheet = Image.new("RGB", (width, height), "white")
        for part in self._parts:
            part(sheet, ImageDraw.Draw(sheet))
        return sheet


def _font(size: int, bold: bool = False) -> Any:
    """Load the DejaVu Sans that comes with matplotlib, since a machine may have no fonts at all."""
    import matplotlib

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts/ttf", name), size)


def wrap(text: str, size: int, width: float, bold: bool = False) -> list[str]:
    """Break a text into lines of at most ``width`` pixels; a longer word is cut short."""
    font, lines = _font(size, bold), [""]
    for word in printable(text).split():
        while len(word) > 1 and font.getlength(word) > width:
            word = word[:-2] + "…"
        if lines[-1] and font.getlength(f"{lines[-1]} {word}") > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".lstrip()
    return lines


def line_height(size: int) -> int:
    return round(size * 1.4)


def _width(label: str, size: int) -> int:
    font = _font(size)
    return round(max(font.getlength(printable(line)) for line in label.split("\n")))


def check(images: Sequence[Any], name: str) -> None:
    """Raise ``InputError`` for no images, or for an element that is not a PIL image."""
    if not images:
        raise InputError(f"{name} has no images; give one or more.")
    for index, image in enumerate(images):
        if not isinstance(image, Image.Image):
            raise InputError(f"{name}[{index}] is {image!r}; give a PIL image instead.")
