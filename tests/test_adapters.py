"""Adapters of peft beside LoRA: trained, resumed, saved in peft's format, loaded and refused."""

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import ImageChops

from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.core.config_checks import ADAPTERS
from dreambooth_lib.core.config_types import ConfigError
from dreambooth_lib.core.subject import Subject
from dreambooth_lib.export import comfyui, model_card, pipeline_folder
from dreambooth_lib.export.comfyui_lora import ExportError
from dreambooth_lib.families import loading, peft_adapters
from dreambooth_lib.families.loading import BaseError
from dreambooth_lib.notebook import will_it_fit
from dreambooth_lib.training import runs
from dreambooth_lib.training.checkpoints import load_state
from dreambooth_lib.training.loop import train
from dreambooth_lib.training.memory_estimate import estimate
from dreambooth_lib.training.runs import Run
from dreambooth_lib.training.sampling import compose, load_source, sample
from dreambooth_lib.training.setup import Trainer
from dreambooth_lib.training.trainable import load_at_checkpoint, load_to_export
from dreambooth_lib.training.validation_record import load_images

Start = Callable[..., Run]


@pytest.fixture
def start(start_run: Start) -> Start:
    def start(name: str, adapter: str, family: str = "sd1", **more: Any) -> Run:
        size = 4 if adapter == "c3a" else 2  # 2 does not suit all of the tiny bases' layers
        fields = {"method": "lora", "learning_rate": 0.1, "adapter": adapter, "lora_rank": size}
        return start_run(name, family, **(fields | more))

    return start


def finished(run: Run) -> Run:
    list(train(run))
    return run


def tensors(family: Any) -> dict[str, torch.Tensor]:
    return family.denoiser.state_dict()


def are_close(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    assert first.keys() == second.keys()
    return all(torch.allclose(first[name], value, atol=1e-5) for name, value in second.items())


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_an_adapter_resumes_bit_for_bit_and_peft_loads_it(
    adapter: str, start: Start, tmp_path: Path
) -> None:
    run, cut = start("whole", adapter), start("cut", adapter)
    base, trainer = loading.load_model(run.config.base), Trainer(run)
    x_t, t = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([5])
    with torch.no_grad():
        cond = base.encode_prompts(["a dog"])
        expected = base.predict(x_t, t, cond)
        assert torch.allclose(trainer.family.predict(x_t, t, cond), expected, atol=1e-4)
    moments = 8 * sum(parameter.numel() for parameter in trainer.optimizer.parameters)
    counted = estimate(run.config.replace(optimizer="adamw", prior="none"), "fp16")
    assert counted.moments == moments and counted.working > 0
    finished(run)
    list(islice(train(cut), 1))
    finished(runs.resume(cut.folder))
    first, second = (load_state(r.checkpoints()[2])["model"] for r in (run, cut))
    assert all(torch.equal(first[name], second[name]) for name in first)
    loaded = tensors(load_source(run))
    assert are_close(tensors(load_at_checkpoint(run, 2)), loaded)
    assert any(not torch.equal(value, loaded[name]) for name, value in tensors(base).items())
    peft_adapters.save(load_to_export(run, 2).denoiser, tmp_path / "exported")
    for folder in (run.pipeline / "unet", tmp_path / "exported"):
        plain = PeftModel.from_pretrained(loading.load_model(run.config.base).denoiser, folder)
        assert are_close(plain.merge_and_unload().state_dict(), loaded)


@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_other_families_and_text_encoders_have_adapters(family: str, start: Start) -> None:
    with_text = family == "sdxl"
    run = finished(start("run", "lokr", family, train_text_encoder=with_text, prior="distilled"))
    names = ["text_encoder", "text_encoder_2", "unet"] if with_text else ["transformer"]
    assert peft_adapters.parts(run.pipeline) == names
    at, last = (sample(run, ["a {} dog"], [0], steps=2, at=at)[0].image for at in (2, None))
    assert max(high for _, high in ImageChops.difference(at, last).getextrema()) <= 1


def test_the_cards_code_draws_as_the_run_does(
    start: Start, tmp_path: Path, clip_folder: Path
) -> None:
    scored = {"validate_every": 2, "scorer": str(clip_folder)}
    run = finished(start("run", "loha", train_text_encoder=True, **scored))
    model = tmp_path / "model"
    pipeline_folder.write_model(run, 2, model)
    code = model_card.usage(run, model)
    assert "A loha adapter of peft for" in (model / "README.md").read_text()
    *load, _ = code.splitlines()
    made: dict[str, Any] = {}
    exec("\n".join(load), made)
    assert are_close(made["pipeline"].unet.state_dict(), tensors(load_source(run)))
    assert isinstance(made["pipeline"], DiffusionPipeline)
    with pytest.raises(ExportError, match="'loha', for which the kit writes no file"):
        comfyui.check_exportable(run)


def test_adapters_and_loras_are_composed_with_their_weights(start: Start) -> None:
    oft, plain = finished(start("oft", "oft")), finished(start("plain", None))  # type: ignore[arg-type]
    base, own, lora = (tensors(loading.load_model(str(s))) for s in
                       (oft.config.base, oft.folder, plain.folder))  # fmt: skip
    both = tensors(compose({oft: 0.5, plain: 1.0}))
    expected = {n: value.lerp(own[n], 0.5) + lora[n] - value for n, value in base.items()}
    assert are_close(both, expected)
    assert not are_close(both, own)


def test_a_distilled_model_generates_with_the_adapter(
    start: Start, tmp_path: Path, tiny_bases: Callable[[str], str], clip_folder: Path
) -> None:
    family = loading.load_model(tiny_bases("sd1"))
    with torch.no_grad():
        family.denoiser.conv_in.weight.mul_(1.1)
    family.pipeline.save_pretrained(tmp_path / "distilled")
    distilled, scored = (
        str(tmp_path / "distilled"),
        {"validate_every": 2, "scorer": str(clip_folder)},
    )
    run = finished(start("run", "oft", draw_base=distilled, **scored))
    at, drawn = load_at_checkpoint(run, 2), load_source(run)
    assert are_close(tensors(at), tensors(drawn))
    expected = loading.load_model(distilled).denoiser.conv_in.weight
    assert torch.equal(drawn.denoiser.conv_in.weight, expected)
    own = tensors(loading.load_model(str(run.folder)))
    changed = {name for name, value in tensors(drawn).items() if not torch.equal(own[name], value)}
    assert changed == {"conv_in.weight"}, "the adapter is the same on both"


def test_a_run_of_an_adapter_is_a_base(start: Start, start_run: Start) -> None:
    first = finished(start("first", "lokr"))
    config = first.config.replace(base=str(first.folder), adapter=None, method="full", steps=1)
    second = runs.start(config, first.folder.parent / "second")
    begun = tensors(Trainer(second).family)
    assert are_close(begun, tensors(load_source(first)))
    assert not are_close(begun, tensors(loading.load_model(first.config.base)))
    assert sample(finished(second), ["a {} dog"], [0], steps=1)


def test_settings_reach_peft_and_stay_in_the_runs_config(start: Start) -> None:
    run = start("run", "lokr", adapter_settings={"decompose_factor": 2, "decompose_both": True})
    finished(run)
    saved = json.loads((run.pipeline / "unet" / peft_adapters.CONFIG_FILE).read_text())
    assert saved["decompose_factor"] == 2 and saved["decompose_both"] is True
    assert saved["peft_type"] == "LOKR" and saved["alpha"] == 2
    assert runs.resume(run.folder).config == run.config
    assert hash(run.config) == hash(runs.resume(run.folder).config)
    with pytest.raises(runs.RunError, match="adapter 'lokr', but your settings have 'loha'"):
        runs.resume(run.folder, adapter="loha")


@pytest.mark.parametrize(
    ("adapter", "settings"),
    [("lokr", {"rank_dropout": 0.5}), ("miss", {"miss_dropout": 0.3})],
)
def test_dropout_in_an_adapter_is_drawn_by_the_runs_seed(
    adapter: str, settings: dict[str, float], start: Start
) -> None:
    first, second, cut = (
        start(name, adapter, adapter_settings=settings, steps=4, checkpoint_every=2)
        for name in ("first", "second", "cut")
    )
    finished(first)
    torch.rand(7)  # what else a process may have drawn
    finished(second)
    list(islice(train(cut), 2))
    torch.rand(7)
    finished(runs.resume(cut.folder))
    own, again, resumed = (load_state(r.checkpoints()[4])["model"] for r in (first, second, cut))
    assert all(torch.equal(own[name], value) for name, value in again.items())
    assert all(torch.equal(own[name], value) for name, value in resumed.items())


def test_an_adapters_dropout_is_not_left_out(start: Start) -> None:
    whole = finished(start("whole", "lokr"))
    dropped = finished(start("dropped", "lokr", adapter_settings={"rank_dropout": 0.5}))
    assert not are_close(*(load_state(r.checkpoints()[2])["model"] for r in (whole, dropped)))


@pytest.mark.parametrize("adapter", ["hira", "peanut", "deft"])
def test_a_merge_keeps_no_weight_to_undo_it(adapter: str, start: Start) -> None:
    denoiser = Trainer(start("run", adapter)).family.denoiser.half()
    layers = [m for m in denoiser.modules() if isinstance(m, BaseTunerLayer)]
    before = sum(value.numel() for value in tensors_of(layers))
    peft_adapters.merge(denoiser)
    assert layers and all(layer.merged for layer in layers)
    assert sum(value.numel() for value in tensors_of(layers)) == before
    assert {layer.get_base_layer().weight.dtype for layer in layers} == {torch.float16}


def tensors_of(layers: list[Any]) -> list[torch.Tensor]:
    parts = [part for layer in layers for part in layer.modules()]
    held = [value for part in parts for value in vars(part).values()]
    held += [value for part in parts for value in [*part._parameters.values(),
                                                   *part._buffers.values()]]  # fmt: skip
    return [value for value in held if isinstance(value, torch.Tensor)]


@pytest.mark.parametrize("adapter", ["hra", "deft"])
def test_the_base_is_measured_without_the_adapter_in_half_precision(
    adapter: str, start: Start, clip_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored = {"validate_every": 2, "scorer": str(clip_folder), "mixed_precision": "bf16"}
    scored |= {"prior": "generated", "class_images": 8}
    runs_of = [start(name, own, keep_class=0.9, **scored)
               for name, own in (("plain", None), ("own", adapter))]  # fmt: skip
    plain, own = map(Trainer, runs_of)
    first, second = (load_images(run, 0) for run in runs_of)
    pairs = zip(first.subject, second.subject, strict=True)
    assert all(ImageChops.difference(*pair).getbbox() is None for pair in pairs)
    assert torch.equal(*(t.prior_weight.measure.func.base for t in (plain, own)))  # type: ignore[union-attr]
    assert own.model.training and own.family.denoiser.training
    assert all(p.requires_grad for p in own.optimizer.parameters)
    layers = [m for m in own.family.denoiser.modules() if isinstance(m, BaseTunerLayer)]
    assert layers and not any(layer.disable_adapters for layer in layers)


def test_only_lora_methods_are_recommended_for_an_adapter() -> None:
    needs = will_it_fit.needs_on_gpu("black-forest-labs/FLUX.1-dev", "bf16", {"adapter": "oft"})
    assert {need.method for need in needs} == {"LoRA"}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"adapter": "lora"}, "adapter is 'lora'; leave it out, or set it to one of 'lokr'"),
        ({"adapter": "oft", "method": "full"}, "adapter is 'oft' but method is 'full'"),
        ({"adapter": "oft", "quantize": "nf4"}, "only a LoRA trains on quantized weights"),
        ({"adapter": "oft", "dora": True}, "only a LoRA has dora"),
        ({"adapter": "oft", "lora_min_rank": 1}, "only a LoRA has lora_min_rank"),
        ({"adapter_settings": {"r": 1}}, "adapter_settings is set but adapter is not"),
        ({"adapter": "oft", "adapter_settings": {"target_modules": "a"}}, "write numbers by name"),
    ],
)
def test_what_contradicts_an_adapter_is_one_sentence(
    changes: dict[str, Any], sentence: str, photos: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        TrainConfig(Subject(photos, "dog"), **{"method": "lora", **changes})


@pytest.mark.parametrize(
    ("adapter", "changes", "sentence"),
    [
        (
            "oft",
            {"adapter_settings": {"rank": 4}},
            "'rank', which is not a numeric setting of peft's 'oft'; .* of r, oft_block_size",
        ),
        ("lokr", {"adapter_settings": {"inference_mode": 1}}, "'inference_mode', which is not"),
        ("lokr", {"adapter_settings": {"revision": 1}}, "'lokr'; .* of r, alpha, rank_dropout"),
        ("oft", {"lora_alpha": 4}, "'oft' has no alpha"),
        ("c3a", {"lora_rank": 7}, "'c3a' cannot be added to this base's layers"),
    ],
)
def test_what_peft_cannot_make_is_one_sentence(
    adapter: str, changes: dict[str, Any], sentence: str, start: Start
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        Trainer(start("run", adapter, **changes))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"peft_type": "XLORA"}, "names no adapter that the kit trains"),
        ({"init_weights": "os.system"}, "sets 'init_weights', which the kit never does"),
        ({"megatron_core": "os"}, "sets 'megatron_core', which the kit never does"),
        ({"twist": 2, "peft_version": "99.0.1"}, "was saved by a newer peft, which has 'twist'"),
        ({"twist": 2, "peft_version": "0.1.dev0@a1"}, "sets 'twist', which the kit never does"),
        ({"init_weights": "os", "peft_version": "99.0.1"}, "sets 'init_weights', which the kit"),
        ({"layers_pattern": 1}, "peft refuses the settings in .*layers_pattern"),
        ({"target_modules": ["nothing"]}, "cannot be"),
    ],
)
def test_a_strangers_settings_are_data(
    changes: dict[str, Any], sentence: str, start: Start
) -> None:
    run = finished(start("run", "lokr"))
    file = run.pipeline / "unet" / peft_adapters.CONFIG_FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    (run.pipeline / "digests.json").unlink()
    with pytest.raises((BaseError, ConfigError), match=sentence):
        load_source(run)


def test_what_a_newer_peft_leaves_off_is_skipped(start: Start) -> None:
    run = finished(start("run", "lokr"))
    expected = tensors(load_source(run))
    file = run.pipeline / "unet" / peft_adapters.CONFIG_FILE
    newer = {"twist": False, "turn": None, "by_layer": {}, "peft_version": "99.0.1"}
    file.write_text(json.dumps(json.loads(file.read_text()) | newer))
    (run.pipeline / "digests.json").unlink()
    loaded = tensors(load_source(run))
    assert all(torch.equal(loaded[name], value) for name, value in expected.items())
