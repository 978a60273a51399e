"""Compare each family with a training step written by hand with diffusers' own parts."""

from collections.abc import Callable
from math import exp
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline

from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.data.captions import cut_words
from dreambooth_lib.families import loading
from dreambooth_lib.families.base import Family
from dreambooth_lib.families.base_files import BaseError
from dreambooth_lib.families.noise_schedule import FlowNoise
from dreambooth_lib.families.prompt_cache import PromptCache
from dreambooth_lib.training.losses import per_sample_errors

#: All but Stable Diffusion, which test_families.py tests.
FAMILIES = ["sdxl", "sd3", "flux", "flux_2_klein", "z_image"]
PROMPTS = ["a dog", "a ohwx dog on the beach in snow"]


@pytest.fixture(scope="module", params=FAMILIES)
def both(request: pytest.FixtureRequest, tiny_bases: Callable[[str], str]) -> tuple[Family, Any]:
    """Load a tiny base as a family and as a plain diffusers pipeline."""
    path = tiny_bases(request.param)
    return loading.load_model(path, resolution=16), DiffusionPipeline.from_pretrained(path)


def by_hand(plain: Any, x_0: torch.Tensor, noise: torch.Tensor, level: float) -> Any:
    """Return timesteps and squared errors of one prediction, as in diffusers' documentation."""
    kind = type(plain).__name__
    if kind == "StableDiffusionXLPipeline":
        t = torch.full([2], int(level * 1000))
        hidden, _, pooled, _ = plain.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
        x_t = plain.scheduler.add_noise(x_0, noise, t.float())
        # EulerDiscreteScheduler gives x_0 + sigma eps; the U-Net's input is that divided by
        # sqrt(1 + sigma^2).
        sigma = ((1 - plain.scheduler.alphas_cumprod) / plain.scheduler.alphas_cumprod).sqrt()[t]
        x_t = x_t / (1 + sigma**2).sqrt().view(-1, 1, 1, 1)
        ids = plain._get_add_time_ids((16, 16), (0, 0), (16, 16), torch.float32, 16).repeat(2, 1)
        added = {"text_embeds": pooled, "time_ids": ids}
        out = plain.unet(x_t, t, encoder_hidden_states=hidden, added_cond_kwargs=added)[0]
        return t, (out - noise).square().flatten(1).mean(1)
    sigma, t = level, torch.full([2], level * 1000)
    x_t, target = (1 - sigma) * x_0 + sigma * noise, noise - x_0
    if kind == "StableDiffusion3Pipeline":
        hidden, _, pooled, _ = plain.encode_prompt(
            PROMPTS, PROMPTS, PROMPTS, do_classifier_free_guidance=False
        )
        out = plain.transformer(x_t, hidden, pooled, t)[0]
    elif kind == "FluxPipeline":
        hidden, pooled, text_ids = plain.encode_prompt(PROMPTS, PROMPTS)
        # 2 x 2 latents for each token, and each token's position in the image.
        tokens = torch.nn.functional.pixel_unshuffle(x_t, 2).flatten(2).mT
        places = torch.tensor([[0, i, j] for i in range(4) for j in range(4)]).float()
        out = plain.transformer(
            tokens, hidden, pooled, t / 1000, places, text_ids, guidance=torch.ones(2)
        )[0]
        out = torch.nn.functional.pixel_shuffle(out.mT.unflatten(2, (4, 4)), 2)
    elif kind == "Flux2KleinPipeline":
        hidden, text_ids = plain.encode_prompt(PROMPTS)
        # A token for each 2 x 2 latents, which are its channels; places are (time, row, column,
        # place in the text), of a prompt's tokens only the last.
        tokens = x_t.flatten(2).mT
        places = torch.tensor([[0, i, j, 0] for i in range(4) for j in range(4)]).expand(2, -1, -1)
        assert torch.equal(text_ids[1], torch.tensor([[0, 0, 0, i] for i in range(512)]))
        out = plain.transformer(tokens, hidden, t / 1000, places, text_ids)[0]
        out = out.mT.unflatten(2, (4, 4))
    else:
        hidden, _ = plain.encode_prompt(list(PROMPTS), do_classifier_free_guidance=False)
        frames = [row[:, None] for row in x_t]
        velocity = plain.transformer(frames, (1000 - t) / 1000, hidden)[0]
        out = -torch.stack([row[:, 0] for row in velocity])
    return t, (out - target).square().flatten(1).mean(1)


def test_a_steps_loss_and_gradients_are_those_of_one_written_by_hand(
    both: tuple[Family, Any],
) -> None:
    family, plain = both
    generator = torch.Generator().manual_seed(0)
    channels, side = family.latent_size
    x_0, noise = (torch.randn(2, channels, side, side, generator=generator) for _ in range(2))
    t, errors = by_hand(plain, x_0, noise, 0.4)
    errors.mean().backward()
    noised = family.forward_process(None)(x_0, noise, t)
    prediction = family.predict(noised.x_t, noised.t, family.encode_prompts(PROMPTS))
    family_errors = per_sample_errors(prediction, noised.target)
    assert torch.allclose(family_errors, errors, rtol=1e-4)
    family_errors.mean().backward()
    plain_parameters = dict(getattr(plain, family.denoiser_name).named_parameters())
    compared = 0
    for name, parameter in family.denoiser.named_parameters():
        expected = plain_parameters[name].grad
        assert (parameter.grad is None) == (expected is None), name
        if expected is not None:
            assert torch.allclose(parameter.grad, expected, rtol=1e-3, atol=1e-6), name
            compared += bool(expected.abs().max() > 1e-6)
    assert compared > 20
    family.denoiser.zero_grad()
    getattr(plain, family.denoiser_name).zero_grad()


def test_latents_are_those_that_the_pipeline_decodes(both: tuple[Family, Any]) -> None:
    family, plain = both
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, std = family.encode_images(pixels)
    config, posterior = plain.vae.config, plain.vae.encode(pixels).latent_dist
    if hasattr(plain.vae, "bn"):
        # Its batch norm, in eval mode, is what latents are normalised by.
        patches = torch.nn.functional.pixel_unshuffle(posterior.mean, 2)
        assert torch.allclose(mean, plain.vae.bn.eval()(patches), atol=1e-5)
        scale = (plain.vae.bn.running_var + config.batch_norm_eps).sqrt().view(1, -1, 1, 1)
        patches = torch.nn.functional.pixel_unshuffle(posterior.std, 2)
        assert torch.allclose(std * scale, patches, atol=1e-5)
        return
    shift = config.shift_factor or 0
    assert torch.allclose(mean / config.scaling_factor + shift, posterior.mean, atol=1e-5)
    assert torch.allclose(std / config.scaling_factor, posterior.std, atol=1e-5)


def test_large_text_encoders_encode_a_runs_prompts_eight_at_a_time(
    both: tuple[Family, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    family, _ = both
    prompts = [
        "a dog" + " on the beach" * (number % 4) + " in snow" * number for number in range(19)
    ]
    encode, sizes = family.encode_prompts, []
    monkeypatch.setattr(
        family, "encode_prompts", lambda some: sizes.append(len(some)) or encode(some)
    )
    cache = PromptCache(family, prompts)
    assert sizes == ([8, 8, 3] if family.large_encoder_names else [19])
    together = family.pipeline_arguments(cache(prompts))
    for row, prompt in enumerate(prompts):
        for name, alone in family.pipeline_arguments(encode([prompt])).items():
            # Batches of other sizes are rounded otherwise; another row is 1 and more away.
            assert torch.allclose(together[name][row], alone[0], atol=1e-4), (prompt, name)


def test_base_info_equals_what_the_loaded_base_has(both: tuple[Family, Any]) -> None:
    _, plain = both
    path = plain.config._name_or_path
    info = loading.inspect_base(path)
    assert info.resolution == loading.load_model(path).resolution
    assert info.tokenizers[0][0].get_vocab() == plain.tokenizer.get_vocab()


def test_the_words_that_are_cut_are_those_that_the_pipeline_does_not_read(
    both: tuple[Family, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    family, plain = both
    if plain.tokenizer.chat_template:  # with as many tokens before the prompt as the real one has
        template = "{% for m in messages %}a a a {{ m.content }} photo{% endfor %}"
        monkeypatch.setattr(family.pipeline.tokenizer, "chat_template", template)
    limits = [limit for _, limit in family.tokenizers]
    info = loading.inspect_base(plain.config._name_or_path)
    assert [limit for _, limit in info.tokenizers] == limits
    words = ["dog"] * (max(limits) + 20)
    cut = len(cut_words(" ".join(words), family.tokenizers).split())
    for place, is_read in ((-cut - 1, True), (-cut, False)):
        other = [*words]
        other[place] = "cat"
        with torch.no_grad():
            rows = family.encode_prompts([" ".join(words), " ".join(other)])
        assert is_read == any(not torch.equal(*value) for value in rows.values())


def test_images_are_drawn_at_the_familys_resolution(both: tuple[Family, Any]) -> None:
    family, plain = both
    drawn = family.generate([("a dog", 0), ("a cat", 1)], 2, 2.0)
    plain.set_progress_bar_config(disable=True)
    expected = plain(
        prompt=["a dog", "a cat"],
        generator=[torch.Generator().manual_seed(seed) for seed in (0, 1)],
        num_inference_steps=2,
        guidance_scale=2.0,
        height=16,
        width=16,
    ).images
    assert [image.size for image in drawn] == [(16, 16)] * 2
    assert [image.tobytes() for image in drawn] == [image.tobytes() for image in expected]


def test_lora_finds_its_layers(both: tuple[Family, Any]) -> None:
    family, _ = both
    names = [name for name, _ in family.denoiser.named_modules()]
    for layer in family.lora_layers(True):
        assert any(f".{name}".endswith(f".{layer}") for name in names), layer


def test_the_empty_prompt_is_encoded_as_in_guidance(
    tiny_bases: Callable[[str], str],
) -> None:
    family = loading.load_model(tiny_bases("sdxl"))
    assert family.pipeline.config.force_zeros_for_empty_prompt
    cond = family.encode_prompts(["", "a dog"])
    plain = DiffusionPipeline.from_pretrained(tiny_bases("sdxl"))
    hidden, away, pooled, away_pooled = plain.encode_prompt("a dog")
    for name, value, empty in (("hidden", hidden, away), ("pooled", pooled, away_pooled)):
        assert torch.equal(cond[name][0], empty[0])
        assert torch.allclose(cond[name][1], value[0], atol=1e-6)


def test_kleins_training_shift_is_the_pipelines_at_200_steps(
    tiny_bases: Callable[[str], str],
) -> None:
    """Its empirical shift adds to FLUX.1's for fewer steps; 1024 pixels are 4096 patches."""
    from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

    path = tiny_bases("flux_2_klein")
    for side, patches in ((16, 16), (64, 256), (256, 4096)):
        process = loading.load_model(path, resolution=side).forward_process(None)
        assert isinstance(process, FlowNoise)
        assert process.shift == pytest.approx(exp(compute_empirical_mu(patches, 200)), rel=1e-4)


def test_klein_reads_three_hidden_layers_and_a_negative_prompt(
    tiny_bases: Callable[[str], str],
) -> None:
    path = tiny_bases("flux_2_klein")
    family, plain = loading.load_model(path, resolution=16), DiffusionPipeline.from_pretrained(path)
    text = plain.tokenizer.apply_chat_template(
        [{"role": "user", "content": "a dog"}], tokenize=False, add_generation_prompt=True,
        enable_thinking=False,
    )  # fmt: skip
    inputs = plain.tokenizer(text, return_tensors="pt", padding="max_length", max_length=512)
    with torch.no_grad():
        states = plain.text_encoder(**inputs, output_hidden_states=True).hidden_states
    hidden = family.encode_prompts(["a cat", "a dog"])["encoder_hidden_states"]
    assert torch.allclose(hidden[1:], torch.cat([states[i] for i in (9, 18, 27)], -1), atol=1e-5)
    away = plain.encode_prompt("a cat")[0]
    plain.set_progress_bar_config(disable=True)
    expected = plain(
        prompt="a dog", negative_prompt_embeds=away, generator=torch.Generator().manual_seed(0),
        num_inference_steps=2, guidance_scale=4.0, height=16, width=16,
    ).images[0]  # fmt: skip
    (image,) = family.generate([("a dog", 0)], 2, 4.0, "a cat")
    assert image.tobytes() == expected.tobytes()


def test_a_family_that_this_diffusers_lacks_is_refused(
    tiny_bases: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_bases("flux_2_klein")
    monkeypatch.delitem(diffusers._class_to_module, "Flux2KleinPipeline")
    monkeypatch.delattr("diffusers.Flux2KleinPipeline")
    for load in (loading.load_model, loading.load_meta):
        with pytest.raises(BaseError, match=r"Flux2KleinPipeline, which this diffusers .*newer"):
            load(path)


def test_flow_bases_refuse_min_snr_weights(tiny_bases: Callable[[str], str]) -> None:
    with pytest.raises(ValueError, match=r"min_snr_gamma is 5\.0.*predicts a flow"):
        loading.load_model(tiny_bases("sd3")).forward_process(5.0)


def test_a_family_is_added_by_naming_its_pipeline(
    tiny_bases: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dreambooth_lib.families.stable_diffusion_3 import StableDiffusion3

    class Mine(StableDiffusion3):
        pass

    monkeypatch.setitem(loading.FAMILIES, "StableDiffusion3Pipeline", Mine)
    assert type(loading.load_model(tiny_bases("sd3"))) is Mine


def test_only_the_named_parts_are_loaded_in_the_master_dtype(
    tiny_bases: Callable[[str], str], make_config: Callable[..., TrainConfig]
) -> None:
    family = loading.load_model(tiny_bases("flux"), dtype=torch.bfloat16, trained=("denoiser",))
    assert family.denoiser.dtype is torch.float32
    others = {part.dtype for part in (*family.text_encoders, *family.frozen)}
    assert others == {torch.bfloat16}
