"""Versions that are asked for, and the package as it is installed elsewhere."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from test_first_cell import first_cell, run_bare

from tools import colab_freeze

ROOT = Path(__file__).parent.parent
COLAB_FREEZE = os.environ.get("DREAMBOOTH_TEST_COLAB_FREEZE", "")
CORE = {"torch", "diffusers", "transformers", "accelerate", "numpy", "pillow", "ipywidgets"}


def requirements(lines: Iterable[str]) -> dict[str, Requirement]:
    bare = (line.split("#")[0].strip() for line in lines)
    parsed = [Requirement(line) for line in bare if line]
    return {canonicalize_name(requirement.name): requirement for requirement in parsed}


def required() -> dict[str, Requirement]:
    return requirements((ROOT / "requirements.txt").read_text().splitlines())


def pins(path: Path) -> dict[str, Version]:
    found = colab_freeze.pins(path.read_text())
    return {name: Version(version) for name, version in found.items()}


def unmet(wanted: dict[str, Requirement], versions: dict[str, Version]) -> list[str]:
    return [
        f"{requirement}, but it is {versions[name]}"
        for name, requirement in wanted.items()
        if name in versions and not requirement.specifier.contains(versions[name], prereleases=True)
    ]


@pytest.mark.skipif(not COLAB_FREEZE, reason="DREAMBOOTH_TEST_COLAB_FREEZE is not set")
def test_colab_has_what_is_required() -> None:
    """So that installing there moves nothing that is preinstalled."""
    colab = pins(Path(COLAB_FREEZE))
    assert colab.keys() >= CORE
    assert unmet(required(), colab) == []


def test_every_requirement_has_a_lower_bound() -> None:
    assert required().keys() >= CORE
    for requirement in required().values():
        assert [s.operator for s in requirement.specifier] == [">="], f"{requirement}"


def test_constraints_satisfy_the_requirements() -> None:
    constraints = pins(ROOT / "constraints.txt")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    test = requirements(project["optional-dependencies"]["test"])
    assert unmet(required() | test, constraints) == []
    assert (required() | test).keys() <= constraints.keys()


def test_the_documentation_needs_nothing_that_a_user_needs() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    docs = requirements(project["optional-dependencies"]["docs"])
    constraints = pins(ROOT / "constraints.txt") | pins(ROOT / "constraints-docs.txt")
    assert docs.keys() <= constraints.keys() and unmet(docs, constraints) == []
    assert not pins(ROOT / "constraints.txt").keys() & pins(ROOT / "constraints-docs.txt").keys()
    assert not required().keys() & docs.keys()


def test_unmet_is_found() -> None:
    wanted = requirements(["a_b>=2.0  # why", "", "# c", "d>=1"])
    assert unmet(wanted, {"a-b": Version("2.0+cu128"), "d": Version("1")}) == []
    assert unmet(wanted, {"a-b": Version("1.9")}) == ["a_b>=2.0, but it is 1.9"]


@pytest.mark.slow
def test_the_first_cell_installs_the_wheel_beside_it_with_its_data(tmp_path: Path) -> None:
    checkout, elsewhere = tmp_path / "checkout", tmp_path / "a" / "b" / "elsewhere"
    # A copy, since building leaves files behind in the checkout, and takes up older ones.
    checkout.mkdir()
    elsewhere.mkdir(parents=True)
    for name in ("dreambooth_lib", "data"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "requirements.txt", "LICENSE", "README.md", "Makefile"):
        shutil.copy(ROOT / name, checkout)
    stale = checkout / "build" / "lib" / "dreambooth_lib" / "removed.py"
    stale.parent.mkdir(parents=True)
    stale.touch()
    environment = dict(os.environ)
    if importlib.util.find_spec("setuptools"):
        import setuptools

        if Version(setuptools.__version__) >= Version("77"):
            environment["PIP_NO_BUILD_ISOLATION"] = "false"  # which means: none
    made = subprocess.run(
        ["make", "wheel", f"PYTHON={sys.executable}"],
        check=True, cwd=checkout, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    (wheel,) = (checkout / "dist").iterdir()
    assert re.search(r"^\d+M\s+dist/dreambooth_lib-.*\.whl$", made.stdout, re.MULTILINE)
    assert abs(wheel.stat().st_size / 1e6 - 35) < 5, "README and make say 35 MB"
    shutil.move(wheel, elsewhere / wheel.name)
    older = elsewhere / "dreambooth_lib-0.0.1-py3-none-any.whl"
    older.write_bytes(b"no wheel")
    os.utime(older, (0, 0))
    shutil.rmtree(checkout)

    said = run_bare(first_cell(), sys.executable, elsewhere)
    library = elsewhere / ".site" / "dreambooth_lib"
    assert f"found {library}" in said and "Nothing to install" in said
    code = (
        "from dreambooth_lib.data.subjects import load_dataset\n"
        "from dreambooth_lib.families.loading import BUNDLED\n"
        "from dreambooth_lib.data.images import read_photos\n"
        "for subject in load_dataset(BUNDLED / 'subjects'):\n"
        "    print(BUNDLED, subject.name, len(read_photos(subject.photos)), sep='|')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=True, cwd=elsewhere, env=os.environ | {"PYTHONPATH": str(library.parent)},
        capture_output=True, text=True,
    )  # fmt: skip
    rows = [line.split("|") for line in done.stdout.splitlines()]
    assert len(rows) == 3 and {Path(folder) for folder, _, _ in rows} == {library / "bundled"}
    assert all(int(count) >= 4 for _, _, count in rows)
    for file in (ROOT / "data").rglob("*"):
        installed = library / "bundled" / file.relative_to(ROOT / "data")
        assert installed.exists(), f"{file.name} is not in the package"
    assert (library / "export" / "gallery.html").exists()
    assert (library / "py.typed").exists() and not (library / "removed.py").exists()
