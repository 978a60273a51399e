"""The notebooks run from top to bottom on the embedded base, and are kept without outputs.

A cell passes over an error in a widget, so each notebook ends with assertions, and what the widgets
said is read from the executed notebook.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dreambooth_lib import runs, watch
from dreambooth_lib.evaluation import REAL
from dreambooth_lib.tables import read_csv

ROOT = Path(__file__).parent.parent
NOTEBOOKS = {path.stem: path for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}
#: What is shortened, and nothing else: lines after those of the parameters cell.
SHORT = {
    "01_dreambooth": 'SETTINGS = {"steps": 4, "class_pictures": 4, "watch_every": 2}',
    "02_lambda_study": "LAMBDAS, STEPS, CLASS_PICTURES = [0.0, 1.0], [2, 4], 4",
    "03_evaluation": 'SETTINGS = {"steps": 2, "class_pictures": 4, "watch_every": 0}\n'
    "PROTOCOL = dreambench.Protocol(pictures=1, class_pictures=2, steps=2)",
    "04_your_own": "STEPS, CLASS_PICTURES = 4, 4",
}


def source(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def codes(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def execute(name: str, folder: Path) -> dict[str, Any]:
    """Run a notebook in a folder with its parameters shortened; gives it with its outputs."""
    notebook = json.loads(NOTEBOOKS[name].read_text())
    codes(notebook)[1]["source"] += ["\n", SHORT[name]]
    file = folder / f"{name}.ipynb"
    file.write_text(json.dumps(notebook))
    command = [sys.executable, "-m", "pytest", "--nbmake", "-q", "-p", "no:cacheprovider",
               "--nbmake-timeout=500", "--overwrite", file.name]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    return json.loads(file.read_text())


def outputs(notebook: dict[str, Any], kind: str) -> list[Any]:
    """All that was shown of one kind, such as "image/png", cell by cell."""
    shown = [out.get("data", {}) for cell in codes(notebook) for out in cell["outputs"]]
    return [data[kind] for data in shown if kind in data]


def said(notebook: dict[str, Any]) -> str:
    """Every text that a widget held at the end, or a cell printed."""
    widgets = notebook["metadata"].get("widgets", {})
    states = widgets.get("application/vnd.jupyter.widget-state+json", {}).get("state", {})
    texts = [str(widget["state"].get("value", "")) for widget in states.values()]
    printed = [out.get("text", "") for cell in codes(notebook) for out in cell["outputs"]]
    return "\n".join([*texts, *("".join(text) for text in printed)])


@pytest.mark.slow
def test_the_main_notebook_trains_and_keeps_a_model_and_goes_on_with_it(tmp_path: Path) -> None:
    shown = execute("01_dreambooth", tmp_path)
    run = runs.resume(tmp_path / "runs" / "patch_dog")
    assert [row["step"] for row in run.log()] == [1, 2, 3, 4]
    assert (tmp_path / "models" / "patch_dog" / "unet").is_dir()
    assert "⚠" not in said(shown) and "Beginning a new run." in said(shown)
    assert "Finished at step 4." in said(shown) and "Chosen ★:" in said(shown)
    # The subject, the settings, the training with its bar, the slider and the playground.
    assert len(outputs(shown, "application/vnd.jupyter.widget-view+json")) >= 6
    # The session is lost before the last two steps: another one finds the run and goes on.
    shutil.rmtree(run.pipeline)
    shutil.rmtree(run.checkpoints()[4])
    again = execute("01_dreambooth", tmp_path)
    assert "Going on with runs/patch_dog: step 2 of 4" in said(again)
    assert [row["step"] for row in run.log()] == [1, 2, 3, 4]
    assert (run.pipeline / "model_index.json").exists()


@pytest.mark.slow
def test_the_study_compares_its_cells_and_recommends_one(tmp_path: Path) -> None:
    shown = execute("02_lambda_study", tmp_path)
    folder = tmp_path / "runs" / "lambda_study"
    for weight in ("0.0", "1.0"):
        run = runs.resume(folder / f"prior_weight={weight}")
        assert [row.step for row in watch.history(run)] == [0, 2, 4]
    assert len((folder / "table.csv").read_text().splitlines()) == 1 + 2 * 2
    assert len(outputs(shown, "image/png")) == 7  # curves, front, maps, contact sheets
    assert "stands highest of 4 settings" in said(shown) and "⚠" not in said(shown)


@pytest.mark.slow
def test_the_evaluation_has_a_table_beside_the_papers(tmp_path: Path) -> None:
    shown = execute("03_evaluation", tmp_path)
    rows = read_csv(tmp_path / "runs" / "evaluation" / "scores.csv")
    assert {row.method for row in rows} == {"base", "DreamBooth", REAL}
    assert {row.subject for row in rows} == {"patch_dog", "moon_mushroom"}
    (table,) = outputs(shown, "text/markdown")
    assert "| DreamBooth |" in "".join(table) and "| 0.774 | 0.885 |" in "".join(table)
    assert len(outputs(shown, "image/png")) == 1


@pytest.mark.slow
def test_a_loop_an_objective_and_a_measure_of_ones_own(tmp_path: Path) -> None:
    shown = execute("04_your_own", tmp_path)
    paper, own = (runs.resume(tmp_path / "runs/your_own" / name) for name in ("loop", "distilled"))
    assert [row["step"] for row in own.log()] == [1, 2, 3, 4]
    assert own.log()[0]["instance_loss"] == paper.log()[0]["instance_loss"]
    assert own.log()[0]["prior_loss"] != paper.log()[0]["prior_loss"]
    (table,) = outputs(shown, "text/markdown")
    assert "sameness (judge)" in "".join(table) and "⚠" not in said(shown)


def test_every_notebook_is_run() -> None:
    assert SHORT.keys() == NOTEBOOKS.keys()


@pytest.mark.parametrize("path", NOTEBOOKS.values(), ids=lambda path: path.stem)
def test_a_notebook_is_kept_short_and_without_outputs(path: Path) -> None:
    assert path.stat().st_size < 100_000
    notebook = json.loads(path.read_text())
    for cell in codes(notebook):
        assert not cell["outputs"] and cell["execution_count"] is None
    assert "widgets" not in notebook["metadata"]


@pytest.mark.parametrize("path", NOTEBOOKS.values(), ids=lambda path: path.stem)
def test_a_notebook_begins_with_its_parts_and_its_parameters_and_ends_with_assertions(
    path: Path,
) -> None:
    cells = json.loads(path.read_text())["cells"]
    first, *rest = map(source, cells)
    assert "| time | cost |" in first
    for line in first.splitlines():
        if "](#" in line:
            anchor = line.partition("](#")[2].rstrip(")")
            assert sum(f'id="{anchor}"' in text for text in rest) == 1
    setup, parameters, *_, last = [cell for cell in cells if cell["cell_type"] == "code"]
    assert "install_missing" in source(setup)
    assert parameters["metadata"]["tags"] == ["parameters"]
    assert source(last).count("assert ") >= 3
    # A cell is one idea: what it does is said above it, and it fits on a screen.
    assert all(len(cell["source"]) <= 24 for cell in cells)
