"""The toy world: one recoloured drawing on one drawn scene, with a compositional caption.

``a purple teapot on the beach``: 48 classes with up to seven drawings each, 10 scenes, 8 colours.
"""

import colorsys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from tools.toybox import drawings

SIZE = 64  # pixels, the side of a picture
DRAWING_SIZE = 96  # pixels, the side at which drawings are kept before they are placed

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

SCENES: dict[str, str] = {
    "beach": "on the beach",
    "snow": "in the snow",
    "grass": "on the grass",
    "desert": "in the desert",
    "ocean": "in the ocean",
    "space": "in space",
    "forest": "in the forest",
    "sunset": "at sunset",
    "table": "on a wooden table",
    "city": "in the city",
}
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
PREFIXES = ("a", "a", "a", "a photo of a", "a picture of a")


@dataclass(frozen=True)
class Picture:
    """Describe what a composite shows; ``colour`` is None where the drawing keeps its own colours.

    ``odd`` is a seed of colours that no word names (:func:`odd_colours`), which captions omit.
    """

    class_noun: str
    drawing: int
    colour: str | None
    scene: str
    odd: int | None = None


def caption(class_noun: str, colour: str | None, scene: str | None, prefix: str = "a") -> str:
    words = [prefix, colour, class_noun, SCENES[scene] if scene else None]
    return " ".join(word for word in words if word)


def random_caption(picture: Picture, rng: np.random.Generator) -> str:
    """Write a caption of the picture; one in eight leaves the scene out."""
    scene = None if rng.random() < 1 / 8 else picture.scene
    prefix = PREFIXES[rng.integers(len(PREFIXES))]
    return caption(picture.class_noun, picture.colour, scene, prefix)


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


def _gradient(size: int, *stops: tuple[float, tuple[int, int, int]]) -> Image.Image:
    at = np.linspace(0, 1, size)
    rows = [np.interp(at, [s[0] for s in stops], [s[1][c] for s in stops]) for c in range(3)]
    column = np.stack(rows, -1)[:, None].repeat(size, 1)
    return Image.fromarray(column.astype(np.uint8))


def draw_scene(scene: str, rng: np.random.Generator, size: int) -> Image.Image:
    """Draw one view of a scene, RGB [size, size], drawn at twice the size and reduced."""
    n = 2 * size
    lift = rng.uniform(-0.06, 0.06)  # of the horizon

    def y(fraction: float) -> float:
        return (fraction + lift) * n

    def dots(draw: ImageDraw.ImageDraw, count: int, top: float, low: float, high: float, fill):
        for _ in range(count):
            px, py, r = rng.uniform(0, n), rng.uniform(top * n, n), rng.uniform(low, high) * n
            draw.ellipse((px - r, py - r, px + r, py + r), fill=fill)

    if scene == "beach":
        picture = _gradient(n, (0, (120, 200, 245)), (1, (190, 230, 250)))
        draw = ImageDraw.Draw(picture)
        draw.rectangle((0, y(0.40), n, y(0.62)), fill=(35, 140, 190))
        draw.rectangle((0, y(0.60), n, n), fill=(240, 214, 150))
        draw.rectangle((0, y(0.59), n, y(0.62)), fill=(245, 250, 250))
    elif scene == "snow":
        picture = _gradient(n, (0, (175, 195, 215)), (1, (215, 225, 235)))
        draw = ImageDraw.Draw(picture)
        draw.ellipse((-0.4 * n, y(0.55), 1.4 * n, n * 1.8), fill=(248, 251, 255))
        dots(draw, 26, 0.0, 0.008, 0.018, (255, 255, 255))
    elif scene == "grass":
        picture = _gradient(n, (0, (130, 205, 250)), (0.6, (205, 235, 250)), (1, (205, 235, 250)))
        draw = ImageDraw.Draw(picture)
        draw.rectangle((0, y(0.5), n, n), fill=(95, 185, 70))
        dots(draw, 8, 0.68, 0.012, 0.018, (250, 230, 90))
    elif scene == "desert":
        picture = _gradient(n, (0, (250, 205, 130)), (0.6, (253, 232, 185)), (1, (253, 232, 185)))
        draw = ImageDraw.Draw(picture)
        shift = rng.uniform(-0.3, 0.3) * n
        draw.ellipse((-0.7 * n + shift, y(0.50), 0.8 * n + shift, 1.6 * n), fill=(224, 160, 85))
        draw.ellipse((0.1 * n + shift, y(0.62), 1.8 * n + shift, 1.6 * n), fill=(205, 135, 65))
    elif scene == "ocean":
        picture = _gradient(n, (0, (40, 165, 205)), (1, (5, 50, 115)))
        draw = ImageDraw.Draw(picture)
        for _ in range(9):
            px, py, r = rng.uniform(0, n), rng.uniform(0, n), rng.uniform(0.015, 0.035) * n
            edge = max(1, n // 64)
            draw.ellipse((px - r, py - r, px + r, py + r), outline=(190, 235, 250), width=edge)
    elif scene == "space":
        picture = _gradient(n, (0, (12, 10, 40)), (1, (35, 15, 65)))
        draw = ImageDraw.Draw(picture)
        dots(draw, 40, 0.0, 0.004, 0.013, (255, 255, 235))
    elif scene == "forest":
        picture = _gradient(n, (0, (60, 110, 75)), (1, (30, 70, 45)))
        draw = ImageDraw.Draw(picture)
        shift = rng.uniform(0, 0.2)
        for i in range(7):
            px, half = (i / 5 - shift) * n, 0.035 * n
            draw.rectangle((px - half, 0, px + half, n), fill=(85, 60, 40))
        draw.rectangle((0, y(0.78), n, n), fill=(60, 95, 40))
    elif scene == "sunset":
        picture = _gradient(n, (0, (95, 45, 120)), (0.35, (235, 95, 85)), (0.62, (255, 190, 90)),
                            (1, (255, 190, 90)))  # fmt: skip
        draw = ImageDraw.Draw(picture)
        px = rng.uniform(0.15, 0.85) * n
        draw.ellipse((px - 0.14 * n, y(0.44), px + 0.14 * n, y(0.72)), fill=(255, 240, 150))
        draw.rectangle((0, y(0.66), n, n), fill=(70, 35, 75))
    elif scene == "table":
        picture = _gradient(n, (0, (240, 230, 215)), (1, (225, 212, 195)))
        draw = ImageDraw.Draw(picture)
        draw.rectangle((0, y(0.52), n, n), fill=(150, 95, 50))
        for i in range(4):
            at = y(0.52) + (i / 4) * (n - y(0.52))
            draw.line((0, at, n, at), fill=(115, 70, 35), width=max(1, n // 48))
    elif scene == "city":
        picture = _gradient(n, (0, (150, 185, 215)), (1, (205, 220, 230)))
        draw = ImageDraw.Draw(picture)
        px = -0.05 * n
        while px < n:
            wide, top = rng.uniform(0.14, 0.24) * n, y(rng.uniform(0.12, 0.4))
            shade = int(rng.integers(95, 140))
            draw.rectangle((px, top, px + wide, y(0.8)), fill=(shade, shade, shade + 15))
            for wy in np.arange(top + 0.04 * n, y(0.76), 0.09 * n):
                for wx in np.arange(px + 0.03 * n, px + wide - 0.05 * n, 0.07 * n):
                    window = (wx, wy, wx + 0.03 * n, wy + 0.04 * n)
                    draw.rectangle(window, fill=(250, 235, 150))
            px += wide + 0.015 * n
        draw.rectangle((0, y(0.8), n, n), fill=(75, 75, 80))
    else:
        raise ValueError(f"unknown scene '{scene}'; the world has {', '.join(SCENES)}.")
    picture = picture.filter(ImageFilter.GaussianBlur(n / 256))
    return picture.resize((size, size), Image.Resampling.LANCZOS)


def place(drawing: Image.Image, scene: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Paste the drawing in the middle of the scene, at 82-86% of its side, never mirrored.

    A base of few parameters spends them on shapes when they come at one size, place and side: of
    drawings that are mirrored at random it draws the mean of both.
    """
    size = scene.width
    scale = rng.uniform(0.82, 0.86) * size / max(drawing.size)
    shape = (max(1, round(drawing.width * scale)), max(1, round(drawing.height * scale)))
    drawing = drawing.convert("RGBa").resize(shape, Image.Resampling.LANCZOS).convert("RGBA")
    left = (size - shape[0]) / 2 + rng.uniform(-0.015, 0.015) * size
    top = (size - shape[1]) / 2 + rng.uniform(-0.015, 0.015) * size
    picture = scene.copy()
    picture.paste(drawing, (round(left), round(top)), drawing)
    return picture


class World:
    """All drawings and scenes in memory; ``compose`` draws one picture of it."""

    def __init__(
        self,
        folder: Path,
        scenes_each: int = 200,
        seed: int = 0,
        sets: Iterable[str] = tuple(drawings.TRAINING_SETS),
    ):
        self.drawings: dict[str, list[Image.Image]] = {}
        for class_noun, names in CLASSES.items():
            found = []
            for drawing_set in sets:
                if (drawing_set, class_noun) in LEFT_OUT:
                    continue
                path = drawings.fetch(drawing_set, folder)
                texts = (drawings.svg(path, name) for name in names)
                text = next((t for t in texts if t is not None), None)
                if text is not None:
                    found.append(drawings.render(text, DRAWING_SIZE))
            self.drawings[class_noun] = found
        rng = np.random.default_rng(seed)
        self.scenes = {s: [draw_scene(s, rng, SIZE) for _ in range(scenes_each)] for s in SCENES}

    def random_picture(self, rng: np.random.Generator) -> Picture:
        """Class and scene uniformly, a drawing of the class, a colour in one of three."""
        class_noun = list(CLASSES)[rng.integers(len(CLASSES))]
        colour = list(COLOURS)[rng.integers(len(COLOURS))] if rng.random() < 1 / 3 else None
        drawing = int(rng.integers(len(self.drawings[class_noun])))
        return Picture(class_noun, drawing, colour, list(SCENES)[rng.integers(len(SCENES))])

    def compose(self, picture: Picture, rng: np.random.Generator) -> np.ndarray:
        """RGB uint8 [64, 64, 3] of the picture, freshly placed on a random view of its scene."""
        drawing = np.asarray(self.drawings[picture.class_noun][picture.drawing])
        drawing = recolour(drawing, picture.colour)
        if picture.odd is not None:
            drawing = odd_colours(drawing, picture.odd)
        drawing = Image.fromarray(drawing, "RGBA")
        views = self.scenes[picture.scene]
        return np.asarray(place(drawing, views[rng.integers(len(views))], rng))

    def batch(self, count: int, rng: np.random.Generator) -> tuple[np.ndarray, list[Picture]]:
        pictures = [self.random_picture(rng) for _ in range(count)]
        return np.stack([self.compose(p, rng) for p in pictures]), pictures
