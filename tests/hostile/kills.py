"""Kill training at chosen and at random moments; resumed, it gives the same bits.

python -m hostile.kills                          200 kills over all methods
python -m hostile.kills --only lora --seed 17 --count 1   a single kill again
"""

import argparse
import os
import shutil
import signal
import socket
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

from hostile.bench import nursery
from hostile.methods import METHODS, config_of, result, train_to_end
from hostile.moments import watched

PATIENCE = 120.0  #: seconds after which a run counts as one that hangs


@dataclass(frozen=True)
class Kill:
    method: str
    seed: int
    moment: str  #: what was being written, or after how many seconds it was
    lost: str  #: what is lost or differs; empty if nothing


def _train(method: str, material: Path, folder: Path, rank: int, port: int, kill_at: int) -> None:
    """Train in a process of its own, which kills itself at that moment; 0 is never."""

    def act(number: int, what: str) -> None:
        if number == kill_at:
            (material / "moment").write_text(what)
            os.kill(os.getpid(), signal.SIGKILL)

    os.dup2(os.open(material / f"stderr{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2,
             "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # fmt: skip
    os.environ |= {name: str(value) for name, value in group.items()} if port else {}
    with watched(folder, act) as seen:
        train_to_end(config_of(method, material), folder / "run")
    (material / f"moments{rank}").write_text("\n".join(seen))


def attempt(
    method: str, material: Path, folder: Path, kill_at: int = 0, kill_after: float = PATIENCE
) -> bool:
    """Train until the end or a kill, by its own hand or after seconds; return whether it ended.

    Of a group of two the first kills itself, and the other is killed with it, as launchers do.
    """
    ranks, port = (2, _free_port()) if method == "two_processes" else (1, 0)
    given = [(method, material, folder, r, port, kill_at if r == 0 else 0) for r in range(ranks)]
    processes = [nursery().Process(target=_train, args=arguments) for arguments in given]
    for process in processes:
        process.start()
    until = time.monotonic() + kill_after
    while any(p.is_alive() for p in processes) and time.monotonic() < until:
        processes[0].join(0.02)
        if any(p.exitcode not in (None, 0) for p in processes):
            break
    for process in processes:
        process.kill()
        process.join()
    return all(process.exitcode == 0 for process in processes)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def reference(method: str, folder: Path) -> tuple[Path, dict[str, str], list[str], float]:
    """Train a run without a kill: its material, its result, its moments, and its seconds."""
    material, sound = folder / method / "material", folder / method / "sound"
    material.mkdir(parents=True)
    config_of(method, material)
    start = time.monotonic()
    if not attempt(method, material, sound):
        raise RuntimeError(f"{method} does not train: {(material / 'stderr0').read_text()[-2000:]}")
    moments = (material / "moments0").read_text().splitlines()
    return material, result(sound), moments, time.monotonic() - start


def kill_and_resume(method: str, folder: Path, seeds: list[int]) -> Iterator[Kill]:
    """Kill a method's run once for each seed, at times twice, and resume it to its end."""
    material, expected, moments, seconds = reference(method, folder)
    for seed in seeds:
        rng, place = Random(f"{method} {seed}"), folder / method / "killed"
        shutil.rmtree(place, ignore_errors=True)
        at, lost = [], ""
        for _ in range(rng.choice((1, 1, 1, 2))):
            (material / "moment").unlink(missing_ok=True)
            chosen = rng.randrange(1, len(moments) + 1) if rng.random() < 0.7 else 0
            after = PATIENCE if chosen else rng.uniform(0.0, seconds)
            attempt(method, material, place, chosen, after)
            said = material / "moment"
            at.append(said.read_text() if said.exists() else f"after {min(after, seconds):.2f} s")
        if not attempt(method, material, place):
            lost = f"is not resumed: {(material / 'stderr0').read_text()[-300:]}"
        else:
            found = result(place)
            names = [n for n in sorted(found | expected) if found.get(n) != expected.get(n)]
            lost = f"differs in {', '.join(names)}" if names else ""
        yield Kill(method, seed, ", ".join(at), lost)


def main() -> int:
    given = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    given.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS))
    given.add_argument("--count", type=int, default=200, help="kills over all methods")
    given.add_argument("--seed", type=int, default=0, help="of the first kill of each method")
    asked = given.parse_args()
    lost = 0
    print(f"{'method':14} {'kills':>6} {'same bits':>10} {'lost':>6}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for number, method in enumerate(asked.only):
            count = len(range(number, asked.count, len(asked.only)))
            seeds = list(range(asked.seed, asked.seed + count))
            kills = list(kill_and_resume(method, Path(folder), seeds))
            ended = Counter(bool(kill.lost) for kill in kills)
            print(f"{method:14} {count:6} {ended[False]:10} {ended[True]:6}", flush=True)
            for kill in kills:
                if kill.lost or asked.count == 1:
                    print(f"  seed {kill.seed}, killed at {kill.moment}: {kill.lost}", flush=True)
            lost += ended[True]
    return 1 if lost else 0


if __name__ == "__main__":
    raise SystemExit(main())
