"""Test the panel of crops and masks, and the masks that a segmentation model makes."""

import html
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import MAX_LENGTH, save_tokenizer
from PIL import Image
from test_masks import left_half, picture
from test_widgets import images, texts

from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.data.images import DataError, Photo, read_photos
from dreambooth_lib.data.masks import read_mask
from dreambooth_lib.notebook import mask_maker, widgets

Make = Callable[..., TrainConfig]


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Save a tiny random CLIPSeg in transformers' own format."""
    from transformers import (
        CLIPSegConfig,
        CLIPSegForImageSegmentation,
        CLIPSegProcessor,
        CLIPTokenizer,
        ViTImageProcessor,
    )

    folder = tmp_path_factory.mktemp("segmenter")
    save_tokenizer(folder / "words")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "words")
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4,
             "num_attention_heads": 2}  # fmt: skip
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": MAX_LENGTH,
            "eos_token_id": tokenizer.eos_token_id}  # fmt: skip
    config = CLIPSegConfig(
        text_config=tower | text,
        vision_config=tower | {"image_size": 32, "patch_size": 8},
        projection_dim=16, reduce_dim=8, extract_layers=[1, 2, 3], conditional_layer=0,
        decoder_num_attention_heads=2, decoder_intermediate_size=16,
    )  # fmt: skip
    CLIPSegForImageSegmentation(config).save_pretrained(folder / "model")
    pixels = ViTImageProcessor(size={"height": 32, "width": 32})
    CLIPSegProcessor(pixels, tokenizer).save_pretrained(folder / "model")
    return str(folder / "model")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "photos"
    place.mkdir()
    for number, size in enumerate([(24, 64), (40, 24), (32, 32)]):
        picture(number, size).save(place / f"{number}.png")
    return place


@pytest.fixture
def panel(folder: Path, tiny_sd2: str, make_config: Make) -> widgets.SubjectPanel:
    return widgets.SubjectPanel(make_config(tiny_sd2, str(folder), resolution=32))


def test_the_panel_starts_with_the_configs_own_settings(
    panel: widgets.SubjectPanel, tiny_sd2: str, folder: Path, make_config: Make
) -> None:
    assert panel.config.replace(subject=panel.initial_config.subject) == panel.initial_config
    config = make_config(tiny_sd2, str(folder), crop="buckets", background_weight=0.3,
                         background_prior=True)  # fmt: skip
    again = widgets.SubjectPanel(config)
    assert "preserve the base's prediction" in html.unescape(texts(again))
    assert again.config.replace(subject=config.subject) == config


def test_the_first_photos_crop_can_be_moved_at_once(panel: widgets.SubjectPanel) -> None:
    assert panel.framing.photo.value == panel.framing.photo.options[0]


def test_masks_show_the_class_noun_unless_told_otherwise(panel: widgets.SubjectPanel) -> None:
    panel.class_noun.value = "turtle"
    assert panel.framing.words.value == "turtle"
    panel.framing.words.value = "shell"
    panel.class_noun.value = "tortoise"
    assert panel.framing.words.value == "shell"


def test_buckets_show_each_crop_and_fewer_findings(panel: widgets.SubjectPanel) -> None:
    assert "cropped to 32 × 32 pixels" in texts(panel)
    assert "1.png loses more than a fifth to the crop" in texts(panel)
    panel.framing.crop.value = "buckets"
    assert panel.config.crop == "buckets"
    assert "cropped to 16 × 48, 40 × 24, 32 × 32 pixels" in texts(panel)
    assert "fifth" not in texts(panel)
    shapes = panel.framing.shapes(panel.photos, 32)
    assert [crop.size for crop in panel.framing.cropped(panel.photos, shapes)] == shapes


def test_a_moved_crop_is_kept_beside_the_photos(panel: widgets.SubjectPanel, folder: Path) -> None:
    framing = panel.framing
    framing.move.click()
    assert "center and random crops cannot be moved" in texts(panel)
    framing.crop.value = "subject"
    framing.photo.value, framing.down.value = "0.png", 0.0
    framing.move.click()
    panel.check()
    framing.check()
    (photo, *others) = read_photos(folder)
    assert photo.center == (0.5, 0.0) and all(other.center is None for other in others)
    (crop, *_) = framing.cropped(panel.photos, [(24, 24)] * 3)
    assert np.array_equal(crop, picture(0, (24, 64)).crop((0, 0, 24, 24)))
    assert framing.photo.value == "0.png" and framing.down.value == 0.0


def test_masks_are_made_shown_by_threshold_and_saved(
    panel: widgets.SubjectPanel, folder: Path, segmenter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    framing, shown = panel.framing, len(images(panel))
    assert mask_maker.MODEL in texts(panel) and mask_maker.DOWNLOAD in texts(panel)
    monkeypatch.setattr(mask_maker.find_subject, "__defaults__", (segmenter,))
    framing.make.click()
    framing.check()
    assert len(images(panel)) == shown + 1
    found = mask_maker.find_subject(panel.photos, "dog", segmenter)
    framing.threshold.value = 0.9
    framing.save.click()
    framing.check()
    for photo in read_photos(folder):
        mask = read_mask(photo)
        assert mask is not None and mask.size == photo.traits.size
        expected = np.asarray(found[photo.name]) >= round(255 * 0.9)
        assert np.array_equal(np.asarray(mask) > 127, expected) and expected.any()
    assert panel.config.background_weight == 0.1
    assert framing.save.disabled


def test_masks_that_are_there_are_shown(
    folder: Path, tiny_sd2: str, make_config: Make, panel: widgets.SubjectPanel
) -> None:
    left_half((24, 64)).save(folder / "0_mask.png")
    before = len(images(panel))
    panel.reload()
    assert len(images(panel)) == before + 1


def test_masks_that_are_made_replace_those_that_are_there(
    panel: widgets.SubjectPanel, folder: Path, segmenter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "masks").mkdir()
    left_half((24, 64)).save(folder / "0_mask.png")
    left_half((40, 24)).save(folder / "masks" / "1.png")
    panel.reload()
    before = {path for path in folder.rglob("*.png")}
    monkeypatch.setattr(mask_maker.find_subject, "__defaults__", (segmenter,))
    panel.framing.make.click()
    panel.framing.save.click()
    panel.framing.check()
    panel.check()
    assert {path for path in folder.rglob("*.png")} - before == {folder / "2-masklabel.png"}
    found = mask_maker.find_subject(panel.photos, "dog", segmenter)
    for photo in panel.photos:
        expected = mask_maker.at_threshold(found[photo.name], mask_maker.THRESHOLD)
        mask = read_mask(photo)
        assert mask is not None and np.array_equal(np.asarray(mask), np.asarray(expected))


@pytest.mark.parametrize("other", ["0.jpg", "0_mask.webp"])
def test_masks_that_cannot_be_saved_beside_what_is_there_are_refused(
    other: str, folder: Path
) -> None:
    image = picture(3, (24, 64)) if other == "0.jpg" else left_half((24, 64))
    image.save(folder / other)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    photos = read_photos(folder)
    masks = {photo.name: left_half(photo.traits.size) for photo in reversed(photos)}
    why = "'0.jpg' and '0.png' in .* would share the mask 0-masklabel.png; rename"
    with pytest.raises(DataError, match=why if other == "0.jpg" else "0_mask.webp.* not a PNG"):
        mask_maker.save_masks(folder, photos, masks)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_a_model_that_cannot_be_loaded_says_so(tmp_path: Path, folder: Path) -> None:
    place = tmp_path / "empty"
    place.mkdir()
    (place / "config.json").write_text("{}")
    with pytest.raises(mask_maker.MaskMakerError, match=r"cannot be loaded .* check your network"):
        mask_maker.find_subject(read_photos(folder), "dog", str(place))


def test_photos_in_a_zip_are_told_to_be_unpacked(tmp_path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(tmp_path / "p.zip", "w") as archive:
        archive.writestr("a.txt", "")
    masks: dict[str, Any] = {"a.png": Image.new("L", (4, 4))}
    with pytest.raises(ValueError, match="unpack it"):
        mask_maker.save_masks(tmp_path / "p.zip", [Photo("a.png", Image.new("RGB", (4, 4)))], masks)


def test_crops_and_masks_are_closed_until_they_are_opened_or_set(
    folder: Path, make_config: Make
) -> None:
    def shown(framing: Any) -> bool:
        body = framing.children[-1]
        assert framing.crop in widgets_in(body) and framing.opened not in widgets_in(body)
        return body.layout.display != "none"

    config = make_config("toybox", str(folder))
    framing = widgets.SubjectPanel(config).framing
    assert not shown(framing)
    framing.opened.value = True
    assert shown(framing)
    framing.opened.value = False
    assert not shown(framing) and framing.changes["crop"] == "center"
    for own in ({"crop": "buckets"}, {"background_weight": 0.1}):
        assert shown(widgets.SubjectPanel(config.replace(**own)).framing)


def widgets_in(widget: Any) -> list[Any]:
    return [widget, *(w for child in getattr(widget, "children", ()) for w in widgets_in(child))]
