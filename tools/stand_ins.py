"""Lay stand-ins for Colab's large packages into an environment: ``PYTHON -m tools.stand_ins``.

transformers, diffusers, peft and accelerate look for packages by themselves, and do other things
where they find them. Of those that are gigabytes, or need a GPU's libraries, the tests' second
environment has a distribution of Colab's version with modules that can be imported. These hold what
the libraries import of them, and nothing that computes: what asks them for more ends in an error.
"""

import sysconfig
from pathlib import Path

from tools.colab_freeze import CONSTRAINTS, pins

_MISSING = """
def __getattr__(name):
    raise AttributeError(f"{__name__} is a stand-in of the tests and has no {name}")
"""
_FUNCTIONAL = """
def pil_to_tensor(picture):
    raise NotImplementedError("torchvision is a stand-in here; prepare pictures by PIL")
"""

#: By distribution, its modules and what is in them beside the version.
STAND_INS = {
    "datasets": {"datasets": ""},
    "fastai": {"fastai": ""},
    # diffusers 0.39 defines its Flax models with every U-Net, where jax and flax are installed.
    "flax": {
        "flax": "from flax import core, linen, serialization, struct, traverse_util",
        "flax.core": "from flax.core import frozen_dict",
        "flax.core.frozen_dict": "class FrozenDict(dict):\n    pass\nfreeze = unfreeze = None\n",
        "flax.linen": "class Module:\n    pass\ndef compact(method):\n    return method\n",
        "flax.serialization": "from_bytes = to_bytes = None\n",
        "flax.struct": "from dataclasses import dataclass",
        "flax.traverse_util": "flatten_dict = unflatten_dict = None\n",
    },
    "gradio": {"gradio": ""},
    "jax": {
        "jax": "from jax import lax, numpy, random\nclass Array:\n    pass\n",
        "jax.lax": "class Precision:\n    HIGHEST = None\n",
        "jax.numpy": "from numpy import dtype, float32, ndarray\n",
        "jax.random": "PRNGKey = None\n",
    },
    "keras": {"keras": ""},
    "librosa": {"librosa": ""},
    "numba": {"numba": ""},
    "opencv-contrib-python": {},
    "opencv-python": {"cv2": ""},
    "opencv-python-headless": {},
    "soxr": {"soxr": ""},  # of librosa, which transformers takes it to come with
    "spacy": {"spacy": ""},
    "tensorboard": {"tensorboard": ""},
    "tensorflow": {"tensorflow": ""},
    "timm": {"timm": ""},
    "torchaudio": {"torchaudio": ""},
    "torchcodec": {"torchcodec": ""},
    # Its own ops are compiled for one build of torch, and Colab's is another.
    "torchvision": {
        "torchvision": "from torchvision import io, transforms",
        "torchvision.io": (
            "class ImageReadMode:\n    RGB = 'RGB'\n"
            "def decode_image(*given, **named):\n    raise NotImplementedError('a stand-in')\n"
        ),
        "torchvision.transforms": (
            "from enum import Enum\n"
            "names = 'NEAREST NEAREST_EXACT BILINEAR BICUBIC BOX HAMMING LANCZOS'\n"
            "InterpolationMode = Enum('InterpolationMode', names)\n"
            "from torchvision.transforms import functional, v2\n"
        ),
        "torchvision.transforms.functional": _FUNCTIONAL,
        "torchvision.transforms.v2": "from torchvision.transforms.v2 import functional",
        "torchvision.transforms.v2.functional": _FUNCTIONAL,
    },
    "wandb": {"wandb": ""},
}


def lay(folder: Path, versions: dict[str, str]) -> None:
    """Write every stand-in that ``versions`` has into a folder of packages."""
    for name, modules in STAND_INS.items():
        if name in versions:
            _lay(folder, name, versions[name], modules)


def _lay(folder: Path, name: str, version: str, modules: dict[str, str]) -> None:
    info = f"{name.replace('-', '_')}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nSummary: a stand-in\n"
    files = {f"{info}/METADATA": metadata, f"{info}/INSTALLER": "tools.stand_ins\n"}
    for module, source in modules.items():
        head = "" if "." in module else f'__version__ = "{version}"\n'
        files[f"{module.replace('.', '/')}/__init__.py"] = f"{head}{source}\n{_MISSING}"
    record = f"{info}/RECORD"
    files[record] = "".join(f"{file},,\n" for file in [*files, record])
    for file, text in files.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(text)


if __name__ == "__main__":
    lay(Path(sysconfig.get_paths()["purelib"]), pins(CONSTRAINTS.read_text()))
