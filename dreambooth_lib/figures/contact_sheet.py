"""One page that shows what training did: the subject's photos, then base beside tuned."""

from pathlib import Path
from typing import Any

from PIL import Image

from dreambooth_lib.figures import image_grids
from dreambooth_lib.figures.image_grids import MARGIN, line_height

_MIDDLE = 48  # pixels between the base's half and the tuned model's


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
    both be empty. Cells are sized as in :func:`pages.grid`. With a ``path`` the page is also
    written there as a PNG. Raises ``ValueError`` for missing pictures and unequal counts.
    """
    image_grids.check(reference, "reference")
    if not rows:
        raise ValueError("rows is empty; give a prompt with its base and tuned pictures.")
    _check_rows(rows, "rows", ("base", "tuned"))
    if class_before or class_after:
        _check_rows([("", class_before, class_after)], "class", ("before", "after"))
    generated = [p for _, base, tuned in rows for p in (*base, *tuned)]
    columns = len(rows[0][1])
    page = _Sheet(columns, generated + class_before + class_after)

    page.paragraph(title, image_grids.TITLE, bold=True)
    page.paragraph("reference pictures", image_grids.HEADING, bold=True, above=16)
    page.halves(2 * columns, reference)
    page.heads("base", "tuned")
    for index, (prompt, base, tuned) in enumerate(rows):
        page.paragraph(prompt, image_grids.TEXT, above=20 if index else 0)
        page.halves(columns, base, tuned)
    if class_before:
        caption = f"class images: {class_prompt}".removesuffix(": ")
        page.paragraph(caption, image_grids.HEADING, bold=True, above=MARGIN)
        page.heads("before", "after", above=4)
        page.halves(columns, class_before, class_after)
    note = "Pictures in the same place left and right have the same seed."
    page.paragraph(note, image_grids.LABEL, above=16)
    sheet = page.render(page.width, page.y + MARGIN)
    if path is not None:
        from dreambooth_lib.core.files import save_png

        save_png(sheet, path)
    return sheet


class _Sheet(image_grids.Layout):
    """Goes downwards from ``y``, over two halves."""

    def __init__(self, columns: int, pictures: list[Image.Image]) -> None:
        super().__init__(pictures)
        self.y, self.half = MARGIN, self.across(columns)
        self.starts = (MARGIN, MARGIN + self.half + _MIDDLE)
        self.width = self.starts[1] + self.half + MARGIN

    def paragraph(self, text: str, size: int, bold: bool = False, above: int = 0) -> None:
        self.y += above
        for line in image_grids.wrap(text, size, self.width - 2 * MARGIN, bold):
            self.text(MARGIN, self.y, line, size, bold)
            self.y += line_height(size)
        self.y += 4

    def heads(self, *names: str, above: int = MARGIN) -> None:
        """The two halves' headers, each over a rule."""
        self.y += above
        for x, name in zip(self.starts, names, strict=True):
            self.text(x, self.y, name, image_grids.HEADING, bold=True)
            self.rule(x, self.y + line_height(image_grids.HEADING), self.half)
        self.y += line_height(image_grids.HEADING) + 14

    def halves(self, columns: int, *halves: list[Image.Image]) -> None:
        places = zip(self.starts, halves, strict=False)
        self.y = max(self.pictures(x, self.y, half, columns) for x, half in places)


def _check_rows(rows: list[Any], place: str, names: tuple[str, str]) -> None:
    """Raise unless all halves of all rows have equally many pictures, and one or more."""
    for index, (_, *halves) in enumerate(rows):
        for name, pictures in zip(names, halves, strict=True):
            image_grids.check(pictures, f"{place}[{index}] {name}")
            if len(pictures) != len(rows[0][1]):
                raise ValueError(
                    f"{place}[{index}] {name} has {len(pictures)} pictures and {place}[0] "
                    f"{names[0]} {len(rows[0][1])}; give the same seeds everywhere."
                )
