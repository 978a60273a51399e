"""Name fields and measures in plain words, for figures, tables and sentences.

Files keep the fields' own names.
"""

import html
from collections.abc import Iterable, Sequence

#: Colours of words that judge; they show on white and on black.
GOOD, FAIR, BAD, NEUTRAL = "#1a9850", "#c97b12", "#e0533d", "#888888"

NAMES = {
    "prior_weight": "λ",
    "step": "training step",
    "score": "score",
    "subject_fidelity": "likeness to the photos",
    "prompt_adherence": "prompt adherence",
    "memorisation": "likeness to the closest photo",
    "prompt_diversity": "diversity within a prompt",
    "pres": "subject leakage into the class (PRES)",
    "class_diversity": "class diversity",
    "prior_drift": "class drift",
    "unrelated_drift": "drift of other prompts",
    "class_kid": "class distance (KID)",
    "retrieval_precision": "finds the photos among look-alikes (mAP)",
    "masked_fidelity": "likeness of the subject alone",
    "prompt_drift": "drift of your drift prompts",
    "concept_preservation": "concept preservation (VLM)",
    "prompt_following": "prompt adherence (VLM)",
}
#: The ratios behind a score (:class:`best_checkpoint.Ratios`).
RATIOS = {
    "likeness": "likeness to the photos",
    "adherence": "prompt adherence",
    "class_kept": "class kept",
    "others_kept": "other prompts kept",
}
_ARROWS = dict.fromkeys(
    (
        "subject_fidelity",
        "prompt_adherence",
        "prompt_diversity",
        "class_diversity",
        "concept_preservation",
        "prompt_following",
        "retrieval_precision",
        "masked_fidelity",
    ),
    " ↑",
) | dict.fromkeys(("pres", "prior_drift", "unrelated_drift", "prompt_drift", "class_kid"), " ↓")


#: What a measure of an evaluation says, in a sentence; the order is that of a table's columns.
EXPLAINED = {
    "subject_fidelity": "how similar the images are to the photos (the paper's subject fidelity; "
    "DINO or CLIP-I); the row 'real images' is the ceiling",
    "masked_fidelity": "how similar the subject alone is to the photos, with the background masked "
    "out",
    "concept_preservation": "how well the subject is preserved, from 0 to 1, as rated by a "
    "vision-language model",
    "prompt_adherence": "how well the images match their prompts (the paper's prompt fidelity; "
    "CLIP-T); compare it with the base model's",
    "prompt_following": "how well the images match their prompts, from 0 to 1, as rated by a "
    "vision-language model",
    "pres": "how much images of the class look like the photos; higher than the base's means that "
    "the subject has leaked into its class",
    "class_diversity": "how much images of the class differ; lower than the base's means that they "
    "have become alike",
    "prior_drift": "how far images of the class have moved from the base's of the same seeds",
    "prompt_drift": "how far images of other prompts, your drift prompts, have moved from the base "
    "model's with the same seeds",
    "class_kid": "how far images of the class are from the base's as a whole",
    "retrieval_precision": "how early an image finds the photos among images of the class and of "
    "other subjects, 1 at best",
    "memorisation": "how much the images look like the closest photo; near 1 they copy it",
    "prompt_diversity": "how much images of the same prompt differ",
}


def name(field: str) -> str:
    """Return a field's plain name, or the field itself where it has none."""
    return NAMES.get(field, field)


def heading(measure: str) -> str:
    """Return a measure's plain name and an arrow in the direction that is better."""
    return name(measure) + _ARROWS.get(measure, "")


def sign(ok: bool) -> str:
    """Return a check mark, or a cross where something is wrong."""
    return "✓" if ok else "✗"


def html_table(
    heads: Sequence[str], rows: Iterable[tuple[bool, str, Sequence[str]]], bad: str = BAD
) -> str:
    """Return an HTML table of rows (ok, word, cells).

    The first column shows :func:`sign` and the word, in green or in the colour ``bad``.
    """
    left = 'style="text-align: left"'
    body = []
    for ok, word, cells in rows:
        colour = GOOD if ok else bad
        mark = f'<b style="color: {colour}">{sign(ok)}</b> {html.escape(word)}'
        tags = [f"<td {left}>{cell}</td>" for cell in (mark, *map(html.escape, cells))]
        body.append(f"<tr>{''.join(tags)}</tr>")
    head = "".join(f'<th scope="col" {left}>{html.escape(text)}</th>' for text in ("", *heads))
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
