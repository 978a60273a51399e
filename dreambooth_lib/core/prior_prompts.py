"""The built-in prompts of ``TrainConfig.prior_prompts``: what else a prior preserves.

No validation image shows what they name: these are to tell how what was never trained on fares.
"""

GENERIC = "generic"  #: the word that stands for the built-in prompts of a base

#: From the bundled base's own vocabulary: a quarter of its classes, each of its scenes once.
_TOYBOX = (
    "a teapot on a wooden table", "a bus in the city", "a robot in space",
    "a banana on the grass", "a cow at sunset", "a whale in the ocean",
    "a bee in the forest", "a crown in the desert", "a pizza on the beach",
    "a fox in the snow", "a ghost", "a purple snail",
)  # fmt: skip
_PHOTOS = (
    "a photo of a person", "a portrait of a woman", "a man walking down a street",
    "a bowl of fruit on a table", "a mountain lake at sunrise", "a house with a garden",
    "a horse in a field", "a bird on a branch", "a bicycle against a wall",
    "a vase of flowers by a window", "a kitchen", "an oil painting of a village",
    "a pencil drawing of a hand", "a bottle on a shelf", "a train at a station", "a forest path",
)  # fmt: skip


def generic_prompts(base: str, class_noun: str) -> tuple[str, ...]:
    """Return the built-in prompts of a base, without those that name the class."""
    prompts = _TOYBOX if base == "toybox" else _PHOTOS
    noun = set(class_noun.lower().split())
    return tuple(prompt for prompt in prompts if noun.isdisjoint(prompt.split()))
