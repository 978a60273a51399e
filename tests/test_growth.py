"""The tables of growth: each of its measurements once, on a tiny model."""

import subprocess
import sys
from pathlib import Path

import pytest

from tools import growth


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growth, "STEPS", 2)
    monkeypatch.setattr(growth, "SIDE", 16)


@pytest.mark.parametrize(("name", "size"), [("class-images", 2), ("photos", 3), ("validation", 8)])
def test_a_size_is_measured(name: str, size: int) -> None:
    found = growth.one(name, size)
    assert found["size"] == size and found["peak"] > 0
    assert found["computed"] >= 3 * size * 16**2
    assert found["seconds"] and min(found["seconds"].values()) > 0


def test_the_real_models_rank_is_computed() -> None:
    small, large = (growth.one("rank", size) for size in (2, 4))
    assert small["computed"] < large["computed"]
    assert small["more"]["TFLOPs of a step"] < large["more"]["TFLOPs of a step"]


def test_a_table_ends_with_what_the_last_size_takes_more() -> None:
    rows = [
        {"size": size, "peak": 10**8 + size * 10**6, "computed": size * 10**6, "more": {},
         "seconds": {"reading": size / 10, "a step": 0.2}}
        for size in (3, 30)
    ]  # fmt: skip
    table = growth.markdown("photos", rows)
    assert "| photos | reading, s | a step, s | peak MB | computed MB |" in table
    assert table.endswith("| x 10 | x 10.0 | x 1.0 | +27 | +27.00 |\n")


def test_an_unknown_table_is_told(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tools.growth", "phtos"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "there is no table phtos; choose of class-images, photos" in done.stderr
