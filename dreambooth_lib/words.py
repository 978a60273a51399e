"""Plain names of fields and measures, for the figures and tables that a person reads.

Files keep the fields' own names.
"""

#: For axes, legends and sentences.
NAMES = {
    "prior_weight": "λ",
    "step": "training steps",
    "standing": "score, 0 to 1",
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
    "class_kid": "class distance (KID) ↓",
}
