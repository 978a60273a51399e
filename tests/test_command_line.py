"""Check the command line: one sentence for every fault, and commands that go on after one."""

import ast
import builtins
import io
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors.torch import load_file

import dreambooth_lib
from dreambooth_lib import __main__ as command
from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.core.errors import DEBUG, KitError, one_line
from dreambooth_lib.core.files import replace_file
from dreambooth_lib.evaluation import demo
from dreambooth_lib.export import comfyui
from dreambooth_lib.families.base import Family
from dreambooth_lib.notebook.widgets.training import Interrupted
from dreambooth_lib.training import runs, setup
from dreambooth_lib.training.loop import train

Shell = Callable[..., str]
SOURCES = Path(dreambooth_lib.__file__).parent


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    """Return a function that runs ``python -m dreambooth_lib`` here and returns what it prints."""

    def run(*words: object) -> str:
        monkeypatch.setattr(sys, "argv", ["dreambooth_lib", *map(str, words)])
        command.main()
        return capsys.readouterr().out

    return run


def failing(error: Exception) -> Callable[[object], None]:
    def fail(_: object) -> None:
        raise error from OSError("the cause")

    return fail


def test_an_error_of_the_kit_is_its_sentence_and_another_has_its_type(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "run_sample", failing(KitError("the disk\nis \x1b[1mfull.")))
    with pytest.raises(SystemExit, match=r"^error: the disk is \\x1b\[1mfull\.$"):
        shell("sample", "run", "a dog")
    monkeypatch.setattr(command, "run_sample", failing(KeyError("a\nb")))
    with pytest.raises(SystemExit, match=r"^error: KeyError: .*; add --debug to see the traceback"):
        shell("sample", "run", "a dog")
    assert one_line(ValueError()) == "ValueError" and one_line(KitError("so.")) == "so."


def test_an_interrupted_command_ends_without_a_traceback(
    shell: Shell, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "run_demo", stop)
    with pytest.raises(SystemExit) as caught:
        shell("demo")
    assert caught.value.code == 130 and capsys.readouterr().err == "interrupted.\n"
    with pytest.raises(KeyboardInterrupt):
        shell("demo", "--debug")


@pytest.mark.parametrize("words", [("--debug", "resume", "run"), ("resume", "run", "--debug")])
def test_debug_shows_the_chain_of_errors(
    words: tuple[str, ...], shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "run_resume", failing(KitError("no.")))
    with pytest.raises(KitError) as raised:
        shell(*words)
    assert str(raised.value.__cause__) == "the cause"


def test_a_notebook_shows_the_sentence_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from IPython.core.interactiveshell import InteractiveShell

    shown: list[list[str]] = []
    notebook = InteractiveShell()
    monkeypatch.setattr(
        notebook, "_showtraceback", lambda _kind, _error, lines: shown.append(lines)
    )
    for error in ("KitError('the disk is full.')", "Interrupted('interrupted at step 3')"):
        notebook.user_ns |= {"KitError": KitError, "Interrupted": Interrupted}
        notebook.run_cell(f"raise {error}")
    red = "\x1b[31m{}\x1b[0m"
    assert shown == [[red.format("the disk is full.")], [red.format("interrupted at step 3")]]
    long = "word " * 60 + "/a/path-of-one-piece" + "/and-more" * 12
    notebook.run_cell(f"raise KitError({long!r})")
    lines = shown[-1][0][5:-4].splitlines()
    assert " ".join(lines) == long and lines[-1].startswith("/a/path-of"), "broken at spaces only"
    assert all(len(line) <= 100 for line in lines[:-1])
    assert not issubclass(Interrupted, Exception), "what catches errors catches no interrupt"
    monkeypatch.setenv(DEBUG, "1")
    notebook.run_cell("raise KitError('no.') from OSError('the cause')")
    assert "the cause" in "".join(shown[-1]) and "Traceback" in "".join(shown[-1])


def test_the_same_command_resumes_and_mended_configs_start_anew(
    shell: Shell, tiny_sd1: str, photos: str, make_config: Callable[..., TrainConfig],
    tmp_path: Path,
) -> None:  # fmt: skip
    file, run = tmp_path / "dog.toml", tmp_path / "run"
    config = make_config(tiny_sd1, photos, prior="none", steps=2)
    file.write_text(config.replace(base=f"{tiny_sd1}-mistyped").to_toml())
    with pytest.raises(SystemExit, match="error: "):
        shell("train", file, "--out", run)
    file.write_text(config.to_toml())
    said = shell("train", file, "--out", run)
    assert "step 2/2" in said and "blurred" in said, "what is wrong with photos is told"
    file.write_text(config.replace(steps=3).to_toml())
    said = shell("train", file, "--out", run)
    assert "step 3/3" in said and "step 2/3" not in said and str(run / "pipeline") in said
    with pytest.raises(SystemExit, match="holds a run with base"):
        file.write_text(config.replace(base="toybox").to_toml())
        shell("train", file, "--out", run)


def test_a_run_that_was_moved_with_its_photos_is_resumed(
    shell: Shell, tiny_sd1: str, photos: str, make_config: Callable[..., TrainConfig],
    tmp_path: Path,
) -> None:  # fmt: skip
    shutil.copytree(photos, tmp_path / "old" / "rex")
    config = make_config(tiny_sd1, str(tmp_path / "old" / "rex"), prior="none", steps=1)
    runs.start(config, tmp_path / "old" / "run")
    (tmp_path / "old").rename(tmp_path / "new")
    with pytest.raises(SystemExit, match=r"old/rex, which subject.photos .*--photos FOLDER"):
        shell("resume", tmp_path / "new" / "run")
    with pytest.raises(SystemExit, match=r"^error: .*none"):
        shell("resume", tmp_path / "new" / "run", "--photos", tmp_path / "none")
    said = shell("resume", tmp_path / "new" / "run", "--photos", tmp_path / "new" / "rex")
    assert "step 1/1" in said
    moved = runs.resume(tmp_path / "new" / "run")
    assert moved.config.subject.photos == str(tmp_path / "new" / "rex")


@pytest.mark.parametrize("crop", ["random", "buckets"])
def test_what_the_crop_cuts_is_told_of_the_configs_own_crop(
    crop: str, shell: Shell, tiny_sd1: str, make_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    place = tmp_path / "rex"
    place.mkdir()
    for name in "abc":
        Image.effect_noise((96, 64), 90).convert("RGB").save(place / f"{name}.png")
    config = make_config(tiny_sd1, str(place), prior="none", steps=1, crop=crop, resolution=128)
    (tmp_path / "dog.toml").write_text(config.to_toml())
    said = shell("train", tmp_path / "dog.toml", "--out", tmp_path / "run")
    assert "step 1/1" in said
    assert ("more than a fifth to the crop" in said) == (crop == "random")


def test_samples_of_a_checkpoint_go_where_they_can_be_written(
    shell: Shell, tiny_sd1: str, photos: str, make_config: Callable[..., TrainConfig],
    tmp_path: Path,
) -> None:  # fmt: skip
    config = make_config(tiny_sd1, photos, prior="none", steps=2, checkpoint_every=1)
    (tmp_path / "dog.toml").write_text(config.to_toml())
    run = tmp_path / "a\nrun"
    shell("train", tmp_path / "dog.toml", "--out", run)
    said = shell("sample", run, "a {} dog", "--seeds", 3, "--steps", 1, "--at", 1)
    assert said == f"{tmp_path}/a run/samples/00-seed3.png\n"
    assert [file.name for file in (run / "samples").iterdir()] == ["00-seed3.png"]
    shell("sample", run, "a {} cat", "--seeds", 3, "--steps", 1, "--at", 1)
    names = sorted(file.name for file in (run / "samples").iterdir())
    assert names == ["00-seed3.png", "01-seed3.png"], "earlier samples stay"
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/none/below")):
        with pytest.raises(SystemExit, match=r"^error: .* could not be written \("):
            shell("sample", run, "a {} dog", "--seeds", 3, "--steps", 1, "--out", out)


def test_each_sample_is_saved_before_the_next_is_drawn(
    shell: Shell, tiny_sd1: str, photos: str, make_config: Callable[..., TrainConfig],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    with pytest.raises(SystemExit, match=r"error: .*mistyped"):
        shell("sample", tmp_path / "mistyped", "a {} dog")
    assert not (tmp_path / "mistyped").exists()
    run = runs.start(make_config(tiny_sd1, photos, prior="none", steps=1), tmp_path / "run")
    list(train(run))
    draw, there = Family.generate, []

    def one_more(*given: Any) -> Any:
        there.append(len([*(run.folder / "samples").iterdir()]))
        return draw(*given)

    monkeypatch.setattr(Family, "generate", one_more)
    monkeypatch.setattr(Family, "default_batch_size", 1)
    shell("sample", run.folder, "a {} dog", "--seeds", 1, 2, 3, "--steps", 1)
    assert there == [0, 1, 2]


def test_each_line_is_in_a_pipe_at_once(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = io.BytesIO()

    def step(_: object) -> None:
        print("step 1")
        assert pipe.getvalue() == b"step 1\n"

    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(pipe, newline="\n"))
    monkeypatch.setattr(command, "run_demo", step)
    shell("demo")


@pytest.mark.parametrize("command", ["demo", "figures"])
def test_other_runs_are_not_deleted(
    command: str, shell: Shell, photos: str, make_config: Callable[..., TrainConfig],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A run of one's own lies in the folder that the command trains in."""
    monkeypatch.setattr(demo, "personalise", failing(KitError("it trains.")))
    monkeypatch.setattr(demo, "run_all", lambda *_: iter(()))
    mine = {"demo": tmp_path / "run", "figures": tmp_path / "runs" / "my-dog"}[command]
    config = make_config("toybox", photos)
    runs.start(config, mine)
    if command == "demo":
        with pytest.raises(SystemExit, match=r"holds a run of .*, which is not a bundled subject"):
            shell("demo", "--out", tmp_path)
    else:
        shell("figures", "--out", tmp_path)
    assert (mine / "config.toml").exists()


def test_a_run_exports_what_its_pipeline_has(
    tiny_sd1: str, photos: str, make_config: Callable[..., TrainConfig], tmp_path: Path,
    clip_folder: Path, monkeypatch: pytest.MonkeyPatch, shell: Shell,
) -> None:  # fmt: skip
    fields = {"prior": "none", "steps": 3, "checkpoint_every": 1, "early_stop": True,
              "validate_every": 3, "scorer": str(clip_folder)}  # fmt: skip
    run = runs.start(make_config(tiny_sd1, photos, **fields), tmp_path / "run")
    monkeypatch.setattr(setup.Trainer, "_best_step", lambda _: 2)
    list(train(run))
    assert comfyui.step_to_export(run) == 2
    shell("export", run.folder)
    file = run.folder / "exports" / "run.safetensors"
    said = shell("export", run.folder, "--step", 3)
    other = file.with_name("run-000003.safetensors")
    assert said.startswith(f"Wrote {other} (step 3, ") and file.exists()
    of_2, of_3 = load_file(file), load_file(other)
    assert any((of_3[name] != weight).any() for name, weight in of_2.items())
    for folder in run.checkpoints().values():
        shutil.rmtree(folder)
    assert str(file) in shell("export", run.folder)
    again = load_file(file)
    assert again.keys() == of_2.keys(), "the pipeline, which is step 2"
    assert all((again[name] == weight).all() for name, weight in of_2.items())


def test_a_folder_above_that_cannot_be_made_is_the_disks_error() -> None:
    with pytest.raises(KitError, match=r"/proc/none/below/x.png could not be written"):
        replace_file("/proc/none/below/x.png", b"")


#: Errors that are no KitError, by the file that raises them, and why they reach no user.
INTERNAL = {
    "core/tensor_files.py": "it becomes a DiskError that names the file",
    "data/decoding.py": "it becomes a DataError that names the photo",
    "evaluation/benchmarks.py": "a BadZipFile becomes a DataError that names the address",
    "evaluation/judge_models.py": "it is tried again, then told in a JudgeError",
    "evaluation/sweep_table.py": "it becomes a DataError that names the table",
    "export/original_names.py": "a KeyError becomes an ExportError that names the file",
    "families/base.py": "a family of one's own that leaves a method out",
    "families/one_file.py": "it becomes a BaseError that names the part",
    "metrics/dinov3_pixels.py": "it becomes an error that names the encoder",
    "metrics/encoders.py": "it becomes an error that names the encoder",
    "notebook/drive_copy.py": "it is tried again, then told as the drive's",
    "training/checkpoints.py": "it becomes a CheckpointError, or is a fault of the kit's",
}


def test_every_other_error_is_the_kits() -> None:
    raised = {
        source.relative_to(SOURCES).as_posix()
        for source in SOURCES.rglob("*.py")
        for node in ast.walk(ast.parse(source.read_text()))
        if isinstance(node, ast.Raise) and (name := _name_of(node.exc))
        if isinstance(kind := getattr(builtins, name, None), type) or name == "BadZipFile"
        if name not in ("AttributeError", "SystemExit", "KeyboardInterrupt")
        if kind is None or issubclass(kind, Exception)
    }
    assert raised <= INTERNAL.keys()


def _name_of(raised: ast.expr | None) -> str:
    made = raised.func if isinstance(raised, ast.Call) else raised
    return getattr(made, "id", None) or getattr(made, "attr", "")
