"""Suggest rare identifiers, and warn of others."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import save_photos

from dreambooth_lib.core.subject import Subject
from dreambooth_lib.data.identifiers import check_identifier, rare_identifiers
from dreambooth_lib.data.images import DataError
from dreambooth_lib.data.subjects import check_subject, load_subject
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


def _starting(mark: str) -> Any:
    """Make a tokenizer whose tokens have a mark where a word starts, as Qwen's and T5's have."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary, merges = [mark, *(chr(code) for code in range(33, 127))], []
    frequent = ["a", "dog", "cat", "red", "toy", "vase", "bowl", "shoe", "clock", "candle", "berry",
                "glasses", "fancy", "pink", "wolf", "sloth", "grey"]  # fmt: skip
    for word in [*frequent, "tuk", "sks", "qzv", "bcdfg"]:
        start = mark
        for letter in word:
            if start + letter not in vocabulary:
                merges.append((start, letter))
                vocabulary.append(start + letter)
            start += letter
    made = Tokenizer(models.BPE({token: n for n, token in enumerate(vocabulary)}, merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.pre_tokenizer = byte_level if mark == "Ġ" else pre_tokenizers.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=made)


@pytest.mark.parametrize("mark", ["Ġ", "▁"])
def test_words_whose_start_is_marked_are_suggested_and_judged_after_a_space(mark: str) -> None:
    tokenizer = _starting(mark)
    assert tokenizer.tokenize("a qzv")[1:] == [f"{mark}qzv"]
    assert rare_identifiers(tokenizer)[:2] == ["qzv", "tuk"]  # and not "bcdf", a start
    assert check_identifier("qzv", tokenizer) == []
    (several,) = check_identifier("dogqzv", tokenizer)
    assert f"is 4 tokens ({mark}dog, q, z, v)" in several
    assert several.endswith("choose one from the list.")


def test_no_list_is_named_where_no_word_can_be_suggested() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({"a": 0, "dog": 1, "?": 2}, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made)
    assert rare_identifiers(tokenizer) == []
    assert "list" not in "".join(check_identifier("ohwx!", tokenizer))


def test_all_identifiers_of_toybox_are_suggested(tmp_path: Path) -> None:
    toybox = save_tokenizer(tmp_path)
    words = rare_identifiers(toybox)
    assert set(words) == set(IDENTIFIERS) - {"sks"}
    for word in words:
        assert check_identifier(word, toybox) == []


def test_a_folder_named_for_kohya_is_told_unless_the_words_are_its_own(tmp_path: Path) -> None:
    for name, told in (
        ("10_ohwx dog", False), ("3_zwx dog", True), ("40_ohwx stuffed toy", True),
        ("2024_summer trip", False), ("3_dog", False), ("dog", False),
        ("ohwx dog", False), ("x10_ohwx cat", False),
    ):  # fmt: skip
        folder = Path(save_photos(tmp_path / name))
        messages = [m for m in check_subject(Subject(str(folder), "dog")) if "kohya" in m]
        assert len(messages) == told, name
    assert "set the identifier to 'ohwx' and the class noun to 'stuffed toy'" in check_subject(
        Subject(str(tmp_path / "40_ohwx stuffed toy"), "dog")
    ).pop()  # fmt: skip


def test_photos_in_folders_below_are_named(tmp_path: Path) -> None:
    """As kohya's trainers and others want them."""
    for below, where in (
        ("10_ohwx dog", "give its folder '10_ohwx dog', or put"),
        ("img/10_ohwx dog", "give its folder 'img/10_ohwx dog', or put"),
    ):
        place = tmp_path / below.replace("/", "-")
        save_photos(place / below)
        (place / ".cache").mkdir()
        (place / ".cache" / "a.png").touch()
        with pytest.raises(DataError, match=where):
            load_subject(place, "dog")
    save_photos(place / "reg" / "1_dog")
    with pytest.raises(DataError, match="folder 'img/10_ohwx dog', or one of 1 others, or put"):
        load_subject(place, "dog")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="has no photos; put JPEG"):
        load_subject(tmp_path / "empty", "dog")
