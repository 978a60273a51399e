"""The ten scenes: their words, and how a view of each is drawn."""

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

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
