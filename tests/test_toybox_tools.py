"""What builds the bundled base, on a drawing made here: no network."""

import copy
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("resvg_py")

from tools.toybox import autoencoder, classifier, drawings, judge, world
from tools.toybox.tokenizer import IDENTIFIERS, save_tokenizer, world_words
from tools.toybox.training import Muon, Way, fit, learning_rate

SVG = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 10 10"><rect x="2" y="3" width="6" height="4" fill="#00ff00"/></svg>'  # noqa: E501


def test_a_drawing_is_cropped_to_its_own_extent():
    picture = drawings.render(SVG, 60)
    assert picture.size == (60, 40)
    assert picture.getpixel((30, 20)) == (0, 255, 0, 255)


def test_aliases_are_followed_and_missing_drawings_are_none(tmp_path):
    icons = {"icons": {"a": {"body": "<path/>"}}, "aliases": {"b": {"parent": "a"}}, "width": 9}
    path = tmp_path / "set.json"
    path.write_text(json.dumps(icons))
    assert 'viewBox="0 0 9 16"><path/>' in drawings.svg(path, "b")
    assert drawings.svg(path, "c") is None


@pytest.mark.parametrize("colour", world.COLOURS)
def test_recolouring_gives_a_white_drawing_the_colour_and_keeps_alpha(colour):
    white = np.full((4, 4, 4), 255, np.uint8)
    white[0, :, 3] = 0
    tinted = world.recolour(white, colour)
    assert np.array_equal(tinted[..., 3], white[..., 3])
    r, g, b = tinted[2, 2, :3].astype(int)
    strongest = {"red": r, "green": g, "blue": b}.get(colour)
    if strongest is not None:
        assert strongest == max(r, g, b) and strongest > min(r, g, b) + 20
    if colour == "gray":
        assert r == g == b


def test_scenes_differ_and_are_drawn_at_any_size():
    pictures = [
        np.asarray(world.draw_scene(scene, np.random.default_rng(0), 32)).astype(float)
        for scene in world.SCENES
    ]
    for i, one in enumerate(pictures):
        assert one.shape == (32, 32, 3)
        assert all(np.abs(one - other).mean() > 5 for other in pictures[:i])
    with pytest.raises(ValueError, match="unknown scene 'moon'"):
        world.draw_scene("moon", np.random.default_rng(0), 32)


def test_captions_name_what_is_shown():
    assert world.caption("dog", "purple", "beach") == "a purple dog on the beach"
    picture = world.Picture("dog", 0, None, "snow")
    drawn = {world.random_caption(picture, np.random.default_rng(i)) for i in range(60)}
    assert {"a dog in the snow", "a dog", "a photo of a dog in the snow"} <= drawn


def test_every_word_and_identifier_is_one_token_and_no_caption_has_an_identifier(tmp_path):
    tokenizer = save_tokenizer(tmp_path)
    for word in [*world_words(), *IDENTIFIERS]:
        assert tokenizer.tokenize(word) == [word + "</w>"]
    assert not set(IDENTIFIERS) & set(world_words())


def test_a_stopped_training_goes_on_as_if_it_had_not_stopped(tmp_path):
    def train(folder, stop_at=None):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(20, 20), torch.nn.Linear(20, 1))

        def loss_at(step):
            if step == stop_at:
                raise KeyboardInterrupt
            x = torch.randn(8, 20, generator=torch.Generator().manual_seed(step))
            return (model(x) - x.sum(1, keepdim=True)).square().mean()

        return fit(model, loss_at, Way(10, save_every_s=0.0), peak_lr=0.1, folder=folder)

    whole = train(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "stopped", stop_at=6)
    for value, expected in zip(
        train(tmp_path / "stopped").parameters(), whole.parameters(), strict=True
    ):
        assert torch.equal(value, expected)


def test_the_learning_rate_warms_up_stays_and_decays():
    rates = [learning_rate(step, 1000, 1e-3, warmup=100, cooldown=0.3) for step in range(1000)]
    assert rates[0] == pytest.approx(1e-5) and rates[98] < 1e-3
    assert rates[99:700] == [1e-3] * 601
    assert rates[850] == pytest.approx(0.5e-3) and rates[-1] == pytest.approx(2e-5)
    assert rates[100:] == sorted(rates[100:], reverse=True)


@pytest.mark.parametrize("shape", [(24, 16), (16, 40), (32, 16, 3, 3)])
def test_muon_steps_along_the_singular_vectors_of_its_momentum(shape):
    """Against torch.linalg.svd: the same singular vectors, every singular value near 1."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(shape))
    optimizer = Muon([weight], lr=0.5)
    momentum = torch.zeros(shape)
    for _ in range(2):
        before = weight.detach().clone()
        weight.grad = torch.randn(shape)
        momentum = 0.95 * momentum + 0.05 * weight.grad
        expected = (0.05 * weight.grad + 0.95 * momentum).flatten(1)
        optimizer.step()
        taken = (before - weight.detach()).flatten(1)
    u, _, vh = torch.linalg.svd(expected, full_matrices=False)
    scale = 0.5 * max(1.0, expected.shape[0] / expected.shape[1]) ** 0.5
    stretched = u.T @ taken @ vh.T / scale
    assert (stretched - torch.diag(stretched.diag())).abs().max() < 0.02
    assert stretched.diag().min() > 0.6 and stretched.diag().max() < 1.3


class Noise:
    """A world of random pixels."""

    def batch(self, count, rng):
        return rng.integers(0, 256, (count, 64, 64, 3), dtype=np.uint8), None


@torch.no_grad()
def test_standardizing_changes_no_reconstruction_and_makes_unit_latents():
    torch.manual_seed(0)
    model = autoencoder.new_autoencoder().eval()
    pixels = autoencoder.to_tensor(Noise().batch(512, np.random.default_rng(2))[0])[:64]
    before = model.decode(model.encode(pixels).latent_dist.mean).sample
    std_before = model.encode(pixels).latent_dist.std
    autoencoder.standardize(model, Noise())
    posterior = model.encode(pixels).latent_dist
    after = model.decode(posterior.mean).sample
    torch.testing.assert_close(before, after, atol=1e-3, rtol=1e-3)
    assert posterior.mean.std((0, 2, 3)).sub(1).abs().max() < 0.1
    assert not torch.allclose(posterior.std, std_before)


@torch.no_grad()
def test_channels_that_are_noise_are_cut_out_and_the_others_stay():
    torch.manual_seed(0)
    model = autoencoder.new_autoencoder().eval()
    model.quant_conv.bias[32:] = -20.0  # no noise, but for two channels
    model.quant_conv.bias[[32 + 3, 32 + 9]] = 4.0
    pixels = autoencoder.to_tensor(Noise().batch(512, np.random.default_rng(2))[0])[:16]
    smaller = autoencoder.without_collapsed(model, Noise())
    live = [channel for channel in range(32) if channel not in (3, 9)]
    before, after = (m.encode(pixels).latent_dist for m in (model, smaller))
    assert smaller.config.latent_channels == 30
    torch.testing.assert_close(after.mean, before.mean[:, live], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(after.std, before.std[:, live], atol=1e-4, rtol=1e-3)
    # The lost channels' means are folded in as constants, exactly but for the zeros at the rim.
    constant = before.mean.clone()
    everywhere = model.encode(
        autoencoder.to_tensor(Noise().batch(512, np.random.default_rng(2))[0])
    ).latent_dist.mean.mean((0, 2, 3))
    constant[:, [3, 9]] = everywhere[[3, 9], None, None]
    whole = model.decoder.conv_in(model.post_quant_conv(constant))
    folded = smaller.decoder.conv_in(smaller.post_quant_conv(after.mean))
    torch.testing.assert_close(
        folded[..., 1:-1, 1:-1], whole[..., 1:-1, 1:-1], atol=1e-4, rtol=1e-3
    )


class FewPictures:
    """A world of eight pictures of random pixels, however many are asked for."""

    def batch(self, count, rng):
        return rng.integers(0, 256, (8, 64, 64, 3), dtype=np.uint8), None


@torch.no_grad()
def test_streams_that_overflow_float16_are_scaled_and_nothing_else_changes():
    torch.manual_seed(0)
    model = autoencoder.new_autoencoder().eval()
    for half in (model.encoder, model.decoder):  # each convolution that a stream passes through
        for first, _ in autoencoder._stretches(half):
            first.weight *= 24
    pixels = autoencoder.to_tensor(FewPictures().batch(8, np.random.default_rng(2))[0])[:4]
    before = model.encode(pixels).latent_dist
    drawn = model.decode(before.mean).sample
    half = copy.deepcopy(model).half()
    assert not half.encode(pixels.half()).latent_dist.mean.isfinite().all()
    assert not half.decode(before.mean.half()).sample.isfinite().all()
    autoencoder.within_half(model, FewPictures())
    after = model.encode(pixels).latent_dist
    for value, expected in ((after.mean, before.mean), (after.std, before.std)):
        torch.testing.assert_close(value, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model.decode(before.mean).sample, drawn, atol=1e-4, rtol=1e-4)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    half = model.half()
    assert half.encode(pixels.half()).latent_dist.mean.isfinite().all()
    assert half.decode(before.mean.half()).sample.isfinite().all()
    again = autoencoder.within_half(model.float(), FewPictures()).state_dict()
    assert all(torch.equal(again[name], value.half().float()) for name, value in weights.items())


def test_a_caption_is_true_of_what_it_does_not_deny():
    blue_dog = world.Picture("dog", 0, "blue", "beach")
    odd_dog = world.Picture("dog", 0, None, "beach", odd=3)
    assert judge.is_true(("dog", None, None, None), blue_dog)
    assert judge.is_true(("dog", "blue", "beach", None), blue_dog)
    assert judge.is_true(("dog", None, "beach", None), odd_dog)
    assert not judge.is_true(("dog", "blue", None, None), odd_dog)
    assert not judge.is_true(("cat", None, None, None), blue_dog)
    assert not judge.is_true(("dog", None, "snow", None), blue_dog)
    assert not judge.is_true(("dog", None, None, ("beside", "cat")), blue_dog)


def test_odd_colours_change_the_colours_and_not_the_shape():
    rng = np.random.default_rng(0)
    drawing = rng.integers(0, 256, (16, 16, 4), dtype=np.uint8)
    for seed in range(8):
        odd = world.odd_colours(drawing, seed)
        assert np.array_equal(odd[..., 3], drawing[..., 3])
        assert np.abs(odd[..., :3].astype(int) - drawing[..., :3]).mean() > 10
        assert np.array_equal(odd, world.odd_colours(drawing, seed))


def test_odd_colours_leave_outlines_dark():
    drawing = np.full((16, 16, 4), 255, np.uint8)
    drawing[:, :, :3] = (200, 40, 40)
    drawing[[0, -1], :, :3] = drawing[:, [0, -1], :3] = (30, 25, 25)
    for seed in range(16):
        odd = world.odd_colours(drawing, seed)[..., :3]
        assert odd[0].max() <= 70, "the outline"
        assert np.abs(odd[8, 8].astype(int) - (200, 40, 40)).max() > 10, "the rest"


def test_drawings_are_never_mirrored():
    drawing = Image.new("RGBA", (40, 40), (0, 0, 0, 255))
    drawing.paste((255, 0, 0, 255), (0, 0, 20, 40))
    for seed in range(16):
        scene = Image.new("RGB", (64, 64), "white")
        placed = np.asarray(world.place(drawing, scene, np.random.default_rng(seed)))
        assert placed[32, 16, 0] > 200 and placed[32, 48, 0] < 50


def test_the_classifier_counts_right_answers():
    wanted = [world.Picture("dog", 0, None, "beach"), world.Picture("cat", 0, "red", "beach")]

    class Answers:
        """Says dog, beach, no colour to every picture."""

        def __call__(self, pixels):
            logits = torch.zeros(len(pixels), 48 + 10 + 9)
            logits[:, [0, 48, 48 + 10 + 8]] = 1
            return SimpleNamespace(logits=logits)

    pictures = np.zeros((2, 64, 64, 3), np.uint8)
    shares = classifier.shares(Answers(), pictures, wanted)
    assert shares == {"class": 0.5, "scene": 1.0, "colour": 0.5}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("npm") is None, reason="the drawings come from npm packages")
def test_the_first_minutes_of_a_rebuild(tmp_path, monkeypatch):
    from tools.toybox.__main__ import STEPS, build
    from tools.toybox.report import report, write_readme

    work, target = tmp_path / "work", tmp_path / "target"
    monkeypatch.setattr("tools.toybox.report.STEPS", 2)
    build(work, target, dict.fromkeys(STEPS, 2), bank=128, rounds=1)
    monkeypatch.chdir(tmp_path)
    figures = report(world.World(work / "drawings"), target, seed=0, rounds=1)
    assert figures["autoencoder_psnr_db"] > 3
    assert all(0 <= v <= 1 for k, v in figures.items() if k.startswith(("scorer", "generated")))
    assert Image.open("outputs/toybox_grid.png").size[0] >= 512
    write_readme(target, figures, seed=0)
    assert "| judge triplets |" in (target / "README.md").read_text()
