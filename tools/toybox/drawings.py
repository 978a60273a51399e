"""Emoji drawings from their registry packages: fetch, read, render to RGBA, pack.

Each drawing set is an npm package whose ``icons.json`` holds every drawing as an SVG body.
"""

import io
import json
import subprocess
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path

from PIL import Image

#: Drawing sets the base is trained on -> (package version, credit, licence).
TRAINING_SETS = {
    "noto": ("1.2.9", "Google Inc (Noto Emoji)", "Apache-2.0"),
    "noto-v1": ("1.2.5", "Google Inc (Noto Emoji, first series)", "Apache-2.0"),
    "twemoji": ("1.2.5", "Twitter, Inc and other contributors (Twemoji)", "CC-BY-4.0"),
    "fluent-emoji": ("1.2.7", "Microsoft Corporation (Fluent Emoji)", "MIT"),
    "fluent-emoji-flat": ("1.2.6", "Microsoft Corporation (Fluent Emoji)", "MIT"),
    "emojione": ("1.2.3", "Emoji One (EmojiTwo)", "CC-BY-4.0"),
    "fxemoji": ("1.2.2", "Mozilla (FxEmojis)", "Apache-2.0"),
}
#: Drawing sets that the base never sees; the bundled subjects come from here.
HELD_OUT_SETS = {
    "streamline-emojis": ("1.2.4", "Streamline (Streamline Emojis)", "CC-BY-4.0"),
}
#: Drawing sets that no model here has seen, the judge neither: for studies.
UNSEEN_SETS = {
    "openmoji": ("1.2.29", "HfG Schwäbisch Gmünd (OpenMoji)", "CC-BY-SA-4.0"),
}
EVERY_SET = TRAINING_SETS | HELD_OUT_SETS  #: what a judge learns from
PACK_LIMIT = 10 * 10**6  # bytes, of a pack and of what is read from one


def fetch(drawing_set: str, folder: Path) -> Path:
    """Bring one drawing set's ``icons.json`` into ``folder`` and return its path."""
    target = folder / f"{drawing_set}.json"
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    version = (EVERY_SET | UNSEEN_SETS)[drawing_set][0]
    with tempfile.TemporaryDirectory() as scratch:
        package = f"@iconify-json/{drawing_set}@{version}"
        subprocess.run(["npm", "pack", "--silent", package], cwd=scratch, check=True)
        (archive,) = Path(scratch).glob("*.tgz")
        with tarfile.open(archive) as tar:
            member = tar.extractfile("package/icons.json")
            assert member is not None
            partial = target.with_suffix(".partial")
            partial.write_bytes(member.read())
    partial.rename(target)
    return target


@cache
def read_set(path: Path) -> dict:
    return json.loads(path.read_text())


def svg(path: Path, name: str) -> str | None:
    """Return the SVG text of one drawing, following aliases; None where the set lacks it."""
    icons = read_set(path)
    alias = icons.get("aliases", {}).get(name)
    if alias is not None:
        name = alias["parent"]
    if name not in icons["icons"]:
        return None
    icon = icons["icons"][name]
    left, top = icon.get("left", 0), icon.get("top", 0)
    width = icon.get("width", icons.get("width", 16))
    height = icon.get("height", icons.get("height", 16))
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'
    )


def render(svg_text: str, size: int) -> Image.Image:
    """RGBA of the drawing's own extent, its longer side ``size`` pixels."""
    import resvg_py  # here, as the world's words are read where nothing is drawn

    png = bytes(resvg_py.svg_to_bytes(svg_string=svg_text, width=2 * size, height=2 * size))
    picture = Image.open(io.BytesIO(png)).convert("RGBA")
    box = picture.getchannel("A").point(lambda a: 255 * (a > 8)).getbbox()
    picture = picture.crop(box)
    scale = size / max(picture.size)
    shape = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.convert("RGBa").resize(shape, Image.Resampling.LANCZOS).convert("RGBA")


def credits(sets: Iterable[str] = EVERY_SET) -> str:
    """Return a Markdown list of the sets, whose they are, and their licences."""
    lines = [
        f"- {name} {version}: {credit}, {licence}"
        for name, (version, credit, licence) in EVERY_SET.items()
        if name in set(sets)
    ]
    return "\n".join(lines)


def write_pack(file: Path, rendered: Mapping[str, Mapping[str, Image.Image]]) -> None:
    """Write drawings by set and noun, with their licences, to one zip for a bare machine.

    Raises ``ValueError`` for more than :data:`PACK_LIMIT` bytes, and writes nothing then.
    """
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("LICENCES.md", f"{credits(rendered)}\n\nRendered and cropped.\n")
        for drawing_set, pictures in rendered.items():
            for noun, picture in pictures.items():
                png = io.BytesIO()
                picture.save(png, "PNG", optimize=True)
                archive.writestr(f"{drawing_set}/{noun}.png", png.getvalue())
    if len(packed.getvalue()) > PACK_LIMIT:
        raise ValueError(f"the pack has {len(packed.getvalue())} bytes, more than {PACK_LIMIT}.")
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(file.name + ".partial")
    partial.write_bytes(packed.getvalue())
    partial.rename(file)


def read_pack(file: Path, sets: Iterable[str]) -> dict[str, dict[str, Image.Image]]:
    """Return RGBA drawings by set and noun. Raises ``ValueError`` where the pack lacks a set."""
    found: dict[str, dict[str, Image.Image]] = {name: {} for name in sets}
    with zipfile.ZipFile(file) as archive:
        if sum(member.file_size for member in archive.infolist()) > PACK_LIMIT:
            raise ValueError(f"{file} holds more than {PACK_LIMIT} bytes.")
        for member in archive.namelist():
            drawing_set, _, name = member.partition("/")
            if drawing_set in found and name.endswith(".png"):
                with Image.open(io.BytesIO(archive.read(member))) as picture:
                    found[drawing_set][name.removesuffix(".png")] = picture.convert("RGBA")
    if missing := [name for name, pictures in found.items() if not pictures]:
        raise ValueError(f"{file} lacks the drawings of {', '.join(missing)}; pack it anew.")
    return found
