"""Plain names of fields and measures, for the figures and tables that a person reads.

Files keep the fields' own names.
"""

import html
from collections.abc import Iterable, Sequence

#: For axes, legends and sentences.
NAMES = {
    "prior_weight": "λ",
    "step": "training steps",
    "score": "score, 0 to 1",
    "subject_fidelity": "like the photos",
    "prompt_adherence": "follows the prompt",
    "class_diversity": "class variety",
    "prior_drift": "class drift",
}

#: For a table's heads, with the direction that is better.
HEADS = {
    "subject_fidelity": "like the photos ↑",
    "prompt_adherence": "follows the prompt ↑",
    "memorisation": "like one photo alone",
    "prompt_diversity": "variety within a prompt ↑",
    "pres": "subject leaking into the class (PRES) ↓",
    "class_diversity": "class variety ↑",
    "prior_drift": "class drift ↓",
    "unrelated_drift": "drift of another prompt ↓",
    "class_kid": "class distance (KID) ↓",
}


def sign(ok: bool) -> str:
    """Return the sign of what is well, and of what is not."""
    return "✓" if ok else "✗"


def html_table(heads: Sequence[str], rows: Iterable[tuple[bool, str, Sequence[str]]]) -> str:
    """Return a table of rows (is all well, a word for it, cells), whose mark comes first."""
    left = 'style="text-align: left"'
    body = []
    for ok, word, cells in rows:
        colour = "#1a9850" if ok else "#e0533d"  # both show on white and on black
        mark = f'<b style="color: {colour}">{sign(ok)}</b> {html.escape(word)}'
        tags = [f"<td {left}>{cell}</td>" for cell in (mark, *map(html.escape, cells))]
        body.append(f"<tr>{''.join(tags)}</tr>")
    head = "".join(f'<th scope="col" {left}>{one}</th>' for one in ("", *heads))
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def format_bytes(count: int) -> str:
    """Say a number of bytes: "3.7 MB", "57 MB", "4.3 GB"."""
    unit, scale = ("GB", 1e9) if count >= 1e9 else ("MB", 1e6)
    return f"{count / scale:.{0 if count >= 10 * scale else 1}f} {unit}"
