"""Check results as data: collecting, the schema, hostile files, and the table that never mixes."""

import copy
import dataclasses
import json
import random
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import save_photos

from dreambooth_lib.__main__ import main
from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.core.made_with import MADE_WITH_FILE
from dreambooth_lib.evaluation import results, scores, tables
from dreambooth_lib.evaluation.collect_result import collect
from dreambooth_lib.evaluation.results import ResultError, check, read, read_all, render, write
from dreambooth_lib.training import runs
from dreambooth_lib.training.best_checkpoint import best_checkpoint
from dreambooth_lib.training.loop import train
from dreambooth_lib.training.runs import Run
from dreambooth_lib.training.validation_record import history, plan_file, read_plan

ROOT = Path(__file__).parent.parent


def score(encoder: str = "clip", measure: str = "pres", value: float = 0.5, **more: Any) -> dict:
    empty = {"method": "dreambooth", "low": None, "high": None, "count": 1}
    return empty | {"encoder": encoder, "measure": measure, "value": value} | more


def result(base: str = "toybox", **changes: Any) -> dict[str, Any]:
    return {
        "format": 1, "title": "a run", "date": "2026-11-27", "benchmark": "rex",
        "subjects": ["rex"], "step": 4, "config": {"base": base, "method": "full", "steps": 4},
        "versions": {"torch": "2.13.0+cpu"}, "device": "CPU (x86_64, 2 cores)",
        "seeds": {"training": [0], "images": [0, 1]}, "scores": [score()],
        "cost": {"seconds": 60.4, "peak_memory_mb": 900.0, "weights_mb": 3},
    } | changes  # fmt: skip


@pytest.fixture
def trained(
    tmp_path: Path, tiny_sd1: str, photos: str, clip_folder: Path,
    make_config: Callable[..., TrainConfig],
) -> Run:  # fmt: skip
    config = make_config(
        tiny_sd1, photos, steps=2, validate_every=1, scorer=str(clip_folder), prior="none",
        validation_inference_steps=1, seed=7,
    )  # fmt: skip
    run = runs.start(config, tmp_path / "run")
    for _ in train(run):
        pass
    return run


def test_a_runs_result_has_what_it_scored_and_cost_and_no_place(
    trained: Run, tmp_path: Path, tiny_sd1: str, clip_folder: Path
) -> None:
    found = collect(trained.folder)
    file = write(found, tmp_path / "results")
    assert read(file) == found and write(collect(trained.folder), tmp_path / "results") == file
    assert file.name.startswith("sd1-rex-full-")
    text = file.read_text()
    assert str(tmp_path) not in text and str(Path(tiny_sd1).parent) not in text
    assert found["config"]["base"] == "sd1" and "subject" not in found["config"]
    assert found["config"]["scorer"] == clip_folder.name and found["config"]["steps"] == 2
    seeds = read_plan(plan_file(trained.folder)).seeds
    assert found["seeds"] == {"training": [7], "images": [*range(seeds)]}
    assert found["step"] == best_checkpoint(trained).step
    kept = {(s["method"], s["measure"]): s for s in found["scores"]}
    assert {s["encoder"] for s in kept.values()} == {clip_folder.name}
    by_step = {r.step: r for r in history(trained)}
    for method, step in (("base", 0), ("dreambooth", found["step"])):
        for name in ("subject_fidelity", "prompt_adherence", "prior_drift", "pres"):
            assert kept[method, name]["value"] == getattr(by_step[step], name)
    own = kept["real images", "subject_fidelity"]["value"]
    assert own == by_step[0].reference_fidelity and ("base", "seconds") not in kept
    steps = sum(row["seconds"] for row in trained.log())
    seconds = steps + sum(r.seconds for r in history(trained))
    assert found["cost"]["seconds"] == pytest.approx(seconds, abs=0.06)
    sizes = sum(f.stat().st_size for f in trained.pipeline.rglob("*.safetensors"))
    assert found["cost"]["weights_mb"] == pytest.approx(sizes / 1e6, abs=0.006)
    assert 100 < found["cost"]["peak_memory_mb"] < 1e5
    assert {"dreambooth_lib", "python", "torch", "diffusers"} <= found["versions"].keys()


def test_an_adapters_settings_are_kept_and_one_photo_has_no_row_of_its_own(
    tmp_path: Path, tiny_sd1: str, clip_folder: Path, make_config: Callable[..., TrainConfig]
) -> None:
    config = make_config(
        tiny_sd1, save_photos(tmp_path / "rex", 1), steps=1, validate_every=1, prior="none",
        scorer=str(clip_folder), validation_inference_steps=1, method="lora", adapter="lokr",
        adapter_settings={"decompose_factor": 4},
    )  # fmt: skip
    run = runs.start(config, tmp_path / "run")
    for _ in train(run):
        pass
    found = collect(run.folder)
    assert read(write(found, tmp_path / "results")) == found
    assert found["config"]["adapter_settings.decompose_factor"] == 4
    assert {s["method"] for s in found["scores"]} == {"base", "dreambooth"}, "no photo has a pair"


def test_what_cannot_be_a_result_is_one_sentence(trained: Run, tmp_path: Path) -> None:
    with pytest.raises(ResultError, match="is neither a run nor an evaluation; give"):
        collect(tmp_path)
    (trained.folder / MADE_WITH_FILE).write_text('{"versions": 1}')
    with pytest.raises(ResultError, match=r"made_with\.json is damaged; train"):
        collect(trained.folder)
    (trained.folder / MADE_WITH_FILE).unlink()
    with pytest.raises(ResultError, match=r"or lacks made_with\.json, which says"):
        collect(trained.folder)
    (trained.folder / "validation.jsonl").unlink()
    with pytest.raises(ResultError, match="has no validations, and so no scores"):
        collect(trained.folder)


def test_an_evaluation_becomes_a_result_by_the_command(
    tmp_path: Path, tiny_sd1: str, clip_folder: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    data, out, folder = tmp_path / "data", tmp_path / "out", tmp_path / "results"
    for name in ("rex", "tom"):
        save_photos(data / name, 2)
    (data / "prompts_and_classes.txt").write_text(
        "subject_name,class,type\nrex,dog,live\ntom,cat,live\n\n"
        "Live Subject Prompts\n\n'a {0} {1}'.format(unique_token, class_token),\n"
    )

    def shell(*words: object) -> str:
        monkeypatch.setattr(sys, "argv", ["dreambooth_lib", *map(str, words)])
        main()
        return capsys.readouterr().out

    with pytest.raises(SystemExit, match="takes folders of runs"):
        shell("results", "add", "--folder", folder)
    shell("evaluate", data, "--base", tiny_sd1, "--encoders", clip_folder, "--images-per-prompt", 2,
          "--steps", 1, "--class-images", 2, "--scorer", clip_folder, "--out", out)  # fmt: skip
    said = shell("results", "add", out, "--title", "one | two", "--folder", folder).split()
    assert [Path(line).suffix for line in said] == [".json", ".md"]
    found = read(Path(said[0]))
    assert (found["benchmark"], found["subjects"]) == ("2 subjects", ["rex", "tom"])
    assert found["seeds"] == {"training": [0], "images": [0, 1]}
    means = scores.means(tables.read_csv(out / "scores.csv"))
    expected = [vars(mean) for mean in means]
    for one in expected:
        if not one.pop("over_seeds"):
            one |= {"low": None, "high": None}
    assert found["scores"] == expected
    page = (folder / "README.md").read_text()
    assert f"[one \\| two]({Path(said[0]).name})" in page
    (folder / "README.md").unlink()
    assert shell("results", "table", "--folder", folder) == f"{folder / 'README.md'}\n"
    assert (folder / "README.md").read_text() == page
    (folder / "x.json").write_text("{}")
    with pytest.raises(SystemExit, match=r"^error: .*x\.json: \w+ is missing; add it\.$"):
        shell("results", "table", "--folder", folder)


@pytest.fixture
def evaluation(trained: Run, tmp_path: Path) -> Path:
    """Return the folder of an evaluation whose only scored subject is the trained run's."""
    folder = tmp_path / "evaluation"
    name = trained.config.subject.name
    shutil.copytree(trained.folder, folder / "runs" / name)
    (folder / "protocol.json").write_text('{"images_per_prompt": 2}')
    row = scores.Row("dreambooth", name, "live", "clip", "pres", None, None, 0.5)
    tables.write_csv([row], folder / "scores.csv")
    return folder


def another_run(evaluation: Path, **changes: Any) -> Run:
    """Put a second subject's run beside that of an evaluation; return it, unfinished."""
    (place,) = (evaluation / "runs").iterdir()
    config = runs.resume(place).config
    subject = dataclasses.replace(config.subject, name="tom")
    return runs.start(config.replace(subject=subject, **changes), evaluation / "runs" / "tom")


def test_a_result_is_of_the_scored_subjects_runs_alone(evaluation: Path, trained: Run) -> None:
    expected = collect(evaluation)
    another_run(evaluation, seed=8, steps=3)
    assert collect(evaluation) == expected
    assert expected["subjects"] == [trained.config.subject.name]
    assert expected["seeds"]["training"] == [7]


def test_a_result_has_the_step_that_early_stopping_kept(evaluation: Path) -> None:
    assert collect(evaluation)["step"] == 2
    (place,) = (evaluation / "runs").iterdir()
    run = runs.resume(place)
    goal = json.dumps(run.trained() | {"step": 1})  # as after a validation that was the best
    (run.pipeline / runs.GOAL_FILE).write_text(goal)
    found = collect(evaluation)
    assert found["step"] == 1 and found["config"]["steps"] == 2


def test_runs_with_settings_of_their_own_are_no_result(evaluation: Path, trained: Run) -> None:
    other = another_run(evaluation, steps=3)
    shutil.copytree(trained.pipeline, other.pipeline)
    (other.pipeline / runs.GOAL_FILE).write_text("")  # so that it counts as finished
    shutil.copy(trained.folder / MADE_WITH_FILE, other.folder)
    row = scores.Row("dreambooth", "tom", "live", "clip", "pres", None, None, 0.5)
    rows = tables.read_csv(evaluation / "scores.csv")
    tables.write_csv([*rows, row], evaluation / "scores.csv")
    with pytest.raises(ResultError, match=r"differ in steps; evaluate each .* its own\.$"):
        collect(evaluation)
    tables.write_csv([dataclasses.replace(row, subject="gone")], evaluation / "scores.csv")
    with pytest.raises(ResultError, match=r"has no run of a subject in its scores\.csv"):
        collect(evaluation)


def test_the_table_has_a_section_for_each_base_and_encoder(tmp_path: Path) -> None:
    judge = "gpt by DreamBench++ rubric 1"
    write(result(scores=[score(value=0.25), score(judge, "prompt_following", 0.75, low=0.5,
                                                  high=1, count=9)]), tmp_path)  # fmt: skip
    write(result(title="another"), tmp_path)
    write(result("sd15", scores=[score("dino", "pres", 0.125)]), tmp_path)
    results.write_table(tmp_path)
    page = (tmp_path / "README.md").read_text()
    sections = re.split(r"^##+ ", page, flags=re.M)[1:]
    heads = ["Base: sd15", "Scored by dino", "Base: toybox", "Scored by clip", f"Scored by {judge}"]
    assert [s.partition("\n")[0] for s in sections] == heads
    dino, clip, by_judge = sections[1], sections[3], sections[4]
    assert "0.125" in dino and "0.250" not in dino and "class drift" not in page
    assert "0.250" in clip and "0.500" in clip and "0.750" not in clip
    assert "0.750 [0.500, 1.000]" in by_judge and "prompt adherence (VLM) ↑" in by_judge
    assert len([line for line in clip.splitlines() if line.startswith("| [")]) == 2
    for section in (dino, clip, by_judge):
        lines = [line for line in section.splitlines() if line.startswith("|")]
        assert len({line.count("|") for line in lines}) == 1


HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"more": 1}, "'more' is not a field of a result; remove it"),
    "type": ({"step": "4"}, r'step is "4"; it has to be of type int'),
    "bool": ({"step": True}, "step is true; it has to be of type int"),
    "nan": ({"cost": {"seconds": float("nan"), "peak_memory_mb": 1, "weights_mb": 1}},
            "cost.seconds is NaN; give a number below"),
    "digits": ({"step": 10**400}, "step is 10{19}; give a number below"),
    "huge": ({"scores": [score(value=1e300)]}, r"scores\[0\]\.value is 1e\+300; give"),
    "path": ({"title": "in /home/me/runs"}, "title names a place on a machine"),
    "windows": ({"config": {"base": "C:\\me", "method": "full"}}, "config.base names a place"),
    "home": ({"device": "~/x"}, "device names a place"),
    "token": ({"versions": {"torch": "hf_abcdefghijklmnop"}}, "torch looks like a token"),
    "token in a name": ({"versions": {"sk-abcdefghijklmnop": "1"}}, "in versions looks like a tok"),
    "control": ({"benchmark": "a\x1b[31m"}, "benchmark is longer than a line of text"),
    "long": ({"title": "x" * 301}, "title is longer than a line of text"),
    "lists": ({"config": {"base": "a", "method": "b", "x": [[1]]}}, r"config\.x\[0\] is \[1\];"),
    "no base": ({"config": {"method": "full"}}, "config.base is missing"),
    "many": ({"subjects": ["a"] * 1001}, "subjects is not a list of at most 1000"),
    "no list": ({"scores": {}}, "scores is not a list"),
    "no object": ({"cost": []}, "cost is not a JSON object"),
    "format": ({"format": 2}, "format is 2, not 1"),
    "date": ({"date": "27.11.2026"}, "date is '27.11.2026'; write it as"),
    "low": ({"scores": [score(low="0")]}, r'low is "0"; it has to be of type int or float or null'),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_one_sentence(name: str, tmp_path: Path) -> None:
    changes, sentence = HOSTILE[name]
    file = tmp_path / "x.json"
    file.write_text(json.dumps(result(**changes)))
    with pytest.raises(ResultError, match=rf"^{re.escape(str(file))}: .*{sentence}") as raised:
        read(file)
    assert "\n" not in str(raised.value) and str(raised.value).endswith(".")


@pytest.mark.parametrize(
    ("data", "sentence"),
    [(b"", "is not valid"), (b"\xff\xfe", "is not valid"), (b"[" * 100_000, "is not valid"),
     (b"[]", "the file is not a JSON object"), (b"1" * 5000, "is not valid JSON"),
     (b" " * 2**19, "is larger")],
)  # fmt: skip
def test_what_is_no_result_at_all_is_one_sentence(
    data: bytes, sentence: str, tmp_path: Path
) -> None:
    (tmp_path / "x.json").write_bytes(data)
    with pytest.raises(ResultError, match=rf"x\.json:? {sentence}"):
        read_all(tmp_path)


def test_any_damage_is_refused_or_shown_on_one_line() -> None:
    """Put odd values at random places: a table keeps its columns, or the file is refused."""
    draw, shown = random.Random(0), 0
    odd = [None, True, -1, 10**17, 1e308, "", "|", "<b>x</b>", "](x)", "\n", "../a", [], {}, [1],
           {"a": 1}, "\u202e", "`", "a" * 299]  # fmt: skip

    def places(value: Any) -> list[tuple[Any, Any]]:
        keys = value if isinstance(value, dict) else range(len(value))
        inner = [value[k] for k in keys if isinstance(value[k], dict | list)]
        return [(value, k) for k in keys] + [place for v in inner for place in places(v)]

    for _ in range(3000):
        damaged = copy.deepcopy(result())
        holder, key = draw.choice(places(damaged))
        holder[key] = draw.choice(odd)
        try:
            check(damaged)
        except ResultError as error:
            assert str(error).endswith(".") and "\n" not in str(error)
            continue
        shown += 1
        page = render({"x.json": damaged})
        lines = [line for line in page.splitlines() if line.startswith("|")]
        bars = {len(re.findall(r"(?<!\\)\|", line)) for line in lines}
        assert len(lines) in (0, 3) and len(bars) <= 1 and "<b>" not in page
    assert shown > 300


def test_the_kits_own_results_are_sound_and_their_table_is_current() -> None:
    folder = ROOT / "docs" / "results"
    found = read_all(folder)
    assert found and (folder / "README.md").read_text() == render(found)
