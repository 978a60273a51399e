"""Suggest and check identifiers: rare single tokens of the base's tokenizer."""

import re
from functools import lru_cache
from pathlib import Path
from typing import Any

from dreambooth_lib.core.subject import Subject

_COMMON_FRACTION = 0.85  # of the merged tokens, by frequency; in CLIP "teapot" is at 0.82
_KNOWN_BAD = {"sks": "a rifle, and guns appear in the images"}
_AVOID = {*_KNOWN_BAD, "kkk", "kkkk", "xxx", "nsfw", "nra", "fck", "sht", "dbz", "lgbt", "bdsm",
          "lsd", "hpv", "pkk", "dprk", "jap", "nips", "yeti"}  # fmt: skip

#: A folder for kohya's trainers: how often an epoch repeats its photos, and their caption.
_KOHYA = re.compile(r"(\d{1,3})_(?P<words>(?P<identifier>\S+) (?P<noun>\S.*?))\s*")


@lru_cache(maxsize=1)  # a panel asks at each change, and Qwen's has 150,000
def _merged_tokens(tokenizer: Any) -> list[str]:
    """Return the vocabulary's tokens of several letters, in CLIP's from frequent to rare."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return [t for t, _ in vocabulary if len(t.removesuffix("</w>")) > 1 and not t.startswith("<|")]


def _word(token: str) -> str:
    """Return the word that a token is, by its mark; empty for a part of a word.

    CLIP marks a word's end; byte-level vocabularies, such as Qwen's, and SentencePiece's its start.
    """
    if token.endswith("</w>"):
        return token.removesuffix("</w>")
    return token[1:] if token.startswith(("Ġ", "▁")) else ""


def _tokens(word: str, tokenizer: Any) -> list[str]:
    """Return a word's tokens within a prompt, where a space is before it."""
    return list(tokenizer.tokenize(f"a {word}".strip())[1:])


def rare_identifiers(tokenizer: Any, count: int = 20) -> list[str]:
    """Return up to ``count`` words of 3 or 4 letters, each one rare token, the rarest first.

    They are among the last 15% of the merged tokens, without known bad ones and parts of longer
    words: ends in CLIP's vocabulary, starts in others. Words with a vowel come last: they may be
    names, which mean something to the base.
    """
    return list(_rare_words(tokenizer)[:count])


@lru_cache(maxsize=1)
def _rare_words(tokenizer: Any) -> list[str]:
    tokens = _merged_tokens(tokenizer)
    rare = reversed(tokens[int(_COMMON_FRACTION * len(tokens)) :])
    words = [word for t in rare if re.fullmatch("[a-z]{3,4}", word := _word(t))]
    longer = [(_word(t), t.endswith("</w>")) for t in tokens]
    # Qwen's rarest tokens in plain letters are starts of words that have others too.
    longer = [(word, ends) for word, ends in longer if ends or word.isascii()]
    parts = {w[n:] if ends else w[:n] for w, ends in longer for n in range(1, len(w))}
    words.sort(key=lambda word: bool(re.search("[aeiouy]", word)))
    excluded = _AVOID | parts
    return [w for w in words if w not in excluded and len(_tokens(w, tokenizer)) == 1]


def check_identifier(identifier: str, tokenizer: Any) -> list[str]:
    """Return warnings about an identifier, one sentence each; none if it is one rare token.

    A single token is common if it is among the first 85% of the merged tokens.
    """
    messages = []
    tokens, merged = _tokens(identifier, tokenizer), _merged_tokens(tokenizer)
    problem = ""
    if len(tokens) != 1:
        problem = (
            f"is {len(tokens)} tokens ({', '.join(tokens)}), which are harder to bind to the "
            "subject"
        )
    elif tokens[0] not in merged[int(_COMMON_FRACTION * len(merged)) :]:
        problem = "is a common token of the base, whose meaning would mix with the subject's"
    if problem:
        advice = "one from the list" if _rare_words(tokenizer) else "another one if you can"
        messages.append(f"identifier '{identifier}' {problem}; choose {advice}.")
    if meaning := _KNOWN_BAD.get(identifier.lower()):
        messages.append(
            f"to the base, identifier '{identifier}' means {meaning}; choose another one."
        )
    return messages


def check_folder_name(subject: Subject) -> list[str]:
    """Return a sentence if the photos' folder names other words, as in kohya's "10_ohwx dog"."""
    name = Path(subject.photos).name
    match = _KOHYA.fullmatch(name)
    if match is None or match["words"] == subject.token:
        return []
    repeats, identifier, noun = match.groups()[0], match["identifier"], match["noun"]
    return [
        f"the kit does not read the folder's name '{name}' as kohya's trainers do: to train "
        f"'{match['words']}', set the identifier to '{identifier}' and the class noun to '{noun}'; "
        f"it uses each photo equally often, whatever the {repeats} says."
    ]
