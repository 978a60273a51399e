"""The third environment, which has the lowest versions that requirements.txt allows."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from packaging.version import Version

ROOT = Path(__file__).parent.parent
PYTHON = os.environ.get("DREAMBOOTH_TEST_LOWEST_PYTHON", "")
needs_python = pytest.mark.skipif(not PYTHON, reason="needs the environment of lowest versions")


def pins(name: str, sign: str) -> dict[str, str]:
    """Return the versions in a file of requirements or constraints, by package."""
    rows = re.findall(rf"^([\w.-]+){sign}([^\s+]+)", (ROOT / name).read_text(), re.M)
    return {package.lower().replace("_", "-"): version for package, version in rows}


def there(*arguments: str | Path) -> str:
    """Return what the environment's Python prints, with a "y" ready for whatever asks."""
    settings = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [PYTHON, *arguments], capture_output=True, text=True, env=settings, input="y\ny\n"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_lowest_versions_are_those_of_the_requirements_and_colab_has_them() -> None:
    lowest, colab = pins("constraints-lowest.txt", "=="), pins("constraints-colab.txt", "==")
    required = pins("requirements.txt", ">=")
    assert lowest.keys() == required.keys()
    for package, version in required.items():
        if package != "torch":  # of which the tests have one version only
            assert Version(lowest[package]) == Version(version)
        if package in colab:
            assert Version(colab[package]) >= Version(version), package


@needs_python
def test_it_has_the_lowest_versions() -> None:
    code = "from importlib.metadata import version; import sys; print(version(sys.argv[1]))"
    for package in ("diffusers", "transformers", "peft", "huggingface-hub"):
        expected = Version(pins("constraints-lowest.txt", "==")[package])
        assert Version(there("-c", code, package)) == expected


@needs_python
@pytest.mark.slow
@pytest.mark.parametrize("fields", ["{}", '{"train_text_encoder": true}'])
def test_a_lora_goes_its_whole_way(fields: str, tmp_path: Path) -> None:
    """It trains, resumes, draws, is kept and exported, on the weights that are in the files."""
    found = json.loads(there(ROOT / "tests" / "lora_way.py", tmp_path, fields).splitlines()[-1])
    assert found["resumed"] == [3]
    assert max(high for _, high in found["same picture"]) <= 1
    assert found["own weights"]


@needs_python
@pytest.mark.slow
def test_a_1x_base_in_one_file_is_read(tmp_path: Path) -> None:
    """Which versions of diffusers and transformers together cannot, though each is allowed."""
    code = """
import sys
from dreambooth_lib.export.comfyui_checkpoint import write_checkpoint
from dreambooth_lib.families import loading
import torch
own = loading.load_model("toybox")
read = loading.load_model(str(write_checkpoint(loading.locate("toybox"), sys.argv[1])))
for one, other in zip((own.denoiser, *own.text_encoders), (read.denoiser, *read.text_encoders)):
    expected = other.state_dict()
    print(all(torch.equal(v, expected[n].to(v.dtype)) for n, v in one.state_dict().items()))
"""
    assert there("-c", code, tmp_path / "base.safetensors").split() == ["True", "True"]


@needs_python
@pytest.mark.slow
def test_no_code_of_a_base_a_lora_or_a_scorer_is_run(
    tiny_sd1: str, clip_folder: Path, tmp_path: Path
) -> None:
    foreign = (
        f"open({str(tmp_path / 'ran')!r}, 'w')\nfrom diffusers import UNet2DConditionModel as X"
    )

    def base(name: str, module: str, **index: list[str]) -> Path:
        folder = Path(shutil.copytree(tiny_sd1, tmp_path / name))
        (folder / module).parent.mkdir(exist_ok=True)
        (folder / module).write_text(foreign)
        own = json.loads((folder / "model_index.json").read_text())
        (folder / "model_index.json").write_text(json.dumps(own | index))
        return folder

    base("in-unet", "unet/foreign.py", unet=["foreign", "X"])
    base("importable", "../importable.py", unet=["importable", "X"])
    base("own-name", "unet/diffusers.py")
    lora = base("lora", "pipeline.py")
    (lora / "model_index.json").unlink()
    trained_on = {"base": tiny_sd1, "revision": None, "custom_pipeline": str(lora)}
    (lora / "base.json").write_text(json.dumps(trained_on | {"trust_remote_code": True}))
    scorer = Path(shutil.copytree(clip_folder, tmp_path / "scorer"))
    config = json.loads((scorer / "config.json").read_text())
    config |= {"model_type": "other", "auto_map": {"AutoConfig": "foreign.X"}}
    (scorer / "config.json").write_text(json.dumps(config))
    (scorer / "foreign.py").write_text(foreign)
    code = """
import sys
from pathlib import Path
from dreambooth_lib.core.errors import KitError
from dreambooth_lib.families import loading
from dreambooth_lib.metrics.encoders import Encoder
folder = Path(sys.argv[1])
sys.path.insert(0, str(folder))
for name in ("in-unet", "importable", "own-name", "lora", "scorer"):
    try:
        (Encoder if name == "scorer" else loading.load_model)(str(folder / name))
    except KitError as error:
        print("refused", name, error)
"""
    assert there("-c", code, tmp_path).count("refused") == 5
    assert not (tmp_path / "ran").exists()
