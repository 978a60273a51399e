"""Suggest rare identifiers, and warn of others."""

import json
from pathlib import Path
from typing import Any

import pytest

from dreambooth_lib.data.identifiers import check_identifier, rare_identifiers
from tools.toybox.tokenizer import IDENTIFIERS, save_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Make a CLIPTokenizer with single tokens from "dog" (frequent) to "qzv" (rare)."""
    from transformers import CLIPTokenizer

    letters = [chr(code) for code in range(33, 127)]
    vocabulary = letters + [f"{letter}</w>" for letter in letters]
    merges = []
    frequent = ["dog", "cat", "htr", "the", "red", "toy", "vase", "bowl", "shoe", "clock",
                "candle", "berry", "boot", "can", "fancy", "glasses", "pink", "wolf", "sloth",
                "grey"]  # fmt: skip
    for word in [*frequent, "tuk", "sks", "qzv", "bcdfg", "kwfp"]:
        ending = word[-1] + "</w>"
        for letter in reversed(word[:-1]):
            if letter + ending not in vocabulary:
                merges.append(f"{letter} {ending}")
                vocabulary.append(letter + ending)
            ending = letter + ending
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    return CLIPTokenizer.from_pretrained(folder)


def test_rare_identifiers(tokenizer: Any) -> None:
    words = rare_identifiers(tokenizer)
    assert {"kwfp", "qzv"} <= set(words)
    assert not {"htr", "sks", "bcdfg", "wfp"} & set(words)  # frequent, bad, too long, an ending
    assert words[-1] == "tuk"  # has a vowel
    assert rare_identifiers(tokenizer, 1) == ["kwfp"]
    for word in words:
        assert len(tokenizer.tokenize(word)) == 1
        assert check_identifier(word, tokenizer) == []


def test_check_identifier(tokenizer: Any) -> None:
    (several,) = check_identifier("dogqzv", tokenizer)
    assert str(len(tokenizer.tokenize("dogqzv"))) in several
    assert ", ".join(tokenizer.tokenize("dogqzv")) in several
    (common,) = check_identifier("dog", tokenizer)
    assert "'dog'" in common
    assert "common" in common
    (bad,) = check_identifier("sks", tokenizer)
    assert "guns" in bad


def test_all_identifiers_of_toybox_are_suggested(tmp_path: Path) -> None:
    toybox = save_tokenizer(tmp_path)
    words = rare_identifiers(toybox)
    assert set(words) == set(IDENTIFIERS) - {"sks"}
    for word in words:
        assert check_identifier(word, toybox) == []
