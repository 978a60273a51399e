"""Studies: the grid, the table, going on after a stop, failures, and two dask workers."""

import json
from pathlib import Path
from typing import Any

import pytest

from dreambooth_lib import choice, sweep, watch
from dreambooth_lib.config import ConfigError, TrainConfig
from dreambooth_lib.sweep import grid, recommend, table
from dreambooth_lib.watch import View

QUICK = View(class_pictures=2, unrelated=1, inference_steps=2)


@pytest.fixture
def config(tiny_sd2: str, photos: str, make_config: Any, clip_folder: Path) -> TrainConfig:
    return make_config(tiny_sd2, photos, judge=str(clip_folder))


def run(configs: dict[str, TrainConfig], folder: Path, **options: Any) -> list[sweep.Progress]:
    return list(sweep.sweep(configs, folder, [2, 4], QUICK, threads=1, **options))


def test_a_grid_has_every_combination_and_names_what_is_wrong(config: TrainConfig) -> None:
    found = grid(config, prior_weight=[0.0, 1.0], seed=[3, 4, 5])
    assert len(found) == 6
    assert found["prior_weight=0.0-seed=4"] == config.replace(prior_weight=0.0, seed=4)
    with pytest.raises(ConfigError, match="prior_weight is -1"):
        grid(config, prior_weight=[-1])


def test_a_sweep_gives_a_row_a_cell_and_step_and_is_not_run_twice(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = grid(config, prior_weight=[0.0, 1.0])
    done = run(configs, tmp_path)
    assert [(p.done, p.total, p.error) for p in done] == [(1, 2, None), (2, 2, None)]
    rows = table(configs, tmp_path, [2, 4])
    assert [(r["prior_weight"], r["step"]) for r in rows] == [(0, 2), (0, 4), (1, 2), (1, 4)]
    text = (tmp_path / "table.csv").read_text().splitlines()
    assert text[0] == ",".join(["cell", "prior_weight", "step", *sweep.MEASURES])
    assert len(text) == 5
    assert len(list((tmp_path / "class_pictures").iterdir())) == 1
    assert len(list((tmp_path / "latents").glob("*.safetensors"))) == 2
    seen = watch.history(sweep.runs.resume(tmp_path / "prior_weight=1.0"))
    shares = choice.shares(seen[2].subject_fidelity, seen[2].reference_fidelity,
                           seen[2].prompt_adherence, seen[0].prompt_adherence,
                           seen[2].prior_drift, seen[2].unrelated_drift)  # fmt: skip
    assert rows[3]["standing"] == choice.standing(shares)
    assert rows[3]["prior_drift"] == seen[2].prior_drift

    monkeypatch.setattr(sweep, "train", lambda run: pytest.fail("a finished cell ran again"))
    run(configs, tmp_path)


def test_a_cell_that_fails_is_recorded_and_the_rest_goes_on(
    config: TrainConfig, tmp_path: Path
) -> None:
    configs = {
        "broken": config.replace(learning_rate=1e30, max_grad_norm=1e30),
        "sound": config,
    }
    done = run(configs, tmp_path)
    assert [p.error is None for p in done] == [False, True]
    (error,) = json.loads((tmp_path / "failures.json").read_text()).values()
    assert error.startswith("NonFiniteLoss: the loss is nan at step")
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
    one, other = (tmp_path / where / "table.csv" for where in ("here", "there"))
    assert one.read_text() == other.read_text()


def test_recommended_is_the_highest_mean_over_seeds(config: TrainConfig) -> None:
    def row(weight: float, seed: int, step: int, standing: float) -> dict[str, Any]:
        measured = dict.fromkeys(sweep.MEASURES, 0.5) | {"standing": standing}
        return {
            "cell": f"{weight}{seed}", "prior_weight": weight, "seed": seed, "step": step,
        } | measured  # fmt: skip

    rows = [
        row(0, 0, 100, 0.9), row(0, 1, 100, 0.5), row(1, 0, 100, 0.8), row(1, 1, 100, 0.8),
        row(1, 0, 200, 0.8), row(1, 1, 200, 0.8),
    ]  # fmt: skip
    found = recommend(rows)
    assert found.settings == {"prior_weight": 1, "step": 100}, "of equals the fewest steps"
    assert found.standing == pytest.approx(0.8)
    assert found.reason.startswith("prior_weight 1, step 100 stands highest of 3 settings (0.800")
    with pytest.raises(ValueError, match="no rows"):
        recommend([])
