"""Build the pages of the documentation that are no files of ``docs``, and check every link.

``mkdocs.yml`` names this module as its hooks. The pages are README and its neighbours, the
notebooks with the outputs that ``tools.notebook_outputs`` kept, and the API by package.
"""

import ast
import json
import logging
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from mkdocs.structure.files import File

from tools.docs_docstrings import as_markdown
from tools.notebook_outputs import NOTEBOOKS, ROOT, digest, outputs_file

log = logging.getLogger("mkdocs.plugins.kit")
PACKAGE = ROOT / "dreambooth_lib"
#: Pages of the site by the files of the repository that they show.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    **{f"notebooks/{name}.ipynb": f"notebooks/{name}.md" for name in NOTEBOOKS},
}
_LINK = re.compile(r"(\]\()([^)\s#:]+)(#[^)\s]*)?(\))")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are made here."""
    for source, page in PAGES.items():
        text = (ROOT / source).read_text()
        if source.endswith(".ipynb"):
            text = notebook_page(Path(source).stem, json.loads(text), config.extra["repository"])
        files.append(File.generated(config, page, content=text))
    for page, text in api_pages():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Turn links between the repository's files into those between pages."""
    own = page.file.src_uri
    blob = f"{config.extra['repository']}/blob/main"
    source = next((file for file, made in PAGES.items() if made == own), f"docs/{own}")

    def to_page(link: re.Match[str]) -> str:
        target = (ROOT / source).parent.joinpath(link[2]).resolve()
        if not target.is_relative_to(ROOT) or not target.exists():
            return link[0]  # which mkdocs will say
        name = target.relative_to(ROOT).as_posix()
        if name not in PAGES and not name.startswith("docs/"):
            return f"{link[1]}{blob}/{name}{link[3] or ''}{link[4]}"
        place = PAGES.get(name, name.removeprefix("docs/"))
        up = "../" * own.count("/")
        return f"{link[1]}{up}{place}{link[3] or ''}{link[4]}"

    return _LINK.sub(to_page, markdown)


def notebook_page(name: str, notebook: dict[str, Any], repository: str) -> str:
    """Return a notebook as Markdown: its texts, its code, and below that what it showed."""
    file = outputs_file(name)
    shown = json.loads(file.read_text()) if file.exists() else {}
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        if output := shown.pop(digest(source), ""):
            # Markdown ends a block of HTML at an empty line.
            parts.append(f'<div class="output">{re.sub(chr(10) + "+", chr(10), output)}</div>')
    if shown:
        log.info("%s: %d outputs are of cells that have changed since", name, len(shown))
    title = parts[0].splitlines()[0]
    file_there = f"{repository}/blob/main/notebooks/{name}.ipynb"
    link = f"[The notebook]({file_there}), with what it shows on the bundled base."
    return "\n\n".join([title, link, parts[0].removeprefix(title), *parts[1:]])


def api_pages() -> Iterator[tuple[str, str]]:
    """Yield the pages of the API: the names of ``import dreambooth_lib as db``, then packages."""
    home = re.findall(r'^    "(\w+)": "([\w.]+)",$', (PACKAGE / "__init__.py").read_text(), re.M)
    rows = ["| name | what it is |", "|---|---|"]
    for name, module in sorted(home):
        tree = ast.parse((PACKAGE / f"{module.replace('.', '/')}.py").read_text())
        (found,) = (node for node in tree.body if getattr(node, "name", "") == name)
        text = (ast.get_docstring(found) or "").partition("\n\n")[0].replace("\n", " ")
        rows.append(f"| [`db.{name}`][dreambooth_lib.{module}.{name}] | {as_markdown(text)} |")
    first = "# API\n\n`import dreambooth_lib as db` has these names; the other pages have the rest."
    yield "api/index.md", "\n".join([first, "", *rows])
    for folder in sorted(path.parent for path in PACKAGE.glob("*/__init__.py")):
        modules = sorted(folder.rglob("[!_]*.py"))
        paths = [path.relative_to(ROOT).with_suffix("").parts for path in modules]
        parts = [f"# {folder.name}", *(f"::: {'.'.join(path)}" for path in paths)]
        yield f"api/{folder.name}.md", "\n\n".join(parts)


class _Links(HTMLParser):
    """The targets and the addresses of one page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.targets: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("id", "name") and value:
                self.names.add(value)
            elif name in ("href", "src") and value:
                self.targets.add(value)


def on_post_build(config: Any) -> None:
    """Warn of each link of a page that leads to no file, or to no place in one."""
    site = Path(config.site_dir).resolve()
    pages = {path: _Links(path.read_text()) for path in site.rglob("*.html")}
    del pages[site / "404.html"]  # which only a server shows, with links from its root
    for path, page in pages.items():
        for target in sorted(page.targets):
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                continue
            file = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            place = unquote(parts.fragment)
            file = file / "index.html" if file.is_dir() else file
            lost = place and file in pages and place not in pages[file].names
            # The theme's own scripts read addresses such as "#__search".
            if not file.exists() or (lost and not place.startswith("__")):
                log.warning("%s links to %s, which is not there", path.relative_to(site), target)
