"""Inference settings of bases: what tells them, what uses them, and the warning of distillation."""

import contextlib
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from fake_hub import FakeHub, Repo

from dreambooth_lib.core.config import TrainConfig, base_defaults
from dreambooth_lib.core.subject import Subject
from dreambooth_lib.evaluation import dreambench, sweep
from dreambooth_lib.families import loading
from dreambooth_lib.families.base import Family
from dreambooth_lib.families.inference_settings import distilled_by_name
from dreambooth_lib.notebook import preflight
from dreambooth_lib.notebook.widgets import compare_with_base
from dreambooth_lib.training import class_images, runs, sampling, validation
from dreambooth_lib.training.loop import train
from dreambooth_lib.training.validation_record import history, plan_of

Make = Callable[..., TrainConfig]

#: Excerpts of schedulers' configs on the Hub.
PNDM = {"_class_name": "PNDMScheduler", "steps_offset": 1}
EULER = {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"}
ZERO_SNR = {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True}
TURBO = EULER | {"timestep_spacing": "trailing", "prediction_type": "epsilon"}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
LCM = {"_class_name": "LCMScheduler", "timestep_spacing": "leading"}
XL_TURBO = TURBO | {"_class_name": "EulerAncestralDiscreteScheduler"}
MEDIUM = {"qk_norm": "rms_norm", "dual_attention_layers": [0, 1]}
LARGE = {"qk_norm": "rms_norm", "dual_attention_layers": []}

BASES = {
    "sd1": ("StableDiffusionPipeline", "stable-diffusion-v1-5", PNDM, {}, (50, 7.5, 25)),
    "sd2": ("StableDiffusionPipeline", "stable-diffusion-2-1", EULER, {}, (50, 7.5, 25)),
    "zero snr": ("StableDiffusionPipeline", "mine", TURBO | ZERO_SNR, {}, (50, 7.5, 25)),
    "sd-turbo": ("StableDiffusionPipeline", "mine", TURBO, {}, (4, 0.0, 4)),
    "lcm": ("StableDiffusionPipeline", "mine", LCM, {"time_cond_proj_dim": 256}, (8, 8.0, 8)),
    "fused lcm": ("StableDiffusionPipeline", "mine", LCM, {"time_cond_proj_dim": None}, (8, 1, 8)),
    "sdxl": ("StableDiffusionXLPipeline", "stable-diffusion-xl-base-1.0", EULER, {}, (50, 5.0, 25)),
    "sdxl-turbo": ("StableDiffusionXLPipeline", "mine", XL_TURBO, {}, (4, 0.0, 4)),
    "lightning": ("StableDiffusionXLPipeline", "Juggernaut-XL-Lightning", EULER, {}, (8, 0.0, 8)),
    "4 steps": ("StableDiffusionXLPipeline", "SDXL_Lightning_4steps", EULER, {}, (4, 0.0, 4)),
    "no hyper": ("StableDiffusionXLPipeline", "hyper-realistic-xl", EULER, {}, (50, 5.0, 25)),
    "sd3": ("StableDiffusion3Pipeline", "stable-diffusion-3-medium", FLOW, {}, (28, 7.0, 28)),
    "sd3.5": ("StableDiffusion3Pipeline", "stable-diffusion-3.5-medium", FLOW, MEDIUM,
              (40, 4.5, 28)),
    "large": ("StableDiffusion3Pipeline", "stable-diffusion-3.5-large", FLOW, LARGE,
              (28, 3.5, 28)),
    "large turbo": ("StableDiffusion3Pipeline", "stable-diffusion-3.5-large-turbo", FLOW, LARGE,
                    (4, 0.0, 4)),
    "dev": ("FluxPipeline", "FLUX.1-dev", FLOW, {"guidance_embeds": True}, (28, 3.5, 28)),
    "schnell": ("FluxPipeline", "mine", FLOW, {"guidance_embeds": False}, (4, 0.0, 4)),
    "hyper": ("FluxPipeline", "FluxDev-HyperSD", FLOW, {"guidance_embeds": True}, (8, 3.5, 8)),
    "klein-base": ("Flux2KleinPipeline", "FLUX.2-klein-base-4B", FLOW, {}, (50, 4.0, 28)),
    "klein": ("Flux2KleinPipeline", "mine", FLOW, {"is_distilled": True}, (4, 1.0, 4)),
    "z-image": ("ZImagePipeline", "Z-Image", FLOW | {"shift": 6.0}, {}, (50, 4.0, 28)),
    "z-image-turbo": ("ZImagePipeline", "mine", FLOW, {}, (9, 0.0, 9)),
    "de-turbo": ("ZImagePipeline", "Z-Image-De-Turbo", FLOW | {"shift": 6.0}, {}, (50, 4.0, 28)),
}  # fmt: skip


def save_configs(
    folder: Path, kind: str, scheduler: dict[str, Any], denoiser: dict[str, Any]
) -> str:
    """Write a base's configs without weights and return the folder."""
    part = "unet" if kind in ("StableDiffusionPipeline", "StableDiffusionXLPipeline") else (
        "transformer"
    )  # fmt: skip
    index = {"_class_name": kind, "is_distilled": denoiser.get("is_distilled", False)}
    files = {"model_index": index, f"{part}/config": denoiser,
             "scheduler/scheduler_config": scheduler}  # fmt: skip
    for name, config in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize("name", BASES)
def test_a_bases_files_and_name_tell_its_steps_and_guidance(name: str, tmp_path: Path) -> None:
    kind, folder, scheduler, denoiser, expected = BASES[name]
    base = save_configs(tmp_path / folder, kind, scheduler, denoiser)
    own = loading.base_inference(base)
    assert (own.steps, own.guidance_scale, own.fewest_steps) == expected
    assert own.validation_steps == own.fewest_steps, "no checkpoint is chosen by unfinished images"
    assert own.distilled == (own.steps < 10)
    discrete = kind in ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
    fast = discrete and not own.distilled and not scheduler.get("rescale_betas_zero_snr")
    assert own.fast_steps == (15 if fast else None)
    warning = loading.warn_of_distillation(base)
    if own.distilled:
        assert warning is not None and f"about {own.steps} steps" in warning
        assert ": train '" in warning
    else:
        assert warning is None


@pytest.mark.parametrize(
    ("name", "steps"),
    [("dreamshaperXL_v21TurboDPMSDE", 8), ("realvisxlV50_v50LightningBakedvae", 8),
     ("juggernautXL_juggXILightningByRD", 8), ("mineXL_v10HyperVAE", 8), ("LastfameDMD2", 8),
     ("LCMDreamshaper", 8), ("SDXLTurbo", 8), ("dreamshaperxlturbo", 8),
     ("epicrealismXL_v8Lightning4StepsVAE", 4),
     ("Hyper-SDXL-8steps", 8), ("sd_xl_hyper_1step", 1), ("hypersd15", 8), ("some_hyper", 8),
     ("model-TCD", 8), ("dmd2_sdxl_4step", 4), ("mysdlightning", 8)],
)  # fmt: skip
def test_a_distilled_base_is_told_by_a_word_of_its_name(name: str, steps: int) -> None:
    found = distilled_by_name([name])
    assert found is not None and found.steps == steps


@pytest.mark.parametrize(
    "name",
    ["perturbo", "hyperrealism", "HyperRealisticXL", "hyper-realistic-xl", "Hyper3D", "HyperXL",
     "De-Turbo", "ZImageDeTurbo", "lightnings", "turbocharged", "Schnellzug", "malcmax"],
)  # fmt: skip
def test_no_other_word_is_a_distilled_bases(name: str) -> None:
    assert distilled_by_name([name]) is None


def test_toybox_has_the_settings_of_its_figures(tmp_path: Path) -> None:
    own = loading.base_inference("toybox")
    assert (own.steps, own.fewest_steps, own.validation_steps, own.distilled) == (25, 25, 10, False)
    assert own.guidance_scale == base_defaults("toybox")["guidance_scale"] == 3.25
    config = TrainConfig(Subject("photos", "dog"))
    assert validation.plan_for(config) == validation.ValidationPlan(
        inference_steps=7, guidance_scale=3.25, fast=True
    )
    assert sweep._plan_of(sweep.PLAN, config, tmp_path).inference_steps == 25


def inference_offline(base: str) -> Any:
    with mock.patch("huggingface_hub.constants.HF_HUB_OFFLINE", True):
        return loading.base_inference(base)


def test_a_base_on_the_hub_needs_three_small_files_and_none_when_offline(fake_hub: FakeHub) -> None:
    configs = {"model_index.json": {"_class_name": "StableDiffusionXLPipeline"},
               "scheduler/scheduler_config.json": XL_TURBO, "unet/config.json": {}}  # fmt: skip
    files = {name: json.dumps(config).encode() for name, config in configs.items()}
    fake_hub.repos["maker/quick"] = Repo(files=files | {"unet/weights.safetensors": b"large"})
    own = fake_hub.call(loading.base_inference, "maker/quick")
    assert (own.steps, own.guidance_scale) == (4, 0.0)
    assert not any("safetensors" in request.path for request in fake_hub.requests)
    asked = len(fake_hub.requests)
    assert fake_hub.call(inference_offline, "maker/quick") == own
    assert len(fake_hub.requests) == asked
    with pytest.raises(loading.BaseError, match="could not be reached"):
        fake_hub.call(loading.base_inference, "maker/gone")


@pytest.fixture
def turbo(tiny_sd1: str, tmp_path: Path) -> str:
    """Copy the tiny base with the scheduler of a distilled one."""
    shutil.copytree(tiny_sd1, tmp_path / "base")
    (tmp_path / "base" / "scheduler" / "scheduler_config.json").write_text(json.dumps(TURBO))
    index = json.loads((tmp_path / "base" / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "EulerDiscreteScheduler"]
    (tmp_path / "base" / "model_index.json").write_text(json.dumps(index))
    return str(tmp_path / "base")


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, float]]:
    """Record the prompt, steps and guidance scale of each image that is drawn."""
    seen: list[tuple[str, int, float]] = []
    generate = Family.generate

    def spy(family: Family, wanted: list[tuple[str, int]], *asked: Any, **how: Any) -> Any:
        seen.extend((prompt, *asked[:2]) for prompt, _ in wanted)
        return generate(family, wanted, 1, *asked[1:], **how)

    monkeypatch.setattr(Family, "generate", spy)
    return seen


@pytest.fixture
def plain(photos: str, clip_folder: Path) -> Callable[..., TrainConfig]:
    """Make configs of short runs without inference settings of their own."""

    def make(base: str, **changes: Any) -> TrainConfig:
        fields = {"steps": 2, "batch_size": 1, "class_images": 2, "learning_rate": 1e-3,
                  "validate_every": 2, "scorer": str(clip_folder)}  # fmt: skip
        return TrainConfig(Subject(photos, "dog"), base, **fields | changes)

    return make


def test_class_images_and_validation_images_use_the_bases_settings(
    plain: Callable[..., TrainConfig], tiny_sd1: str, turbo: str, tmp_path: Path,
    drawn: list[tuple[str, int, float]],
) -> None:  # fmt: skip
    for base, class_steps, asked, of_card in (
        (tiny_sd1, 15, (12, 7.5), (50, 7.5)),
        (turbo, 4, (4, 0.0), (4, 0.0)),
    ):
        drawn.clear()
        run = runs.start(plain(base), tmp_path / Path(base).name / "run")
        list(train(run))
        assert {tuple(how) for _, *how in drawn[:2]} == {(class_steps, asked[1])}
        assert len(drawn) > 10 and {tuple(how) for _, *how in drawn[2:]} == {asked}
        drawn.clear()
        for source in (run, base, loading.load_model(base), loading.load_model(str(run.folder))):
            sampling.sample(source, ["a dog"], [0])
        compare_with_base(run).draw()
        assert len(drawn) == 6 and {tuple(how) for _, *how in drawn} == {of_card}


def test_a_configs_inference_settings_are_used(
    plain: Callable[..., TrainConfig], turbo: str, tmp_path: Path,
    drawn: list[tuple[str, int, float]],
) -> None:  # fmt: skip
    settings = {"prior_inference_steps": 6, "prior_guidance_scale": 2.0, "guidance_scale": 3.0,
            "validation_inference_steps": 7}  # fmt: skip
    run = runs.start(plain(turbo, **settings), tmp_path / "runs" / "run")
    list(train(run))
    assert {tuple(how) for _, *how in drawn[:2]} == {(6, 2.0)}, "class images come first"
    assert {tuple(how) for _, *how in drawn[2:]} == {(7, 3.0)}
    drawn.clear()
    sampling.sample(run, ["a dog"], [0])
    assert drawn == [("a dog", 4, 3.0)]


def test_an_evaluation_uses_each_bases_settings(
    turbo: str, tiny_sd1: str, photos: str, tmp_path: Path, drawn: list[tuple[str, int, float]]
) -> None:
    subject = Subject(photos, "dog", kind="live")
    bench = dreambench.Benchmark([subject], {"live": ["a {} {noun}"]})
    protocol = dreambench.Protocol(images_per_prompt=1, class_images=2)
    for base, asked in ((turbo, (4, 0.0)), (tiny_sd1, (25, 7.5))):
        drawn.clear()
        list(dreambench.draw_all(bench, {"base": lambda _, b=base: b}, tmp_path / base[-3:],
                                 protocol))  # fmt: skip
        assert len(drawn) == 3 and {tuple(how) for _, *how in drawn} == {asked}


def test_training_warns_of_distilled_bases_and_of_no_others(
    plain: Callable[..., TrainConfig], tiny_sd1: str, turbo: str, tmp_path: Path
) -> None:
    def printed(run: runs.Run) -> str:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            list(train(run))
        return out.getvalue()

    quick = {"validate_every": 0, "prior_weight": 0.0}
    run = runs.start(plain(turbo, **quick), tmp_path / "runs" / "turbo")
    text = printed(run)
    assert text.count("distilled to generate in about 4 steps") == 1
    assert f"train '{loading.resolve(turbo).family.undistilled_base}' instead" in text
    assert "distilled" not in printed(runs.resume(run.folder, steps=4)), "it warns once"
    other = runs.start(plain(tiny_sd1, **quick), tmp_path / "runs" / "other")
    assert "distilled" not in printed(other)


def test_preflight_tells_of_distilled_bases_and_of_no_others(
    tiny_sd1: str, turbo: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check_of(base: str) -> preflight.Check:
        return next(c for c in preflight.preflight(base, tmp_path) if c.name == "base")

    assert check_of(turbo).ok and "distilled to generate in about 4 steps" in check_of(turbo).result
    assert "distilled" not in check_of(tiny_sd1).result
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", lambda url, **given: None)
    schnell = check_of("black-forest-labs/FLUX.1-schnell")
    assert schnell.ok and "is distilled" in schnell.result, "by its name, with nothing downloaded"


def test_a_runs_settings_are_its_bases_whatever_its_folders_name(
    plain: Callable[..., TrainConfig], turbo: str, tiny_sd1: str, tmp_path: Path
) -> None:
    quick = {"validate_every": 0, "prior_weight": 0.0, "steps": 1}
    named = tmp_path / "runs" / "turbo_dog"
    list(train(runs.start(plain(tiny_sd1, **quick), named)))
    assert loading.base_inference(str(named)).steps == 50
    list(train(runs.start(plain(str(named), **quick), tmp_path / "runs" / "second")))
    assert loading.base_inference(str(tmp_path / "runs" / "second")).steps == 50
    for method in ("full", "lora"):
        folder = tmp_path / "runs" / method
        list(train(runs.start(plain(turbo, method=method, **quick), folder)))
        assert loading.base_inference(str(folder)).steps == 4
    shutil.copytree(tmp_path / "runs" / "full" / "pipeline", tmp_path / "kept")
    assert loading.base_inference(str(tmp_path / "kept")).steps == 4


def test_an_older_run_resumes_with_its_settings(
    plain: Callable[..., TrainConfig], tiny_sd1: str, tmp_path: Path,
    drawn: list[tuple[str, int, float]],
) -> None:  # fmt: skip
    """Its config.toml has settings that a newer one leaves to the base."""
    old = {"prior_inference_steps": 25, "prior_guidance_scale": 5.0, "guidance_scale": 5.0}
    folder = tmp_path / "runs" / "old"
    run = runs.start(plain(tiny_sd1, **old), folder)
    text = (folder / "config.toml").read_text()
    assert "validation_inference_steps" not in text
    (folder / "validation").mkdir()
    view = validation.ValidationPlan(inference_steps=10, guidance_scale=5.0)
    (folder / "validation" / "plan.json").write_text(json.dumps(vars(view)))
    next(iter(train(run)))
    drawn.clear()
    new = plain(tiny_sd1)
    assert new.guidance_scale is None and runs.why_not_resumable(new, folder) is None
    again = runs.start_or_resume(new, folder)
    assert (folder / "config.toml").read_text() == text
    list(train(again))
    assert {tuple(how) for _, *how in drawn} == {(10, 5.0)}
    assert runs.why_not_resumable(new, folder) is None, "a finished one, too"
    assert "guidance_scale 5.0, but your settings have 4.0" in str(
        runs.why_not_resumable(new.replace(guidance_scale=4.0), folder)
    )


def test_other_inference_settings_are_another_study(
    plain: Callable[..., TrainConfig], tiny_sd1: str, tmp_path: Path
) -> None:
    view = validation.ValidationPlan(class_images=2, inference_steps=1)
    old = {"a": plain(tiny_sd1, prior_weight=0.0, guidance_scale=5.0)}
    assert [cell.error for cell in sweep.sweep(old, tmp_path, [2], view)] == [None]
    new = {"a": plain(tiny_sd1, prior_weight=0.0, guidance_scale=7.0)}
    with pytest.raises(runs.RunError, match=r"guidance_scale 5\.0, but .* have 7\.0"):
        list(sweep.sweep(new, tmp_path, [2], view))


def test_a_study_resumes_with_its_settings_if_new_configs_have_none(
    plain: Callable[..., TrainConfig], tiny_sd1: str, tmp_path: Path
) -> None:
    old = {"a": plain(tiny_sd1, prior_weight=0.0, guidance_scale=5.0, prior_inference_steps=25)}
    begun = validation.ValidationPlan(class_images=2, inference_steps=1)
    assert [cell.error for cell in sweep.sweep(old, tmp_path, [1], begun)] == [None]
    new = {"a": plain(tiny_sd1, prior_weight=0.0)}
    view = validation.ValidationPlan(class_images=2)
    assert [cell.error for cell in sweep.sweep(new, tmp_path, [1, 2], view)] == [None]
    run = runs.resume(tmp_path / "a")
    assert plan_of(run) == validation.ValidationPlan(
        class_images=2, inference_steps=1, guidance_scale=plan_of(run).guidance_scale
    )
    assert {row.step for row in history(run)} == {0, 1, 2}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Let the CPU pass for a GPU; record what is drawn on it, in which dtype, and what is freed.

    Only ``load_source`` places a family on it.
    """
    seen = SimpleNamespace(placed=[], drawn=[], freed=0)
    place, draw = sampling._place, Family.generate

    def placed(family: Family) -> Family:
        seen.placed.append(family.denoiser.dtype)
        family.on_gpu = True  # type: ignore[attr-defined]
        return place(family)

    def drawing(family: Family, wanted: list[tuple[str, int]], *given: Any, **how: Any) -> Any:
        seen.drawn.append((getattr(family, "on_gpu", False), family.denoiser.dtype, len(wanted)))
        return draw(family, wanted, *given, **how)

    monkeypatch.setattr(sampling, "sampling_dtype", lambda: torch.bfloat16)
    monkeypatch.setattr(sampling, "_place", placed)
    monkeypatch.setattr(Family, "generate", drawing)
    monkeypatch.setattr(
        "dreambooth_lib.core.gpu_memory.free_memory", lambda: setattr(seen, "freed", seen.freed + 1)
    )
    return seen


def test_a_studys_class_images_are_drawn_on_the_gpu_which_is_then_freed(
    plain: Callable[..., TrainConfig], tiny_sd1: str, tmp_path: Path, gpu: SimpleNamespace,
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    quick = {"prior_inference_steps": 1, "validate_every": 0, "class_images": 3}
    configs = sweep.grid(plain(tiny_sd1, **quick), seed=[0, 1], prior_weight=[0.0, 1.0])
    seen: list[int] = []
    monkeypatch.setattr(sweep, "run_cell", lambda *cell: seen.append(gpu.freed))
    list(sweep.sweep(configs, tmp_path, [2], validation.ValidationPlan(inference_steps=1)))
    assert gpu.drawn == [(True, torch.bfloat16, 3)] * 2, "a set for each seed"
    assert gpu.placed == [torch.bfloat16], "loaded once for all cells of a base"
    assert seen == [1, 1, 1, 1], "the base is freed before the first cell"
    assert "class images: 100%" in capfd.readouterr().err


def test_the_demos_class_images_and_figures_are_drawn_on_the_gpu(
    plain: Callable[..., TrainConfig], tiny_sd1: str, tmp_path: Path, gpu: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from dreambooth_lib.evaluation import demo

    validated: list[bool] = []
    draw_images = demo.draw_images

    def recorded(family: Family, *arguments: Any) -> Any:
        validated.append(getattr(family, "on_gpu", False))
        return draw_images(family, *arguments)

    monkeypatch.setattr(demo, "draw_images", recorded)
    config = plain(tiny_sd1, prior_inference_steps=1, validate_every=0)
    plan = validation.ValidationPlan(class_images=2, inference_steps=1)
    demo.personalise(config, tmp_path / "runs" / "run", plan=plan)
    assert gpu.drawn[0] == (True, torch.bfloat16, 2) and validated == [True, True]
    assert {on_gpu for on_gpu, *_ in gpu.drawn} == {True}, "class and validation images"
    assert gpu.freed >= 3


def test_class_images_of_any_precision_are_one_set(
    plain: Callable[..., TrainConfig], tiny_sd1: str, tmp_path: Path, gpu: SimpleNamespace
) -> None:
    config = plain(tiny_sd1)
    whole, half = loading.load_model(tiny_sd1), sampling.load_source(config)
    assert half.denoiser.dtype is torch.bfloat16
    assert class_images.class_images_folder(
        config, whole, tmp_path
    ) == class_images.class_images_folder(config, half, tmp_path)


@pytest.mark.parametrize("name", ["sd1", "sdxl", "sd3", "flux", "flux_2_klein", "z_image"])
def test_each_family_draws_without_guidance_from_cached_prompts(
    name: str, tiny_bases: Callable[[str], str]
) -> None:
    """As distilled bases draw at low memory, where the text encoders are freed."""
    base, prompts_and_seeds = tiny_bases(name), [("a dog", 0), ("a cat", 1)]
    cached = loading.load_model(base, prompts=["a dog", "a cat"], resolution=16)
    whole = loading.load_model(base, resolution=16)
    images = [family.generate(prompts_and_seeds, 2, 0.0) for family in (cached, whole)]
    for image, expected in zip(*images, strict=True):
        assert image.tobytes() == expected.tobytes()
        assert max(high for _, high in image.getextrema()) > 0
