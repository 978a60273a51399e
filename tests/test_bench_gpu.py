"""The benchmark on a GPU, rehearsed on a CPU with tiny models and scripts for a reference."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.core.subject import Subject
from dreambooth_lib.families import loading
from dreambooth_lib.training import runs
from dreambooth_lib.training.setup import Trainer
from tools import architectures, bench_gpu, check_gpu, gpu_measure, gpu_table
from tools.bench_gpu import Bench
from tools.gpu_table import CLOSE, GIB, LINES, Line

#: A script that draws class images where they are missing, and then moves a weight for ever.
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
    monkeypatch.setattr(gpu_measure, "ROUNDS", 2)
    monkeypatch.setattr(gpu_measure, "WARMUP", 1)
    monkeypatch.setattr(gpu_measure, "PROFILED", 1)


def rehearse(bench: Bench) -> dict[str, dict[str, Any]]:
    bench.run()
    bench.predictions()
    bench.write_tables()
    return {row["name"]: row for row in json.loads((bench.work / "table.json").read_text())}


@pytest.mark.slow
def test_all_lines_make_a_table_with_every_cell(tmp_path: Path, scripts: Path) -> None:
    bench = Bench(tmp_path / "work", tiny=True, scripts=scripts, checked=[])
    found = rehearse(bench)
    table = (tmp_path / "work" / "table.md").read_text()
    assert "not yet" not in table and "failed" not in table
    assert table.count("\n| ") == 2 + len(LINES)
    for name, row in found.items():
        line = LINES[name]
        assert row["errors"] == {} and row["met"] in (True, False)
        assert row["pace"] > 0 and row["peak"] > 0
        assert (row["predicted"] is None) == line.draws and row["ram"] > 0
        for part in ("floor", "busy", "floor_busy"):
            assert line.draws if row[part] is None else row[part] > 0
        assert (row["reference_pace"] is None) == (line.script is None)
        assert (row["pace_of_floor"] is None) == line.draws
    assert found["sd15-unet"]["reference_pace"] == pytest.approx(0.003, rel=1)
    assert not list((tmp_path / "work" / "bases").iterdir())  # they are large


def test_a_failing_line_is_told_the_rest_goes_on_and_what_is_done_is_not_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ["flux-qlora", "sd35-lora"]
    bench = Bench(tmp_path, tiny=True, asked=asked, checked=[])
    measure = bench_gpu.measure

    def fails(line: Line, *rest: Any) -> Iterator[dict[str, float]]:
        if line.base == "flux":
            raise MemoryError("no room")
        yield from measure(line, *rest)

    monkeypatch.setattr(bench_gpu, "measure", fails)
    found = rehearse(bench)
    assert found["flux-qlora"]["errors"] == {"kit": "MemoryError: no room"}
    assert found["sd35-lora"]["pace"] > 0
    assert "- flux-qlora, kit: MemoryError: no room" in (tmp_path / "table.md").read_text()
    monkeypatch.setattr(bench_gpu, "measure", lambda *_: iter([{"seconds": 7.0, "peak": 2**30}]))
    again = rehearse(bench)
    assert again["flux-qlora"]["pace"] == 7.0 and again["flux-qlora"]["errors"] == {}
    assert again["sd35-lora"] == found["sd35-lora"]


def test_nothing_begins_once_the_time_is_up(tmp_path: Path) -> None:
    bench = Bench(tmp_path, tiny=True, asked=["flux-qlora"], until=time.monotonic())
    bench.run()
    assert not list((tmp_path / "checks").glob("*"))
    assert not list((tmp_path / "results").iterdir())
    assert "not yet" in (tmp_path / "table.md").read_text()


def test_a_script_that_fails_leaves_its_last_words(tmp_path: Path, scripts: Path) -> None:
    (scripts / "train_dreambooth_lora_sd3.py").write_text("raise ImportError('no such thing')")
    bench = Bench(tmp_path / "work", tiny=True, scripts=scripts, asked=["sd35-lora"], checked=[])
    bench.run()
    assert "no such thing" in bench.result("sd35-lora", "reference")["error"]
    assert "no such thing" in (bench.work / "results" / "sd35-lora.reference.log").read_text()
    assert "failed" in (bench.work / "table.md").read_text()


def test_what_takes_too_long_is_told(tmp_path: Path) -> None:
    bench = Bench(tmp_path, limit=0.01, asked=["sd35-lora"], checked=[])
    bench.run()
    told = bench.result("sd35-lora", "kit")["error"]
    assert told == "RuntimeError: it took longer than 0 s"


def test_what_is_worth_most_is_measured_first(tmp_path: Path, scripts: Path) -> None:
    order = Bench(tmp_path, scripts=scripts).to_do()
    sd15 = [name for name, line in LINES.items() if line.base == "sd15"]
    assert order[:10] == [(name, side) for name in sd15 for side in ("kit", "reference")]
    assert order[10:12] == [("sdxl-lora", "kit"), ("sdxl-lora", "reference")]
    assert [name for name, side in order[10:] if side == "kit"] == [*LINES][5:]
    assert order[-1] == ("sd35-lora", "reference")  # whose target compares nothing


def test_a_cut_call_is_gone_on_with_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, done = ["sd15-unet", "sd15-unet-low", "sd35-lora"], []

    def measured(line: Line, *_: Any) -> Iterator[dict[str, float]]:
        done.append(line.title)
        yield {"seconds": 1.0, "peak": 2**30}
        bench.until = time.monotonic() if len(done) == 2 else bench.until

    monkeypatch.setattr(bench_gpu, "measure", measured)
    bench = Bench(tmp_path, tiny=True, asked=asked, checked=[])
    bench.run()
    assert done == [LINES[name].title for name in asked[:2]]
    assert (tmp_path / "table.md").read_text().count("1.000 s/step") == 2
    bench = Bench(tmp_path, tiny=True, asked=asked, checked=[])
    bench.run()
    assert done == [LINES[name].title for name in asked]


def test_what_goes_on_when_the_time_is_up_is_cut_and_done_by_the_next_call(
    tmp_path: Path, scripts: Path
) -> None:
    asked = ["sd35-lora"]
    bench = Bench(tmp_path / "work", tiny=True, scripts=scripts, asked=asked, checked=[])
    (bench.work / "results").mkdir(parents=True)
    bench.until = time.monotonic() + 0.2
    bench.tried("sd35-lora", "reference")
    assert "the time was up" in bench.result("sd35-lora", "reference")["error"]
    assert ("sd35-lora", "reference") in bench.to_do()


def test_what_was_measured_before_a_failure_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("the profiler does not start")

    monkeypatch.setattr(gpu_measure, "busy", fails)
    found = rehearse(Bench(tmp_path, tiny=True, asked=["sd35-lora"], checked=[]))["sd35-lora"]
    assert found["pace"] > 0 and found["peak"] > 0 and found["floor"] is None
    assert found["errors"] == {"kit": "RuntimeError: the profiler does not start"}


def test_the_floor_moves_no_weight(tmp_path: Path) -> None:
    bench = Bench(tmp_path, tiny=True)
    bench_gpu.save_photos(tmp_path, 64)
    line = LINES["sd15-unet-low"]  # whose weights move in the backward pass
    trainer = Trainer(
        runs.start(line.config(bench.base(line.base), tmp_path, True), tmp_path / "run")
    )
    before = {name: weight.clone() for name, weight in trainer.trainable.trained_weights().items()}
    gpu_measure.passes_of(trainer)()
    after = trainer.trainable.trained_weights()
    assert all(weight.equal(after[name]) for name, weight in before.items())


def test_it_needs_no_package_that_only_draws_emoji(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['resvg_py'] = None\n"
        "from tools import architectures, bench_gpu\n"
        "from pathlib import Path\n"
        "architectures.save(architectures.ALL['sd15'], Path(sys.argv[1]), tiny=True)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "base")], check=True)
    assert (tmp_path / "base" / "model_index.json").exists()


def test_without_a_gpu_it_says_what_needs_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        bench_gpu.main(["--work", str(tmp_path)])
    assert "there is no NVIDIA GPU here to measure; --predict and" in capsys.readouterr().err


def test_every_way_is_a_run_of_its_own() -> None:
    subject = Subject("photos", "dog")
    configs = {name: TrainConfig(subject, **fields) for name, fields in check_gpu.WAYS.items()}
    assert len(set(configs.values())) == len(configs)


def test_a_way_is_trained_interrupted_resumed_and_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check_gpu, "STEPS", 8)
    monkeypatch.setattr(check_gpu, "STOP", 5)
    told = check_gpu.check("LoRA, fp16", tmp_path / "way", tiny=True)
    assert told.startswith("loss ") and told.endswith(" ms a step")


def test_ways_that_fail_are_told_and_tried_again_and_those_that_are_ok_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fails = tmp_path / "python"
    fails.write_text(
        "#!/bin/sh\necho $* >> " + str(tmp_path / "calls") + "\necho no such thing\nexit 1"
    )
    fails.chmod(0o755)
    monkeypatch.setattr(check_gpu.sys, "executable", str(fails))
    names, work = ["full model, fp16", "LoRA, fp16", "DoRA, bf16"], tmp_path / "checks"
    work.mkdir()
    check_gpu.note(work, "LoRA, fp16", True, "loss 1 to 0.5, 3 ms a step")
    check_gpu.run(work, names)
    check_gpu.run(work, names, until=time.monotonic())
    assert len((tmp_path / "calls").read_text().splitlines()) == 2
    assert capsys.readouterr().out.count("failed: ") == 2
    told = check_gpu.markdown(work)
    assert "- failed: full model, fp16: no such thing" in told
    assert "- ok: LoRA, fp16: loss 1 to 0.5, 3 ms a step" in told
    assert "- not checked yet: full model, default settings;" in told


def test_the_command_predicts_without_a_gpu(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tools.bench_gpu", "--work", str(tmp_path), "--tiny"]
    told = subprocess.check_output([*command, "--predict", "--only", "sd35-lora"], text=True)
    assert "Measured on: nothing yet." in told
    assert json.loads((tmp_path / "results" / "sd35-lora.predicted.json").read_text())["peak"] > 0
    assert not (tmp_path / "bases").exists()


def test_a_prediction_is_close_to_what_a_gpu_measured(tmp_path: Path) -> None:
    """The estimates of the other lines are compared in test_memory_estimate."""
    name, measured = "sd15-text-low", 6.61
    bench = Bench(tmp_path, asked=[name])
    bench.predictions()
    predicted = bench.result(name, "predicted")["peak"] / GIB
    assert predicted == pytest.approx(measured, rel=CLOSE)
    assert predicted < dict(LINES[name].targets)["GiB"]


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
    loaded = loading.load_model(str(tmp_path / "flux"))
    assert all(weight.isfinite().all() for weight in loaded.denoiser.state_dict().values())


def test_a_line_meets_its_targets_once_each_is_known_and_met() -> None:
    def met(**kit: float) -> bool | None:
        sides = {"kit": kit, "reference": {"seconds": 2.0}, "predicted": {}}
        return gpu_table.row("sd15-unet", sides)["met"]

    assert met(seconds=1.0, floor=0.9) is True
    assert met(seconds=1.0, floor=0.8) is False
    assert met(seconds=1.1, floor=1.1) is False
    assert met(seconds=1.0) is None
    assert met(seconds=1.1) is False
    found = gpu_table.row("sd15-unet", {"kit": {}, "reference": {}, "predicted": {}})
    assert found["met"] is None and " and at most 1.15 times the floor" in found["target"]
