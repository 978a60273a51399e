"""The toy world: one or two drawings on one drawn scene, with a compositional caption.

``a purple teapot on the beach``, ``a dog beside a teapot in space``: 48 classes with up to seven
drawings each, 10 scenes, 8 colours, and three places that a second thing can have.
"""

import colorsys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from tools.toybox import drawings
from tools.toybox.scenes import SCENES, draw_scene

SIZE = 64  # pixels, the side of a picture unless a world has another
DRAWING_SIZE = 1.5  # sides of a picture: the size that drawings are kept at before they are placed

#: class noun -> names of the drawing; the first that a set has is taken.
CLASSES: dict[str, tuple[str, ...]] = {
    "dog": ("dog-face", "dog"),
    "cat": ("cat-face", "cat"),
    "lion": ("lion",),
    "fox": ("fox",),
    "tiger": ("tiger-face", "tiger"),
    "bear": ("bear",),
    "panda": ("panda",),
    "koala": ("koala",),
    "rabbit": ("rabbit-face",),
    "mouse": ("mouse-face",),
    "pig": ("pig-face",),
    "cow": ("cow-face",),
    "frog": ("frog",),
    "monkey": ("monkey-face",),
    "chicken": ("chicken",),
    "penguin": ("penguin",),
    "duck": ("duck",),
    "turtle": ("turtle",),
    "fish": ("fish",),
    "whale": ("whale",),
    "snail": ("snail",),
    "butterfly": ("butterfly",),
    "ladybug": ("lady-beetle",),
    "bee": ("honeybee",),
    "crab": ("crab",),
    "pizza": ("pizza",),
    "hamburger": ("hamburger",),
    "donut": ("doughnut",),
    "cupcake": ("cupcake",),
    "strawberry": ("strawberry",),
    "banana": ("banana",),
    "pineapple": ("pineapple",),
    "watermelon": ("watermelon",),
    "car": ("automobile",),
    "bus": ("bus",),
    "rocket": ("rocket",),
    "sailboat": ("sailboat",),
    "teapot": ("teapot",),
    "clock": ("alarm-clock",),
    "guitar": ("guitar",),
    "robot": ("robot",),
    "ghost": ("ghost",),
    "snowman": ("snowman",),
    "backpack": ("backpack",),
    "crown": ("crown",),
    "balloon": ("balloon",),
    "cactus": ("cactus",),
    "mushroom": ("mushroom",),
}
#: Drawings that carry a scene of their own, or are cut off: left out.
LEFT_OUT = {("fxemoji", "sailboat"), ("noto-v1", "koala"), ("emojione", "duck")}

#: colour word -> (hue in turns, saturation factor, lightness shift)
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.99, 1.0, 0.0),
    "orange": (0.075, 1.0, 0.02),
    "yellow": (0.145, 1.0, 0.08),
    "green": (0.35, 0.85, -0.04),
    "blue": (0.60, 1.0, 0.0),
    "purple": (0.76, 0.9, -0.02),
    "pink": (0.90, 0.9, 0.14),
    "gray": (0.0, 0.0, 0.0),
}
#: How the first thing lies to the second -> the middles of both, in sides from left and top.
RELATIONS: dict[str, tuple[tuple[float, float], tuple[float, float]]] = {
    "beside": ((0.26, 0.5), (0.74, 0.5)),  # the first stands on the left, as in the caption
    "under": ((0.5, 0.74), (0.5, 0.26)),
    "above": ((0.5, 0.26), (0.5, 0.74)),
}
VAGUE = "and"  # what a caption may say instead of the relation
ALONE, ONE_OF_TWO = (0.82, 0.86), (0.45, 0.48)  # least and most of the side that a drawing takes
PREFIXES = ("a", "a", "a", "a photo of a", "a picture of a")


@dataclass(frozen=True)
class Picture:
    """Describe what a composite shows; ``colour`` is None where the drawing keeps its own colours.

    ``odd`` is a seed of colours that no word names (:func:`odd_colours`), which captions omit.
    With a ``relation`` there is a second thing, in its own colours.
    """

    class_noun: str
    drawing: int
    colour: str | None
    scene: str
    odd: int | None = None
    relation: str | None = None
    second_noun: str | None = None
    second_drawing: int = 0

    @property
    def second(self) -> tuple[str, str] | None:
        """The relation and the second thing's noun, as :func:`caption` takes them."""
        if self.relation is None or self.second_noun is None:
            return None
        return self.relation, self.second_noun


def caption(
    class_noun: str,
    colour: str | None,
    scene: str | None,
    prefix: str = "a",
    second: tuple[str, str] | None = None,
) -> str:
    """Write a caption; ``second`` is a relation, or "and", and the noun of a second thing."""
    place = SCENES[scene] if scene else None
    words = [prefix, colour, class_noun, f"{second[0]} a {second[1]}" if second else None, place]
    return " ".join(word for word in words if word)


def random_caption(picture: Picture, rng: np.random.Generator) -> str:
    """Write a caption of the picture; one in eight leaves the scene out.

    Of two things, one caption in four does not say how they lie.
    """
    scene = None if rng.random() < 1 / 8 else picture.scene
    prefix = PREFIXES[rng.integers(len(PREFIXES))]
    second = picture.second
    if second and rng.random() < 1 / 4:
        second = (VAGUE, second[1])
    return caption(picture.class_noun, picture.colour, scene, prefix, second)


def recolour(drawing: np.ndarray, colour: str | None) -> np.ndarray:
    """RGBA uint8 [H, W, 4] in shades of one colour; lightness is kept, near-black stays."""
    if colour is None:
        return drawing
    hue, saturation, shift = COLOURS[colour]
    rgb = drawing[..., :3].astype(np.float32) / 255
    lightness = (rgb.max(-1) + rgb.min(-1)) / 2
    # Very light parts are pulled down so that the hue shows on white drawings too.
    lightness = np.clip(0.08 + 0.74 * lightness + shift * (lightness > 0.15), 0, 1)
    tint = np.array(colorsys.hls_to_rgb(hue, 0.5, 0.9 * saturation), np.float32)
    dark = tint * np.minimum(2 * lightness, 1)[..., None]
    tinted = dark + (1 - tint) * np.maximum(2 * lightness - 1, 0)[..., None]
    return np.concatenate([(255 * tinted).astype(np.uint8), drawing[..., 3:]], -1)


def odd_colours(drawing: np.ndarray, seed: int) -> np.ndarray:
    """Turn the hues of a drawing, RGBA uint8 [H, W, 4], or replace some of its colours.

    Of up to six colours, each stays or becomes any other, with its shades.
    """
    rng = np.random.default_rng(seed)
    rgb, alpha = drawing[..., :3], drawing[..., 3:]
    if rng.random() < 0.3:
        hsv = np.array(Image.fromarray(rgb).convert("HSV"))
        hsv[..., 0] += rng.integers(40, 216).astype(np.uint8)
        turned = np.asarray(Image.fromarray(hsv, "HSV").convert("RGB"))
    else:
        seen = Image.fromarray(rgb[alpha[..., 0] > 127][None])
        palette = seen.quantize(int(rng.integers(2, 7)), kmeans=1)
        of = np.asarray(Image.fromarray(rgb).quantize(palette=palette, dither=Image.Dither.NONE))
        means = np.array(palette.getpalette()[: 3 * 256], np.float32).reshape(-1, 3)
        moved = means.copy()
        # Outlines stay dark, and at least one other colour changes.
        change = (rng.random(len(means)) < 0.7) & (means.max(1) > 70)
        if not change.any():
            change = means.max(1) > 70
        moved[change] = rng.uniform(0, 255, (int(change.sum()), 3))
        turned = (rgb + (moved - means)[of]).clip(0, 255).astype(np.uint8)
    return np.concatenate([turned, alpha], -1)


def place(
    drawing: Image.Image,
    scene: Image.Image,
    rng: np.random.Generator,
    middle: tuple[float, float] = (0.5, 0.5),
    share: tuple[float, float] = ALONE,
) -> Image.Image:
    """Paste the drawing around ``middle``, at a ``share`` of the scene's side, never mirrored.

    A base of few parameters spends them on shapes when they come at one size, place and side: of
    drawings that are mirrored at random it draws the mean of both.
    """
    size = scene.width
    scale = rng.uniform(*share) * size / max(drawing.size)
    shape = (max(1, round(drawing.width * scale)), max(1, round(drawing.height * scale)))
    drawing = drawing.convert("RGBa").resize(shape, Image.Resampling.LANCZOS).convert("RGBA")
    left = middle[0] * size - shape[0] / 2 + rng.uniform(-0.015, 0.015) * size
    top = middle[1] * size - shape[1] / 2 + rng.uniform(-0.015, 0.015) * size
    picture = scene.copy()
    picture.paste(drawing, (round(left), round(top)), drawing)
    return picture


def render_all(folder: Path, drawing_set: str, size: int) -> dict[str, Image.Image]:
    """Fetch a set into ``folder`` and render its drawing of each class that it has, by noun."""
    path = drawings.fetch(drawing_set, folder)
    found = {}
    for class_noun, names in CLASSES.items():
        texts = (drawings.svg(path, name) for name in names)
        text = next((t for t in texts if t is not None), None)
        if text is not None and (drawing_set, class_noun) not in LEFT_OUT:
            found[class_noun] = drawings.render(text, size)
    return found


class World:
    """All drawings and scenes in memory; ``compose`` draws one picture of it.

    The drawings come from ``source``: a folder, where the sets are fetched and rendered, or a pack
    (:func:`drawings.write_pack`). Pictures have ``size`` pixels a side, and a ``pairs`` share of
    those at random has two things.
    """

    def __init__(
        self,
        source: Path,
        scenes_each: int = 200,
        seed: int = 0,
        sets: Iterable[str] = tuple(drawings.TRAINING_SETS),
        size: int = SIZE,
        pairs: float = 0.0,
    ):
        if source.is_file():
            found = drawings.read_pack(source, sets)
        else:
            found = {s: render_all(source, s, round(DRAWING_SIZE * size)) for s in sets}
        self.drawings: dict[str, list[Image.Image]] = {
            noun: [each[noun] for each in found.values() if noun in each] for noun in CLASSES
        }
        rng = np.random.default_rng(seed)
        self.scenes = {s: [draw_scene(s, rng, size) for _ in range(scenes_each)] for s in SCENES}
        self.size, self.pairs = size, pairs

    def random_picture(self, rng: np.random.Generator) -> Picture:
        """Class and scene uniformly, a drawing of the class, a colour in one of three."""
        class_noun = list(CLASSES)[rng.integers(len(CLASSES))]
        colour = list(COLOURS)[rng.integers(len(COLOURS))] if rng.random() < 1 / 3 else None
        drawing = int(rng.integers(len(self.drawings[class_noun])))
        scene = list(SCENES)[rng.integers(len(SCENES))]
        if not self.pairs or rng.random() >= self.pairs:
            return Picture(class_noun, drawing, colour, scene)
        other = rng.choice([noun for noun in CLASSES if noun != class_noun])
        return Picture(
            class_noun,
            drawing,
            colour,
            scene,
            relation=list(RELATIONS)[rng.integers(len(RELATIONS))],
            second_noun=str(other),
            second_drawing=int(rng.integers(len(self.drawings[other]))),
        )

    def compose(self, picture: Picture, rng: np.random.Generator) -> np.ndarray:
        """RGB uint8 [size, size, 3] of the picture, freshly placed on a random view."""
        drawing = np.asarray(self.drawings[picture.class_noun][picture.drawing])
        drawing = recolour(drawing, picture.colour)
        if picture.odd is not None:
            drawing = odd_colours(drawing, picture.odd)
        first = Image.fromarray(drawing, "RGBA")
        views = self.scenes[picture.scene]
        view = views[rng.integers(len(views))]
        if picture.second is None:
            return np.asarray(place(first, view, rng))
        relation, noun = picture.second
        second = self.drawings[noun][picture.second_drawing]
        for drawn, middle in zip((first, second), RELATIONS[relation], strict=True):
            view = place(drawn, view, rng, middle, ONE_OF_TWO)
        return np.asarray(view)

    def batch(self, count: int, rng: np.random.Generator) -> tuple[np.ndarray, list[Picture]]:
        pictures = [self.random_picture(rng) for _ in range(count)]
        return np.stack([self.compose(p, rng) for p in pictures]), pictures
