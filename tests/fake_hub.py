"""A stand-in for the Hub: its HTTP API, as far as huggingface_hub pushes and loads models.

The real client speaks to it from a process of its own, since it reads where the Hub is once, as it
is imported.
"""

import base64
import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

TOKEN = "hf_secretsecretsecret"
OWNER = "me"
#: Told where a request of no more than this is made: no answer, and the connection is closed.
HANG_UP = 0
_LARGE = (".safetensors", ".png", ".bin", ".zip")


@dataclass
class Repo:
    private: bool = False
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[list[str]] = field(default_factory=list)  #: the paths that each brought

    @property
    def sha(self) -> str:
        return hashlib.sha1(str(self.commits).encode()).hexdigest()


@dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass
class FakeHub:
    """Hold what is on the Hub and what was asked of it.

    ``refusals`` are statuses by path part, where it matters with what the Hub says of them.
    """

    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    stored: dict[str, bytes] = field(default_factory=dict)  #: large files by their SHA-256
    refusals: dict[str, int | tuple[int, str]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    requests: list[Request] = field(default_factory=list)
    client: ProcessPoolExecutor | None = None

    def call(self, function: Callable[..., Any], *given: Any, **named: Any) -> Any:
        """Return what a function gives in the process whose client knows this Hub."""
        assert self.client is not None
        return self.client.submit(_result, function, *given, **named).result(timeout=300)

    def asked(self, method: str, part: str = "") -> list[str]:
        return [r.path for r in self.requests if r.method == method and part in r.path]


class _Answer(Exception):
    """A request's answer other than a plain success."""

    def __init__(self, status: int, error: str, code: str = "", **said: Any):
        self.status, self.headers = status, {"X-Error-Message": error}
        self.headers |= {"X-Error-Code": code} if code else {}
        page = error.startswith("<html>")  # as a proxy's
        self.body = (error if page else json.dumps({"error": error, **said})).encode()


def _oid(path: str, content: bytes) -> str:
    if path.endswith(_LARGE):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _handler(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *given: Any) -> None:
            """Says nothing: the client's own words are what is tested."""

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            path = unquote(urlsplit(self.path).path)
            hub.requests.append(Request(self.command, self.path, dict(self.headers), body))
            refused = next((s for part, s in hub.refusals.items() if part in self.path), None)
            if refused == HANG_UP:
                self.close_connection = True
                return
            try:
                if refused is not None:
                    status, said = (
                        refused if isinstance(refused, tuple) else (refused, "you may not")
                    )
                    raise _Answer(status, said)
                status, headers, content = 200, *self.found(path, body)
            except _Answer as other:
                status, headers, content = other.status, other.headers, other.body
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(content))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_HEAD = do_POST = do_PUT = answer

        def found(self, path: str, body: bytes) -> tuple[dict[str, str], bytes]:
            match [self.command, *path.strip("/").split("/")]:
                case ["PUT", "upload", oid]:
                    assert hashlib.sha256(body).hexdigest() == oid
                    hub.stored[oid] = body
                    return {}, b""
                case ["HEAD" | "GET", owner, name, "resolve", _, *parts]:
                    return self.file(self.repo(owner, name), "/".join(parts))
                case ["POST", "api", "repos", "create"]:
                    reply: Any = self.create(json.loads(body))
                case ["POST", "api", "validate-yaml"]:
                    reply = {"errors": [], "warnings": []}
                case ["POST", "api", "models", owner, name, "preupload", _]:
                    reply = self.preupload(self.repo(owner, name), json.loads(body))
                case ["POST", _, _, "info", "lfs", "objects", "batch"]:
                    reply = {"objects": [self.place(one) for one in json.loads(body)["objects"]]}
                case ["POST", "api", "models", owner, name, "commit", _]:
                    reply = self.commit(f"{owner}/{name}", self.repo(owner, name), body)
                case ["GET", "api", "models", owner, name, "tree", *_]:
                    files = self.repo(owner, name).files
                    reply = [self.entry(path, content) for path, content in files.items()]
                case ["GET", "api", "models", owner, name, *_]:
                    reply = self.info(f"{owner}/{name}", self.repo(owner, name))
                case _:
                    raise _Answer(404, f"{self.command} {path} is not of this stand-in")
            return {"Content-Type": "application/json"}, json.dumps(reply).encode()

        def may_write(self) -> None:
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                raise _Answer(401, "Invalid username or password.")

        def repo(self, owner: str, name: str) -> Repo:
            repo = hub.repos.get(f"{owner}/{name}")
            known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
            if repo is None or (repo.private and not known):
                raise _Answer(404 if known else 401, "Repository not found", "RepoNotFound")
            if f"{owner}/{name}" in hub.gated:
                raise _Answer(403, "Access to it is restricted", "GatedRepo")
            return repo

        def create(self, asked: dict[str, Any]) -> dict[str, str]:
            self.may_write()
            owner = asked["organization"] or OWNER
            name = f"{owner}/{asked['name']}"
            said = {"url": f"{hub.url}/{name}", "name": name}
            if owner != OWNER:
                raise _Answer(403, "You don't have the rights to create a model under it")
            if name in hub.repos:
                raise _Answer(409, "You already created this model repo", **said)
            private = asked.get("visibility") == "private" or asked.get("private", False)
            hub.repos[name] = Repo(private)
            return said

        def preupload(self, repo: Repo, asked: dict[str, Any]) -> dict[str, Any]:
            self.may_write()
            paths = [one["path"] for one in asked["files"]]
            return {"files": [{
                "path": path,
                "uploadMode": "lfs" if path.endswith(_LARGE) else "regular",
                "shouldIgnore": False,
                "oid": _oid(path, repo.files[path]) if path in repo.files else None,
            } for path in paths]}  # fmt: skip

        def place(self, one: dict[str, Any]) -> dict[str, Any]:
            self.may_write()
            known = {"oid": one["oid"], "size": one["size"]}
            if one["oid"] in hub.stored:
                return known
            return known | {"actions": {"upload": {"href": f"{hub.url}/upload/{one['oid']}"}}}

        def commit(self, name: str, repo: Repo, body: bytes) -> dict[str, Any]:
            self.may_write()
            brought = {}
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    brought[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    brought[value["path"]] = hub.stored[value["oid"]]
                elif line["key"] == "deletedFile":
                    del repo.files[value["path"]]
            repo.files |= brought
            repo.commits.append(sorted(brought))
            return {"commitUrl": f"{hub.url}/{name}/commit/{repo.sha}", "commitOid": repo.sha}

        def info(self, name: str, repo: Repo) -> dict[str, Any]:
            from huggingface_hub import ModelCard

            card = repo.files.get("README.md", b"").decode()
            return {
                "id": name,
                "sha": repo.sha,
                "private": repo.private,
                "tags": [],
                "cardData": ModelCard(card).data.to_dict() if card else {},
                "siblings": [{"rfilename": path} for path in repo.files],
            }

        def entry(self, path: str, content: bytes) -> dict[str, Any]:
            oid = _oid(path, content)
            large = {"lfs": {"oid": oid, "size": len(content), "pointerSize": 1}}
            one = {"type": "file", "path": path, "size": len(content), "oid": oid}
            return one | (large if path.endswith(_LARGE) else {})

        def file(self, repo: Repo, path: str) -> tuple[dict[str, str], bytes]:
            if path not in repo.files:
                raise _Answer(404, "Entry not found", "EntryNotFound")
            content = repo.files[path]
            return {"X-Repo-Commit": repo.sha, "ETag": f'"{_oid(path, content)}"'}, content

    return Handler


def _result(function: Callable[..., Any], *given: Any, **named: Any) -> Any:
    """Return a function's result, or its error as one that another process can read."""
    try:
        return function(*given, **named)
    except Exception as error:
        if type(error).__module__.startswith("dreambooth_lib"):
            raise
        raise RuntimeError(f"{type(error).__name__}: {error}") from error


def never_wait() -> None:
    """Let this process's client ask again at once: its own waits are 23 s for each refusal."""
    from huggingface_hub.utils import _http  # reads the environment as it is imported

    _http.time = SimpleNamespace(**vars(time) | {"sleep": lambda seconds: None})


def _set(settings: dict[str, str]) -> None:
    os.environ.update(settings)
    never_wait()


@pytest.fixture(scope="module")
def _served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeHub]:
    hub = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    settings = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path_factory.mktemp("hf")),
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_OFFLINE": "0",
        "NO_PROXY": "127.0.0.1",
    }
    spawning = get_context("spawn")
    with ProcessPoolExecutor(1, spawning, initializer=_set, initargs=(settings,)) as hub.client:
        yield hub
    server.shutdown()
    server.server_close()


@pytest.fixture
def fake_hub(_served: FakeHub) -> FakeHub:
    """Return an empty Hub; ``call`` what is to see it."""
    for part in (_served.repos, _served.stored, _served.refusals, _served.gated, _served.requests):
        part.clear()
    return _served


def run_lines(code: str, folder: Path) -> None:
    """Execute what makes a ``pipeline``, and save that with LoRA weights worked in."""
    scope: dict[str, Any] = {}
    exec(code, scope)
    pipeline = scope["pipeline"]
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    pipeline.save_pretrained(folder)


def save_loaded(name: str, plain: Path, by_the_kit: Path) -> None:
    """Load a model by plain diffusers and by this kit, and save both."""
    from diffusers import DiffusionPipeline

    from dreambooth_lib.families import loading

    DiffusionPipeline.from_pretrained(name).save_pretrained(plain)
    loading.load_model(name).pipeline.save_pretrained(by_the_kit)
