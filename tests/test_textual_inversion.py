"""Train a new token: only its embedding trains beside LoRA, and plain diffusers loads it."""

from collections.abc import Callable
from functools import partial
from itertools import islice
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.core.config_types import ConfigError
from dreambooth_lib.core.subject import Subject
from dreambooth_lib.families import loading, textual_inversion
from dreambooth_lib.training import runs
from dreambooth_lib.training.checkpoints import load_state
from dreambooth_lib.training.loop import train
from dreambooth_lib.training.memory_estimate import estimate
from dreambooth_lib.training.runs import Run
from dreambooth_lib.training.sampling import load_source, sample
from dreambooth_lib.training.setup import Trainer

Make = Callable[..., TrainConfig]
WORD = "<rex>"


@pytest.fixture
def started(start_run: Callable[..., Run], photos: str) -> Callable[..., Run]:
    fields = {"method": "lora", "train_token": True, "learning_rate": 0.05}
    return partial(start_run, subject=Subject(photos, "dog", WORD), **fields)


def row(encoder: Any, tokenizer: Any, word: str) -> torch.Tensor:
    return encoder.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids(word)]


@pytest.mark.parametrize("family", ["sd1", "sdxl", "sd3", "flux"])
@pytest.mark.parametrize("with_text", [False, True])
def test_only_the_tokens_row_trains_resumes_and_is_loaded(
    family: str, with_text: bool, started: Callable[..., Run], tiny_bases: Callable[[str], str]
) -> None:
    whole = started("whole", family, train_text_encoder=with_text)
    trainer = Trainer(whole)
    names = set(trainer.trainable.trained_weights())
    count = len(trainer.family.text_encoders)
    assert sum(name.endswith(".word") for name in names) == count
    assert all("lora_" in name or name.endswith(".word") for name in names)
    assert any("text_encoders" in n and "lora_" in n for n in names) == with_text
    list(train(whole))
    broken = started("broken", family, train_text_encoder=with_text)
    for _ in islice(train(broken), 1):
        pass
    list(train(runs.resume(broken.folder)))
    state, resumed = (load_state(run.checkpoints()[2])["model"] for run in (whole, broken))
    assert all(torch.equal(state[name], resumed[name]) for name in state)
    tuned, base = load_source(whole), loading.load_model(tiny_bases(family))
    for name, encoder in enumerate(tuned.text_encoders):
        tokenizer = getattr(tuned.pipeline, ("tokenizer", "tokenizer_2")[name])
        before = base.text_encoders[name].get_input_embeddings().weight
        after = encoder.get_input_embeddings().weight
        learnt = state[
            next(n for n in names if n.startswith(f"text_encoders.{name}") and ".word" in n)
        ]
        assert type(encoder.get_input_embeddings()) is torch.nn.Embedding
        assert torch.equal(after[: len(before)], before) and len(after) == len(before) + 1
        assert torch.equal(row(encoder, tokenizer, WORD), learnt)
        assert not torch.equal(learnt, row(encoder, tokenizer, "dog</w>"))
    at_end, drawn = (sample(whole, ["a {} dog"], [0], steps=1, at=at)[0].image for at in (2, None))
    assert at_end.tobytes() == drawn.tobytes()


@pytest.mark.parametrize("family", ["sdxl", "sd3", "flux"])
def test_what_follows_the_word_is_pooled_too(family: str, started: Callable[..., Run]) -> None:
    """Released encoders have 2 for eos_token_id, and then pool at the highest token."""
    base = loading.load_model(started("run", family).config.base)
    for encoder in base.text_encoders:
        pooling = getattr(encoder, "text_model", encoder)
        pooling.eos_token_id = encoder.config.eos_token_id = 2
    with torch.no_grad():
        textual_inversion.add_token(base, WORD, "dog")
        prompts = [f"a {WORD} dog on the beach", f"a {WORD} dog in snow"]
        cond = base.encode_prompts(prompts)
    (one, other), *_ = (value for name, value in cond.items() if "pooled" in name)
    assert not torch.allclose(one, other, atol=1e-4)


def test_the_token_is_initialized_as_its_class_noun(
    started: Callable[..., Run],
) -> None:
    trainer = Trainer(started("run", "sd1"))
    pipeline, (encoder,) = trainer.family.pipeline, trainer.family.text_encoders
    assert pipeline.tokenizer.tokenize(f"a {WORD} dog") == ["a</w>", WORD, "dog</w>"]
    word = encoder.get_input_embeddings().word
    assert torch.equal(word, row(encoder, pipeline.tokenizer, "dog</w>"))
    with torch.no_grad():
        prompt, expected = (
            trainer.family.encode_prompts([f"a {noun} on the beach"])["encoder_hidden_states"]
            for noun in (WORD, "dog")
        )
        assert torch.equal(prompt, expected)
        word.add_(1.0)
        moved = trainer.family.encode_prompts([f"a {WORD} on the beach"])["encoder_hidden_states"]
    assert not torch.equal(moved, prompt)


def test_plain_diffusers_loads_the_token_and_draws_the_same(started: Callable[..., Run]) -> None:
    run = started("run", "sd1")
    list(train(run))
    plain = DiffusionPipeline.from_pretrained(run.config.base, safety_checker=None)
    plain.load_lora_weights(run.pipeline)
    plain.load_textual_inversion(load_file(run.pipeline / textual_inversion.TOKEN_FILE), token=WORD)
    plain.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 2, "guidance_scale": 3.0, "height": 16, "width": 16}
    generator = torch.Generator().manual_seed(0)
    expected = plain(f"a {WORD} dog", generator=generator, **settings).images[0]
    (drawn,) = sample(run, ["a {} dog"], [0], steps=2, guidance_scale=3.0)
    pairs = zip(expected.tobytes(), drawn.image.tobytes(), strict=True)
    assert max(abs(a - b) for a, b in pairs) <= 1


def test_a_known_word_a_large_encoder_and_full_training_are_refused(
    photos: str, started: Callable[..., Run]
) -> None:
    with pytest.raises(
        textual_inversion.TokenError, match="'dog' is a word that the base has already"
    ):
        Trainer(started("known", "sd1", subject=Subject(photos, "cat", "dog")))
    with pytest.raises(ConfigError, match="train_token is set, but the text encoder of"):
        Trainer(started("large", "z_image"))
    with pytest.raises(ConfigError, match="train_token is set but method is 'full'"):
        started("full", "sd1", method="full")


def test_the_memory_estimate_includes_the_token(started: Callable[..., Run]) -> None:
    run = started("run", "sd1")
    with_word = estimate(run.config, "no")
    plain = estimate(run.config.replace(train_token=False), "no")
    width = 16
    assert with_word.weights - plain.weights >= 4 * width
    assert with_word.working > plain.working, "the text encoder's activations"
