"""What the benchmark measures with: each function once, briefly."""

from pathlib import Path

import pytest

from tools import bench


def test_a_step_is_timed_beside_the_unet_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "ROUNDS", 1)
    monkeypatch.setattr(bench, "WARMUP", 1)
    found = bench.measure(1, "adamw", tmp_path)
    assert found["ratio"] == pytest.approx(
        found["unet_alone_per_second"] / found["steps_per_second"]
    )
    assert found["ratio"] > 0
    assert found["batch"] == "1 instance + 1 class"


def test_an_evaluation_is_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, few in {"PROMPTS": 1, "FEW": 8, "MANY": 16}.items():
        monkeypatch.setattr(bench, name, few)
    found = bench.evaluation(tmp_path)
    assert min(found[f"{what}_per_second"] for what in ("drawn", "embedded", "scored")) > 0


def test_import_is_timed() -> None:
    assert 0 < bench.import_seconds() < 60
