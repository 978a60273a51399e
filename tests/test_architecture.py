"""docs/architecture.md: its files are there, and its examples run."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import dreambooth_lib as db
from dreambooth_lib.core import config_checks
from dreambooth_lib.evaluation.measures import Embedded
from dreambooth_lib.families import loading, resolving
from dreambooth_lib.families.loading import BUNDLED
from dreambooth_lib.training.optimizers import OPTIMIZERS

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "architecture.md").read_text()
QUESTIONS = (
    "loss", "noise schedule", "loop", "optimizer", "gradient clipping", "EMA", "LoRA",
    "class images", "validation", "early stopping", "best checkpoint", "checkpoint format",
    "CLIP-T", "FID-like measures", "Drive backup", "zip for download", "ComfyUI file",
    "will it fit", "install on Colab", "contact sheet",
)  # fmt: skip


def test_each_question_has_a_file_that_is_there() -> None:
    rows = dict(re.findall(r"^\| ([^|]+?) \| (`[^|]+) \|$", TEXT, flags=re.M))
    assert set(QUESTIONS) <= rows.keys()
    for files in rows.values():
        for file in re.findall(r"`([\w/]+\.py)`", files):
            assert (ROOT / "dreambooth_lib" / file).is_file(), file


def test_each_file_and_module_that_is_named_is_there() -> None:
    for name in set(re.findall(r"`((?:core|data|metrics|families|training|figures|export|evaluation"
                               r"|notebook)[./][\w./]+)`", TEXT)):  # fmt: skip
        path = ROOT / "dreambooth_lib" / name.removesuffix(".py").replace(".", "/")
        parent = path.parent.with_suffix(".py")  # a name in a module
        assert path.is_dir() or path.with_suffix(".py").is_file() or parent.is_file(), name


@pytest.mark.slow
def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config_checks, "CHOICES", dict(config_checks.CHOICES))
    families = dict(loading.FAMILIES)
    for module in (loading, resolving):
        monkeypatch.setattr(module, "FAMILIES", families)
    monkeypatch.setitem(OPTIMIZERS, "sgd", None)  # and out again afterwards
    subject = db.Subject(str(BUNDLED / "subjects" / "patch_dog"), "dog")
    space: dict[str, Any] = {"db": db, "subject": subject, "folder": tmp_path}
    examples = re.findall(r"```python\n(.*?)```", TEXT, flags=re.S)
    assert len(examples) == 5
    for example in examples:
        assert len([line for line in example.splitlines() if line.strip()]) <= 14
        exec(example, space)
    assert len(space["losses"]) == 2 and all(loss > 0 for loss in space["losses"])
    step = space["step"]
    assert step.loss == pytest.approx(step.instance_loss + step.prior_loss)
    rows = torch.nn.functional.normalize(torch.eye(3), dim=-1)
    embedded = Embedded(rows, rows[:2].reshape(1, 2, 3), None, rows, rows)
    ((name, values),) = space["nearest_photo"](embedded)
    assert name == "nearest_photo" and values.tolist() == [[1.0, 1.0]]
    assert loading.FAMILIES["StableDiffusionInpaintPipeline"] is space["Inpainting"]
    panel = space["StepCounter"](db.resume(tmp_path / "sgd"))
    panel.children[1].click()
    panel.check()
    assert panel.text.value == "2 steps so far"
