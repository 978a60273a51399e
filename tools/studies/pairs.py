"""Have pairs of a bank's images judged, and compare the measures with the answers.

DATA/pairs.json     what was asked and answered: for each pair the subject, where both images come
                    from, their digests, and both passes' answers
DATA/images.png     the images, tiles of 64 pixels in rows of 32, in the order of the digests

A pair shows two images of one prompt and seed, from two checkpoints, under the subject's photos:
which of them shows more clearly the subject, whatever is around it? And of each: is it the subject
(2), partly (1) or not (0)? The second pass has another order, other pages and other sides.
"""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from PIL import Image

from dreambooth_lib.core.files import replace_file, save_png
from dreambooth_lib.core.subject import Subject
from dreambooth_lib.data.images import read_photos
from dreambooth_lib.figures.image_grids import HEADING, MARGIN, TEXT, Layout, line_height
from dreambooth_lib.metrics.encoders import Encoder
from dreambooth_lib.training.best_checkpoint import select_best, sound_likeness
from dreambooth_lib.training.verdict import LEARNT, PARTLY_LEARNT
from tools.studies import bank
from tools.studies.trust import LAST_BY_DEFAULT, Cell, Rows, up_to

DATA = Path("docs/studies/judged")
TILE, ACROSS = 64, 32  # pixels of an image's side; images in a row of the file
A_PAGE = 10  # pairs on a page
PASSES = 2
FEWEST = 3  # judged images of a checkpoint, to say what it shows
RUNS_OWN = ("validation", "again")  # the plans that could be a run's own


@dataclass
class Pair:
    """Two images of one prompt and seed, and what was said of them."""

    subject: str
    images: tuple[str, str]  #: digests of the pixels
    cells: tuple[str, str]  #: where they come from: KIND/seed/step of the bank
    index: int  #: which of the images of the bank's exhaustive plan
    better: list[str] = field(default_factory=list)  #: a pass each: "first", "second" or "alike"
    shown: list[tuple[int, int]] = field(default_factory=list)  #: a pass each: 0, 1 or 2 of both


def digest(image: Image.Image) -> str:
    """Return the sha256 of an image's pixels, 16 hexadecimal digits."""
    return hashlib.sha256(np.asarray(image.convert("RGB")).tobytes()).hexdigest()[:16]


def sample(folder: Path, count: int, seed: int = 0) -> tuple[list[Pair], dict[str, Image.Image]]:
    """Draw pairs at random from a bank: as many of each subject, two checkpoints of any kind."""
    rng = np.random.default_rng(seed)
    subjects = bank.subjects()
    images: dict[str, Image.Image] = {}
    pairs = []
    for number in range(count):
        subject = list(subjects.values())[number % len(subjects)]
        files = sorted(folder.glob(f"*/{subject.name}/**/*.npz"))
        index = None
        for _ in range(1000):
            one, two = (files[i] for i in rng.choice(len(files), 2, replace=False))
            drawn = [bank.load(file, subject)["exhaustive"].subject for file in (one, two)]
            index = int(rng.integers(len(drawn[0])))
            both = [own[index] for own in drawn]
            if digest(both[0]) != digest(both[1]):
                break
        images |= {digest(image): image for image in both}
        cells = tuple(file.relative_to(folder).with_suffix("").as_posix() for file in (one, two))
        pairs.append(Pair(subject.name, (digest(both[0]), digest(both[1])), cells, index))
    return pairs, images


def write(pairs: Sequence[Pair], images: Mapping[str, Image.Image], folder: Path = DATA) -> None:
    """Write the pairs and their images."""
    sheet = Image.new("RGB", (ACROSS * TILE, -(-len(images) // ACROSS) * TILE))
    for number, image in enumerate(images.values()):
        sheet.paste(image, (number % ACROSS * TILE, number // ACROSS * TILE))
    folder.mkdir(parents=True, exist_ok=True)
    save_png(sheet, folder / "images.png")
    content = {"digests": list(images), "pairs": [asdict(pair) for pair in pairs]}
    replace_file(folder / "pairs.json", json.dumps(content, indent=1).encode())


def read(folder: Path = DATA) -> tuple[list[Pair], dict[str, Image.Image]]:
    """Read the pairs and their images, by digest. Raises ``ValueError`` for one that changed."""
    content = json.loads((folder / "pairs.json").read_text())
    sheet = Image.open(folder / "images.png").convert("RGB")
    images = {}
    for number, expected in enumerate(content["digests"]):
        left, top = number % ACROSS * TILE, number // ACROSS * TILE
        image = sheet.crop((left, top, left + TILE, top + TILE))
        if digest(image) != expected:
            raise ValueError(f"image {number} of {folder / 'images.png'} is not {expected}.")
        images[expected] = image
    pairs = [Pair(**pair) for pair in content["pairs"]]
    return pairs, images


# Asking


def pages(
    pairs: Sequence[Pair], subjects: Mapping[str, Subject], images: Mapping[str, Image.Image],
    number: int,
) -> Iterator[tuple[Image.Image, list[dict[str, Any]]]]:  # fmt: skip
    """Yield the pages of a pass, and of each pair on it its number and whether sides are changed.

    Every page is of one subject, its photos above.
    """
    rng = np.random.default_rng((number, 17))
    order = rng.permutation(len(pairs))
    by_subject: dict[str, list[int]] = {}
    for index in order:
        by_subject.setdefault(pairs[index].subject, []).append(int(index))
    parts = [
        own[start : start + A_PAGE]
        for own in by_subject.values()
        for start in range(0, len(own), A_PAGE)
    ]
    for at in rng.permutation(len(parts)):
        asked = [{"pair": index, "swapped": bool(rng.random() < 0.5)} for index in parts[at]]
        subject = subjects[pairs[parts[at][0]].subject]
        yield _page(subject, asked, pairs, images), asked


def _page(
    subject: Subject, asked: list[dict[str, Any]], pairs: Sequence[Pair],
    images: Mapping[str, Image.Image],
) -> Image.Image:  # fmt: skip
    photos = [photo.image.resize((128, 128), Image.Resampling.LANCZOS)
              for photo in read_photos(subject.photos)]  # fmt: skip
    layout = Layout(photos)
    side, gap, column = layout.side, 8, 3 * layout.side
    layout.text(MARGIN, MARGIN, f"The subject: one {subject.class_noun}", HEADING)
    y = MARGIN + line_height(HEADING) + gap
    y = layout.images(MARGIN, y, photos, len(photos)) + MARGIN
    for place, one in enumerate(asked):
        both = [images[own].resize((side, side), Image.Resampling.LANCZOS)
                for own in pairs[one["pair"]].images]  # fmt: skip
        x, top = MARGIN + place % 2 * column, y + place // 2 * (side + MARGIN)
        layout.text(x, top + side / 2, f"{place + 1}", HEADING, anchor="lm", bold=True)
        layout.images(x + 40, top, both[:: -1 if one["swapped"] else 1], 2)
    height = y + -(-len(asked) // 2) * (side + MARGIN)
    layout.text(MARGIN, height, "left is A, right is B", TEXT)
    return layout.render(MARGIN + 2 * column, height + MARGIN + line_height(TEXT))


def ask(folder: Path = DATA, out: Path = Path("outputs/judging")) -> None:
    """Write the pages of both passes, and what is on them, to ``out/pass-1`` and ``out/pass-2``."""
    pairs, images = read(folder)
    subjects = bank.subjects()
    for number in range(1, PASSES + 1):
        place, keys = out / f"pass-{number}", []
        place.mkdir(parents=True, exist_ok=True)
        for page, (image, asked) in enumerate(pages(pairs, subjects, images, number), 1):
            save_png(image, place / f"{page:02d}.png")
            keys.append(asked)
        replace_file(out / f"pass-{number}.json", json.dumps(keys).encode())


def take(number: int, folder: Path = DATA, out: Path = Path("outputs/judging")) -> None:
    """Take a pass's answers from ``out/pass-1.txt`` into the pairs.

    A line for each pair: page, number on the page, A, B or =, and 0, 1 or 2 of A and of B. Raises
    ``ValueError`` for a pair with no answer or with two.
    """
    pairs, images = read(folder)
    keys = json.loads((out / f"pass-{number}.json").read_text())
    found: dict[int, tuple[str, tuple[int, int]]] = {}
    for line in (out / f"pass-{number}.txt").read_text().splitlines():
        if not line.strip():
            continue
        page, place, better, *levels = line.split()
        key, (a, b) = keys[int(page) - 1][int(place) - 1], map(int, levels)
        word = {"A": "first", "B": "second", "=": "alike"}[better]
        if key["swapped"]:
            a, b = b, a
            word = {"first": "second", "second": "first"}.get(word, word)
        if key["pair"] in found or not {a, b} <= {0, 1, 2}:
            raise ValueError(f"'{line}' is asked twice or has a level that is not 0, 1 or 2.")
        found[key["pair"]] = word, (a, b)
    if missing := set(range(len(pairs))) - found.keys():
        raise ValueError(f"{len(missing)} pairs have no answer, such as {min(missing)}.")
    for index, pair in enumerate(pairs):
        word, shown = found[index]
        pair.better[number - 1 :] = [word]
        pair.shown[number - 1 :] = [shown]
    write(pairs, images, folder)


# Comparing


def agreement(scorer: Encoder, rows: Rows, folder: Path = DATA) -> list[str]:
    """Return tables of how far ranking, verdict and choice agree with what was judged.

    The ranking is of the pairs' images, by likeness, where both passes said which is better; of two
    steps of one run it is compared with the order of the steps. The verdict is a checkpoint's, by
    the images that its run drew (``rows``, of :mod:`trust`), beside the mean of what both passes
    said of ``FEWEST`` of its other images or more.
    """
    pairs, images = read(folder)
    ranked, by_likeness, by_step = Counter[bool](), Counter[bool](), Counter[bool]()
    for name, subject in bank.subjects().items():
        own = [pair for pair in pairs if pair.subject == name]
        if not own:
            continue
        photos = scorer.embed_images([photo.image for photo in read_photos(subject.photos)])
        embedded = scorer.embed_images([images[d] for pair in own for d in pair.images])
        likeness = (embedded @ photos.T).mean(1).view(-1, 2).tolist()
        for pair, (one, two) in zip(own, likeness, strict=True):
            if len(set(pair.better)) > 1 or pair.better[0] == "alike":
                continue
            first = pair.better[0] == "first"
            ranked[(one > two) == first] += 1
            (run, step), (other, later) = (cell.rsplit("/", 1) for cell in pair.cells)
            if run == other and step != later:
                by_likeness[(one > two) == first] += 1
                by_step[(step > later) == first] += 1
    said = _levels(pairs)
    words = _words(said, rows)
    right = sum(count for (judged, found), count in words.items() if judged == found)
    opposite = words[0, 2] + words[2, 0]
    total = words.total()
    most = max(sum(words[judged, found] for found in range(3)) for judged in range(3))
    chosen = _levels_of_chosen(said, rows)
    shown = sum(level >= 1.5 for level in chosen)
    names = ("no", "partly", "yes")
    table = {
        "which image is more like the subject": (ranked[True], ranked.total(), "pairs"),
        "which of two steps of a run": (by_likeness[True], by_likeness.total(), "pairs"),
        "the same, the later step": (by_step[True], by_step.total(), "pairs"),
        "learnt: yes, partly or no": (right, total, "validations"),
        "the same, if every verdict were the commonest": (most, total, "validations"),
        "never yes for no or no for yes": (total - opposite, total, "validations"),
        f"a chosen step is the subject (the lowest has {min(chosen, default=0):.2f} of 2)": (
            shown, len(chosen), "choices"),
    }  # fmt: skip
    return [
        "| | judged | agree |",
        "|---|---|---|",
        *(f"| {name} | {count} {what} | {agree / max(1, count):.1%} |"
          for name, (agree, count, what) in table.items()),
        "",
        "| judged \\ verdict | no | partly | yes |",
        "|---|---|---|---|",
        *(f"| {name} | {' | '.join(str(words[judged, found]) for found in range(3))} |"
          for judged, name in enumerate(names)),
    ]  # fmt: skip


def _levels(pairs: Sequence[Pair]) -> dict[str, float]:
    """Return the mean of what was said of a checkpoint's images, where there are enough of them."""
    said = defaultdict[str, list[int]](list)
    for pair in pairs:
        for cell, levels in zip(pair.cells, zip(*pair.shown, strict=True), strict=True):
            said[cell] += levels
    return {cell: fmean(all_) for cell, all_ in said.items() if len(all_) >= PASSES * FEWEST}


def _words(said: Mapping[str, float], rows: Rows) -> Counter[tuple[int, int]]:
    """Count the validations by what was judged and by what the verdict says, each 0, 1 or 2."""
    words = Counter[tuple[int, int]]()
    for plan in RUNS_OWN:
        for cell, results in rows[plan].items():
            for at, result in enumerate(results):
                if at and (level := said.get(_name(cell, result.step))) is not None:
                    likeness = sound_likeness(results, at)
                    found = 2 if likeness >= LEARNT else 1 if likeness >= PARTLY_LEARNT else 0
                    words[round(level), found] += 1
    return words


def _levels_of_chosen(said: Mapping[str, float], rows: Rows) -> list[float]:
    """Return what was said of the steps that runs chose, by either set of validation images."""
    chosen = [
        _name(cell, select_best(up_to(results, last)).step)
        for plan in RUNS_OWN
        for cell, results in rows[plan].items()
        for last in sorted({LAST_BY_DEFAULT, results[-1].step})
    ]
    return [said[name] for name in chosen if name in said]


def _name(cell: Cell, step: int) -> str:
    return f"{cell.kind}/{cell.subject}/seed{cell.seed}/{step:06d}"
