"""Embed images and prompts with tiny random models saved to disk, and cache the embeddings."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import drawings
from fake_hub import FakeHub, Repo
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import BertConfig, CLIPModel, ViTModel

from dreambooth_lib.core.errors import InputError, KitError
from dreambooth_lib.metrics import encoders
from dreambooth_lib.metrics.encoders import Encoder, EncoderError, embed_files
from dreambooth_lib.notebook import captioner, mask_maker

CLIP_MEAN, CLIP_STD = [0.5, 0.4, 0.3], [0.2, 0.3, 0.25]
IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def prepared(
    image: Image.Image, short: int, crop: int, mean: list[float], std: list[float]
) -> torch.Tensor:
    """Resize by bicubic, crop the center and normalize: float32 ``[1, 3, crop, crop]``."""
    width, height = image.size
    scale = short / min(width, height)
    resized = image.convert("RGB").resize((int(width * scale), int(height * scale)), 3)
    left, top = (resized.width - crop) // 2, (resized.height - crop) // 2
    pixels = np.asarray(resized, np.float32)[top : top + crop, left : left + crop] / 255
    pixels = (pixels - np.float32(mean)) / np.float32(std)
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())[None].float()


def test_clip_rows_have_length_one_and_do_not_depend_on_the_batch(
    clip: Encoder, clip_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = drawings(5)
    prompts = ["a dog", "a dog on a beach", "dog", "snow", "a very long prompt about many dogs"]
    at_once, texts = clip.embed_images(images), clip.embed_texts(prompts)
    assert at_once.shape == texts.shape == (5, 10)
    for rows in (at_once, texts):
        assert rows.dtype == torch.float32 and not rows.requires_grad
        torch.testing.assert_close(rows.norm(dim=-1), torch.ones(5))
    monkeypatch.setattr(encoders, "BATCH", 2)
    torch.testing.assert_close(clip.embed_images(images), at_once, atol=1e-5, rtol=0)
    torch.testing.assert_close(clip.embed_texts(prompts), texts, atol=1e-5, rtol=0)
    assert clip.model_id == str(clip_folder) and clip.reads_texts


def test_clip_images_are_prepared_as_the_config_says(clip: Encoder, clip_folder: Path) -> None:
    model = CLIPModel.from_pretrained(clip_folder).eval()
    for image in [*drawings(3), drawings(1, 9)[0].convert("L")]:
        pixels = prepared(image, 32, 32, CLIP_MEAN, CLIP_STD)
        with torch.inference_mode():
            features = model.visual_projection(model.vision_model(pixels).pooler_output)
        expected = torch.nn.functional.normalize(features, dim=-1)
        torch.testing.assert_close(clip.embed_images([image]), expected, atol=2e-4, rtol=0)


def test_clip_embeddings_are_those_of_the_whole_model(clip: Encoder, clip_folder: Path) -> None:
    model = CLIPModel.from_pretrained(clip_folder).eval()
    pixels = prepared(drawings(1)[0], 32, 32, CLIP_MEAN, CLIP_STD)
    last = len(json.loads((clip_folder / "vocab.json").read_text())) - 1
    ids = torch.tensor([[last - 1, 26, 53, last]])  # <start> a</w> dog</w> <end>
    with torch.inference_mode():
        output = model(input_ids=ids, pixel_values=pixels)
    torch.testing.assert_close(clip.embed_texts(["a dog"]), output.text_embeds, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        clip.embed_images(drawings(1)), output.image_embeds, atol=2e-4, rtol=0
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["clip", "dino"])
def test_embeddings_are_float32_under_a_trainings_autocast(
    kind: str, dtype: torch.dtype, request: pytest.FixtureRequest
) -> None:
    """Else those of a GPU under autocast would be halves, which no float32 can be multiplied by."""
    encoder = request.getfixturevalue(kind)
    images = drawings(3)
    expected = encoder.embed_images(images)
    with torch.autocast("cpu", dtype):
        embedded = [encoder.embed_images(images)]
        if encoder.reads_texts:
            embedded.append(encoder.embed_texts(["a dog", "a cat"]))
    assert [rows.dtype for rows in embedded] == [torch.float32] * len(embedded)
    torch.testing.assert_close(embedded[0], expected, atol=1e-6, rtol=0)
    if encoder.reads_texts:
        encoder._texts.clear()
        texts = encoder.embed_texts(["a dog", "a cat"])
        torch.testing.assert_close(embedded[1], texts, atol=1e-6, rtol=0)


def test_half_precision_weights_are_used_in_float32(clip_folder: Path, tmp_path: Path) -> None:
    for file in clip_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    CLIPModel.from_pretrained(clip_folder).half().save_pretrained(tmp_path)
    assert Encoder(tmp_path).embed_images(drawings(2)).dtype == torch.float32


def test_dino_gives_the_class_token(dino: Encoder, dino_folder: Path) -> None:
    model = ViTModel.from_pretrained(dino_folder, add_pooling_layer=False).eval()
    images = drawings(3)
    rows = dino.embed_images(images)
    for image, row in zip(images, rows, strict=True):
        pixels = prepared(image, 32, 28, IMAGENET_MEAN, IMAGENET_STD)
        with torch.inference_mode():
            token = model(pixels).last_hidden_state[:, 0]
        expected = torch.nn.functional.normalize(token, dim=-1)[0]
        torch.testing.assert_close(row, expected, atol=2e-4, rtol=0)
    assert not dino.reads_texts
    with pytest.raises(ValueError, match="embeds images only"):
        dino.embed_texts(["a dog"])


def test_encoders_that_cannot_be_used_are_named(clip: Encoder, tmp_path: Path) -> None:
    with pytest.raises(EncoderError, match=r"cannot be read .*; give a Hub id"):
        Encoder(tmp_path)
    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(EncoderError, match="is of type 'bert'; give a CLIP"):
        Encoder(tmp_path)
    with pytest.raises(ValueError, match="no images"):
        clip.embed_images([])
    with pytest.raises(ValueError, match="no prompts"):
        clip.embed_texts([])


def _load_each(model: str) -> list[str]:
    """Return what the scorer, the captioner and the maker of masks say of a model of the Hub."""
    loads: list[Callable[[], object]] = [
        lambda: Encoder(model),
        lambda: captioner._load(model, torch.float32),
        lambda: mask_maker._load(model),
    ]
    said = []
    for load in loads:
        with pytest.raises(KitError) as caught:
            load()
        said.append(str(caught.value))
    return said


def test_what_the_hub_refuses_of_a_scorer_is_told_by_its_cause(fake_hub: FakeHub) -> None:
    fake_hub.refusals |= {"/me/401": 401, "/me/403": 403, "/me/429": 429}
    fake_hub.repos["me/gated"] = Repo(files={"config.json": b"{}"})
    fake_hub.gated.add("me/gated")
    words = {"me/401": "rejects your token", "me/403": "accept the terms", "me/429": "rate limit",
             "me/gated": "accept the terms",
             "me/none": "check its name; if it is private"}  # fmt: skip
    for model, word in words.items():
        for said in fake_hub.call(_load_each, model):
            advice = said.rpartition("); ")[2]
            assert word in advice and "network" not in advice and said.endswith("."), said


@pytest.mark.parametrize(
    "lost", [("vocab.json", "merges.txt"), ("preprocessor_config.json",), ("model.safetensors",)]
)
def test_a_folder_that_lacks_a_file_is_refused(
    clip_folder: Path, tmp_path: Path, lost: tuple[str, ...]
) -> None:
    for file in clip_folder.iterdir():
        if file.name not in lost:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(EncoderError, match=r"cannot be read .*; give a Hub id"):
        Encoder(tmp_path)


def test_files_are_embedded_once_by_their_content(
    clip: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = drawings(5)
    paths = [tmp_path / f"{number}.png" for number in range(5)]
    for image, path in zip(images, paths, strict=True):
        image.save(path)
    (tmp_path / "copy.png").write_bytes(paths[0].read_bytes())
    monkeypatch.setattr(encoders, "BATCH", 2)
    cache = tmp_path / "cache"
    rows = embed_files(clip, [*paths, tmp_path / "copy.png"], cache)
    torch.testing.assert_close(rows[:5], clip.embed_images(images), atol=1e-5, rtol=0)
    assert torch.equal(rows[5], rows[0])
    assert len(list(cache.glob("*/*.safetensors"))) == 5

    asked: list[int] = []
    plain = Encoder.embed_images
    monkeypatch.setattr(
        Encoder, "embed_images", lambda self, batch: asked.append(len(batch)) or plain(self, batch)
    )
    assert torch.equal(embed_files(clip, paths, cache), rows[:5]) and not asked
    images[3].rotate(90).save(paths[3])
    again = embed_files(clip, paths, cache)
    assert not torch.equal(again[3], rows[3]) and torch.equal(again[4], rows[4])
    for file in list(cache.glob("*/*.safetensors"))[::2]:
        file.unlink()  # as if the process had been killed between two files
    assert torch.equal(embed_files(clip, paths, cache), again)
    assert asked[0] == 2, "complete batches: an embedding depends a little on the others in its own"


def test_other_weights_and_other_preparation_have_a_cache_of_their_own(
    clip: Encoder, clip_folder: Path, tmp_path: Path
) -> None:
    drawings(1)[0].save(tmp_path / "a.png")
    rows = embed_files(clip, [tmp_path / "a.png"], tmp_path / "cache")
    for change in ("weights", "preparation"):
        folder = tmp_path / change
        folder.mkdir()
        for file in clip_folder.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        if change == "weights":
            torch.manual_seed(9)
            CLIPModel(CLIPModel.from_pretrained(clip_folder).config).save_pretrained(folder)
        else:
            settings = json.loads((folder / "preprocessor_config.json").read_text())
            settings["image_mean"] = [0.1, 0.1, 0.1]
            (folder / "preprocessor_config.json").write_text(json.dumps(settings))
        changed = embed_files(Encoder(folder), [tmp_path / "a.png"], tmp_path / "cache")
        assert not torch.allclose(changed, rows, atol=1e-3)


@pytest.mark.parametrize("content", [b"", b"cut", bytes(300)])
def test_a_damaged_embedding_is_made_anew(clip: Encoder, tmp_path: Path, content: bytes) -> None:
    drawings(1)[0].save(tmp_path / "a.png")
    rows = embed_files(clip, [tmp_path / "a.png"], tmp_path / "cache")
    (file,) = (tmp_path / "cache").glob("*/*.safetensors")
    sound = file.read_bytes()
    file.write_bytes(content)
    assert torch.equal(embed_files(clip, [tmp_path / "a.png"], tmp_path / "cache"), rows)
    assert file.read_bytes() == sound
    file.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))  # a flipped bit
    assert torch.equal(embed_files(clip, [tmp_path / "a.png"], tmp_path / "cache"), rows)


def copied(clip_folder: Path, folder: Path) -> Path:
    return Path(shutil.copytree(clip_folder, folder / "copied"))


def test_no_question_is_asked_about_an_encoders_code(
    clip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied(clip_folder, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "other", "auto_map": {"AutoConfig": "foreign.X"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "foreign.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nX = None\n")
    monkeypatch.setattr("builtins.input", lambda *prompt: pytest.fail("it asked"))
    with pytest.raises(EncoderError, match="cannot be read"):
        Encoder(folder)
    assert not (tmp_path / "ran").exists()


def test_an_encoders_pickled_weights_are_not_read(clip_folder: Path, tmp_path: Path) -> None:
    folder = copied(clip_folder, tmp_path)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(EncoderError, match=r"cannot be read .*in safetensors"):
        Encoder(folder)


def test_an_encoder_without_all_its_weights_is_refused(clip_folder: Path, tmp_path: Path) -> None:
    folder = copied(clip_folder, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("visual_projection.weight")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(EncoderError, match=r"lacks the weight visual_projection\.weight"):
        Encoder(folder)


@pytest.mark.parametrize("text", ["{", "[]", "null", '{"model_type": 5}'])
def test_an_encoders_damaged_config_is_one_sentence(
    clip_folder: Path, tmp_path: Path, text: str
) -> None:
    folder = copied(clip_folder, tmp_path)
    (folder / "config.json").write_text(text)
    with pytest.raises(EncoderError, match="copied"):
        Encoder(folder)


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, MemoryError])
def test_a_lack_of_memory_is_no_unreadable_encoder(
    kind: type[Exception], clip_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: CLIPModel, device: str) -> None:
        raise kind("full")

    monkeypatch.setattr(CLIPModel, "to", fail)
    with pytest.raises(kind, match="full"):
        Encoder(clip_folder)


def test_a_damaged_image_is_named(clip: Encoder, tmp_path: Path) -> None:
    drawings(1)[0].save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:200])
    with pytest.raises(InputError, match=r"cut\.png is damaged"):
        embed_files(clip, [tmp_path / "cut.png"], tmp_path / "cache")
