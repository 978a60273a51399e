"""The base of a GPU's minutes, tried on the CPU with drawings made here: no network."""

import os
import re
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image, ImageDraw
from transformers import CLIPModel

from dreambooth_lib.families import loading
from tools.toybox import classifier, drawings, gpu, judge, report, shards, world
from tools.toybox.autoencoder import new_autoencoder
from tools.toybox.diffusion import Bank, captions_once, new_unet
from tools.toybox.pool import Makers
from tools.toybox.recipes import BUNDLED, LARGE, TINY
from tools.toybox.sources import jittered
from tools.toybox.tokenizer import save_tokenizer, world_words
from tools.toybox.training import Way, fit, orthogonalized

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    """A pack of every set, its drawings plain rectangles in a colour of set and class."""
    rendered = {}
    for i, name in enumerate(drawings.EVERY_SET):
        rendered[name] = {}
        for j, noun in enumerate(world.CLASSES):
            picture = Image.new("RGBA", (24, 24))
            fill = (30 * i, 5 * j, 255 - 5 * j, 255)
            ImageDraw.Draw(picture).rectangle((0, 2 * i, 23, 23), fill=fill)
            rendered[name][noun] = picture
    file = tmp_path_factory.mktemp("pack") / "drawings.zip"
    drawings.write_pack(file, rendered)
    return file


def test_a_pack_holds_the_drawings_and_names_their_licences(pack, tmp_path):
    import zipfile

    found = drawings.read_pack(pack, drawings.TRAINING_SETS)
    assert list(found) == list(drawings.TRAINING_SETS)
    assert set(found["noto"]) == set(world.CLASSES)
    assert found["noto"]["dog"].getpixel((12, 12)) == (0, 0, 255, 255)
    licences = zipfile.ZipFile(pack).read("LICENCES.md").decode()
    assert "- twemoji 1.2.5: Twitter, Inc and other contributors (Twemoji), CC-BY-4.0" in licences
    noise = np.random.default_rng(0).integers(0, 256, (1700, 1700, 4), dtype=np.uint8)
    with pytest.raises(ValueError, match="more than 10000000"):
        drawings.write_pack(tmp_path / "big.zip", {"noto": {"dog": Image.fromarray(noise)}})
    assert not list(tmp_path.iterdir())
    drawings.write_pack(tmp_path / "one.zip", {"noto": found["noto"]})
    with pytest.raises(ValueError, match=r"lacks the drawings of twemoji; pack it anew\."):
        drawings.read_pack(tmp_path / "one.zip", ["noto", "twemoji"])


@pytest.mark.parametrize(
    ("relation", "red_at"), [("beside", "left"), ("under", "bottom"), ("above", "top")]
)
def test_the_first_thing_lies_to_the_second_as_the_caption_says(pack, relation, red_at):
    small = world.World(pack, scenes_each=1, size=64)
    small.drawings = {
        "dog": [Image.new("RGBA", (40, 40), (255, 0, 0, 255))],
        "teapot": [Image.new("RGBA", (40, 40), (0, 0, 255, 255))],
    }
    shown = world.Picture("dog", 0, None, "snow", relation=relation, second_noun="teapot")
    pixels = small.compose(shown, np.random.default_rng(0)).astype(int)
    red = (pixels[..., 0] > 200) & (pixels[..., 1:].max(-1) < 60)
    blue = (pixels[..., 2] > 200) & (pixels[..., :2].max(-1) < 60)
    assert 25**2 < red.sum() < 33**2 and 25**2 < blue.sum() < 33**2, "both whole"
    (red_y, red_x), (blue_y, blue_x) = (np.argwhere(mask).mean(0) for mask in (red, blue))
    expected = {
        "left": red_x < blue_x - 20 and abs(red_y - blue_y) < 4,
        "top": red_y < blue_y - 20 and abs(red_x - blue_x) < 4,
        "bottom": red_y > blue_y + 20 and abs(red_x - blue_x) < 4,
    }
    assert [side for side, is_so in expected.items() if is_so] == [red_at]


def test_captions_of_two_things():
    shown = world.Picture("dog", 0, "red", "beach", relation="beside", second_noun="teapot")
    assert report.caption_of(shown) == "a red dog beside a teapot on the beach"
    drawn = [world.random_caption(shown, np.random.default_rng(i)) for i in range(80)]
    assert {"a red dog and a teapot on the beach", "a red dog beside a teapot"} <= set(drawn)
    assert 0.1 < np.mean(["and a" in text for text in drawn]) < 0.4


def test_a_world_has_the_share_of_pairs_that_is_asked_for_and_never_a_thing_beside_its_like(pack):
    rng = np.random.default_rng(0)
    small = world.World(pack, scenes_each=1, size=32, pairs=0.5)
    shown = [small.random_picture(rng) for _ in range(400)]
    two = [picture for picture in shown if picture.second]
    assert 160 < len(two) < 240
    assert all(picture.class_noun != picture.second_noun for picture in two)
    assert {picture.relation for picture in two} == set(world.RELATIONS)
    assert not any(
        world.World(pack, scenes_each=1, size=32).random_picture(rng).second for _ in range(9)
    )


def test_only_a_base_of_two_things_has_words_for_them(tmp_path):
    old, new = save_tokenizer(tmp_path / "old"), save_tokenizer(tmp_path / "new", pairs=True)
    for word in ("beside", "under", "above", "and"):
        assert word not in world_words() and word in world_words(pairs=True)
        assert len(old.tokenize(word)) > 1 and len(new.tokenize(word)) == 1


@pytest.mark.parametrize(
    ("claim", "is_true"),
    [
        (("dog", "red", "beach", ("under", "teapot")), True),
        (("dog", None, None, None), True),
        (("teapot", None, "beach", None), True),
        (("teapot", None, None, ("above", "dog")), True),
        (("teapot", "red", None, None), False),
        (("dog", None, None, ("above", "teapot")), False),
        (("teapot", None, None, ("under", "dog")), False),
        (("dog", None, None, ("under", "cat")), False),
        (("teapot", None, "snow", None), False),
    ],
)
def test_what_is_true_of_two_things(claim, is_true):
    shown = world.Picture("dog", 0, "red", "beach", relation="under", second_noun="teapot")
    assert judge.is_true(claim, shown) is is_true


def test_a_classifier_of_two_things_answers_for_both():
    model = classifier.new_classifier(pairs=True).eval()
    shown = [world.Picture("dog", 0, None, "beach", relation="under", second_noun="cat")]
    shares = classifier.shares(model, np.zeros((1, 64, 64, 3), np.uint8), shown)
    assert list(shares) == ["class", "scene", "colour", "relation", "second"]
    assert list(classifier.shares(classifier.new_classifier().eval(),
                                  np.zeros((1, 64, 64, 3), np.uint8), shown)) == [
        "class", "scene", "colour"]  # fmt: skip


def test_workers_fill_a_pool_and_pictures_come_with_what_they_show(pack):
    makers = Makers(pack, replace(TINY, size=32, pairs=0.0), workers=2)
    try:
        plain, pairs = makers.plain(100, "cpu"), makers.pairs(32, "cpu")
        pixels, shown = plain.batch(8, np.random.default_rng(0))
        assert pixels.shape == (8, 32, 32, 3) and pixels.dtype is torch.uint8
        every = [chunk for chunk, _ in plain.chunks()]
        assert [len(chunk) for chunk in every] == [64, 64]
        assert len(torch.cat(every).flatten(1).unique(dim=0)) > 100
        small = world.World(pack, scenes_each=10, size=32)
        for picture, what in zip(pixels, shown, strict=True):
            tinted = world.recolour(
                np.asarray(small.drawings[what.class_noun][what.drawing]), what.colour
            )
            assert np.abs(picture[20, 16].numpy().astype(int) - tinted[20, 12, :3]).max() < 12
        both, draw = pairs.chunk(np.random.default_rng(0))
        assert len(both) == len(draw()) == 16
        assert [p.drawing for p in both[:8]] == [p.drawing for p in both[8:]]
    finally:
        makers.close()


def test_a_pool_fails_as_its_worker_did(tmp_path):
    (tmp_path / "broken.zip").write_bytes(b"no zip")
    makers = Makers(tmp_path / "broken.zip", TINY, workers=1)
    try:
        with pytest.raises(Exception, match=r"terminated abruptly|process pool"):
            makers.plain(64, "cpu").batch(1, np.random.default_rng(0))
    finally:
        makers.close()


def test_a_making_without_a_pack_says_how_to_get_one(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tools\.toybox pack"):
        gpu.make(tmp_path / "none.zip", tmp_path / "out", 1.0, TINY, "cpu")


def test_noise_on_tensors_is_that_on_arrays():
    pixels = np.full((64, 16, 16, 3), 128, np.uint8)
    both = [jittered(of, np.random.default_rng(0), fine=4, coarse=6)
            for of in (pixels, torch.from_numpy(pixels))]  # fmt: skip
    for noisy in (np.asarray(one).astype(float) for one in both):
        means = noisy.mean((1, 2))
        assert means.std() == pytest.approx(6, rel=0.2)
        assert (noisy - means[:, None, None]).std() == pytest.approx(4, rel=0.1)
        assert noisy.mean() == pytest.approx(128, abs=2)


@pytest.mark.parametrize("shape", [(24, 16), (16, 40)])
def test_matrices_are_orthogonalized_together_as_alone(shape):
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    alone = torch.cat([orthogonalized(matrix[None]) for matrix in matrices])
    torch.testing.assert_close(orthogonalized(matrices), alone)


def test_a_training_by_the_clock_ends_in_time_and_goes_on_with_what_is_left(tmp_path):
    def train(seconds, stop_at=None):
        torch.manual_seed(0)
        model = torch.nn.Linear(20, 20)
        rates = []

        def loss_at(step):
            if step == stop_at:
                raise KeyboardInterrupt
            time.sleep(0.02)
            rates.append(step)
            return model(torch.ones(4, 20)).square().mean()

        way = Way(10**9, seconds=seconds, save_every_s=0.0)
        began = time.monotonic()
        with suppress(KeyboardInterrupt):
            fit(model, loss_at, way, peak_lr=0.1, folder=tmp_path / "run")
        return rates, time.monotonic() - began

    first, _ = train(2.0, stop_at=10)
    second, took = train(2.0)
    assert first == list(range(10)) and second[0] == 10
    assert took < 2.0 and len(second) > 3
    again, _ = train(2.0)
    assert again == [], "the time is used up"


def test_a_training_whose_time_is_up_tells_its_last_step(tmp_path, capsys):
    model = torch.nn.Linear(20, 20)

    def loss_at(step):
        time.sleep(0.3 if step else 0.0)  # the second step ends after the time is up
        return model(torch.ones(4, 20)).square().mean()

    fit(model, loss_at, Way(10**9, seconds=0.2), peak_lr=0.1, folder=tmp_path / "run")
    assert capsys.readouterr().out.startswith("run: step 2/2 loss ")


def test_float16_scales_the_loss_and_skips_what_overflows(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Linear(20, 20)
    seen = []

    def loss_at(step):
        predicted = model(torch.ones(4, 20))
        seen.append(predicted.dtype)
        return (predicted.float() - 1).square().mean() * (1e9 if step == 2 else 1.0)

    way = Way(20, dtype=torch.float16)
    fit(model, loss_at, way, peak_lr=0.01, folder=tmp_path / "half")
    assert set(seen) == {torch.float16}
    assert all(value.isfinite().all() and value.dtype is torch.float32
               for value in model.state_dict().values())  # fmt: skip


def test_captions_that_were_tokenized_before_are_those_of_their_pictures(tmp_path):
    tokenizer = save_tokenizer(tmp_path, pairs=True)
    bank = Bank(torch.zeros(2, 1), [world.Picture("dog", 0, None, "beach"),
                                    world.Picture("cat", 0, None, "snow")])  # fmt: skip
    token_ids = captions_once(bank.pictures, tokenizer, "cpu")
    ids = token_ids(np.array([0, 1] * 20), np.random.default_rng(0))
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    assert all("cat" not in text for text in texts[::2])
    assert all("dog" not in text for text in texts[1::2])
    assert sum("dog" in text for text in texts) > 10


def test_the_larger_base_costs_its_denoiser_no_more():
    from torch.utils.flop_counter import FlopCounterMode

    def flops(recipe, channels):
        unet = new_unet(channels, recipe)
        side = recipe.latent_side
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            unet(torch.zeros(1, channels, side, side), 0, torch.zeros(1, 24, 192))
        return counter.get_total_flops(), sum(p.numel() for p in unet.parameters())

    old, new = flops(BUNDLED, 18), flops(LARGE, LARGE.latent_channels)
    assert new[0] < 1.1 * old[0] and new[1] < old[1]
    assert new_autoencoder(LARGE).config.sample_size == 128


def test_a_folder_goes_through_shards_and_back(tmp_path):
    folder = tmp_path / "folder"
    (folder / "unet").mkdir(parents=True)
    (folder / "unet" / "weights").write_bytes(bytes(range(256)) * 20)
    (folder / "README.md").write_text("text")
    parts = shards.split(folder, tmp_path / "shards", most=4096)
    assert len(parts) > 2 and all(part.stat().st_size <= 4096 for part in parts)
    shards.join(tmp_path / "shards", tmp_path / "joined")
    for file in ("unet/weights", "README.md"):
        assert (tmp_path / "joined" / file).read_bytes() == (folder / file).read_bytes()
    parts[1].write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"001 is missing or has changed"):
        shards.join(tmp_path / "shards", tmp_path / "again")


def test_figures_are_read_back_and_compared():
    old = {"autoencoder_psnr_db": 28.25, "generated_class": 1.0, "seconds_to_load": 0.35,
           "megabytes": 37.45}  # fmt: skip
    assert report.read_table(report.table(old, 1)) == old
    assert report.read_table((ROOT / "data/toybox/README.md").read_text())["generated_colour"] == (
        pytest.approx(0.983)
    )
    new = {"autoencoder_psnr_db": 28.2500001, "generated_class": 0.99, "seconds_to_load": 0.34,
           "megabytes": 47.0, "generated_first_of_two": 0.5}  # fmt: skip
    marks = [line.rsplit("  ", 1)[-1].strip() for line in report.compared(new, old).splitlines()]
    assert marks[1:] == ["better or equal", "WORSE", "better or equal", "better or equal", "new"]
    assert "WORSE" in report.compared({"megabytes": 48.1}, old)


#: The command line, with a report of images drawn by two steps.
MAIN = """
from tools.toybox import report
from tools.toybox.__main__ import main
report.STEPS = 2
main()
"""


@pytest.mark.slow
def test_a_killed_making_goes_on_and_gives_a_base_that_loads(pack, tmp_path):
    out = tmp_path / "out"
    tried = ["--minutes", "0.3", "--device", "cpu", "--recipe", "tiny", "--workers", "1"]
    command = [sys.executable, "-c", MAIN, "gpu", *tried]
    command += ["--pack", str(pack), "--out", str(out)]
    settings = {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": str(ROOT)}, "text": True,
                "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}  # fmt: skip
    first = subprocess.Popen(command, **settings)
    while first.poll() is None and not (out / "work" / "diffusion" / "state.json").exists():
        time.sleep(0.1)
    first.kill()
    said = first.communicate()[0]
    assert first.returncode == -9, said
    second = subprocess.run(command, **settings, check=False, timeout=600)
    assert second.returncode == 0, second.stdout
    assert "diffusion: going on at step" in second.stdout
    assert "autoencoder: step" in said and "autoencoder: step" not in second.stdout
    for figure in ("autoencoder psnr db", "generated second of two", "judge triplets", "megabytes"):
        assert re.search(rf"^{figure} +[0-9.]+%? .*(WORSE|better or equal|new)$", second.stdout,
                         re.MULTILINE), second.stdout  # fmt: skip
    shards.join(out / "shards", tmp_path / "joined")
    assert all(file.stat().st_size < 16e6 for file in (out / "shards").iterdir())
    joined = tmp_path / "joined"
    assert loading.inspect_base(str(joined)).resolution == 128
    family = loading.load_model(str(joined))
    (picture,) = family.generate([("a dog beside a teapot", 0)], 2, 3.0)
    assert picture.size == (128, 128)
    vae = AutoencoderKL.from_pretrained(joined / "vae", torch_dtype=torch.float16)
    with torch.no_grad():
        latents = vae.encode(torch.randn(1, 3, 128, 128).half()).latent_dist.mean
        assert vae.decode(latents).sample.isfinite().all()
    assert CLIPModel.from_pretrained(joined / "judge").config.vision_config.image_size == 128
    assert "a dog beside a teapot" in (joined / "README.md").read_text()
