"""Write where the kit is published into its files: ``python -m tools.address ADDRESS``.

ADDRESS is that of a GitHub repository, https://github.com/OWNER/NAME. Each notebook then begins
with a badge that opens it in Colab, and its first cell installs the kit from there, in place of
looking for a clone or a wheel; the links of :data:`FILES` lead there.
"""

import argparse
import json
import re
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
NOTEBOOKS = ROOT / "notebooks"
COLAB = "https://colab.research.google.com"
#: Files with links to the repository; pyproject.toml says which one they have now.
FILES = (
    "pyproject.toml",
    "README.md",
    "CONTRIBUTING.md",
    "CITATION.cff",
    "SECURITY.md",
    "mkdocs.yml",
    ".github/ISSUE_TEMPLATE/config.yml",
)
_BADGE = re.compile(r"^\[!\[Open in Colab\]")
_UNPUBLISHED = re.compile(r"^Until the kit is published.*?\n\n", re.DOTALL | re.MULTILINE)

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


def current() -> str:
    """Return the OWNER/NAME that the kit's files have now."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return repository_of(project["urls"]["Repository"])


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


def with_links(text: str, before: str, address: str) -> str:
    """Return a text whose links to the repository ``before`` lead to that of an address.

    What the README says of the time before that goes.
    """
    link = rf"(github\.com/|{COLAB}/github/){re.escape(before)}(?=[/.)\s\"'`]|$)"
    text = re.sub(link, rf"\g<1>{repository_of(address)}", text, flags=re.MULTILINE)
    return _UNPUBLISHED.sub("", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("address")
    address = parser.parse_args().address
    before = current()
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        notebook = with_address(json.loads(path.read_text()), path.stem, address)
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")
        print(path)
    for path in (ROOT / name for name in FILES):
        path.write_text(with_links(path.read_text(), before, address))
        print(path)


if __name__ == "__main__":
    main()
