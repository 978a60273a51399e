"""Draw one page that shows what training did: the photos, then base beside tuned."""

from pathlib import Path
from typing import Any

from PIL import Image

from dreambooth_lib.core.errors import InputError
from dreambooth_lib.core.files import save_png
from dreambooth_lib.figures import image_grids
from dreambooth_lib.figures.image_grids import MARGIN, line_height

_MIDDLE = 48  # pixels between the base's half and the tuned model's


def contact_sheet(
    path: str | Path | None,
    *,
    title: str,
    photos: list[Image.Image],
    rows: list[tuple[str, list[Image.Image], list[Image.Image]]],
    class_before: list[Image.Image],
    class_after: list[Image.Image],
    class_prompt: str = "",
) -> Image.Image:
    """Draw the photos, then base beside tuned for every prompt, then the class images.

    Each row is ``(prompt, base images, tuned images)`` with one seed a column; all rows have
    equally many images. ``class_before`` and ``class_after`` pair up in the same way and may
    both be empty. Cells are sized as in :func:`image_grids.grid`. With a ``path`` the page is also
    written there as a PNG. Raises ``InputError`` for missing images and unequal counts.
    """
    image_grids.check(photos, "photos")
    if not rows:
        raise InputError("rows is empty; give a prompt with its base and tuned images.")
    _check_rows(rows, "rows", ("base", "tuned"))
    if class_before or class_after:
        _check_rows([("", class_before, class_after)], "class", ("before", "after"))
    generated = [image for _, base, tuned in rows for image in (*base, *tuned)]
    columns = len(rows[0][1])
    page = _Sheet(columns, generated + class_before + class_after)

    page.paragraph(title, image_grids.TITLE, bold=True)
    page.paragraph("photos of the subject", image_grids.HEADING, bold=True, above=16)
    page.halves(2 * columns, photos)
    page.headings("base", "tuned")
    for index, (prompt, base, tuned) in enumerate(rows):
        page.paragraph(prompt, image_grids.TEXT, above=20 if index else 0)
        page.halves(columns, base, tuned)
    if class_before:
        caption = f"class images: {class_prompt}".removesuffix(": ")
        page.paragraph(caption, image_grids.HEADING, bold=True, above=MARGIN)
        page.headings("before", "after", above=4)
        page.halves(columns, class_before, class_after)
    note = "Images in the same position on the left and right share a seed."
    page.paragraph(note, image_grids.LABEL, above=16)
    sheet = page.render(page.width, page.y + MARGIN)
    if path is not None:
        save_png(sheet, path)
    return sheet


class _Sheet(image_grids.Layout):
    """A layout of two halves that is filled downwards from ``y``."""

    def __init__(self, columns: int, images: list[Image.Image]) -> None:
        super().__init__(images)
        self.y, self.half = MARGIN, self.across(columns)
        self.starts = (MARGIN, MARGIN + self.half + _MIDDLE)
        self.width = self.starts[1] + self.half + MARGIN

    def paragraph(self, text: str, size: int, bold: bool = False, above: int = 0) -> None:
        self.y += above
        for line in image_grids.wrap(text, size, self.width - 2 * MARGIN, bold):
            self.text(MARGIN, self.y, line, size, bold)
            self.y += line_height(size)
        self.y += 4

    def headings(self, *names: str, above: int = MARGIN) -> None:
        """Place a heading over a rule at the top of each half."""
        self.y += above
        for x, name in zip(self.starts, names, strict=True):
            self.text(x, self.y, name, image_grids.HEADING, bold=True)
            self.rule(x, self.y + line_height(image_grids.HEADING), self.half)
        self.y += line_height(image_grids.HEADING) + 14

    def halves(self, columns: int, *halves: list[Image.Image]) -> None:
        places = zip(self.starts, halves, strict=False)
        self.y = max(self.images(x, self.y, half, columns) for x, half in places)


def _check_rows(rows: list[Any], place: str, names: tuple[str, str]) -> None:
    """Raise ``InputError`` unless all halves of all rows have equally many images, at least one."""
    for index, (_, *halves) in enumerate(rows):
        for name, images in zip(names, halves, strict=True):
            image_grids.check(images, f"{place}[{index}] {name}")
            if len(images) != len(rows[0][1]):
                raise InputError(
                    f"{place}[{index}] {name} has {len(images)} images and {place}[0] "
                    f"{names[0]} has {len(rows[0][1])}; use the same seeds everywhere."
                )
