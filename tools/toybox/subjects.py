"""The bundled subjects: held-out drawings in colours that no drawing of their class has."""

import re
from pathlib import Path

import numpy as np

from tools.toybox import drawings
from tools.toybox.world import SCENES as WORLD_SCENES
from tools.toybox.world import draw_scene, place

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
    # The drawings stand on a soft shadow, which would float in most scenes.
    text = re.sub(r'<(ellipse|path)[^>]*fill="#45413c"[^>]*opacity="\.15"[^>]*/>', "", text)
    picture = drawings.render(text, SIDE)
    (folder / name).mkdir(parents=True, exist_ok=True)
    for number, scene in enumerate(SCENES):
        rng = np.random.default_rng((10, list(SUBJECTS).index(name), number))
        place(picture, draw_scene(scene, rng, SIDE), rng).save(folder / name / f"{number:02d}.png")


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
