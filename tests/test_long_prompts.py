"""Read prompts beyond a text encoder's length in chunks, and short ones as without chunks."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import dreambooth_lib as db
from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.core.subject import Subject
from dreambooth_lib.families import loading
from dreambooth_lib.families.base import Family
from dreambooth_lib.families.base_files import BaseError
from dreambooth_lib.families.long_prompts import chunk_ids, chunks_of, encode_in_chunks
from tools.launch_counter import DEVICE, counting
from tools.launches import _apply

WORDS = ["a", "red", "dog", "on", "the", "beach", "in", "snow", "photo", "of", "cat"]


def words(count: int, start: int = 0) -> str:
    return " ".join(WORDS[(start + n) % len(WORDS)] for n in range(count))


@pytest.fixture(params=["sd1", "sdxl", "toybox"])
def family(request: pytest.FixtureRequest, tiny_bases: Callable[[str], str]) -> Family:
    base = "toybox" if request.param == "toybox" else tiny_bases(request.param)
    return loading.load_model(base, prompt_chunks=3)


def prompt_of(family: Family, chunks: int, start: int = 0) -> str:
    """Return a prompt that takes so many chunks."""
    texts = (words(count, start) for count in range(1, 300))
    return next(text for text in texts if chunks_of(family, [text]) == [chunks])


def test_short_prompts_are_encoded_as_without_chunks(family: Family) -> None:
    prompts = ["", "a dog", prompt_of(family, 1)]
    chunked = family.encode_prompts(prompts)
    forced = family.encode_ids([chunk_ids(t, prompts, 1) for t, _ in family.tokenizers])
    family.prompt_chunks = 1
    for name, value in family.encode_prompts(prompts).items():
        assert torch.equal(chunked[name], value)
        # By the ids of chunks, too: SDXL's pipeline has zeros for the empty prompt.
        assert torch.allclose(forced[name][1:], value[1:], atol=1e-6)


def test_each_chunk_is_encoded_as_a_prompt_of_its_own(family: Family) -> None:
    long = prompt_of(family, 2)
    (first, limit), *_ = family.tokenizers
    assert limit == 3 * (first.model_max_length - 2) + 2
    room = first.model_max_length - 2
    ids = first(long, add_special_tokens=False, truncation=False).input_ids
    parts = [first.decode(ids[:room]), first.decode(ids[room:])]
    whole, split = family.encode_prompts([long]), family.encode_short(parts)
    for name, value in whole.items():
        own = split[name].flatten(0, 1)[None] if value.ndim == 3 else split[name][:1]
        assert torch.allclose(value, own, atol=1e-5)


def test_what_is_beyond_the_first_chunk_counts_until_the_last(family: Family) -> None:
    long = prompt_of(family, 3)
    end = words(3 * family.tokenizers[0][0].model_max_length)
    with_end, other = (family.encode_prompts([text]) for text in (long, long + " cat cat"))
    assert any(not torch.equal(with_end[name], other[name]) for name in other)
    cut = [family.encode_prompts([f"{end} {last}"]) for last in ("dog", "snow")]
    assert all(torch.equal(cut[0][name], cut[1][name]) for name in cut[0])
    family.prompt_chunks = 1
    before, after = (family.encode_prompts([text]) for text in (long, long + " cat cat"))
    assert all(torch.equal(before[name], after[name]) for name in before)


@torch.no_grad()
def test_a_short_prompt_means_the_same_among_long_ones(family: Family) -> None:
    prompts = [prompt_of(family, 3), "a dog", prompt_of(family, 2), ""]
    together, alone = family.encode_prompts(prompts), family.encode_prompts(["a dog"])
    hidden = next(name for name, value in together.items() if value.ndim == 3)
    assert together[hidden].shape[1] == 6 * alone[hidden].shape[1]
    channels, side = family.latent_size
    x_t = torch.randn(1, channels, side, side, generator=torch.manual_seed(0))
    t = torch.tensor([400])
    family.denoiser.eval()
    row = {name: value[1:2] for name, value in together.items()}
    assert torch.allclose(
        family.predict(x_t, t, row), family.predict(x_t, t, alone), atol=1e-5
    )  # fmt: skip
    for place in (0, 2):
        own = family.encode_prompts([prompts[place]])
        row = {name: value[place : place + 1] for name, value in together.items()}
        predicted = family.predict(x_t, t, row)
        assert torch.allclose(predicted, family.predict(x_t, t, own), atol=1e-5)
        assert not torch.allclose(predicted, family.predict(x_t, t, alone), atol=1e-5)


def test_images_are_drawn_of_all_chunks(family: Family) -> None:
    long = prompt_of(family, 2)
    images = [family.generate([(text, 0)], 2, 3.0)[0] for text in (long, long + " cat cat")]
    assert images[0].tobytes() != images[1].tobytes()
    (short,) = family.generate([("a dog", 0)], 2, 3.0, "a red cat")
    (beside, _) = family.generate([("a dog", 0), (long, 1)], 2, 3.0, "a red cat")
    levels = [torch.tensor(list(image.tobytes()), dtype=torch.float) for image in (short, beside)]
    assert (levels[0] - levels[1]).abs().max() <= 2
    family.prompt_chunks = 1
    cut = [family.generate([(text, 0)], 2, 3.0)[0] for text in (long, long + " cat cat")]
    assert cut[0].tobytes() == cut[1].tobytes()


def test_gradients_reach_the_text_encoders_through_every_chunk(tiny_sd1: str) -> None:
    family = loading.load_model(tiny_sd1, prompt_chunks=2)
    texts = [prompt_of(family, 2), "a dog"]
    family.encode_prompts(texts)["encoder_hidden_states"].square().sum().backward()
    gradient = family.text_encoders[0].get_input_embeddings().weight.grad
    last = family.tokenizers[0][0](texts[0], add_special_tokens=False).input_ids[-1]
    assert gradient is not None and gradient[last].abs().sum() > 0


def test_the_order_of_prompts_stays(tiny_sd1: str) -> None:
    family = loading.load_model(tiny_sd1, prompt_chunks=3)
    prompts = [prompt_of(family, n, start) for start, n in enumerate((2, 1, 2, 1))]
    rows = encode_in_chunks(family, prompts, family.encode_short, family.encode_ids)
    for place, prompt in enumerate(prompts):
        alone = family.encode_prompts([prompt])["encoder_hidden_states"]
        row = rows["encoder_hidden_states"][place]
        assert torch.allclose(row[: alone.shape[1]], alone[0], atol=1e-6)


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_an_offloaded_pipeline_reads_long_and_short_prompts_on_its_gpu(
    name: str, tiny_bases: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By diffusers' own hooks; tensors without values stand in for those of a GPU."""
    family = loading.load_meta(tiny_bases(name), prompt_chunks=2)
    prompts = [prompt_of(family, 2), "a dog", ""]
    monkeypatch.setattr(torch.nn.Module, "_apply", _apply)
    with counting(), torch.no_grad():
        modules = [m for m in family.pipeline.components.values() if isinstance(m, torch.nn.Module)]
        for module in modules:
            module._apply(lambda weight: torch.empty_like(weight, device="cpu"))
        family.pipeline.enable_model_cpu_offload(device=DEVICE)
        for _ in range(2):  # at first the text encoders are on the CPU
            found = family.encode_prompts(prompts)
            assert {value.device for value in found.values()} == {DEVICE}
        assert {len(value) for value in found.values()} == {3}


def test_other_families_refuse_chunks(tiny_bases: Callable[[str], str]) -> None:
    with pytest.raises(BaseError, match="not read in chunks; leave prompt_chunks out"):
        loading.load_model(tiny_bases("sd3"), prompt_chunks=2)
    assert loading.load_model(tiny_bases("sd3")).how_to_read_more == ""


@pytest.mark.parametrize("more", [{}, {"memory": "low"}, {"train_text_encoder": True}])
def test_a_run_with_long_captions_trains_validates_and_draws(
    tmp_path: Path, photos: str, tiny_sd1: str, make_config: Callable[..., TrainConfig],
    more: dict[str, object], recwarn: pytest.WarningsRecorder,
) -> None:  # fmt: skip
    import shutil

    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    text = words(20)
    for path in list(folder.glob("*.png"))[:2]:
        path.with_suffix(".txt").write_text(f"a {{}} dog {text}")
    subject = Subject(str(folder), "dog")
    config = make_config(tiny_sd1, str(folder), subject=subject, prompt_chunks=3, **more)
    run = db.start(config, tmp_path / "run")
    assert all(step.loss > 0 for step in db.train(run))
    assert not [w for w in recwarn if "is too long" in str(w.message)]
    images = [db.sample(run, [text + end], [0])[0].image.tobytes() for end in ("", " cat cat")]
    assert images[0] != images[1]
    plain = db.start(config.replace(prompt_chunks=1), tmp_path / "plain")
    with pytest.warns(
        UserWarning, match=r"it has \d+ tokens, and .* read at most \d+.*set prompt_chunks to 3"
    ):
        list(db.train(plain))


def test_long_prompts_of_the_prior_and_negative_ones_are_told(
    tiny_sd1: str, photos: str, make_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    long = words(20)
    config = make_config(tiny_sd1, photos, prior_prompts=("a cat", long), steps=1)
    run = db.start(config, tmp_path / "run")
    with pytest.warns(UserWarning, match=f"the prompt '{long}' is too long"):
        list(db.train(run))
    with pytest.warns(UserWarning, match=f"the prompt '{long}' is too long"):
        db.sample(run, ["a {} dog"], [0], steps=1, negative_prompt=long)
