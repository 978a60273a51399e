"""Take a Stable Diffusion model in one file as a base: read it once into diffusers' layout.

A base in one file is a path, a file on the Hub or an https link. It is unpacked into a folder of
:data:`STORE` that is named by the digest of its content, and found there from then on.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

from dreambooth_lib.core.digests import file_digest
from dreambooth_lib.core.disk import explain_disk_errors, require_room
from dreambooth_lib.core.download import check_link, download
from dreambooth_lib.core.encoder_revisions import revision_of
from dreambooth_lib.core.files import replace_file, replacing_folder
from dreambooth_lib.core.locks import lock
from dreambooth_lib.families import hub_files, index_checks
from dreambooth_lib.families.base_files import BaseError, explain_loading
from dreambooth_lib.families.one_file_header import (
    CLIP_WORDS,
    Header,
    check_not_pickled,
    read_header,
)

MOST_BYTES = 20 * 10**9  #: of a file; Stable Diffusion XL in float32 with EMA weights has less
#: Its tokenizer is that of all Stable Diffusion models; a run's default scorer downloads it, too.
TOKENIZER = "openai/clip-vit-base-patch32"
_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".gguf")
_HUB_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")
_HUB_FILE = re.compile(r"(\w[\w.-]*/\w[\w.-]*)/(.+)")
#: How keys of 1.x's text encoder begin that an early transformers wrote; diffusers knows them no
#: more. Today "text_model." comes between.
_EARLY_KEY = re.compile(
    r"cond_stage_model\.transformer\.(?=(embeddings|encoder|final_layer_norm)\.)"
)


def store() -> Path:
    """Return the folder of the unpacked bases: beside those that the Hub's client downloads."""
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME) / "one_file_bases"


class OneFile(NamedTuple):
    """Where a base in one file is: exactly one of the first three is set."""

    path: Path | None = None
    link: str | None = None
    repository: str | None = None  #: on the Hub
    file: str = ""  #: its path in the repository
    revision: str | None = None

    @property
    def name(self) -> str:
        """Return the file's name without its folders."""
        return Path(unquote(urlsplit(self.link).path) if self.link else self.path or self.file).name

    @property
    def address(self) -> str | None:
        """Return the page of a file on the Hub, by which diffusers loads it at no revision."""
        if self.repository is None:
            return None
        return f"https://huggingface.co/{self.repository}/blob/main/{self.file}"


def parse(base: str, revision: str | None = None) -> OneFile | None:
    """Return where a base in one file is, None for a base that is none.

    Nothing is downloaded. Raises :class:`BaseError` for a file that is not there and for one that
    is pickled or quantized by its name, and ``DownloadError`` for a link that is not https.
    """
    if "://" in base:
        check_link(base)
        parts = urlsplit(base)
        found = re.fullmatch(r"/([^/]+/[^/]+)/(?:blob|resolve)/([^/]+)/(.+)", unquote(parts.path))
        one = OneFile(link=base)
        if parts.hostname in _HUB_HOSTS and found:
            named = None if found[2] == "main" else found[2]
            return _checked(OneFile(None, None, found[1], found[3], revision or named))
        check_not_pickled(one.name)
        return one
    path = Path(base)
    if path.is_file():
        return _checked(OneFile(path=path))
    if path.suffix.lower() not in _SUFFIXES or path.exists():
        return None
    found = _HUB_FILE.fullmatch(base)
    if not found or path.parent.is_dir():
        raise BaseError(f"there is no file '{base}'; check its path.")
    return _checked(OneFile(None, None, found[1], found[2], revision))


def _checked(one: OneFile) -> OneFile:
    """Return a file that diffusers will read as safetensors, by its name; refuse any other."""
    check_not_pickled(one.name)
    if not one.name.lower().endswith(".safetensors"):
        raise BaseError(
            f"the base '{one.name}' is a file, and only .safetensors files of Stable Diffusion are "
            "bases; give one, or a folder in diffusers' layout."
        )
    return one


def find(one: OneFile) -> Path | None:
    """Return the folder that a base in one file was unpacked into; None where it was not yet."""
    for key in _keys(one):
        place = _reference(key)
        if place.exists():
            folder = store() / place.read_text()
            if (folder / "model_index.json").exists():
                return folder
    return None


def local_file(one: OneFile) -> Path | None:
    """Return the file on this machine; None where it was not downloaded yet."""
    from huggingface_hub import try_to_load_from_cache

    if one.repository is None:
        return one.path
    cached = try_to_load_from_cache(one.repository, one.file, revision=one.revision)
    return Path(cached) if isinstance(cached, str) else None


def unpack(one: OneFile) -> Path:
    """Return the folder of a base in one file in diffusers' layout; make it if it is not there.

    That downloads the file where it is not on this machine, and CLIP's tokenizer where that is not
    in the Hub's cache, and takes as much space as the file. Processes wait for one another. Memory
    holds one part at a time at most, and that only where the file is not read by its pages: see
    docs/families.md. Raises :class:`BaseError` for a file that cannot be had or used.
    """
    if folder := find(one):
        return folder
    place = store()
    with explain_disk_errors(place):
        place.mkdir(parents=True, exist_ok=True)
    with lock(place, wait=True):
        if folder := find(one):  # another process was quicker
            return folder
        file = _fetch(one)
        if file.stat().st_size > MOST_BYTES:
            raise BaseError(f"'{one.name}' is larger than any model in one file; check it.")
        header = read_header(file, one.name)
        folder = place / file_digest(file)[:32]
        if not (folder / "model_index.json").exists():
            require_room(place, file.stat().st_size)
            with replacing_folder(folder) as partial, _with_suffix(file) as named:
                _convert(named, header, partial, one.name)
        for key in _keys(one):
            replace_file(_reference(key), folder.name.encode())
        if one.link:
            file.unlink()
    return folder


@contextmanager
def _with_suffix(file: Path) -> Iterator[Path]:
    """Yield a path of the file with the suffix in lower case, by which diffusers tells the kind."""
    if file.suffix == ".safetensors":
        yield file
        return
    with TemporaryDirectory() as folder:
        link = Path(folder) / "model.safetensors"
        link.symlink_to(file.resolve())
        yield link


def _fetch(one: OneFile) -> Path:
    if one.path is not None:
        return one.path
    if one.link is not None:
        return download(one.link, store() / "downloads", MOST_BYTES, ".safetensors")
    assert one.repository is not None
    file = hub_files.download(one.repository, one.file, one.revision)
    if file is None:
        raise BaseError(
            f"'{one.repository}' has no file {one.file} on the Hub; check its name and revision."
        )
    return file


def _keys(one: OneFile) -> list[str]:
    """Return what the file is known by: its link, or its place, size and time on this machine."""
    if one.link is not None:
        return [one.link]
    file = local_file(one)
    if file is None or not file.is_file():
        return []
    stat = file.stat()
    return [f"{file.resolve()}\n{stat.st_size}\n{stat.st_mtime_ns}"]


def _reference(key: str) -> Path:
    return store() / "references" / hashlib.sha256(key.encode()).hexdigest()[:32]


def _convert(file: Path, header: Header, folder: Path, name: str) -> None:
    """Write a file's model into a folder in diffusers' layout, in the dtypes that it has."""
    import diffusers
    import torch

    index = json.loads(header.layout["model_index.json"])
    index.setdefault("_name_or_path", Path(name).stem)
    for path, text in (header.layout | {"model_index.json": json.dumps(index, indent=2)}).items():
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text(text, encoding="utf-8")
    for part in index:
        if part.startswith("tokenizer") and not (folder / part).exists():
            _save_clip_tokenizer(folder, part, header, name)
    loaded = {part: value for part, value in index.items() if isinstance(value, list)}
    # What diffusers imports by the index is checked first.
    needed, unread = ("unet", "vae", "scheduler"), ("safety_checker", "feature_extractor")
    parts = index_checks.check(
        str(folder), index, needed, dict.fromkeys(unread), None, lambda name: {}
    )
    pipeline_class: Any = getattr(diffusers, index["_class_name"])
    for part in parts:
        others = dict.fromkeys({*loaded} - {part, "scheduler"})
        dtype = getattr(torch, header.dtypes[part])
        own = _with_todays_keys(file, folder / "renamed") if part == "text_encoder" else file
        with explain_loading(name), torch.no_grad(), _explain_lacking(part, name):
            pipeline = pipeline_class.from_single_file(
                str(own), config=str(folder), local_files_only=True, torch_dtype=dtype, **others
            )
            model = getattr(pipeline, part)
            if any(weight.is_meta for weight in model.parameters()):
                raise NotImplementedError
            model.save_pretrained(folder / part, safe_serialization=True)
        del pipeline, model
        if own != file:
            shutil.rmtree(own.parent)


def _with_todays_keys(file: Path, folder: Path) -> Path:
    """Return a file; one of its text encoder alone, in ``folder``, where that has early keys."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(file, "pt") as weights:
        keys = [*weights.keys()]
        if not any(map(_EARLY_KEY.match, keys)):
            return file
        own = [key for key in keys if key.startswith("cond_stage_model.")]
        tensors = {_EARLY_KEY.sub(r"\g<0>text_model.", k): weights.get_tensor(k) for k in own}
    folder.mkdir()
    save_file(tensors, folder / file.name)
    return folder / file.name


@contextmanager
def _explain_lacking(part: str, name: str) -> Iterator[None]:
    """Raise :class:`BaseError` for what torch raises where weights are on the meta device."""
    try:
        yield
    except NotImplementedError as error:
        raise BaseError(
            f"'{name}' lacks weights of its {part}, so it is not a standard Stable Diffusion "
            "1.x, 2.x or XL model; give it as a folder in diffusers' layout."
        ) from error


def _save_clip_tokenizer(folder: Path, part: str, header: Header, name: str) -> None:
    """Save CLIP's tokenizer; the pad token is OpenCLIP's "!" in 2.x and XL's second."""
    from transformers import CLIPTokenizer

    encoder = json.loads(header.layout[f"{part.replace('tokenizer', 'text_encoder')}/config.json"])
    if encoder.get("vocab_size") != CLIP_WORDS:
        raise BaseError(f"'{name}' has no tokenizer of its own; export the model again.")
    try:
        tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER, revision=revision_of(TOKENIZER))
    except Exception as error:  # the Hub's client raises many types for the same problem
        raise BaseError(
            f"'{name}' needs the tokenizer of '{TOKENIZER}' from the Hub, once "
            f"({type(error).__name__}); {hub_files.what_to_do(error, TOKENIZER)}."
        ) from error
    tokenizer.model_max_length = encoder["max_position_embeddings"]
    open_clip = encoder.get("hidden_act") == "gelu"
    tokenizer.pad_token = "!" if open_clip else tokenizer.eos_token
    tokenizer.save_pretrained(folder / part)
