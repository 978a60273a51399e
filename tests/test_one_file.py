"""Take Stable Diffusion models in one file as bases."""

import json
import pickle
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_hub import TOKEN, FakeHub, Repo
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_comfyui import save_pipeline

from dreambooth_lib.core import download
from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.core.config_types import ConfigError
from dreambooth_lib.core.digests import file_digest
from dreambooth_lib.core.errors import KitError
from dreambooth_lib.export import model_card
from dreambooth_lib.export.comfyui_checkpoint import write_checkpoint
from dreambooth_lib.families import loading, one_file, one_file_header
from dreambooth_lib.families.base_files import BaseError
from dreambooth_lib.families.one_file_header import LAYOUT, read_header
from dreambooth_lib.notebook import preflight
from dreambooth_lib.notebook.base_models import describe
from dreambooth_lib.training import loop, runs

XL, V1, V2 = ({
    "conditioner.embedders.0.transformer.text_model.x": (1,),
    "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias": (1,),
}, {"cond_stage_model.transformer.text_model.x": (1,)}, {
    "cond_stage_model.model.x": (1,),
    "model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight": (1, 1024),
})  # fmt: skip
OTHERS = {"model.diffusion_model.x": (1,), "first_stage_model.x": (1,)}


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Unpack into a folder of the test's own."""
    monkeypatch.setattr(one_file, "store", lambda: tmp_path / "store")
    return tmp_path / "store"


def header_of(
    folder: Path, *parts: dict[str, tuple[int, ...]], name: str = "m.safetensors",
    dtype: torch.dtype = torch.float16, metadata: dict[str, str] | None = None,
) -> one_file_header.Header:  # fmt: skip
    shapes = {key: shape for part in parts for key, shape in part.items()}
    save_file({k: torch.ones(s, dtype=dtype) for k, s in shapes.items()}, folder / name, metadata)
    return read_header(folder / name)


def weights(base: str) -> dict[str, torch.Tensor]:
    pipeline = loading.load_model(base).pipeline
    models = {n: m for n, m in pipeline.components.items() if isinstance(m, torch.nn.Module)}
    return {f"{n}.{key}": w for n, m in models.items() for key, w in m.state_dict().items()}


def equal(one: str, other: str) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture
def folder(tiny_sd1: str, tmp_path: Path) -> Path:
    """Copy the tiny base in float16, as an exported file has it."""
    copied = Path(shutil.copytree(tiny_sd1, tmp_path / "tiny"))
    for file in copied.glob("*/*.safetensors"):
        save_file({k: v.half() for k, v in load_file(file).items()}, file, {"format": "pt"})
    return copied


@pytest.fixture
def exported(folder: Path, tmp_path: Path) -> Path:
    return write_checkpoint(folder, tmp_path / "one.safetensors")


# Round trip


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_what_the_kit_exports_is_a_base_again_with_equal_weights(kind: str, tmp_path: Path) -> None:
    source = str(save_pipeline(kind, tmp_path / kind))
    path = write_checkpoint(source, tmp_path / "one.safetensors", torch.float32)
    assert equal(str(path), source)
    again, own = loading.load_model(str(path)), loading.load_model(source)
    assert dict(again.pipeline.scheduler.config) == dict(own.pipeline.scheduler.config)
    assert again.inference == own.inference and again.resolution == own.resolution
    tokenizers = [f.pipeline.tokenizer(["a ohwx dog"]).input_ids for f in (again, own)]
    assert tokenizers[0] == tokenizers[1]


def test_the_embedded_base_in_one_file_trains_to_the_same_digest_as_its_folder(
    photos: str, make_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    path = write_checkpoint(loading.locate("toybox"), tmp_path / "one.safetensors")
    digests = []
    for name, base in (("folder", loading.locate("toybox")), ("file", str(path))):
        config = make_config(base, photos, steps=2, class_images=2, resolution=64)
        run = runs.start(config, tmp_path / name / "run")
        list(loop.train(run))
        file = run.pipeline / "unet" / "diffusion_pytorch_model.safetensors"
        digests.append(file_digest(file))
    assert digests[0] == digests[1] and (tmp_path / "store").is_dir()


def test_a_lora_on_one_file_draws_again(
    exported: Path, photos: str, make_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    config = make_config(str(exported), photos, method="lora", steps=1,
                         prediction_type="v_prediction_ztsnr")  # fmt: skip
    run = runs.start(config, tmp_path / "run")
    list(loop.train(run))
    scheduler = loading.load_model(str(run.folder)).pipeline.scheduler.config
    assert scheduler.prediction_type == "v_prediction" and scheduler.rescale_betas_zero_snr
    code = model_card.usage(run, "model")
    assert f"StableDiffusionPipeline.from_single_file('{exported}'" in code.replace('"', "'")
    assert "from_config(pipeline.scheduler.config, prediction_type='v_prediction'" in code
    with pytest.raises(KitError, match="prediction_type"):
        runs.start_or_resume(config.replace(prediction_type="epsilon"), run.folder)


def test_a_file_whose_suffix_is_in_upper_case_is_a_base(
    exported: Path, folder: Path, tmp_path: Path
) -> None:
    renamed = exported.rename(tmp_path / "ONE.SAFETENSORS")
    assert equal(str(renamed), str(folder))
    assert one_file.parse("me/one/M.SafeTensors") == one_file.OneFile(
        repository="me/one", file="M.SafeTensors"
    )


def test_a_file_is_unpacked_once_and_known_by_its_content(
    exported: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = loading.locate(str(exported))
    monkeypatch.setattr(one_file, "_convert", lambda *given: pytest.fail("unpacked again"))
    assert loading.locate(str(exported)) == place
    assert loading.locate(str(shutil.copy(exported, tmp_path / "copy.safetensors"))) == place
    assert [f.name for f in store.iterdir() if f.is_dir() and f.name != "references"] == [
        Path(place).name
    ]


def test_a_text_encoder_with_an_early_transformers_keys_is_read(
    exported: Path, folder: Path
) -> None:
    with safe_open(exported, "pt") as file:
        metadata = file.metadata()
    tensors = {
        key.replace("cond_stage_model.transformer.text_model.", "cond_stage_model.transformer."): w
        for key, w in load_file(exported).items()
    }
    assert "cond_stage_model.transformer.final_layer_norm.bias" in tensors
    save_file(tensors, exported, metadata)
    assert equal(str(exported), str(folder))
    assert not (Path(loading.locate(str(exported))) / "renamed").exists()


def test_an_unpacking_that_fails_leaves_nothing(
    exported: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors, metadata = load_file(exported), read_header(exported).layout
    lacking = next(key for key in tensors if key.endswith("input_blocks.0.0.weight"))
    del tensors[lacking]
    save_file(tensors, exported, {LAYOUT: json.dumps(metadata)})
    with pytest.raises(BaseError, match=r"lacks weights of its unet"):
        loading.locate(str(exported))
    assert [file.name for file in store.iterdir()] == [".lock"]


# What a file is


@pytest.mark.parametrize(
    ("parts", "metadata", "kind", "prediction"),
    [
        ([V1], {}, "v1", "epsilon"),
        ([V1], {"modelspec.prediction_type": "v"}, "v1", "v_prediction"),
        ([V1], {"ss_v_parameterization": "True"}, "v1", "v_prediction"),
        ([XL], {}, "xl_base", "epsilon"),
        ([XL, {"v_pred": (0,)}], {}, "xl_base", "v_prediction"),
        ([XL, {"v_pred": (0,), "ztsnr": (0,)}], {}, "xl_base", "v_prediction_ztsnr"),
        ([XL, {"ztsnr": (0,)}], {}, "xl_base", "epsilon"),
        ([V2], {"modelspec.prediction_type": "epsilon"}, "v2", "epsilon"),
        (
            [V1],
            {"modelspec.prediction_type": "v", "ss_zero_terminal_snr": "True"},
            "v1",
            "v_prediction_ztsnr",
        ),
    ],
)
def test_a_header_tells_the_kind_and_what_is_predicted(
    parts: list[Any], metadata: dict[str, str], kind: str, prediction: str, tmp_path: Path
) -> None:
    header = header_of(tmp_path, *parts, OTHERS, metadata=metadata)
    assert (header.kind, header.prediction_type) == (kind, prediction)
    scheduler = json.loads(header.layout["scheduler/scheduler_config.json"])
    assert scheduler.get("rescale_betas_zero_snr", False) == prediction.endswith("ztsnr")
    if kind == "v2":
        assert json.loads(header.layout["unet/config.json"])["sample_size"] == 64


@pytest.mark.parametrize(("spread", "prediction"), [(0.2, "v_prediction"), (0.01, "epsilon")])
def test_a_2x_model_tells_what_it_predicts_by_a_norm(
    spread: float, prediction: str, tmp_path: Path
) -> None:
    shapes = V2 | OTHERS
    tensors = {key: torch.ones(shape) for key, shape in shapes.items()}
    tensors[one_file_header._V2_TELLING] = torch.tensor([spread, -spread])
    save_file(tensors, tmp_path / "m.safetensors")
    assert read_header(tmp_path / "m.safetensors").prediction_type == prediction


def test_a_name_that_says_v_is_told_where_the_file_says_nothing(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="set prediction_type"):
        header_of(tmp_path, XL, OTHERS, name="noob_v-Pred.safetensors")


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"lora_unet_x.lora_down.weight": (1, 1)}, "is a LoRA"),
        (XL | OTHERS | {"edm_mean": (1,)}, "EDM"),
        (XL | OTHERS | {"edm_vpred.sigma_max": (1,)}, "EDM"),
        (V1 | OTHERS | {"model.diffusion_model.input_blocks.0.0.weight": (1, 9, 3, 3)},
         "'inpainting'"),
        ({"conditioner.embedders.0.model.transformer.resblocks.9.mlp.c_proj.bias": (1,)} | OTHERS,
         "'xl_refiner'"),
        (V1 | {"first_stage_model.x": (1,)}, "holds no unet"),
        (OTHERS, "holds no text_encoder"),
        ({"x": (1,)}, "not those of a Stable Diffusion model"),
    ],
)  # fmt: skip
def test_files_of_other_kinds_are_refused_by_what_they_are(
    keys: dict[str, tuple[int, ...]], words: str, tmp_path: Path
) -> None:
    with pytest.raises(BaseError, match=words):
        header_of(tmp_path, keys)


def test_quantized_pickled_and_damaged_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BaseError, match=r"unet in F8_E4M3.*float16"):
        header_of(tmp_path, V1, OTHERS, dtype=torch.float8_e4m3fn)
    with pytest.raises(BaseError, match="quantized"):
        loading.locate("someone/somewhere/model.gguf")
    for name in ("model.ckpt", "renamed.safetensors"):
        with (tmp_path / name).open("wb") as file:
            pickle.dump({"state_dict": {}}, file)
        with pytest.raises(BaseError, match=r"pickled checkpoint.*save_pretrained"):
            loading.locate(str(tmp_path / name))
    with pytest.raises(BaseError, match="pickled"):
        loading.locate("someone/somewhere/model.ckpt")
    (tmp_path / "cut.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(BaseError, match=r"cut.safetensors cannot be read"):
        loading.locate(str(tmp_path / "cut.safetensors"))
    (tmp_path / "lfs.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(BaseError, match="git lfs pull"):
        loading.locate(str(tmp_path / "lfs.safetensors"))
    for name in ("gone.safetensors", "gone/gone.safetensors", str(tmp_path / "gone.safetensors")):
        with pytest.raises(BaseError, match="no file"):
            loading.locate(name)


@pytest.mark.parametrize(
    "layout",
    ["{", "[]", "{}", '{"../x": "{}"}', '{"unet/evil.py": "x"}', '{"model_index.json": 5}'],
)
def test_a_strangers_layout_is_refused(layout: str, tmp_path: Path) -> None:
    with pytest.raises(BaseError, match="metadata"):
        header_of(tmp_path, V1, OTHERS, metadata={LAYOUT: layout})


def test_a_strangers_index_imports_nothing(exported: Path, store: Path) -> None:
    layout = dict(read_header(exported).layout)
    index = json.loads(layout["model_index.json"])
    layout["model_index.json"] = json.dumps(index | {"unet": ["evil", "X"]})
    save_file(load_file(exported), exported, {LAYOUT: json.dumps(layout)})
    with pytest.raises(BaseError, match="by the module 'evil'"):
        loading.locate(str(exported))
    assert [file.name for file in store.iterdir()] == [".lock"]


def test_a_file_of_another_program_gets_the_released_configs_and_clips_tokenizer(
    folder: Path, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stand in for a released model: its configs are the tiny base's, and so is its tokenizer."""
    tensors = load_file(exported)
    save_file(tensors | {"model_ema.x": torch.ones(1)}, exported, {"modelspec.title": "mine"})
    names = one_file_header.layouts()["v1"].keys()
    tiny = {name: json.loads((folder / name).read_text()) for name in names}
    monkeypatch.setattr(one_file_header, "layouts", lambda: {"v1": tiny})
    monkeypatch.setattr(one_file, "TOKENIZER", str(folder / "tokenizer"))
    monkeypatch.setattr(one_file, "CLIP_WORDS", tiny["text_encoder/config.json"]["vocab_size"])
    assert equal(str(exported), str(folder))
    one, other = (loading.load_model(str(base)).pipeline.tokenizer for base in (exported, folder))
    assert one(["a dog"]).input_ids == other(["a dog"]).input_ids
    assert one.model_max_length == other.model_max_length


def test_the_configs_of_released_models_build_them() -> None:
    """Compare the parameters with those of the table of bases, which were measured."""
    import diffusers
    import transformers

    from dreambooth_lib.families.pretrained import build_on_meta  # noqa: F401

    for kind, known in (("v1", "Stable Diffusion 1.5"), ("v2", "Stable Diffusion 2.1"),
                        ("xl_base", "Stable Diffusion XL 1.0")):  # fmt: skip
        files, total = one_file_header.layouts()[kind], 0
        for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
            if (config := files.get(f"{part}/config.json")) is None:
                continue
            with torch.device("meta"):
                if "architectures" in config:
                    made = getattr(transformers, config["architectures"][0])
                    plain = {k: v for k, v in config.items() if k != "model_type"}
                    model = made(made.config_class(**plain))
                else:
                    model = getattr(diffusers, config["_class_name"]).from_config(config)
            total += sum(weight.numel() for weight in model.parameters())
        assert total == describe(known).parameters


# Prediction type


def test_what_a_base_predicts_can_be_set(tiny_sd1: str, tiny_bases: Callable[[str], str]) -> None:
    for wanted, ztsnr in (
        ("epsilon", False),
        ("v_prediction", False),
        ("v_prediction_ztsnr", True),
    ):
        family = loading.load_model(tiny_sd1, prediction_type=wanted)
        process = family.forward_process(None)
        assert process.prediction_type == wanted.removesuffix("_ztsnr")
        assert (process.alphas_cumprod[-1] == 0) == ztsnr
        assert (family.inference.fast_steps is None) == ztsnr
    with pytest.raises(BaseError, match="predicts a flow"):
        loading.load_model(tiny_bases("flux"), prediction_type="epsilon")


@pytest.mark.parametrize("wanted", [None, "epsilon", "v_prediction_ztsnr"])
@pytest.mark.parametrize("own", [{}, {"clip_sample": True}])
@pytest.mark.parametrize("base", ["sd1", "sdxl"])
def test_no_scheduler_clamps_latents(
    base: str,
    own: dict[str, bool],
    wanted: str | None,
    tiny_bases: Callable[[str], str],
    tmp_path: Path,
) -> None:
    folder = Path(shutil.copytree(tiny_bases(base), tmp_path / "base"))
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "DDIMScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index))
    config = {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear"} | own
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    scheduler = loading.load_model(str(folder), prediction_type=wanted).pipeline.scheduler
    assert scheduler.config.clip_sample is False
    scheduler.set_timesteps(2)
    x_t = torch.full((1, 4, 8, 8), 5.0)
    assert scheduler.step(x_t * 0, 1, x_t).pred_original_sample.max() > 1


def test_a_prediction_type_that_is_none_is_refused(
    tiny_sd1: str, photos: str, make_config: Callable[..., TrainConfig]
) -> None:
    with pytest.raises(ConfigError, match="prediction_type"):
        make_config(tiny_sd1, photos, prediction_type="v")


# Files elsewhere


def test_a_file_on_the_hub_is_a_base_by_its_name_and_by_its_address(
    exported: Path, folder: Path, fake_hub: FakeHub, tmp_path: Path
) -> None:
    content = exported.read_bytes()
    fake_hub.repos["me/one"] = Repo(files={"sub/m.safetensors": content})
    names = [
        "me/one/sub/m.safetensors",
        "https://huggingface.co/me/one/blob/main/sub/m.safetensors",
    ]
    places = {fake_hub.call(_locate_in, name, tmp_path / "store") for name in names}
    assert len(places) == 1
    found = one_file.parse(names[1].replace("blob/main", "resolve/v1"))
    assert found == one_file.OneFile(repository="me/one", file="sub/m.safetensors", revision="v1")
    assert equal(places.pop(), str(folder))
    with pytest.raises(BaseError, match="has no file"):
        fake_hub.call(_locate_in, "me/one/other.safetensors", tmp_path / "store")
    check = fake_hub.call(_check_in, names[0], tmp_path / "elsewhere")
    assert check.ok and "Stable Diffusion 1.x" in check.result


def test_the_code_of_a_lora_on_a_file_of_the_hub_takes_its_revision(
    exported: Path, photos: str, make_config: Callable[..., TrainConfig], fake_hub: FakeHub,
    tmp_path: Path,
) -> None:  # fmt: skip
    fake_hub.repos["me/pinned"] = Repo(files={"m.safetensors": exported.read_bytes()})
    config = make_config("me/pinned/m.safetensors", photos, method="lora", revision="v1")
    run = runs.start(config, tmp_path / "run")
    code, place = fake_hub.call(_usage_in, run, tmp_path / "store")
    assert Path(place).read_bytes() == exported.read_bytes()
    assert "/blob/" not in code and fake_hub.asked("GET", "/me/pinned/resolve/v1/m.safetensors")
    unpacked = fake_hub.call(_usage_in, run, tmp_path / "store", str(tmp_path))[0]
    assert f'DiffusionPipeline.from_pretrained("{tmp_path}"' in unpacked


def _usage_in(run: runs.Run, store: Path, base: str = "") -> tuple[str, str]:
    """Return a LoRA's code, and the file that it gives to ``from_single_file``."""
    one_file.store = lambda: store  # type: ignore[assignment]
    code, scope = model_card.usage(run, "model", base), dict[str, Any]()
    first = code.partition("gpu =")[0]
    found = re.search(r"from_single_file\((.*), \w+=", code)
    exec(f"{first}\nplace = {found[1] if found else None}", scope)
    return code, scope["place"]


def _locate_in(base: str, store: Path) -> str:
    one_file.store = lambda: store  # type: ignore[assignment]
    return loading.locate(base)


def _check_in(base: str, store: Path) -> preflight.Check:
    one_file.store = lambda: store  # type: ignore[assignment]
    return preflight._base(base)


@pytest.mark.parametrize(("status", "words"), [(401, "token"), (403, "token"), (429, "limit")])
def test_refusals_of_the_hub_are_told_by_their_cause(
    status: int, words: str, fake_hub: FakeHub, tmp_path: Path
) -> None:
    fake_hub.refusals["/me/one"] = status
    for base in ("me/one", "me/one/m.safetensors"):
        with pytest.raises(BaseError, match=words):
            fake_hub.call(_index_of, base, tmp_path / "store")
    assert words in fake_hub.call(_check_in, "me/one/m.safetensors", tmp_path / "store").fix
    assert TOKEN not in str(fake_hub.requests[0].path)


def _index_of(base: str, store: Path) -> Any:
    one_file.store = lambda: store  # type: ignore[assignment]
    return loading.resolve(base).index


class Server:
    """Serve one file by http, with ranges, and break off where it is told to."""

    def __init__(self, content: bytes):
        self.content, self.ranges, self.tag = content, list[str | None](), '"1"'
        self.breaks = list[int]()  #: after so many bytes of an answer, one for each request
        self.status, self.kind, self.to = 200, "application/octet-stream", ""
        served = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, format: str, *given: Any) -> None:
                """Say nothing."""

            def do_GET(self) -> None:
                served.answer(self)

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/model?x=1"

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        asked = handler.headers.get("Range")
        self.ranges.append(asked)
        if self.status != 200:
            handler.send_response(self.status)
            if self.to:
                handler.send_header("Location", self.to)
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        start, status = 0, 200
        if asked and handler.headers.get("If-Range") == self.tag:
            start, status = int(asked[6:-1]), 206
        body = self.content[start:]
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(body)))
        handler.send_header("Content-Type", self.kind)
        handler.send_header("ETag", self.tag)
        handler.end_headers()
        handler.wfile.write(body[: self.breaks.pop(0)] if self.breaks else body)


@pytest.fixture
def server(exported: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(download, "SCHEMES", ("http",))
    server = Server(exported.read_bytes())
    yield server
    server.http.shutdown()
    server.http.server_close()


def test_a_link_is_a_base_whose_download_goes_on_where_it_broke_off(
    server: Server, folder: Path, store: Path
) -> None:
    server.breaks = [1000, 500]
    assert equal(server.url, str(folder))
    assert server.ranges == [None, "bytes=1000-", "bytes=1500-"]
    assert not list((store / "downloads").iterdir())
    server.status = 500  # it is not asked again
    assert loading.locate(server.url)


def test_a_later_call_goes_on_and_a_changed_file_begins_anew(
    server: Server, folder: Path, store: Path
) -> None:
    server.breaks = [1000, 0, 0, 0]
    with pytest.raises(KitError, match=r"127.0.0.1 .*what has arrived is kept"):
        loading.locate(server.url)
    server.tag, server.ranges = '"2"', []
    assert equal(server.url, str(folder)) and server.ranges == ["bytes=1000-"]


@pytest.mark.parametrize(
    ("status", "words"), [(401, "login"), (404, "no such file"), (429, "limit")]
)
def test_what_a_server_refuses_is_told(status: int, words: str, server: Server) -> None:
    server.status = status
    with pytest.raises(KitError, match=words):
        loading.locate(server.url)
    assert len(server.ranges) == 1


def test_links_are_limited(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.kind = "text/html"
    with pytest.raises(KitError, match="with a page"):
        loading.locate(server.url)
    server.kind = "application/octet-stream"
    monkeypatch.setattr(one_file, "MOST_BYTES", 1000)
    with pytest.raises(KitError, match="larger than"):
        loading.locate(server.url)
    server.status, server.to = 302, "ftp://example.org/x"
    with pytest.raises(KitError, match="not https"):
        loading.locate(server.url)
    monkeypatch.undo()
    for url, words in (
        ("http://example.org/m.safetensors", "not https"),
        ("ftp://example.org/m.safetensors", "not https"),
        ("https:///m.safetensors", "not a valid URL"),
        ("https://me:you@example.org/m.safetensors", "password"),
        ("https://example.org/m?token=abc", "token"),
    ):
        with pytest.raises(KitError, match=words) as found:
            loading.locate(url)
        assert "abc" not in str(found.value) and "you" not in str(found.value).split("yourself")[0]


# In the notebook


def test_a_file_is_described_by_its_header_before_it_is_unpacked(
    exported: Path, store: Path
) -> None:
    check = preflight._base(str(exported))
    assert check.ok and "(Stable Diffusion 1.x, epsilon)" in check.result
    before = describe(str(exported)).parameters
    assert not store.exists()
    loading.locate(str(exported))
    assert abs(describe(str(exported)).parameters / before - 1) < 0.01
    exported.write_bytes(exported.read_bytes()[:-10])
    check = preflight._base(str(exported))
    assert not check.ok and "cannot be read" in check.result
