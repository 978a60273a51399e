"""Serve a gallery and generate with the model beside it, on a CPU: ``python app.py``.

:mod:`.space` copies this file into a Space, where it needs only torch, diffusers and transformers.
"""

import argparse
import io
import json
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from typing import Any
from urllib.parse import parse_qs, urlsplit

HERE = Path(__file__).parent
LONGEST_PROMPT = 300
_one_at_a_time = Lock()


@cache
def model() -> Any:
    import torch
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(HERE / "model", torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(prompt: str, seed: int) -> bytes:
    """Return a PNG of a prompt; the same seed gives the same image."""
    import torch

    settings = json.loads((HERE / "settings.json").read_text())
    with _one_at_a_time:
        noise = torch.Generator("cpu").manual_seed(seed)
        image = model()(prompt, generator=noise, **settings).images[0]
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()


class Handler(BaseHTTPRequestHandler):
    """Answer with the page, or with an image that its form asks for."""

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        if address.path == "/":
            return self.answer(200, "text/html; charset=utf-8", (HERE / "index.html").read_bytes())
        if address.path != "/draw":
            return self.answer(404, "text/plain", b"There is no such page.")
        fields = {name: values[0] for name, values in parse_qs(address.query).items()}
        prompt, seed = fields.get("prompt", ""), fields.get("seed", "0")
        if not 0 < len(prompt) <= LONGEST_PROMPT or not (seed.isdecimal() and len(seed) < 7):
            sentence = (
                f"Give a prompt of up to {LONGEST_PROMPT} characters, and a seed of at most 999999."
            )
            return self.answer(400, "text/plain", sentence.encode())
        return self.answer(200, "image/png", draw(prompt, int(seed)))

    def answer(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(body)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=7860)
    arguments = parser.parse_args()
    print(f"http://{arguments.host}:{arguments.port}/", flush=True)
    ThreadingHTTPServer((arguments.host, arguments.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
