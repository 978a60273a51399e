"""Check the paper's protocol: its prompts, what is drawn, and resuming."""

import io
import os
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable
from dataclasses import replace
from http.client import HTTPResponse, IncompleteRead
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from conftest import save_photos
from launching import TWO, launched
from PIL import Image
from stand_in_judge import StandIn
from transformers import CLIPTokenizer

from dreambooth_lib.__main__ import main, parser
from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.core.disk import DiskError
from dreambooth_lib.core.subject import Subject
from dreambooth_lib.data.images import DataError
from dreambooth_lib.evaluation import commands, dreambench, report, rubric
from dreambooth_lib.evaluation.demo import BUNDLED_SUBJECTS
from dreambooth_lib.evaluation.dreambench import Benchmark, Protocol, draw_all, load_benchmark
from dreambooth_lib.evaluation.tables import read_csv
from dreambooth_lib.families import loading
from dreambooth_lib.training import runs
from dreambooth_lib.training.loop import train
from dreambooth_lib.training.runs import RunError
from dreambooth_lib.training.validation import TOYBOX_SCORER

ROOT = Path(__file__).parent.parent
REAL = os.environ.get("DREAMBOOTH_TEST_DREAMBENCH")
SHORT = Protocol(images_per_prompt=2, class_images=3, steps=1, batch_size=4)


@pytest.fixture
def benchmark_of_two(tmp_path: Path) -> Benchmark:
    subjects = []
    for name, kind in (("rex", "live"), ("cup", "object")):
        photos = save_photos(tmp_path / "data" / name)
        subjects.append(Subject(photos, "dog" if kind == "live" else "cat", name=name, kind=kind))
    return Benchmark(subjects, {"live": ["a {} {noun}", "a red {} {noun}"], "object": ["a {}"]})


def test_a_protocol_that_cannot_be_scored_is_refused() -> None:
    for name, count, least in (("images_per_prompt", 0, 1), ("class_images", 1, 2)):
        with pytest.raises(ValueError, match=f"{name} is {count}; give {least} or more"):
            Protocol(**{name: count})


def contents(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}


@pytest.mark.skipif(REAL is None, reason="DREAMBOOTH_TEST_DREAMBENCH is not set")
def test_the_data_sets_own_prompts_are_read() -> None:
    found = load_benchmark(Path(REAL or ""))
    assert len(found.subjects) == 8 and {len(p) for p in found.prompts.values()} == {25}
    by_name = {subject.name: subject for subject in found.subjects}
    live, still = found.prompts_for(by_name["dog"]), found.prompts_for(by_name["duck_toy"])
    assert live[0] == "a {} dog in the jungle" and live[13].endswith(
        "a black top hat and a monocle"
    )
    assert still[12] == "a {} toy with the Eiffel Tower in the background"
    assert live[:10] == [p.replace("toy", "dog") for p in still[:10]]
    assert live[-1] == "a cube shaped {} dog"


def test_the_bundled_subjects_have_prompts_that_the_base_knows() -> None:
    found = load_benchmark(BUNDLED_SUBJECTS)
    tokenizer = CLIPTokenizer.from_pretrained(Path(loading.locate("toybox"), "tokenizer"))
    for subject in found.subjects:
        assert len(found.prompts_for(subject)) == 12
        for prompt in found.prompts_for(subject):
            words = prompt.replace("{}", subject.identifier).split()
            assert len(tokenizer.tokenize(" ".join(words))) == len(words)


def test_a_kind_without_prompts_is_refused(tmp_path: Path) -> None:
    save_photos(tmp_path / "cup")
    table = tmp_path / "prompts_and_classes.txt"
    table.write_text("Classes\n\nsubject_name,class\ncup,cup\n\nLive Subject Prompts\n'a {0} {1}'")
    with pytest.raises(DataError, match="no prompts for the object subject 'cup'; add them"):
        load_benchmark(tmp_path)


def test_everything_is_drawn_once_and_an_interrupted_evaluation_resumes(
    benchmark_of_two: Benchmark, tiny_sd1: str, tiny_sd2: str, tmp_path: Path
) -> None:
    methods = {"one": lambda subject: tiny_sd1, "two": lambda subject: tiny_sd2}
    progress = list(draw_all(benchmark_of_two, methods, tmp_path / "complete", SHORT))
    assert progress[-1].done == progress[-1].total == 2 * (2 * 2 + 3) + 2 * (2 + 3)
    assert progress[-1].seconds_left == 0 and len(progress) == 2 * 2 + 2 * 2
    for path in (tmp_path / "complete").rglob("*.png"):
        assert Image.open(path).size == (16, 16)

    interrupted = draw_all(benchmark_of_two, methods, tmp_path / "interrupted", SHORT)
    for _ in range(3):
        next(interrupted)
    interrupted.close()
    (tmp_path / "interrupted/one/rex/p01-s0.png").unlink()
    again = list(draw_all(benchmark_of_two, methods, tmp_path / "interrupted", SHORT))
    assert len(again) == 6 and again[-1].done == again[-1].total
    assert contents(tmp_path / "interrupted") == contents(tmp_path / "complete")
    assert list(draw_all(benchmark_of_two, methods, tmp_path / "interrupted", SHORT)) == []


def test_processes_share_the_work(
    benchmark_of_two: Benchmark, tiny_sd1: str, tmp_path: Path
) -> None:
    methods = {"one": lambda subject: tiny_sd1, "two": lambda subject: tiny_sd1}
    for rank in range(3):
        list(draw_all(benchmark_of_two, methods, tmp_path / "shared", SHORT, rank, 3))
    list(draw_all(benchmark_of_two, methods, tmp_path / "alone", SHORT))
    assert contents(tmp_path / "shared") == contents(tmp_path / "alone")


def test_another_protocol_is_refused(
    benchmark_of_two: Benchmark, tiny_sd1: str, tmp_path: Path
) -> None:
    methods = {"one": lambda subject: tiny_sd1}
    next(draw_all(benchmark_of_two, methods, tmp_path, SHORT))
    other = Protocol(images_per_prompt=2, class_images=3, steps=1, batch_size=4, guidance_scale=7.5)
    with pytest.raises(ValueError, match="another protocol; choose another folder"):
        next(draw_all(benchmark_of_two, methods, tmp_path, other))


def test_images_of_another_base_or_other_settings_are_refused(
    benchmark_of_two: Benchmark, tiny_sd1: str, tiny_sd2: str, tmp_path: Path,
    make_config: Callable[..., TrainConfig],
) -> None:  # fmt: skip
    def by(base: str, **settings: Any) -> dict[str, dreambench.Method]:
        def config(subject: Subject) -> TrainConfig:
            made = make_config(base, subject.photos, steps=1, prior_weight=0.0, **settings)
            return made.replace(subject=subject)

        tuned = dreambench.Tuned(tmp_path / "runs", config)
        return {"base": lambda subject: base, "tuned": tuned}

    out = tmp_path / "out"
    list(draw_all(benchmark_of_two, by(tiny_sd1), out, SHORT))
    before = contents(out)
    with pytest.raises(ValueError, match=r"base/rex holds images with base '.*sd1', but"):
        next(draw_all(benchmark_of_two, by(tiny_sd2), out, SHORT))
    other = {"tuned": by(tiny_sd1, learning_rate=0.5)["tuned"]}
    with pytest.raises(ValueError, match=r"learning_rate 0\.001, but .* have 0\.5; choose"):
        next(draw_all(benchmark_of_two, other, out, SHORT))
    assert contents(out) == before

    shutil.rmtree(tmp_path / "runs")
    assert list(draw_all(benchmark_of_two, by(tiny_sd1), out, SHORT)) == []
    assert not (tmp_path / "runs").exists(), "what is drawn needs no run any more"
    (out / "base" / "cup" / "source.json").unlink()
    with pytest.raises(ValueError, match=r"base/cup holds images without a source\.json"):
        next(draw_all(benchmark_of_two, by(tiny_sd1), out, SHORT))


def test_an_unknown_subject_is_named_with_the_known_ones(
    benchmark_of_two: Benchmark,
) -> None:
    assert [subject.name for subject in benchmark_of_two.only(["cup"]).subjects] == ["cup"]
    with pytest.raises(DataError, match="no subject 'rxe'; there are rex, cup"):
        benchmark_of_two.only(["cup", "rxe"])


def test_every_image_has_a_path_of_its_own(benchmark_of_two: Benchmark) -> None:
    every = [
        image
        for subject in benchmark_of_two.subjects
        for method in ("one", "two")
        for image in dreambench.images_of(benchmark_of_two, method, subject, Protocol())
    ]
    assert len({image.path for image in every}) == len(every)


def test_a_tuned_method_starts_missing_runs_and_resumes_interrupted_ones(
    tiny_sd1: str, photos: str, make_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    subject = Subject(photos, "dog", name="rex", kind="live")
    asked = []

    def config(subject: Subject) -> TrainConfig:
        asked.append(subject.name)
        made = make_config(tiny_sd1, photos, steps=3, prior_weight=0.0, checkpoint_every=1)
        return made.replace(subject=subject)

    method = dreambench.Tuned(tmp_path, config)
    run = runs.start(config(subject), tmp_path / "rex")
    next(train(run))
    assert [row["step"] for row in method(subject).log()] == [1, 2, 3]
    made = (run.pipeline / "model_index.json").stat().st_mtime_ns
    assert method(subject).pipeline == run.pipeline
    assert (run.pipeline / "model_index.json").stat().st_mtime_ns == made
    other = method(Subject(photos, "dog", name="max", kind="live"))
    assert set(asked) == {"rex", "max"} and len(other.log()) == 3
    more = dreambench.Tuned(tmp_path, lambda subject: config(subject).replace(steps=5))
    with pytest.raises(RunError, match=r"rex on .* with steps 3, but .* have 5; choose"):
        more(subject)


def test_an_evaluation_of_photos_that_were_replaced_is_refused_even_where_all_is_drawn(
    tiny_sd1: str, make_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    place = Path(save_photos(tmp_path / "rex"))
    subject = Subject(str(place), "dog", kind="live")
    method = dreambench.Tuned(
        tmp_path / "runs", lambda subject: make_config(tiny_sd1, str(place), prior_weight=0.0)
    )
    drawn = Benchmark([subject], {"live": ["a {} {noun}"]}), {"tuned": method}, tmp_path / "out"
    list(draw_all(*drawn, SHORT))
    assert not list(draw_all(*drawn, SHORT))
    Image.new("RGB", (24, 20), "red").save(place / "0.png")
    for again in (lambda: list(draw_all(*drawn, SHORT)), lambda: method(subject)):
        with pytest.raises(RunError, match=r"trained with other photos than .*another folder"):
            again()


AT_FULL_SIZE = """
import sys
from dataclasses import replace
from pathlib import Path

from dreambooth_lib.evaluation import dreambench, scores, tables
from dreambooth_lib.evaluation.judge import RubricJudge
from dreambooth_lib.evaluation.judge_models import Endpoint
from dreambooth_lib.metrics.encoders import Encoder

data, one, two, clip, dino, address, out = sys.argv[1:]
whole = dreambench.load_benchmark(data)
assert len(whole.subjects) == 8
chosen = [subject for subject in whole.subjects if subject.name in ("dog", "duck_toy")]
benchmark = replace(whole, subjects=chosen)
methods = {"base": lambda subject: one, "tuned": lambda subject: two}
protocol = dreambench.Protocol(steps=1, batch_size=25)
for _ in dreambench.draw_all(benchmark, methods, out, protocol):
    pass
encoders = {"clip": Encoder(clip), "dino": Encoder(dino)}
judge = RubricJudge(Endpoint(address, "stand-in"), Path(out, "judge"))
judges = {judge.name: lambda f: judge(replace(f, prompts=f.prompts[:2], images=f.images[:2]))}
rows = list(scores.score(benchmark, methods, out, encoders, protocol, judges=judges))
tables.write_csv(rows, out + "/scores.csv")
"""


@pytest.mark.slow
@pytest.mark.skipif(REAL is None, reason="DREAMBOOTH_TEST_DREAMBENCH is not set")
def test_the_full_protocol_killed_and_resumed_scores_the_same(
    tiny_sd1: str, tiny_sd2: str, clip_folder: Path, dino_folder: Path, tmp_path: Path
) -> None:
    """Draw 2 subjects x 25 prompts x 4 seeds with two tiny random models, and judge 2 prompts.

    It is killed twice: while it draws, and while the judge's stand-in answers.
    """

    def command(out: Path) -> list[str]:
        paths = (REAL, tiny_sd1, tiny_sd2, clip_folder, dino_folder, api.address, out)
        return [sys.executable, "-c", AT_FULL_SIZE, *map(str, paths)]

    def kill_once(pattern: str, count: int) -> None:
        with subprocess.Popen(command(tmp_path / "killed")) as process:
            while len(list((tmp_path / "killed").rglob(pattern))) < count:
                assert process.poll() is None, "it ended before it could be killed"
                time.sleep(0.02)
            process.kill()
        assert not (tmp_path / "killed/scores.csv").exists()

    questions = 2 * 2 * 4 * 2 * 2
    with StandIn() as api:
        subprocess.run(command(tmp_path / "complete"), check=True)
        distinct = set(api.questions())  # fewer: the base draws two toys alike
        assert len(api.requests) == len(distinct)
        assert len(distinct) == len(list((tmp_path / "complete/judge").glob("*.json"))) <= questions
    rows = read_csv(tmp_path / "complete/scores.csv")
    judged = [r for r in rows if r.encoder == f"stand-in by {rubric.VERSION}"]
    assert len(judged) == questions and len({r.value for r in judged}) == 5
    of_images = [r for r in rows if r.measure == "subject_fidelity" and r.seed is not None]
    assert len(of_images) == 2 * 25 * 4 * 2 * 2
    assert sum(r.method == "real images" for r in rows) == 2 * 2

    with StandIn() as api:
        kill_once("*.png", 2 * 25 * 4)
        assert not api.requests
        kill_once("judge/*.json", questions // 4)
        subprocess.run(command(tmp_path / "killed"), check=True)
        assert set(api.questions()) == distinct
        assert len(api.requests) <= len(distinct) + 4, "again only what was in flight"
    again = read_csv(tmp_path / "killed/scores.csv")
    # Only the rows that differ: pytest's own comparison of 3,000 rows takes minutes and pages.
    assert [pair for pair in zip(again, rows, strict=True) if pair[0] != pair[1]] == []


class Server:
    """A server that gives every request the same answer."""

    def __init__(self, body: bytes, status: int = 200) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(status)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None: ...

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/main.zip"

    def __enter__(self) -> str:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self.url

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


def zipped(files: dict[str, str]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return buffer.getvalue()


def test_the_data_set_is_downloaded_once(tmp_path: Path) -> None:
    archive = zipped({
        "dreambooth-main/README.md": "of the repository",
        "dreambooth-main/dataset/prompts_and_classes.txt": "table",
        "dreambooth-main/dataset/dog/00.jpg": "a photo",
    })  # fmt: skip
    with Server(archive) as url:
        folder = dreambench.download(tmp_path / "data" / "dreambench", url)
    assert contents(folder) == {"prompts_and_classes.txt": b"table", "dog/00.jpg": b"a photo"}
    assert dreambench.download(folder, "http://127.0.0.1:1/never-asked") == folder


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"no archive", 200),
        (b"", 404),
        (zipped({"x/dataset/a": "a", "x/dataset/../../../outside": "b"}), 200),
    ],
    ids=["no zip", "not found", "climbs out"],
)
def test_a_failed_download_is_one_sentence_and_leaves_nothing(
    tmp_path: Path, body: bytes, status: int
) -> None:
    inner = tmp_path / "a" / "b" / "c"
    inner.mkdir(parents=True)
    sentence = r"cannot download the data set from .*download"
    with Server(body, status) as url, pytest.raises(DataError, match=sentence):
        dreambench.download(inner / "dreambench", url)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert list(inner.iterdir()) == []


def test_a_full_disk_is_not_taken_for_a_fault_of_the_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*given: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(zipfile.ZipFile, "extract", full)
    archive = zipped({"x/dataset/a": "a"})
    with Server(archive) as url, pytest.raises(DiskError, match="its disk is full"):
        dreambench.download(tmp_path / "dreambench", url)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error", [ConnectionResetError(104, "Connection reset by peer"), IncompleteRead(b"", 9)]
)
def test_a_connection_that_breaks_is_not_taken_for_a_fault_of_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def broken(*given: Any) -> bytes:
        raise error

    monkeypatch.setattr(HTTPResponse, "read", broken)
    with Server(b"") as url, pytest.raises(DataError, match="check the network"):
        dreambench.download(tmp_path / "dreambench", url)


def test_the_command_evaluates_and_resumes(
    tmp_path: Path, tiny_sd1: str, clip_folder: Path, dino_folder: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    data = tmp_path / "data"
    save_photos(data / "rex", 3)
    (data / "prompts_and_classes.txt").write_text(
        "Classes\n\nsubject_name,class,type\nrex,dog,live\n\n"
        "Live Subject Prompts\n\n'a {0} {1}'.format(unique_token, class_token),\n"
    )
    words = ["evaluate", str(data), "--base", tiny_sd1, "--encoders", str(clip_folder),
             str(dino_folder), "--images-per-prompt", "3", "--steps", "2", "--class-images", "4",
             "--drift-prompts", "a car in a city", "a {noun} on a bed",
             "--scorer", str(clip_folder), "--out", str(tmp_path / "out")]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["dreambooth_lib", *words])
    main()
    first = capsys.readouterr().out
    assert "| dreambooth |" in first
    assert "DreamBooth (Imagen)" not in first, "the paper's rows, beside other encoders"
    assert (tmp_path / "out" / "best_median_worst.png").exists()
    rows = read_csv(tmp_path / "out" / "scores.csv")
    assert {row.method for row in rows} == {"base", "dreambooth", "real images"}
    assert {row.encoder for row in rows} == {clip_folder.name, dino_folder.name}
    drifted = {row.prompt for row in rows if row.measure == "prompt_drift"}
    assert drifted == {"a car in a city", "a dog on a bed"}
    monkeypatch.setattr(report, "PAPER", (str(dino_folder), str(clip_folder)))
    main()  # as after an interruption
    second = capsys.readouterr().out
    assert second.splitlines()[0].startswith("|"), "no image was drawn again"
    table, papers = second.split("\n| arXiv 2208.12242", 1)
    assert "DreamBooth (Imagen)" in papers and table in first


@pytest.mark.parametrize(("base", "given", "expected"), [
    ("toybox", None, [TOYBOX_SCORER]),
    ("some/base", None, ["facebook/dinov2-base", "google/siglip2-base-patch16-224"]),
    ("some/base", ["paper"], ["facebook/dino-vits16", "openai/clip-vit-base-patch32"]),
    ("toybox", ["photos", "an/encoder", "facebook/dinov2-base"],
     ["facebook/dinov2-base", "google/siglip2-base-patch16-224", "an/encoder"]),
])  # fmt: skip
def test_encoders_are_chosen_one_by_one_or_by_the_name_of_a_set(
    base: str, given: list[str] | None, expected: list[str]
) -> None:
    words = ["evaluate", "--base", base, *(["--encoders", *given] if given else [])]
    assert commands._encoders(parser().parse_args(words)) == expected


@pytest.mark.parametrize("option", ["--class-pictures", "--judge"])
def test_options_of_earlier_versions_are_refused(
    option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        parser().parse_args(["evaluate", option, "4"])
    assert stopped.value.code == 2
    assert f"unrecognized arguments: {option}" in capsys.readouterr().err
    given = parser().parse_args(["evaluate", "--class-images", "4", "--scorer", "clip"])
    assert (given.class_images, given.scorer) == (4, "clip")


@pytest.mark.slow
def test_two_processes_evaluate_what_one_does(
    tmp_path: Path, tiny_sd1: str, clip_folder: Path
) -> None:
    data = tmp_path / "data"
    for name in ("rex", "tom"):
        save_photos(data / name, 3)
    (data / "prompts_and_classes.txt").write_text(
        "subject_name,class,type\nrex,dog,live\ntom,cat,live\n\n"
        "Live Subject Prompts\n\n'a {0} {1}'.format(unique_token, class_token),\n"
    )
    tables = []
    for launch in ([], TWO):
        out = tmp_path / str(len(tables))
        words = ["evaluate", str(data), "--base", tiny_sd1, "--encoders", str(clip_folder)]
        words += ["--images-per-prompt", "3", "--steps", "2", "--class-images", "4"]
        words += ["--batch-size", "2"]
        words += ["--scorer", str(clip_folder), "--out", str(out)]
        done = launched(*launch, "-m", "dreambooth_lib", *words)
        assert done.returncode == 0, done.stderr[-2000:]
        tables.append(read_csv(out / "scores.csv"))
    assert done.stdout.startswith("2 processes work together on cpu")
    assert len(tables[0]) == len(tables[1]) > 0
    for alone, shared in zip(*tables, strict=True):
        assert replace(alone, value=0.0) == replace(shared, value=0.0)
        assert alone.value == pytest.approx(shared.value, abs=0.02)
