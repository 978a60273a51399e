"""The benchmark on a GPU, rehearsed on a CPU with tiny models and scripts for a reference."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from dreambooth_lib import families
from tools import architectures, bench_gpu
from tools.bench_gpu import Bench
from tools.gpu_table import GIB, LINES, Line

#: A script that draws class pictures where they are missing, and then moves a weight for ever.
SCRIPT = """
import argparse, time, torch
from pathlib import Path
parser = argparse.ArgumentParser()
for name in ("pretrained_model_name_or_path", "class_data_dir", "num_class_images", "resolution"):
    parser.add_argument("--" + name, required=True)
given, _ = parser.parse_known_args()
assert Path(given.pretrained_model_name_or_path, "model_index.json").exists()
folder = Path(given.class_data_dir)
folder.mkdir(exist_ok=True)
for number in range(len(list(folder.iterdir())), int(given.num_class_images)):
    time.sleep(0.01)
    (folder / f"{number}.jpg").touch()
weight = torch.nn.Parameter(torch.zeros(1))
adam = torch.optim.AdamW([weight])
while True:
    weight.sum().backward()
    time.sleep(0.002)
    adam.step()
"""


@pytest.fixture
def scripts(tmp_path: Path) -> Path:
    folder = tmp_path / "dreambooth"
    folder.mkdir()
    for name in {line.script for line in LINES.values()} - {None}:
        (folder / str(name)).write_text(SCRIPT)
    return folder


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_gpu, "ROUNDS", 2)
    monkeypatch.setattr(bench_gpu, "WARMUP", 1)


def rehearse(bench: Bench) -> dict[str, dict[str, Any]]:
    bench.run()
    bench.predictions()
    bench.write_tables()
    return {row["name"]: row for row in json.loads((bench.work / "table.json").read_text())}


@pytest.mark.slow
def test_all_lines_make_a_table_with_every_cell(tmp_path: Path, scripts: Path) -> None:
    bench = Bench(tmp_path / "work", tiny=True, scripts=scripts)
    found = rehearse(bench)
    table = (tmp_path / "work" / "table.md").read_text()
    assert "not yet" not in table and "failed" not in table
    assert table.count("\n| ") == 2 + len(LINES)
    for name, row in found.items():
        line = LINES[name]
        assert row["errors"] == {} and row["met"] in (True, False)
        assert row["pace"] > 0 and row["peak"] > 0
        assert (row["predicted"] is None) == line.draws
        assert (row["reference_pace"] is None) == (line.script is None)
    assert found["sd15-unet"]["reference_pace"] == pytest.approx(0.003, rel=1)
    assert not list((tmp_path / "work" / "bases").iterdir())  # they are large


def test_a_failing_line_is_told_the_rest_goes_on_and_what_is_done_is_not_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ["flux-qlora", "sd35-lora"]
    bench = Bench(tmp_path, tiny=True, asked=asked)
    measure = bench_gpu.measure

    def fails(line: Line, *rest: Any) -> dict[str, float]:
        if line.base == "flux":
            raise MemoryError("no room")
        return measure(line, *rest)

    monkeypatch.setattr(bench_gpu, "measure", fails)
    found = rehearse(bench)
    assert found["flux-qlora"]["errors"] == {"kit": "MemoryError: no room"}
    assert found["sd35-lora"]["pace"] > 0
    assert "- flux-qlora, kit: MemoryError: no room" in (tmp_path / "table.md").read_text()
    monkeypatch.setattr(bench_gpu, "measure", lambda *_: {"seconds": 7.0, "peak": 2**30})
    again = rehearse(bench)
    assert again["flux-qlora"]["pace"] == 7.0 and again["flux-qlora"]["errors"] == {}
    assert again["sd35-lora"] == found["sd35-lora"]


def test_nothing_begins_once_the_time_is_up(tmp_path: Path) -> None:
    bench = Bench(tmp_path, tiny=True, asked=["flux-qlora"])
    bench.run(until=time.monotonic())
    assert not list((tmp_path / "results").iterdir())
    assert "not yet" in (tmp_path / "table.md").read_text()


def test_a_script_that_fails_leaves_its_last_words(tmp_path: Path, scripts: Path) -> None:
    (scripts / "train_dreambooth_lora_sd3.py").write_text("raise ImportError('no such thing')")
    bench = Bench(tmp_path / "work", tiny=True, scripts=scripts, asked=["sd35-lora"])
    bench.run()
    assert "no such thing" in bench.result("sd35-lora", "reference")["error"]
    assert "no such thing" in (bench.work / "results" / "sd35-lora.reference.log").read_text()
    assert "failed" in (bench.work / "table.md").read_text()


def test_what_takes_too_long_is_told(tmp_path: Path) -> None:
    bench = Bench(tmp_path, limit=0.01, asked=["sd35-lora"])
    bench.run()
    told = bench.result("sd35-lora", "kit")["error"]
    assert told == "RuntimeError: it took longer than 0 s"


def test_the_command_predicts_without_a_gpu(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tools.bench_gpu", "--work", str(tmp_path), "--tiny"]
    told = subprocess.check_output([*command, "--predict", "--only", "sd35-lora"], text=True)
    assert "Measured on: nothing yet." in told
    assert json.loads((tmp_path / "results" / "sd35-lora.predicted.json").read_text())["peak"] > 0
    assert not (tmp_path / "bases").exists()


@pytest.mark.parametrize(
    ("name", "least", "most"), [("sd15-unet-low", 5.4, 5.9), ("sd15-text-low", 6.1, 6.6)]
)
def test_predictions_of_real_architectures_stay_and_meet_their_targets(
    name: str, least: float, most: float, tmp_path: Path
) -> None:
    bench = Bench(tmp_path, asked=[name])
    bench.predictions()
    assert least < bench.result(name, "predicted")["peak"] / GIB < most
    kind, bound = LINES[name].target
    assert kind == "GiB" and most < bound


def test_the_architectures_have_as_many_weights_as_the_published_ones() -> None:
    published = {
        "sd15": {"unet": 859_520_964, "text_encoder": 123_060_480, "vae": 83_653_863},
        "sdxl": {"unet": 2_567_463_684, "text_encoder": 123_060_480,
                 "text_encoder_2": 694_659_840, "vae": 83_653_863},
        "sd35": {"text_encoder": 123_650_304, "text_encoder_2": 694_659_840,
                 "text_encoder_3": 4_762_310_656},
        "flux": {"transformer": 11_901_408_320, "text_encoder": 123_060_480,
                 "text_encoder_2": 4_762_310_656},
    }  # fmt: skip
    for base, parts in published.items():
        models = architectures.ALL[base].models
        assert {name: architectures.parameters(models[name]) for name in parts} == parts
    # A fifth of SD 3.5 medium's 2.5 billion are its second attention layers; the place
    # embedding, which is computed, is counted with them.
    medium = architectures.parameters(architectures.ALL["sd35"].models["transformer"])
    assert medium + 384**2 * 1536 == pytest.approx(2.47e9, rel=0.01)


def test_weights_are_written_in_shards_with_an_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(architectures, "SHARD", 20_000)
    architectures.save(architectures.ALL["flux"], tmp_path / "flux", tiny=True)
    folder = tmp_path / "flux" / "transformer"
    index = json.loads((folder / "diffusion_pytorch_model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 1
    with safe_open(folder / files[0], "pt") as first:
        assert set(first.keys()) == {n for n, f in index["weight_map"].items() if f == files[0]}
    loaded = families.load(str(tmp_path / "flux"))
    assert all(weight.isfinite().all() for weight in loaded.denoiser.state_dict().values())
