"""Test a checkpoint exported as a model: loaded by diffusers, all or nothing, zipped, copied."""

import os
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote_to_bytes

import pytest
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from dreambooth_lib.core import files
from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.core.disk import DiskError
from dreambooth_lib.core.subject import Subject
from dreambooth_lib.export import comfyui, model_card, pipeline_folder, zip_download
from dreambooth_lib.export.comfyui_lora import ExportError
from dreambooth_lib.families import loading
from dreambooth_lib.families.base_files import BaseError
from dreambooth_lib.training import loop, runs, sampling, trainable
from dreambooth_lib.training.runs import Run

Make = Callable[..., TrainConfig]


@pytest.fixture
def trained(
    tiny_sd1: str, photos: str, clip_folder: Path, make_config: Make, tmp_path: Path
) -> Callable[..., Run]:
    def train(name: str = "my-dog", **changes: Any) -> Run:
        fields = {"scorer": str(clip_folder), "validate_every": 2, "learning_rate": 0.05} | changes
        config = make_config(tiny_sd1, photos).replace(**fields)
        run = runs.start(config, tmp_path / "runs" / name)
        list(loop.train(run))
        return run

    return train


def denoiser(pipeline: Any) -> dict[str, torch.Tensor]:
    return pipeline.unet.state_dict()


def test_the_checkpoint_is_what_plain_diffusers_reads(
    trained: Callable[..., Run], tmp_path: Path
) -> None:
    run, folder = trained(resolution=16), tmp_path / "models" / "my-dog"
    archive = pipeline_folder.write_model(run, 2, folder)
    expected = denoiser(trainable.load_at_checkpoint(run, 2).pipeline)
    actual = denoiser(DiffusionPipeline.from_pretrained(folder))
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], value.half().float()) for name, value in expected.items())
    assert archive == tmp_path / "models" / "my-dog.zip"
    with zipfile.ZipFile(archive) as packed:
        assert all(info.compress_type == zipfile.ZIP_STORED for info in packed.infolist())
        packed.extractall(tmp_path / "unpacked")
    names = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    unpacked = tmp_path / "unpacked"
    assert {p.relative_to(unpacked) for p in unpacked.rglob("*") if p.is_file()} == names
    assert {Path("README.md"), Path("samples.png"), Path("model_index.json")} <= names
    scope: dict[str, Any] = {}
    code = model_card.usage(run, folder).splitlines()
    exec("\n".join(code[:-1]), scope)
    assert "a ohwx dog on the beach" in code[-1] and len(code) == 6
    assert "width=16, height=16)" in code[-1], "the size it was trained at"
    assert denoiser(scope["pipeline"]).keys() == expected.keys()


def test_an_exported_model_is_in_half_precision_and_draws_whatever_dtype_is_asked_for(
    trained: Callable[..., Run], tmp_path: Path
) -> None:
    run, folder = trained(train_text_encoder=True), tmp_path / "models" / "my-dog"
    pipeline_folder.write_model(run, 2, folder)
    for part, dtype in (("unet", torch.float16), ("text_encoder", torch.float16),
                        ("vae", torch.float32)):  # fmt: skip
        (file,) = (folder / part).glob("*.safetensors")
        assert {v.dtype for v in load_file(file).values() if v.is_floating_point()} == {dtype}
    pipeline = DiffusionPipeline.from_pretrained(folder)
    assert pipeline("a dog", num_inference_steps=1, height=16, width=16).images
    halves = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float16)
    assert halves.unet.dtype is halves.text_encoder.dtype is torch.float16


@pytest.mark.parametrize("fields", [{}, {"dora": True}, {"train_text_encoder": True},
                                    {"train_token": True}, {"ema_decay": 0.5}])  # fmt: skip
def test_a_lora_is_exported_without_loading_its_base(
    fields: dict[str, Any], trained: Callable[..., Run], photos: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    subject = Subject(photos, "dog", "<rex>")
    run = trained(method="lora", lora_rank=2, subject=subject, **fields)

    def loaded(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the base was loaded")

    last = max(run.checkpoints())
    with monkeypatch.context() as patch:
        patch.setattr("dreambooth_lib.families.pretrained.load_pretrained", loaded)
        pipeline_folder.write_model(run, last, tmp_path / "models" / "my-dog")
    for name in ("pytorch_lora_weights.safetensors", "word/token.safetensors"):
        if (run.pipeline / name).exists():
            one, other = (
                load_file(folder / name) for folder in (run.pipeline, tmp_path / "models/my-dog")
            )
            assert one.keys() == other.keys() and len(one) > 0
            assert all(torch.equal(one[key], other[key]) for key in one), name


@pytest.mark.parametrize("family", ["sd1", "sdxl", "flux"])
def test_a_text_encoders_lora_has_the_names_that_every_version_of_transformers_reads(
    family: str, tiny_bases: Callable[[str], str], trained: Callable[..., Run]
) -> None:
    """From 5.6 on, transformers' own names of CLIP's layers lack ``text_model.``."""
    base = tiny_bases(family)
    run = trained(base=base, method="lora", train_text_encoder=True, resolution=16, steps=1)
    weights = load_file(run.pipeline / "pytorch_lora_weights.safetensors")
    names = {key for key in weights if key.startswith("text_encoder")}
    assert names
    for name in names:
        assert re.match(r"text_encoder(_2)?\.text_model\.encoder\.layers\.\d+\.", name), name
    pipeline = DiffusionPipeline.from_pretrained(base)
    pipeline.load_lora_weights(run.pipeline)
    for name in {key.split(".")[0] for key in names}:
        state = getattr(pipeline, name).state_dict()
        loaded = [key for key in state if "lora" in key]
        assert len(loaded) == sum(key.startswith(f"{name}.") for key in names)


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize(
    ("family", "half", "asked"),
    [("sd1", torch.float16, (50, 7.5, 16, 16)), ("flux", torch.bfloat16, (28, 3.5, 16, 16))],
)
def test_the_lines_that_are_printed_draw_in_half_precision_where_there_is_a_gpu(
    family: str, half: torch.dtype, asked: tuple[float, ...], gpu: bool,
    tiny_bases: Callable[[str], str], trained: Callable[..., Run], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Execute the lines as they are, except that the CPU stands in for the GPU."""
    run = trained(base=tiny_bases(family), method="lora", resolution=16, steps=2)
    pipeline_folder.write_model(run, 2, tmp_path / "model")
    placed: list[Any] = []
    drawn: list[Any] = []

    def call(pipeline: Any, prompt: str, **how: Any) -> Any:
        drawn.append((prompt, *how.values()))
        return SimpleNamespace(images=["picture"])

    kind = type(DiffusionPipeline.from_pretrained(run.config.base))
    monkeypatch.setattr(kind, "__call__", call)
    monkeypatch.setattr(kind, "to", lambda self, *args, **kwargs: placed.append(args))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    scope: dict[str, Any] = {}
    exec(model_card.usage(run, tmp_path / "model"), scope)
    parts = scope["pipeline"].components.values()
    actual = {part.dtype for part in parts if isinstance(part, torch.nn.Module)}
    assert actual == {half if gpu else torch.float32}
    assert placed == [("cuda" if gpu else "cpu",)]
    assert drawn == [("a ohwx dog on the beach", *asked)]


def test_a_lora_with_text_encoders_is_exported_where_a_layer_is_unused(
    tiny_bases: Callable[[str], str], trained: Callable[..., Run], tmp_path: Path
) -> None:
    run = trained(
        "run", base=tiny_bases("sdxl"), method="lora", train_text_encoder=True, resolution=16
    )
    (tmp_path / "lora").mkdir()
    pipeline_folder.write_pipeline(run, run.config.steps, tmp_path / "lora")
    exported = load_file(tmp_path / "lora" / loading.LORA_FILE)
    whole = load_file(run.pipeline / loading.LORA_FILE)
    assert exported.keys() < whole.keys()
    assert all(torch.equal(exported[name], whole[name]) for name in exported)
    unused = [whole[name] for name in whole.keys() - exported.keys() if "lora_B" in name]
    assert unused and not any(weight.any() for weight in unused), "they change nothing"
    pipeline = DiffusionPipeline.from_pretrained(run.config.base)
    pipeline.load_lora_weights(tmp_path / "lora", weight_name=loading.LORA_FILE)


def test_the_lines_of_a_lora_name_the_variant_that_its_base_has(
    tiny_sd1: str, trained: Callable[..., Run], tmp_path: Path
) -> None:
    base = Path(shutil.copytree(tiny_sd1, tmp_path / "base"))
    for file in base.glob("*/*.safetensors"):
        file.rename(file.with_suffix(".fp16.safetensors"))
    lora = {"variant": "fp16", "method": "lora", "lora_rank": 2, "steps": 2}
    below = trained("below", base=str(base), **lora)
    for run in (below, trained("top", base=str(below.folder), **lora | {"variant": None})):
        code = model_card.usage(run, run.pipeline)
        exec("\n".join(code.splitlines()[:-1]), {})
        assert code.count('variant="fp16"') == 1


def test_the_lines_of_a_lora_whose_base_is_gone_leave_out_what_is_not_known(
    trained: Callable[..., Run], tiny_sd1: str, tmp_path: Path
) -> None:
    base = shutil.copytree(tiny_sd1, tmp_path / "base")
    run = trained(base=str(base), method="lora", steps=2)
    assert "num_inference_steps=50, guidance_scale=7.5)" in model_card.usage(run, "me/my-dog")
    shutil.rmtree(base)
    assert model_card.usage(run, "me/my-dog").endswith(
        'pipeline("a ohwx dog on the beach").images[0]'
    )


@pytest.mark.parametrize("dora", [False, True])
def test_of_a_lora_run_it_is_what_plain_diffusers_loads_onto_the_base(
    dora: bool, trained: Callable[..., Run], tmp_path: Path
) -> None:
    run = trained(method="lora", lora_rank=2, lora_alpha=6, dora=dora)
    folder = tmp_path / "models" / "my-dog"
    pipeline_folder.write_model(run, 2, folder)
    files = [path.name for path in folder.iterdir()]
    assert "pytorch_lora_weights.safetensors" in files and "unet" not in files
    assert not any(str(tmp_path).encode() in path.read_bytes() for path in folder.iterdir())
    scope: dict[str, Any] = {}
    exec("\n".join(model_card.usage(run, folder).splitlines()[:-1]), scope)
    expected = trainable.load_at_checkpoint(run, 2)
    x, cond = torch.ones(1, 4, 8, 8), torch.ones(1, 12, 16)
    t = torch.tensor([5])
    with torch.no_grad():
        one = scope["pipeline"].unet(x, t, cond).sample
        other = expected.denoiser.eval()(x, t, cond).sample
        base = DiffusionPipeline.from_pretrained(run.config.base).unet(x, t, cond).sample
    assert torch.allclose(one, other, atol=1e-5) and not torch.allclose(one, base, atol=1e-3)
    card = ModelCard.load(folder / "README.md")
    assert "lora" in card.data.tags and "A LoRA for `sd1`" in card.text
    assert "load_lora_weights" in card.text and "as a LoRA of rank 2" in card.text


@pytest.mark.parametrize("family", ["sd1", "sdxl", "sd3", "flux"])
def test_the_lines_that_are_printed_give_plain_diffusers_the_new_word(
    family: str, tiny_bases: Callable[[str], str], trained: Callable[..., Run], photos: str,
    tmp_path: Path,
) -> None:  # fmt: skip
    run = trained(
        base=tiny_bases(family), subject=Subject(photos, "dog", "<rex>"), resolution=16, steps=2,
        method="lora", lora_rank=2, train_token=True,
    )  # fmt: skip
    folder = tmp_path / "models" / "my-dog"
    pipeline_folder.write_model(run, 2, folder)
    code, _, drawn = model_card.usage(run, folder).rpartition("\n")
    scope: dict[str, Any] = {}
    exec(code, scope)
    assert "a <rex> dog on the beach" in drawn
    assert code.count("load_textual_inversion") == (0 if family == "sd3" else code.count("word["))
    tuned = trainable.load_at_checkpoint(run, 2)
    assert len(tuned.text_encoders) == code.count("word[")
    for number, expected in zip(("", "_2"), tuned.text_encoders, strict=False):
        actual = getattr(scope["pipeline"], f"text_encoder{number}").get_input_embeddings().weight
        assert torch.equal(actual, expected.get_input_embeddings().weight)
        assert "<rex>" in getattr(scope["pipeline"], f"tokenizer{number}").tokenize("a <rex> dog")
    assert 'hf_hub_download("this model\'s name", "word/token' in (folder / "README.md").read_text()


def test_a_model_deletes_no_other_folder_that_has_one_too(
    trained: Callable[..., Run], tmp_path: Path
) -> None:
    run, mine = trained(), tmp_path / "mine"
    pipeline_folder.write_pipeline(run, 2, mine)  # as any pipeline is
    (mine / "README.md").write_text("mine")
    with pytest.raises(ExportError, match="mine holds other files"):
        pipeline_folder.write_model(run, 2, mine)
    assert (mine / "README.md").read_text() == "mine"
    for step in (2, 4):
        pipeline_folder.write_model(run, step, tmp_path / "models")


def test_an_older_model_stays_where_a_newer_one_cannot_be_written(
    trained: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, folder = trained(), tmp_path / "models" / "my-dog"
    archive = pipeline_folder.write_model(run, 2, folder)
    before = {path: path.stat().st_size for path in (folder / "unet").iterdir()}, archive.stat()

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(model_card, "write_card", full)
        with pytest.raises(DiskError, match="disk is full"):
            pipeline_folder.write_model(run, 4, folder)
    with monkeypatch.context() as patch:
        patch.setattr(zipfile.ZipFile, "write", full)
        with pytest.raises(DiskError, match="disk is full"):
            zip_download.zip_folder(folder)
    after = {path: path.stat().st_size for path in (folder / "unet").iterdir()}, archive.stat()
    assert before == after
    assert sorted(path.name for path in folder.parent.iterdir()) == ["my-dog", "my-dog.zip"]


def test_a_drive_that_fails_costs_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "WAITS", (0.0, 0.0))
    archive, drive = tmp_path / "my-dog.zip", tmp_path / "drive"
    archive.write_bytes(b"zip")
    assert zip_download.copy_to(drive, archive) is None
    assert (drive / "my-dog.zip").read_bytes() == b"zip"

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    message = zip_download.copy_to(drive, archive)
    assert message is not None and message.count("\n") == 0 and "disk is full" in message


def test_a_link_names_the_file_its_size_and_no_more_than_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "models" / '50% <b>of</b> "rex" #1?.zip'.replace("/", "-")
    file.parent.mkdir()
    file.write_bytes(b"0" * 2_340_000)
    message = zip_download.download_link(file).data
    assert message == (
        '<a href="models/50%25%20%3Cb%3Eof%3C-b%3E%20%22rex%22%20%231%3F.zip" download>'
        "models/50% &lt;b&gt;of&lt;-b&gt; &quot;rex&quot; #1?.zip</a> (2.3 MB)"
    )
    with file.open("r+b") as grown:
        grown.truncate(4_265_000_000)  # as a model's; the disk holds no more than before
    assert "(4.3 GB)" in zip_download.download_link("models" / Path(file.name)).data


@pytest.mark.parametrize("family", ["sd1", "toybox"])
def test_the_lines_of_a_lora_on_a_lora_load_both_onto_the_true_base(
    family: str, tiny_bases: Callable[[str], str], trained: Callable[..., Run], tmp_path: Path
) -> None:
    base = family if family == "toybox" else tiny_bases(family)
    rate = {"method": "lora", "lora_rank": 2, "learning_rate": 0.05, "steps": 2}
    one = trained("one", base=base, **rate)
    two = trained("two", base=str(one.folder), **rate)
    folder = tmp_path / "models" / "two"
    pipeline_folder.write_model(two, 2, folder)
    scope: dict[str, Any] = {}
    given = loading.locate(two.config.base)  # as the notebook says where the base is
    exec("\n".join(model_card.usage(two, folder, given).splitlines()[:-1]), scope)
    scope["pipeline"].fuse_lora()
    scope["pipeline"].unload_lora_weights()
    weights = scope["pipeline"].unet.state_dict()
    for name, expected in trainable.load_at_checkpoint(two, 2).denoiser.state_dict().items():
        assert torch.allclose(weights[name], expected, atol=1e-5), name
    text = (folder / "README.md").read_text()
    assert (
        f"A LoRA for `{family}` with `{one.folder.name}`, which this folder does not hold" in text
    )
    assert text.index(f'load_lora_weights("{one.folder.name}"') < text.index(
        "this model's name\", w"
    )
    assert str(tmp_path) not in text
    told = comfyui.export(two, folder, tmp_path / "two.safetensors")
    assert f"It was trained on '{one.folder}/pipeline', which it does not hold" in told


def test_a_file_of_any_date_is_zipped(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "a.json").write_text("{}")
    os.utime(tmp_path / "model" / "a.json", (0, 0))  # as some drives date files
    with zipfile.ZipFile(zip_download.zip_folder(tmp_path / "model")) as archive:
        assert archive.read("a.json") == b"{}"


@pytest.mark.parametrize("name", ["a<b>.zip", 'a"onclick="x.zip', "a\nb.zip", "a&amp;b.zip"])
def test_a_link_shows_any_name_as_text(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for path in (name, os.fsdecode(b"\xff" + name.encode())):
        Path(path).write_bytes(b"x")
        link = zip_download.download_link(path).data
        link.encode()
        (address,) = re.findall(r'^<a href="([^"<>]*)" download>[^<>\n]*</a> \(', link)
        assert unquote_to_bytes(address) == os.fsencode(path)


def test_the_code_of_a_lora_on_a_finished_run_runs_as_printed(
    start_run: Callable[..., Run], tmp_path: Path
) -> None:
    whole = start_run("whole", "sd1", prior="none", steps=1)
    list(loop.train(whole))
    lora = whole.config.replace(method="lora", lora_rank=2)
    below = runs.start(lora.replace(base=str(whole.folder)), tmp_path / "below")
    list(loop.train(below))
    on_top = runs.start(lora.replace(base=str(below.folder)), tmp_path / "top")
    list(loop.train(on_top))
    for run in (below, on_top):
        scope: dict[str, Any] = {}
        exec("\n".join(model_card.usage(run, run.pipeline).split("\n")[:-1]), scope)
        scope["pipeline"].fuse_lora()
        drawn = scope["pipeline"].unet.state_dict()
        expected = sampling.load_source(run).denoiser.state_dict()
        for name, value in expected.items():
            own = drawn.get(name, drawn.get(name.replace(".weight", ".base_layer.weight")))
            if own is None:
                own = drawn[name.replace(".bias", ".base_layer.bias")]
            assert torch.allclose(own, value, atol=1e-6), name


def test_the_lines_of_a_lora_below_merge_a_text_encoders_lora_too(
    start_run: Callable[..., Run], tmp_path: Path
) -> None:
    rates = {"lora_rank": 2, "learning_rate": 0.1, "train_text_encoder": True}
    below = start_run("below", "flux", method="lora", prior="none", steps=1, **rates)
    list(loop.train(below))
    lora = below.config.replace(base=str(below.folder), train_text_encoder=False)
    on_top = runs.start(lora, tmp_path / "top")
    list(loop.train(on_top))
    scope: dict[str, Any] = {}
    exec("\n".join(model_card.usage(on_top, on_top.pipeline).split("\n")[:-1]), scope)
    drawn = scope["pipeline"].text_encoder.state_dict()
    for name, value in sampling.load_source(below).text_encoders[0].state_dict().items():
        assert torch.allclose(drawn[name], value, atol=1e-6), name


def test_an_empty_tokenizer_is_told_as_such(tiny_sd1: str, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_sd1, tmp_path / "base"))
    shutil.rmtree(base / "tokenizer")
    (base / "tokenizer").mkdir()
    with pytest.raises(BaseError, match="tokenizer is empty; download or copy the base again"):
        loading.load_model(str(base))
