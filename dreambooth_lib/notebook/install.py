"""What the kit needs beside what is installed, and how to add it without moving anything.

A fresh Colab has no ``dreambooth_lib`` to ask yet, so a notebook's first cell takes two steps:

    try:
        import dreambooth_lib
    except ModuleNotFoundError:
        %pip install --quiet --no-deps git+ADDRESS
    from dreambooth_lib import packages
    print(packages.install_missing())

``--no-deps`` brings the kit and nothing else. Then pip is asked only for what is absent, under a
constraints file that holds every installed package at its version: pip either finds a way that
leaves them alone or fails with nothing changed. Nothing that may be imported already is replaced,
so no restart is needed. A package that is there but too old stays as it is and is named;
:mod:`dreambooth_lib.notebook.preflight` shows it red. Nothing here imports what is looked for.
"""

import importlib
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

NAME = "dreambooth-lib"


class InstallError(RuntimeError):
    """pip could not add what is absent; nothing was changed."""


@dataclass(frozen=True)
class Plan:
    """What :func:`install_missing` adds, and what it leaves as it is."""

    absent: list[str]  #: requirements of which no version is installed
    too_old: dict[str, str]  #: requirements of which another version is installed, and which
    pins: list[str]  #: every installed package at its version, as lines of a constraints file

    def pip_arguments(self, constraints: str | Path) -> list[str]:
        """Return what follows ``pip``; the file ``constraints`` holds :attr:`pins`."""
        return ["install", "--quiet", "--constraint", str(constraints), *self.absent]

    def __str__(self) -> str:
        added = f"Added: {', '.join(self.absent)}" if self.absent else "Nothing is absent"
        kept = f"the {len(self.pins)} packages that are installed stay as they are"
        old = [f", {here} though {wanted} is needed" for wanted, here in self.too_old.items()]
        return f"{added}; {kept}{''.join(old)}."


def required() -> list[str]:
    """Return the kit's requirements: the installed package's, or a checkout's file."""
    try:
        return metadata.requires(NAME) or []
    except metadata.PackageNotFoundError:
        lines = Path(__file__).parents[2].joinpath("requirements.txt").read_text().splitlines()
        return [bare for line in lines if (bare := line.split("#")[0].strip())]


def installed() -> dict[str, str]:
    """Return every installed package's version, by its canonical name."""
    found = [(one.metadata["Name"], one) for one in metadata.distributions()]
    # A broken one may have no name; of two of a name, Python imports the first.
    return {canonicalize_name(name): one.version for name, one in reversed(found) if name}


def missing_packages(
    requirements: Iterable[str],
    installed: Mapping[str, str],
    environment: Mapping[str, str] | None = None,
) -> Plan:
    """Compare requirements with what is installed, by canonical name and version.

    Markers are those of ``environment`` (``{"python_version": "3.13", ...}``) over this Python's
    own; requirements of extras do not count.
    """
    absent, too_old = [], {}
    for requirement in map(Requirement, requirements):
        context = {"extra": "", **(environment or {})}
        if requirement.marker and not requirement.marker.evaluate(context):
            continue
        version = installed.get(canonicalize_name(requirement.name))
        requirement.marker = None
        if version is None:
            absent.append(str(requirement))
        elif not requirement.specifier.contains(version, prereleases=True):
            too_old[str(requirement)] = version
    pins = []
    for name, version in installed.items():
        with suppress(InvalidVersion):  # a system's own packages have some that pip does not take
            pins.append(f"{name}=={Version(version)}")
    return Plan(absent, too_old, sorted(pins))


def install_missing() -> Plan:
    """Add what is absent and move nothing; return the plan that was carried out.

    Raises :class:`InstallError` where pip finds no such way, or cannot reach its index.
    """
    plan = missing_packages(required(), installed())
    if plan.absent:
        with tempfile.TemporaryDirectory() as folder:
            constraints = Path(folder) / "installed.txt"
            constraints.write_text("\n".join(plan.pins))
            command = [sys.executable, "-m", "pip", *plan.pip_arguments(constraints)]
            done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if line.strip()]
            said = next((line for line in errors if line.startswith("ERROR")), *errors[-1:] or [""])
            raise InstallError(
                f"pip could not add {', '.join(plan.absent)} beside what is installed ({said}); "
                "check the network, or start from a fresh session."
            )
        importlib.invalidate_caches()
    return plan
