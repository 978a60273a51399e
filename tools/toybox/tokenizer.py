"""A CLIPTokenizer whose single tokens are the world's words and some rare identifiers."""

import json
from pathlib import Path

from transformers import CLIPTokenizer

from tools.toybox.world import CLASSES, COLOURS, PREFIXES, RELATIONS, SCENES, VAGUE

MAX_LENGTH = 24  # tokens, start and end included
#: Single tokens that no caption ever has: what a subject can be named by.
IDENTIFIERS = ("ohwx", "hta", "sks", "zwx", "qov", "xjy", "vuk", "plk", "yrr", "fzb", "wuq", "dtx")
START, END = "<|startoftext|>", "<|endoftext|>"


def world_words(pairs: bool = False) -> list[str]:
    """Return the words of captions, and with ``pairs`` also those of captions of two things."""
    phrases = [*CLASSES, *COLOURS, *PREFIXES, *SCENES.values()]
    if pairs:
        phrases += [*RELATIONS, VAGUE]
    return sorted({word for phrase in phrases for word in phrase.split()})


def byte_letters() -> list[str]:
    """Return the 256 printable stand-ins for bytes that byte-level BPE writes its vocabulary in."""
    keep = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in keep]
    return [chr(b) for b in keep] + [chr(256 + i) for i in range(len(rest))]


def save_tokenizer(folder: Path, pairs: bool = False) -> CLIPTokenizer:
    """Write the tokenizer in CLIP's layout; each word is merged letter by letter from its end.

    Merging from the end ("o g</w>", then "d og</w>") lets words share suffixes and keeps every
    merge inside the one word that it was made for: only whole endings carry "</w>".
    """
    words = [*world_words(pairs), *IDENTIFIERS]
    letters = byte_letters()
    vocabulary = letters + [letter + "</w>" for letter in letters]
    merges: list[str] = []
    for word in words:
        ending = word[-1] + "</w>"
        for letter in reversed(word[:-1]):
            if letter + ending not in vocabulary:
                merges.append(f"{letter} {ending}")
                vocabulary.append(letter + ending)
            ending = letter + ending
    vocabulary += [START, END]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": MAX_LENGTH,
        "bos_token": START,
        "eos_token": END,
        "unk_token": END,
        "pad_token": END,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    for word in words:
        if len(tokenizer.tokenize(word)) != 1:
            raise ValueError(f"'{word}' became {tokenizer.tokenize(word)}, not a single token.")
    return tokenizer
