"""Run the notebooks and keep what they show: ``python -m tools.notebook_outputs [NAME ...]``.

``docs/notebooks/NAME.json`` then has the HTML of each code cell that shows something, by a digest
of its source, for the documentation; the notebooks themselves stay without outputs. Widgets become
plain HTML, since without a kernel they cannot answer.
"""

import argparse
import base64
import hashlib
import html
import io
import json
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
NOTEBOOKS = {path.stem: path for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}
_STATE = "application/vnd.jupyter.widget-state+json"
_VIEW = "application/vnd.jupyter.widget-view+json"
_REFERENCE = "IPY_MODEL_"
_COLOURS = re.compile(r"\x1b\[[\d;]*m")


def outputs_file(name: str) -> Path:
    """Return where the outputs of a notebook are kept."""
    return ROOT / "docs" / "notebooks" / f"{name}.json"


def digest(source: str) -> str:
    """Return what a cell's outputs are kept under."""
    return hashlib.sha256(source.encode()).hexdigest()[:16]


def picture(data: bytes) -> str:
    """Return an image as an HTML tag that holds it, as WebP where that is smaller."""
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        buffer, width = io.BytesIO(), image.width
        image.save(buffer, "webp", quality=88, method=6)
    kind, data = ("webp", buffer.getvalue()) if buffer.tell() < len(data) else ("png", data)
    return f'<img width="{width}" src="data:image/{kind};base64,{base64.b64encode(data).decode()}">'


class Widgets:
    """The widgets of an executed notebook, as HTML."""

    def __init__(self, state: Mapping[str, Any]):
        self.state = state

    def show(self, name: str) -> str:
        """Return a widget and all that it contains; nothing of one that is hidden."""
        model = self.state[name.removeprefix(_REFERENCE)]
        kind, values = model["model_name"].removesuffix("Model"), model["state"]
        layout = self._layout(values)
        if layout.get("display") == "none" or layout.get("visibility") == "hidden":
            return ""
        if "children" in values:
            inside = "".join(map(self.show, values["children"]))
            row = kind == "HBox" or (layout.get("flex_flow") or "").startswith("row")
            return f'<div class="{"row" if row else "column"}">{inside}</div>' if inside else ""
        if kind == "Image":
            (data,) = (buffer["data"] for buffer in model["buffers"])
            return picture(base64.b64decode(data)) if data else ""
        if kind == "Output":
            return "".join(show_output(output, self) for output in values["outputs"])
        return self._control(kind, values)

    def _layout(self, values: Mapping[str, Any]) -> Mapping[str, Any]:
        name = values.get("layout", "").removeprefix(_REFERENCE)
        return self.state[name]["state"] if name in self.state else {}

    def _control(self, kind: str, values: Mapping[str, Any]) -> str:
        if kind in ("HTML", "HTMLMath"):
            return f"<div>{values['value']}</div>" if values["value"] else ""
        label = html.escape(values.get("description") or "")
        if kind.endswith("Progress"):
            bar = f'<progress max="{values["max"]}" value="{values["value"]}"></progress>'
            return f"<div>{label} {bar}</div>"
        if kind in ("Button", "FileUpload"):
            return f"<button disabled>{label}</button>"
        if kind == "Checkbox":
            return f"<div>{'☑' if values['value'] else '☐'} {label}</div>"
        value = values.get("value")
        if "_options_labels" in values:
            value = None if values["index"] is None else values["_options_labels"][values["index"]]
        shown = "" if value is None else html.escape(str(value))
        return f'<div class="field"><span>{label}</span><samp>{shown}</samp></div>'


def show_output(output: Mapping[str, Any], widgets: Widgets) -> str:
    """Return one output of a cell as HTML."""
    if output["output_type"] == "stream":
        return f"<pre>{html.escape(_COLOURS.sub('', output['text']))}</pre>"
    if output["output_type"] == "error":
        raise RuntimeError(f"a cell failed: {output['ename']}: {output['evalue']}")
    data = output["data"]
    if "application/javascript" in data:
        return ""
    if _VIEW in data:
        return widgets.show(data[_VIEW]["model_id"])
    if "image/png" in data:
        return picture(base64.b64decode(data["image/png"]))
    if "text/markdown" in data:
        from nbconvert.filters import markdown2html

        return f"<div>{markdown2html(data['text/markdown'])}</div>"
    if "text/html" in data:
        return f"<div>{data['text/html']}</div>"
    return f"<pre>{html.escape(data.get('text/plain', ''))}</pre>"


def outputs_of(notebook: Mapping[str, Any]) -> dict[str, str]:
    """Return the HTML of an executed notebook's code cells that show something, by digest."""
    state = notebook["metadata"].get("widgets", {}).get(_STATE, {}).get("state", {})
    widgets, shown = Widgets(state), {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            text = "".join(show_output(output, widgets) for output in cell["outputs"])
            if text:
                shown[digest(cell["source"])] = text
    return shown


def execute(path: Path) -> Any:
    """Run a notebook from top to bottom in a folder of its own, and return it with outputs."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, 4)
    with tempfile.TemporaryDirectory() as folder:
        place = {"metadata": {"path": folder}}
        NotebookClient(notebook, timeout=None, resources=place, store_widget_state=True).execute()
        # What was run where is nobody's business.
        text = nbformat.writes(notebook).replace(folder, ".").replace(str(ROOT), ".")
        return nbformat.reads(text.replace(str(Path.home()), "~"), 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("names", nargs="*", default=list(NOTEBOOKS), metavar="NAME")
    os.environ["PYTHONPATH"] = str(ROOT)  # for the kernels
    for name in parser.parse_args().names:
        shown, file = outputs_of(execute(NOTEBOOKS[name])), outputs_file(name)
        file.write_text(json.dumps(shown, indent=1, ensure_ascii=False) + "\n")
        print(f"{file}: {len(shown)} cells, {file.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
