"""What the benchmark on a CPU measures with: each function once, briefly."""

from pathlib import Path
from typing import Any

import pytest

from tools import bench
from tools.bench_gpu import save_photos
from tools.phases import PHASES

#: A script that moves a weight for ever, and says so as its optimizer's hook does.
SCRIPT = """
import time, torch
weight = torch.nn.Parameter(torch.zeros(1))
adam = torch.optim.AdamW([weight])
while True:
    weight.sum().backward()
    time.sleep(0.01)
    adam.step()
"""


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    few_of = {"STEPS": 2, "WARMUP": 1, "ROUNDS": 3, "PAUSE": 0, "PROMPTS": 1, "FEW": 8, "MANY": 16}
    for name, few in few_of.items():
        monkeypatch.setattr(bench, name, few)


@pytest.fixture
def work(tmp_path: Path) -> Path:
    save_photos(tmp_path, 64)
    return tmp_path


def reference(tmp_path: Path, script: str) -> Path:
    folder = tmp_path / "scripts"
    folder.mkdir()
    (folder / bench.SCRIPT).write_text(script)
    return folder


def figures(*training: dict[str, Any]) -> dict[str, Any]:
    return {"training": training, "demo": None, "import_seconds": 0.1, "evaluation": {}}


def test_a_step_is_timed_beside_its_floor_and_the_reference(work: Path) -> None:
    found = bench.measure(1, work, reference(work, SCRIPT))
    assert found["failed"] is None and 0.01 < found["reference"] < 0.1
    assert found["step_with_ema/floor"] == found["step_with_ema"] / found["floor"]
    assert found["step/reference"] == found["step"] / found["reference"]
    assert set(found["profile"]) == set(PHASES)
    assert all(found["profile"][phase] > 0 for phase in PHASES if phase != "EMA")
    assert sum(found["profile"].values()) == pytest.approx(found["step_with_ema"], rel=3)
    table = bench.markdown(figures(found))
    assert (
        f"| 1 + 1, a step, over the floor's | {found['step/floor']:.2f} | at most 1.15 |" in table
    )
    assert "| the demo | not asked | at most 120 | not asked |" in table


def test_without_a_reference_its_cells_say_so(work: Path) -> None:
    found = bench.measure(1, work)
    assert found["reference"] is None and found["step/reference"] is None
    row = "| 1 + 1, a step, over the reference's | not asked | at most 0.62 | not asked |"
    assert row in bench.markdown(figures(found))


def test_a_reference_that_fails_leaves_its_last_words(work: Path) -> None:
    found = bench.measure(1, work, reference(work, "raise ImportError('no such thing')"))
    assert found["step/floor"] > 0 and found["reference"] is None
    table = bench.markdown(figures(found))
    assert "| 1 + 1, the reference | failed |" in table
    assert "- the reference failed: ImportError: no such thing" in table


def test_the_demo_and_its_validation_are_compared_with_their_targets(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = figures() | {"demo": {"seconds": 100.0, "validation": 0.2}}
    table = bench.markdown(asked)
    assert "| the demo | 100 | at most 120 | yes |" in table
    assert "| validation's share of its training time | 20% | at most 15% | no |" in table


def test_an_evaluation_is_timed(tmp_path: Path) -> None:
    found = bench.evaluation(tmp_path)
    assert min(found[f"{what}_per_second"] for what in ("drawn", "embedded", "scored")) > 0


def test_import_is_timed() -> None:
    assert 0 < bench.import_seconds() < 60
