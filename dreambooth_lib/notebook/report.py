"""Describe this machine for an issue: versions, GPU and checks, without anything private."""

import platform

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from dreambooth_lib.core.made_with import KIT, kit_version
from dreambooth_lib.core.user_text import without_private
from dreambooth_lib.notebook import install, preflight

#: Optional packages that often cause faults.
_ALSO = ("peft", "torchao", "torchvision", "jupyterlab", "notebook", "pillow-heif")


def report(base: str = "toybox") -> str:
    """Return Markdown that an issue can hold: versions, and the checks of a run on ``base``.

    It contains no token, no path of a home folder and no user name.
    """
    found = install.installed()
    needed = [Requirement(line) for line in install.required()]
    own = [r.name for r in needed if r.marker is None or r.marker.evaluate({"extra": ""})]
    names = dict.fromkeys(map(canonicalize_name, [*own, *_ALSO]))
    rows = [
        (KIT, kit_version()),
        ("Python", platform.python_version()),
        ("system", platform.platform()),
        *((name, found[name]) for name in names if name in found),
    ]
    versions = "\n".join(f"| {name} | {version} |" for name, version in rows)
    checks = preflight.Table(preflight.preflight(base, "."))
    text = f"| | version |\n|---|---|\n{versions}\n\n```\n{checks!r}\n```"
    return without_private(text)
