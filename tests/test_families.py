"""Find bases, refuse what is none, and compare Stable Diffusion's family with plain diffusers."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from dreambooth_lib.families import loading
from dreambooth_lib.families.device_copies import rows
from dreambooth_lib.families.loading import BaseError, locate


def test_a_pipelines_folder_is_itself_and_a_finished_run_is_its_pipeline(
    tiny_sd1: str, tmp_path: Path
) -> None:
    assert locate(tiny_sd1) == tiny_sd1
    (tmp_path / "run" / "pipeline").mkdir(parents=True)
    shutil.copy(Path(tiny_sd1) / "model_index.json", tmp_path / "run" / "pipeline")
    assert locate(str(tmp_path / "run")) == str(tmp_path / "run" / "pipeline")


def test_the_base_of_stacked_loras_is_what_the_first_was_trained_on(tmp_path: Path) -> None:
    trained_on = {"base": "owner/model", "revision": "main", "variant": None, "quantize": "nf4"}
    for name, word in (("first", "<rex>"), ("second", None)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "base.json").write_text(json.dumps(trained_on | {"word": word}))
        trained_on = {"base": str(tmp_path / name), "revision": None, "variant": None}
        trained_on["quantize"] = None
    resolved = loading.resolve(str(tmp_path / "second"))
    assert (resolved.name, resolved.path) == ("owner/model", "owner/model")
    assert not resolved.is_local and resolved.hub == {"revision": "main", "variant": None}
    first, second = resolved.loras
    assert (first.token, second.token) == ("<rex>", None)
    own = {"base": first.path, "prediction_type": None, "clip_skip": None}
    assert second.trained_on == trained_on | own


def test_toybox_is_the_embedded_base() -> None:
    assert Path(locate("toybox")).name == "toybox"
    assert Path(locate("toybox")).is_absolute()


def test_a_name_with_one_slash_is_a_hub_id() -> None:
    assert locate("owner/model") == "owner/model"


def test_a_folder_that_is_no_base_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    with pytest.raises(BaseError, match=r"photos has no model_index\.json.*run that has finished"):
        locate(str(tmp_path / "photos"))


@pytest.mark.parametrize("base", ["toybx", "a/b/c", "/no/such"])
def test_a_name_that_is_neither_folder_nor_hub_id_is_refused(base: str) -> None:
    with pytest.raises(BaseError, match=f"no base '{base}'.*'toybox'.*Hub id"):
        locate(base)


def test_base_info_equals_what_the_loaded_base_has(tiny_sd1: str, tiny_sd2: str) -> None:
    for base in (tiny_sd1, tiny_sd2, "toybox"):
        info, family = loading.inspect_base(base), loading.load_model(base)
        assert info.resolution == family.resolution
        ((tokenizer, _),) = info.tokenizers
        assert tokenizer.get_vocab() == family.pipeline.tokenizer.get_vocab()


@pytest.mark.parametrize(("version", "size"), [("0.6.0", 128), ("0.9.0.dev0", 16)])
def test_the_resolution_of_an_early_conversion_is_what_the_pipeline_takes_it_for(
    version: str, size: int, tiny_sd1: str, tmp_path: Path
) -> None:
    base = shutil.copytree(tiny_sd1, tmp_path / "base")
    config = json.loads((base / "unet" / "config.json").read_text())
    (base / "unet" / "config.json").write_text(json.dumps(config | {"_diffusers_version": version}))
    assert loading.load_model(str(base)).resolution == size
    assert loading.inspect_base(str(base)).resolution == size
    assert loading.load_meta(str(base)).resolution == size


def test_a_pipeline_of_another_family_is_refused_by_its_class(tmp_path: Path) -> None:
    index = {"_class_name": "KandinskyPipeline"}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(BaseError, match=r"KandinskyPipeline.*StableDiffusionPipeline.*FAMILIES"):
        loading.load_model(str(tmp_path))
    with pytest.raises(BaseError, match="KandinskyPipeline"):
        loading.inspect_base(str(tmp_path))


def test_a_hub_id_that_cannot_be_reached_is_refused_with_what_to_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    # The client reads the variable when it is imported, which may have happened already.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(BaseError, match=r"'owner/model' could not be reached.*check its name"):
        loading.load_model("owner/model")


@pytest.mark.parametrize("base", ["tiny_sd1", "tiny_sd2"])
def test_a_loaded_base_is_in_float32_whatever_dtype_its_files_have(
    base: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(request.getfixturevalue(base))
    pipeline.to(dtype=torch.float16).save_pretrained(tmp_path / "half")
    family = loading.load_model(str(tmp_path / "half"))
    modules = [family.denoiser, *family.text_encoders, *family.frozen]
    assert len(modules) == 3
    assert {p.dtype for module in modules for p in module.parameters()} == {torch.float32}


def test_pickled_weights_are_never_read(tiny_sd1: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_sd1, base)
    (file,) = (base / "unet").glob("*.safetensors")
    file.unlink()
    torch.save({"weight": torch.ones(1)}, base / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(BaseError, match=r"unet has only .*model\.bin, a format that can hold code"):
        loading.load_model(str(base))


@pytest.mark.parametrize("base", ["tiny_sd1", "tiny_sd2"])
def test_latents_prompts_and_predictions_are_those_of_plain_diffusers(
    base: str, request: pytest.FixtureRequest
) -> None:
    path = request.getfixturevalue(base)
    family = loading.load_model(path)
    plain = StableDiffusionPipeline.from_pretrained(path)
    pixels = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        posterior = plain.vae.encode(pixels).latent_dist
        mean, std = family.encode_images(pixels)
        assert torch.allclose(mean, posterior.mean * 0.7, atol=1e-6)
        assert torch.allclose(std, posterior.std * 0.7, atol=1e-6)
        prompts = ["a dog", "a ohwx dog on the beach in snow photo of red cat a dog a dog"]
        cond = family.encode_prompts(prompts)
        hidden = torch.cat([plain.encode_prompt(prompt, "cpu", 1, False)[0] for prompt in prompts])
        assert torch.allclose(cond["encoder_hidden_states"], hidden, atol=1e-5)
        x_t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
        t = torch.tensor([3, 900])
        expected = plain.unet(x_t, t, encoder_hidden_states=hidden).sample
        assert torch.allclose(family.predict(x_t, t, cond), expected, atol=1e-5)


@pytest.mark.parametrize(("base", "kind"), [("tiny_sd1", "epsilon"), ("tiny_sd2", "v_prediction")])
def test_the_forward_process_predicts_what_the_base_was_trained_for(
    base: str, kind: str, request: pytest.FixtureRequest
) -> None:
    family = loading.load_model(request.getfixturevalue(base))
    process = family.forward_process(None)
    assert process.prediction_type == kind
    assert torch.equal(process.alphas_cumprod, family.pipeline.scheduler.alphas_cumprod)
    assert family.resolution == 16


def test_rows_of_conditioning_are_returned_in_the_order_of_the_index() -> None:
    cond = {"a": torch.arange(3), "b": torch.arange(6).reshape(3, 2)}
    picked = rows(cond, [2, 0, 2])
    assert picked["a"].tolist() == [2, 0, 2]
    assert picked["b"].tolist() == [[4, 5], [0, 1], [4, 5]]


@pytest.mark.parametrize(("side", "in_training", "alone"), [(64, 8, 8), (512, 2, 8), (1024, 1, 4)])
def test_large_images_are_drawn_in_small_batches(
    tiny_sd1: str, side: int, in_training: int, alone: int
) -> None:
    family = loading.load_model(tiny_sd1, resolution=side)
    assert (family.batch_size_in_training, family.default_batch_size) == (in_training, alone)
    assert family.pipeline.vae.use_slicing == (in_training < 8)
