"""Identifiers: rare single tokens of the base's tokenizer, offered and checked."""

import re
from itertools import islice
from typing import Any

_COMMON_SHARE = 0.85  # of the merged tokens, by frequency; in CLIP "teapot" lies at 0.82
_KNOWN_BAD = {"sks": "a rifle, and guns appear in the pictures"}
_AVOID = {*_KNOWN_BAD, "kkk", "kkkk", "xxx", "nsfw", "nra", "fck", "sht", "dbz", "lgbt", "bdsm",
          "lsd", "hpv", "pkk", "dprk", "jap", "nips"}  # fmt: skip


def _merged_tokens(tokenizer: Any) -> list[str]:
    """Return tokens of several letters, in CLIP's vocabulary from frequent to rare."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return [t for t, _ in vocabulary if len(t.removesuffix("</w>")) > 1 and not t.startswith("<|")]


def rare_identifiers(tokenizer: Any, count: int = 20) -> list[str]:
    """Return up to ``count`` words of 3 or 4 letters, each one rare token, the rarest first.

    Taken from the last 15% of the merged tokens of a ``CLIPTokenizer``, save those that end a
    longer word and known bad ones. Words with a vowel come after all others, so that they are
    offered by small vocabularies only: they may be names, which mean something to the base.
    """
    tokens = _merged_tokens(tokenizer)
    rare = reversed(tokens[int(_COMMON_SHARE * len(tokens)) :])
    words = [t.removesuffix("</w>") for t in rare if re.fullmatch("[a-z]{3,4}</w>", t)]
    longer = [t.removesuffix("</w>") for t in tokens if t.endswith("</w>")]
    left_out = _AVOID | {word[start:] for word in longer for start in range(1, len(word))}
    words.sort(key=lambda word: bool(re.search("[aeiouy]", word)))
    chosen = (w for w in words if w not in left_out and len(tokenizer.tokenize(w)) == 1)
    return list(islice(chosen, count))


def check_identifier(identifier: str, tokenizer: Any) -> list[str]:
    """Return warnings about an identifier, a sentence each; none if it is one rare token.

    A single token counts as common within the first 85% of the merged tokens.
    """
    warned = []
    tokens, merged = tokenizer.tokenize(identifier), _merged_tokens(tokenizer)
    if len(tokens) != 1:
        warned.append(
            f"identifier '{identifier}' is {len(tokens)} tokens ({', '.join(tokens)}), which are "
            "harder to bind; choose one from the list."
        )
    elif tokens[0] not in merged[int(_COMMON_SHARE * len(merged)) :]:
        warned.append(
            f"identifier '{identifier}' is a common token of the base, whose meaning would mix "
            "with the subject's; choose one from the list."
        )
    if bad := _KNOWN_BAD.get(identifier.lower()):
        warned.append(f"identifier '{identifier}' is known to be {bad}; choose another.")
    return warned
