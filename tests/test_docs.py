"""Make the pages of the documentation: notebooks with outputs, docstrings, links between files."""

import base64
import io
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from tools import notebook_outputs
from tools.notebook_outputs import NOTEBOOKS, ROOT, Widgets, digest, outputs_of

REPOSITORY = "https://github.com/you/kit"

ABSOLUTE_PATH = re.compile(r"""(?:^|[\s"'(=>;])/[A-Za-z][\w.-]*/""", re.MULTILINE)


def png() -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 16), "red").save(buffer, "png")
    return base64.b64encode(buffer.getvalue()).decode()


def widget(kind: str, **state: Any) -> dict[str, Any]:
    return {"model_name": f"{kind}Model", "state": state}


def test_widgets_become_html() -> None:
    state = {
        "box": widget("VBox", children=["IPY_MODEL_text", "IPY_MODEL_row", "IPY_MODEL_gone"]),
        "text": widget("HTML", value="<b>photos</b>"),
        "row": widget("HBox", children=[f"IPY_MODEL_{n}" for n in ("menu", "tick", "go", "bar")]),
        "menu": widget("Dropdown", description="base<", index=1, _options_labels=["a", "b>"]),
        "tick": widget("Checkbox", description="early", value=True),
        "go": widget("Button", description="Draw"),
        "bar": widget("FloatProgress", description="", value=3.0, max=4.0),
        "gone": widget("HTML", value="hidden", layout="IPY_MODEL_none"),
        "none": widget("Layout", display="none"),
        "picture": widget("Image") | {"buffers": [{"path": ["value"], "data": png()}]},
    }
    shown = Widgets(state).show("IPY_MODEL_box")
    assert shown == (
        '<div class="column"><div><b>photos</b></div><div class="row">'
        '<div class="field"><span>base&lt;</span><samp>b&gt;</samp></div><div>☑ early</div>'
        '<button disabled>Draw</button><div> <progress max="4.0" value="3.0"></progress></div>'
        "</div></div>"
    )
    assert Widgets(state).show("picture").startswith('<img width="32" src="data:image/webp;base64,')


def test_outputs_are_kept_by_the_source_of_their_cells() -> None:
    outputs = [
        {"output_type": "stream", "text": "\x1b[31m1 < 2\x1b[0m\n"},
        {"output_type": "display_data", "data": {"application/javascript": "1", "text/plain": ""}},
        {"output_type": "display_data", "data": {"image/png": png(), "text/plain": "<Figure>"}},
        {"output_type": "execute_result", "data": {"text/markdown": "*m*", "text/plain": "<M>"}},
        {"output_type": "execute_result", "data": {"text/html": "<i>x</i>", "text/plain": "x"}},
        {"output_type": "execute_result", "data": {"text/plain": "[<1>]"}},
    ]
    cells = [
        {"cell_type": "markdown", "source": "# title"},
        {"cell_type": "code", "source": "show()", "outputs": outputs},
        {"cell_type": "code", "source": "silent()", "outputs": []},
    ]
    shown = outputs_of({"metadata": {}, "cells": cells})
    assert shown.keys() == {digest("show()")}
    text = shown[digest("show()")]
    assert text.startswith("<pre>1 &lt; 2\n</pre><img ") and "javascript" not in text
    assert "<em>m</em>" in text and text.endswith("<div><i>x</i></div><pre>[&lt;1&gt;]</pre>")
    cells[1]["outputs"] = [{"output_type": "error", "ename": "KitError", "evalue": "no."}]
    with pytest.raises(RuntimeError, match=r"a cell failed: KitError: no\."):
        outputs_of({"metadata": {}, "cells": cells})


def test_kept_outputs_say_nothing_of_the_machine_that_made_them() -> None:
    for name in NOTEBOOKS:
        text = notebook_outputs.outputs_file(name).read_text()
        assert json.loads(text), name
        for place in ("/home/", "/root/", "/tmp/", str(ROOT)):
            assert place not in text, name
        assert not ABSOLUTE_PATH.search(re.sub("base64,[A-Za-z0-9+/=]+", "", text)), name


@pytest.mark.parametrize("text", ["/srv/a/b.py", "in '/data/x'", "<pre>/opt/kit/", "(/mnt/c/kit)"])
def test_absolute_paths_are_seen(text: str) -> None:
    assert ABSOLUTE_PATH.search(text) and not ABSOLUTE_PATH.search(
        "<b>a</b> runs/a/b https://x.y/z/"
    )


def test_docstrings_become_markdown() -> None:
    pytest.importorskip("griffe")
    from tools.docs_docstrings import as_markdown

    text = "See :class:`~a.B` and :func:`.c`.\n\nRUN/a.png    one\nRUN/b.png    two\n\nThe  end."
    assert as_markdown(text) == (
        "See `a.B` and `c`.\n\n    RUN/a.png    one\n    RUN/b.png    two\n\n    The  end."
    )
    assert as_markdown("A. B") == "A. B"


@pytest.fixture
def hooks() -> Any:
    pytest.importorskip("mkdocs")
    from tools import docs_hooks

    return docs_hooks


@pytest.mark.parametrize(
    ("page", "before", "after"),
    [
        ("index.md", "[a](docs/gpu.md#b)", "[a](gpu.md#b)"),
        ("index.md", "[a](notebooks/04_your_own.ipynb)", "[a](notebooks/04_your_own.md)"),
        ("index.md", "[a](LICENSE)", f"[a]({REPOSITORY}/blob/main/LICENSE)"),
        ("usage.md", "[a](../README.md) [b](gpu.md)", "[a](index.md) [b](gpu.md)"),
        ("studies/README.md", "![a](notebook-full.png)", "![a](../studies/notebook-full.png)"),
        ("studies/README.md", "[a](../../CONTRIBUTING.md)", "[a](../contributing.md)"),
        ("index.md", "[a](lost.md) [b](#c) [d](https://e/f)", "[a](lost.md) [b](#c) [d](https://e/f)"),
    ],
)  # fmt: skip
def test_links_between_files_become_links_between_pages(
    hooks: Any, page: str, before: str, after: str
) -> None:
    of_page = SimpleNamespace(file=SimpleNamespace(src_uri=page))
    config = SimpleNamespace(extra={"repository": REPOSITORY})
    assert hooks.on_page_markdown(before, of_page, config, None) == after


def test_a_notebooks_page_has_code_and_outputs_of_unchanged_cells(
    hooks: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "01_dreambooth.json"
    file.write_text(json.dumps({digest("a = 1\na"): "<pre>1\n\n2</pre>", digest("old"): "gone"}))
    monkeypatch.setattr(hooks, "outputs_file", lambda name: file)
    cells = [
        {"cell_type": "markdown", "source": ["# Title\n", "\n", "Text."]},
        {"cell_type": "code", "source": ["a = 1\n", "a"]},
        {"cell_type": "code", "source": ["new"]},
    ]
    page = hooks.notebook_page("01_dreambooth", {"cells": cells}, REPOSITORY)
    assert page.startswith(f"# Title\n\n[The notebook]({REPOSITORY}/blob/main/notebooks/01_dream")
    assert page.endswith(
        "Text.\n\n```python\na = 1\na\n```\n\n"
        '<div class="output"><pre>1\n2</pre></div>\n\n```python\nnew\n```'
    )


def test_the_api_has_every_name_and_module(hooks: Any) -> None:
    import dreambooth_lib

    pages = dict(hooks.api_pages())
    assert pages["api/index.md"].count("\n| [`db.") == len(dreambooth_lib.__all__)
    packages = {path.parent.name for path in (ROOT / "dreambooth_lib").glob("*/__init__.py")}
    assert pages.keys() == {"api/index.md", *(f"api/{name}.md" for name in packages)}
    assert "::: dreambooth_lib.core.config\n" in pages["api/core.md"]
    assert "::: dreambooth_lib.notebook.widgets.parts\n" in pages["api/notebook.md"]
    navigation = (ROOT / "mkdocs.yml").read_text()
    assert all(f"- {page}\n" in navigation for page in pages)


def test_lost_links_of_the_site_are_named(
    hooks: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "404.html").write_text('<a href="/lost">')
    (tmp_path / "b.html").write_text('<h2 id="c">')
    (tmp_path / "a.html").write_text(
        '<a href="b.html#c"><a href="b.html#d"><a href="https://e/f"><img src="g.png">'
        '<a href="#h" id="h"><a href="#__search">'
    )
    hooks.on_post_build(SimpleNamespace(site_dir=tmp_path))
    said = sorted(record.getMessage() for record in caplog.records)
    assert said == [f"a.html links to {lost}, which is not there" for lost in ("b.html#d", "g.png")]
