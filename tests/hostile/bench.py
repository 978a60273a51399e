"""Judge cases in worker processes: what came of each, in which time, with how much memory.

A case ends in one of three ways. It is *clean*: the right result. It is *a sentence*: a
:class:`KitError` of one printable line that names the file. Or it is *other*: any other exception,
a wrong result, a write outside the case's folder, a crash, too many seconds or too much memory.
"""

import contextlib
import io
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

SECONDS = 10.0  #: of one processor's time that a case may take; thrice of it in all
MEMORY_MB = 1000.0  #: that a case may take above what its worker had at its start

#: Does one case in an empty folder; raises :class:`KitError` for a sentence. Gets the generator of
#: the case's seed, the folder of :class:`Kind`'s material, and the case's folder.
Case = Callable[[Random, Path, Path], None]


@dataclass(frozen=True)
class Kind:
    """A kind of damage: what makes its material once, and what does a case."""

    name: str
    prepare: Callable[[Path], None]
    case: Case
    count: int  #: of cases that ``make fuzz`` does


@dataclass(frozen=True)
class Outcome:
    kind: str
    seed: int
    ended: str  #: "clean", "sentence" or "other"
    text: str  #: the sentence, or what else happened
    seconds: float
    memory_mb: float


class Wrong(AssertionError):
    """A result that a case must not have."""


def judge(kind: Kind, seed: int, material: Path, folder: Path) -> Outcome:
    """Do one case in this process."""
    from dreambooth_lib.core.errors import KitError

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    _written_elsewhere.clear()
    before, start = _peak_mb(reset=True), time.process_time()
    ended, text = "clean", ""
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with _only_inside(folder):
                kind.case(Random(f"{kind.name} {seed}"), material, folder)
    except KitError as error:
        ended, text = "sentence", str(error)
        names = {path.name for path in folder.rglob("*")}
        if not text.isprintable():
            ended, text = "other", f"not one printable line: {text[:600]!r}"
        elif str(folder) not in text and not any(name in text for name in names):
            ended, text = "other", f"names no file: {text}"
    except BaseException as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(last.filename).name}:{last.lineno}"
        ended, text = "other", f"{type(error).__name__}: {str(error)[:300]} ({place})"
    seconds, memory = time.process_time() - start, _peak_mb() - before
    if _written_elsewhere:
        ended, text = "other", f"wrote outside: {_written_elsewhere[:3]}"
    elif seconds > SECONDS or memory > MEMORY_MB:
        ended, text = "other", f"took {seconds:.1f} s and {memory:.0f} MB ({text})"
    return Outcome(kind.name, seed, ended, text, seconds, memory)


def _peak_mb(reset: bool = False) -> float:
    """Return this process's peak resident memory in MB, since the last reset where Linux can."""
    with contextlib.suppress(OSError):
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


# What writes to a path, by the names of Python's audit events. A hook cannot be taken off again.
_WRITES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.link", "os.symlink")
_written_elsewhere: list[str] = []
_allowed: list[str] = []


@contextlib.contextmanager
def _only_inside(folder: Path) -> Iterator[None]:
    if not _allowed:
        sys.addaudithook(_audit)
    temporary = os.path.join(tempfile.gettempdir(), tempfile.gettempprefix())
    _allowed[:] = [f"{folder}{os.sep}", "/dev/null", temporary]
    try:
        yield
    finally:
        _allowed[:] = ["/"]


def _audit(event: str, given: tuple[Any, ...]) -> None:
    writes = event in _WRITES
    if event == "open":
        writes = isinstance(given[2], int) and bool(given[2] & (os.O_WRONLY | os.O_RDWR))
    if not writes or isinstance(given[0], int):
        return
    # A name may be relative to an open folder, which is given by number, as in rmtree.
    relative = event in ("os.remove", "os.rmdir", "os.mkdir") and given[-1] not in (-1, None)
    target = given[1] if event in ("os.symlink", "os.link", "os.rename") else given[0]
    path = os.path.abspath(os.fsdecode(target))
    if not relative and not any(f"{path}{os.sep}".startswith(place) for place in _allowed):
        _written_elsewhere.append(f"{event} {path}")


def _work(material: Path, folder: Path, orders: Connection) -> None:
    """Do the cases that come, and send what came of each."""
    import torch

    from hostile.kinds import KINDS

    kinds = {kind.name: kind for kind in KINDS}

    torch.set_num_threads(1)
    sys.stderr = io.StringIO()
    while order := orders.recv():
        name, seed = order
        orders.send(judge(kinds[name], seed, material / name, folder))


def nursery() -> Any:
    """Return what starts processes: forks of one that has imported all, on one thread, offline."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hostile.kinds", "hostile.methods"])
    given = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    with mock.patch.dict(os.environ, given):
        forkserver.ensure_running()
    return context


def run_cases(seeds: list[tuple[str, int]], folder: Path, workers: int = 2) -> Iterator[Outcome]:
    """Do the cases of these kinds and seeds in worker processes; yield outcomes as they come.

    A worker that takes too long is killed and another one takes its place.
    """
    context = nursery()
    pending, busy = list(reversed(seeds)), {}

    def hire(number: int) -> tuple[Any, Connection]:
        mine, theirs = context.Pipe()
        given = (folder / "material", folder / f"case{number}", theirs)
        process = context.Process(target=_work, args=given, daemon=True)
        process.start()
        theirs.close()
        return process, mine

    staff = {number: hire(number) for number in range(min(workers, len(seeds)))}
    idle = list(staff)
    while pending or busy:
        while idle and pending:
            number, order = idle.pop(), pending.pop()
            staff[number][1].send(order)
            busy[number] = (order, time.monotonic())
        wait([staff[number][1] for number in busy], timeout=0.5)
        for number, ((name, seed), since) in list(busy.items()):
            process, pipe = staff[number]
            outcome, took = None, time.monotonic() - since
            if pipe.poll():
                with contextlib.suppress(EOFError, OSError):
                    outcome = pipe.recv()
            elif took < 3 * SECONDS:
                continue
            if outcome is None:
                why = f"was killed after {took:.0f} s" if process.is_alive() else "crashed"
                outcome = Outcome(name, seed, "other", f"the process {why}", took, 0.0)
                process.kill()
                staff[number] = hire(number)
            del busy[number]
            idle.append(number)
            yield outcome
    for process, pipe in staff.values():
        pipe.send(None)
        process.join(10)
