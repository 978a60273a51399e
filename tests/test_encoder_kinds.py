"""Each kind of encoder, on tiny random models: preprocessing and embedding computed beside it."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import drawings
from PIL import Image
from safetensors.torch import load_file, save_file
from test_encoders import IMAGENET_MEAN, IMAGENET_STD, prepared
from transformers import (
    Dinov2Config,
    Dinov2WithRegistersConfig,
    DINOv3ConvNextConfig,
    DINOv3ViTConfig,
    GemmaTokenizer,
    Siglip2Config,
    SiglipConfig,
)

from dreambooth_lib.core.errors import InputError
from dreambooth_lib.metrics.encoders import KINDS, Encoder, EncoderError

TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
         "num_attention_heads": 2}  # fmt: skip
LENGTH = 8  #: positions of the tiny text encoders
HALF = [0.5, 0.5, 0.5]


def save_config(folder: Path, **settings: Any) -> None:
    own = {"do_resize": True, "do_rescale": True, "do_normalize": True, "rescale_factor": 1 / 255}
    (folder / "preprocessor_config.json").write_text(json.dumps(own | settings))


def save_tokenizer(folder: Path, **settings: Any) -> None:
    """Write a tokenizer of Gemma's, as SigLIP 2 has."""
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *"abcdefghijklmnopqrstuvwxyz▁"]
    tokens += ["do", "dog", "D"]
    tokenizer = GemmaTokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=[("d", "o"), ("do", "g")],
        add_bos_token=False,
        add_eos_token=True,
        **settings,
    )
    tokenizer.save_pretrained(folder)


def save(name: str, folder: Path) -> Path:
    """Write a tiny random encoder of the type, laid out as the Hub's; returns its folder."""
    folder.mkdir(parents=True)
    torch.manual_seed(3)
    text = TOWER | {"vocab_size": 40, "max_position_embeddings": LENGTH, "projection_size": 16,
                    "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1}  # fmt: skip
    patches = {"image_size": 28, "patch_size": 7}
    configs: dict[str, Callable[[], Any]] = {
        "dinov2": partial(Dinov2Config, **TOWER, **patches),
        "dinov2_with_registers": partial(Dinov2WithRegistersConfig, **TOWER, **patches),
        "dinov3_vit": partial(DINOv3ViTConfig, **TOWER, **patches, num_register_tokens=2),
        "dinov3_convnext": partial(DINOv3ConvNextConfig, hidden_sizes=[4, 8, 8, 16],
                                   depths=[1, 1, 1, 1]),
        "siglip": partial(SiglipConfig, text_config=text, vision_config=TOWER | patches),
        "siglip2": partial(Siglip2Config, text_config=text,
                           vision_config=TOWER | {"patch_size": 7, "num_patches": 16}),
    }  # fmt: skip
    model = getattr(transformers, KINDS[name].model)(configs[name]())
    for parameter in model.parameters():  # biases too, and a layer scale that lets blocks count
        torch.nn.init.normal_(parameter, 0, 0.2)
    model.save_pretrained(folder)
    if name.startswith("dinov2"):
        save_config(
            folder, image_processor_type="BitImageProcessor", size={"shortest_edge": 32},
            do_center_crop=True, crop_size={"height": 28, "width": 28}, resample=3,
            image_mean=IMAGENET_MEAN, image_std=IMAGENET_STD, do_convert_rgb=True,
        )  # fmt: skip
    elif name.startswith("dinov3"):
        save_config(
            folder, image_processor_type="DINOv3ViTImageProcessorFast", do_center_crop=None,
            size={"height": 42, "width": 56}, resample=2, image_mean=IMAGENET_MEAN,
            image_std=IMAGENET_STD, crop_size=None,
        )  # fmt: skip
    elif name == "siglip":
        save_config(
            folder, image_processor_type="SiglipImageProcessor", resample=3,
            size={"height": 28, "width": 28}, image_mean=HALF, image_std=HALF,
        )  # fmt: skip
    else:
        save_config(
            folder, image_processor_type="Siglip2ImageProcessor", resample=2, patch_size=7,
            max_num_patches=16, image_mean=HALF, image_std=HALF,
        )  # fmt: skip
    if KINDS[name].reads_texts:
        save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("encoders")

    def one(name: str) -> Path:
        return folder / name if (folder / name).exists() else save(name, folder / name)

    return one


def normalized(pixels: np.ndarray, mean: list[float], std: list[float]) -> torch.Tensor:
    rows = (pixels.astype(np.float32) - np.float32(mean)) / np.float32(std)
    return torch.from_numpy(rows.transpose(2, 0, 1).copy())[None]


def dinov3_pixels(image: Image.Image) -> torch.Tensor:
    """Resize each channel in floating point by PIL, which antialiases as torch does."""
    channels = [
        Image.fromarray(np.asarray(channel, np.float32) / 255).resize((56, 42), 2)
        for channel in image.convert("RGB").split()
    ]
    return normalized(np.stack([np.asarray(c) for c in channels], -1), IMAGENET_MEAN, IMAGENET_STD)


def siglip_pixels(image: Image.Image) -> torch.Tensor:
    square = image.convert("RGB").resize((28, 28), 3)
    return normalized(np.asarray(square, np.float32) / 255, HALF, HALF)


def dinov2_pixels(image: Image.Image) -> torch.Tensor:
    return prepared(image, 32, 28, IMAGENET_MEAN, IMAGENET_STD)


PIXELS = {"dinov2": dinov2_pixels, "dinov2_with_registers": dinov2_pixels,
          "dinov3_vit": dinov3_pixels, "dinov3_convnext": dinov3_pixels,
          "siglip": siglip_pixels}  # fmt: skip


def loaded(folder: Path, name: str) -> Any:
    return getattr(transformers, KINDS[name].model).from_pretrained(folder).eval()


@pytest.mark.parametrize("name", PIXELS)
def test_images_are_embedded_as_their_own_model_and_preprocessing_say(
    name: str, saved: Callable[[str], Path]
) -> None:
    encoder, model = Encoder(saved(name)), loaded(saved(name), name)
    images = [*drawings(3), drawings(1, 9)[0].convert("L")]
    rows = encoder.embed_images(images)
    assert rows.dtype == torch.float32 and encoder.reads_texts == (name == "siglip")
    for image, row in zip(images, rows, strict=True):
        pixels = PIXELS[name](image)
        with torch.inference_mode():
            model_of_images = model.vision_model if encoder.reads_texts else model
            feature = model_of_images(pixel_values=pixels).pooler_output[0]
        expected = torch.nn.functional.normalize(feature, dim=-1)
        torch.testing.assert_close(row, expected, atol=2e-4, rtol=0)
    assert not torch.allclose(rows[0], rows[1], atol=1e-3), "not the same for every image"


@pytest.mark.parametrize("name", [*PIXELS, "siglip2"])
def test_the_pixels_are_its_processors_own(name: str, saved: Callable[[str], Path]) -> None:
    """With torchvision as without; for a DINOv3 only there, as its own class needs it."""
    encoder = Encoder(saved(name))
    images = [*drawings(3), Image.new("RGB", (300, 20), "red")]
    got = encoder._processor(images=images, return_tensors="pt")
    if name.startswith("dinov3"):
        functional = pytest.importorskip("torchvision.transforms.v2").functional
        if not hasattr(functional, "resize"):
            pytest.skip("torchvision is a stand-in of the tests")
        own = transformers.DINOv3ViTImageProcessor.from_pretrained(saved(name))
    else:
        settings = json.loads((saved(name) / "preprocessor_config.json").read_text())
        own_class = getattr(transformers, f"{settings['image_processor_type']}Pil")
        own = own_class.from_pretrained(saved(name))
    expected = own(images=images, return_tensors="pt")
    assert expected.keys() == got.keys()
    for key, values in expected.items():
        torch.testing.assert_close(got[key], values, atol=1e-6, rtol=0)


def test_naflex_keeps_the_shape_of_an_image(saved: Callable[[str], Path]) -> None:
    folder = saved("siglip2")
    encoder, model = Encoder(folder), loaded(folder, "siglip2")
    images = drawings(3)
    rows = encoder.embed_images(images)
    for image, row, (high, wide) in zip(images, rows, [(5, 3), (4, 4), (2, 6)], strict=True):
        small = image.resize((wide * 7, high * 7), 2)
        pixels = normalized(np.asarray(small, np.float32) / 255, HALF, HALF)[0]
        patches = pixels.reshape(3, high, 7, wide, 7).permute(1, 3, 2, 4, 0).flatten(0, 1)
        filled = torch.zeros(1, 16, 7 * 7 * 3)
        filled[0, : high * wide] = patches.flatten(1)
        mask = (torch.arange(16) < high * wide).int()[None]
        with torch.inference_mode():
            feature = model.vision_model(
                pixel_values=filled, pixel_attention_mask=mask,
                spatial_shapes=torch.tensor([[high, wide]]),
            ).pooler_output[0]  # fmt: skip
        expected = torch.nn.functional.normalize(feature, dim=-1)
        torch.testing.assert_close(row, expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize("name", ["siglip", "siglip2"])
def test_a_siglip_reads_lower_case_padded_to_all_positions(
    name: str, saved: Callable[[str], Path]
) -> None:
    folder = saved(name)
    encoder, model = Encoder(folder), loaded(folder, name)
    rows = encoder.embed_texts(["a dog", "A Dog", "d"])
    pads = [0] * (LENGTH - 4)
    ids = torch.tensor([[5, 31, 33, 1, *pads]])  # a _ dog <eos>, padded on the right
    with torch.inference_mode():
        feature = model.text_model(input_ids=ids).pooler_output[0]  # no mask
    expected = torch.nn.functional.normalize(feature, dim=-1)
    torch.testing.assert_close(rows[0], expected, atol=1e-5, rtol=0)
    assert torch.equal(rows[0], rows[1]) and not torch.allclose(rows[0], rows[2], atol=1e-3)
    long = encoder.embed_texts(["a dog " * 9])
    assert long.shape == (1, 16)


def test_a_dinov2_reads_no_prompts(saved: Callable[[str], Path]) -> None:
    with pytest.raises(InputError, match="is a DINO, which embeds images only"):
        Encoder(saved("dinov2")).embed_texts(["a dog"])


def copied(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to / "copied"))


@pytest.mark.parametrize("lost", ["tokenizer.json", "preprocessor_config.json"])
def test_a_siglip_that_lacks_a_file_is_refused(
    lost: str, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = copied(saved("siglip"), tmp_path)
    (folder / lost).unlink()
    with pytest.raises(EncoderError, match=r"cannot be read .*; give a Hub id"):
        Encoder(folder)


def test_a_package_that_a_tokenizer_needs_is_named(
    saved: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, **settings: Any) -> None:
        raise ImportError("\nSiglipTokenizer requires the SentencePiece library")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", fail)
    with pytest.raises(EncoderError, match=r"not installed \(.*SentencePiece.*\); install it"):
        Encoder(saved("siglip"))


@pytest.mark.parametrize("name", ["dinov2", "dinov3_vit", "siglip"])
def test_weights_must_be_whole_and_safetensors(
    name: str, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = copied(saved(name), tmp_path)
    tensors = load_file(folder / "model.safetensors")
    lost = next(key for key in tensors if key.endswith("bias"))
    save_file({k: v for k, v in tensors.items() if k != lost}, folder / "model.safetensors",
              {"format": "pt"})  # fmt: skip
    with pytest.raises(EncoderError, match="lacks the weight"):
        Encoder(folder)
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(EncoderError, match="cannot be read"):
        Encoder(folder)
    (folder / "model.safetensors").write_bytes(b"\x00" * 90)
    with pytest.raises(EncoderError, match="cannot be read"):
        Encoder(folder)


@pytest.mark.parametrize("settings", [
    {"size": {"shortest_edge": 32}}, {"size": 5}, {"image_mean": ["a", 1, 2]}, {"resample": 3},
    {"do_center_crop": True}, {"do_resize": False}, {"rescale_factor": None},
])  # fmt: skip
def test_other_settings_of_a_dinov3_are_refused(
    settings: dict[str, Any], saved: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = copied(saved("dinov3_vit"), tmp_path)
    own = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(own | settings))
    with pytest.raises(EncoderError, match=r"cannot be read .*; give a Hub id"):
        Encoder(folder)


def test_the_preparation_of_a_dinov3_is_part_of_its_identity(
    saved: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = copied(saved("dinov3_vit"), tmp_path)
    own = json.loads((folder / "preprocessor_config.json").read_text())
    changed = own | {"size": {"height": 14, "width": 14}}
    (folder / "preprocessor_config.json").write_text(json.dumps(changed))
    identity = Encoder(folder).identity
    assert json.loads(json.dumps(identity))["preparation"]["size"] == [14, 14]
    assert identity["preparation"] != Encoder(saved("dinov3_vit")).identity["preparation"]


def test_no_code_of_a_tokenizer_or_a_processor_is_run(
    saved: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied(saved("siglip"), tmp_path)
    (folder / "foreign.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nX = None\n")
    for file, name in (("tokenizer_config.json", "AutoTokenizer"),
                       ("preprocessor_config.json", "AutoImageProcessor")):  # fmt: skip
        own = json.loads((folder / file).read_text())
        own["auto_map"] = {name: ["foreign.X", "foreign.X"]}
        (folder / file).write_text(json.dumps(own | {"tokenizer_class": "X"}))
    monkeypatch.setattr("builtins.input", lambda *prompt: pytest.fail("it asked"))
    try:
        Encoder(folder)
    except EncoderError as error:
        assert "cannot be read" in str(error)
    assert not (tmp_path / "ran").exists()
