"""Check the studies from configs to tables, on a tiny base and in one process."""

import json
import shutil
from collections.abc import Callable
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageChops

from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.core.subject import Subject
from dreambooth_lib.data.images import read_photos
from dreambooth_lib.data.masks import read_mask
from dreambooth_lib.evaluation.demo import bundled_subjects
from dreambooth_lib.families import loading
from dreambooth_lib.training import validation_record
from dreambooth_lib.training.loop import train
from dreambooth_lib.training.trainable import wrap_trained_parts
from dreambooth_lib.training.validation import ValidationPlan
from tools.studies import __main__ as studies
from tools.studies import adapters, backgrounds, bank, pairs, trust


class Here(Executor):
    """An executor that runs each task at once."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future:
        done: Future = Future()
        done.set_result(fn(*args, **kwargs))
        return done


@pytest.fixture
def subject(
    tiny_sd2: str, photos: str, clip_folder: Path, make_config: Callable[..., TrainConfig],
    monkeypatch: pytest.MonkeyPatch,
) -> Subject:  # fmt: skip
    def plain(subject: Subject) -> TrainConfig:
        config = make_config(tiny_sd2, photos, scorer=str(clip_folder), validate_every=2)
        return config.replace(subject=subject)

    monkeypatch.setattr(studies, "plain", plain)
    monkeypatch.setattr(studies, "PLAN", ValidationPlan(class_images=2, inference_steps=2))
    monkeypatch.setattr(studies, "LAMBDAS", (0.0, 1.0))
    monkeypatch.setattr(studies, "STEPS", (2, 4))
    monkeypatch.setattr(studies, "SEEDS", 2)
    return Subject(photos, "dog", name="rex")


def test_a_grid_has_a_table_and_figures(subject: Subject, tmp_path: Path) -> None:
    rows = studies.study_grid(subject, tmp_path, Here())
    assert len(rows) == 2 * 2
    for name in ("table.csv", "heat_map.png", "front.png", "sheet.png"):
        assert (tmp_path / "rex" / name).exists()


@pytest.mark.slow
def test_a_bank_is_filled_scored_and_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two runs of the bundled base, two steps each; filled again, nothing is made anew."""
    few = {"class_images": 2, "unrelated": 1, "inference_steps": 1, "guidance_scale": 3.25}
    names = ("validation", "again", "exhaustive")
    plans = {name: ValidationPlan(first_seed=500 * i, **few) for i, name in enumerate(names)}
    monkeypatch.setattr(bank, "plans", lambda config: plans)
    monkeypatch.setattr(validation_record, "plan_for", lambda config: plans["validation"])
    monkeypatch.setattr(bank, "EVERY", 1)
    short = {"steps": 2, "class_images": 2, "prior_inference_steps": 1}
    kinds = {"full": lambda config: config.replace(**short),
             "lambda-0": lambda config: config.replace(**short, prior_weight=0.0)}  # fmt: skip
    monkeypatch.setattr(bank, "kinds", lambda: kinds)
    monkeypatch.setattr(studies, "SEEDS", 1)
    subjects = [bank.subjects()["moss_cat"]]
    studies.fill_bank(subjects, tmp_path, list(kinds), Here())
    files = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.npz")}
    assert len(files) == 1 + 2 * 2 and not list(tmp_path.rglob("checkpoints"))
    studies.fill_bank(subjects, tmp_path, list(kinds), Here())
    assert files == {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.npz")}
    rows = trust.read_rows(tmp_path / "validations.jsonl")
    own = rows["validation"][trust.Cell("full", "moss_cat", 0)]
    (kept,) = tmp_path.glob("full/moss_cat/seed0/validation.jsonl")
    told = [json.loads(line) for line in kept.read_text().splitlines()]
    assert [r.step for r in own] == [row["step"] for row in told] == [0, 1, 2]
    for one, row in zip(own, told, strict=True):
        assert one.subject_fidelity == pytest.approx(row["subject_fidelity"], abs=2e-4)
        assert one.unrelated_drift == pytest.approx(row["unrelated_drift"], abs=2e-4)
    lines = (tmp_path / "validations.jsonl").read_text().splitlines()
    shutil.rmtree(tmp_path / "full")
    studies.fill_bank(subjects, tmp_path, list(kinds), Here())
    assert not (tmp_path / "full").exists(), "a run whose rows are there is not trained again"
    trust.score_bank(tmp_path, tmp_path / "validations.jsonl")
    again = (tmp_path / "validations.jsonl").read_text().splitlines()
    assert sorted(again) == sorted(lines), "rows of runs that are elsewhere stay"
    monkeypatch.setattr(pairs, "DATA", tmp_path / "none")
    studies.print_trust(tmp_path / "validations.jsonl")
    printed = capsys.readouterr().out
    assert "| moss_cat | λ 1, " in printed and "within 2%: " in printed


def test_ablations_differ_in_one_thing_each(subject: Subject, tmp_path: Path) -> None:
    kinds = studies.ablations(subject, tmp_path)
    default = kinds.pop("default")
    of_lora = {"method", "lora_rank"}
    for name, config in kinds.items():
        before, after = default.to_dict(), config.to_dict()
        changed = {key for key in before if before[key] != after.get(key)}
        assert changed, name
        if "LoRA" in name:
            assert of_lora <= changed
            # LoRA has a rate and an interval of its own.
            changed -= of_lora | {"learning_rate", "validate_every"}
        assert len(changed - {"subject", "prior_weight"}) <= 1, name
    names = ("1 photo", "2 photos", "3 photos", "4 photos")
    folders = [Path(kinds[name].subject.photos) for name in names]
    assert [len(list(folder.iterdir())) for folder in folders] == [1, 2, 3, 4]


def test_kinds_are_trained_with_every_seed(subject: Subject, tmp_path: Path) -> None:
    kinds = {"default": studies.plain(subject), "no prior": studies.plain(subject)}
    kinds["no prior"] = kinds["no prior"].replace(prior_weight=0.0)
    studies.over_seeds(subject, kinds, tmp_path, Here())
    rows = (tmp_path / "means.md").read_text().splitlines()[2:]
    names = [row.split(" | ")[0] for row in rows]
    assert names == ["| the base", "| default (2)", "| no prior (2)"]
    for name in ("means.png", "sheet.png"):
        with Image.open(tmp_path / name) as image:
            assert image.width > 300
    assert (tmp_path / "table.csv").read_text().count("-seed1,") == 2


def test_memory_levels_differ_in_nothing_else(subject: Subject) -> None:
    levels = studies.memory_levels(subject)
    assert [config.memory for config in levels.values()] == ["standard", "low", "lowest"]
    assert len({repr(config.replace(memory="auto")) for config in levels.values()}) == 1


def test_adapters_are_of_equal_size(
    start_run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {}
    for name, config in adapters.adapters(bundled_subjects()[0]).items():
        family = loading.load_meta("toybox")
        family.denoiser.requires_grad_(False)
        weights = wrap_trained_parts(family, config).trained_weights()
        sizes[name] = sum(weight.numel() for weight in weights.values())
    assert all(abs(size / sizes["LoRA"] - 1) < 0.17 for size in sizes.values()), sizes
    run = start_run("run", "sd1", method="lora", adapter="lokr")
    list(train(run))
    lines = adapters.sizes({"LoKr": run.folder}, tmp_path / "sizes.md")
    (file,) = run.pipeline.rglob("*.safetensors")
    assert lines[2].endswith(f" | {file.stat().st_size:,} |")
    assert (tmp_path / "sizes.md").read_text().splitlines() == lines


def test_photos_in_one_scene_have_exact_masks(
    tmp_path: Path, clip_folder: Path, make_config: Callable[..., TrainConfig], tiny_sd2: str
) -> None:
    (bundled, *_) = bundled_subjects()
    kinds = backgrounds.masks(bundled, tmp_path / "photos")
    upright = backgrounds.portraits(bundled, tmp_path / "photos")
    for ways, steps in (
        (kinds, backgrounds.MASK_STEPS),
        (upright, backgrounds.PORTRAIT_STEPS),
    ):
        assert all(config.checkpoints_kept >= len(steps) for config in ways.values())
    (square,) = {config.subject.photos for config in kinds.values()}
    photos = read_photos(square)
    assert backgrounds.shares([photo.image for photo in photos]).min() > 0.9
    assert backgrounds.shares([photo.image for photo in photos], "beach").max() < 0.1
    for photo, (original, mask) in zip(photos, backgrounds.cut_outs(bundled), strict=True):
        own = read_mask(photo)
        assert own is not None and ImageChops.difference(own, mask).getbbox() is None
        same = ImageChops.difference(photo.image, original)
        assert Image.composite(same, Image.new("RGB", same.size), mask).getbbox() is None
    tall = read_photos(upright["in buckets"].subject.photos)
    assert {photo.traits.size for photo in tall} == {(256, 384)}


def test_a_study_of_backgrounds_measures_every_cell(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backgrounds, "ANYWHERE", 2)
    plain = studies.plain(subject).replace(hold_out=False, steps=2)
    kinds = {"plain": plain, "tall": plain.replace(crop="buckets")}
    studies.over_seeds(subject, kinds, tmp_path, Here(), 2, (1, 2))
    cells = {kind: [tmp_path / studies.cell(kind, seed) for seed in range(2)] for kind in kinds}
    lines = backgrounds.measure(subject, cells, (1, 2), tmp_path / "leaks.md")
    names = [line.split(" | ")[:2] for line in lines[2:]]
    trained = ["| plain (2)", "| tall (2)", "| tall, drawn as squares (2)"]
    assert names == [["| the base (1)", "0"]] + [[n, step] for n in trained for step in "12"]
    assert all(line.count("±") == 4 for line in lines[3:])
    assert lines[5].split(" | ")[1:] == lines[7].split(" | ")[1:]  # these photos are squares
    assert lines[6].split(" | ")[1:] == lines[8].split(" | ")[1:]
    assert lines[3].split(" | ")[2:] != lines[4].split(" | ")[2:]
    assert (tmp_path / "leaks.png").stat().st_size > 1000
    assert (tmp_path / "leaks.md").read_text().splitlines() == lines
