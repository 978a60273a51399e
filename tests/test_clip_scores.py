"""Compare the scores with plain loops."""

import subprocess
import sys
from collections.abc import Callable
from itertools import combinations

import numpy as np
import pytest
import torch

from dreambooth_lib.core.errors import InputError
from dreambooth_lib.metrics.clip_scores import (
    diversity,
    prior_drift,
    reference_fidelity,
    row_cosines,
    strip_identifier,
    subject_fidelity,
)


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


def test_prior_drift_is_of_pairs_row_by_row() -> None:
    one, other = embeddings(6, 3), embeddings(6, 4)
    expected = [cosine(a, b) for a, b in zip(one, other, strict=True)]
    assert row_cosines(one, other).tolist() == pytest.approx(expected, abs=1e-9)
    assert prior_drift(one, other) == pytest.approx(1 - np.mean(expected), abs=1e-9)


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
    # The order of pairs, not within them:
    assert prior_drift(changed, other[order]) == pytest.approx(prior_drift(one, other))
    assert prior_drift(changed, other) != pytest.approx(prior_drift(one, other))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: subject_fidelity(embeddings(0, 0), embeddings(2, 0)), "generated.*shape.*0, 7"),
        (lambda: subject_fidelity(embeddings(2, 0), embeddings(2, 0)[0]), "reference.*shape"),
        (lambda: subject_fidelity(embeddings(2, 0), embeddings(2, 0, 5)), "one encoder"),
        (lambda: reference_fidelity(embeddings(1, 0)), "only one row of reference"),
        (lambda: diversity(embeddings(1, 0)), "only one row of images"),
        (
            lambda: row_cosines(embeddings(2, 0), embeddings(3, 0)),
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


def test_importing_is_light() -> None:
    code = (
        "import sys, dreambooth_lib.metrics.clip_scores, dreambooth_lib.figures.plots;"
        "print(*({'torch', 'transformers', 'matplotlib'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == ""
