"""Make the disk fail at each write of each stage; then let it work again.

python -m hostile.faults                              every write of every stage
python -m hostile.faults --only resume --every 5      a fifth of the writes of one stage

From a write on, all fail: with no room, a quota, a read-only disk or a broken one. The stage then
ends with a :class:`KitError` of one line that names the folder. No file is half-made, and once the
disk works the same stage gives the same bits as if nothing had happened.
"""

import argparse
import contextlib
import errno
import io
import os
import re
import shutil
import tempfile
import warnings
from pathlib import Path
from unittest import mock

import torch

from dreambooth_lib.core import files
from dreambooth_lib.core.errors import KitError
from dreambooth_lib.training.checkpoints import load_state
from hostile.methods import digest, result
from hostile.moments import watched
from hostile.stages import FINDS, STAGES, prepare

ERRORS = (errno.ENOSPC, errno.EROFS, errno.EIO, errno.EDQUOT)
#: What is told anew each time, such as a backup's times.
UNLIKE = ("made_with.json", "metrics.json", ".backup.json")


def clean(name: str, material: Path, folder: Path) -> tuple[list[str], dict[str, str]]:
    """Do a stage on a sound disk: its moments, and what it leaves in the folder."""
    begin(name, material, folder)
    with watched(folder) as moments, quietly():
        STAGES[name](material, folder)
    return list(moments), left(folder)


def begin(name: str, material: Path, folder: Path) -> None:
    """Empty the folder, and put there the run that a stage starts from."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if name in FINDS:
        shutil.copytree(material / FINDS[name], folder, dirs_exist_ok=True)


def left(folder: Path) -> dict[str, str]:
    return {k: v for k, v in result(folder).items() if Path(k).name not in UNLIKE}


@contextlib.contextmanager
def quietly():  # type: ignore[no-untyped-def]
    """Show nothing, and wait for nothing between tries."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        with mock.patch.object(files, "WAITS", ()):
            yield


def fail_at(
    name: str, material: Path, folder: Path, at: int, number: int, expected: dict[str, str]
) -> str:
    """Do a stage on a disk that fails from a moment on; return what is wrong, "" if nothing."""

    def act(moment: int, what: str) -> None:
        if moment >= at:
            raise OSError(number, os.strerror(number), str(folder / what.split(" ", 1)[1]))

    begin(name, material, folder)
    problem = ""
    try:
        with watched(folder, act), quietly():
            STAGES[name](material, folder)
        problem = "says nothing"
    except KitError as error:
        text = str(error)
        if not text.isprintable() or str(folder) not in text:
            problem = f"says {text[:300]!r}"
    except BaseException as error:
        problem = f"raises {type(error).__name__}: {str(error)[:300]}"
    problem = problem or half_made(folder, expected)
    if problem:
        return problem
    try:
        with quietly():
            STAGES[name](material, folder)
    except Exception as error:
        return f"does not go on: {type(error).__name__}: {str(error)[:300]}"
    found = left(folder)
    names = [n for n in sorted(found | expected) if found.get(n) != expected.get(n)]
    return f"then differs in {', '.join(names)[:300]}" if names else ""


def half_made(folder: Path, expected: dict[str, str]) -> str:
    """Return which of the files that a failed stage has left is not whole; "" if all are."""
    for path in files.visible_files(folder):
        file = folder / path
        if file.suffix == ".jsonl" or path.name in ("digests.json", *UNLIKE):
            continue
        try:
            if file.parent.parent.name == "checkpoints":
                load_state(file.parent)
            elif path.as_posix() in expected:
                same = digest(file) == expected[path.as_posix()]
                if not same and path.name not in ("table.csv", "failures.json", "metrics.json"):
                    return f"leaves another {path}"
            elif not any(part.startswith("tmp") for part in path.parts):
                return f"leaves {path}"
        except Exception as error:
            return f"leaves half of {path}: {error}"
    return ""


def kinds_of(moments: list[str]) -> dict[str, int]:
    """Return one moment of each kind by its name, in which numbers do not count."""
    named: dict[str, int] = {}
    for number, moment in enumerate(moments, 1):
        named.setdefault(re.sub(r"[0-9a-f]{6,}|\d+", "N", moment), number)
    return named


def main() -> int:
    given = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    given.add_argument("--only", nargs="+", choices=STAGES, default=list(STAGES))
    given.add_argument("--every", type=int, default=1, help="try every n-th write")
    given.add_argument("--kinds", action="store_true", help="try one write of each kind")
    asked = given.parse_args()
    torch.set_num_threads(1)
    lost = 0
    print(f"{'stage':20} {'writes':>6} {'tried':>6} {'wrong':>6}", flush=True)
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=place) as root:
        material, folder = Path(root) / "material", Path(root) / "disk"
        prepare(material)
        for name in asked.only:
            moments, expected = clean(name, material, folder)
            chosen = list(range(1, len(moments) + 1, asked.every))
            chosen = list(kinds_of(moments).values()) if asked.kinds else chosen
            wrong: dict[str, list[str]] = {}
            for at in chosen:
                number = ERRORS[0] if at % 3 else ERRORS[at // 3 % len(ERRORS)]
                if problem := fail_at(name, material, folder, at, number, expected):
                    what = f"{errno.errorcode[number]} at {at} ({moments[at - 1]})"
                    wrong.setdefault(problem, []).append(what)
            count = sum(map(len, wrong.values()))
            print(f"{name:20} {len(moments):6} {len(chosen):6} {count:6}", flush=True)
            for problem, places in wrong.items():
                print(f"  x{len(places)} {'; '.join(places[:3])}: {problem}", flush=True)
            lost += count
    return 1 if lost else 0


if __name__ == "__main__":
    raise SystemExit(main())
