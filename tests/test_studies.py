"""Check the studies from configs to tables, on a tiny base and in one process."""

from collections.abc import Callable
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dreambooth_lib.core.config import Subject, TrainConfig
from dreambooth_lib.training.validation import ValidationPlan
from tools import studies


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
    monkeypatch.setattr(studies, "auto", lambda s: plain(s).replace(steps=6, early_stop=True))
    monkeypatch.setattr(studies, "PLAN", ValidationPlan(class_images=2, inference_steps=2))
    monkeypatch.setattr(studies, "LAMBDAS", (0.0, 1.0))
    monkeypatch.setattr(studies, "STEPS", (2, 4))
    monkeypatch.setattr(studies, "SEEDS", 2)
    return Subject(photos, "dog", name="rex")


def test_auto_is_set_beside_the_best_of_the_grid(subject: Subject, tmp_path: Path) -> None:
    studies.study_auto([subject], tmp_path, Here())
    for name in ("table.csv", "heat_map.png", "front.png", "sheet.png"):
        assert (tmp_path / "grid" / "rex" / name).exists()
    row = (tmp_path / "auto" / "auto.md").read_text().splitlines()[2]
    assert row.startswith("| rex | λ 1, step ") and row.endswith("| 75% |"), "6 of 2 x 4 steps"


def test_the_choice_is_set_beside_every_checkpoint(subject: Subject, tmp_path: Path) -> None:
    studies.study_choice([subject], tmp_path, Here())
    rows = (tmp_path / "rex.csv").read_text().splitlines()
    assert len(rows) == 1 + 8, "16 steps, a validation every 2"
    assert (tmp_path / "rex.png").exists()
    assert "| rex | " in (tmp_path / "choice.md").read_text()


def test_ablations_differ_in_one_thing_each(subject: Subject, tmp_path: Path) -> None:
    kinds = studies.ablations(subject, tmp_path)
    default = kinds.pop("default")
    of_lora = {"method", "lora_rank", "learning_rate"}  # LoRA has a rate of its own
    for name, config in kinds.items():
        before, after = default.to_dict(), config.to_dict()
        changed = {key for key in before if before[key] != after.get(key)}
        assert changed, name
        if "LoRA" in name:
            assert of_lora <= changed
            changed -= of_lora
        assert len(changed - {"subject", "prior_weight"}) <= 1, name
    names = ("1 photo", "2 photos", "3 photos", "4 photos")
    folders = [Path(kinds[name].subject.pictures) for name in names]
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


def test_an_interval_is_students() -> None:
    assert studies.interval([1.0, 2.0, 3.0, 4.0, 5.0]) == "3.000 ± 1.963"
    assert studies.interval([2.0]) == "2.000"
