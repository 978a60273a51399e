"""Install the packages that are missing without changing any that is installed.

A fresh Colab has no ``dreambooth_lib`` yet, so a notebook's first cell takes two steps:

    try:
        from dreambooth_lib.notebook import install
    except ImportError:
        %pip install --quiet --no-deps git+ADDRESS
        from dreambooth_lib.notebook import install
    print(install.install_missing())

``--no-deps`` installs the kit alone. Then pip installs only the missing packages, under a
constraints file that pins every installed package to its version: it either leaves them all alone
or fails with nothing changed. No package that may already be imported is replaced, so no restart
is needed. A package that is too old stays as it is and is named; :mod:`.preflight` shows it red.
Nothing here imports the packages it checks.
"""

import importlib
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from glob import glob
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from dreambooth_lib.core.errors import KitError

NAME = "dreambooth-lib"
#: Packages that the kit can do without, as in its extra "heif", and what it cannot do then.
OPTIONAL = {
    "pillow-heif>=0.22": "HEIC photos, such as an iPhone's, cannot be read: convert them to JPEG"
}
#: Where a notebook's first cell searches for a wheel, as long as the kit is not installed.
WHEELS = (".", "..", "../..", "/content", "/content/drive/MyDrive",
          "/content/drive/MyDrive/Colab Notebooks")  # fmt: skip


class InstallError(KitError, RuntimeError):
    """A failure of pip, which left every package as it was."""


@dataclass(frozen=True)
class Plan:
    """The packages that :func:`install_missing` installs, and those that it leaves alone."""

    missing: list[str]  #: requirements of which no version is installed
    too_old: dict[str, str]  #: requirements, each with the version that is installed instead
    pins: list[str]  #: every installed package's version, as lines of a constraints file
    #: What cannot be done without a package that was not installed, and :func:`newer_wheel`.
    notes: tuple[str, ...] = ()

    def pip_arguments(self, constraints: str | Path) -> list[str]:
        """Return pip's arguments; the file ``constraints`` holds :attr:`pins`."""
        return ["install", "--quiet", "--constraint", str(constraints), *self.missing]

    def __str__(self) -> str:
        added = f"Installed: {', '.join(self.missing)}" if self.missing else "Nothing to install"
        old = [f"; {needed} is required, but {version} is installed: run %pip install -U "
               f"'{needed}' and restart the session"
               for needed, version in self.too_old.items()]  # fmt: skip
        old += [f"; {note}" for note in self.notes]
        return f"{added}; no preinstalled package was changed{''.join(old)}."


def required() -> list[str]:
    """Return the kit's requirements, from the installed package or the checkout's file."""
    try:
        return metadata.requires(NAME) or []
    except metadata.PackageNotFoundError:
        lines = Path(__file__).parents[2].joinpath("requirements.txt").read_text().splitlines()
        return [bare for line in lines if (bare := line.split("#")[0].strip())]


def installed() -> dict[str, str]:
    """Return every installed package's version, by its canonical name."""
    packages = [(package.metadata["Name"], package) for package in metadata.distributions()]
    # A broken one may have no name; of two with the same name, Python imports the first.
    return {canonicalize_name(name): p.version for name, p in reversed(packages) if name}


def missing_packages(
    requirements: Iterable[str],
    installed: Mapping[str, str],
    environment: Mapping[str, str] | None = None,
) -> Plan:
    """Compare requirements with the installed packages, by canonical name and version.

    ``environment`` (``{"python_version": "3.13", ...}``) overrides this Python's own values for
    the requirements' markers; requirements of extras are ignored.
    """
    missing, too_old = [], {}
    for requirement in map(Requirement, requirements):
        context = {"extra": "", **(environment or {})}
        if requirement.marker and not requirement.marker.evaluate(context):
            continue
        version = installed.get(canonicalize_name(requirement.name))
        requirement.marker = None
        if version is None:
            missing.append(str(requirement))
        elif not requirement.specifier.contains(version, prereleases=True):
            too_old[str(requirement)] = version
    pins = []
    for name, version in installed.items():
        with suppress(
            InvalidVersion
        ):  # some of a system's own packages have versions that pip rejects
            pins.append(f"{name}=={Version(version)}")
    return Plan(missing, too_old, sorted(pins))


def newer_wheel() -> str:
    """Say how to use a wheel that is newer than the installed kit; empty if none lies here."""
    if (own := installed().get(NAME)) is None:
        return ""
    newest, name = Version(own), ""
    for place in WHEELS:
        for wheel in glob("dreambooth_lib-*.whl", root_dir=place):
            with suppress(InvalidVersion):
                if (version := Version(wheel.split("-")[1])) > newest:
                    newest, name = version, f"{place}/{wheel}"
    return name and (
        f"the kit's version is {own}, and {name} is newer: to use it, run "
        f"%pip install --no-deps --force-reinstall '{name}' and restart the session"
    )


def install_missing() -> Plan:
    """Install the missing packages without changing any other; return the plan.

    Of :data:`OPTIONAL`, too, what pip can install. Raises :class:`InstallError` if pip cannot
    install what is required, or cannot reach its index.
    """
    plan = missing_packages(required(), installed())
    _install(plan)
    for requirement, lack in OPTIONAL.items():
        optional = missing_packages([requirement], installed())
        try:
            _install(optional)
        except InstallError:
            note = f"{optional.missing[0]} could not be installed, so {lack}"
            plan = replace(plan, notes=(*plan.notes, note))
        else:
            plan = replace(plan, missing=plan.missing + optional.missing)
    newer = newer_wheel()
    return replace(plan, notes=(*plan.notes, newer)) if newer else plan


def _install(plan: Plan) -> None:
    if plan.missing:
        with tempfile.TemporaryDirectory() as folder:
            constraints = Path(folder) / "installed.txt"
            constraints.write_text("\n".join(plan.pins))
            command = [sys.executable, "-m", "pip", *plan.pip_arguments(constraints)]
            done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if line.strip()]
            last = errors[-1] if errors else ""
            message = next((line for line in errors if line.startswith("ERROR")), last)
            raise InstallError(
                f"pip could not install {', '.join(plan.missing)} without changing other packages "
                f"({message}); check the network, or start from a fresh session."
            )
        importlib.invalidate_caches()
