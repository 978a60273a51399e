"""Test the notebooks' first cell without the kit: it finds a clone or a wheel, or says so.

The wheel itself is built and installed by this cell in ``test_package.py``.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from test_notebooks import NOTEBOOKS, ROOT, codes, source
from test_notebooks import python as python

# As a kernel runs it, but without the library that the environment has, however it came there.
_BARE = """
import sys
from pathlib import Path

def has_kit(place):
    return Path(place, "dreambooth_lib", "__init__.py").exists()

sys.meta_path[:] = [found for found in sys.meta_path if "Editable" not in repr(found)]
sys.path[:] = [place for place in sys.path if not has_kit(place)]
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
shell.colors = "nocolor" if shell.has_trait("colors") and hasattr(shell, "theme") else "NoColor"
ran = shell.run_cell(Path(sys.argv[1]).read_text())
if ran.success:
    import dreambooth_lib
    print("found", Path(dreambooth_lib.__file__).parent)
"""


def first_cell() -> str:
    return source(codes(json.loads(NOTEBOOKS["01_dreambooth"].read_text()))[0])


def run_bare(cell: str, python: str, folder: Path) -> str:
    """Return what the cell shows in a notebook in ``folder``, and where it found the kit."""
    (folder / ".cell.py").write_text(cell)
    site = folder / ".site"
    site.mkdir(exist_ok=True)  # as the environment's own is there before
    environment = os.environ | {"PYTHONPATH": str(site), "PIP_TARGET": str(site),
                                "IPYTHONDIR": str(folder / ".ipython")}  # fmt: skip
    done = subprocess.run(
        [python, "-c", _BARE, ".cell.py"],
        cwd=folder, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Make a notebook's folder with nothing in it or around it."""
    (tmp_path / "home" / "clone" / "notebooks").mkdir(parents=True)
    return tmp_path / "home" / "clone" / "notebooks"


def clone(place: Path) -> None:
    """Link a clone's library and copy its requirements; it is only imported."""
    place.mkdir(exist_ok=True)
    (place / "dreambooth_lib").symlink_to(ROOT / "dreambooth_lib")
    shutil.copy(ROOT / "requirements.txt", place)


def test_without_the_kit_the_cell_says_the_one_thing_to_do(folder: Path, python: str) -> None:
    shown = run_bare(first_cell(), python, folder).strip()
    assert shown == (
        "The kit was not found here. Build its wheel (`make wheel`) in a clone, and put it next to "
        "this notebook; on Colab drag it into the Files panel on the left, or mount the Drive that "
        "has it. Then run this cell again."
    )


def test_an_address_that_gives_nothing_is_named(folder: Path, python: str) -> None:
    cell = first_cell().replace('KIT_URL = ""', 'KIT_URL = "no/such/kit.whl"')
    shown = run_bare(cell, python, folder)
    assert "The kit was not found here or at no/such/kit.whl." in shown and "Traceback" not in shown


@pytest.mark.parametrize("place", ["around", "beside", "of-its-name", "drive"])
def test_a_clone_is_found(place: str, folder: Path, python: str, tmp_path: Path) -> None:
    cell, expected = first_cell(), folder / "kit"
    if place == "around":  # and not the other one that lies beside it
        clone(folder.parent.parent / "another")
        expected = folder.parent
    elif place == "of-its-name":
        expected = folder / "dreambooth_lib"
    elif place == "drive":
        drive = tmp_path / "drive" / "MyDrive"
        drive.mkdir(parents=True)
        cell, expected = cell.replace("/content/drive/MyDrive", str(drive)), drive / "kit"
    clone(expected)
    shown = run_bare(cell, python, folder)
    assert f"found {expected / 'dreambooth_lib'}" in shown and "Nothing to install" in shown
