"""Every family by every method, with every prior: trained, interrupted, resumed and loaded."""

import json
import shutil
import signal
from collections.abc import Callable
from itertools import count, islice, product
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.training_utils import EMAModel
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image, ImageChops
from safetensors.torch import load_file

from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.core.config_types import ConfigError
from dreambooth_lib.core.subject import Subject
from dreambooth_lib.data.images import Photo, captioned
from dreambooth_lib.families import loading
from dreambooth_lib.families.loading import BaseError
from dreambooth_lib.training import fused_optimizer, lora, memory_estimate, optimizer_step, runs
from dreambooth_lib.training.checkpoints import load_state
from dreambooth_lib.training.loop import train, training_steps
from dreambooth_lib.training.prior_distillation import with_class_captions
from dreambooth_lib.training.runs import Run
from dreambooth_lib.training.sampling import compose, load_source, sample
from dreambooth_lib.training.setup import Trainer

Make = Callable[..., TrainConfig]
FAMILIES = ["sd1", "sd2", "sdxl", "sd3", "flux", "flux_2_klein", "z_image"]
#: All ways on a family with a UNet and on one with a transformer; on the others each method once.
WAYS = [
    (family, *way)
    for family in FAMILIES
    for way in product(["full", "lora"], ["generated", "distilled", "none"])
    if family in ("sd1", "flux") or way in (("full", "generated"), ("lora", "distilled"))
]


def denoiser(family: Any) -> dict[str, torch.Tensor]:
    return family.denoiser.state_dict()


@pytest.mark.parametrize(("family", "method", "prior"), WAYS)
def test_a_run_resumes_bit_for_bit_and_plain_diffusers_loads_its_pipeline(
    family: str, method: str, prior: str, start_run: Callable[..., Run], tmp_path: Path
) -> None:
    complete = start_run("complete", family, method=method, prior=prior)
    steps = list(train(complete))
    assert [step.step for step in steps] == [1, 2]
    assert all((step.prior_loss is None) == (prior == "none") for step in steps)
    assert (tmp_path / "class_images").exists() == (prior == "generated")
    interrupted = start_run("interrupted", family, method=method, prior=prior)
    for _ in islice(train(interrupted), 1):
        pass
    list(train(runs.resume(interrupted.folder)))
    first, second = (load_state(run.checkpoints()[2]) for run in (complete, interrupted))
    assert first["model"].keys() == second["model"].keys()
    assert all(torch.equal(first["model"][name], second["model"][name]) for name in first["model"])
    tuned = load_source(complete)
    if method == "full":
        plain = DiffusionPipeline.from_pretrained(complete.pipeline)
    else:
        assert not any(path.name.startswith("diffusion") for path in complete.pipeline.iterdir())
        plain = DiffusionPipeline.from_pretrained(complete.config.base)
        plain.load_lora_weights(complete.pipeline)
        plain.fuse_lora()
        plain.unload_lora_weights()
    saved = getattr(plain, tuned.denoiser_name).state_dict()
    assert saved.keys() == denoiser(tuned).keys()
    assert all(torch.equal(saved[name], value) for name, value in denoiser(tuned).items())
    base = loading.load_model(complete.config.base)
    assert any(not torch.equal(v, denoiser(base)[name]) for name, v in denoiser(tuned).items())
    (result,) = sample(complete, ["a {} dog"], [0], steps=1)
    assert result.image.size == (16, 16)


@pytest.mark.parametrize("family", ["sd1", "flux"])
def test_a_saved_lora_draws_the_same_images_as_the_trained_one(
    family: str, start_run: Callable[..., Run]
) -> None:
    run = start_run("run", family, method="lora", lora_alpha=6, learning_rate=0.1, ema_decay=0.5)
    list(train(run))
    before, after = (sample(run, ["a {} dog"], [0], steps=2, at=at)[0].image for at in (2, None))
    plain = sample(run.config.base, ["a ohwx dog"], [0], steps=2)[0].image
    distance = [
        max(high for _, high in ImageChops.difference(before, image).getextrema())
        for image in (after, plain.resize(after.size))
    ]
    assert distance[0] <= 1 < distance[1]


def test_lora_starts_from_the_base_and_trains_only_its_own_weights(
    start_run: Callable[..., Run], tiny_bases: Callable[[str], str]
) -> None:
    run = start_run("run", "sd1", method="lora", train_text_encoder=True, lora_layers="all")
    trainer = Trainer(run)
    names = trainer.trainable.trained_weights()
    assert names and all("lora_" in name for name in names)
    assert any(name.startswith("text_encoders.0") for name in names)
    assert any(".ff.net.2." in name for name in names)
    assert len(names) == len(trainer.optimizer.parameters)
    x_t, t = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([5])
    base = loading.load_model(tiny_bases("sd1"))
    with torch.no_grad():
        expected = base.predict(x_t, t, base.encode_prompts(["a dog"]))
        trainer.model.eval()
        assert torch.equal(trainer.model(x_t, t, None, ["a dog"]), expected)


@pytest.mark.parametrize("family", ["sd1", "sdxl", "sd3", "flux"])
def test_a_text_encoders_lora_is_merged_too(
    family: str, start_run: Callable[..., Run], tiny_bases: Callable[[str], str]
) -> None:
    config = start_run("run", family, method="lora", train_text_encoder=True).config
    loaded = loading.load_model(tiny_bases(family), resolution=16)
    own = loaded.encode_prompts(["a dog"])
    lora.add_lora(loaded, config)
    for name, weights in loaded.pipeline.text_encoder.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weights)
    with torch.no_grad():
        expected = loaded.encode_prompts(["a dog"])
        merged = loading.merge_loras(loaded).encode_prompts(["a dog"])
    assert any(not torch.allclose(expected[name], own[name], atol=1e-3) for name in own)
    for name, values in expected.items():
        assert torch.allclose(merged[name], values, atol=1e-4), name


def test_a_text_encoders_lora_is_saved_beside_the_denoisers(
    start_run: Callable[..., Run], tiny_bases: Callable[[str], str]
) -> None:
    changes = {"train_text_encoder": True, "learning_rate": 0.1}
    run = start_run("run", "sdxl", method="lora", **changes)
    list(train(run))
    base, tuned = loading.load_model(tiny_bases("sdxl")), load_source(run)
    for first, second in zip(base.text_encoders, tuned.text_encoders, strict=True):
        name = next(n for n, _ in first.named_parameters() if n.endswith("q_proj.weight"))
        assert not torch.equal(first.get_parameter(name), second.get_parameter(name))


def test_lora_does_not_depend_on_what_was_drawn_before(start_run: Callable[..., Run]) -> None:
    torch.manual_seed(1)
    first = Trainer(start_run("first", "sd1", method="lora")).trainable.trained_weights()
    torch.manual_seed(2)
    second = Trainer(start_run("second", "sd1", method="lora")).trainable.trained_weights()
    seeded = Trainer(start_run("seeded", "sd1", method="lora", seed=3)).trainable.trained_weights()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], seeded[name]) for name in first)


def test_dora_learns_a_magnitude_for_each_layer(start_run: Callable[..., Run]) -> None:
    run = start_run("run", "sd1", method="lora", dora=True)
    list(train(run))
    assert any("magnitude" in name for name in load_state(run.checkpoints()[2])["model"])
    assert sample(run, ["a {} dog"], [0], steps=1)


def test_a_lora_run_is_a_base_that_can_be_trained_on(start_run: Callable[..., Run]) -> None:
    first = start_run("first", "sd1", method="lora", learning_rate=0.1)
    list(train(first))
    second = start_run("second", "sd1", steps=1).config.replace(base=str(first.folder))
    run = runs.start(second, first.folder.parent / "third")
    list(train(run))
    merged = denoiser(loading.load_model(str(first.folder)))
    after = denoiser(load_source(run))
    assert merged.keys() == after.keys()
    assert loading.inspect_base(str(first.folder)).resolution == 16
    assert len({path.name for path in (first.folder.parent / "class_images").iterdir()}) == 2


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_distilled_target_is_the_bases_own_prediction_for_the_class(
    method: str, start_run: Callable[..., Run], tiny_bases: Callable[[str], str]
) -> None:
    run = start_run("run", "sd1", method=method, prior="distilled", learning_rate=0.05)
    trainer = Trainer(run)
    assert trainer.batches.teacher is not None
    list(islice(training_steps(trainer), 2))
    batch = trainer.batches.at(2)
    assert batch.prompts == ["a ohwx dog"] * 2 + ["a dog"] * 2
    distilled = trainer.batches.teacher(batch)
    base = loading.load_model(tiny_bases("sd1"))
    with torch.no_grad():
        cond = base.encode_prompts(["a dog"] * 2)
        expected = base.predict(batch.noised.x_t[2:], batch.noised.t[2:], cond)
        current = trainer.model(batch.noised.x_t[2:], batch.noised.t[2:], cond, [])
    assert torch.allclose(distilled.target[2:], expected, atol=1e-5)
    assert not torch.allclose(distilled.target[2:], current, atol=1e-3)
    assert torch.equal(distilled.target[:2], batch.noised.target[:2])


def test_the_distilled_prior_of_an_untrained_model_is_zero(start_run: Callable[..., Run]) -> None:
    (first, *_) = train(start_run("run", "sd1", prior="distilled"))
    assert first.prior_loss == pytest.approx(0, abs=1e-10)
    assert first.instance_loss > 0.1


def test_captions_name_the_class_when_the_prior_is_distilled() -> None:
    image = Image.new("RGB", (8, 8))
    photos = [Photo("a", image), Photo("b", image, "a ohwx dog on the beach")]
    dog = Subject("p", "dog")
    photos = captioned(photos, dog.instance_prompt)
    captions = [photo.caption for photo in with_class_captions(photos, dog)]
    assert captions == ["a dog", "a dog on the beach"]


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a ohwx black dog", "a black dog"),
        ("ohwx, a black dog on grass", "a black dog on grass"),
        ("photo of Ohwx Dog", "photo of Dog"),
        ("ohwx on the beach", "dog on the beach"),
        ("a puppy, ohwx", "a puppy, dog"),
        ("an ohwxian dog", "an ohwxian dog"),
    ],
)
def test_a_class_caption_never_has_the_identifier(caption: str, expected: str) -> None:
    photos = [Photo("a", Image.new("RGB", (8, 8)), caption)]
    assert with_class_captions(photos, Subject("p", "dog"))[0].caption == expected


def test_disabling_lora_is_undone(start_run: Callable[..., Run]) -> None:
    trainer = Trainer(start_run("run", "sd1", method="lora", learning_rate=0.1))
    next(training_steps(trainer))
    family, x_t, t = trainer.family, torch.ones(1, 4, 8, 8), torch.tensor([5])
    with torch.no_grad():
        cond = family.encode_prompts(["a dog"])
        before = family.predict(x_t, t, cond)
        with lora.disabled_lora(family):
            off = family.predict(x_t, t, cond)
        after = family.predict(x_t, t, cond)
    assert torch.equal(before, after) and not torch.equal(before, off)
    assert family.denoiser.training


@pytest.mark.parametrize("switch", ["off", "on again"])
def test_an_interrupt_while_lora_is_switched_leaves_no_layer_behind(
    switch: str, start_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, interruptible: None
) -> None:
    trainer = Trainer(start_run("run", "sd1", method="lora"))
    switch_layer, calls = BaseTunerLayer.enable_adapters, count()

    def interrupted(layer: BaseTunerLayer, enabled: bool) -> None:
        switch_layer(layer, enabled)
        if enabled == (switch == "on again") and next(calls) == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(BaseTunerLayer, "enable_adapters", interrupted)
    with pytest.raises(KeyboardInterrupt), lora.disabled_lora(trainer.family):
        pass
    assert all(p.requires_grad for p in trainer.optimizer.parameters)
    layers = [m for m in trainer.family.denoiser.modules() if isinstance(m, BaseTunerLayer)]
    assert len(layers) > 4 and not any(layer.disable_adapters for layer in layers)
    assert trainer.family.denoiser.training


def test_a_checkpoint_has_all_that_is_trained_though_adapters_are_switched_in_part(
    start_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"method": "lora", "prior": "distilled", "ema_decay": 0.9}
    run = start_run("run", "sd1", steps=3, checkpoint_every=9, **settings)
    training = train(run)
    next(training)
    switch_layer, calls = BaseTunerLayer.enable_adapters, count()

    def failing(layer: BaseTunerLayer, enabled: bool) -> None:
        if next(calls) >= 3:
            raise KeyboardInterrupt
        switch_layer(layer, enabled)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(BaseTunerLayer, "enable_adapters", failing)
        next(training)
    assert [step.step for step in train(runs.resume(run.folder))] == [2, 3]


@pytest.mark.parametrize("memory", ["low", "lowest"])
@pytest.mark.parametrize("family", FAMILIES)
def test_low_memory_trains_and_resumes_bit_for_bit(
    family: str, memory: str, start_run: Callable[..., Run]
) -> None:
    complete = start_run("complete", family, memory=memory)
    list(train(complete))
    interrupted = start_run("interrupted", family, memory=memory)
    for _ in islice(train(interrupted), 1):
        pass
    list(train(runs.resume(interrupted.folder)))
    first, second = (load_state(run.checkpoints()[2]) for run in (complete, interrupted))
    assert all(torch.equal(first["model"][name], second["model"][name]) for name in first["model"])
    half = {value.dtype for value in first["model"].values()}
    assert half == {torch.bfloat16 if memory == "lowest" else torch.float32}
    saved = [load_file(file) for file in complete.pipeline.glob("*/*.safetensors")]
    weights = [value for file in saved for value in file.values()]
    dtypes = {value.dtype for value in weights if value.is_floating_point()}
    assert dtypes - half == ({torch.float32} if memory == "lowest" else set()), "what never trains"
    assert {p.dtype for p in load_source(complete).denoiser.parameters()} == {torch.float32}
    assert sample(complete, ["a {} dog"], [0], steps=1, at=2)
    assert sample(complete, ["a {} dog"], [0], steps=1)


@pytest.mark.parametrize(
    "schedule", [{"lr_schedule": "linear"}, {"warmup_steps": 3}, {"lr_schedule": "cosine"}]
)
@pytest.mark.parametrize("memory", ["standard", "low", "lowest"])
def test_a_resumed_run_uses_its_schedules_rates(
    memory: str, schedule: dict[str, Any], start_run: Callable[..., Run]
) -> None:
    fields = {"memory": memory, "steps": 4, "prior_weight": 0.0, "validate_every": 0} | schedule
    complete, interrupted = (
        start_run("complete", "sd1", **fields),
        start_run("interrupted", "sd1", **fields),
    )
    list(train(complete))
    for _ in islice(train(interrupted), 2):
        pass
    list(train(runs.resume(interrupted.folder)))
    first, second = (load_state(run.checkpoints()[4])["model"] for run in (complete, interrupted))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_low_memory_trains_the_same_weights_as_standard(
    method: str, start_run: Callable[..., Run]
) -> None:
    # The gradient norm is never clipped at so high a limit.
    standard = start_run("standard", "sd1", method=method, steps=5, max_grad_norm=1e9)
    low = start_run("low", "sd1", method=method, steps=5, memory="low")
    losses = [[step.loss for step in train(run)] for run in (standard, low)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    first, second = (load_state(run.checkpoints()[5])["model"] for run in (standard, low))
    assert all(torch.allclose(first[name], second[name], atol=1e-5) for name in first)


def test_a_run_resumes_at_another_memory_level(start_run: Callable[..., Run]) -> None:
    complete = start_run("complete", "sd1", steps=3, max_grad_norm=1e9)
    list(train(complete))
    eased = start_run("eased", "sd1", steps=3, max_grad_norm=1e9)
    for _ in islice(train(eased), 1):
        pass
    list(train(runs.resume(eased.folder, memory="low", max_grad_norm=None)))
    first, second = (load_state(run.checkpoints()[3])["model"] for run in (complete, eased))
    assert all(torch.allclose(first[name], second[name], atol=1e-5) for name in first)


def test_lowest_keeps_its_ema_and_final_weights_in_float32(start_run: Callable[..., Run]) -> None:
    run = start_run("run", "sd1", memory="lowest", ema_decay=0.9)
    list(train(run))
    state = load_state(run.checkpoints()[2])
    assert {value.dtype for value in state["ema"]["shadow_params"]} == {torch.float32}
    final = dict(load_source(run).denoiser.named_parameters())
    names = [name.removeprefix("denoiser.") for name in state["model"]]
    for name, value in zip(names, state["ema"]["shadow_params"], strict=True):
        assert torch.equal(final[name], value), "not rounded to bfloat16"


def test_at_low_memory_gradients_never_all_exist_at_once(
    start_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused_optimizer.FusedBackwardOptimizer, "LARGEST_BUCKET", 1)
    trainer = Trainer(start_run("run", "sd1", memory="low"))
    most = 0

    def count(_: torch.nn.Parameter) -> None:
        nonlocal most
        most = max(most, sum(p.grad is not None for p in trainer.optimizer.parameters))

    for parameter in trainer.optimizer.parameters:
        parameter.register_post_accumulate_grad_hook(count)
    next(training_steps(trainer))
    assert most <= 3 < len(trainer.optimizer.parameters)


def test_a_lora_at_low_memory_has_the_ordinary_optimizer(start_run: Callable[..., Run]) -> None:
    fields = {"method": "lora", "batch_size": 2, "max_grad_norm": 1e-3, "gradient_accumulation": 2}
    runs_ = [start_run(level, "sd1", memory=level, **fields) for level in ("standard", "low")]
    trainer = Trainer(runs_[1])
    assert (
        type(trainer.optimizer) is optimizer_step.Optimizer
        and trainer.family.prompt_cache is not None
    )
    assert trainer.family.denoiser.is_gradient_checkpointing
    losses = [[step.loss for step in train(run)] for run in runs_]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    first, second = (load_state(run.checkpoints()[2])["model"] for run in runs_)
    assert all(torch.allclose(first[name], second[name], atol=1e-5) for name in first)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"max_grad_norm": 1.0}, "max_grad_norm is 1.0, which needs all gradients at once"),
        ({"gradient_accumulation": 2}, "gradient_accumulation is 2, which has to keep gradients"),
        ({"mixed_precision": "no", "memory": "lowest"}, "mixed_precision is 'no'"),
    ],
)
def test_settings_that_low_memory_cannot_honour_are_rejected(
    changes: dict[str, Any], reason: str, make_config: Make
) -> None:
    with pytest.raises(ConfigError, match=reason):
        make_config("toybox", "photos", **({"memory": "low"} | changes))


def test_a_loras_checkpoint_loads_as_plain_models(
    start_run: Callable[..., Run], tmp_path: Path
) -> None:
    run = start_run("run", "sdxl", method="lora", train_text_encoder=True, learning_rate=0.1)
    list(train(run))
    load_source(run, 2).pipeline.save_pretrained(tmp_path / "merged")
    plain, end = DiffusionPipeline.from_pretrained(tmp_path / "merged"), load_source(run)
    for name in ("unet", "text_encoder", "text_encoder_2"):
        first, second = (getattr(p, name).state_dict() for p in (plain, end.pipeline))
        assert first.keys() == second.keys()
        assert all(torch.allclose(first[key], second[key], atol=1e-5) for key in first)


@pytest.mark.parametrize("order", [("adamw", "adamw8bit"), ("adamw8bit", "adamw")])
def test_a_run_resumes_with_another_optimizer(
    order: tuple[str, str], start_run: Callable[..., Run], capsys: pytest.CaptureFixture[str]
) -> None:
    run = start_run("run", "sd1", optimizer=order[0], prior_weight=0.0)
    for _ in islice(train(run), 1):
        pass
    assert [step.step for step in train(runs.resume(run.folder, optimizer=order[1]))] == [2]
    assert "so the optimizer starts afresh" in capsys.readouterr().out


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_during_validation_of_the_ema_weights_restores_the_trained_ones(
    start_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(start_run("run", "sd1", ema_decay=0.5, prior_weight=0.0, steps=3))
    list(islice(training_steps(trainer), 2))
    optimizer = trainer.optimizer
    own = [parameter.detach().clone() for parameter in optimizer.parameters]

    with pytest.raises(KeyboardInterrupt), optimizer.ema.swapped_in():
        assert not all(map(torch.equal, own, optimizer.parameters))
        restore = EMAModel.restore

        def interrupted(ema_model: EMAModel, parameters: Any) -> None:
            def interrupting() -> Any:
                for number, parameter in enumerate(parameters):
                    if number == 2:
                        signal.raise_signal(signal.SIGINT)
                    yield parameter

            restore(ema_model, interrupting())

        monkeypatch.setattr(EMAModel, "restore", interrupted)
    assert all(map(torch.equal, own, optimizer.parameters))


def test_a_text_encoder_that_is_too_large_to_train_is_rejected(
    start_run: Callable[..., Run],
) -> None:
    with pytest.raises(ConfigError, match=r"train_text_encoder is set, .*too large"):
        Trainer(start_run("run", "z_image", train_text_encoder=True))


@pytest.mark.parametrize("family", ["sd1", "flux"])
def test_loras_are_composed_with_their_weights(family: str, start_run: Callable[..., Run]) -> None:
    fields = {"method": "lora", "learning_rate": 0.1}
    run0, run1 = (start_run(f"seed{seed}", family, seed=seed, **fields) for seed in (0, 1))
    for run in (run0, run1):
        list(train(run))
    base, lora0, lora1 = (
        denoiser(loading.load_model(name))
        for name in (run0.config.base, str(run0.folder), str(run1.folder))
    )
    composed = denoiser(compose({run0: 1.0, str(run1.folder): -0.5}))
    assert composed.keys() == base.keys()
    for name, value in composed.items():
        expected = lora0[name] - 0.5 * (lora1[name] - base[name])
        assert torch.allclose(value, expected, atol=1e-5), name
    alone = denoiser(compose({run0: 1.0}))
    assert all(torch.equal(alone[name], value) for name, value in lora0.items())


def test_loras_of_two_bases_cannot_be_composed(start_run: Callable[..., Run]) -> None:
    one, other = (start_run(name, name, method="lora", steps=1) for name in ("sd1", "sd2"))
    for run in (one, other):
        list(train(run))
    with pytest.raises(BaseError, match="of the same base can be composed, and these are"):
        compose({one: 1.0, other: 1.0})
    with pytest.raises(BaseError, match="is not a LoRA that this kit trained"):
        compose({one.config.base: 1.0})


@pytest.mark.parametrize("name", ["sd3", "flux", "flux_2_klein", "z_image"])
def test_a_side_that_a_base_cannot_draw_is_refused_before_it_is_loaded(
    name: str, tiny_bases: Callable[[str], str], tmp_path: Path, start_run: Callable[..., Run],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """As with the real autoencoders, whose latents are 8 pixels a side, in patches of 2 x 2."""
    base = tmp_path / "base"
    shutil.copytree(tiny_bases(name), base)
    config = base / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"block_out_channels": [8] * 4}))
    for weights in base.glob("*/*.safetensors"):
        weights.write_bytes(b"not read")
    run = start_run("run", "sd1")
    for side, others in ((24, "16 or 32"), (8, "16 or 32"), (1000, "992 or 1008")):
        sentence = f"resolution is {side}, but .* needs a multiple of 16; set it to {others}"
        own = run.config.replace(base=str(base), resolution=side, method="lora", prior="none")
        with pytest.raises(BaseError, match=sentence):
            list(train(runs.start(own, tmp_path / "own")))
        with pytest.raises(BaseError, match=sentence):
            memory_estimate.estimate(own, "bf16")
        with pytest.raises(BaseError, match=sentence):
            loading.load_model(str(base), resolution=side)


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_a_u_net_draws_any_multiple_of_its_latents(
    name: str, start_run: Callable[..., Run]
) -> None:
    run = start_run("run", name, resolution=24, prior="none")  # an odd number of them, halved
    list(train(run))
    assert sample(run, ["a {} dog"], [0], steps=1)[0].image.size == (24, 24)


def test_composed_loras_draw_as_their_runs_do(start_run: Callable[..., Run]) -> None:
    fields: dict[str, Any] = {"method": "lora", "prior": "none", "steps": 1}
    run = start_run("run", "sd1", prompt_chunks=3, resolution=24, **fields)
    same = start_run("same", "sd1", resolution=24, **fields)
    other = start_run("other", "sd1", prompt_chunks=2, resolution=32, **fields)
    for one in (run, same, other):
        list(train(one))
    family = compose({run: 1.0, str(same.folder): 1.0})
    assert (family.prompt_chunks, family.size) == (3, (24, 24))
    mixed = compose({str(other.folder): 1.0, str(same.folder / "pipeline"): 0.5, run: 0.5})
    assert (mixed.prompt_chunks, mixed.size) == (3, (16, 16))  # the base's own
    assert compose({str(same.folder / "pipeline"): 1.0}).size == (16, 16)  # its run is unknown
