"""Refuse numbers that are not finite where they arise, and save bases that load in float32."""

import os
import subprocess
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from dreambooth_lib import sample
from dreambooth_lib.__main__ import main
from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.data.images import read_photos
from dreambooth_lib.data.preprocessing import to_tensor
from dreambooth_lib.export import pipeline_folder
from dreambooth_lib.families import loading
from dreambooth_lib.families.base import Family
from dreambooth_lib.families.precision import NonFinite
from dreambooth_lib.families.prompt_cache import PromptCache
from dreambooth_lib.training import class_images, latent_cache, runs
from dreambooth_lib.training.latent_cache import LatentCache
from dreambooth_lib.training.loop import train
from dreambooth_lib.training.setup import Trainer

Make = Callable[..., TrainConfig]
TOYBOX = Path(loading.BUNDLED) / "toybox"
SUBJECTS = Path(loading.BUNDLED) / "subjects"


def bundled() -> torch.Tensor:
    """Return all photos of the bundled subjects, [15, 3, 64, 64]."""
    photos = [photo for folder in sorted(SUBJECTS.iterdir()) if folder.is_dir()
              for photo in read_photos(folder)]  # fmt: skip
    return torch.stack([to_tensor(photo.image, 64) for photo in photos])


def psnr(decoded: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """Return the peak signal-to-noise ratio of each image, in dB."""
    errors = (decoded.float().clamp(-1, 1) - pixels).square().mean((1, 2, 3))
    return 10 * torch.log10(4 / errors)


# Toybox in plain diffusers.


@torch.no_grad()
def test_toyboxs_autoencoder_is_as_good_in_float16_as_in_float32() -> None:
    pixels, quality = bundled()[::3], {}
    for dtype in (torch.float32, torch.float16):
        vae = AutoencoderKL.from_pretrained(TOYBOX, subfolder="vae", torch_dtype=dtype)
        mean = vae.encode(pixels.to(dtype)).latent_dist.mean
        quality[dtype] = psnr(vae.decode(mean).sample, pixels)
    assert len(pixels) == 5 and quality[torch.float32].min() > 20
    assert (quality[torch.float32] - quality[torch.float16]).abs().max() < 0.1


@torch.no_grad()
def test_no_layer_of_toybox_comes_near_the_end_of_float16() -> None:
    family = loading.load_model("toybox")
    most = 0.0

    def record(module: Any, inputs: Any, out: Any) -> None:
        nonlocal most
        if isinstance(out, torch.Tensor):
            most = max(most, float(out.abs().max()))

    for part in (family.denoiser, *family.text_encoders, family.pipeline.vae):
        for module in part.modules():
            module.register_forward_hook(record)
    family.encode_images(bundled())
    family.generate([("a dog on the beach", 0), ("a purple teapot in space", 1)], 5, 7.5)
    assert 100 < most < 65504 / 4


def drawn_plainly(folder: Path) -> Any:
    """Load a pipeline with plain diffusers without a dtype, draw with it, and return it."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("a dog", num_inference_steps=1, width=16, height=16).images
    return pipeline


def test_toybox_draws_in_float32_by_default() -> None:
    pipeline = drawn_plainly(TOYBOX)
    assert pipeline.text_encoder.dtype is pipeline.unet.dtype is torch.float32


DRAW = """
import sys
from diffusers import StableDiffusionPipeline
pipeline = StableDiffusionPipeline.from_pretrained(sys.argv[1])
image = pipeline("a dog", num_inference_steps=1, width=16, height=16).images[0]
print(pipeline.unet.dtype, pipeline.text_encoder.dtype, image.getbbox())
"""


@pytest.mark.slow
def test_toybox_draws_with_colabs_versions_too() -> None:
    python = os.environ.get("DREAMBOOTH_TEST_COLAB_PYTHON")
    if python is None:
        pytest.skip("there is no second environment: make test makes one")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    made = subprocess.run(
        [python, "-c", DRAW, str(TOYBOX)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    assert made.stdout.strip() == "torch.float32 torch.float32 (0, 0, 16, 16)"


def test_what_a_run_saves_draws_in_float32_by_default(
    tiny_sd1: str, photos: str, make_config: Make, clip_folder: Path, tmp_path: Path
) -> None:
    """At the lowest memory a text encoder trains in bfloat16, and is saved so."""
    changes = {"memory": "lowest", "train_text_encoder": True, "steps": 1, "validate_every": 1,
               "prior_weight": 0.0, "scorer": str(clip_folder)}  # fmt: skip
    run = runs.start(make_config(tiny_sd1, photos, **changes), tmp_path / "run")
    list(train(run))
    pipeline_folder.write_model(run, 1, tmp_path / "kept")
    for folder in (run.pipeline, tmp_path / "kept"):
        pipeline = drawn_plainly(folder)
        assert pipeline.text_encoder.dtype is pipeline.unet.dtype is torch.float32
    saved = load_file(run.pipeline / "text_encoder" / "model.safetensors")
    assert {value.dtype for value in saved.values()} == {torch.bfloat16}


# The autoencoder, where half precision is float16.


@pytest.mark.parametrize("name", ["sd1", "sdxl", "sd3", "flux"])
def test_autoencoders_stay_in_float32_where_the_rest_is_in_float16(
    name: str, tiny_bases: Callable[[str], str]
) -> None:
    half, whole = (loading.load_model(tiny_bases(name), resolution=16, dtype=dtype, trained=())
                   for dtype in (torch.float16, torch.float32))  # fmt: skip
    assert half.denoiser.dtype is torch.float16
    assert half.pipeline.vae.dtype is torch.float32
    skeleton = loading.load_meta(tiny_bases(name), dtype=torch.float16, trained=())
    assert skeleton.pipeline.vae.dtype is torch.float32
    bf16 = loading.load_model(tiny_bases(name), dtype=torch.bfloat16, trained=())
    assert bf16.pipeline.vae.dtype is torch.bfloat16
    pixels = torch.zeros(1, 3, 16, 16)
    with torch.no_grad(), torch.autocast("cpu", torch.float16):
        values, expected = half.encode_images(pixels), whole.encode_images(pixels)
    for value, expected_value in zip(values, expected, strict=True):
        assert value.dtype is torch.float32 and torch.equal(value, expected_value)


@torch.no_grad()
def test_images_are_decoded_in_float16_where_that_is_finite_and_else_once_more() -> None:
    """Within a quarter of one of 255 levels of what float32 gives."""
    family = loading.load_model("toybox", dtype=torch.float16, trained=())
    vae = family.pipeline.vae
    latents = family.encode_images(bundled()).mean / vae.config.scaling_factor
    dtypes: list[torch.dtype] = []
    vae.decoder.conv_in.register_forward_hook(lambda *given: dtypes.append(given[2].dtype))
    whole = vae.decode(latents).sample
    with torch.autocast("cpu", torch.float16):
        drawn = vae.decode(latents).sample
    assert (drawn - whole).abs().max() * 127.5 < 0.25
    assert torch.equal(vae.decode(latents.half()).sample, drawn), "the rest is in float16 itself"
    assert dtypes == [torch.float32, torch.float16, torch.float16]
    vae.decoder.conv_in.weight.data *= 2**18
    whole = vae.decode(latents).sample
    assert whole.isfinite().all()
    dtypes.clear()
    with torch.autocast("cpu", torch.float16):
        for _ in range(2):
            assert torch.equal(vae.decode(latents, return_dict=False)[0], whole)
    assert dtypes == [torch.float16, torch.float32, torch.float32], "it is tried once"


@pytest.mark.parametrize("name", ["sd3", "flux", "flux_2_klein", "z_image"])
def test_large_text_encoders_compute_outside_autocast_whatever_encodes(
    name: str, tiny_bases: Callable[[str], str]
) -> None:
    family = loading.load_model(tiny_bases(name), resolution=16)
    (encoder,) = (getattr(family.pipeline, part) for part in family.large_encoder_names)
    hidden = list[torch.Tensor]()

    def keep(module: torch.nn.Module, given: Any, output: Any) -> None:
        hidden.append((output.get("hidden_states") or output[:1])[-1])

    encoder.register_forward_hook(keep)
    PromptCache(family, ["a dog"])
    with torch.autocast("cpu", torch.bfloat16):
        PromptCache(family, ["a dog"])
        family.generate([("a dog", 0)], 1, 1.0)
    first, second, *drawing = hidden  # where an empty prompt may come first
    assert torch.equal(second, first) and any(torch.equal(one, first) for one in drawing)


def test_a_cast_that_is_meant_does_not_warn(
    tiny_bases: Callable[[str], str], start_run: Callable[..., runs.Run],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    warned = list[str]()
    monkeypatch.setattr("diffusers.models.modeling_utils.logger.warning", warned.append)
    base = tiny_bases("sd1")
    assert loading.load_meta(base, dtype=torch.float16, trained=()).denoiser.dtype is torch.float16
    Trainer(start_run("run", "sd1", prior="distilled"))
    assert warned == []


# What is not finite.


def broken(base: str, part: str, folder: Path) -> str:
    """Save the base with NaN in the last layer of a part, and return its path."""
    plain = DiffusionPipeline.from_pretrained(base)
    layers = {"unet": plain.unet.conv_out, "encoder": plain.vae.encoder.conv_out,
              "decoder": plain.vae.decoder.conv_out}  # fmt: skip
    norms = [m for m in plain.text_encoder.modules() if isinstance(m, torch.nn.LayerNorm)]
    module = layers.get(part, norms[-1])
    module.bias.data[:] = float("nan")
    plain.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def photo_list(photos: str) -> list[Any]:
    return read_photos(photos)


def test_latents_that_are_not_finite_are_refused_and_not_cached(
    tiny_sd1: str, photos: str, photo_list: list[Any], make_config: Make, tmp_path: Path
) -> None:
    base = broken(tiny_sd1, "encoder", tmp_path / "base")
    config, cached = make_config(base, photos), tmp_path / "latents"
    with pytest.raises(NonFinite, match=r"the VAE of '.*base' produced .* for 0.png in float32"):
        LatentCache(photo_list, loading.load_model(base), config, cached)
    assert not list(tmp_path.glob("latents/*"))
    with pytest.raises(NonFinite, match="in bfloat16"):
        LatentCache(photo_list, loading.load_model(base, dtype=torch.bfloat16), config)
    cropped = LatentCache(photo_list, loading.load_model(base), config.replace(crop="random"))
    with pytest.raises(NonFinite, match=r"for 2.png"):
        cropped.sample([2, 1], torch.Generator().manual_seed(0))


def test_cached_latents_that_are_not_finite_are_encoded_again(
    tiny_sd1: str, photos: str, photo_list: list[Any], make_config: Make, tmp_path: Path
) -> None:
    family, config = loading.load_model(tiny_sd1), make_config(tiny_sd1, photos)
    (made,) = LatentCache(photo_list, family, config, tmp_path).posteriors
    (file,) = tmp_path.glob("*.safetensors")
    saved = load_file(file)
    saved["std"][1, 0, 0, 0] = float("inf")
    save_file(saved, file)
    (again,) = LatentCache(photo_list, family, config, tmp_path).posteriors
    assert torch.equal(again.std, made.std)
    assert torch.equal(load_file(file)["std"], made.std)


def test_conditioning_that_is_not_finite_is_refused(tiny_sd1: str, tmp_path: Path) -> None:
    family = loading.load_model(broken(tiny_sd1, "text", tmp_path / "base"))
    with pytest.raises(NonFinite, match=r"text encoder of '.*base' produced .* in float32"):
        PromptCache(family, ["a dog"])


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("unet", r"the unet or a text encoder of '.*base' produced NaN or infinite latents in"),
        ("text", r"a text encoder of '.*base' produced NaN or infinite embeddings in"),
        ("decoder", r"the VAE of '.*base' produced NaN or infinite pixels in float32"),
    ],
)
@pytest.mark.parametrize("autocast", [False, True])
def test_images_that_are_not_finite_are_refused_and_not_saved(
    autocast: bool, part: str, message: str, tiny_sd1: str, photos: str, make_config: Make,
    tmp_path: Path,
) -> None:  # fmt: skip
    base = broken(tiny_sd1, part, tmp_path / "base")
    config, family = make_config(base, photos), loading.load_model(base)
    half = torch.autocast("cpu", torch.float16, enabled=autocast)
    with half, pytest.raises(NonFinite, match=message) as caught:
        list(class_images.draw_class_images(config, family, tmp_path / "sets"))
    in_half = autocast and part != "decoder"
    assert ("in float16" in str(caught.value)) == in_half
    assert ("bfloat16" in str(caught.value)) == in_half
    assert not list((tmp_path / "sets").rglob("*.png"))
    if not autocast:
        with pytest.raises(NonFinite, match="text encoder" if part == "text" else message):
            sample(base, ["a dog"], [0], steps=1)


def test_black_images_are_refused_and_saved_ones_are_drawn_again(
    tiny_sd1: str, photos: str, make_config: Make, tmp_path: Path
) -> None:
    config, family = make_config(tiny_sd1, photos), loading.load_model(tiny_sd1)
    paths = list(class_images.draw_class_images(config, family, tmp_path))
    before = [path.read_bytes() for path in paths]
    Image.new("RGB", (16, 16)).save(paths[2])
    assert sorted(class_images.draw_class_images(config, family, tmp_path)) == paths
    assert [path.read_bytes() for path in paths] == before
    family.pipeline.vae.decoder.conv_out.weight.data.zero_()
    family.pipeline.vae.decoder.conv_out.bias.data.fill_(-2)
    with pytest.raises(NonFinite, match=r"the VAE of .* produced an all-black image"):
        family.generate([("a dog", 0)], 1, 1.0)


def test_the_command_line_says_it_in_a_sentence(
    tiny_sd1: str, photos: str, make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = runs.start(make_config(broken(tiny_sd1, "decoder", tmp_path / "base"), photos),
                     tmp_path / "run")  # fmt: skip
    monkeypatch.setattr("sys.argv", ["dreambooth_lib", "resume", str(run.folder)])
    with pytest.raises(SystemExit, match=r"error: the VAE of .* produced NaN or infinite"):
        main()


# Latents are encoded a batch at a time.


def test_at_most_one_batch_of_photos_is_in_memory_as_pixels(
    tiny_sd1: str, photos: str, photo_list: list[Any], make_config: Make,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    most = 0

    def counted(*args: Any, **options: Any) -> torch.Tensor:
        nonlocal most
        pixels = to_tensor(*args, **options)
        alive.add(pixels)
        most = max(most, len(alive))
        return pixels

    family, config = loading.load_model(tiny_sd1), make_config(tiny_sd1, photos, flip=True)
    whole = LatentCache(photo_list, family, config).posteriors
    monkeypatch.setattr(latent_cache, "to_tensor", counted)
    monkeypatch.setattr(Family, "batch_size_in_training", property(lambda _: 2))
    parts = LatentCache(photo_list, family, config).posteriors
    assert len(photo_list) == 4 and most == 2
    for part, expected in zip(parts, whole, strict=True):
        assert torch.allclose(part.mean, expected.mean, atol=1e-5)
