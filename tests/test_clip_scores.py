"""Compare the scores with plain loops."""

import subprocess
import sys
from collections.abc import Callable
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from conftest import drawings

from dreambooth_lib.core.errors import InputError
from dreambooth_lib.metrics.clip_scores import (
    diversity,
    evaluate,
    prior_drift,
    prompt_adherence,
    reference_fidelity,
    strip_identifier,
    subject_fidelity,
)
from dreambooth_lib.metrics.encoders import Encoder


def embeddings(count: int, seed: int, width: int = 7) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(count, width))).float()


def cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    a, b = one.double().numpy(), other.double().numpy()
    return float(np.sum(a * b) / np.sqrt(np.sum(a * a) * np.sum(b * b)))


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
    images = embeddings(5, 5)
    expected = np.mean([1 - cosine(a, b) for a, b in combinations(images, 2)])
    assert diversity(images) == pytest.approx(expected, abs=1e-9)


def test_values_at_the_ends() -> None:
    same = embeddings(1, 6).repeat(4, 1)
    assert subject_fidelity(same, same[:2]) == pytest.approx(1)
    assert subject_fidelity(same, -same[:2]) == pytest.approx(-1)
    assert diversity(same) == pytest.approx(0, abs=1e-9)
    assert prior_drift(same, same) == pytest.approx(0, abs=1e-9)
    assert prior_drift(same, -same) == pytest.approx(2)
    assert reference_fidelity(torch.eye(3)) == pytest.approx(0)


def test_near_duplicates_count_as_one_photo() -> None:
    rows = torch.nn.functional.normalize(embeddings(3, 1).double(), dim=-1)
    twice = torch.cat([rows, rows[2:]])
    one = reference_fidelity(rows[:2])
    assert reference_fidelity(rows, [[0], [1], [2]]) == reference_fidelity(rows)
    assert reference_fidelity(rows, [[0], [1, 2]]) == pytest.approx(
        float((rows[0] @ rows[1] + rows[0] @ rows[2]) / 2)
    )
    assert reference_fidelity(twice[:2], [[0], [1]]) == pytest.approx(one)
    with pytest.raises(InputError, match="all reference photos are near-duplicates"):
        reference_fidelity(rows, [[0, 1, 2]])


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
        (lambda: diversity(embeddings(1, 0)), "only one row of images"),
        (
            lambda: prompt_adherence(embeddings(2, 0), embeddings(3, 0)),
            "the same number of rows each",
        ),
        (lambda: prior_drift(embeddings(2, 0), embeddings(1, 0)), "the same number of rows each"),
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


def test_evaluate_returns_every_score(clip: Encoder) -> None:
    reference, generated = drawings(3, 1), drawings(4, 2)
    before, after = drawings(3, 3), drawings(3, 4)
    prompts = ["a ohwx dog", "a ohwx dog in snow", "a ohwx dog", "ohwx dog"]
    scores = evaluate(clip, reference, generated, prompts, after, "ohwx", before)
    images, class_images = clip.embed_images(generated), clip.embed_images(after)
    texts = clip.embed_texts(["a dog", "a dog in snow", "a dog", "dog"])
    assert scores == {
        "subject_fidelity": subject_fidelity(images, clip.embed_images(reference)),
        "prompt_adherence": prompt_adherence(images, texts),
        "class_diversity": diversity(class_images),
        "prior_drift": prior_drift(clip.embed_images(before), class_images),
    }
    without = evaluate(clip, reference, generated, prompts, after, "ohwx")
    assert without == {k: v for k, v in scores.items() if k != "prior_drift"}


def test_evaluate_by_a_dino_leaves_out_the_prompts(dino: Encoder) -> None:
    images = drawings(2)
    scores = evaluate(dino, images, images, ["a dog", "a dog"], images, "ohwx", images)
    assert set(scores) == {"subject_fidelity", "class_diversity", "prior_drift"}
    assert scores["prior_drift"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": ["a dog"]}, "1 prompts for 2 generated"),
        ({"class_images": drawings(1)}, "only one row"),
        ({"base_class_images": drawings(3)}, "the same number of rows each"),
        ({"reference": []}, "no images"),
    ],
)
def test_evaluate_names_wrong_counts(clip: Encoder, change: dict[str, Any], message: str) -> None:
    images = drawings(2)
    fields: dict[str, Any] = {
        "reference": images, "generated": images, "prompts": ["a dog"] * 2,
        "class_images": images, "identifier": "ohwx",
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        evaluate(clip, **(fields | change))


def test_importing_is_light() -> None:
    code = (
        "import sys, dreambooth_lib.metrics.clip_scores, dreambooth_lib.figures.plots;"
        "print(*({'torch', 'transformers', 'matplotlib'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == ""
