"""Write where the kit is published into the notebooks: ``python -m tools.address ADDRESS``.

ADDRESS is that of a GitHub repository, https://github.com/OWNER/NAME. Each notebook then begins
with a badge that opens it in Colab, and its first cell installs the kit from there.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
COLAB = "https://colab.research.google.com"
_BADGE = re.compile(r"^\[!\[Open in Colab\]")
_KIT = re.compile(r'^KIT = ".*?"')


def addressed(notebook: dict[str, Any], name: str, address: str) -> dict[str, Any]:
    """The notebook ``name`` with a badge under its title and the kit's address in its first cell.

    Raises ``ValueError`` for an address that is not a GitHub repository's.
    """
    found = re.fullmatch(r"https://github\.com/([\w.-]+/[\w.-]+?)(\.git|/)?", address)
    if not found:
        raise ValueError(f"'{address}' is not https://github.com/OWNER/NAME.")
    link = f"{COLAB}/github/{found[1]}/blob/main/notebooks/{name}.ipynb"
    badge = f"[![Open in Colab]({COLAB}/assets/colab-badge.svg)]({link})\n"
    title, *rest = (line for line in notebook["cells"][0]["source"] if not _BADGE.match(line))
    while rest and not rest[0].strip():
        del rest[0]
    notebook["cells"][0]["source"] = [title, "\n", badge, "\n", *rest]
    setup = next(cell for cell in notebook["cells"] if cell["cell_type"] == "code")
    kit = f'KIT = "git+https://github.com/{found[1]}"'
    setup["source"] = [_KIT.sub(kit, line) for line in setup["source"]]
    return notebook


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("address")
    given = parser.parse_args()
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        notebook = addressed(json.loads(path.read_text()), path.stem, given.address)
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")
        print(path)


if __name__ == "__main__":
    main()
