"""Say what the bundled base, which is for practice, cannot learn."""

import json
from pathlib import Path

from dreambooth_lib.families import loading


def remark(base: str, photos: str | Path) -> str:
    """Return a sentence for photos, a path, that the bundled base may be unable to learn, or ""."""
    if base != "toybox" or Path(photos).resolve().is_relative_to(loading.BUNDLED.resolve()):
        return ""
    return (
        "The bundled base learns emoji-like drawings, not photos: if these are photos, choose "
        "another base in section 1."
    )


def findings(base: str, noun: str) -> list[str]:
    """Return messages on a class noun that the bundled base cannot draw.

    Other bases know most nouns: there are none for them.
    """
    if base != "toybox":
        return []
    messages = []
    classifier = loading.BUNDLED / "toybox" / "classifier" / "config.json"
    labels = json.loads(classifier.read_text())["id2label"].values()
    nouns = [label.removeprefix("class: ") for label in labels if label.startswith("class: ")]
    bare = noun.lower().removeprefix("a ").removeprefix("an ")
    if bare != noun.lower() and bare in nouns:
        messages.append(f"write the class noun without its article: '{bare}'.")
    elif noun.lower() not in nouns:
        if known := [word for word in noun.lower().split() if word in nouns]:
            return [f"the bundled base does not know '{noun}': write the class noun '{known[-1]}'."]
        messages.append(
            f"the bundled base cannot generate '{noun}': it knows emoji-like drawings of "
            f"{len(nouns)} things ({', '.join(sorted(nouns))}); choose one of them, or another "
            "base."
            if noun
            else "the class noun is empty; write in one word what your subject is."
        )
    return messages
