"""Print what the libraries look for by themselves, and have found: ``python -m tools.probed``.

The answer is JSON: distributions by their canonical names, each with its version, or null where
there is none. They are those that transformers, diffusers, peft, accelerate and huggingface_hub ask
for when they are imported, and by their functions that say what is available.
"""

import importlib.metadata
import importlib.util
import json
from collections.abc import Callable
from importlib import import_module
from typing import Any

from tools.colab_freeze import canonical

_CHECKS = (
    "transformers.utils.import_utils",
    "diffusers.utils.import_utils",
    "peft.import_utils",
    "accelerate.utils.imports",
    "huggingface_hub.utils._runtime",
)
#: Distributions whose modules have other names, for where they are not installed.
_OF_MODULES = {
    "PIL": "pillow",
    "bs4": "beautifulsoup4",
    "cv2": "opencv-python",
    "google": "protobuf",
    "multipart": "python-multipart",
    "pynvml": "nvidia-ml-py",
    "pyximport": "cython",
    "sklearn": "scikit-learn",
    "tree": "dm-tree",
    "yaml": "pyyaml",
}


def _noting(function: Callable[..., Any], asked: set[str]) -> Callable[..., Any]:
    def noting(name: str, *given: Any) -> Any:
        asked.add(name.partition(".")[0])
        return function(name, *given)

    return noting


def asked() -> set[str]:
    """Return the modules and distributions that are looked for, by whatever name."""
    found: set[str] = set()
    for module, name in ((importlib.util, "find_spec"), (importlib.metadata, "version")):
        setattr(module, name, _noting(getattr(module, name), found))
    for module_name in _CHECKS:
        for name, check in [*vars(import_module(module_name)).items()]:
            if name.startswith("is_") and callable(check):
                # Some want to be given a version, and some raise at what they find.
                try:
                    check()
                except Exception:
                    continue
    return found


def versions(names: set[str]) -> dict[str, str | None]:
    """Return what is installed of these."""
    of_modules = importlib.metadata.packages_distributions()
    wanted = {name for name in names if name not in of_modules}
    wanted |= {one for name in names for one in of_modules.get(name, [])}
    wanted |= {_OF_MODULES[name] for name in names & _OF_MODULES.keys()}
    here = {canonical(d.name): d.version for d in importlib.metadata.distributions()}
    return {name: here.get(name) for name in sorted(map(canonical, wanted))}


if __name__ == "__main__":
    print(json.dumps(versions(asked())))
