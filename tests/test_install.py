"""Test what a notebook's first cell installs: missing packages, without changing any other."""

import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from dreambooth_lib.notebook import install
from dreambooth_lib.notebook.install import InstallError, missing_packages
from tools.colab_freeze import pins

COLAB_FREEZE = os.environ.get("DREAMBOOTH_TEST_COLAB_FREEZE", "")
#: Colab's runtimes: the present one, and the one before it where that is known to differ.
RUNTIMES = {"3.13": {}, "3.12": {"numpy": "2.0.2"}}


def test_only_missing_packages_are_installed_and_all_others_are_pinned() -> None:
    here = {"torch": "2.11.0+cu128", "numpy": "1.26.4", "dbus-thing": "1.2ubuntu3"}
    plan = missing_packages(["Torch>=2.6", "numpy>=2.0", "tomli_w>=1.0", "peft>=0.17"], here)
    assert plan.missing == ["tomli_w>=1.0", "peft>=0.17"]
    assert plan.too_old == {"numpy>=2.0": "1.26.4"}
    assert plan.pins == ["numpy==1.26.4", "torch==2.11.0+cu128"], "pip takes no other versions"
    assert plan.pip_arguments("pins.txt") == [
        "install", "--quiet", "--constraint", "pins.txt", "tomli_w>=1.0", "peft>=0.17",
    ]  # fmt: skip
    assert str(plan) == (
        "Installed: tomli_w>=1.0, peft>=0.17; no preinstalled package was changed; numpy>=2.0 is "
        "required, but 1.26.4 is installed: run %pip install -U 'numpy>=2.0' and restart the "
        "session."
    )
    assert str(missing_packages(["numpy"], here)) == (
        "Nothing to install; no preinstalled package was changed."
    )


def test_a_preinstalled_prerelease_counts_as_its_version() -> None:
    assert missing_packages(["a>=2.0"], {"a": "2.1.dev3"}).too_old == {}


@pytest.mark.parametrize(("python", "missing"), [("3.12", ["a"]), ("3.13", ["b>=1"])])
def test_markers_are_those_of_the_environment(python: str, missing: list[str]) -> None:
    wanted = ["a; python_version < '3.13'", "b>=1; python_version >= '3.13'", "c; extra == 'test'"]
    assert missing_packages(wanted, {}, {"python_version": python}).missing == missing


def test_a_checkout_and_an_installed_package_ask_for_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def uninstalled(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", uninstalled)
    checkout = install.required()
    assert "torch>=2.6" in checkout and not any("#" in line for line in checkout)
    monkeypatch.setattr(metadata, "requires", lambda name: [*checkout, "ruff; extra == 'test'"])
    assert missing_packages(install.required(), {}).missing == checkout


def test_what_the_kit_needs_is_here() -> None:
    plan = missing_packages(install.required(), install.installed())
    assert plan.missing == [] and plan.too_old == {}


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[list[str]]]:
    """Fake pip; return its calls, with the constraints file's content in place of its path."""

    def make(returncode: int = 0, stderr: str = "") -> list[list[str]]:
        calls: list[list[str]] = []

        def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
            constraints = command.index("--constraint") + 1
            calls.append([*command])
            calls[-1][constraints] = Path(command[constraints]).read_text()
            return subprocess.CompletedProcess(command, returncode, "", stderr)

        monkeypatch.setattr(subprocess, "run", run)
        monkeypatch.setattr(install, "OPTIONAL", {})
        monkeypatch.setattr(install, "required", lambda: ["peft>=0.17", "tomli-w>=1.0"])
        monkeypatch.setattr(install, "installed", lambda: {"peft": "0.20.0", "torch": "2.11.0"})
        return calls

    return make


def test_installing_asks_pip_for_missing_packages_only(pip: Callable[..., list[list[str]]]) -> None:
    calls = pip()
    assert install.install_missing().missing == ["tomli-w>=1.0"]
    assert calls == [
        [sys.executable, "-m", "pip", "install", "--quiet", "--constraint",
         "peft==0.20.0\ntorch==2.11.0", "tomli-w>=1.0"]
    ]  # fmt: skip


def test_where_nothing_is_missing_pip_is_not_called(
    pip: Callable[..., list[list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = pip()
    monkeypatch.setattr(install, "required", lambda: ["peft>=0.17"])
    assert install.install_missing().missing == [] and calls == []


def test_pips_failure_is_one_sentence(pip: Callable[..., list[list[str]]]) -> None:
    pip(1, "WARNING: slow\nERROR: Cannot install a and b\nERROR: ResolutionImpossible\nnotice\n")
    with pytest.raises(InstallError, match=r"tomli-w>=1.0 .*\(ERROR: Cannot install a and b\);"):
        install.install_missing()


def test_what_the_kit_can_do_without_is_installed_if_it_can_be(
    pip: Callable[..., list[list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = pip()
    monkeypatch.setattr(install, "required", lambda: ["peft>=0.17"])
    monkeypatch.setattr(install, "OPTIONAL", {"pillow-heif>=0.22": "HEIC photos cannot be read"})
    assert install.install_missing().missing == ["pillow-heif>=0.22"]
    assert calls[0][-1] == "pillow-heif>=0.22" and "torch==2.11.0" in calls[0][-2]
    pip(1, "ERROR: No matching distribution\n")
    monkeypatch.setattr(install, "required", lambda: ["peft>=0.17"])
    monkeypatch.setattr(install, "OPTIONAL", {"pillow-heif>=0.22": "HEIC photos cannot be read"})
    assert str(install.install_missing()) == (
        "Nothing to install; no preinstalled package was changed; pillow-heif>=0.22 could not be "
        "installed, so HEIC photos cannot be read."
    )


@pytest.mark.parametrize(("own", "told"), [("0.9", True), ("0.10.0", False), (None, False)])
def test_a_newer_wheel_than_the_installed_kit_is_told(
    pip: Callable[..., list[list[str]]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    own: str | None, told: bool,
) -> None:  # fmt: skip
    pip()
    for version in ("0.8.0", "0.10.0", "0.9.1", "newest"):
        (tmp_path / f"dreambooth_lib-{version}-py3-none-any.whl").touch()
    here = {"peft": "0.20.0", "tomli-w": "1.2"} | ({"dreambooth-lib": own} if own else {})
    monkeypatch.setattr(install, "installed", lambda: here)
    monkeypatch.chdir(tmp_path)
    wheel = "./dreambooth_lib-0.10.0-py3-none-any.whl"
    assert str(install.install_missing()) == (
        "Nothing to install; no preinstalled package was changed; the kit's version is 0.9, and "
        f"{wheel} is newer: to use it, run %pip install --no-deps --force-reinstall '{wheel}' and "
        "restart the session."
        if told
        else "Nothing to install; no preinstalled package was changed."
    )


def test_the_extra_has_what_the_kit_can_do_without() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert project["optional-dependencies"]["heif"] == [*install.OPTIONAL]


def test_a_missing_pip_is_one_sentence(pip: Callable[..., list[list[str]]]) -> None:
    pip(1, "/usr/bin/python: No module named pip\n")
    with pytest.raises(InstallError, match="No module named pip"):
        install.install_missing()


# Colab


def moved(wanted: list[str], here: dict[str, str], environment: dict[str, str]) -> list[str]:
    """Return what would change if these were installed, with all that they require in turn.

    The newest version of a missing package is taken to be the one that the tests run with.
    """
    plan = missing_packages(wanted, here, environment)
    found = [f"{requirement} against {version}" for requirement, version in plan.too_old.items()]
    for line in plan.missing:
        name = canonicalize_name(Requirement(line).name)
        if name not in here:
            here = {**here, name: metadata.version(name)}
            found += moved(metadata.requires(name) or [], here, environment)
    return found


@pytest.mark.skipif(not COLAB_FREEZE, reason="DREAMBOOTH_TEST_COLAB_FREEZE is not set")
@pytest.mark.parametrize("python", RUNTIMES)
def test_nothing_preinstalled_on_colab_would_change(python: str) -> None:
    here = pins(Path(COLAB_FREEZE).read_text()) | RUNTIMES[python]
    environment = {"python_version": python, "python_full_version": f"{python}.13",
                   "sys_platform": "linux", "platform_machine": "x86_64"}  # fmt: skip
    plan = missing_packages(install.required(), here, environment)
    assert {Requirement(line).name for line in plan.missing} == {"bitsandbytes", "tomli-w"}
    assert moved(install.required(), here, environment) == []
    assert not {"bitsandbytes", "tomli-w"} & {pin.split("==")[0] for pin in plan.pins}
    assert {f"{name}=={here[name]}" for name in ("torch", "numpy", "ipywidgets")} <= {*plan.pins}


def test_what_would_change_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    needs = {"b": ["c>=1", "a"], "c": ["a>=3; python_version >= '3.13'"]}
    monkeypatch.setattr(metadata, "requires", needs.__getitem__)
    monkeypatch.setattr(metadata, "version", lambda name: "1.0")
    here = {"a": "2.0"}
    assert moved(["a>=1", "b"], here, {"python_version": "3.12"}) == []
    assert moved(["a>=1", "b"], here, {"python_version": "3.13"}) == ["a>=3 against 2.0"]
    assert moved(["a>=2.5"], here, {}) == ["a>=2.5 against 2.0"]
