"""The measures against plain loops; the encoders on tiny random models saved to disk."""

import json
import subprocess
import sys
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BertConfig, CLIPConfig, CLIPModel, ViTConfig, ViTModel

from dreambooth_lib import metrics
from dreambooth_lib.metrics import (
    Encoder,
    diversity,
    evaluate,
    prior_drift,
    prompt_adherence,
    reference_fidelity,
    strip_identifier,
    subject_fidelity,
)

CLIP_MEAN, CLIP_STD = [0.5, 0.4, 0.3], [0.2, 0.3, 0.25]
IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
         "num_attention_heads": 2}  # fmt: skip


def embeddings(count: int, seed: int, width: int = 7) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(count, width))).float()


def cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    a, b = one.double().numpy(), other.double().numpy()
    return float(np.sum(a * b) / np.sqrt(np.sum(a * a) * np.sum(b * b)))


def drawings(count: int, seed: int = 0) -> list[Image.Image]:
    """Random pictures of several shapes, smooth enough for a resize to mean something."""
    generator = np.random.default_rng(seed)
    shapes = [(40, 56), (64, 64), (90, 33)]
    coarse = [generator.integers(0, 256, (6, 6, 3), dtype=np.uint8) for _ in range(count)]
    return [Image.fromarray(c).resize(shapes[i % 3]) for i, c in enumerate(coarse)]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    letters = "abcdefghijklmnopqrstuvwxyz"
    symbols = [*letters, *(f"{letter}</w>" for letter in letters), "do", "dog</w>"]
    symbols += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {symbol: index for index, symbol in enumerate(symbols)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\nd o\ndo g</w>\n")
    text = TOWER | {
        "vocab_size": len(symbols), "max_position_embeddings": 12, "pad_token_id": len(symbols) - 1,
        "bos_token_id": len(symbols) - 2, "eos_token_id": len(symbols) - 1,
    }  # fmt: skip
    vision = TOWER | {"image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=10)
    CLIPModel(config).save_pretrained(folder)
    preprocessing = {
        "image_processor_type": "CLIPImageProcessor", "do_convert_rgb": True, "do_resize": True,
        "size": {"shortest_edge": 32}, "resample": 3, "do_center_crop": True,
        "crop_size": {"height": 32, "width": 32}, "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": CLIP_MEAN, "image_std": CLIP_STD,
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing))
    return folder


@pytest.fixture(scope="module")
def dino_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dino")
    torch.manual_seed(1)
    ViTModel(ViTConfig(**TOWER, image_size=28, patch_size=7)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip(clip_folder: Path) -> Encoder:
    return Encoder(clip_folder)


@pytest.fixture(scope="module")
def dino(dino_folder: Path) -> Encoder:
    return Encoder(dino_folder)


def prepared(
    picture: Image.Image, short: int, crop: int, mean: list[float], std: list[float]
) -> torch.Tensor:
    """Shorter side by bicubic, centre crop, to [0, 1], normalised: float32 ``[1, 3, s, s]``."""
    width, height = picture.size
    scale = short / min(width, height)
    resized = picture.convert("RGB").resize((int(width * scale), int(height * scale)), 3)
    left, top = (resized.width - crop) // 2, (resized.height - crop) // 2
    pixels = np.asarray(resized, np.float32)[top : top + crop, left : left + crop] / 255
    pixels = (pixels - np.float32(mean)) / np.float32(std)
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())[None].float()


def test_subject_fidelity_is_the_mean_over_all_pairs() -> None:
    generated, reference = embeddings(5, 0), embeddings(3, 1)
    expected = np.mean([cosine(g, r) for g in generated for r in reference])
    assert subject_fidelity(generated, reference) == pytest.approx(expected, abs=1e-9)


def test_reference_fidelity_leaves_out_self_pairs() -> None:
    reference = embeddings(4, 2)
    expected = np.mean([cosine(a, b) for a, b in combinations(reference, 2)])
    assert reference_fidelity(reference) == pytest.approx(expected, abs=1e-9)


def test_prompt_adherence_and_prior_drift_match_row_by_row() -> None:
    one, other = embeddings(6, 3), embeddings(6, 4)
    expected = np.mean([cosine(a, b) for a, b in zip(one, other, strict=True)])
    assert prompt_adherence(one, other) == pytest.approx(expected, abs=1e-9)
    assert prior_drift(one, other) == pytest.approx(1 - expected, abs=1e-9)


def test_diversity_is_one_minus_the_mean_cosine_of_pairs() -> None:
    pictures = embeddings(5, 5)
    expected = np.mean([1 - cosine(a, b) for a, b in combinations(pictures, 2)])
    assert diversity(pictures) == pytest.approx(expected, abs=1e-9)


def test_values_at_the_ends() -> None:
    same = embeddings(1, 6).repeat(4, 1)
    assert subject_fidelity(same, same[:2]) == pytest.approx(1)
    assert subject_fidelity(same, -same[:2]) == pytest.approx(-1)
    assert diversity(same) == pytest.approx(0, abs=1e-9)
    assert prior_drift(same, same) == pytest.approx(0, abs=1e-9)
    assert prior_drift(same, -same) == pytest.approx(2)
    assert reference_fidelity(torch.eye(3)) == pytest.approx(0)


def test_neither_scale_nor_order_matters() -> None:
    one, other = embeddings(6, 7), embeddings(6, 8)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    scales = torch.tensor([0.1, 3.0, 20.0, 1.0, 7.0, 0.5])[:, None]
    changed = (one * scales)[order]
    assert subject_fidelity(changed, other) == pytest.approx(subject_fidelity(one, other))
    assert reference_fidelity(changed) == pytest.approx(reference_fidelity(one))
    assert diversity(changed) == pytest.approx(diversity(one))
    for matching in (prompt_adherence, prior_drift):  # the order of pairs, not within them
        assert matching(changed, other[order]) == pytest.approx(matching(one, other))
        assert matching(changed, other) != pytest.approx(matching(one, other))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: subject_fidelity(embeddings(0, 0), embeddings(2, 0)), "generated.*shape.*0, 7"),
        (lambda: subject_fidelity(embeddings(2, 0), embeddings(2, 0)[0]), "reference.*shape"),
        (lambda: subject_fidelity(embeddings(2, 0), embeddings(2, 0, 5)), "one encoder"),
        (lambda: reference_fidelity(embeddings(1, 0)), "only one row of reference"),
        (lambda: diversity(embeddings(1, 0)), "only one row of pictures"),
        (lambda: prompt_adherence(embeddings(2, 0), embeddings(3, 0)), "one row for one row"),
        (lambda: prior_drift(embeddings(2, 0), embeddings(1, 0)), "one row for one row"),
        (lambda: diversity(torch.zeros(2, 3)), "row 0 .* zero"),
        (lambda: diversity(torch.tensor([[1.0, 2], [torch.nan, 0]])), "row 1 .* not finite"),
    ],
)
def test_wrong_embeddings_are_named_in_one_sentence(
    call: Callable[[], float], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a ohwx dog in snow", "a dog in snow"),
        ("  ohwx   dog", "dog"),
        ("a dog like ohwx", "a dog like"),
        ("ohwx and ohwx, again", "and , again"),
        ("an ohwxy dog, pre-ohwx", "an ohwxy dog, pre-ohwx"),
        ("a dog", "a dog"),
    ],
)
def test_strip_identifier_removes_whole_words_only(prompt: str, expected: str) -> None:
    assert strip_identifier(prompt, "ohwx") == expected


def test_strip_identifier_takes_the_identifier_literally() -> None:
    assert strip_identifier("a [V] dog", "[V]") == "a dog"
    assert strip_identifier("a  dog", "") == "a dog"


def test_clip_rows_have_length_one_and_do_not_depend_on_the_batch(
    clip: Encoder, clip_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = drawings(5)
    prompts = ["a dog", "a dog on a beach", "dog", "snow", "a very long prompt about many dogs"]
    at_once, texts = clip.images(pictures), clip.texts(prompts)
    assert at_once.shape == texts.shape == (5, 10)
    for rows in (at_once, texts):
        assert rows.dtype == torch.float32 and not rows.requires_grad
        torch.testing.assert_close(rows.norm(dim=-1), torch.ones(5))
    monkeypatch.setattr(metrics, "BATCH", 2)
    torch.testing.assert_close(clip.images(pictures), at_once, atol=1e-5, rtol=0)
    torch.testing.assert_close(clip.texts(prompts), texts, atol=1e-5, rtol=0)
    assert clip.model_id == str(clip_folder) and clip.reads_texts


def test_clip_pictures_are_prepared_as_the_config_says(clip: Encoder, clip_folder: Path) -> None:
    model = CLIPModel.from_pretrained(clip_folder).eval()
    for picture in [*drawings(3), drawings(1, 9)[0].convert("L")]:
        pixels = prepared(picture, 32, 32, CLIP_MEAN, CLIP_STD)
        with torch.inference_mode():
            features = model.visual_projection(model.vision_model(pixels).pooler_output)
        expected = torch.nn.functional.normalize(features, dim=-1)
        torch.testing.assert_close(clip.images([picture]), expected, atol=2e-4, rtol=0)


def test_clip_embeddings_are_those_of_the_whole_model(clip: Encoder, clip_folder: Path) -> None:
    model = CLIPModel.from_pretrained(clip_folder).eval()
    pixels = prepared(drawings(1)[0], 32, 32, CLIP_MEAN, CLIP_STD)
    last = len(json.loads((clip_folder / "vocab.json").read_text())) - 1
    ids = torch.tensor([[last - 1, 26, 53, last]])  # <start> a</w> dog</w> <end>
    with torch.inference_mode():
        output = model(input_ids=ids, pixel_values=pixels)
    torch.testing.assert_close(clip.texts(["a dog"]), output.text_embeds, atol=1e-5, rtol=0)
    torch.testing.assert_close(clip.images(drawings(1)), output.image_embeds, atol=2e-4, rtol=0)


def test_half_precision_weights_are_used_in_float32(clip_folder: Path, tmp_path: Path) -> None:
    for file in clip_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    CLIPModel.from_pretrained(clip_folder).half().save_pretrained(tmp_path)
    assert Encoder(tmp_path).images(drawings(2)).dtype == torch.float32


def test_dino_gives_the_class_token(dino: Encoder, dino_folder: Path) -> None:
    model = ViTModel.from_pretrained(dino_folder, add_pooling_layer=False).eval()
    pictures = drawings(3)
    rows = dino.images(pictures)
    for picture, row in zip(pictures, rows, strict=True):
        pixels = prepared(picture, 32, 28, IMAGENET_MEAN, IMAGENET_STD)
        with torch.inference_mode():
            token = model(pixels).last_hidden_state[:, 0]
        expected = torch.nn.functional.normalize(token, dim=-1)[0]
        torch.testing.assert_close(row, expected, atol=2e-4, rtol=0)
    assert not dino.reads_texts
    with pytest.raises(ValueError, match="embeds pictures only"):
        dino.texts(["a dog"])


def test_encoders_that_cannot_be_used_are_named(clip: Encoder, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="cannot be read; give a hub id"):
        Encoder(tmp_path)
    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is of type 'bert'; give a CLIP"):
        Encoder(tmp_path)
    with pytest.raises(ValueError, match="no pictures"):
        clip.images([])
    with pytest.raises(ValueError, match="no prompts"):
        clip.texts([])


@pytest.mark.parametrize(
    "lost", [("vocab.json", "merges.txt"), ("preprocessor_config.json",), ("model.safetensors",)]
)
def test_a_folder_that_lacks_a_file_is_refused(
    clip_folder: Path, tmp_path: Path, lost: tuple[str, ...]
) -> None:
    for file in clip_folder.iterdir():
        if file.name not in lost:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(OSError, match="cannot be read; give a hub id"):
        Encoder(tmp_path)


def test_evaluate_gives_every_measure(clip: Encoder) -> None:
    reference, generated = drawings(3, 1), drawings(4, 2)
    before, after = drawings(3, 3), drawings(3, 4)
    prompts = ["a ohwx dog", "a ohwx dog in snow", "a ohwx dog", "ohwx dog"]
    scores = evaluate(clip, reference, generated, prompts, after, "ohwx", before)
    pictures, of_class = clip.images(generated), clip.images(after)
    texts = clip.texts(["a dog", "a dog in snow", "a dog", "dog"])
    assert scores == {
        "subject_fidelity": subject_fidelity(pictures, clip.images(reference)),
        "prompt_adherence": prompt_adherence(pictures, texts),
        "class_diversity": diversity(of_class),
        "prior_drift": prior_drift(clip.images(before), of_class),
    }
    without = evaluate(clip, reference, generated, prompts, after, "ohwx")
    assert without == {k: v for k, v in scores.items() if k != "prior_drift"}


def test_evaluate_by_a_dino_leaves_out_the_prompts(dino: Encoder) -> None:
    pictures = drawings(2)
    scores = evaluate(dino, pictures, pictures, ["a dog", "a dog"], pictures, "ohwx", pictures)
    assert set(scores) == {"subject_fidelity", "class_diversity", "prior_drift"}
    assert scores["prior_drift"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": ["a dog"]}, "1 prompts for 2 generated"),
        ({"class_pictures": drawings(1)}, "only one row"),
        ({"base_class_pictures": drawings(3)}, "one row for one row"),
        ({"reference": []}, "no pictures"),
    ],
)
def test_evaluate_names_wrong_counts(clip: Encoder, change: dict[str, Any], message: str) -> None:
    pictures = drawings(2)
    fields: dict[str, Any] = {
        "reference": pictures, "generated": pictures, "prompts": ["a dog"] * 2,
        "class_pictures": pictures, "identifier": "ohwx",
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        evaluate(clip, **(fields | change))


def test_importing_is_light() -> None:
    code = (
        "import sys, dreambooth_lib.metrics, dreambooth_lib.plots;"
        "print(*({'torch', 'transformers', 'matplotlib'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == ""
