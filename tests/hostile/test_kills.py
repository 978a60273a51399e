"""Test that training which is killed and resumed gives the same bits as without the kill."""

from pathlib import Path

import pytest

from hostile.kills import kill_and_resume


@pytest.mark.parametrize(
    ("method", "seeds"),
    [
        ("full", [0, 1]),
        ("validated", [0]),
        ("lora", [1]),
        ("distilled", [0]),
        ("two_processes", [0]),
    ],
)
def test_a_killed_run_resumes_to_the_same_bits(
    method: str, seeds: list[int], tmp_path: Path
) -> None:
    kills = list(kill_and_resume(method, tmp_path, seeds))
    assert [kill.seed for kill in kills] == seeds
    assert [kill for kill in kills if kill.lost] == []
