"""Test that no damaged file leads to anything but a right result or a sentence that names it."""

from collections.abc import Callable
from pathlib import Path

import pytest

from dreambooth_lib.core.errors import KitError
from hostile.bench import Kind, judge, run_cases
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


def _raise(error: Exception) -> None:
    raise error


@pytest.mark.parametrize(
    ("act", "ended"),
    [
        (lambda folder: (folder / "inside").write_text("x"), "clean"),
        (lambda folder: _raise(KitError(f"{folder} is damaged.")), "sentence"),
        (lambda folder: _raise(KitError("something is damaged.")), "other"),
        (lambda folder: _raise(OSError("raw")), "other"),
        (lambda folder: (folder.parent / "case-2").write_text("x"), "other"),
        (lambda folder: (folder.parent / "outside").mkdir(), "other"),
        (lambda folder: (folder / ".." / "outside").write_text("x"), "other"),
    ],
)
def test_only_right_results_and_sentences_inside_the_folder_pass(
    act: Callable[[Path], object], ended: str, tmp_path: Path
) -> None:
    kind = Kind("any", lambda folder: None, lambda rng, material, folder: act(folder) and None, 1)
    assert judge(kind, 0, tmp_path / "material", tmp_path / "case").ended == ended
