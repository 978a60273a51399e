"""Record what a run was made with: the versions of the libraries, the device and its memory."""

import os
import platform
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

#: In a run's folder, once its training has ended.
MADE_WITH_FILE = "made_with.json"
_PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "bitsandbytes", "numpy")

KIT = __name__.partition(".")[0]


def kit_version() -> str:
    """Return the version of this library."""
    return sys.modules[KIT].__version__


def made_with() -> dict[str, Any]:
    """Return this process's versions and device, its peak memory in MiB, and today's date.

    The memory is the GPU's; on a CPU it is the process's.
    """
    import torch

    versions = {KIT: kit_version(), "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # of one that is optional
            continue
    if torch.cuda.is_available():
        device, peak = torch.cuda.get_device_name(), torch.cuda.max_memory_allocated() / 2**20
    else:
        device = f"CPU ({platform.machine()}, {os.cpu_count()} cores)"
        peak = peak_memory_mb()
    return {
        "versions": versions,
        "device": device,
        "peak_memory_mb": round(peak, 1),
        "date": datetime.now(UTC).date().isoformat(),
    }


def peak_memory_mb() -> float:
    """Return the most memory that this process has had so far, in MiB."""
    if os.name == "nt":
        import psutil

        return psutil.Process().memory_info().peak_wset / 2**20
    import resource

    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
