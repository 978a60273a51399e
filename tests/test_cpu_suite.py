"""The suite is one of a CPU on every machine: a GPU is hidden from it and from what it starts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

#: Stands for a machine with a GPU: torch finds one wherever it is not hidden.
GPU = """
import os, sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import PathFinder


class WithGpu(Loader):
    def __init__(self, real):
        self.real = real

    def create_module(self, spec):
        return self.real.create_module(spec)

    def exec_module(self, module):
        self.real.exec_module(module)
        module.is_available = lambda: os.environ.get("CUDA_VISIBLE_DEVICES") != ""


class Finder(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "torch.cuda":
            return None
        spec = PathFinder.find_spec(name, path, target)
        spec.loader = WithGpu(spec.loader)
        return spec


sys.meta_path.insert(0, Finder())
"""

INNER = """
import subprocess, sys

import torch


def test_no_gpu_is_seen():
    assert not torch.cuda.is_available()
    code = "import torch; print(torch.cuda.is_available())"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "False\\n"
"""


@pytest.mark.parametrize("on_gpu", ["", "1"])
def test_a_gpu_is_hidden_unless_it_is_asked_for(on_gpu: str, tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(GPU)
    tests = Path(__file__).parent
    # Of the suite's own what stands before it imports anything that could look for a GPU, since
    # torch as it is here cannot be used with one.
    head, _, _ = (tests / "conftest.py").read_text().partition("\nimport json\n")
    (tmp_path / "conftest.py").write_text(head)
    (tmp_path / "test_inner.py").write_text(INNER)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("CUDA", "PYTEST"))}
    environment |= {
        "PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), str(tests), str(tests.parent)]),
        "DREAMBOOTH_TEST_ON_GPU": on_gpu,
    }
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--numprocesses",
        "1",
        "-p",
        "no:cacheprovider",
    ]
    done = subprocess.run(
        [*command, str(tmp_path)], env=environment, capture_output=True, text=True, check=False
    )
    expected = "1 failed" if on_gpu else "1 passed"
    assert expected in done.stdout, done.stdout + done.stderr
