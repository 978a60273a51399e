"""The bundled subjects: held-out drawings in colours that no drawing of their class has."""

import re
from pathlib import Path

import numpy as np
from PIL import Image

from tools.toybox import drawings
from tools.toybox.world import CLASSES, draw_scene, odd_colours, place
from tools.toybox.world import SCENES as WORLD_SCENES

SET = "streamline-emojis"
SIDE = 256  # pixels
#: name -> (drawing, class noun, type, colour changes)
SUBJECTS = {
    "patch_dog": ("dog-face", "dog", "live", {
        "#debb7e": "#1f8fe0", "#f0d5a8": "#4db2f5", "#ff6196": "#f0f0f0"}),
    "candy_turtle": ("turtle", "turtle", "live", {
        "#46b000": "#e0218a", "#6dd627": "#ff5cb0", "#9ceb60": "#ff9bd0",
        "#c8ffa1": "#ffd84d", "#e4ffd1": "#ffeb99", "#ebcb00": "#ffffff"}),
    "moon_mushroom": ("mushroom", "mushroom", "object", {
        "#ff6242": "#2b2f8f", "#ff866e": "#4a50c4", "#fff48c": "#7dffb0", "#fffacf": "#c2ffdb"}),
}  # fmt: skip
SCENES = ("grass", "beach", "table", "city", "snow")
STUDY_PHOTOS = Path("docs/studies/subjects")
#: Twelve more for the studies, half of them of a set that nothing here has seen:
#: name -> (drawing set, class noun, type, seed of its odd colours)
STUDY_SUBJECTS = {
    "moss_cat": (SET, "cat", "live", 101),
    "lime_monkey": (SET, "monkey", "live", 101),
    "blue_chicken": (SET, "chicken", "live", 102),
    "slate_snail": (SET, "snail", "live", 102),
    "azure_car": (SET, "car", "object", 102),
    "violet_crown": (SET, "crown", "object", 102),
    "ice_fox": ("openmoji", "fox", "live", 102),
    "plum_frog": ("openmoji", "frog", "live", 102),
    "neon_duck": ("openmoji", "duck", "live", 101),
    "green_rocket": ("openmoji", "rocket", "object", 101),
    "night_hamburger": ("openmoji", "hamburger", "object", 102),
    "sky_strawberry": ("openmoji", "strawberry", "object", 102),
}

HEADER = """The bundled subjects, in the folder layout of the DreamBooth dataset.
Drawings: {credit}, {licence}; recoloured and set on drawn scenes here.

Classes
subject_name,class,type
"""


def draw_subject(name: str, folder: Path) -> None:
    """Write five pictures of one subject, each in another scene, to ``folder/name``."""
    drawing, _, _, colours = SUBJECTS[name]
    text = drawings.svg(drawings.fetch(SET, Path("build/drawings")), drawing)
    assert text is not None
    for old, new in colours.items():
        text = text.replace(old, new)
    draw_photos(
        drawings.render(without_shadow(text), SIDE), list(SUBJECTS).index(name), folder / name
    )


def draw_study_subject(name: str, folder: Path) -> None:
    """Write five pictures of one of :data:`STUDY_SUBJECTS` to ``folder/name``."""
    drawing_set, noun, _, seed = STUDY_SUBJECTS[name]
    path = drawings.fetch(drawing_set, Path("build/drawings"))
    texts = (drawings.svg(path, drawing) for drawing in CLASSES[noun])
    text = next(text for text in texts if text is not None)
    drawing = np.asarray(drawings.render(without_shadow(text), SIDE))
    number = len(SUBJECTS) + list(STUDY_SUBJECTS).index(name)
    draw_photos(Image.fromarray(odd_colours(drawing, seed)), number, folder / name)


def without_shadow(svg: str) -> str:
    """Return a drawing without the soft shadow that it stands on, which would float in scenes."""
    return re.sub(r'<(ellipse|path)[^>]*fill="#45413c"[^>]*opacity="\.15"[^>]*/>', "", svg)


def draw_photos(drawing: Image.Image, number: int, folder: Path) -> None:
    """Set a drawing on five scenes, by seeds of its ``number``, and write them to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, scene in enumerate(SCENES):
        rng = np.random.default_rng((10, number, index))
        place(drawing, draw_scene(scene, rng, SIDE), rng).save(folder / f"{index:02d}.png")


def build(folder: Path) -> None:
    for name in SUBJECTS:
        draw_subject(name, folder)
    _, credit, licence = drawings.HELD_OUT_SETS[SET]
    rows = [f"{name},{noun},{kind}" for name, (_, noun, kind, _) in SUBJECTS.items()]
    text = HEADER.format(credit=credit, licence=licence) + "\n".join(rows) + "\n"
    prompts = [f"a {{0}} {{1}} {scene}" for scene in WORLD_SCENES.values()]
    prompts += ["a red {0} {1}", "a purple {0} {1}"]
    lines = ",\n".join(f"'{prompt}'.format(unique_token, class_token)" for prompt in prompts)
    for kind in ("Object", "Live Subject"):
        text += f"\n{kind} Prompts\n\nprompt_list = [\n{lines}\n]\n"
    (folder / "prompts_and_classes.txt").write_text(text)
