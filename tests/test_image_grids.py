"""Check contact sheets, grids and matrices by where solid colours are drawn."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dreambooth_lib.figures import image_grids
from dreambooth_lib.figures.contact_sheet import contact_sheet

Box = tuple[int, int, int, int]


def solids(count: int, start: int = 0, size: tuple[int, int] = (64, 64)) -> list[Image.Image]:
    """Return images of one colour each, all different and none near the text's greys."""
    return [Image.new("RGB", size, colour(start + index)) for index in range(count)]


def colour(index: int) -> tuple[int, int, int]:
    return (255, (index * 5) % 256, index % 7)


def box(page: Image.Image, index: int) -> Box:
    """Return left, top, right and bottom of a colour, which must fill that rectangle."""
    rows, columns = np.nonzero((np.asarray(page) == colour(index)).all(-1))
    left, right, top, bottom = columns.min(), columns.max() + 1, rows.min(), rows.max() + 1
    assert len(rows) == (right - left) * (bottom - top), f"colour {index} is covered in part"
    return int(left), int(top), int(right), int(bottom)


def sheet(path: Path | None = None, **changes: Any) -> Image.Image:
    """Draw photos 0-2, images 3-10 and 11-18 in rows, 19-21 before and 22-24 after."""
    fields: dict[str, Any] = {
        "title": "A run",
        "photos": solids(3, 0),
        "rows": [("a ohwx dog", solids(4, 3), solids(4, 7)),
                 ("a ohwx dog in snow", solids(4, 11), solids(4, 15))],
        "class_before": solids(3, 19),
        "class_after": solids(3, 22),
        "class_prompt": "a dog",
    }  # fmt: skip
    return contact_sheet(path, **(fields | changes))


def test_every_image_is_uncropped_enlarged_and_in_its_place() -> None:
    page = sheet()
    boxes = [box(page, index) for index in range(25)]
    assert all((right - left, bottom - top) == (128, 128) for left, top, right, bottom in boxes)
    tops = [top for _, top, _, _ in boxes]
    for row in (range(3), range(3, 11), range(11, 19), range(19, 25)):
        assert len({tops[index] for index in row}) == 1
    assert tops[0] < tops[3] < tops[11] < tops[19]
    assert min(left for left, *_ in boxes) > 0 and page.mode == "RGB"
    assert max(boxes[10][2], boxes[24][2]) < page.width and boxes[24][3] < page.height


def test_seeds_line_up_in_columns_with_a_gap_between_base_and_tuned() -> None:
    page = sheet()
    for column in range(4):
        assert box(page, 3 + column)[0] == box(page, 11 + column)[0]  # base
        assert box(page, 7 + column)[0] == box(page, 15 + column)[0]  # tuned
    for column in range(3):
        assert box(page, 19 + column)[0] == box(page, 3 + column)[0]
        assert box(page, 22 + column)[0] == box(page, 7 + column)[0]
    lefts = [box(page, index)[0] for index in range(3, 11)]
    steps = np.diff(lefts)
    assert len(set(steps[[0, 1, 2, 4, 5, 6]])) == 1 and steps[3] > steps[0] + 30


def test_nothing_touches_the_edges_and_no_text_covers_an_image() -> None:
    long = "a ohwx dog " + "and another thing " * 30 + "x" * 300
    page = sheet(title="A very long title " * 12, rows=[(long, solids(4, 3), solids(4, 7))])
    pixels = np.asarray(page)
    for edge in (pixels[:16], pixels[-16:], pixels[:, :16], pixels[:, -16:]):
        assert (edge == 255).all()
    for index in (*range(11), *range(19, 25)):
        box(page, index)  # a text over it would make a hole
    assert page.height > sheet(rows=[("a dog", solids(4, 3), solids(4, 7))]).height


def test_many_images_wrap_into_rows() -> None:
    page = sheet(photos=solids(9, 25), class_before=solids(6, 34), class_after=solids(6, 40))
    assert box(page, 33)[0] == box(page, 25)[0] and box(page, 33)[1] > box(page, 32)[1]
    assert box(page, 38)[0] == box(page, 34)[0] and box(page, 38)[1] == box(page, 44)[1]


@pytest.mark.parametrize(
    ("size", "cell", "shown"),
    [
        ((512, 512), 160, (160, 160)),
        ((512, 256), 160, (160, 80)),
        ((150, 150), 150, (150, 150)),
        ((32, 32), 128, (128, 128)),
    ],
)
def test_cells_have_one_handy_size(
    size: tuple[int, int], cell: int, shown: tuple[int, int]
) -> None:
    rows = [("a dog", solids(2, 3, size), solids(2, 5, size))]
    page = sheet(rows=rows, photos=solids(1, 0, (700, 700)), class_before=[], class_after=[])
    left, top, right, bottom = box(page, 3)
    assert (right - left, bottom - top) == shown
    left, top, right, bottom = box(page, 0)
    assert (right - left, bottom - top) == (cell, cell)


def test_class_images_may_be_left_out() -> None:
    assert sheet(class_before=[], class_after=[]).height < sheet().height - 128


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"photos": []}, "photos has no images"),
        ({"photos": [None]}, r"photos\[0\] is None"),
        ({"rows": []}, "rows is empty"),
        ({"rows": [("a dog", [], [])]}, r"rows\[0\] base has no images"),
        ({"rows": [("a dog", solids(2), [*solids(1), None])]}, r"rows\[0\] tuned\[1\] is None"),
        ({"rows": [("a dog", solids(2), solids(3))]}, r"rows\[0\] tuned has 3 .* base has 2"),
        (
            {"rows": [("a", solids(2), solids(2)), ("b", solids(3), solids(3))]},
            r"rows\[1\] base has 3",
        ),
        ({"class_after": []}, "after has no images"),
        ({"class_after": solids(2)}, "after has 2 images .* before has 3"),
    ],
)
def test_missing_images_are_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        sheet(tmp_path / "sheet.png", **changes)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")
    assert not list(tmp_path.iterdir())


def test_the_page_replaces_an_older_one_atomically(tmp_path: Path) -> None:
    path = tmp_path / "new" / "sheet.png"
    path.parent.mkdir()
    path.write_text("older")
    page = sheet(path)
    with Image.open(path) as written:
        assert written.format == "PNG"
        assert np.array_equal(np.asarray(written), np.asarray(page))
    assert [file.name for file in path.parent.iterdir()] == ["sheet.png"]


def test_grid_places_images_row_by_row() -> None:
    page = image_grids.grid(solids(5), 3)
    boxes = [box(page, index) for index in range(5)]
    assert [b[0] for b in boxes] == [8, 144, 280, 8, 144]
    assert [b[1] for b in boxes] == [8, 8, 8, 144, 144]
    assert page.size == (3 * 136 + 8, 2 * 136 + 8)
    assert image_grids.grid(solids(2), 5).size == (2 * 136 + 8, 136 + 8)


def test_grid_labels_are_below_the_images() -> None:
    labels = ["seed 0", "a label that needs more than one line", ""]
    page = image_grids.grid(solids(3), 2, labels)
    boxes = [box(page, index) for index in range(3)]
    below = np.asarray(page.convert("L"))[boxes[0][3] : boxes[2][1]]
    assert (below[:, boxes[0][0] : boxes[0][2]] < 128).any()
    assert (below[:, boxes[1][0] : boxes[1][2]] < 128).any()
    assert (below[:, boxes[0][2] : boxes[1][0]] == 255).all()
    assert page.height > image_grids.grid(solids(3), 2).height


def test_grid_names_wrong_input() -> None:
    for call, message in (
        (lambda: image_grids.grid([], 2), "images has no images"),
        (lambda: image_grids.grid(solids(2), 0), "columns is 0"),
        (lambda: image_grids.grid(solids(2), 2, ["one"]), "1 labels for 2 images"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_extremes_are_the_best_the_middle_and_the_worst(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    labels, grid = list[str](), image_grids.grid

    def noted(images: Any, columns: int, named: Any) -> Image.Image:
        labels[:] = named
        return grid(images, columns, named)

    monkeypatch.setattr(image_grids, "grid", noted)
    scored = [(index / 10, f"n{index}", image) for index, image in enumerate(solids(9))]
    page = image_grids.extremes([scored[i] for i in (3, 8, 0, 5, 1, 7, 2, 6, 4)], columns=2)
    boxes = {index: box(page, index) for index in (8, 7, 4, 5, 1, 0)}
    assert [label.partition(":")[0] for label in labels] == [
        "best", "best", "middle", "middle", "worst", "worst"
    ]  # fmt: skip
    shown = sorted(boxes, key=lambda index: (boxes[index][1], boxes[index][0]))
    assert shown == [8, 7, 5, 4, 1, 0]
    files = [(value, label, tmp_path / f"{label}.png") for value, label, _ in scored]
    for index in boxes:  # the files that are not shown are missing, and not opened
        scored[index][2].save(files[index][2])
    assert image_grids.extremes(files, columns=2) == page
    with pytest.raises(ValueError, match="2 scored images; give three or more"):
        image_grids.extremes(scored[:2])


def test_a_matrix_has_its_rows_down_and_its_columns_across() -> None:
    cells = [[solids(2, 0), solids(2, 2)], [solids(2, 4), solids(2, 6)]]
    page = image_grids.matrix(["λ 0", "λ 1"], ["step 100", "step 200"], cells, "study")
    boxes = [box(page, index) for index in range(8)]
    assert len({b[1] for b in boxes[:4]}) == 1 and len({b[1] for b in boxes[4:]}) == 1
    assert boxes[0][1] < boxes[4][1], "the second row is below the first"
    assert [b[0] for b in boxes[:4]] == [b[0] for b in boxes[4:]], "columns line up"
    assert boxes[2][0] - boxes[1][2] > boxes[1][0] - boxes[0][2], "cells stand apart"
    narrow = image_grids.matrix(["λ 0"], ["two", "one"], [[solids(2), solids(1, 2)]])
    wide = image_grids.matrix(
        ["λ 0"], ["two", "one, and a long label"], [[solids(2), solids(1, 2)]]
    )
    assert narrow.width < wide.width < page.width, "a column is as wide as what is in it"
    with pytest.raises(ValueError, match="row 1 has 1 cells for 2 columns"):
        image_grids.matrix(["a", "b"], ["x", "y"], [[solids(1), solids(1)], [solids(1)]])


def test_the_labels_of_a_wide_matrix_are_legible_where_it_is_shown_reduced() -> None:
    def height_of_label(columns: int) -> float:
        """Return the height in pixels of "λ 0" where the page is 800 pixels wide."""
        cells = [[solids(3) for _ in range(columns)]]
        page = image_grids.matrix(["λ 0"], [str(n) for n in range(columns)], cells)
        left = np.asarray(page.convert("L"))[:, : image_grids.MARGIN + 20]
        (dark,) = np.nonzero((left < 128).any(1))
        return (dark.max() - dark.min() + 1) * min(1, 800 / page.width)

    assert height_of_label(1) == pytest.approx(12, abs=1)
    assert height_of_label(7) > 0.7 * height_of_label(1)
    long = "... without prior\npreservation"
    broken, short = (
        image_grids.matrix([label], ["a"], [[solids(1)]]).width for label in (long, "... without")
    )
    assert broken < short + 100, "a label of two lines is as wide as its longer one"
