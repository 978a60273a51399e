"""Check scores against plain NumPy on the encoders' embeddings, and intervals on known data."""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from conftest import save_photos
from PIL import Image

from dreambooth_lib.core.subject import Subject
from dreambooth_lib.evaluation.dreambench import Benchmark, Protocol, draw_all
from dreambooth_lib.evaluation.measures import Embedded, ImageFiles, Values
from dreambooth_lib.evaluation.scores import Row, means, score, scored_images
from dreambooth_lib.metrics import kid_and_lpips
from dreambooth_lib.metrics.encoders import Encoder

SHORT = Protocol(images_per_prompt=3, class_images=4, steps=1, batch_size=8)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory, tiny_sd1: str, tiny_sd2: str) -> tuple:
    folder = tmp_path_factory.mktemp("evaluation")
    photos = save_photos(folder / "rex", 3)
    subject = Subject(photos, "dog", name="rex", kind="live")
    benchmark = Benchmark([subject], {"live": ["a {} {noun}", "a red {} {noun} in the snow"]})
    methods = {"base": lambda s: tiny_sd1, "tuned": lambda s: tiny_sd2}
    list(draw_all(benchmark, methods, folder / "out", SHORT))
    return benchmark, folder / "out", photos


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def test_every_measure_matches_numpy_on_the_embeddings(
    drawn: tuple, clip: Encoder, dino: Encoder
) -> None:
    benchmark, out, photos = drawn
    rows = list(score(benchmark, ["base", "tuned"], out, {"clip": clip, "dino": dino}, SHORT))
    found = {(r.method, r.encoder, r.measure, r.prompt, r.seed): r.value for r in rows}
    assert len(found) == len(rows)

    def embed(encoder: Encoder, paths: list[Path]) -> np.ndarray:
        return encoder.embed_images([Image.open(p).convert("RGB") for p in paths]).double().numpy()

    for name, encoder in (("clip", clip), ("dino", dino)):
        real = embed(encoder, sorted(Path(photos).glob("*.png")))
        before = embed(encoder, [out / f"base/rex/class-s{10_000 + i}.png" for i in range(4)])
        for method in ("base", "tuned"):
            folder = out / method / "rex"
            for number, prompt in enumerate(["a {} dog", "a red {} dog in the snow"]):
                made = embed(encoder, [folder / f"p{number:02d}-s{s}.png" for s in range(3)])
                for seed in range(3):
                    cosines = [float(made[seed] @ photo) for photo in real]
                    key = (method, name, "subject_fidelity", prompt, seed)
                    assert found[key] == pytest.approx(np.mean(cosines), abs=1e-5)
                    key = (method, name, "memorisation", prompt, seed)
                    assert found[key] == pytest.approx(max(cosines), abs=1e-5)
                    key = (method, name, "prompt_adherence", prompt, seed)
                    if name == "dino":
                        assert key not in found
                    else:
                        text = clip.embed_texts([prompt.replace("{} ", "")])[0].double().numpy()
                        assert found[key] == pytest.approx(made[seed] @ text, abs=1e-5)
                apart = [1 - made[i] @ made[j] for i, j in ((0, 1), (0, 2), (1, 2))]
                key = (method, name, "prompt_diversity", prompt, None)
                assert found[key] == pytest.approx(np.mean(apart), abs=1e-5)
            after = embed(encoder, [folder / f"class-s{10_000 + i}.png" for i in range(4)])
            class_images = {
                "pres": np.mean(after @ real.T),
                "class_diversity": 1 - (np.sum(after @ after.T) - 4) / 12,
                "prior_drift": 1 - np.mean(np.sum(after * before, -1)),
                "class_kid": kid(after, before),
            }
            for measure, expected in class_images.items():
                got = found[method, name, measure, None, None]
                assert got == pytest.approx(expected, abs=1e-4), measure
    assert found["base", "clip", "prior_drift", None, None] == pytest.approx(0, abs=1e-6)


def kid(left: np.ndarray, right: np.ndarray) -> float:
    def k(x: np.ndarray, y: np.ndarray) -> float:
        width = len(x)
        return float((np.sqrt(width) * x @ (np.sqrt(width) * y) / width + 1) ** 3)

    def mean(pairs: list[tuple[np.ndarray, np.ndarray]]) -> float:
        return float(np.mean([k(x, y) for x, y in pairs]))

    def among(rows: np.ndarray) -> float:
        return mean([(x, y) for i, x in enumerate(rows) for j, y in enumerate(rows) if i != j])

    return among(left) + among(right) - 2 * mean([(x, y) for x in left for y in right])


def test_every_image_gets_its_own_score(drawn: tuple, clip: Encoder) -> None:
    benchmark, out, _ = drawn
    rows = list(score(benchmark, ["base", "tuned"], out, {"clip": clip}, SHORT))
    scored = scored_images(rows, "tuned", "clip", benchmark, out)
    assert len(scored) == 6
    for value, label, file in scored:
        alike = [
            row for row in rows
            if row.value == value and (row.method, row.measure) == ("tuned", "subject_fidelity")
        ]  # fmt: skip
        identifier = benchmark.subjects[0].identifier
        assert label in {f"rex: {row.prompt.format(identifier)}" for row in alike}
        number = int("red" in label)
        files = [out / f"tuned/rex/p{number:02d}-s{row.seed}.png" for row in alike]
        assert file in files


def test_a_missing_image_is_named(drawn: tuple, clip: Encoder, tmp_path: Path) -> None:
    benchmark, _, _ = drawn
    with pytest.raises(FileNotFoundError, match=r"base/rex/p00-s0\.png"):
        list(score(benchmark, ["base"], tmp_path, {"clip": clip}, SHORT))


def test_photos_are_not_paired_with_their_near_duplicates(
    drawn: tuple, clip: Encoder, tmp_path: Path
) -> None:
    benchmark, out, photos = drawn
    three = [Image.open(p).convert("RGB") for p in sorted(Path(photos).glob("*.png"))]
    unlike = clip.embed_images(three).double().numpy()
    expected = np.mean([unlike[i] @ unlike[j] for i, j in ((0, 1), (0, 2), (1, 2))])
    (row,) = [r for r in score(benchmark, [], out, {"clip": clip}, SHORT)]
    assert (row.method, row.measure, row.prompt) == ("real images", "subject_fidelity", None)
    assert row.value == pytest.approx(expected, abs=1e-6)

    copies = tmp_path / "rex"
    copies.mkdir()
    for number in (0, 1, 1):
        three[number].save(copies / f"{len(list(copies.iterdir()))}.png")
    twice = Benchmark([Subject(str(copies), "dog", name="rex", kind="live")], benchmark.prompts)
    (row,) = score(twice, [], out, {"clip": clip}, SHORT)
    assert row.value == pytest.approx(unlike[0] @ unlike[1], abs=1e-6), "not 1 for the copies"


def test_div_is_lpips_if_installed_and_the_row_names_it(
    drawn: tuple, clip: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    class LPIPS(torch.nn.Module):  # stands in for the package: takes pairs of pixels in [-1, 1]
        def __init__(self, net: str, verbose: bool) -> None:
            super().__init__()
            assert net == "alex"

        def forward(self, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
            assert one.shape[1:] == (3, 16, 16) and one.min() < 0 and one.abs().max() <= 1
            return (one - other).abs().mean((1, 2, 3), keepdim=True)

    package = ModuleType("lpips")
    package.LPIPS = LPIPS  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lpips", package)
    monkeypatch.setattr(kid_and_lpips, "has_lpips", lambda: True)
    kid_and_lpips._lpips.cache_clear()
    benchmark, out, _ = drawn
    rows = [r for r in score(benchmark, ["base"], out, {"clip": clip}, SHORT)
            if r.encoder == "lpips-alex"]  # fmt: skip
    kid_and_lpips._lpips.cache_clear()
    assert [(r.measure, r.prompt) for r in rows] == [
        ("prompt_diversity", "a {} dog"), ("prompt_diversity", "a red {} dog in the snow"),
    ]  # fmt: skip
    made = [np.asarray(Image.open(out / f"base/rex/p00-s{s}.png").convert("RGB"), float)
            for s in range(3)]  # fmt: skip
    expected = np.mean([np.abs(made[i] - made[j]).mean() for i, j in ((0, 1), (0, 2), (1, 2))])
    assert rows[0].value == pytest.approx(expected / 127.5, rel=1e-4)


def test_div_compares_eight_pairs_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    at_once = []

    def network(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        at_once.append(len(one))
        return (one - other).abs().mean((1, 2, 3), keepdim=True)

    monkeypatch.setattr(kid_and_lpips, "_lpips", lambda: network)
    images = [Image.new("RGB", (4, 4), (level, level, level)) for level in range(0, 60, 10)]
    pairs = [abs(a - b) / 127.5 for a in range(0, 60, 10) for b in range(a, 60, 10) if a != b]
    assert kid_and_lpips.lpips_diversity(images) == pytest.approx(np.mean(pairs))
    assert at_once == [8, 7]


def test_a_judge_reads_files_and_prompts_once_and_its_rows_name_it(
    drawn: tuple, clip: Encoder, dino: Encoder
) -> None:
    benchmark, out, photos = drawn
    asked = []

    def judge(files: ImageFiles) -> Iterator[tuple[str, Values]]:
        asked.append(files.method)
        assert files.prompts == ["a dog", "a red dog in the snow"]
        assert files.subject.photos == photos
        folder = out / files.method / "rex"
        assert files.images == [[folder / f"p0{p}-s{s}.png" for s in range(3)] for p in range(2)]
        assert files.class_images == [folder / f"class-s{10_000 + i}.png" for i in range(4)]
        assert files.base_class_images[3] == out / "base/rex/class-s10003.png"
        yield (
            "brightness",
            [[float(np.asarray(Image.open(f)).mean()) for f in row] for row in files.images],
        )

    def reads_files(embedded: Embedded) -> Iterator[tuple[str, Values]]:
        assert embedded.files is not None
        yield "prompts", float(len(embedded.files.prompts))

    encoders = {"clip": clip, "dino": dino}
    rows = list(
        score(benchmark, ["base", "tuned"], out, encoders, SHORT, evaluators=[reads_files],
              judges={"a judge": judge})
    )  # fmt: skip
    assert asked == ["base", "tuned"], "not once for each encoder"
    assert [r.value for r in rows if r.measure == "prompts"] == [2] * 4
    judged = [r for r in rows if r.encoder == "a judge"]
    assert len(judged) == 12
    for row in judged:
        number = ["a {} dog", "a red {} dog in the snow"].index(row.prompt)
        file = out / row.method / "rex" / f"p0{number}-s{row.seed}.png"
        assert row.value == pytest.approx(np.asarray(Image.open(file)).mean())


def rows_of(values: dict[tuple[str, str], list[float]], measure: str = "subject_fidelity") -> list:
    return [
        Row("base", subject, "live", "clip", measure, prompt, seed, value)
        for (subject, prompt), seeds in values.items()
        for seed, value in enumerate(seeds)
    ]


def test_the_interval_is_over_seeds_and_not_over_subjects() -> None:
    """Give an interval of zero width to two subjects far apart whose seeds agree."""
    (mean,) = means(rows_of({("a", "p"): [0.2, 0.2, 0.2], ("b", "p"): [0.8, 0.8, 0.8]}))
    assert mean.value == pytest.approx(0.5) and mean.count == 6
    assert mean.low == mean.high == pytest.approx(0.5)


@pytest.mark.parametrize(("prompts", "seeds"), [(4, 16), (25, 4), (25, 2)])
def test_the_interval_covers_the_truth_as_often_as_it_says(prompts: int, seeds: int) -> None:
    rng = np.random.default_rng(0)
    hits, width = 0, 0.0
    for trial in range(200):
        values = {("a", f"p{i}"): list(rng.normal(i, 1, size=seeds)) for i in range(prompts)}
        (mean,) = means(rows_of(values), samples=300, seed=trial)
        hits += mean.low <= (prompts - 1) / 2 <= mean.high
        width += (mean.high - mean.low) / 200
    assert 0.88 <= hits / 200 <= 0.99
    # Of independent values with a standard deviation of 1.
    assert width == pytest.approx(2 * 1.96 / (prompts * seeds) ** 0.5, rel=0.06)


def test_one_value_per_subject_is_resampled_over_subjects() -> None:
    rows = [Row("base", name, "live", "clip", "pres", None, None, value)
            for name, value in (("a", 0.1), ("b", 0.2), ("c", 0.6))]  # fmt: skip
    (mean,) = means(rows)
    assert mean.value == pytest.approx(0.3) and mean.low < 0.25 and mean.high > 0.35
