"""Take in what Colab has: ``python -m tools.colab_freeze FILE``, where FILE is its ``pip freeze``.

``constraints-colab.txt`` then holds those versions, of which the tests' second environment takes
what it installs (``requirements-colab.txt``) or stands in for (``tools/stand_ins.py``).
"""

import argparse
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
CONSTRAINTS = ROOT / "constraints-colab.txt"
HEAD = """\
# Colab's versions, from its pip freeze by python -m tools.colab_freeze; do not edit by hand.
# torch is the tested one, since Colab's own build needs a GPU's libraries; what a build of torch
# brings of its own is left out.
"""
OWN = {"torch": "2.13.0"}
_OF_TORCH = re.compile(r"setuptools|triton|cuda-.*|nvidia-(?!ml-py).*")


def canonical(name: str) -> str:
    """Return a distribution's name as packages are compared by it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(text: str) -> dict[str, str]:
    """Versions by canonical name, of a freeze or constraints; of an address no version is known."""
    found = re.findall(r"^([\w.-]+)==([^\s;#]+)", text, flags=re.MULTILINE)
    return {canonical(name): version for name, version in found}


def of_torch(name: str) -> bool:
    """Tell whether a distribution comes with a torch build: never at Colab's version."""
    return name in OWN or _OF_TORCH.fullmatch(name) is not None


def constraints(freeze: str) -> str:
    """Return ``constraints-colab.txt`` for a freeze. Raises ``ValueError`` for another file."""
    found = pins(freeze)
    if not found.keys() >= OWN.keys():
        raise ValueError(
            f"this is no freeze of Colab's, as it lacks {', '.join(OWN)}; give what `pip freeze` "
            "prints there, or pip-freeze.gpu.txt of googlecolab/backend-info."
        )
    rows = OWN | {name: version for name, version in found.items() if not of_torch(name)}
    return HEAD + "".join(f"{name}=={version}\n" for name, version in sorted(rows.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("file", type=Path)
    try:
        text = constraints(parser.parse_args().file.read_text())
    except (OSError, ValueError) as error:
        parser.error(str(error))
    before, after = pins(CONSTRAINTS.read_text()), pins(text)
    CONSTRAINTS.write_text(text)
    for name in sorted(before.keys() | after.keys()):
        old, new = before.get(name, "absent"), after.get(name, "absent")
        if old != new:
            print(f"{name}: {old} -> {new}")
    print("Now `make test` builds the environment anew, and says what it lacks.")


if __name__ == "__main__":
    main()
