"""The second environment, which has what Colab has, and what LoRA does beside Colab's packages."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tools import colab_freeze, stand_ins

ROOT = Path(__file__).parent.parent
PYTHON = os.environ.get("DREAMBOOTH_TEST_COLAB_PYTHON", "")
FREEZE = os.environ.get("DREAMBOOTH_TEST_COLAB_FREEZE", "")
needs_python = pytest.mark.skipif(not PYTHON, reason="needs the second environment")
needs_freeze = pytest.mark.skipif(not FREEZE, reason="DREAMBOOTH_TEST_COLAB_FREEZE is not set")
OFFLINE = {"HF_HUB_OFFLINE": "1"}


def there(*arguments: str | Path, **environment: str) -> str:
    """Return what the second environment's Python prints."""
    settings = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    done = subprocess.run([PYTHON, *arguments], capture_output=True, text=True, env=settings)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@needs_python
@needs_freeze
def test_it_has_what_the_libraries_look_for_on_colab() -> None:
    """Each package of Colab's that they ask for, at Colab's version, installed or stood in for."""
    found = json.loads(there("-m", "tools.probed").splitlines()[-1])
    colab = colab_freeze.pins(Path(FREEZE).read_text())
    assert {"torchao", "torchvision", "scikit-learn", "transformers", "numpy"} <= found.keys()
    lacking = {
        name: f"{found[name]} for {version}"
        for name, version in colab.items()
        if name in found and found[name] != version and not colab_freeze.of_torch(name)
    }
    assert lacking == {}, (
        "the second environment is not Colab: put what is light into requirements-colab.txt and "
        "what is not into tools/stand_ins.py, and take a newer freeze in by tools.colab_freeze."
    )


@needs_freeze
def test_the_versions_are_those_of_the_freeze() -> None:
    expected = colab_freeze.constraints(Path(FREEZE).read_text())
    assert colab_freeze.CONSTRAINTS.read_text() == expected, "run python -m tools.colab_freeze FILE"


def test_a_freeze_is_taken_in() -> None:
    freeze = "a_B==1.0+cu128\ntorch==2.11.0+cu128\nc @ file:///c\ntriton==3.6.0\nnvidia-x==1\n"
    rows = colab_freeze.constraints(freeze).splitlines()
    assert [row for row in rows if not row.startswith("#")] == ["a-b==1.0+cu128", "torch==2.13.0"]
    with pytest.raises(ValueError, match=r"no freeze of Colab's, as it lacks torch; give"):
        colab_freeze.constraints("numpy==2.1.3\n")


def test_a_stand_in_is_found_imported_and_says_what_it_is(tmp_path: Path) -> None:
    stand_ins.lay(tmp_path, {"torchvision": "0.26.0+cu128", "jax": "0.7.2", "unknown": "1"})
    code = """
from importlib.metadata import packages_distributions, version
import jax.numpy, torchvision
from torchvision.transforms.v2 import functional
from torchvision.transforms import InterpolationMode
print(torchvision.__version__, version("torchvision"), *packages_distributions()["torchvision"])
try:
    functional.resize
except AttributeError as error:
    print(error)
"""
    settings = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=settings)
    said = "torchvision.transforms.v2.functional is a stand-in of the tests and has no resize"
    assert done.stdout.splitlines() == ["0.26.0+cu128 0.26.0+cu128 torchvision", said]


@needs_python
def test_pictures_are_prepared_by_pil_beside_a_torchvision(clip_folder: Path) -> None:
    """transformers' own choice there is torchvision, whose stand-in computes nothing."""
    code = f"""
from PIL import Image
from transformers import AutoImageProcessor
from dreambooth_lib.metrics.encoders import Encoder
print(type(AutoImageProcessor.from_pretrained({str(clip_folder)!r})).__name__)
encoder = Encoder({str(clip_folder)!r})
print(type(encoder._processor).__name__, *encoder.embed_images([Image.new("RGB", (40, 30))]).shape)
"""
    assert there("-c", code).split() == ["CLIPImageProcessor", "CLIPImageProcessorPil", "1", "10"]


#: What is trained besides the denoiser, and at which version of numpy: the present runtime's, and
#: that of the one before, whose Python (3.12) the tests do not have.
WAYS: dict[str, tuple[dict[str, Any], str]] = {
    "denoiser": ({}, ""),
    "text encoder and word": ({"train_text_encoder": True, "train_token": True}, "2.0.2"),
}


@needs_python
@pytest.mark.slow
@pytest.mark.parametrize("name", WAYS)
def test_a_lora_goes_its_whole_way_offline(name: str, tmp_path: Path) -> None:
    """It trains, resumes, draws, is kept and exported, beside a torchao that peft refuses."""
    code = "from importlib.metadata import version; print(version('torchao'), version('peft'))"
    assert there("-c", code).split() == ["0.10.0", "0.20.0"], "or does this peft take that one?"
    changes, numpy = WAYS[name]
    script, settings = ROOT / "tests" / "lora_way.py", dict(OFFLINE)
    if numpy:
        settings["PYTHONPATH"] = f"{ROOT}:{Path(PYTHON).parent.parent / f'numpy-{numpy}'}"
    found = json.loads(there(script, tmp_path, json.dumps(changes), **settings).splitlines()[-1])
    assert not numpy or found["numpy"] == numpy
    assert found["resumed"] == [3]
    assert max(high for _, high in found["same picture"]) <= 1
    assert (tmp_path / "exported.safetensors").exists()
    plain = f"""
import sys
sys.modules["torchao"] = None  # as uninstalled, which the lines say is to be done
{found["usage"]}
from safetensors.torch import load_file
pipeline.fuse_lora()
pipeline.unload_lora_weights()
expected = load_file({str(tmp_path / "unet.safetensors")!r})
found = pipeline.unet.state_dict()
print(max(float((found[name] - value).abs().max()) for name, value in expected.items()))
"""
    assert float(there("-c", plain, **OFFLINE)) < 1e-5
