"""Suggest and check identifiers: rare single tokens of the base's tokenizer."""

import re
from itertools import islice
from pathlib import Path
from typing import Any

from dreambooth_lib.core.subject import Subject

_COMMON_FRACTION = 0.85  # of the merged tokens, by frequency; in CLIP "teapot" is at 0.82
_KNOWN_BAD = {"sks": "a rifle, and guns appear in the images"}
_AVOID = {*_KNOWN_BAD, "kkk", "kkkk", "xxx", "nsfw", "nra", "fck", "sht", "dbz", "lgbt", "bdsm",
          "lsd", "hpv", "pkk", "dprk", "jap", "nips"}  # fmt: skip

#: A folder for kohya's trainers: how often an epoch repeats its photos, and their caption.
_KOHYA = re.compile(r"(\d{1,3})_(?P<words>(?P<identifier>\S+) (?P<noun>\S.*?))\s*")


def _merged_tokens(tokenizer: Any) -> list[str]:
    """Return the vocabulary's tokens of several letters, in CLIP's from frequent to rare."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return [t for t, _ in vocabulary if len(t.removesuffix("</w>")) > 1 and not t.startswith("<|")]


def rare_identifiers(tokenizer: Any, count: int = 20) -> list[str]:
    """Return up to ``count`` words of 3 or 4 letters, each one rare token, the rarest first.

    They are among the last 15% of the merged tokens of a ``CLIPTokenizer``, without known bad ones
    and endings of longer words. Words with a vowel come last, so that only small vocabularies
    reach them: they may be names, which mean something to the base.
    """
    tokens = _merged_tokens(tokenizer)
    rare = reversed(tokens[int(_COMMON_FRACTION * len(tokens)) :])
    words = [t.removesuffix("</w>") for t in rare if re.fullmatch("[a-z]{3,4}</w>", t)]
    longer = [t.removesuffix("</w>") for t in tokens if t.endswith("</w>")]
    excluded = _AVOID | {word[start:] for word in longer for start in range(1, len(word))}
    words.sort(key=lambda word: bool(re.search("[aeiouy]", word)))
    chosen = (w for w in words if w not in excluded and len(tokenizer.tokenize(w)) == 1)
    return list(islice(chosen, count))


def check_identifier(identifier: str, tokenizer: Any) -> list[str]:
    """Return warnings about an identifier, one sentence each; none if it is one rare token.

    A single token is common if it is among the first 85% of the merged tokens.
    """
    messages = []
    tokens, merged = tokenizer.tokenize(identifier), _merged_tokens(tokenizer)
    if len(tokens) != 1:
        messages.append(
            f"identifier '{identifier}' is {len(tokens)} tokens ({', '.join(tokens)}), which are "
            "harder to bind to the subject; choose one from the list."
        )
    elif tokens[0] not in merged[int(_COMMON_FRACTION * len(merged)) :]:
        messages.append(
            f"identifier '{identifier}' is a common token of the base, whose meaning would mix "
            "with the subject's; choose one from the list."
        )
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
