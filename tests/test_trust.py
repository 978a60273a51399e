"""Test the studies' own computing: noise, choices, intervals, and pairs that are judged."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dreambooth_lib.core.checked_json import write_rows
from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.evaluation import sweep_table
from dreambooth_lib.evaluation.demo import bundled_subjects
from dreambooth_lib.metrics.encoders import Encoder
from dreambooth_lib.training import runs, validation
from dreambooth_lib.training.validation import ValidationImages
from dreambooth_lib.training.validation_record import ValidationResult, history
from tools.studies import bank, finished, pairs, practice, trust
from tools.studies.intervals import half_width, interval
from tools.studies.keep import keep_table
from tools.studies.pairs import Pair
from tools.studies.trust import Cell

FIDELITY, DRIFT = 0.5, 0.1


def result(step: int, fidelity: list[float], drift: float = DRIFT) -> ValidationResult:
    by_image = {"subject_fidelity": fidelity, "prompt_adherence": [0.5] * 4,
                "prior_drift": [drift] * 4, "unrelated_drift": [drift] * 10}  # fmt: skip
    return ValidationResult(
        step=step, reference_fidelity=0.8, class_diversity=0.3, pres=0.2, held_out={}, seconds=0.0,
        by_image=by_image, **{name: float(np.mean(values)) for name, values in by_image.items()},
    )  # fmt: skip


def test_intervals_are_students() -> None:
    """95 of 100 intervals of five normal numbers hold the mean; the widest of two do too."""
    generator = np.random.default_rng(0)
    for count in (2, 5, 12, 40):
        draws = generator.normal(0, 1, (4000, count))
        held = [abs(row.mean()) <= half_width(row.tolist()) for row in draws]
        assert np.mean(held) == pytest.approx(0.95, abs=0.015)
    assert interval([1.0, 2.0, 3.0, 4.0, 5.0]) == "3.000 ± 1.963"
    assert interval([0.5]) == "0.500" and interval([0.0, 1.0], ".1f") == "0.5 ± 6.4"
    assert half_width([1.0]) == 0


def test_noise_is_the_spread_between_two_sets_of_seeds() -> None:
    generator, spread = np.random.default_rng(0), 0.02
    rows: trust.Rows = {"validation": {}, "again": {}}
    for seed in range(300):
        for plan in rows:
            own = [result(0, [0.4] * 4)]
            own += [result(step, generator.normal(0.6, spread, 4).tolist()) for step in (1, 2)]
            rows[plan][Cell("full", "dog", seed)] = own
    table = [line.split(" | ") for line in trust.noise(rows)]
    (likeness,) = [cells for cells in table if cells[0].endswith("likeness")]
    expected = spread / 2 / (0.8 - 0.4)  # of the mean of four images, in shares of what is possible
    assert [float(c.rstrip(" |")) for c in likeness[1:]] == pytest.approx(
        [expected, expected, math.sqrt(2) * expected], rel=0.15
    )


def test_a_choice_is_judged_by_other_images() -> None:
    base = result(0, [0.4] * 4)
    own = [base, result(125, [0.60] * 4), result(250, [0.70] * 4)]
    judged = [base, result(125, [0.72] * 4), result(250, [0.60] * 4)]
    choice = trust.choose(own, judged)
    assert (choice.step, choice.best) == (250, 125)
    assert choice.share == pytest.approx((0.5 / 0.8) ** (1 / 3))
    cell = Cell("full", "dog", 0)
    table = trust.choice_table(
        {"validation": {cell: own}, "exhaustive": {cell: judged}}, "full", 250
    )
    assert table[-2].startswith("| dog | 250 | 125 | 0.855"), "by rising likeness both are alike"
    assert "within 2%: 0 and 1 of 1" in table[-1] and table[-2].endswith("| 1.000 |")
    assert trust.choose(trust.up_to(own, 125), trust.up_to(judged, 125)).share == 1


def test_rows_are_read_as_they_were_written(tmp_path: Path) -> None:
    lines = []
    for step, kind, seed in ((250, "full", 3), (0, "base", -1), (125, "full", 3)):
        row = {"kind": kind, "subject": "dog", "seed": seed, "plan": "again"}
        lines.append(json.dumps(row | vars(result(step, [0.5] * 4))))
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    rows = trust.read_rows(tmp_path / "rows.jsonl")
    assert [r.step for r in rows["again"][Cell("full", "dog", 3)]] == [0, 125, 250]


def images(seed: int, count: int) -> list[Image.Image]:
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 64, 64, 3), dtype=np.uint8)
    return [Image.fromarray(one) for one in pixels]


def test_a_banks_images_are_read_as_they_were_saved(tmp_path: Path) -> None:
    subject = bank.subjects()["moss_cat"]
    drawn = {name: ValidationImages(images(1, 12), images(2, 4), images(3, 10), [])
             for name in ("validation", "again", "exhaustive")}  # fmt: skip
    bank.save(tmp_path / "000125.npz", drawn)
    read = bank.load(tmp_path / "000125.npz", subject)["exhaustive"]
    assert [i.tobytes() for i in read.subject] == [i.tobytes() for i in images(1, 12)]
    assert read.prompts[0] == "a ohwx cat on the beach" and len(read.prompts) == 12


def test_answers_come_back_to_their_pairs_whatever_the_page_and_side(tmp_path: Path) -> None:
    """A person who always sees what is there is read alike in both passes."""
    names = list(bank.subjects())[:3]
    every = {pairs.digest(image): image for image in images(4, 90)}
    digests = list(every)
    asked = [Pair(names[i % 3], (digests[2 * i], digests[2 * i + 1]), ("x", "y"), 0)
             for i in range(45)]  # fmt: skip
    level = {digest: number % 3 for number, digest in enumerate(digests)}
    pairs.write(asked, every, tmp_path / "data")
    pairs.ask(tmp_path / "data", tmp_path / "out")
    sides = set()
    for number in (1, 2):
        keys = json.loads((tmp_path / "out" / f"pass-{number}.json").read_text())
        assert len(list((tmp_path / "out" / f"pass-{number}").glob("*.png"))) == len(keys)
        lines = []
        for page, key in enumerate(keys, 1):
            assert len({asked[one["pair"]].subject for one in key}) == 1
            for place, one in enumerate(key, 1):
                a, b = (level[d] for d in asked[one["pair"]].images[:: -1 if one["swapped"] else 1])
                sides.add((number, one["pair"], one["swapped"]))
                lines.append(f"{page} {place} {'A' if a > b else 'B' if b > a else '='} {a} {b}")
        text = tmp_path / "out" / f"pass-{number}.txt"
        text.write_text("\n".join(lines[1:]))
        with pytest.raises(ValueError, match="1 pairs have no answer"):
            pairs.take(number, tmp_path / "data", tmp_path / "out")
        text.write_text("\n".join(lines))
        pairs.take(number, tmp_path / "data", tmp_path / "out")
    assert len({(pair, swapped) for _, pair, swapped in sides}) > 50, "sides differ between passes"
    found, read = pairs.read(tmp_path / "data")
    for pair in found:
        a, b = (level[d] for d in pair.images)
        word = "first" if a > b else "second" if b > a else "alike"
        assert pair.better == [word] * 2 and [list(s) for s in pair.shown] == [[a, b]] * 2
    assert {d: i.tobytes() for d, i in read.items()} == {d: i.tobytes() for d, i in every.items()}
    sheet = Image.open(tmp_path / "data" / "images.png")
    sheet.putpixel((3, 3), (0, 0, 0))
    sheet.save(tmp_path / "data" / "images.png")
    with pytest.raises(ValueError, match="image 0 of"):
        pairs.read(tmp_path / "data")


class _Sees(Encoder):
    """Sees each image's level, and the subject in every other image."""

    def __init__(self, level: dict[str, int]) -> None:
        self.level = level

    def embed_images(self, images: Any) -> torch.Tensor:
        cosines = [self.level.get(pairs.digest(image), 2) / 2 for image in images]
        return torch.tensor([[c, (1 - c * c) ** 0.5] for c in cosines])


def test_agreement_counts_what_both_passes_say(tmp_path: Path) -> None:
    name = next(iter(bank.subjects()))
    every = {pairs.digest(image): image for image in images(5, 12)}
    digests = list(every)
    level = {digest: number % 3 for number, digest in enumerate(digests)}
    cells = (f"full/{name}/seed0/000125", f"full/{name}/seed0/000250")
    asked = [Pair(name, (digests[2 * i], digests[2 * i + 1]), cells, 0) for i in range(6)]
    for pair in asked:
        pair.better = ["first" if level[pair.images[0]] > level[pair.images[1]] else "second"] * 2
        pair.shown = [(2, 0)] * 2
    asked[0].better = ["first", "second"]  # the passes differ
    asked[1].better = ["first"] * 2 if asked[1].better[0] == "second" else ["second"] * 2
    pairs.write(asked, every, tmp_path)
    base = result(0, [0.4] * 4)
    validated = [base, result(125, [0.8] * 4), result(250, [0.7] * 4)]
    rows = {"validation": {Cell("full", name, 0): validated}, "again": {}}
    table = pairs.agreement(_Sees(level), rows, tmp_path)
    assert table[2:6] == [
        "| which image is more like the subject | 5 pairs | 80.0% |",
        "| which of two steps of a run | 5 pairs | 80.0% |",
        "| the same, the later step | 5 pairs | 80.0% |",
        "| learnt: yes, partly or no | 2 validations | 50.0% |",
    ]
    assert table[6].endswith("2 validations | 50.0% |")
    chosen = "| a chosen step is the subject (the lowest has 2.00 of 2) | 2 choices | 100.0% |"
    assert table[8] == chosen, "step 125, of 250 and of 500"


def test_the_bundled_scorer_and_the_verdict_agree_with_the_judges() -> None:
    """Look at what docs/studies keeps: 330 pairs judged blind by vision-language models."""
    table = pairs.agreement(
        validation.load_scorers(TrainConfig(bundled_subjects()[0])).images, trust.read_rows()
    )
    shares = [float(row.split("|")[-2].strip(" %")) for row in table[2:9]]
    ranking, by_likeness, by_step, verdict, commonest, opposite, chosen = shares
    assert ranking >= 90 and verdict >= max(90, commonest + 1) and opposite >= 98, table
    assert by_step > by_likeness + 5 and chosen == 100, table
    counts = [[int(n) for n in row.split("|")[2:5]] for row in table[12:]]
    assert len(counts) == 3 and sum(map(sum, counts)) == 176


def test_a_lambda_that_sets_itself_is_compared_where_fixed_ones_keep_as_much(
    tmp_path: Path,
) -> None:
    def cell(kind: str) -> Cell:
        return Cell(kind, "dog", 1)

    base = result(0, [0.4] * 4)  # and the photos 0.8: a likeness of 0.6 is half
    rows: trust.Rows = {"exhaustive": {
        cell("lambda-0.25"): [base, result(500, [0.72] * 4, 0.4)],
        cell("full"): [base, result(500, [0.64] * 4, 0.2)],
        cell("keep-0.9"): [base, result(500, [0.72] * 4, 0.3), result(750, [0.8] * 4, 0.9)],
        Cell("full", "dog", 2): [base, result(500, [0.4] * 4)],  # another seed
    }}  # fmt: skip
    place = tmp_path / "keep-0.9" / "dog" / "seed1"
    place.mkdir(parents=True)
    log = [{"step": 490, "prior_weight": 1.0, "class_kept": 0.8}, {"step": 495},
           {"step": 500, "prior_weight": 3.0, "class_kept": 0.91},
           {"step": 510, "prior_weight": 9.0, "class_kept": 0.5}]  # fmt: skip
    write_rows(place / "log.jsonl", log)
    # Fixed ones have 0.8 where 0.6 of the class is kept, and 0.6 where 0.8 is: 0.7 at 0.7.
    (row,) = keep_table(rows, tmp_path)[2:]
    assert row == "| 90% | 1 | 0.91 | 2.00 | 0.80 | 0.70 | 0.10 |"


def test_the_finished_study_has_a_row_for_each_run_and_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finished, "FOLDER", tmp_path)
    subject = bank.subjects()["patch_dog"]
    base, steps = result(0, [0.4] * 4), {125: 0.6, 250: 0.7}
    runs = {("full", 0): 0.0, ("full", 1): 0.05, ("lambda-0", 0): -0.1, ("lora", 0): 0.0}
    own = {Cell(kind, "patch_dog", seed): [base] + [result(step, [value + more] * 4)
                                                    for step, value in steps.items()]
           for (kind, seed), more in runs.items()}  # fmt: skip
    drawn = {name: ValidationImages(images(1, 12), images(2, 4), images(3, 10), [])
             for name in ("validation", "again", "exhaustive")}  # fmt: skip
    for kind in ("full", "lambda-0"):
        for step in steps:
            bank.save(tmp_path / "bank" / kind / "patch_dog" / "seed0" / f"{step:06d}.npz", drawn)
    finished.write(tmp_path / "bank", {"exhaustive": own}, subject)
    table = sweep_table.read(tmp_path / "patch_dog.csv")
    assert {(row["prior_weight"], row["seed"], row["step"]) for row in table} == {
        (weight, seed, step) for weight, seed in ((1, 0), (1, 1), (0, 0)) for step in (125, 250)
    }
    best = sweep_table.recommend(table)
    assert best.settings == {"prior_weight": 1, "step": 250} and "mean of 2 runs" in best.reason
    assert Image.open(tmp_path / "patch_dog.png").width > 2 * 3 * 64


def test_the_notebooks_run_of_a_subject_is_trained_and_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert practice.practice()["steps"] == 300, "as in notebook 01"
    short = {"steps": 2, "class_images": 4, "validate_every": 1, "checkpoints_kept": 6}
    monkeypatch.setattr(practice, "practice", lambda: short)
    monkeypatch.setattr(practice, "STUDIES", tmp_path)
    subject = bank.subjects()["moss_cat"]
    practice.run_one(tmp_path / "runs", "full", subject)
    practice.run_one(tmp_path / "runs", "full", subject)  # resumed: it has finished
    assert [r.step for r in history(runs.resume(tmp_path / "runs/full/moss_cat"))] == [0, 1, 2]
    assert Image.open(tmp_path / "runs/full/moss_cat.png").size > (900, 300)
    practice.write_chosen(tmp_path / "runs", "full", [subject])
    assert Image.open(tmp_path / "notebook-full.png").size > (900, 64)
