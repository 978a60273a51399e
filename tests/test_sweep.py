"""Check sweeps: the grid, the table, resuming, failures, and two dask workers."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from conftest import save_photos

from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.core.config_types import ConfigError
from dreambooth_lib.core.subject import Subject
from dreambooth_lib.data.images import DataError
from dreambooth_lib.evaluation import sweep
from dreambooth_lib.evaluation.sweep import grid
from dreambooth_lib.evaluation.sweep_table import MEASURES, read, recommend, spread, table
from dreambooth_lib.evaluation.tables import to_csv
from dreambooth_lib.figures import plots
from dreambooth_lib.training import best_checkpoint, class_images, sampling
from dreambooth_lib.training.runs import RunError
from dreambooth_lib.training.validation import ValidationPlan
from dreambooth_lib.training.validation_record import ValidationResult, history, load_images

QUICK = ValidationPlan(seeds=4, class_images=2, unrelated=1, inference_steps=2)
RESULT = ValidationResult(
    step=0, subject_fidelity=0.5, reference_fidelity=0.8, prompt_adherence=0.5,
    class_diversity=0.4, prior_drift=0.1, unrelated_drift=0.01, pres=0.3, seconds=1.0,
    held_out={},
)  # fmt: skip


@pytest.fixture
def config(tiny_sd2: str, photos: str, make_config: Any, clip_folder: Path) -> TrainConfig:
    return make_config(tiny_sd2, photos, scorer=str(clip_folder))


def run(configs: dict[str, TrainConfig], folder: Path, **options: Any) -> list[sweep.CellDone]:
    return list(sweep.sweep(configs, folder, [2, 4], QUICK, threads=1, **options))


def test_a_grid_has_every_combination_and_names_what_is_wrong(config: TrainConfig) -> None:
    configs = grid(config, prior_weight=[0.0, 1.0], seed=[3, 4, 5])
    assert len(configs) == 6
    assert configs["prior_weight=0.0-seed=4"] == config.replace(prior_weight=0.0, seed=4)
    with pytest.raises(ConfigError, match="prior_weight is -1"):
        grid(config, prior_weight=[-1])


def test_cells_of_a_grid_have_folders_of_their_own_whatever_varies(
    config: TrainConfig, tmp_path: Path
) -> None:
    one, other = (replace(config.subject, photos=f"{name}/rex", name="") for name in "ab")
    configs = grid(config, base=["toybox", "someone/a-base"], subject=[one, other, one])
    assert [(name, c.base, c.subject) for name, c in configs.items()] == [
        ("base=toybox-subject=rex", "toybox", one),
        ("base=toybox-subject=rex-2", "toybox", other),
        ("base=someone_a-base-subject=rex", "someone/a-base", one),
        ("base=someone_a-base-subject=rex-2", "someone/a-base", other),
    ]
    assert list(grid(config, prior_weight=[0.5, 1])) == ["prior_weight=0.5", "prior_weight=1"]
    with pytest.raises(ValueError, match="the name of a cell is 'a/b', which leads to another"):
        run({"a/b": config}, tmp_path)


def test_a_plan_that_cannot_be_scored_is_refused_first(config: TrainConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the validation plan's unrelated is 0; give 1 or more"):
        next(sweep.sweep({"one": config}, tmp_path / "sweep", [2], replace(QUICK, unrelated=0)))
    assert not (tmp_path / "sweep").exists()


def test_subjects_photos_and_adapters_are_no_seeds(config: TrainConfig, tmp_path: Path) -> None:
    def changed(**changes: str) -> TrainConfig:
        return config.replace(subject=replace(config.subject, **changes))

    def varied(configs: dict[str, TrainConfig]) -> list[str]:
        rows = table(configs, tmp_path, [2])
        assert len(rows) == len(configs) == len(sweep.sweep_table._by_setting(rows))
        several = {"subject.name", "subject.photos"} & rows[0].keys()
        runs_of_best = f"mean of {len(rows)} runs" if several else "one run"
        assert spread(rows) is None and runs_of_best in recommend(rows).reason
        (tmp_path / "table.csv").write_text(to_csv(rows))
        again = read(tmp_path / "table.csv")
        assert len(again) == len(sweep.sweep_table._by_setting(again))
        names = list(rows[0])
        return [name for name in names[1 : names.index("step")] if name != "prior_weight"]

    results = [replace(RESULT, step=step) for step in (0, 2)]
    for name in ("one", "two", "three"):
        cell = sweep.runs.start(config, tmp_path / name)
        for result in results:
            cell.append("validation", asdict(result))
    names = ("subject.name", "subject.class_noun", "subject.identifier", "subject.photos")
    kept = Path(config.subject.photos).with_name("other")
    shutil.copytree(config.subject.photos, kept, dirs_exist_ok=True)
    for field, value in zip(names, ("1", "cat", "sks", str(kept)), strict=True):
        own = {field.removeprefix("subject."): value}
        assert varied({"one": config, "two": changed(**own)}) == [field]
    both = {"one": changed(name="1"), "two": changed(name="01", photos=str(kept))}
    assert varied(both) == ["subject.name"], "a place is told only where the name does not"
    lokr = config.replace(method="lora", adapter="lokr")
    sizes = {"one": lokr} | {
        name: lokr.replace(adapter_settings={"decompose_factor": n})
        for name, n in (("two", 4), ("three", 8))
    }
    assert varied(sizes) == ["adapter_settings.decompose_factor"]


def test_a_sweep_gives_a_row_per_cell_and_step_and_does_not_run_twice(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = grid(config, prior_weight=[0.0, 1.0])
    done = run(configs, tmp_path)
    assert [(p.done, p.total, p.error) for p in done] == [(1, 2, None), (2, 2, None)]
    rows = table(configs, tmp_path, [2, 4])
    assert [(r["prior_weight"], r["step"]) for r in rows] == [(0, 2), (0, 4), (1, 2), (1, 4)]
    text = (tmp_path / "table.csv").read_text().splitlines()
    assert text[0] == ",".join(["cell", "prior_weight", "step", *MEASURES])
    assert len(text) == 5
    assert len(list((tmp_path / "class_images").iterdir())) == 1
    assert len(list((tmp_path / "latents").glob("*.safetensors"))) == 2
    results = history(sweep.runs.resume(tmp_path / "prior_weight=1.0"))
    ratios = best_checkpoint.ratios_of(results[2], results[0])
    assert rows[3]["score"] == ratios.score and rows[3]["class_kept"] == ratios.class_kept
    assert rows[3]["prior_drift"] == results[2].prior_drift

    monkeypatch.setattr(sweep, "train", lambda run: pytest.fail("a finished cell ran again"))
    run(configs, tmp_path)


def test_a_finished_sweep_extends_to_more_steps_as_if_they_had_been_there_from_the_start(
    config: TrainConfig, tmp_path: Path
) -> None:
    configs = grid(config, prior_weight=[1.0])
    run(configs, tmp_path / "short")
    for folder in ("short", "long"):
        done = list(sweep.sweep(configs, tmp_path / folder, [2, 4, 6], QUICK, threads=1))
        assert [p.error for p in done] == [None]
    short, long = (table(configs, tmp_path / name, [2, 4, 6]) for name in ("short", "long"))
    assert short == long and [row["step"] for row in short] == [2, 4, 6]
    cell = sweep.runs.resume(tmp_path / "short" / "prior_weight=1.0")
    assert cell.finished and cell.config.steps == 6 and len(load_images(cell, 6).subject) == 16

    run(configs, tmp_path / "short")  # fewer again: the longer run stays
    cell = sweep.runs.resume(cell.folder)
    assert cell.finished and cell.config.steps == 6 and max(cell.checkpoints()) == 6


def test_another_sweep_in_the_folder_is_refused_and_left_alone(
    config: TrainConfig, photos: str, tmp_path: Path
) -> None:
    run(grid(config, prior_weight=[1.0]), tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    shutil.copytree(photos, tmp_path.with_name("max"))
    others = {
        r"a sweep of rex on .*sd2 with photos '.*rex', but .* have '.*max'; choose":
            config.replace(subject=Subject(str(tmp_path.with_name("max")), "dog", name="rex")),
        "with base '.*sd2', but your settings have 'toybox'": config.replace(base="toybox"),
        "with class_images 4, but your settings have 5": config.replace(class_images=5),
        "lr_schedule 'constant', but .* have 'linear'": config.replace(lr_schedule="linear"),
    }  # fmt: skip
    for text, other in others.items():
        with pytest.raises(RunError, match=text):
            run(grid(other, prior_weight=[1.0]), tmp_path)
    more = replace(QUICK, seeds=2)
    with pytest.raises(RunError, match="with seeds 4, but your settings have 2; choose"):
        next(sweep.sweep(grid(config, prior_weight=[1.0]), tmp_path, [2, 4], more))
    with pytest.raises(RunError, match="at step 4 and was not validated at step 1, 3; leave"):
        next(sweep.sweep(grid(config, prior_weight=[1.0]), tmp_path, [1, 2, 3], QUICK))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_sweep_of_photos_that_were_replaced_is_refused(
    config: TrainConfig, tmp_path: Path
) -> None:
    place = Path(save_photos(tmp_path / "rex"))
    configs = grid(config.replace(subject=Subject(str(place), "dog")), prior_weight=[0.0])
    run(configs, tmp_path / "sweep")
    run(configs, tmp_path / "sweep")
    (place / "0.txt").write_text("a {} dog in the snow")
    with pytest.raises(RunError, match=r"trained with other captions than .*another folder"):
        run(configs, tmp_path / "sweep")


def test_a_longer_schedule_is_another_sweep(config: TrainConfig, tmp_path: Path) -> None:
    configs = grid(config.replace(lr_schedule="linear"), prior_weight=[0.0])
    run(configs, tmp_path)
    run(configs, tmp_path)
    with pytest.raises(RunError, match="with steps 4, but your settings have 6"):
        next(sweep.sweep(configs, tmp_path, [2, 4, 6], QUICK))


def test_a_sweep_of_one_weight_has_its_column(config: TrainConfig, tmp_path: Path) -> None:
    configs = grid(config, prior_weight=[1.0])
    run(configs, tmp_path)
    rows = table(configs, tmp_path, [2, 4])
    assert [row["prior_weight"] for row in rows] == [1.0, 1.0]
    assert recommend(rows).settings.keys() == {"prior_weight", "step"}


def test_a_failed_cell_is_recorded_and_the_others_continue(
    config: TrainConfig, tmp_path: Path
) -> None:
    configs = {
        "broken": config.replace(learning_rate=1e30, max_grad_norm=1e30),
        "sound": config,
    }
    done = run(configs, tmp_path)
    assert [p.error is None for p in done] == [False, True]
    (error,) = json.loads((tmp_path / "failures.json").read_text()).values()
    assert error.startswith("the loss is nan at step")
    assert [row["step"] for row in table(configs, tmp_path, [4])] == [4]


@pytest.mark.slow
def test_two_dask_workers_make_the_same_table(config: TrainConfig, tmp_path: Path) -> None:
    import distributed

    configs = grid(config, prior_weight=[0.0, 0.5, 1.0])
    run(configs, tmp_path / "here")
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, dashboard_address=None
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        done = run(configs, tmp_path / "there", executor=client.get_executor())
        workers = len(client.scheduler_info()["workers"])
    assert workers == 2 and {p.error for p in done} == {None}
    here, there = (read(tmp_path / where / "table.csv") for where in ("here", "there"))
    assert [row["cell"] for row in here] == [row["cell"] for row in there]
    # Not to the last bit: a text's embedding depends a little on the texts embedded with it.
    for one, other in zip(here, there, strict=True):
        differ = {
            k: (v, other[k]) for k, v in one.items() if v != pytest.approx(other[k], abs=1e-5)
        }
        assert not differ, f"{one['cell']} at step {one['step']}: {differ}"


def row(weight: float, seed: int, step: int, score: float) -> dict[str, Any]:
    measured = dict.fromkeys(MEASURES, 0.5) | {"score": score}
    return {
        "cell": f"{weight}{seed}", "prior_weight": weight, "seed": seed, "step": step,
    } | measured  # fmt: skip


def test_a_recommendation_says_what_chance_leaves_open(tmp_path: Path) -> None:
    one = [row(0, 0, 100, 0.5), row(0.5, 0, 100, 0.79), row(1, 0, 50, 0.7), row(1, 0, 100, 0.8)]
    assert spread(one) is None
    assert "another seed" not in recommend(one).reason, "nothing is known of other seeds"
    told = recommend(one, moved_by_seed=0.02).reason
    assert (
        " Retraining with another seed changes the score by about 0.020, so 1 other setting may "
        "be just as good (λ can be 0.5 or 1); λ 0 is worse at every step." in told
    )
    assert "too little to explain the lead" in recommend(one, moved_by_seed=0.002).reason
    seeds = [row(1, 0, 100, 0.80), row(1, 1, 100, 0.82)]
    assert " changes the score by about 0.014. This is" in recommend(seeds).reason, "of no others"
    # Standard deviations of 0.02 and 0.04, of two runs each: errors are sqrt(2) smaller.
    two = [row(1, 0, 100, 0.80), row(1, 1, 100, 0.80 + 0.02 * 2**0.5),
           row(0, 0, 100, 0.70), row(0, 1, 100, 0.70 + 0.04 * 2**0.5)]  # fmt: skip
    assert spread(two) == pytest.approx((0.02**2 / 2 + 0.04**2 / 2) ** 0.5)
    (tmp_path / "table.csv").write_text(to_csv(two))
    assert read(tmp_path / "table.csv") == [own | {"seed": float(own["seed"])} for own in two]
    assert recommend(read(tmp_path / "table.csv"), 9.0) == recommend(two), "the table's own counts"
    for damaged in ("cell,step\nx,1\n", "cell,step,score\nx,1,high\n", "step,score\n1,2,3\n"):
        (tmp_path / "table.csv").write_text(damaged)
        with pytest.raises(DataError, match=r"table.csv cannot be read as a sweep"):
            read(tmp_path / "table.csv")


def test_a_table_is_read_with_settings_that_are_no_numbers(tmp_path: Path) -> None:
    settings: list[dict[str, Any]] = [
        {"prior": "generated", "flip": True, "adapter": None},
        {"prior": "distilled", "flip": False, "adapter": "dora"},
    ]
    rows = [row(1.0, 0, 100, 0.8 + n / 10) | own for n, own in enumerate(settings)]
    (tmp_path / "table.csv").write_text(to_csv(rows))
    again = read(tmp_path / "table.csv")
    assert again == rows
    assert [again[0][name] for name in ("flip", "adapter")] == [True, None], "and not 1 or ''"
    best = recommend(again)
    assert best == recommend(rows) and best.settings.items() >= settings[1].items()
    assert "prior distilled, flip False, adapter dora has the highest" in best.reason
    plots.heat_map(again, "prior", "adapter")


def test_the_highest_mean_over_seeds_is_recommended() -> None:
    rows = [
        row(0, 0, 100, 0.9), row(0, 1, 100, 0.5), row(1, 0, 100, 0.8), row(1, 1, 100, 0.8),
        row(1, 0, 200, 0.8), row(1, 1, 200, 0.8),
    ]  # fmt: skip
    best = recommend(rows)
    assert best.settings == {"prior_weight": 1, "step": 100}, "of equals the fewest steps"
    assert best.score == pytest.approx(0.8)
    start = "λ 1, step 100 has the highest score of 3 settings (0.800, mean of 2 runs): "
    assert best.reason.startswith(start)
    assert "class kept 50%, other prompts kept 50%. Retraining" in best.reason
    last = recommend([*rows, row(1, 0, 300, 0.9), row(1, 1, 300, 0.9)]).reason
    assert last.endswith("This is the longest training tried, so try more steps too.")
    with pytest.raises(ValueError, match="no rows"):
        recommend([])


@pytest.mark.parametrize("name", ["clip_skip", "prompt_chunks", "prediction_type"])
def test_class_images_of_a_study_are_drawn_as_each_cell_reads_its_base(
    name: str, tiny_sd1: str, photos: str, make_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    config = make_config(
        tiny_sd1, photos, class_images=1, prior_prompts=("a dog " * 5 + "red snow on the beach",)
    )
    value = {"clip_skip": 2, "prompt_chunks": 2, "prediction_type": "v_prediction"}[name]
    configs = [config, config.replace(**{name: value})]
    if name == "prompt_chunks":
        configs = [one.replace(class_images=2) for one in configs]
    sweep._draw_class_images(configs, tmp_path / "study")
    drawn = {p.read_bytes() for p in tmp_path.glob("study/class_images/*/*.png")}
    for one in configs:
        family = sampling.load_source(one)
        alone = class_images.draw_class_images(one, family, tmp_path / name / repr(one.clip_skip))
        assert {path.read_bytes() for path in alone} <= drawn
