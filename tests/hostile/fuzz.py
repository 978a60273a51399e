"""Do many cases of each kind of damage and print a table; exit with 1 for any "other".

python -m hostile.fuzz                                   all kinds, as many as each asks for
python -m hostile.fuzz --only pictures --seed 17 --count 1   a single case again
"""

import argparse
import os
import tempfile
from collections import Counter
from pathlib import Path

from hostile.bench import Outcome, run_cases
from hostile.kinds import KINDS

HEAD = (
    f"{'kind':12} {'cases':>6} {'clean':>6} {'sentence':>8} {'other':>6} {'slowest':>8} {'most':>8}"
)


def main() -> int:
    given = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    given.add_argument("--only", nargs="+", choices=[kind.name for kind in KINDS])
    given.add_argument("--count", type=int, help="cases of each kind (default: the kind's own)")
    given.add_argument("--scale", type=float, default=1.0, help="times the kinds' own counts")
    given.add_argument("--seed", type=int, default=0, help="of the first case of each kind")
    given.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    given.add_argument("--report", type=Path, help="a file that lists all others with their seeds")
    asked = given.parse_args()
    kinds = [kind for kind in KINDS if not asked.only or kind.name in asked.only]
    lines, failed = [], 0
    print(HEAD, flush=True)
    # In memory where that is possible: the cases write many small files.
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=place) as folder:
        for kind in kinds:
            kind.prepare(Path(folder) / "material" / kind.name)
            count = asked.count or max(1, round(kind.count * asked.scale))
            seeds = [(kind.name, asked.seed + number) for number in range(count)]
            outcomes = list(run_cases(seeds, Path(folder), asked.workers))
            print(row(kind.name, outcomes), flush=True)
            failed += sum(outcome.ended == "other" for outcome in outcomes)
            lines += [
                *others(outcomes),
                *(["\n".join(map(str, outcomes))] if asked.count == 1 else []),
            ]
            if asked.report:
                asked.report.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    return 1 if failed else 0


def row(name: str, outcomes: list[Outcome]) -> str:
    ended = Counter(outcome.ended for outcome in outcomes)
    slowest = max(outcome.seconds for outcome in outcomes)
    most = max(outcome.memory_mb for outcome in outcomes)
    counts = f"{ended['clean']:6} {ended['sentence']:8} {ended['other']:6}"
    return f"{name:12} {len(outcomes):6} {counts} {slowest:6.1f} s {most:5.0f} MB"


def others(outcomes: list[Outcome]) -> list[str]:
    """List each way in which cases ended otherwise, with how many there are and their seeds."""
    ways: dict[str, list[Outcome]] = {}
    for outcome in sorted(outcomes, key=lambda outcome: outcome.seed):
        if outcome.ended == "other":
            start = outcome.text.split(":")[0]
            place = outcome.text.rsplit("(", 1)[-1] if "(" in outcome.text else ""
            ways.setdefault(f"{start} {place}", []).append(outcome)
    return [
        f"{same[0].kind} x{len(same)}, seeds {' '.join(str(o.seed) for o in same[:6])}: "
        f"{same[0].text[:600]}"
        for same in ways.values()
    ]


if __name__ == "__main__":
    raise SystemExit(main())
