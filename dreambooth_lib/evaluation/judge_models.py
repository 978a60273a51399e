"""Let a vision-language model answer: one on this machine, or one behind an OpenAI-compatible API.

Both give their likeliest answer: greedy decoding, or temperature 0.
"""

import base64
import io
import json
import os
import re
import time
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from http.client import HTTPException
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError
from urllib.parse import urlsplit

from dreambooth_lib.core.digests import file_digest
from dreambooth_lib.core.errors import KitError, one_line
from dreambooth_lib.core.threads import one_at_a_time
from dreambooth_lib.evaluation.rubric import Chat
from dreambooth_lib.training.sampling import sampling_dtype

if TYPE_CHECKING:
    import torch
    from PIL import Image

MOST_TOKENS = 512  #: of an answer
MOST_BYTES = 2**20  #: of an API's reply
#: Seconds until each new try of a request that a server refused for now, or failed at.
WAITS = (1.0, 4.0, 16.0, 60.0)
_LONGEST_WAIT = 60.0  # of those that a server asks for
_FOR_NOW = (408, 409, 425, 429)  # statuses worth another try, besides those from 500 on
#: What is sent in place of a parameter that a model refuses, as reasoning models do; their limit of
#: tokens counts their thoughts.
_INSTEAD: dict[str, dict[str, int]] = {
    "max_tokens": {"max_completion_tokens": 4096}, "temperature": {},
}  # fmt: skip
#: How an API says that it has no answer to this one request.
_NO_ANSWER = re.compile(r"content_filter|content_policy_violation|output limit was reached")


class JudgeError(KitError, RuntimeError):
    """A vision-language model that cannot be loaded, or cannot be asked."""

    said = ""  #: by an API, of a request that it refuses as a bad one (status 400)


class LocalModel:
    """A vision-language model in transformers' layout: a folder or a Hub id.

    Answers greedily, in float32 on a CPU and in half precision on a GPU. Only safetensors are
    read, and no code of the model's. Raises :class:`JudgeError` for a model that cannot be read or
    takes no chats with images.
    """

    parallel = 1

    @one_at_a_time
    def __init__(self, model_id: str | Path, device: "torch.device | str" = "cpu") -> None:
        import torch
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self._id = str(model_id)
        self.name = Path(self._id).name
        dtype = torch.float32 if torch.device(device).type == "cpu" else sampling_dtype()
        try:
            self._processor: Any = AutoProcessor.from_pretrained(self._id, trust_remote_code=False)
            auto: Any = AutoModelForImageTextToText
            model, found = auto.from_pretrained(
                self._id, use_safetensors=True, trust_remote_code=False, dtype=dtype,
                output_loading_info=True,
            )  # fmt: skip
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # of any kind: configs are used without a check of their shape
            raise self._error(f"cannot be read ({one_line(error)[:200]})") from error
        if missing := sorted(map(str, found["missing_keys"])):
            raise self._error(f"lacks the weight {missing[0]}")
        if not getattr(self._processor, "chat_template", None):
            raise self._error("has no chat template")
        self._model = model.eval().requires_grad_(False).to(device)

    def _error(self, problem: str) -> JudgeError:
        return JudgeError(
            f"the judge '{self._id}' {problem}; give a Hub id or a folder of a vision-language "
            "model with safetensors, its processor and its chat template."
        )

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Return the dtype, the limit of tokens, and the weights: a commit, or files' digests."""
        weights: Any = getattr(self._model.config, "_commit_hash", None)
        if (folder := Path(self._id)).is_dir():
            weights = {file.name: file_digest(file) for file in folder.glob("*.safetensors")}
        dtype = str(self._model.dtype).removeprefix("torch.")
        return {"weights": weights, "dtype": dtype, "max_new_tokens": MOST_TOKENS}

    def answer(self, chat: Chat) -> str:
        """Return the likeliest answer. Raises :class:`JudgeError` where the model takes no chat."""
        import torch

        turns = [{"role": role, "content": list(map(self._part, parts))} for role, parts in chat]
        try:
            inputs = self._processor.apply_chat_template(
                turns, add_generation_prompt=True, tokenize=True, return_dict=True,
                return_tensors="pt",
            ).to(self._model.device, self._model.dtype)  # fmt: skip
            with torch.inference_mode():
                tokens = self._model.generate(
                    **inputs, do_sample=False, num_beams=1, max_new_tokens=MOST_TOKENS
                )
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # templates and processors raise errors of any kind
            raise self._error(f"cannot be asked ({one_line(error)[:200]})") from error
        answer = tokens[0, inputs["input_ids"].shape[1] :]
        return self._processor.tokenizer.decode(answer, skip_special_tokens=True)

    @staticmethod
    def _part(part: "str | Image.Image") -> dict[str, Any]:
        return (
            {"type": "text", "text": part}
            if isinstance(part, str)
            else {"type": "image", "image": part}
        )


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Refuse redirects: the key would be sent to another address."""

    def redirect_request(self, *_: Any) -> None:
        return None


@dataclass(frozen=True)
class Endpoint:
    """A model behind an OpenAI-compatible API: ``ADDRESS/chat/completions``, such as vLLM's.

    The key is read from the environment at each request and kept nowhere; without one none is sent.
    A request that fails for now is tried again, at longer and longer intervals.
    """

    address: str  #: such as "https://api.openai.com/v1"
    name: str  #: the model's, as the API knows it
    key_variable: str = "OPENAI_API_KEY"  #: the environment variable that has the key
    #: sent with each request, but for a temperature or max_tokens that the model refuses
    parameters: Mapping[str, Any] = field(
        default_factory=lambda: MappingProxyType({"temperature": 0, "max_tokens": MOST_TOKENS})
    )
    seconds: float = 180.0  #: until a reply must be complete
    parallel: int = 4
    _refused: set[str] = field(default_factory=set, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        parts = urlsplit(self.address)
        if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
            raise JudgeError(
                "the judge's address has to begin with http:// or https:// and a host without a "
                "user's name, as in https://api.openai.com/v1; correct it."
            )
        if parts.query or parts.fragment:
            raise JudgeError("the judge's address ends in a query; give it up to its /v1.")

    @property
    def settings(self) -> dict[str, Any]:
        """Return the address and the parameters, also those that the model turns out to refuse.

        What was answered is found by them before anything is sent.
        """
        return {"address": self.address.rstrip("/"), **self.parameters}

    def answer(self, chat: Chat) -> str:
        """Return the model's answer, "" if it refused to give one.

        Raises :class:`JudgeError` for a refused key or request, for a reply that is in another
        format or too long, and where there is none after several tries.
        """
        body = {
            "model": self.name,
            "messages": [
                {"role": role, "content": list(map(_part, parts))} for role, parts in chat
            ],
        }
        sent = self._parameters()
        try:
            reply = self._post(json.dumps(body | sent).encode())
        except JudgeError as error:
            if named := {name for name in _INSTEAD if name in sent and name in error.said}:
                self._refused.update(named)
                return self.answer(chat)
            if _NO_ANSWER.search(error.said):
                return ""
            raise
        try:
            choices = json.loads(reply)["choices"]
            if isinstance(choices, list):
                # A filter, or thoughts at the limit, may leave no choice, message or content.
                content = ((choices[0] if choices else {}).get("message") or {}).get("content")
                if content is None or isinstance(content, str):
                    return content or ""
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            pass
        raise JudgeError(
            f"the judge at {self.address} replied in another format than OpenAI's; give its API's "
            "address, up to /v1."
        )

    def _parameters(self) -> dict[str, Any]:
        """Return what is sent with a request: the parameters, others for those refused so far."""
        refused = sorted(self._refused)
        kept = {name: value for name, value in self.parameters.items() if name not in refused}
        return {name: value for own in refused for name, value in _INSTEAD[own].items()} | kept

    def _key(self) -> str:
        key = os.environ.get(self.key_variable, "").strip()
        if not re.fullmatch("[!-~]*", key):  # http.client's error would show it
            raise JudgeError(
                f"the key in {self.key_variable} has a character that no key has; copy it again."
            )
        return key

    def _post(self, body: bytes) -> bytes:
        """Send a request until there is a reply; return its bytes, at most :data:`MOST_BYTES`."""
        key, problem = self._key(), ""
        headers = {"Content-Type": "application/json"}
        if key:
            headers["Authorization"] = f"Bearer {key}"
        url = f"{self.address.rstrip('/')}/chat/completions"
        for wait in (*WAITS, None):
            try:
                return self._read(urllib.request.Request(url, body, headers))
            except HTTPError as error:
                with error:
                    if error.code not in _FOR_NOW and error.code < 500:
                        raise self._refusal(error, key) from None
                    problem = f"status {error.code}"
                    asked = error.headers.get("Retry-After", "")
                if wait is not None and re.fullmatch(r"\d{1,6}", asked):
                    wait = max(wait, min(float(asked), _LONGEST_WAIT))
            except (OSError, HTTPException) as error:
                problem = one_line(error)[:200]
            if wait is not None:
                time.sleep(wait)
        raise JudgeError(
            f"the judge at {self.address} gave no reply in {len(WAITS) + 1} tries ({problem}); "
            "evaluate again later: what it has answered is kept."
        )

    def _read(self, request: urllib.request.Request) -> bytes:
        end, reply = time.monotonic() + self.seconds, b""
        opener = urllib.request.build_opener(_NoRedirects)
        with opener.open(request, timeout=self.seconds) as opened:
            while piece := opened.read1(2**16):
                reply += piece
                if len(reply) > MOST_BYTES:
                    raise JudgeError(
                        f"the judge at {self.address} replied with more than {MOST_BYTES:,} bytes; "
                        "check the address."
                    )
                if time.monotonic() > end:  # a timeout alone is one of each piece
                    raise TimeoutError(f"the reply took longer than {self.seconds:.0f} seconds")
        return reply

    def _refusal(self, error: HTTPError, key: str) -> JudgeError:
        if error.code in (401, 403):
            return JudgeError(
                f"the judge at {self.address} refused the key (status {error.code}); put a valid "
                f"one into the environment variable {self.key_variable}."
            )
        try:
            said = error.read(2**12).decode(errors="replace")
        except (OSError, HTTPException):
            said = ""
        said = said.replace(key, "***") if key else said
        refusal = JudgeError(
            f"the judge at {self.address} refused the request (status {error.code}: {said[:300]}); "
            "check the address, the model's name and its parameters."
        )
        refusal.said = said if error.code == 400 else ""
        return refusal


def _part(part: "str | Image.Image") -> dict[str, Any]:
    """Return a part of a message in OpenAI's format, an image as a JPEG in a data URL."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    buffer = io.BytesIO()
    part.save(buffer, "JPEG", quality=95)
    data = base64.b64encode(buffer.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{data}"}}
