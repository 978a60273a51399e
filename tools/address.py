"""Write where the kit is published into the notebooks: ``python -m tools.address ADDRESS``.

ADDRESS is that of a GitHub repository, https://github.com/OWNER/NAME. Each notebook then begins
with a badge that opens it in Colab, and its first cell installs the kit from there, in place of
looking for a clone or a wheel; README gets both in one line, in place of the instructions for a
wheel.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
NOTEBOOKS = ROOT / "notebooks"
COLAB = "https://colab.research.google.com"
_BADGE = re.compile(r"^\[!\[Open in Colab\]")
_CLONE = re.compile(r"git clone https://github\.com/\S+?\.git")
_ON_COLAB = re.compile(r"^## On Colab.*?(?=^## )", re.DOTALL | re.MULTILINE)

_SETUP = """\
# @title Install the kit
KIT_URL = "git+https://github.com/{}"  # @param {{"type":"string"}}
try:
    from dreambooth_lib.notebook import install
except ImportError:
    %pip install --quiet --no-deps "{{KIT_URL}}"
    from dreambooth_lib.notebook import install
print(install.install_missing())"""


def badge(repository: str, name: str) -> str:
    """Return the Markdown of a badge that opens the notebook ``name`` of OWNER/NAME in Colab."""
    link = f"{COLAB}/github/{repository}/blob/main/notebooks/{name}.ipynb"
    return f"[![Open in Colab]({COLAB}/assets/colab-badge.svg)]({link})"


def repository_of(address: str) -> str:
    """Return OWNER/NAME. Raises ``ValueError`` if the address is not a GitHub repository's."""
    match = re.fullmatch(r"https://github\.com/([\w.-]+/[\w.-]+?)(\.git|/)?", address)
    if not match:
        raise ValueError(f"'{address}' is not https://github.com/OWNER/NAME.")
    return match[1]


def with_address(notebook: dict[str, Any], name: str, address: str) -> dict[str, Any]:
    """Return the notebook with a badge under its title and the kit's address in its first cell.

    Raises ``ValueError`` if the address is not a GitHub repository's.
    """
    repository = repository_of(address)
    title, *rest = (line for line in notebook["cells"][0]["source"] if not _BADGE.match(line))
    while rest and not rest[0].strip():
        del rest[0]
    notebook["cells"][0]["source"] = [title, "\n", f"{badge(repository, name)}\n", "\n", *rest]
    setup = next(cell for cell in notebook["cells"] if cell["cell_type"] == "code")
    setup["source"] = _SETUP.format(repository).splitlines(keepends=True)
    return notebook


def with_badge(readme: str, address: str) -> str:
    """Return README with the clone line, and the first notebook's badge and installation."""
    repository = repository_of(address)
    readme = _CLONE.sub(f"git clone https://github.com/{repository}.git", readme)
    install = f"`pip install git+https://github.com/{repository}`"
    line = f"{badge(repository, '01_dreambooth')} or {install}"
    return _ON_COLAB.sub(f"## On Colab\n\n{line}\n\n", readme)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("address")
    address = parser.parse_args().address
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        notebook = with_address(json.loads(path.read_text()), path.stem, address)
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")
        print(path)
    readme = ROOT / "README.md"
    readme.write_text(with_badge(readme.read_text(), address))
    print(readme)


if __name__ == "__main__":
    main()
