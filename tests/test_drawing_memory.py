"""Test drawing with large bases where RAM is short; the CPU stands in for a GPU."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from accelerate import PartialState

from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.evaluation import demo, sweep
from dreambooth_lib.evaluation.dreambench import Benchmark, Protocol, draw_all
from dreambooth_lib.families.base_files import BaseError
from dreambooth_lib.notebook import widgets
from dreambooth_lib.notebook.widgets.loaded_models import LOADED
from dreambooth_lib.training import drawing_memory, runs, sampling
from dreambooth_lib.training.drawing_memory import SPARE, NotEnoughMemory
from dreambooth_lib.training.loop import train
from dreambooth_lib.training.runs import Run, RunError

DTYPE = torch.float16
AMPLE = 1e12


@pytest.fixture
def ram(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Let a run train as it does here, and then set how much RAM is free beside a GPU."""
    machine = SimpleNamespace(available=AMPLE, gpu=AMPLE)

    def with_gpu() -> None:
        PartialState()  # chooses the CPU
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        for module in (drawing_memory, sampling):
            monkeypatch.setattr(module, "drawing_gpu", lambda: torch.device("cpu"))
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (machine.gpu,) * 2)
        monkeypatch.setattr(sampling, "sampling_dtype", lambda: DTYPE)
        monkeypatch.setattr(psutil, "virtual_memory", lambda: machine)

    machine.with_gpu = with_gpu
    return machine


@pytest.fixture
def started(start_run: Callable[..., Run]) -> Callable[..., Run]:
    def start(name: str = "run", family: str = "flux_2_klein", **changes: Any) -> Run:
        given = {"method": "lora", "prior_inference_steps": 1, "validate_every": 0} | changes
        return start_run(name, family, **given)

    return start


def sizes(config: TrainConfig, gpu: float = AMPLE) -> tuple[float, float]:
    return drawing_memory._ram(config.base, None, config.quantize, DTYPE, int(gpu))


@pytest.mark.parametrize("family", ["flux", "flux_2_klein"])
def test_a_large_bases_text_encoders_are_loaded_first_where_ram_is_short(
    family: str, started: Callable[..., Run], ram: SimpleNamespace
) -> None:
    run = started(family=family)
    list(train(run))
    ram.with_gpu()
    whole, in_parts = sizes(run.config)
    assert 0 < in_parts < whole
    drawn = []
    for available in (AMPLE, in_parts + SPARE):
        ram.available = available
        loaded = sampling.load_source(run.config, prompts=["a dog"])
        assert (loaded.prompt_cache is None) == (available == AMPLE)
        drawn.append([
            image.image.tobytes()
            for source, at in ((run, None), (run, 2), (run.config, None))
            for image in sampling.sample(source if at or source is run else loaded, ["a dog"], [0],
                                         at=at, steps=2)
        ])  # fmt: skip
    assert drawn[0] == drawn[1]
    said = r"generating with '.*' takes about 1\.0 GB of RAM, but only 1\.0 GB is free; restart"
    with pytest.raises(NotEnoughMemory, match=said):
        sampling.load_source(run.config)
    with pytest.raises(NotEnoughMemory, match=said):
        sampling.compose({run: 1.0})
    ram.available = in_parts + SPARE - 1
    with pytest.raises(NotEnoughMemory, match=said):
        sampling.load_source(run.config, prompts=["a dog"])


def test_bfloat16_weights_may_take_more_than_the_ram_as_they_stay_in_their_files(
    started: Callable[..., Run], ram: SimpleNamespace
) -> None:
    config = started().config
    ram.with_gpu()
    ram.available = SPARE
    assert drawing_memory.options_that_fit(config, torch.bfloat16) == {}
    options = drawing_memory.options_that_fit(config, torch.bfloat16, prompts=["a dog"])
    assert options["prompts"] == ["a dog"]


def test_a_quantized_base_is_in_ram_only_where_it_is_offloaded(
    started: Callable[..., Run], ram: SimpleNamespace
) -> None:
    config = started(family="flux", quantize="nf4").config
    ram.with_gpu()
    on_gpu, offloaded = sizes(config), sizes(config, gpu=1)
    assert on_gpu[0] < offloaded[0] < sizes(config.replace(quantize=None))[0]
    ram.available = on_gpu[0] + SPARE
    assert drawing_memory.options_that_fit(config, DTYPE) == {}
    ram.gpu = 1
    with pytest.raises(NotEnoughMemory):
        drawing_memory.options_that_fit(config, DTYPE)


def test_what_cannot_be_drawn_with_at_all_is_told_before_the_ram(
    started: Callable[..., Run], ram: SimpleNamespace
) -> None:
    unfinished = started("unfinished", "sd1", method="full")
    no_float16 = started("other", "z_image")
    ram.with_gpu()
    ram.available = 0
    with pytest.raises(RunError, match="has not finished"):
        sampling.load_source(unfinished)
    with pytest.raises(BaseError, match="produces NaN in float16"):
        sampling.load_source(no_float16.config)


def test_class_images_of_a_large_base_are_drawn_where_ram_is_short(
    started: Callable[..., Run], ram: SimpleNamespace, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    config = started().config
    ram.with_gpu()
    ram.available = sizes(config)[1] + SPARE
    assert widgets.show_class_images(config, tmp_path / "widget") is not None
    sweep._draw_class_images([config], tmp_path / "sweep")
    monkeypatch.setattr(runs, "start", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # where training would begin
        demo.personalise(config, tmp_path / "demo" / "run")
    for name in ("widget", "sweep", "demo"):
        assert len(list((tmp_path / name).rglob("0*.png"))) == config.class_images


def test_a_benchmark_encodes_its_prompts_first_where_ram_is_short(
    started: Callable[..., Run], ram: SimpleNamespace, tmp_path: Path
) -> None:
    config = started().config
    subject = replace(config.subject, kind="live")
    benchmark = Benchmark([subject], {"live": ["a {}", "a red {}"], "object": ["a {}"]})
    protocol = Protocol(images_per_prompt=1, class_images=2, steps=1, batch_size=4)
    ram.with_gpu()
    ram.available = sizes(config)[1] + SPARE
    *_, last = draw_all(benchmark, {"base": lambda subject: config.base}, tmp_path, protocol)
    assert last.done == last.total > 2


def test_a_playground_draws_with_one_model_after_the_other_where_ram_is_short(
    started: Callable[..., Run], ram: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = started()
    list(train(run))
    ram.with_gpu()
    needed, place = sizes(run.config)[1], sampling._place
    loaded: list[Any] = []

    class Ram:
        @property
        def available(self) -> float:
            return needed * (1 - len(LOADED)) + SPARE

    def placed(family: Any) -> Any:
        assert not LOADED
        loaded.append(family.denoiser)
        return place(family)

    monkeypatch.setattr(psutil, "virtual_memory", Ram)
    monkeypatch.setattr(sampling, "_place", placed)
    play = widgets.compare_with_base(run)
    play.steps.value = 2
    entry = play.draw()
    assert [len(images) for images in entry.images.values()] == [1, 1] and len(entry.samplers) == 2
    assert list(LOADED) == [run] and len(loaded) == 2
    play.left.value = play.right.value
    play.draw()
    assert len(loaded) == 2, "it knows the prompt"
    play.prompt.value = "a {} dog in the snow"
    assert play.draw().prompt == "a ohwx dog in the snow" and len(loaded) == 3
