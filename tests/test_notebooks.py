"""The notebooks run from top to bottom on the embedded base, and are kept without outputs.

A cell passes over an error in a widget, so each notebook ends with assertions, and what the widgets
said is read from the executed notebook.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from fake_colab import FakeColab

from dreambooth_lib.core.config_checks import ConfigError
from dreambooth_lib.evaluation.demo import BUNDLED_SUBJECTS
from dreambooth_lib.evaluation.scores import REAL
from dreambooth_lib.evaluation.tables import read_csv
from dreambooth_lib.families import loading
from dreambooth_lib.notebook import colab, drive_backup, preflight, widgets
from dreambooth_lib.training import runs, validation_record

ROOT = Path(__file__).parent.parent
NOTEBOOKS = {path.stem: path for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}
#: What is shortened, and nothing else: lines after those of the parameters cell.
SHORT = {
    "01_dreambooth": 'SETTINGS = {"steps": 4, "class_images": 4, "validate_every": 2}',
    "02_lambda_study": "LAMBDAS, STEPS, CLASS_PICTURES = [0.0, 1.0], [2, 4], 4",
    "03_evaluation": 'SETTINGS = {"steps": 2, "class_images": 4, "validate_every": 0}\n'
    "PROTOCOL = dreambench.Protocol(pictures=1, class_images=2, steps=2)",
    "04_your_own": "STEPS, CLASS_PICTURES = 4, 4",
}


def source(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def codes(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


#: The newest packages, and Colab's versions, whose Python ``DREAMBOOTH_TEST_COLAB_PYTHON`` names.
PYTHONS = {"newest": sys.executable, "colab": os.environ.get("DREAMBOOTH_TEST_COLAB_PYTHON")}


@pytest.fixture(params=PYTHONS)
def python(request: pytest.FixtureRequest) -> str:
    found = PYTHONS[request.param]
    if found is None:
        pytest.skip("needs the second environment")
    return found


def write(name: str, folder: Path, parameters: str) -> Path:
    """A notebook in a folder, with more lines in its parameters cell."""
    notebook = json.loads(NOTEBOOKS[name].read_text())
    codes(notebook)[1]["source"] += ["\n", parameters]
    file = folder / f"{name}.ipynb"
    file.write_text(json.dumps(notebook))
    return file


def start(file: Path, python: str) -> subprocess.Popen:
    """Run a notebook from top to bottom; it is left with its outputs."""
    command = [python, "-m", "pytest", "--nbmake", "-q", "-p", "no:cacheprovider",
               "--nbmake-timeout=500", "--overwrite", file.name]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    # Output into a file: the kernel would keep a pipe open when only its parent ends.
    with file.with_suffix(".log").open("w") as log:
        return subprocess.Popen(command, cwd=file.parent, env=environment, stdout=log, stderr=log)


def execute(name: str, folder: Path, python: str = sys.executable) -> dict[str, Any]:
    """Run a shortened notebook in a folder; gives it with its outputs."""
    file = write(name, folder, SHORT[name])
    assert start(file, python).wait() == 0, file.with_suffix(".log").read_text()[-3000:]
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
def test_the_main_notebook_trains_and_keeps_a_model(tmp_path: Path, python: str) -> None:
    shown = execute("01_dreambooth", tmp_path, python)
    run = runs.resume(tmp_path / "runs" / "patch_dog")
    assert [row["step"] for row in run.log()] == [1, 2, 3, 4]
    assert (tmp_path / "models" / "patch_dog" / "unet").is_dir()
    assert "⚠" not in said(shown) and "Starting a new run." in said(shown)
    assert "Finished at step 4." in said(shown) and "Chosen ★:" in said(shown)
    assert (tmp_path / "models" / "patch_dog.safetensors").stat().st_size > 1e6
    assert "Neither program can run it" in said(shown), "the embedded base has no released size"
    # The subject, the settings, the training with its bar, the slider and the playground.
    assert len(outputs(shown, "application/vnd.jupyter.widget-view+json")) >= 6


@pytest.mark.slow
def test_the_main_notebook_trains_and_keeps_a_lora(tmp_path: Path) -> None:
    settings = '"steps": 4, "validate_every": 2, "method": "lora", "prior": "distilled"'
    file = write("01_dreambooth", tmp_path, f"SETTINGS = {{{settings}}}")
    assert start(file, sys.executable).wait() == 0, file.with_suffix(".log").read_text()[-3000:]
    shown = json.loads(file.read_text())
    assert "Finished at step 4." in said(shown) and "⚠" not in said(shown)
    assert "load_lora_weights" in said(shown)
    (weights,) = (tmp_path / "models" / "patch_dog").glob("*.safetensors")
    assert not (tmp_path / "runs" / "class_images").exists(), "none are needed"
    assert 1e5 < weights.stat().st_size < 1e7
    assert 1e5 < (tmp_path / "models" / "patch_dog.safetensors").stat().st_size < 1e7


@pytest.mark.slow
def test_run_all_after_a_kernel_was_killed_goes_on_with_its_run(tmp_path: Path) -> None:
    settings = 'SETTINGS = {"steps": 30, "class_images": 4, "validate_every": 3}'
    file, folder = write("01_dreambooth", tmp_path, settings), tmp_path / "runs" / "patch_dog"
    first = start(file, sys.executable)
    while not list(folder.glob("checkpoints/[0-9]*")):
        assert first.poll() is None, file.with_suffix(".log").read_text()[-3000:]
        time.sleep(0.1)
    (kernel,) = [child for child in psutil.Process(first.pid).children(recursive=True)
                 if any("ipykernel" in word for word in child.cmdline())]  # fmt: skip
    kernel.kill()
    assert first.wait() != 0, "the notebook's own process sees a dead kernel"
    reached = max(runs.resume(folder).checkpoints())
    assert 0 < reached < 30
    assert start(file, sys.executable).wait() == 0
    assert f"Resuming runs/patch_dog: step {reached} of 30" in said(json.loads(file.read_text()))
    run = runs.resume(folder)
    assert [row["step"] for row in run.log()] == list(range(1, 31))
    assert (run.pipeline / "model_index.json").exists()


@pytest.mark.slow
def test_the_study_compares_its_cells_and_recommends_one(tmp_path: Path, python: str) -> None:
    shown = execute("02_lambda_study", tmp_path, python)
    folder = tmp_path / "runs" / "lambda_study_patch_dog_toybox"
    for weight in ("0.0", "1.0"):
        run = runs.resume(folder / f"prior_weight={weight}")
        assert [row.step for row in validation_record.history(run)] == [0, 2, 4]
    assert len((folder / "table.csv").read_text().splitlines()) == 1 + 2 * 2
    assert len(outputs(shown, "image/png")) == 7  # curves, front, maps, contact sheets
    assert "has the highest score of 4 settings" in said(shown) and "⚠" not in said(shown)
    assert "SETTINGS = {'prior_weight': " in said(shown)


@pytest.mark.slow
def test_the_evaluation_has_a_table_beside_the_papers(tmp_path: Path, python: str) -> None:
    shown = execute("03_evaluation", tmp_path, python)
    rows = read_csv(tmp_path / "runs" / "evaluation_toybox" / "scores.csv")
    assert {row.method for row in rows} == {"base", "DreamBooth", REAL}
    assert {row.subject for row in rows} == {"patch_dog", "moon_mushroom"}
    (table,) = outputs(shown, "text/markdown")
    assert "| DreamBooth |" in "".join(table) and "| 0.774 | 0.885 |" in "".join(table)
    assert "likeness to the photos ↑ (judge)" in "".join(table)
    assert len(outputs(shown, "image/png")) == 1


@pytest.mark.slow
def test_a_study_of_one_weight_and_an_evaluation_of_ones_own_pictures(tmp_path: Path) -> None:
    """As their texts say that they can be changed, and run twice, as after Run All again."""
    own = f'PICTURES, CLASS_NOUN = "{BUNDLED_SUBJECTS / "candy_turtle"}", "turtle"'
    changes = {
        "02_lambda_study": "LAMBDAS, STEPS, CLASS_PICTURES = [0.5], [2], 4",
        "03_evaluation": f"{SHORT['03_evaluation']}\n{own}",
    }
    for name, parameters in changes.items():
        for _ in range(2):
            file = write(name, tmp_path, parameters)
            assert start(file, sys.executable).wait() == 0, file.with_suffix(".log").read_text()
    rows = read_csv(tmp_path / "runs" / "evaluation_toybox" / "scores.csv")
    assert {row.subject for row in rows} == {"candy_turtle"}


@pytest.mark.slow
def test_a_loop_an_objective_and_a_measure_of_ones_own(tmp_path: Path, python: str) -> None:
    shown = execute("04_your_own", tmp_path, python)
    folder = tmp_path / "runs" / "your_own_patch_dog_toybox"
    paper, own, aura = (runs.resume(folder / n) for n in ("loop", "distilled", "aura_flow"))
    assert [row["step"] for row in own.log()] == [1, 2, 3, 4]
    assert own.log()[0]["instance_loss"] == paper.log()[0]["instance_loss"]
    assert own.log()[0]["prior_loss"] != paper.log()[0]["prior_loss"]
    (table,) = outputs(shown, "text/markdown")
    assert "sameness (judge)" in "".join(table) and "⚠" not in said(shown)
    assert (aura.pipeline / "pytorch_lora_weights.safetensors").exists() and len(aura.log()) == 2


def test_the_page_on_families_has_the_notebooks_family_and_every_shipped_one() -> None:
    page = (ROOT / "docs" / "families.md").read_text()
    cells = codes(json.loads(NOTEBOOKS["04_your_own"].read_text()))
    (family,) = [source(cell) for cell in cells if "class AuraFlow(Family)" in source(cell)]
    assert family in page
    for pipeline, (module, _) in loading.FAMILIES.items():
        assert f"| `{pipeline}` | `{module}` |" in page


def run_cells(scope: dict[str, Any], parameters: str, *marks: str) -> dict[str, Any]:
    """Run the main notebook's parameters, then its cells that have these marks, in this process."""
    _, first, *cells = map(source, codes(json.loads(NOTEBOOKS["01_dreambooth"].read_text())))
    exec(f"{first}\n{parameters}", scope)
    for mark in marks:
        (cell,) = [cell for cell in cells if mark in cell]
        exec(cell, scope)
    return scope


def test_the_practice_settings_are_the_embedded_bases_alone() -> None:
    first = source(codes(json.loads(NOTEBOOKS["01_dreambooth"].read_text()))[1])
    scopes: list[dict[str, Any]] = [{}, {}]
    exec(first, scopes[0])
    exec(first.replace('BASE = "toybox"', 'BASE = "owner/name"'), scopes[1])
    assert scopes[0]["SETTINGS"]["steps"] == 300 and scopes[1]["SETTINGS"] == {}


def test_after_a_disconnect_an_upload_is_not_asked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake_colab: FakeColab
) -> None:
    monkeypatch.chdir(tmp_path)
    bundled = loading.BUNDLED / "subjects" / "patch_dog"
    fake_colab.uploads = {path.name: path.read_bytes() for path in bundled.glob("*.png")}
    marks = ("cut_off", "SubjectPanel")
    asked = "UPLOAD, SETTINGS = True, {}"
    scope = {
        "drive": colab.mount_drive(),
        "colab": colab,
        "preflight": preflight,
        "widgets": widgets,
    }
    said = run_cells(dict(scope), asked, *marks)
    assert fake_colab.asked.count("upload") == 1 and said["found"] is None
    run = runs.start(said["subject"].config, tmp_path / "runs" / "mine")
    assert drive_backup.backup(run, scope["drive"] / "mine") is None
    for folder in ("runs", "photos"):
        shutil.rmtree(tmp_path / folder)
    back = run_cells(dict(scope), asked, *marks)
    assert fake_colab.asked.count("upload") == 1 and back["name"] == "mine"
    pictures = back["subject"].config.subject.pictures
    assert pictures == str(tmp_path / "runs" / "mine" / "photos")
    assert (
        runs.start_or_resume(back["subject"].config, tmp_path / "runs" / "mine").config.steps == 500
    )


def test_outside_colab_the_upload_is_the_panels_button(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    scope = {"drive": None, "colab": colab, "preflight": preflight, "widgets": widgets}
    run_cells(scope, "UPLOAD = True", "cut_off", "SubjectPanel")
    assert "use the button below" in capsys.readouterr().out


def test_a_run_beside_another_of_its_name_is_called_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(widgets, "monitor", lambda run: iter(()))
    marks = ("cut_off", "SubjectPanel", "SettingsPanel", "widgets.monitor")
    scope = {"drive": None, "colab": colab, "preflight": preflight, "widgets": widgets}
    first = run_cells(dict(scope), "", *marks)["run"]
    assert first.folder == Path("runs/patch_dog")
    assert run_cells(dict(scope), "", *marks)["run"].folder == first.folder, "it was cut off"
    assert run_cells(dict(scope), "RESUME = False", *marks)["name"] == "patch_dog-2"
    assert run_cells(dict(scope), "RESUME, NAME = False, 'rex'", *marks)["name"] == "rex"
    assert run_cells(dict(scope), "CLASS_NOUN = 'fox'", *marks)["name"] == "patch_dog-3"
    changed = run_cells(dict(scope), "RESUME, NAME = False, 'rex'", *marks[:3])
    changed["name"] = "rex"  # as if this cell had run before
    changed["settings"].controls["method"].value = "lora"
    run_cells(changed, "RESUME, NAME = False, 'rex'", marks[3])
    assert changed["name"] == "rex-2", "a LoRA cannot go on with the whole model's run"
    said = capsys.readouterr().out
    assert "Not resumed: runs/rex: step 0 of 300" in said and "This run is called rex." in said


def test_run_again_the_subjects_cell_keeps_what_the_settings_follow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    trained: list[str] = []
    monkeypatch.setattr(
        widgets, "monitor", lambda run: trained.append(run.config.subject.pictures) or iter(())
    )
    scope = {"drive": None, "colab": colab, "preflight": preflight, "widgets": widgets}
    run_cells(scope, "", "cut_off", "SubjectPanel", "SettingsPanel")
    other = str(loading.BUNDLED / "subjects" / "candy_turtle")
    scope["subject"].source.value = other
    cells = [source(c) for c in codes(json.loads(NOTEBOOKS["01_dreambooth"].read_text()))]
    (chosen,), (training,) = ([c for c in cells if mark in c]
                              for mark in ("SubjectPanel", "widgets.monitor"))  # fmt: skip
    exec(chosen, scope)
    exec(training, scope)
    shown = scope["subject"].config.subject.pictures
    assert trained == [shown] == [other], "what is trained on is what step 2 shows"
    scope["config"] = scope["config"].replace(steps=7)  # as after another cell above
    exec(chosen, scope)
    with pytest.raises(ConfigError, match="run the cell of step 3 again"):
        exec(training, scope)
    assert trained == [other]


def test_the_first_cell_is_the_same_in_all_notebooks() -> None:
    firsts = {source(codes(json.loads(path.read_text()))[0]) for path in NOTEBOOKS.values()}
    assert len(firsts) == 1 and "install_missing" in firsts.pop()


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
    assert all(len(cell["source"]) <= 28 for cell in cells)
