"""Check that CSV survives a round trip, and the Markdown that a report shows."""

from pathlib import Path

from dreambooth_lib.evaluation.scores import Mean, Row
from dreambooth_lib.evaluation.tables import markdown, read_csv, write_csv


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
        "|  | follows the prompt ↑ (clip) | likeness to the photos ↑ (dino) |",
        "| --- | --- | --- |",
        "| base | 0.300 [0.290, 0.310] | 0.400 [0.380, 0.420] |",
        "| tuned |  | 0.667 [0.650, 0.700] |",
    ]
    beside = markdown(found, published=True)
    assert beside.startswith(markdown(found))
    assert "| DreamBooth (Stable Diffusion) | 0.668 | 0.803 | 0.305 |" in beside
    assert "| real pictures | 0.774 | 0.885 |  |" in beside


def test_an_unknown_measure_keeps_its_name() -> None:
    (head, *_) = markdown([Mean("base", "clip", "sameness", 0.3, 0.29, 0.31, 1)]).splitlines()
    assert head == "|  | sameness (clip) |"
