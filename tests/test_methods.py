"""Every family with every method and prior: trained, stopped, resumed, saved and read back."""

import signal
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.families import loading
from dreambooth_lib.families.loading import BaseError
from dreambooth_lib.families.stable_diffusion_xl import StableDiffusionXL
from dreambooth_lib.training import fused_optimizer, lora, optimizer_step, runs
from dreambooth_lib.training.checkpoints import load_state
from dreambooth_lib.training.loop import train
from dreambooth_lib.training.loop import training_steps as updates_of
from dreambooth_lib.training.runs import Run
from dreambooth_lib.training.sampling import compose, load_source, sample
from dreambooth_lib.training.setup import Session

Make = Callable[..., TrainConfig]
FAMILIES = ["sd1", "sd2", "sdxl", "sd3", "flux", "z_image"]


@pytest.fixture
def started(
    tmp_path: Path, photos: str, make_config: Make, tiny_bases: Callable[[str], str]
) -> Callable[..., Run]:
    def start(name: str, family: str, **changes: Any) -> Run:
        fields = {"steps": 2, "resolution": 16, "lora_rank": 2, "checkpoint_every": 1}
        config = make_config(tiny_bases(family), photos, **(fields | changes))
        return runs.start(config, tmp_path / name)

    return start


def denoiser(family: Any) -> dict[str, torch.Tensor]:
    return family.denoiser.state_dict()


@pytest.mark.parametrize("prior", ["generated", "distilled", "none"])
@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_resumes_bit_for_bit_and_plain_diffusers_reads_what_it_saves(
    family: str, method: str, prior: str, started: Callable[..., Run], tmp_path: Path
) -> None:
    whole = started("whole", family, method=method, prior=prior)
    steps = list(train(whole))
    assert [step.step for step in steps] == [1, 2]
    assert all((step.prior_loss is None) == (prior == "none") for step in steps)
    assert (tmp_path / "class_images").exists() == (prior == "generated")
    broken = started("broken", family, method=method, prior=prior)
    for _ in islice(train(broken), 1):
        pass
    list(train(runs.resume(broken.folder)))
    one, other = (load_state(run.checkpoints()[2]) for run in (whole, broken))
    assert one["model"].keys() == other["model"].keys()
    assert all(torch.equal(one["model"][name], other["model"][name]) for name in one["model"])
    tuned = load_source(whole)
    if method == "full":
        plain = DiffusionPipeline.from_pretrained(whole.pipeline)
    else:
        assert not any(path.name.startswith("diffusion") for path in whole.pipeline.iterdir())
        plain = DiffusionPipeline.from_pretrained(whole.config.base)
        plain.load_lora_weights(whole.pipeline)
        plain.fuse_lora()
        plain.unload_lora_weights()
    kept = getattr(plain, tuned.denoiser_name).state_dict()
    assert kept.keys() == denoiser(tuned).keys()
    assert all(torch.equal(kept[name], value) for name, value in denoiser(tuned).items())
    base = loading.load_model(whole.config.base)
    assert any(not torch.equal(v, denoiser(base)[name]) for name, v in denoiser(tuned).items())
    (picture,) = sample(whole, ["a {} dog"], [0], steps=1)
    assert picture.image.size == (16, 16)


@pytest.mark.parametrize("family", ["sd1", "flux"])
def test_the_saved_lora_draws_what_the_trained_one_does(
    family: str, started: Callable[..., Run]
) -> None:
    run = started("run", family, method="lora", lora_alpha=6, learning_rate=0.1, ema_decay=0.5)
    list(train(run))
    before, after = (sample(run, ["a {} dog"], [0], steps=2, at=at)[0].image for at in (2, None))
    plain = sample(run.config.base, ["a ohwx dog"], [0], steps=2)[0].image
    distance = [
        max(high for _, high in _difference(before, other).getextrema())
        for other in (after, plain.resize(after.size))
    ]
    assert distance[0] <= 1 < distance[1]


def _difference(one: Any, other: Any) -> Any:
    from PIL import ImageChops

    return ImageChops.difference(one, other)


def test_lora_starts_at_the_base_and_trains_its_own_weights_only(
    started: Callable[..., Run], tiny_bases: Callable[[str], str]
) -> None:
    run = started("run", "sd1", method="lora", train_text_encoder=True, lora_layers="all")
    session = Session(run)
    names = session.trainable.state()
    assert names and all("lora_" in name for name in names)
    assert any(name.startswith("text_encoders.0") for name in names)
    assert any(".ff.net.2." in name for name in names)
    assert len(names) == len(session.optimizer.parameters)
    x_t, t = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([5])
    base = loading.load_model(tiny_bases("sd1"))
    with torch.no_grad():
        expected = base.predict(x_t, t, base.encode_prompts(["a dog"]))
        session.model.eval()
        assert torch.equal(session.model(x_t, t, None, ["a dog"]), expected)


def test_a_text_encoders_lora_is_saved_beside_the_denoisers(
    started: Callable[..., Run], tiny_bases: Callable[[str], str]
) -> None:
    changes = {"train_text_encoder": True, "learning_rate": 0.1}
    run = started("run", "sdxl", method="lora", **changes)
    list(train(run))
    base, tuned = loading.load_model(tiny_bases("sdxl")), load_source(run)
    for one, other in zip(base.text_encoders, tuned.text_encoders, strict=True):
        name = next(n for n, _ in one.named_parameters() if n.endswith("q_proj.weight"))
        assert not torch.equal(one.get_parameter(name), other.get_parameter(name))


def test_lora_does_not_depend_on_what_was_drawn_before(started: Callable[..., Run]) -> None:
    torch.manual_seed(1)
    one = Session(started("one", "sd1", method="lora")).trainable.state()
    torch.manual_seed(2)
    other = Session(started("other", "sd1", method="lora")).trainable.state()
    seeded = Session(started("seeded", "sd1", method="lora", seed=3)).trainable.state()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert any(not torch.equal(one[name], seeded[name]) for name in one)


def test_dora_learns_a_magnitude_of_each_layer(started: Callable[..., Run]) -> None:
    run = started("run", "sd1", method="lora", dora=True)
    list(train(run))
    assert any("magnitude" in name for name in load_state(run.checkpoints()[2])["model"])
    assert sample(run, ["a {} dog"], [0], steps=1)


def test_a_lora_run_is_a_base_that_can_be_trained_on(started: Callable[..., Run]) -> None:
    first = started("first", "sd1", method="lora", learning_rate=0.1)
    list(train(first))
    second = started("second", "sd1", steps=1).config.replace(base=str(first.folder))
    run = runs.start(second, first.folder.parent / "third")
    list(train(run))
    merged = denoiser(loading.load_model(str(first.folder)))
    after = denoiser(load_source(run))
    assert merged.keys() == after.keys()
    assert loading.inspect_base(str(first.folder)).resolution == 16
    assert len({path.name for path in (first.folder.parent / "class_images").iterdir()}) == 2


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_distilled_target_is_the_bases_own_prediction_for_the_class(
    method: str, started: Callable[..., Run], tiny_bases: Callable[[str], str]
) -> None:
    run = started("run", "sd1", method=method, prior="distilled", learning_rate=0.05)
    session = Session(run)
    assert session.batches.teacher is not None
    list(islice(updates_of(session), 2))
    batch = session.batches.at(2)
    assert batch.prompts == ["a ohwx dog"] * 2 + ["a dog"] * 2
    taught = session.batches.teacher(batch)
    base = loading.load_model(tiny_bases("sd1"))
    with torch.no_grad():
        cond = base.encode_prompts(["a dog"] * 2)
        expected = base.predict(batch.noised.x_t[2:], batch.noised.t[2:], cond)
        moved = session.model(batch.noised.x_t[2:], batch.noised.t[2:], cond, [])
    assert torch.allclose(taught.target[2:], expected, atol=1e-5)
    assert not torch.allclose(taught.target[2:], moved, atol=1e-3)
    assert torch.equal(taught.target[:2], batch.noised.target[:2])


def test_the_distilled_prior_of_an_untrained_model_is_zero(started: Callable[..., Run]) -> None:
    (first, *_) = train(started("run", "sd1", prior="distilled"))
    assert first.prior_loss == pytest.approx(0, abs=1e-10)
    assert first.instance_loss > 0.1


def test_captions_name_the_class_where_the_prior_is_distilled() -> None:
    from PIL import Image

    from dreambooth_lib.core.config import Subject
    from dreambooth_lib.data.images import Photo, captioned
    from dreambooth_lib.training.prior_distillation import with_class_captions

    image = Image.new("RGB", (8, 8))
    photos = [Photo("a", image), Photo("b", image, "a ohwx dog on the beach")]
    dog = Subject("p", "dog")
    photos = captioned(photos, dog.instance_prompt)
    captions = [photo.caption for photo in with_class_captions(photos, dog)]
    assert captions == ["a dog", "a dog on the beach"]


def test_switching_off_is_undone(started: Callable[..., Run]) -> None:
    session = Session(started("run", "sd1", method="lora", learning_rate=0.1))
    next(updates_of(session))
    family, x_t, t = session.family, torch.ones(1, 4, 8, 8), torch.tensor([5])
    with torch.no_grad():
        cond = family.encode_prompts(["a dog"])
        before = family.predict(x_t, t, cond)
        with lora.disabled_lora(family):
            off = family.predict(x_t, t, cond)
        after = family.predict(x_t, t, cond)
    assert torch.equal(before, after) and not torch.equal(before, off)
    assert family.denoiser.training


@pytest.mark.parametrize("memory", ["low", "lowest"])
@pytest.mark.parametrize("family", FAMILIES)
def test_low_memory_trains_and_resumes_bit_for_bit(
    family: str, memory: str, started: Callable[..., Run]
) -> None:
    whole = started("whole", family, memory=memory)
    list(train(whole))
    broken = started("broken", family, memory=memory)
    for _ in islice(train(broken), 1):
        pass
    list(train(runs.resume(broken.folder)))
    one, other = (load_state(run.checkpoints()[2]) for run in (whole, broken))
    assert all(torch.equal(one["model"][name], other["model"][name]) for name in one["model"])
    half = {value.dtype for value in one["model"].values()}
    assert half == {torch.bfloat16 if memory == "lowest" else torch.float32}
    saved = [load_file(file) for file in whole.pipeline.glob("*/*.safetensors")]
    found = {value.dtype for weights in saved for value in weights.values()}
    assert found - half == ({torch.float32} if memory == "lowest" else set()), "what never trains"
    assert {p.dtype for p in load_source(whole).denoiser.parameters()} == {torch.float32}
    assert sample(whole, ["a {} dog"], [0], steps=1, at=2)
    assert sample(whole, ["a {} dog"], [0], steps=1)


@pytest.mark.parametrize(
    "schedule", [{"lr_schedule": "linear"}, {"warmup_steps": 3}, {"lr_schedule": "cosine"}]
)
@pytest.mark.parametrize("memory", ["standard", "low", "lowest"])
def test_a_resumed_run_uses_its_schedules_rates(
    memory: str, schedule: dict[str, Any], started: Callable[..., Run]
) -> None:
    fields = {"memory": memory, "steps": 4, "prior_weight": 0.0, "validate_every": 0} | schedule
    whole, broken = started("whole", "sd1", **fields), started("broken", "sd1", **fields)
    list(train(whole))
    for _ in islice(train(broken), 2):
        pass
    list(train(runs.resume(broken.folder)))
    one, other = (load_state(run.checkpoints()[4])["model"] for run in (whole, broken))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_low_memory_gives_what_standard_does(method: str, started: Callable[..., Run]) -> None:
    # The norm of all gradients is never cut at so high a limit.
    standard = started("standard", "sd1", method=method, steps=5, max_grad_norm=1e9)
    low = started("low", "sd1", method=method, steps=5, memory="low")
    losses = [[step.loss for step in train(run)] for run in (standard, low)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    one, other = (load_state(run.checkpoints()[5])["model"] for run in (standard, low))
    assert all(torch.allclose(one[name], other[name], atol=1e-5) for name in one)


def test_a_run_goes_on_at_another_memory_level(started: Callable[..., Run]) -> None:
    whole = started("whole", "sd1", steps=3, max_grad_norm=1e9)
    list(train(whole))
    eased = started("eased", "sd1", steps=3, max_grad_norm=1e9)
    for _ in islice(train(eased), 1):
        pass
    list(train(runs.resume(eased.folder, memory="low", max_grad_norm=None)))
    one, other = (load_state(run.checkpoints()[3])["model"] for run in (whole, eased))
    assert all(torch.allclose(one[name], other[name], atol=1e-5) for name in one)


def test_lowest_keeps_its_average_and_its_end_in_float32(started: Callable[..., Run]) -> None:
    run = started("run", "sd1", memory="lowest", ema_decay=0.9)
    list(train(run))
    state = load_state(run.checkpoints()[2])
    assert {value.dtype for value in state["ema"]["shadow_params"]} == {torch.float32}
    kept = dict(load_source(run).denoiser.named_parameters())
    names = [name.removeprefix("denoiser.") for name in state["model"]]
    for name, value in zip(names, state["ema"]["shadow_params"], strict=True):
        assert torch.allclose(kept[name], value, atol=1e-2)


def test_gradients_never_exist_together_at_low(
    started: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused_optimizer, "CHUNK", 1)
    session = Session(started("run", "sd1", memory="low"))
    most = 0

    def count(_: torch.nn.Parameter) -> None:
        nonlocal most
        most = max(most, sum(p.grad is not None for p in session.optimizer.parameters))

    for parameter in session.optimizer.parameters:
        parameter.register_post_accumulate_grad_hook(count)
    next(updates_of(session))
    assert most <= 3 < len(session.optimizer.parameters)


def test_a_lora_at_low_has_an_ordinary_optimizer(started: Callable[..., Run]) -> None:
    fields = {"method": "lora", "batch_size": 2, "max_grad_norm": 1e-3, "gradient_accumulation": 2}
    runs_ = [started(level, "sd1", memory=level, **fields) for level in ("standard", "low")]
    session = Session(runs_[1])
    assert (
        type(session.optimizer) is optimizer_step.Optimizer
        and session.family.prompt_cache is not None
    )
    assert session.family.denoiser.is_gradient_checkpointing
    losses = [[step.loss for step in train(run)] for run in runs_]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    one, other = (load_state(run.checkpoints()[2])["model"] for run in runs_)
    assert all(torch.allclose(one[name], other[name], atol=1e-5) for name in one)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"max_grad_norm": 1.0}, "max_grad_norm is 1.0, which needs all gradients at once"),
        ({"gradient_accumulation": 2}, "gradient_accumulation is 2, which keeps gradients"),
        ({"mixed_precision": "no", "memory": "lowest"}, "mixed_precision is 'no'"),
    ],
)
def test_what_low_memory_cannot_mean_is_refused(
    changes: dict[str, Any], reason: str, make_config: Make
) -> None:
    from dreambooth_lib.core.config_checks import ConfigError

    with pytest.raises(ConfigError, match=reason):
        make_config("toybox", "photos", **({"memory": "low"} | changes))


def test_a_loras_checkpoint_comes_back_as_plain_models(
    started: Callable[..., Run], tmp_path: Path
) -> None:
    run = started("run", "sdxl", method="lora", train_text_encoder=True, learning_rate=0.1)
    list(train(run))
    load_source(run, 2).pipeline.save_pretrained(tmp_path / "kept")
    plain, end = DiffusionPipeline.from_pretrained(tmp_path / "kept"), load_source(run)
    for name in ("unet", "text_encoder", "text_encoder_2"):
        one, other = (getattr(p, name).state_dict() for p in (plain, end.pipeline))
        assert one.keys() == other.keys()
        assert all(torch.allclose(one[key], other[key], atol=1e-5) for key in one)


@pytest.mark.parametrize("order", [("adamw", "adamw8bit"), ("adamw8bit", "adamw")])
def test_a_run_goes_on_by_another_optimizer(
    order: tuple[str, str], started: Callable[..., Run], capsys: pytest.CaptureFixture[str]
) -> None:
    run = started("run", "sd1", optimizer=order[0], prior_weight=0.0)
    for _ in islice(train(run), 1):
        pass
    assert [step.step for step in train(runs.resume(run.folder, optimizer=order[1]))] == [2]
    assert "so the optimizer starts afresh" in capsys.readouterr().out


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_while_the_average_is_looked_at_leaves_the_runs_own_weights(
    started: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Session(started("run", "sd1", ema_decay=0.5, prior_weight=0.0, steps=3))
    list(islice(updates_of(session), 2))
    optimizer = session.optimizer
    own = [parameter.detach().clone() for parameter in optimizer.parameters]

    with pytest.raises(KeyboardInterrupt), optimizer.ema_weights():
        assert not all(map(torch.equal, own, optimizer.parameters))
        real = optimizer_step.copy_weights

        def interrupted(source: Any, target: Any) -> None:
            pairs = list(zip(source, target, strict=True))
            real(*zip(*pairs[:2], strict=True))
            signal.raise_signal(signal.SIGINT)
            real(*zip(*pairs[2:], strict=True))

        monkeypatch.setattr(optimizer_step, "copy_weights", interrupted)
    assert all(map(torch.equal, own, optimizer.parameters))


@pytest.mark.parametrize("ema", [None, 0.5])
def test_a_run_that_trained_weights_without_effect_goes_on(
    ema: float | None, started: Callable[..., Run], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    run = started("run", "sdxl", train_text_encoder=True, prior_weight=0.0, ema_decay=ema)
    with monkeypatch.context() as patch:
        patch.setattr(StableDiffusionXL, "unused_parameters", lambda self: ())
        for _ in islice(train(run), 1):
            pass
    assert len(load_state(run.checkpoints()[1])["model"]) > len(
        Session(runs.resume(run.folder)).trainable.state()
    )
    assert "the optimizer starts afresh" in capsys.readouterr().out
    assert [step.step for step in train(runs.resume(run.folder))] == [2]
    assert sample(run, ["a {} dog"], [0], steps=1) and load_source(run, 2)


def test_a_text_encoder_that_never_trains_is_refused(started: Callable[..., Run]) -> None:
    from dreambooth_lib.core.config_checks import ConfigError

    with pytest.raises(ConfigError, match=r"train_text_encoder is set .*too large"):
        Session(started("run", "z_image", train_text_encoder=True))


@pytest.mark.parametrize("family", ["sd1", "flux"])
def test_loras_are_composed_by_their_weights(family: str, started: Callable[..., Run]) -> None:
    fields = {"method": "lora", "learning_rate": 0.1}
    one, other = (started(f"seed{seed}", family, seed=seed, **fields) for seed in (0, 1))
    for run in (one, other):
        list(train(run))
    base, first, second = (
        denoiser(loading.load_model(name))
        for name in (one.config.base, str(one.folder), str(other.folder))
    )
    both = denoiser(compose({one: 1.0, str(other.folder): -0.5}))
    assert both.keys() == base.keys()
    for name, value in both.items():
        expected = first[name] - 0.5 * (second[name] - base[name])
        assert torch.allclose(value, expected, atol=1e-5), name
    alone = denoiser(compose({one: 1.0}))
    assert all(torch.equal(alone[name], value) for name, value in first.items())


def test_loras_of_two_bases_are_not_composed(started: Callable[..., Run]) -> None:
    one, other = (started(name, name, method="lora", steps=1) for name in ("sd1", "sd2"))
    for run in (one, other):
        list(train(run))
    with pytest.raises(BaseError, match="of the same base can be composed, and these are"):
        compose({one: 1.0, other: 1.0})
    with pytest.raises(BaseError, match="is not a LoRA that this kit trained"):
        compose({one.config.base: 1.0})
