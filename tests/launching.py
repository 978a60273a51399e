"""Commands in processes of their own, one or two that form a group."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
#: Before a script, or before ``-m`` and a module: two processes of it.
TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def launched(
    *words: str, python: str | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Return a command on one thread a process, from this checkout."""
    given = {k: v for k, v in os.environ.items() if not k.startswith("ACCELERATE_")}
    given |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    settings: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 240}
    return subprocess.run([python or sys.executable, *words], env=given, check=False, **settings)
