"""Test writing the kit's address into the notebooks and README."""

import json
from pathlib import Path

import pytest

from tools import address

NAMES = [path.stem for path in sorted(address.NOTEBOOKS.glob("*.ipynb"))]


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_gets_one_badge_and_one_address(name: str) -> None:
    plain = json.loads(Path(address.NOTEBOOKS, f"{name}.ipynb").read_text())
    first = address.with_address(json.loads(json.dumps(plain)), name, "https://github.com/me/old")
    again = address.with_address(first, name, "https://github.com/you/new.git")
    head, setup = (
        again["cells"][0]["source"],
        next(cell["source"] for cell in again["cells"] if cell["cell_type"] == "code"),
    )
    badges = [line for line in head if "colab-badge.svg" in line]
    assert len(badges) == 1 and f"/github/you/new/blob/main/notebooks/{name}.ipynb)" in badges[0]
    assert len(setup) == 8 and "glob" not in "".join(setup), "nothing is looked for"
    assert setup[1].startswith('KIT_URL = "git+https://github.com/you/new"')
    assert "me/old" not in json.dumps(again)

    assert "".join(plain["cells"][0]["source"][1:]).strip() in "".join(head)


def test_links_lead_to_the_new_address_and_others_stay() -> None:
    before = address.current()
    for file in address.FILES:
        plain = (address.ROOT / file).read_text()
        first = address.with_links(plain, before, "https://github.com/me/old")
        again = address.with_links(first, "me/old", "https://github.com/you/new/")
        assert "github.com/you/new" in again
        assert before not in again and "me/old" not in again
    text = "https://github.com/me/older https://github.com/not/me/old"
    assert address.with_links(text, "me/old", "https://github.com/you/new") == text


def test_readme_has_a_button_and_a_clone_line_and_says_what_is_so_before() -> None:
    plain = (address.ROOT / "README.md").read_text()
    again = address.with_links(plain, address.current(), "https://github.com/you/new")
    (line,) = [line for line in again.splitlines() if "colab-badge.svg" in line]
    assert "/github/you/new/blob/main/notebooks/01_dreambooth.ipynb)" in line
    assert "git clone https://github.com/you/new.git dreambooth" in again
    assert "Until the kit is published" in plain and "Until the kit is published" not in again
    heads = [row for row in plain.splitlines() if row.startswith("## ")]
    assert [row for row in again.splitlines() if row.startswith("## ")] == heads


def test_an_address_elsewhere_is_refused() -> None:
    with pytest.raises(ValueError, match=r"is not https://github.com/OWNER/NAME"):
        address.with_address({}, "01", "https://example.org/me/kit")
