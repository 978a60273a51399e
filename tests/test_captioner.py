"""Describe photos with a tiny BLIP that the test makes."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import BertTokenizerFast, BlipConfig, BlipForConditionalGeneration
from transformers import BlipImageProcessorPil as Processor

from dreambooth_lib.core.subject import Subject
from dreambooth_lib.data.images import Photo
from dreambooth_lib.notebook import captioner

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[DEC]",
    "a",
    "dog",
    "cat",
    "red",
    "blue",
    "beach",
    "on",
]
TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
         "num_attention_heads": 2, "projection_dim": 16}  # fmt: skip


@pytest.fixture(scope="module")
def blip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a tiny BLIP that knows a red photo from a blue one."""
    folder = tmp_path_factory.mktemp("blip")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    Processor(size={"height": 32, "width": 32}).save_pretrained(folder)
    text = TOWER | {
        "vocab_size": len(WORDS), "encoder_hidden_size": 16, "bos_token_id": 4, "sep_token_id": 3,
        "eos_token_id": 3, "pad_token_id": 0, "max_position_embeddings": 64,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    }  # fmt: skip
    torch.manual_seed(0)
    vision = TOWER | {"image_size": 32, "patch_size": 16}
    model = BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision))
    photos = ("red", "blue")
    captions = [f"a dog on {colour} beach" for colour in photos]
    tokens = BertTokenizerFast.from_pretrained(folder)(captions, return_tensors="pt").input_ids
    tokens[:, 0] = 4
    pixels = Processor.from_pretrained(folder)(
        [Image.new("RGB", (40, 30), colour) for colour in photos], return_tensors="pt"
    ).pixel_values
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(200):
        loss = model(pixel_values=pixels, input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    return folder


def test_photos_are_described_with_the_subject_in_their_captions(blip: Path) -> None:
    photos = [Photo(f"{c}.png", Image.new("RGB", (40, 30), c)) for c in ("blue", "red")]
    captions = captioner.describe(photos, Subject("photos", "dog"), str(blip))
    assert captions == {
        "blue.png": "a {} dog on blue beach",
        "red.png": "a {} dog on red beach",
    }


def test_a_captioner_of_another_type_or_without_safetensors_is_refused(
    blip: Path, clip_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(captioner.CaptionerError, match=r"is of type 'clip.*; give a BLIP"):
        captioner.describe([], Subject("photos", "dog"), str(clip_folder))
    for file in blip.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(captioner.CaptionerError, match="cannot be loaded"):
        captioner.describe([], Subject("photos", "dog"), str(tmp_path))
