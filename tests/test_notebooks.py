"""Run the notebooks from top to bottom on the bundled base, and check that they have no outputs.

An error in a widget does not stop its cell, so each notebook gets a last cell with assertions here,
and these tests read what the widgets show from the executed notebook.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from fake_colab import FakeColab

import dreambooth_lib as db
from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.core.config_types import ConfigError
from dreambooth_lib.core.disk import DiskError
from dreambooth_lib.core.errors import KitError
from dreambooth_lib.core.subject import Subject
from dreambooth_lib.evaluation import scores, sweep_table, tables
from dreambooth_lib.evaluation.demo import BUNDLED_SUBJECTS
from dreambooth_lib.evaluation.scores import REAL
from dreambooth_lib.evaluation.tables import read_csv
from dreambooth_lib.export import comfyui, model_card, pipeline_folder, zip_download
from dreambooth_lib.families import loading
from dreambooth_lib.metrics.encoders import Encoder
from dreambooth_lib.notebook import (
    base_models,
    colab,
    drive_backup,
    order,
    preflight,
    widgets,
)
from dreambooth_lib.training import runs, validation, validation_record

ROOT = Path(__file__).parent.parent
NOTEBOOKS = {path.stem: path for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}
#: Lines added to the parameters cell, which only shorten the notebook.
SHORT = {
    "01_dreambooth": 'SETTINGS = {"steps": 4, "class_images": 4, "validate_every": 2}',
    "02_lambda_study": "LAMBDAS, STEPS, CLASS_IMAGES = [0.0, 1.0], [2, 4], 4",
    "03_evaluation": 'SETTINGS = {"steps": 2, "class_images": 4, "validate_every": 0}\n'
    "PROTOCOL = dreambench.Protocol(images_per_prompt=1, class_images=2, steps=2)",
    "04_your_own": "STEPS, CLASS_IMAGES = 4, 4",
}

#: Marks of notebook 01's cells from the run's config to its training.
UP_TO_TRAINING = ("find_interrupted", "SubjectPanel", "SettingsPanel", "widgets.monitor")

#: Added to each parameters cell: no picture takes more than two steps to draw.
QUICK = """
from dreambooth_lib.families.base import Family as _Family
_generate = _Family.generate
_Family.generate = lambda own, pairs, steps, *rest, **named: _generate(
    own, pairs, min(steps, 2), *rest, **named
)
"""

#: Run as the last cell of each notebook.
CHECKS = {
    "01_dreambooth": """
play.check()
last, validated = run.log()[-1]["step"], {row.step for row in db.history(run)}
assert last == max(run.checkpoints()) <= run.config.steps, "the last step has no checkpoint"
assert {0, slider.best.step} <= validated, "the base or the best step was not validated"
assert (chosen / "README.md").exists(), "the saved model has no card"
assert (chosen / "samples.png").exists(), "the model card has no images"
assert loading.locate(str(run.folder)) == str(run.pipeline), "the run has no model"
assert archive.stat().st_size > 1e5, "the zip is too small to hold a model"
assert {"base", f"{name}, step {slider.step}"} == set(play.gallery[0].images), "it drew not both"
""",
    "02_lambda_study": """
play.check()
assert len(rows) == len(LAMBDAS) * len(STEPS), "a row is missing: a training failed"
assert (FOLDER / "table.csv").exists(), "the table was not written"
assert (FOLDER / "failures.json").read_text() == "{}", "a training failed, see failures.json"
assert play.gallery, "the playground drew nothing"
""",
    "03_evaluation": """
prompts = sum(len(bench.prompts_for(subject)) for subject in bench.subjects)
fidelity = {mean.method: mean.value for mean in means if mean.measure == "subject_fidelity"}
assert len(bench.subjects) == (1 if PHOTOS else len(SUBJECTS)), "a subject is missing"
assert (OUT / "scores.csv").exists(), "the scores were not written"
assert len(scored) == prompts * PROTOCOL.images_per_prompt, "an image has no score"
assert set(fidelity) == {scores.REAL, *methods}, "a method has no row in the table"
""",
    "04_your_own": """
from safetensors.torch import load_file

assert max(distilled.checkpoints()) == STEPS, "the distilled run did not finish"
assert (distilled.pipeline / "model_index.json").exists(), "it saved no pipeline"
first = {name: tuned.log()[0]["prior_loss"] for name, tuned in (("own", distilled), ("paper", run))}
assert first["own"] < 1e-4 < first["paper"], "distillation does not start at the base"
measured = {row.method for row in rows if row.measure == "sameness"}
assert measured == set(methods), "a method has no row of the new metric"
lora = load_file(aura.pipeline / "pytorch_lora_weights.safetensors")
trained = [bool(weight.abs().max() > 0) for name, weight in lora.items() if "lora_B" in name]
assert trained and all(trained), "the new family saved no LoRA, or one that did not train"
""",
}


def source(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def codes(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


#: The newest packages, and Colab's versions, whose Python ``DREAMBOOTH_TEST_COLAB_PYTHON`` names.
PYTHONS = {"newest": sys.executable, "colab": os.environ.get("DREAMBOOTH_TEST_COLAB_PYTHON")}


@pytest.fixture(params=PYTHONS)
def python(request: pytest.FixtureRequest) -> str:
    path = PYTHONS[request.param]
    if path is None:
        pytest.skip("needs the second environment")
    return path


def write(name: str, folder: Path, parameters: str) -> Path:
    """Write a notebook to a folder, with more lines in its parameters cell and a cell of checks."""
    notebook = json.loads(NOTEBOOKS[name].read_text())
    codes(notebook)[1]["source"] += ["\n", parameters, QUICK]
    notebook["cells"].append({"cell_type": "code", "id": "checks", "metadata": {}, "outputs": [],
                              "execution_count": None, "source": CHECKS[name]})  # fmt: skip
    file = folder / f"{name}.ipynb"
    file.write_text(json.dumps(notebook))
    return file


def start(file: Path, python: str) -> subprocess.Popen:
    """Start a notebook from top to bottom; its outputs are saved in the file."""
    command = [python, "-m", "pytest", "--nbmake", "-q", "-p", "no:cacheprovider",
               "--nbmake-timeout=500", "--overwrite", file.name]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    # Not into a pipe, which the kernel would keep open after its parent has ended.
    with file.with_suffix(".log").open("w") as log:
        return subprocess.Popen(command, cwd=file.parent, env=environment, stdout=log, stderr=log)


def execute(name: str, folder: Path, python: str = sys.executable) -> dict[str, Any]:
    """Run a shortened notebook in a folder; return it with its outputs."""
    file = write(name, folder, SHORT[name])
    assert start(file, python).wait() == 0, file.with_suffix(".log").read_text()[-3000:]
    return json.loads(file.read_text())


def outputs(notebook: dict[str, Any], kind: str) -> list[Any]:
    """Return all outputs of one MIME type, such as "image/png", cell by cell."""
    shown = [out.get("data", {}) for cell in codes(notebook) for out in cell["outputs"]]
    return [data[kind] for data in shown if kind in data]


def text_of(notebook: dict[str, Any]) -> str:
    """Return every text that a widget showed at the end or a cell printed."""
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
    assert "⚠" not in text_of(shown) and "Starting a new run." in text_of(shown)
    assert "Finished at step 4." in text_of(shown) and "According to the scores: " in text_of(shown)
    assert not (tmp_path / "models" / "patch_dog.safetensors").exists()
    assert "Neither program can run a model of the bundled base" in text_of(shown)
    # The subject, the settings, the training with its bar, the slider and the playground.
    assert len(outputs(shown, "application/vnd.jupyter.widget-view+json")) >= 6


@pytest.mark.slow
def test_the_main_notebook_trains_and_keeps_a_lora(tmp_path: Path) -> None:
    settings = '"steps": 4, "validate_every": 2, "method": "lora", "prior": "distilled"'
    file = write("01_dreambooth", tmp_path, f"SETTINGS = {{{settings}}}")
    assert start(file, sys.executable).wait() == 0, file.with_suffix(".log").read_text()[-3000:]
    shown = json.loads(file.read_text())
    assert "Finished at step 4." in text_of(shown) and "⚠" not in text_of(shown)
    assert "load_lora_weights" in text_of(shown)
    (weights,) = (tmp_path / "models" / "patch_dog").glob("*.safetensors")
    assert not (tmp_path / "runs" / "class_images").exists(), "none are needed"
    assert 1e5 < weights.stat().st_size < 1e7


@pytest.mark.slow
def test_run_all_resumes_the_run_of_a_killed_kernel(tmp_path: Path) -> None:
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
    assert f"Resuming runs/patch_dog: step {reached} of 30" in text_of(json.loads(file.read_text()))
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
    assert len(outputs(shown, "image/png")) == 11  # curves, front, maps and sheets of both studies
    assert "has the highest score of 4 settings" in text_of(shown) and "⚠" not in text_of(shown)
    assert "SETTINGS |= {'prior_weight': " in text_of(shown)


def test_a_study_of_few_images_rules_no_weight_out_that_their_noise_may_have_lowered() -> None:
    cells = map(source, codes(json.loads(NOTEBOOKS["02_lambda_study"].read_text())))
    (cell,) = [cell for cell in cells if "by_chance if" in cell or "by_chance**2" in cell]
    rows = [dict.fromkeys(sweep_table.MEASURES, 0.5)
            | {"cell": "", "prior_weight": weight, "step": step, "score": score}
            for step in (50, 100)
            for weight, score in ((0.0, 0.4), (0.5, 0.7), (1.0, 0.6))]  # fmt: skip
    scope = {"rows": rows, "by_chance": 0.024, "BASE": "toybox", "sweep_table": sweep_table}
    exec(cell, scope)
    reason = scope["best"].reason
    assert "about 0.055" in reason and "(λ can be 0.5 or 1); λ 0 is worse at every step" in reason


@pytest.mark.slow
def test_the_evaluation_has_a_table_beside_the_papers(tmp_path: Path, python: str) -> None:
    shown = execute("03_evaluation", tmp_path, python)
    rows = read_csv(tmp_path / "runs" / "evaluation_toybox" / "scores.csv")
    assert {row.method for row in rows} == {"base", "DreamBooth", REAL}
    assert {row.subject for row in rows} == {"patch_dog", "moon_mushroom"}
    (table,) = outputs(shown, "text/markdown")
    assert "| DreamBooth |" in "".join(table) and "| 0.774 | 0.885 |" in "".join(table)
    assert "likeness to the photos ↑ (toybox)" in "".join(table)
    assert len(outputs(shown, "image/png")) == 1


@pytest.mark.slow
def test_a_study_of_one_weight_and_an_evaluation_of_your_own_photos(tmp_path: Path) -> None:
    """Change what the notebooks say can be changed, and run each twice, as by Run All again."""
    own = f'PHOTOS, CLASS_NOUN = "{BUNDLED_SUBJECTS / "candy_turtle"}", "turtle"'
    changes = {
        "02_lambda_study": "LAMBDAS, STEPS, CLASS_IMAGES = [0.5], [2], 4",
        "03_evaluation": f"{SHORT['03_evaluation']}\n{own}",
    }
    for name, parameters in changes.items():
        for _ in range(2):
            file = write(name, tmp_path, parameters)
            assert start(file, sys.executable).wait() == 0, file.with_suffix(".log").read_text()
    rows = read_csv(tmp_path / "runs" / "evaluation_toybox" / "scores.csv")
    assert {row.subject for row in rows} == {"candy_turtle"}


@pytest.mark.slow
def test_your_own_loop_loss_and_metric(tmp_path: Path, python: str) -> None:
    shown = execute("04_your_own", tmp_path, python)
    folder = tmp_path / "runs" / "your_own_patch_dog_toybox"
    paper, own, aura = (runs.resume(folder / n) for n in ("loop", "distilled", "aura_flow"))
    assert [row["step"] for row in own.log()] == [1, 2, 3, 4]
    assert own.log()[0]["instance_loss"] == paper.log()[0]["instance_loss"]
    assert own.log()[0]["prior_loss"] != paper.log()[0]["prior_loss"]
    (table,) = outputs(shown, "text/markdown")
    assert "sameness (scorer)" in "".join(table) and "⚠" not in text_of(shown)
    assert (aura.pipeline / "pytorch_lora_weights.safetensors").exists() and len(aura.log()) == 2


def test_the_page_on_families_has_the_notebooks_family_and_every_bundled_one() -> None:
    page = (ROOT / "docs" / "families.md").read_text()
    cells = codes(json.loads(NOTEBOOKS["04_your_own"].read_text()))
    (family,) = [source(cell) for cell in cells if "class AuraFlow(Family)" in source(cell)]
    assert family in page
    for pipeline, (module, _) in loading.FAMILIES.items():
        assert f"| `{pipeline}` | `{module}` |" in page


def test_the_notebooks_own_loss_moves_the_mark_of_class_images_to_the_gpu() -> None:
    """A batch's mark is on the CPU; the meta device stands for another one."""
    cells = map(source, codes(json.loads(NOTEBOOKS["04_your_own"].read_text())))
    (cell,) = [cell for cell in cells if "class PriorDistillation" in cell]
    scope: dict[str, Any] = {}
    exec(cell, scope)
    x_t = torch.empty(2, 4, 8, 8, device="meta")
    base = SimpleNamespace(predict=lambda x_t, t, cond: x_t)
    noised = SimpleNamespace(x_t=x_t, t=None, target=x_t)
    batch = SimpleNamespace(noised=noised, cond={}, is_prior=torch.tensor([False, True]))
    loss = object.__new__(scope["PriorDistillation"])
    loss.base = base
    assert loss.target(batch).shape == x_t.shape


def run_cells(scope: dict[str, Any], parameters: str, *marks: str) -> dict[str, Any]:
    """Run notebook 01's parameters cell and the cells with these marks in this process."""
    _, first, *cells = map(source, codes(json.loads(NOTEBOOKS["01_dreambooth"].read_text())))
    exec(f"{first}\n{parameters}", scope)
    for mark in marks:
        (cell,) = [cell for cell in cells if mark in cell]
        exec(cell, scope)
    return scope


def test_the_practice_settings_are_for_the_bundled_base_only() -> None:
    first = source(codes(json.loads(NOTEBOOKS["01_dreambooth"].read_text()))[1])
    scopes: list[dict[str, Any]] = [{}, {}]
    exec(first, scopes[0])
    exec(first.replace('BASE = "toybox"', 'BASE = "owner/name"'), scopes[1])
    assert scopes[0]["SETTINGS"]["steps"] == 300 and scopes[1]["SETTINGS"] == {}


def test_the_things_that_the_practice_base_draws_are_listed() -> None:
    cells = json.loads(NOTEBOOKS["01_dreambooth"].read_text())["cells"]
    (listed,) = re.findall(r"The 48 things: ([^.]*)\.", "\n".join(map(source, cells)))
    labels = json.loads((loading.BUNDLED / "toybox/classifier/config.json").read_text())["id2label"]
    classes = [name.removeprefix("class: ") for name in labels.values() if "class: " in name]
    assert listed.replace("\n", " ").split(", ") == sorted(classes) and len(classes) == 48


def test_after_a_disconnect_photos_need_no_second_upload(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake_colab: FakeColab
) -> None:
    monkeypatch.chdir(tmp_path)
    bundled = loading.BUNDLED / "subjects" / "patch_dog"
    fake_colab.uploads = {path.name: path.read_bytes() for path in bundled.glob("*.png")}
    marks = ("find_interrupted", "SubjectPanel")
    parameters = "UPLOAD, SETTINGS = True, {}"
    scope = {
        "drive": colab.mount_drive(),
        "colab": colab,
        "preflight": preflight,
        "widgets": widgets,
    }
    first = run_cells(dict(scope), parameters, *marks)
    assert fake_colab.asked.count("upload") == 1 and first["interrupted"] is None
    run = runs.start(first["subject"].config, tmp_path / "runs" / "mine")
    assert drive_backup.backup(run, scope["drive"] / "mine") is None
    for folder in ("runs", "photos"):
        shutil.rmtree(tmp_path / folder)
    resumed = run_cells(dict(scope), parameters, *marks)
    assert fake_colab.asked.count("upload") == 1 and resumed["name"] == "mine"
    config = resumed["subject"].config
    assert config.subject.photos == str(tmp_path / "runs" / "mine" / "photos")
    assert runs.start_or_resume(config, tmp_path / "runs" / "mine").config.steps == 500


def test_a_run_resumed_in_place_of_an_upload_says_that_its_photos_were_not_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake_colab: FakeColab,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    bundled = loading.BUNDLED / "subjects" / "patch_dog"
    runs.start(TrainConfig(Subject(str(bundled), "dog")), tmp_path / "runs" / "mine")
    scope = {"drive": None, "colab": colab, "preflight": preflight, "widgets": widgets}
    for mark in ("find_interrupted", "SubjectPanel"):
        run_cells(scope, "UPLOAD = True", mark)
        told = " ".join(capsys.readouterr().out.split())
        assert "Resuming runs/mine: step 0 of 500" in told
        assert "Its photos were not compared; for other photos set RESUME = False and run" in told
    run_cells(scope, "", "find_interrupted", "SubjectPanel")
    assert "not compared" not in capsys.readouterr().out, "they are those of PHOTOS"


def test_run_all_resumes_the_interrupted_run_of_photos_chosen_in_the_panel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a reload of JupyterLab's page: press the button, then run all cells."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(widgets, "monitor", lambda run: iter(()))
    marks = ("find_interrupted", "SubjectPanel", "SettingsPanel", "widgets.monitor")
    scope = {"drive": None, "colab": colab, "preflight": preflight, "widgets": widgets}
    run_cells(scope, "", *marks[:3])
    bundled = loading.BUNDLED / "subjects" / "patch_dog"
    photos = {path.name: path.read_bytes() for path in list(bundled.glob("*.png"))[:3]}
    scope["subject"].use(photos)
    run_cells(scope, "", marks[3])
    scope["run"].save_checkpoint(1, {"step": 1})
    assert scope["name"] == "my_dog"
    assert run_cells(scope, "", *marks)["name"] == "my_dog"
    assert run_cells(scope, "RESUME = False", *marks)["name"] == "my_dog-2"
    scope["subject"].use(dict(list(photos.items())[:2]))
    assert run_cells(scope, "", *marks)["name"] == "my_dog-3", "other photos"


def test_outside_colab_the_upload_is_the_panels_button(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    scope = {"drive": None, "colab": colab, "preflight": preflight, "widgets": widgets}
    run_cells(scope, "UPLOAD = True", "find_interrupted", "SubjectPanel")
    assert "use the button below" in capsys.readouterr().out


def test_a_new_run_gets_a_free_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(widgets, "monitor", lambda run: iter(()))
    marks = UP_TO_TRAINING
    scope = {"drive": None, "colab": colab, "preflight": preflight, "widgets": widgets}
    first = run_cells(dict(scope), "", *marks)["run"]
    assert first.folder == Path("runs/patch_dog").absolute()
    assert run_cells(dict(scope), "", *marks)["run"].folder == first.folder, "it was interrupted"
    assert run_cells(dict(scope), "RESUME = False", *marks)["name"] == "patch_dog-2"
    assert run_cells(dict(scope), "RESUME, NAME = False, 'rex'", *marks)["name"] == "rex"
    assert run_cells(dict(scope), "CLASS_NOUN = 'fox'", *marks)["name"] == "patch_dog-3"
    first.pipeline.mkdir()
    (first.pipeline / "model_index.json").write_text("{}")
    assert run_cells(dict(scope), "RESUME = 'patch_dog'", *marks)["run"].folder == first.folder
    changed = run_cells(dict(scope), "RESUME, NAME = False, 'rex'", *marks[:3])
    changed["name"] = "rex"  # as if this cell had run before, up to the first checkpoint
    runs.resume("runs/rex").save_checkpoint(1, {"step": 1})
    changed["settings"].controls["method"].value = "lora"
    run_cells(changed, "RESUME, NAME = False, 'rex'", marks[3])
    assert changed["name"] == "rex-2", "a LoRA cannot resume the run of a full model"
    printed = capsys.readouterr().out
    assert "Not resumed: runs/rex: step 0 of 300" in printed
    assert "This run is called rex." in printed


@pytest.mark.parametrize("error", [KeyboardInterrupt(), DiskError("the disk is full")])
def test_a_run_that_ends_early_is_copied_to_drive(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake_colab: FakeColab
) -> None:
    def monitor(run: runs.Run) -> Iterator[SimpleNamespace]:
        for step in (1, 2):
            run.save_checkpoint(step, {"step": step})
            yield SimpleNamespace(saved=step == 1)
        raise error

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(widgets, "monitor", monitor)
    drive = colab.mount_drive()
    scope = {"drive": drive, "colab": colab, "preflight": preflight, "widgets": widgets}
    with pytest.raises(type(error)):
        run_cells(scope, "", *UP_TO_TRAINING)
    assert list(runs.resume(drive / "patch_dog").checkpoints()) == [2]


def test_a_run_that_got_its_name_without_drive_leaves_another_ones_backup_and_zip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake_colab: FakeColab
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(widgets, "monitor", lambda run: iter(()))
    monkeypatch.setattr(pipeline_folder, "write_model", lambda *given: tmp_path / "patch_dog.zip")
    monkeypatch.setattr(model_card, "usage", lambda *given: "")
    scope = {"drive": None, "colab": colab, "preflight": preflight, "widgets": widgets}
    run_cells(scope, "RESUME = False", *UP_TO_TRAINING)
    assert scope["run"].folder == tmp_path / "runs" / "patch_dog"
    drive = scope["drive"] = colab.mount_drive()
    shutil.copytree(scope["run"].folder, drive / "patch_dog")  # of yesterday
    (drive / "patch_dog" / ".backup").write_text("0" * 32)
    (drive / "patch_dog.zip").write_bytes(b"yesterday's")
    (tmp_path / "patch_dog.zip").write_bytes(b"today's")
    before = [path.stat().st_mtime_ns for path in (drive / "patch_dog").rglob("*")]
    for mark in ("# @title Save the model", "# @title Upload the model", "widgets.monitor") * 2:
        scope["slider"] = SimpleNamespace(step=4)
        run_cells(scope, "RESUME = False", mark)
    assert before == [path.stat().st_mtime_ns for path in (drive / "patch_dog").rglob("*")]
    assert (drive / "patch_dog.zip").read_bytes() == b"yesterday's"
    assert (drive / "patch_dog-2.zip").read_bytes() == b"today's"
    assert runs.resume(drive / "patch_dog-2").config.base == "toybox"
    assert len(list(drive.iterdir())) == 4


def test_an_upload_that_is_stopped_costs_no_copy_on_drive(tmp_path: Path) -> None:
    def stopped() -> bool:
        raise KeyboardInterrupt

    (tmp_path / "drive").mkdir()
    (tmp_path / "dog.zip").write_bytes(b"a model")
    scope: dict[str, Any] = {
        "archive": tmp_path / "dog.zip", "drive": tmp_path / "drive", "run": None,
        "zip_download": zip_download, "hub": SimpleNamespace(login=stopped, HubError=KitError),
        "drive_worker": SimpleNamespace(place_on=lambda drive, run: drive / "dog"),
    }  # fmt: skip
    cells = map(source, codes(json.loads(NOTEBOOKS["01_dreambooth"].read_text())))
    (cell,) = [cell for cell in cells if "# @title Upload the model" in cell]
    with pytest.raises(KeyboardInterrupt):
        exec(cell.replace('HUB = ""', 'HUB = "me/my-dog"'), scope)
    assert (tmp_path / "drive" / "dog.zip").read_bytes() == b"a model"


def test_a_run_that_is_opened_by_its_name_has_its_own_base_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pictures = str(loading.BUNDLED / "subjects" / "patch_dog")
    other = db.TrainConfig(db.Subject(pictures, "dog", "ohwx"), "owner/name", method="lora")
    monkeypatch.setattr(loading, "resolve", None)  # what would load it
    runs.start(other, "runs/other")
    scope = {"drive": None, "preflight": preflight, "display": lambda table: None}
    asked: list[Any] = []

    def check(*given: Any) -> list[preflight.Check]:
        asked.append(given)
        return [preflight.Check("GPU", False, "none")]

    monkeypatch.setattr(preflight, "preflight", check)
    with pytest.raises(preflight.NotReady):
        run_cells(scope, "RESUME = 'other'", "find_interrupted")
    assert "config" not in scope
    assert asked[0][0] == "owner/name" and asked[0][4] == "other"
    assert asked[0][3]["method"] == "lora" and asked[0][3]["quantize"] is None
    run_cells(scope, "RESUME, SKIP_CHECKS = 'other', True", "find_interrupted")
    assert scope["config"].base == "owner/name" and len(asked) == 2
    run_cells(scope, "RESUME, BASE = 'other', 'owner/name'", "find_interrupted")
    assert len(asked) == 2, "it was checked in the cell before"


def test_a_playgrounds_models_are_freed_before_memory_is_measured_or_needed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    held = []
    loaded = widgets.loaded_models.LOADED

    def seen(*given: Any) -> list[Any]:
        held.append(dict(loaded))
        return []

    monkeypatch.setattr(preflight, "preflight", seen)
    monkeypatch.setitem(loaded, "toybox", None)
    run_cells({"display": lambda table: None}, "", "preflight.preflight(BASE")
    loaded["toybox"] = None
    monkeypatch.setattr(validation, "plan_for", lambda *given, **options: None)
    fakes = {"sweep": SimpleNamespace(sweep=seen), "sweep_table": SimpleNamespace(table=seen)}
    cells = map(source, codes(json.loads(NOTEBOOKS["02_lambda_study"].read_text())))
    (cell,) = [cell for cell in cells if "sweep.sweep(" in cell]
    names = dict.fromkeys(("config", "SEEDS", "FOLDER", "STEPS"))
    exec(cell, {**fakes, **names, "study": [], "widgets": widgets})
    assert held == [{}, {}, {}]


def test_running_the_subjects_cell_again_keeps_its_panel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    trained: list[str] = []
    monkeypatch.setattr(
        widgets, "monitor", lambda run: trained.append(run.config.subject.photos) or iter(())
    )
    scope = {"drive": None, "colab": colab, "preflight": preflight, "widgets": widgets}
    run_cells(scope, "", "find_interrupted", "SubjectPanel", "SettingsPanel")
    turtle = str(loading.BUNDLED / "subjects" / "candy_turtle")
    scope["subject"].source.value = turtle
    cells = [source(c) for c in codes(json.loads(NOTEBOOKS["01_dreambooth"].read_text()))]
    (choose,), (training,) = ([c for c in cells if mark in c]
                              for mark in ("SubjectPanel", "widgets.monitor"))  # fmt: skip
    (setting,) = (c for c in cells if "widgets.SettingsPanel(" in c)
    scope["settings"].controls["steps"].value = 40
    exec(choose, scope)
    exec(setting, scope)
    assert scope["settings"].config.steps == 40, "run again, the cell keeps the settings"
    scope |= {"slider": "of an earlier training", "archive": "of its checkpoint"}
    exec(training, scope)
    for later in cells[cells.index(training) + 2 : -1]:
        with pytest.raises(order.OutOfOrder, match=r'"[68]\. '):  # not the former checkpoint
            exec(later, scope)
    shown = scope["subject"].config.subject.photos
    assert trained == [shown] == [turtle], "training uses the photos of section 2"
    scope["config"] = scope["config"].replace(steps=7)  # as after running another cell above
    exec(choose, scope)
    with pytest.raises(ConfigError, match="run the cell of section 3 again"):
        exec(training, scope)
    assert trained == [turtle]


def test_another_finished_run_forgets_the_former_ones_step_and_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Open a finished run by its name where a former one has been saved, then run it again."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(widgets, "monitor", lambda run: iter(()))
    marks = UP_TO_TRAINING
    scope = {"drive": None, "colab": colab, "preflight": preflight, "widgets": widgets}
    for name in ("a", "b"):
        run_cells(scope, f"RESUME, NAME = False, {name!r}", *marks)
        scope["run"].pipeline.mkdir()
        (scope["run"].pipeline / "model_index.json").write_text("{}")
    for name, kept in (("a", False), ("a", True), ("b", False)):
        scope |= {"slider": "of the former run", "archive": "of its checkpoint"}
        run_cells(scope, f"RESUME = {name!r}", *marks)
        assert scope["run"].folder.name == name
        assert [old in scope for old in ("slider", "archive")] == [kept, kept]


@pytest.mark.parametrize("name", [None, "fox"])
def test_a_model_is_saved_under_its_own_runs_name(
    name: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Save a run after the cell that finds runs has set another name, or none yet."""
    monkeypatch.chdir(tmp_path)
    saved: list[Path] = []
    for module, writer in ((pipeline_folder, "write_model"), (comfyui, "export")):
        monkeypatch.setattr(module, writer, lambda *given: saved.append(given[-1]) or "")
    monkeypatch.setattr(model_card, "usage", lambda *given: "")
    scope = {
        "run": SimpleNamespace(
            folder=Path("runs/dog"), config=SimpleNamespace(base="o/n", revision=None)
        ),
        "name": name,
        "slider": SimpleNamespace(step=4),
        "drive": None,
        "colab": SimpleNamespace(in_colab=lambda: True, download=lambda archive: None),
    }
    run_cells(scope, "", "# @title Save the model", "# @title Save a file")
    assert saved == [Path("models/dog"), Path("models/dog.safetensors")]


@pytest.mark.parametrize(
    ("base", "names"),
    [("toybox", ["toybox"]), ("owner/name", ["clip-vit-base-patch32", "dino-vits16"])],
)
def test_scores_have_the_names_of_the_models_that_gave_them(
    base: str, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Score as notebook 03 does: results of two encoders are told apart by these names alone."""
    given: list[str] = []
    monkeypatch.setattr(scores, "score", lambda *args: given.extend(args[3]) or [])
    monkeypatch.setattr(tables, "write_csv", lambda *args: None)
    monkeypatch.setattr(Encoder, "__init__", lambda self, model: None)  # reads no model
    _, first, *cells = map(source, codes(json.loads(NOTEBOOKS["03_evaluation"].read_text())))
    scope: dict[str, Any] = {"bench": None, "methods": {}}
    exec(first.replace('BASE = "toybox"', f'BASE = "{base}"'), scope)
    (cell,) = [cell for cell in cells if "scores.score(" in cell]
    exec(cell, scope)
    assert given == names


def test_the_first_cell_is_the_same_in_all_notebooks() -> None:
    firsts = {source(codes(json.loads(path.read_text()))[0]) for path in NOTEBOOKS.values()}
    assert len(firsts) == 1 and "install_missing" in firsts.pop()


def test_every_notebook_is_run() -> None:
    assert SHORT.keys() == CHECKS.keys() == NOTEBOOKS.keys()


def test_what_a_person_changes_is_a_form_on_colab() -> None:
    notebook = json.loads(NOTEBOOKS["01_dreambooth"].read_text())
    cells = codes(notebook)
    for cell in cells:
        assert cell["metadata"]["cellView"] == "form" and source(cell).startswith("# @title ")
    forms = re.findall(r"^(\w+) = .*  # @param (.*)$", source(cells[1]), re.MULTILINE)
    assert [name for name, _ in forms] == ["BASE", "PHOTOS", "CLASS_NOUN", "UPLOAD", "DRIVE"]
    menu, options = re.fullmatch(r"(\[.*\]) (\{.*\})", forms[0][1]).groups()
    assert json.loads(options) == {"allow-input": True}, "a base of one's own is typed"
    assert {*json.loads(menu)} <= {base.base for base in base_models.KNOWN if not base.gated}
    fields = [form for cell in cells for form in re.findall("# @param ({.*})", source(cell))]
    assert {json.loads(field)["type"] for field in fields} == {"string", "boolean"}
    (text,) = [source(c) for c in notebook["cells"] if "| `BASE` |" in source(c)]
    assert all(f"| `{name}` |" in text for name, _ in forms)


def test_a_cell_run_before_its_time_names_the_one_to_run_first() -> None:
    _, _, *cells = map(source, codes(json.loads(NOTEBOOKS["01_dreambooth"].read_text())))
    for cell in cells[:-1]:  # the last one needs nothing
        with pytest.raises(
            order.OutOfOrder, match=r'"[1-8]\. [^"]*" defines; run its cells first. After a'
        ):
            exec(cell, {})
    (training,) = [cell for cell in cells if "widgets.monitor" in cell]
    with pytest.raises(order.OutOfOrder, match=r'"3\. Settings"'):
        exec(training, {"config": None, "subject": None})
    sections = {title for cell in cells for title in re.findall(r'="(\d. [^"]*)"', cell)}
    text = "\n".join(map(source, json.loads(NOTEBOOKS["01_dreambooth"].read_text())["cells"]))
    assert sections and all(f"\n## {section}" in text for section in sections)


def test_what_a_cell_needs_is_not_set_by_the_one_that_installs_the_kit() -> None:
    setup, *cells = map(source, codes(json.loads(NOTEBOOKS["01_dreambooth"].read_text())))
    needed = {name for cell in cells for name in re.findall(r'(\w+)="\d\. ', cell)}
    assert "drive" in needed
    assert not needed & {*re.findall(r"^ *(\w+) = ", setup, re.MULTILINE)}


@pytest.mark.parametrize("path", NOTEBOOKS.values(), ids=lambda path: path.stem)
def test_a_notebook_is_kept_short_and_without_outputs(path: Path) -> None:
    assert path.stat().st_size < 100_000
    notebook = json.loads(path.read_text())
    for cell in codes(notebook):
        assert not cell["outputs"] and cell["execution_count"] is None
    assert "widgets" not in notebook["metadata"]


@pytest.mark.parametrize("path", NOTEBOOKS.values(), ids=lambda path: path.stem)
def test_a_notebook_begins_with_its_parts_and_its_parameters_and_ends_with_what_next(
    path: Path,
) -> None:
    cells = json.loads(path.read_text())["cells"]
    first, *rest = map(source, cells)
    assert "| time | download and storage |" in first
    for line in first.splitlines():
        if "](#" in line:
            anchor = line.partition("](#")[2].rstrip(")")
            assert sum(f'id="{anchor}"' in text for text in rest) == 1
    setup, parameters, *_ = [cell for cell in cells if cell["cell_type"] == "code"]
    assert "install_missing" in source(setup)
    assert parameters["metadata"]["tags"] == ["parameters"]
    assert source(cells[-1]).startswith("**What next?**")
    assert not any("assert " in source(cell) for cell in codes(json.loads(path.read_text())))
    # A cell holds one idea and fits on a screen; the first one's code is folded on Colab.
    assert all(len(cell["source"]) <= 28 + (cell is setup) for cell in cells)
