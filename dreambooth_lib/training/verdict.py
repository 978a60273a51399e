"""Say in words whether a model learnt its subject and kept the rest, and what to do next.

The limits of "learnt" are where the words agree best with what two vision-language models said of
the bundled base's images (docs/studies). No person has judged them, and nobody has judged photos,
or how much of the rest is kept.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dreambooth_lib.training.best_checkpoint import Ratios

#: Likeness from which the subject counts as learnt, and as partly learnt.
LEARNT, PARTLY_LEARNT = 0.55, 0.35
#: Share of the class kept from which it counts as kept, and as partly kept.
CLASS_KEPT, CLASS_PARTLY_KEPT = 0.7, 0.5
#: The same of other prompts, by the mean over all of them.
OTHERS_KEPT, OTHERS_PARTLY_KEPT = 0.8, 0.6
#: How well prompts are followed, from which they count as followed.
FOLLOWED = 0.85

_LEARNT = {"yes": "learnt", "partly": "partly learnt", "no": "not learnt"}
#: At 94% likeness an image was seen to lack a pattern, and part of its subject's shape.
_COMPARE = (
    "Scores can miss shapes, colours and small parts: compare the images with your photos, and "
    "train for more steps if they do not show your subject yet. Images of the class should still "
    "vary as much as the base model's."
)


@dataclass(frozen=True)
class Verdict:
    """Tell what a model learnt and what it kept, in words."""

    learnt: str  #: "yes", "partly" or "no"
    class_kept: str  #: "yes", "partly" or "no"
    others_kept: str  #: "yes", "partly" or "no"
    text: str  #: all of it in one line
    advice: str  #: what to do next, in a sentence

    @property
    def good(self) -> bool:
        """Return whether the subject is learnt and nothing is forgotten."""
        return self.learnt == "yes" and "no" not in (self.class_kept, self.others_kept)


def verdict(
    ratios: "Ratios",
    leakage: float,
    still_learning: bool,
    has_ceiling: bool = True,
    likeness: float | None = None,
) -> Verdict:
    """Judge a step by its ratios.

    ``leakage`` is how much class images have come to look like the subject: 0 as the base's, 1 as
    the photos. ``still_learning`` tells whether the step is among the run's last ones, and
    ``has_ceiling`` whether two photos tell how alike the subject's images can be. ``likeness`` is
    less noisy than the step's own: the word for what was learnt follows it.
    """
    learnt = _word(ratios.likeness if likeness is None else likeness, LEARNT, PARTLY_LEARNT)
    kept = _word(min(ratios.class_kept, 1 - leakage), CLASS_KEPT, CLASS_PARTLY_KEPT)
    others = _word(ratios.others_kept, OTHERS_KEPT, OTHERS_PARTLY_KEPT)
    words = {"yes": "kept", "partly": "partly kept"}
    share = f"{ratios.class_kept:.0%}"
    if 1 - leakage < ratios.class_kept and kept != "yes":
        share = "it came to look like your subject"
    text = (
        f"According to the scores: subject {_LEARNT[learnt]} ({ratios.likeness:.0%}), class "
        f"{words.get(kept, 'forgotten')} ({share}), other prompts "
        f"{words.get(others, 'not kept')} ({ratios.others_kept:.0%})."
    )
    if not has_ceiling:
        text += (
            " The photos are all nearly the same, so 100% would be an exact copy, which no "
            "generated image reaches."
        )
    return Verdict(
        learnt, kept, others, text, _advice(learnt, kept, others, ratios, still_learning)
    )


def _word(value: float, yes: float, partly: float) -> str:
    return "yes" if value >= yes else "partly" if value >= partly else "no"


def _advice(learnt: str, kept: str, others: str, ratios: "Ratios", still_learning: bool) -> str:
    if kept == "no":
        return "Raise λ (prior_weight) to keep the class, and train again."
    if others == "no":
        return "Lower the learning rate, or preserve other prompts too (prior_prompts)."
    if learnt != "yes":
        if still_learning:
            return (
                "Train for more steps. Early on scores rise and fall, so a drop after the best "
                "step says little yet."
            )
        return (
            "Train for more steps or with a higher learning rate; photos that show the subject "
            "more clearly also help."
        )
    if ratios.adherence < FOLLOWED:
        return (
            f"{_COMPARE} The score for following prompts is lower than the base's, which is normal "
            "for an unusual subject: choose an earlier checkpoint only if the images miss the "
            "scenes of their prompts."
        )
    if "partly" in (kept, others):
        return (
            f"{_COMPARE} Raise λ if images of the class have changed too much; set prior_prompts "
            "if images of other prompts have."
        )
    return _COMPARE
