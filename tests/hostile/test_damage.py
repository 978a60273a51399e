"""Test that no damaged file leads to anything but a right result or a sentence that names it."""

from pathlib import Path

import pytest

from hostile.bench import Kind, run_cases
from hostile.fuzz import others
from hostile.kinds import KINDS

#: Cases of each kind, one in so many of those that ``make fuzz`` does.
SHARE = {"pictures": 50, "zips": 50, "configs": 20, "tables": 25, "checkpoints": 25}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_damage_gives_the_right_result_or_a_sentence_that_names_the_file(
    kind: Kind, tmp_path: Path
) -> None:
    kind.prepare(tmp_path / "material" / kind.name)
    count = kind.count // SHARE.get(kind.name, 25)
    outcomes = list(run_cases([(kind.name, seed) for seed in range(count)], tmp_path, workers=1))
    assert len(outcomes) == count
    assert others(outcomes) == []
