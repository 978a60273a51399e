"""Stand in for a vision-language model behind an OpenAI-like API, and build a tiny real one."""

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch

#: From a request's messages, its status, headers and body.
Reply = Callable[[list[dict[str, Any]]], tuple[int, dict[str, str], bytes]]


def says(content: Any) -> tuple[int, dict[str, str], bytes]:
    """Return a reply in OpenAI's format."""
    choice = {"index": 0, "message": {"role": "assistant", "content": content}}
    return 200, {}, json.dumps({"object": "chat.completion", "choices": [choice]}).encode()


def images_in(messages: list[dict[str, Any]]) -> list[str]:
    """Return the data URLs of a request."""
    parts = [part for message in messages for part in message["content"]]
    return [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]


def by_content(messages: list[dict[str, Any]]) -> tuple[int, dict[str, str], bytes]:
    """Score by a sum over the question's images and text, as a model would: always the same."""
    return says(f"Score: {sum(map(ord, json.dumps(messages))) % 5}")


class StandIn:
    """A server on this machine; ``requests`` has the body and the key of each one."""

    def __init__(self, reply: Reply = by_content) -> None:
        stand_in = self
        self.requests: list[tuple[dict[str, Any], str | None]] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                assert self.path == "/v1/chat/completions"
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                stand_in.requests.append((body, self.headers["Authorization"]))
                status, headers, data = reply(body["messages"])
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None: ...

        class Server(ThreadingHTTPServer):
            def handle_error(self, *_: object) -> None: ...  # a client that was killed, or gave up

        self.server = Server(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}/v1"

    def __enter__(self) -> "StandIn":
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def questions(self) -> list[str]:
        """Return each request's messages as text, in their order."""
        return [json.dumps(body["messages"], sort_keys=True) for body, _ in self.requests]


TEMPLATE = (
    "{% for turn in messages %}{{ turn['role'] }} : {% for part in turn['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}assistant : {% endif %}"
)


def save_tiny_vlm(folder: Path) -> Path:
    """Write a tiny random LLaVA whose words are its own; returns its folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        PreTrainedTokenizerFast,
    )

    words = ["<unk>", "<s>", "</s>", "<image>", "user", "assistant", ":", "Score", "0", "1", "2",
             "3", "4", "References", "Generated", "image", "Text", "a", "dog"]  # fmt: skip
    words_of_model = models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    tokenizer = Tokenizer(words_of_model)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        pad_token="</s>", additional_special_tokens=["<image>"],
    ).save_pretrained(folder)  # fmt: skip
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
             "num_attention_heads": 2}  # fmt: skip
    torch.manual_seed(0)
    LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(**tower, image_size=32, patch_size=8),
            text_config=LlamaConfig(**tower, vocab_size=len(words), pad_token_id=2),
            image_token_index=3,
            image_token_id=3,
        )
    ).save_pretrained(folder)
    preprocessing = {
        "image_processor_type": "CLIPImageProcessor", "do_resize": True, "do_center_crop": True,
        "size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, "resample": 3,
        "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "do_convert_rgb": True,
    }  # fmt: skip
    processing = {
        "processor_class": "LlavaProcessor", "patch_size": 8, "image_token": "<image>",
        "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1,
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing))
    (folder / "processor_config.json").write_text(json.dumps(processing))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder
