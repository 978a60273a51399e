"""Read prompts by an earlier layer of the text encoder, alike wherever prompts are read."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.core.config_types import ConfigError
from dreambooth_lib.core.subject import Subject
from dreambooth_lib.export import comfyui, model_card, pipeline_folder
from dreambooth_lib.families import loading
from dreambooth_lib.families.base import Family
from dreambooth_lib.families.base_files import BaseError
from dreambooth_lib.training import runs
from dreambooth_lib.training.loop import train
from dreambooth_lib.training.memory_estimate import estimate
from dreambooth_lib.training.runs import Run, RunError
from dreambooth_lib.training.sampling import compose, sample
from dreambooth_lib.training.setup import Trainer
from dreambooth_lib.training.validation_record import load_images

PROMPTS = ["a ohwx dog on the beach", "", "a red cat"]
KEY = "encoder_hidden_states"


def by_hand(family: Family, prompts: list[str]) -> torch.Tensor:
    """Compute what the last layer but one of a whole text encoder reads, after its last norm."""
    tokenizer, encoder = family.pipeline.tokenizer, family.pipeline.text_encoder
    ids = tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    body = getattr(encoder, "text_model", encoder)
    hidden = body.embeddings(input_ids=ids)
    count = ids.shape[1]
    mask = torch.full((count, count), float("-inf")).triu(1)[None, None]
    for layer in body.encoder.layers[:-1]:
        normed = layer.layer_norm1(hidden)
        own, heads = layer.self_attn, encoder.config.num_attention_heads
        split = [p(normed).unflatten(-1, (heads, -1)).transpose(1, 2)
                 for p in (own.q_proj, own.k_proj, own.v_proj)]  # fmt: skip
        weights = split[0] @ split[1].transpose(-1, -2) / split[0].shape[-1] ** 0.5 + mask
        read = (weights.softmax(-1) @ split[2]).transpose(1, 2).flatten(2)
        hidden = hidden + own.out_proj(read)
        hidden = hidden + layer.mlp(layer.layer_norm2(hidden))
    return body.final_layer_norm(hidden)


@pytest.fixture(scope="module", params=["sd1", "toybox"])
def base(request: pytest.FixtureRequest, tiny_sd1: str) -> str:
    return tiny_sd1 if request.param == "sd1" else "toybox"


@torch.no_grad()
def test_prompts_are_read_by_that_layer(base: str) -> None:
    whole = loading.load_model(base)
    expected = by_hand(whole, PROMPTS)
    family = loading.load_model(base, clip_skip=2)
    found = family.encode_prompts(PROMPTS)[KEY]
    assert torch.allclose(found, expected, atol=1e-5)
    ids = whole.pipeline.tokenizer(PROMPTS, padding="max_length", return_tensors="pt").input_ids
    encoder = whole.pipeline.text_encoder  # as A1111 and diffusers compute it, by transformers
    before_last = encoder(ids, output_hidden_states=True).hidden_states[-2]
    norm = getattr(encoder, "text_model", encoder).final_layer_norm
    assert torch.allclose(found, norm(before_last), atol=1e-6)
    assert not torch.allclose(found, whole.encode_prompts(PROMPTS)[KEY], atol=1e-3)
    long = loading.load_model(base, clip_skip=2, prompt_chunks=2)
    text = " ".join(["dog"] * 40)
    (chunk, _) = long.encode_prompts([text])[KEY].chunk(2, 1)
    assert torch.allclose(chunk, family.encode_prompts([text])[KEY], atol=1e-5)


@torch.no_grad()
def test_no_skip_is_the_base_as_it_is(base: str) -> None:
    plain, first = (loading.load_model(base, clip_skip=skip) for skip in (None, 1))
    assert torch.equal(plain.encode_prompts(PROMPTS)[KEY], first.encode_prompts(PROMPTS)[KEY])


@torch.no_grad()
def test_a_second_load_skips_no_more_layers(tiny_sd1: str, tmp_path: Path) -> None:
    family = loading.load_model(tiny_sd1, clip_skip=2)
    family.pipeline.save_pretrained(tmp_path / "saved")
    expected = family.encode_prompts(PROMPTS)[KEY]
    for skip in (None, 2):
        again = loading.load_model(str(tmp_path / "saved"), clip_skip=skip)
        assert torch.equal(again.encode_prompts(PROMPTS)[KEY], expected)
    with pytest.raises(BaseError, match=r"saved' allows 2 to 2, by the layers"):
        loading.load_model(str(tmp_path / "saved"), clip_skip=1)
    config = tmp_path / "saved" / "text_encoder" / "config.json"
    for odd in ("x", -1, 1.5, [1], None):  # anyone may have written it
        config.write_text(json.dumps(json.loads(config.read_text()) | {"layers_taken_out": odd}))
        again = loading.load_model(str(tmp_path / "saved"), clip_skip=1)
        assert torch.equal(again.encode_prompts(PROMPTS)[KEY], expected)


def test_what_cannot_be_skipped_is_refused(
    tiny_sd1: str, tiny_bases: Callable[[str], str], photos: str,
    make_config: Callable[..., TrainConfig], tmp_path: Path,
) -> None:  # fmt: skip
    with pytest.raises(ConfigError, match="clip_skip is 0; it must be 1 or more"):
        TrainConfig(Subject("photos", "dog"), clip_skip=0)
    with pytest.raises(BaseError, match=r"clip_skip is 3, but .* allows 1 to 2, by the layers"):
        loading.load_model(tiny_sd1, clip_skip=3)
    version_2 = shutil.copytree(tiny_sd1, tmp_path / "version 2")
    config = version_2 / "text_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"hidden_act": "gelu"}))
    others = [tiny_bases(name) for name in ("sdxl", "sd3", "flux", "flux_2_klein", "z_image")]
    for base in (str(version_2), *others):
        sentence = f"clip_skip is 2, but '{base}' is not a Stable Diffusion 1.x model; leave"
        with pytest.raises(BaseError, match=sentence):
            loading.load_model(base, clip_skip=2)
        with pytest.raises(BaseError, match=sentence):
            estimate(make_config(base, photos, clip_skip=2), "bf16")
    assert len(loading.load_model(str(version_2)).encode_prompts(["a dog"])[KEY]) == 1


WAYS: dict[str, dict[str, Any]] = {
    "full": {},
    "text encoder": {"train_text_encoder": True},
    "low": {"memory": "low"},  # encodes all prompts first
    "lora": {"method": "lora", "learning_rate": 1e-2},
    "lora of both": {"method": "lora", "train_text_encoder": True},
}


@pytest.fixture(scope="module", params=WAYS)
def run(
    request: pytest.FixtureRequest, tiny_sd1: str, photos: str, clip_folder: Path,
    make_config: Callable[..., TrainConfig], tmp_path_factory: pytest.TempPathFactory,
) -> Run:  # fmt: skip
    fields = {"steps": 2, "validate_every": 1, "scorer": str(clip_folder), "clip_skip": 2}
    config = make_config(tiny_sd1, photos, **(fields | WAYS[request.param]))
    run = runs.start(config, tmp_path_factory.mktemp("runs") / "run")
    list(train(run))
    return run


def far(first: Image.Image, second: Image.Image) -> int:
    pixels = [np.asarray(image, np.int16) for image in (first, second)]
    return int(np.abs(pixels[0] - pixels[1]).max())


@torch.no_grad()
def test_training_validation_and_class_images_read_alike(run: Run, tmp_path: Path) -> None:
    trainer = Trainer(run)
    expected = by_hand(loading.load_model(run.config.base), ["a ohwx dog"])
    batch = trainer.batches.at(0)
    row = batch.prompts.index("a ohwx dog")
    cond = batch.cond and batch.cond[KEY][row : row + 1]
    if run.config.train_text_encoder:  # it encodes at each step; here before the first one
        fresh = Trainer(runs.start(run.config, tmp_path / "fresh"))
        cond = fresh.family.conditioning(["a ohwx dog"])[KEY]
    assert torch.allclose(cond, expected, atol=1e-5)
    plain, skipping = (loading.load_model(run.config.base, clip_skip=skip) for skip in (None, 2))
    plan = trainer.validator.plan if trainer.validator else None
    assert plan is not None
    pairs = plan.prompts_and_seeds(run.config.subject)[0]
    steps, scale = plan.inference_steps, plan.guidance_scale
    saved = load_images(run, 0).subject
    for family, is_own in ((skipping, True), (plain, False)):
        drawn = family.generate(pairs, steps, scale, fast=plan.fast)
        assert (max(map(far, drawn, saved)) <= 1) == is_own
    sets = [*(run.folder.parent / "class_images").glob("*/manifest.json")]
    assert {json.loads(file.read_text()).get("clip_skip") for file in sets} == {2}


def test_samples_and_the_saved_pipeline_read_alike(run: Run, tmp_path: Path) -> None:
    """The latter by plain diffusers, by the card's own code."""
    (last,) = sample(run, ["a {} dog on the beach"], [0], steps=2, at=2)
    (saved,) = sample(run, ["a {} dog on the beach"], [0], steps=2)
    assert far(last.image, saved.image) <= 1
    pipeline_folder.write_pipeline(run, 2, tmp_path / "exported")
    for model in (run.pipeline, tmp_path / "exported"):
        scope: dict[str, Any] = {}
        *lines, call = model_card.usage(run, model).split("\n")
        assert any("clip skip 2" in line for line in lines) == (run.config.method == "lora")
        exec("\n".join(lines), scope)
        call = call.replace("num_inference_steps=50", "num_inference_steps=2")
        pipeline = scope["pipeline"]
        pipeline.set_progress_bar_config(disable=True)
        seeded = call.replace(").images", ", height=16, width=16, generator=G).images")
        scope["G"] = torch.Generator().manual_seed(0)
        image = eval(seeded, scope)
        assert far(image, saved.image) <= 2 + 4 * (model != run.pipeline), model


def test_a_run_with_a_skip_is_a_base_and_an_export(run: Run, tmp_path: Path) -> None:
    with torch.no_grad():
        expected = loading.load_model(str(run.folder)).encode_prompts(["a ohwx dog"])[KEY]
    config = run.config.replace(base=str(run.folder), clip_skip=None, memory="auto")
    second = runs.start(config.replace(validate_every=0), tmp_path / "second")
    cond = Trainer(second).family.conditioning(["a ohwx dog"])[KEY]
    assert torch.allclose(cond, expected, atol=1e-5)
    list(train(second))
    sample(second, ["a {} dog"], [0], steps=1)
    if run.config.method == "lora":
        composed = compose({run: 1.0}).encode_prompts(["a ohwx dog"])[KEY]
        assert torch.allclose(composed, expected, atol=1e-5)
        assert "layers[-1:]" in model_card.usage(second, second.pipeline)
    for one in (run, second):
        pipeline_folder.write_pipeline(one, 2, tmp_path / one.folder.name / "model")
        said = comfyui.export(one, tmp_path / one.folder.name / "model", tmp_path / "out")
        assert "Set 'Clip skip' to 2 in A1111, or 'CLIP Set Last Layer' to -2" in said
    with pytest.raises(RunError, match="clip_skip 2, but your settings have 1"):
        runs.resume(run.folder, clip_skip=1)
