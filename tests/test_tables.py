"""Check that CSV survives a round trip, and the Markdown that a report shows."""

from pathlib import Path

from dreambooth_lib.evaluation.scores import Mean, Row, means
from dreambooth_lib.evaluation.tables import explain, markdown, read_csv, write_csv
from dreambooth_lib.figures.labels import EXPLAINED, NAMES


def test_rows_survive_a_round_trip_through_csv(tmp_path: Path) -> None:
    rows = [
        Row("base", "rex", "live", "clip", "subject_fidelity", 'a {} dog, "wet"', 3, 0.1 + 0.2),
        Row("base", "rex", "live", "clip", "prompt_diversity", "a {} dog", None, 1e-9),
        Row("tuned", "cup", "object", "dino", "pres", None, None, -0.25),
    ]
    write_csv(rows, tmp_path / "scores.csv")
    assert read_csv(tmp_path / "scores.csv") == rows


def test_the_table_has_a_row_per_method_and_leaves_missing_measures_empty() -> None:
    found = [
        Mean("base", "clip", "prompt_adherence", 0.3, 0.29, 0.31, 12),
        Mean("base", "dino", "subject_fidelity", 0.4, 0.38, 0.42, 12),
        Mean("tuned", "dino", "subject_fidelity", 0.66666, 0.65, 0.7, 12),
    ]
    assert markdown(found).splitlines() == [
        "|  | likeness to the photos ↑ (dino) | prompt adherence ↑ (clip) |",
        "| --- | --- | --- |",
        "| base | 0.400 [0.380, 0.420] | 0.300 [0.290, 0.310] |",
        "| tuned | 0.667 [0.650, 0.700] |  |",
    ]
    assert [line.partition(": ")[0] for line in explain(found).splitlines()] == [
        "- *likeness to the photos ↑*", "- *prompt adherence ↑*",
    ]  # fmt: skip
    beside = markdown(found, published=True)
    assert beside.startswith(markdown(found))
    assert "| DreamBooth (Stable Diffusion) | 0.668 | 0.803 | 0.305 |" in beside
    assert "| real images | 0.774 | 0.885 |  |" in beside


def test_an_unknown_measure_keeps_its_name_and_comes_last() -> None:
    own = Mean("base", "clip", "sameness", 0.3, 0.29, 0.31, 1)
    (head, *_) = markdown([own]).splitlines()
    assert head == "|  | sameness (clip) |" and explain([own]) == ""
    (head, *_) = markdown([own, Mean("base", "clip", "pres", 0.3, 0.29, 0.31, 1)]).splitlines()
    assert head.endswith("| sameness (clip) |")


def test_a_single_seed_has_no_interval() -> None:
    def rows(seeds: int) -> list[Row]:
        return [
            Row("base", "rex", "live", "clip", "subject_fidelity", prompt, seed, 0.1 * seed + place)
            for place, prompt in enumerate(("a {} dog", "a {} dog in space"))
            for seed in range(seeds)
        ]

    assert markdown(means(rows(1))).splitlines()[-1] == "| base | 0.500 |"
    assert markdown(means(rows(3))).splitlines()[-1].startswith("| base | 0.600 [")


def test_every_measure_with_a_plain_name_in_a_table_is_explained() -> None:
    shown = NAMES.keys() - {"prior_weight", "step", "score", "unrelated_drift"}
    assert shown == EXPLAINED.keys()
