"""Judge images by a vision-language model, and keep its answers.

CACHE/<digest>.json    one question, its answers, and the score that they gave: 0 to 4, or null

A file's digest is that of all that the answers depend on: the question's words and images, the
rubric's version, the model and its settings. Each answer is written before the next question, so
that an evaluation that was killed asks nothing twice. To ask again where a score is null, delete
its file.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Event, Lock
from typing import Any, Protocol

from PIL import Image, ImageOps
from tqdm.auto import tqdm

from dreambooth_lib.core.checked_json import read_object, write_object
from dreambooth_lib.core.files import open_image
from dreambooth_lib.data.images import Images, read_photos
from dreambooth_lib.evaluation import rubric
from dreambooth_lib.evaluation.measures import ImageFiles, Values
from dreambooth_lib.evaluation.rubric import Chat

SIDE = 512  #: pixels of an image's longer side, as the judge sees it
MOST_REFERENCES = 4  #: of a subject's photos; the first ones are shown
TRIES = 3  #: answers until a score is recorded as missing
_REPEATED = 500  # characters of an answer without a score that are shown to the model again


class VisionLanguageModel(Protocol):
    """Answer questions about images; :mod:`.judge_models` has two that do."""

    @property
    def name(self) -> str:
        """Return its name, to report with every score."""

    @property
    def parallel(self) -> int:
        """Return how many questions it takes at a time."""

    @property
    def settings(self) -> dict[str, Any]:
        """Return all that its answers depend on besides its name, as JSON."""

    def answer(self, chat: Chat) -> str:
        """Return the model's next turn. Raises a ``KitError`` where there can be none."""


class RubricJudge:
    """Score images by DreamBench++'s rubric (arXiv 2406.16855): a judge for :func:`.scores.score`.

    Yields concept_preservation and prompt_following for each image, from 0 to 1: the model's score
    over 4, as the paper's tables have it. A score that three answers do not give is missing (NaN).
    """

    def __init__(self, model: VisionLanguageModel, cache: Path) -> None:
        self.model, self.cache = model, cache
        self.questions = self.missing = 0  #: how many so far, and how many have no score
        self._asking: dict[str, Lock] = {}

    @property
    def name(self) -> str:
        """Return the model's name and the rubric's version, which stand with every score."""
        return f"{self.model.name} by {rubric.VERSION}"

    def __call__(self, files: ImageFiles) -> Iterator[tuple[str, Values]]:
        photos = Images(read_photos(files.subject)[:MOST_REFERENCES])
        references = [_prepared(photo) for photo in photos]

        def concept(image: Image.Image, _: str) -> Chat:
            return rubric.CONCEPT_PRESERVATION.chat(
                "References:", *references, "Generated image:", image
            )

        def follows(image: Image.Image, prompt: str) -> Chat:
            return rubric.PROMPT_FOLLOWING.chat(f"Text: {prompt}", "Generated image:", image)

        yield rubric.CONCEPT_PRESERVATION.measure, self._scores(files, concept)
        yield rubric.PROMPT_FOLLOWING.measure, self._scores(files, follows)

    def _scores(
        self, files: ImageFiles, chat: Callable[[Image.Image, str], Chat]
    ) -> "list[list[float]]":
        """Return the score of each prompt and seed; ask what the cache does not have."""
        pairs = [
            (path, p) for p, row in zip(files.prompts, files.images, strict=True) for path in row
        ]

        failed = Event()  # then the other threads ask no more

        def score(pair: tuple[Path, str]) -> float:
            found = None
            if not failed.is_set():
                try:
                    found = self._ask(chat(_prepared(open_image(pair[0])), pair[1]))
                except BaseException:
                    failed.set()
                    raise
            return float("nan") if found is None else found / rubric.HIGHEST

        bar = partial(tqdm, desc=f"{files.method}, {files.subject.name}", total=len(pairs))
        with ThreadPoolExecutor(self.model.parallel) as pool:
            values = list(bar(pool.map(score, pairs), unit="answer", leave=False))
        self.questions += len(values)
        self.missing += sum(value != value for value in values)
        seeds = len(files.images[0])
        return [values[start : start + seeds] for start in range(0, len(values), seeds)]

    def _ask(self, chat: Chat) -> int | None:
        """Return the score that the model gives, from 0 to 4, or None; each answer is kept."""
        question = {
            "rubric": rubric.VERSION,
            "model": self.model.name,
            "settings": self.model.settings,
            "chat": [[role, list(map(_described, parts))] for role, parts in chat],
        }
        digest = hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()
        with self._asking.setdefault(digest, Lock()):  # images that are alike are asked for once
            return self._score_of(self.cache / f"{digest}.json", question, chat)

    def _score_of(self, file: Path, question: dict[str, Any], chat: Chat) -> int | None:
        kept = (read_object(file) or {}).get("answers")
        answers = kept if isinstance(kept, list) and all(isinstance(a, str) for a in kept) else []
        while True:
            score = rubric.parse_score(answers[-1]) if answers else None
            if score is not None or len(answers) >= TRIES:
                return score
            again: Chat = []
            if answers:
                said = answers[-1][:_REPEATED].strip() or "(nothing)"
                again = [("assistant", [said]), ("user", [rubric.AGAIN])]
            # One character more than is read tells that an answer is too long.
            answers.append(self.model.answer([*chat, *again])[: rubric.MOST_CHARACTERS + 1])
            scored = {"answers": answers, "score": rubric.parse_score(answers[-1])}
            write_object(file, question | scored)


def _prepared(image: Image.Image) -> Image.Image:
    """Return an image as the judge sees it: RGB, its longer side :data:`SIDE` pixels."""
    return ImageOps.contain(image.convert("RGB"), (SIDE, SIDE), Image.Resampling.BICUBIC)


def _described(part: str | Image.Image) -> str | dict[str, Any]:
    """Describe a part of a chat for JSON: an image by its size and the digest of its pixels."""
    if isinstance(part, str):
        return part
    return {"size": part.size, "sha256": hashlib.sha256(part.tobytes()).hexdigest()}
