"""Check the judge: how it is asked, how its answers are read and kept, and what may go wrong."""

import base64
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import drawings, save_photos
from launching import ROOT
from PIL import Image
from stand_in_judge import StandIn, by_content, images_in, save_tiny_vlm, says

from dreambooth_lib.__main__ import main
from dreambooth_lib.core.subject import Subject
from dreambooth_lib.evaluation import judge_models, rubric
from dreambooth_lib.evaluation.judge import SIDE, TRIES, RubricJudge
from dreambooth_lib.evaluation.judge_models import MOST_BYTES, Endpoint, JudgeError, LocalModel
from dreambooth_lib.evaluation.measures import ImageFiles
from dreambooth_lib.evaluation.rubric import CONCEPT_PRESERVATION, parse_score
from dreambooth_lib.evaluation.tables import read_csv

KEY = "sk-a-secret-of-the-tests"
CHAT = CONCEPT_PRESERVATION.chat("References:", Image.new("RGB", (8, 8)), "Generated image:")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge_models, "WAITS", (0.01, 0.02))
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def files(tmp_path: Path) -> ImageFiles:
    """Write six photos of one subject, and two images of each of three prompts."""
    for name, images in (("rex", drawings(6)), ("drawn", drawings(6, seed=1))):
        (tmp_path / name).mkdir()
        for number, image in enumerate(images):
            image.save(tmp_path / name / f"{number}.png")
    drawn = [[tmp_path / "drawn" / f"{2 * p + s}.png" for s in range(2)] for p in range(3)]
    prompts = ["a dog", "a red dog", "a dog in snow"]
    return ImageFiles("tuned", Subject(str(tmp_path / "rex"), "dog"), prompts, drawn, [], [])


def scores_of(judge: RubricJudge, files: ImageFiles) -> dict[str, Any]:
    return {measure: np.asarray(values) for measure, values in judge(files)}


# Reading an answer

ANSWERS: dict[str, int | None] = {
    "Score: 3": 3, "score: 0": 0, "SCORE: 4.": 4, "Score:2": 2, "  Score : 1  ": 1, "3": 3,
    " 4\n": 4, "**Score:** 3": 3, "### Score: 1\nShapes differ.": 1, "Score: [2]": 2,
    "Analysis: it is red.\nScore: 3": 3, "Analysis: it is red. Score: 3": 3, "Score: 3/4": 3,
    "Score: 3 / 4": 3, "Score: Good (3)": 3, "Score: Very Poor (0)": 0, "Score: 4 (excellent)": 4,
    "`Score: 2`": 2, "<think>Score: 1 or Score: 2?</think>\nScore: 2": 2, "Score: (1)": 1,
    "": None, "Score: N": None, "Score: 5": None, "Score: -1": None, "Score: 3.5": None,
    "Score: 34": None, "Score: three": None, "Score: 3 or 4": None, "Score: 3-4": None,
    "Score: 3\nScore: 3": None, "Shape score: 3, colour score: 2": None, "5": None, "33": None,
    "Score 3": None, "I would say 3": None, "Underscore: 3": None, "Score:\n3": 3,
    '"Score: 3"': 3, "“Score: 2”.": 2, "'3'": 3, "Score: 3.0": 3, "Score: 3.0/4.": 3, "3.0": None,
    "Score: 3 out of 4": 3, "Score: 3 out of 5": None, "Score: 3 - good": 3, "Score: 1 – poor.": 1,
    "Score: 3 - 4": None, "**Score:**\n\n4\n\nAll of it.": 4, "Score:\nShape: 3": None,
    "Score: 3/5": None, "Score: ３": None, "Score: ٣": None, "³": None, "Score: 3 because": None,
    "The scores: 3": None, "I cannot judge people.": None, "Score: " + " " * 9000 + "3": None,
    "<think>Score: 3": None, "Score: Good 3": None, "Score: )3(": None, "Score: 0/4.": 0,
}  # fmt: skip


def by_hand(answer: str) -> int | None:
    """Read a score without a regular expression: an implementation of its own."""
    if len(answer) > rubric.MOST_CHARACTERS:
        return None
    kept = "".join(c for c in answer.split("</think>")[-1] if c not in "*_`#>[]\"'“”").strip()
    found, start = [], 0
    while (place := kept.lower().find("score", start)) >= 0:
        start = place + 5
        rest = kept[start:].lstrip(" \t")
        if rest.startswith(":") and (place == 0 or not kept[place - 1].isalnum()):
            found.append(rest[1:].strip().split("\n")[0].strip().removesuffix("."))
    if not found:
        return int(kept) if kept in ("0", "1", "2", "3", "4") else None

    def is_word(text: str, least: int) -> bool:
        letters = all(c == " " or (c.isascii() and c.isalpha()) for c in text)
        return least <= len(text) <= 12 and letters

    if len(found) > 1:
        return None
    for number in range(5):
        head, mark, tail = found[0].partition(f"({number})")
        if mark and not tail and is_word(head, 0):
            return number
        if found[0].startswith(str(number)):
            tail = found[0][1:].removeprefix(".0")
            overs = ("/4", " / 4", " /4", "/ 4", " out of 4")
            over = next((o for o in overs if tail.lower().startswith(o)), "")
            tail = tail[len(over) :]
            named = tail.startswith(" (") and tail.endswith(")") and is_word(tail[2:-1], 1)
            dashed = tail[:3] in (" - ", " – ", " — ") and is_word(tail[3:], 1)
            return number if not tail or named or dashed else None
    return None


@pytest.mark.parametrize("answer", ANSWERS)
def test_an_answer_is_read_strictly(answer: str) -> None:
    assert parse_score(answer) == ANSWERS[answer]


def test_two_implementations_read_alike() -> None:
    draw = random.Random(0)
    pieces = ["Score", "score:", ": ", "3", "4", "9", "/4", " ", "\n", "(", ")", "Good", ".", "**",
              "Analysis: x", "</think>", "under", "0", " / 4", "-", '"', ".0", " out of 4", " - ",
              " good"]  # fmt: skip
    answers = ["".join(draw.choices(pieces, k=draw.randint(1, 7))) for _ in range(20_000)]
    answers += ["Score: " + "".join(draw.choices(pieces[3:], k=draw.randint(1, 4)))
                for _ in range(20_000)]  # fmt: skip
    read = [parse_score(answer) for answer in (*ANSWERS, *answers)]
    assert [(a, by_hand(a)) for a in (*ANSWERS, *answers)] == list(
        zip((*ANSWERS, *answers), read, strict=True)
    )
    assert sum(score is not None for score in read) > 1000


# Asking, and keeping what was answered


def test_an_image_is_judged_beside_its_references_and_its_prompt(
    files: ImageFiles, tmp_path: Path
) -> None:
    with StandIn() as api:
        judge = RubricJudge(Endpoint(api.address, "a-model"), tmp_path / "judge")
        found = scores_of(judge, files)
    assert judge.name == f"a-model by {rubric.VERSION}"
    assert {m: v.shape for m, v in found.items()} == {
        "concept_preservation": (3, 2), "prompt_following": (3, 2),
    }  # fmt: skip
    assert (judge.questions, judge.missing) == (12, 0) and len(api.requests) == 12
    by_question = {}
    for body, key in api.requests:
        assert key == f"Bearer {KEY}"
        assert (body["model"], body["temperature"], body["max_tokens"]) == ("a-model", 0, 512)
        task, _, asked = body["messages"]
        assert [turn["role"] for turn in body["messages"]] == ["user", "assistant", "user"]
        words = task["content"][0]["text"].lower()
        aspects = ("shape", "colour", "texture", "facial features")
        assert all(a in words for a in aspects) != all(a in words for a in ("accuracy", "context"))
        urls = images_in([asked])
        for url in urls:
            image = Image.open(io.BytesIO(base64.b64decode(url.partition("base64,")[2])))
            assert image.format == "JPEG" and max(image.size) == SIDE
        texts = [part["text"] for part in asked["content"] if part["type"] == "text"]
        if len(urls) == 1:
            assert texts[0] in [f"Text: {prompt}" for prompt in files.prompts]
        else:
            assert len(urls) == 5 and texts == ["References:", "Generated image:"], "4 of 6 photos"
        by_question[urls[-1], texts[0]] = int(by_content(body["messages"])[2].decode()[-6:-5]) / 4
    for p, row in enumerate(files.images):
        for s, path in enumerate(row):
            image = Image.open(path)
            side = max(image.size)
            size = tuple(round(n * SIDE / side) for n in image.size)
            buffer = io.BytesIO()
            image.resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=95)
            url = f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
            assert found["concept_preservation"][p, s] == by_question[url, "References:"]
            text = f"Text: {files.prompts[p]}"
            assert found["prompt_following"][p, s] == by_question[url, text]


def test_what_was_answered_is_not_asked_again_unless_anything_differs(
    files: ImageFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with StandIn() as api:

        def judged(name: str = "a-model", **settings: Any) -> int:
            before = len(api.requests)
            scores_of(RubricJudge(Endpoint(api.address, name, **settings), tmp_path / "j"), files)
            return len(api.requests) - before

        assert (judged(), judged()) == (12, 0)
        next((tmp_path / "j").glob("*.json")).write_text("{")  # one that is damaged
        assert (judged(), judged()) == (1, 0)
        assert judged("another-model") == judged(parameters={"temperature": 0.5}) == 12
        assert judged(seconds=9.0, key_variable="OTHER") == 0, "neither changes an answer"
        monkeypatch.setattr(rubric, "VERSION", "another version")
        assert judged() == 12
        drawings(1, seed=9)[0].save(files.images[1][1])
        assert judged() == 2
        drawings(1, seed=8)[0].save(Path(files.subject.photos) / "0.png")
        assert judged() == 6
    kept = [json.loads(path.read_text()) for path in (tmp_path / "j").glob("*.json")]
    assert all({"rubric", "model", "settings", "chat", "answers", "score"} <= k.keys() for k in kept
               if k)  # fmt: skip
    texts = "".join(path.read_text() for path in (tmp_path / "j").rglob("*"))
    assert KEY not in texts and str(tmp_path) not in texts


def test_an_answer_without_a_score_is_asked_again_and_then_recorded_as_missing(
    files: ImageFiles, tmp_path: Path
) -> None:
    def reply(messages: list[dict[str, Any]]) -> tuple[int, dict[str, str], bytes]:
        if len(images_in(messages)) > 1:
            return says("rubbish \u0000 <b>" + "x" * 20_000)
        return says("Score: 2" if len(messages) > 3 else None)

    with StandIn(reply) as api:
        judge = RubricJudge(Endpoint(api.address, "a-model"), tmp_path / "judge")
        found = scores_of(judge, files)
        assert len(api.requests) == 6 * TRIES + 6 * 2
        assert np.isnan(found["concept_preservation"]).all(), "never 0"
        assert (found["prompt_following"] == 0.5).all()
        assert (judge.questions, judge.missing) == (12, 6)
        scores_of(RubricJudge(judge.model, judge.cache), files)
        assert len(api.requests) == 30, "a missing score is kept, too"
    repeated = [body["messages"] for body, _ in api.requests if len(body["messages"]) > 3]
    assert all(len(turns) == 5 and turns[4]["content"][0]["text"] == rubric.AGAIN
               for turns in repeated)  # fmt: skip
    assert all(0 < len(turns[3]["content"][0]["text"]) <= 500 for turns in repeated)
    kept = [json.loads(path.read_text()) for path in judge.cache.glob("*.json")]
    missing = [k for k in kept if k["score"] is None]
    assert len(missing) == 6
    for k in missing:
        assert len(k["answers"]) == TRIES and k["answers"][0].startswith("rubbish")
        assert all(len(answer) <= rubric.MOST_CHARACTERS + 1 for answer in k["answers"])


def test_a_refusal_for_now_is_tried_again_after_the_time_that_it_asks_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(judge_models.time, "sleep", waited.append)
    replies = [(429, {"Retry-After": "7"}, b"slow down"), (503, {"Retry-After": "1e9"}, b""),
               says("Score: 4")]  # fmt: skip
    with StandIn(lambda _: replies[len(api.requests) - 1]) as api:
        assert Endpoint(api.address, "m").answer(CHAT) == "Score: 4"
    assert waited == [7.0, 0.02] and len(api.requests) == 3
    with (
        StandIn(lambda _: (500, {}, KEY.encode())) as api,
        pytest.raises(
            JudgeError, match=r"no reply in 3 tries \(status 500\); evaluate again later"
        ),
    ):
        Endpoint(api.address, "m").answer(CHAT)
    assert len(api.requests) == 3
    with pytest.raises(JudgeError, match=r"gave no reply in 3 tries \(.*refused"):
        Endpoint(api.address, "m").answer(CHAT)  # nobody is there any more


def test_parameters_that_a_model_refuses_are_left_out_from_then_on(
    files: ImageFiles, tmp_path: Path
) -> None:
    """Refuse as OpenAI's reasoning models do, one parameter at a time."""
    messages = {
        "max_tokens": "Unsupported parameter: 'max_tokens' is not supported with this model. Use "
        "'max_completion_tokens' instead.",
        "temperature": "Unsupported value: 'temperature' does not support 0 with this model. Only "
        "the default (1) value is supported.",
    }

    def reply(_: object) -> tuple[int, dict[str, str], bytes]:
        for name, message in messages.items():
            if name in api.requests[-1][0]:
                return 400, {}, json.dumps({"error": {"message": message, "param": name}}).encode()
        return says("Score: 4")

    with StandIn(reply) as api:
        model = Endpoint(api.address, "gpt-5", parallel=1)
        found = scores_of(RubricJudge(model, tmp_path / "judge"), files)
        assert all((values == 1).all() for values in found.values())
        assert len(api.requests) == 2 + 12
        sent = [body.keys() - {"model", "messages"} for body, _ in api.requests]
        assert sent[1:3] == [{"temperature", "max_completion_tokens"}, {"max_completion_tokens"}]
        assert sent[3:] == [{"max_completion_tokens"}] * 11
        assert api.requests[-1][0]["max_completion_tokens"] == 4096
        again = Endpoint(api.address, "gpt-5", parallel=1)
        scores_of(RubricJudge(again, tmp_path / "judge"), files)
        scores_of(RubricJudge(model, tmp_path / "judge"), files)
        assert len(api.requests) == 14, "what is kept is found by what was asked for"
        with pytest.raises(JudgeError, match=r"status 400: .*Use 'max_completion_tokens' instead"):
            messages["max_completion_tokens"] = messages["max_tokens"]
            again.answer(CHAT)


def choice(**fields: Any) -> tuple[int, dict[str, str], bytes]:
    return 200, {}, json.dumps({"choices": [{"index": 0, **fields}]}).encode()


@pytest.mark.parametrize(
    "reply",
    [
        choice(message={"role": "assistant", "reasoning": "Well"}, finish_reason="length"),
        choice(message={"role": "assistant"}, finish_reason="content_filter"),
        choice(message=None, finish_reason="content_filter"),
        choice(finish_reason="content_filter"),
        (200, {}, b'{"choices": []}'),
        (
            400,
            {},
            b'{"error": {"message": "'
            + b"It was filtered. " * 20
            + b'", "param": "prompt", "code": "content_filter"}}',
        ),
        (400, {}, b'{"error": {"message": "max_tokens or model output limit was reached."}}'),
    ],
    ids=["reasoning", "filter", "null", "no message", "no choice", "400", "limit"],
)
def test_no_answer_to_one_image_is_a_missing_score(
    reply: tuple[int, dict[str, str], bytes], files: ImageFiles, tmp_path: Path
) -> None:
    refused: list[str] = []

    def once(messages: list[dict[str, Any]]) -> tuple[int, dict[str, str], bytes]:
        refused.extend(images_in(messages)[-1:] if not refused else [])
        at_limit = b"output limit" in reply[2] and "max_tokens" in api.requests[-1][0]
        return reply if images_in(messages)[-1:] == refused or at_limit else says("Score: 2")

    with StandIn(once) as api:
        judge = RubricJudge(Endpoint(api.address, "m", parallel=1), tmp_path / "judge")
        scores_of(judge, files)
    assert (judge.questions, judge.missing) == (12, 2), "one image is asked about twice"


def hang(_: object) -> tuple[int, dict[str, str], bytes]:
    time.sleep(1.5)
    return says("Score: 1")


@pytest.mark.parametrize(
    ("reply", "requests", "sentence"),
    [
        (lambda _: (401, {}, b"no"), 1, r"refused the key \(status 401\); put .* OPENAI_API_KEY"),
        (lambda _: (404, {}, f"no model m {KEY}\n\x1b[31m".encode()), 1,
         r"\(status 404: no model m \*\*\* \\x1b\[31m\); check the address"),
        (lambda _: (302, {"Location": "http://127.0.0.1:1/v1"}, b""), 1, r"status 302"),
        (lambda _: (200, {}, b"<html>"), 1, "in another format than OpenAI's"),
        (lambda _: (200, {}, b"[" * 100_000), 1, "in another format than OpenAI's"),
        (lambda _: (200, {}, b'{"choices": {}}'), 1, "in another format than OpenAI's"),
        (lambda _: (200, {}, b'{"choices": ["x"]}'), 1, "in another format than OpenAI's"),
        (lambda _: (400, {}, b"max_tokens"), 2, r"refused the request \(status 400: max_tokens\)"),
        (lambda _: says(["Score: 1"]), 1, "in another format than OpenAI's"),
        (lambda _: (200, {}, b" " * (MOST_BYTES + 1)), 1, r"more than 1,048,576 bytes"),
        (hang, 3, r"no reply in 3 tries \(TimeoutError"),
    ],
    ids=["401", "404", "redirect", "html", "deep", "object", "text", "400", "list", "huge", "hang"],
)  # fmt: skip
def test_a_reply_that_is_none_is_one_sentence_without_the_key(
    reply: Any, requests: int, sentence: str, files: ImageFiles, tmp_path: Path
) -> None:
    with StandIn(reply) as api:
        model = Endpoint(api.address, "m", seconds=0.3, parallel=1)
        with pytest.raises(JudgeError, match=sentence) as raised:
            scores_of(RubricJudge(model, tmp_path / "judge"), files)
        assert len(api.requests) == requests
    assert KEY not in str(raised.value) and "\n" not in str(raised.value)
    assert not list(tmp_path.rglob("*.json"))


def test_a_reply_that_trickles_ends_in_time() -> None:
    def trickle(_: object) -> tuple[int, dict[str, str], Any]:
        return 200, {}, None

    with StandIn(trickle) as api:
        handler: Any = api.server.RequestHandlerClass
        post = handler.do_POST

        def slow(self: Any) -> None:
            write = self.wfile.write
            self.wfile.write = lambda data: (
                write(data) if data else [(write(b" "), time.sleep(0.1)) for _ in range(50)]
            )
            post(self)

        handler.do_POST = slow
        began = time.monotonic()
        with pytest.raises(JudgeError, match="the reply took longer than 0 seconds"):
            Endpoint(api.address, "m", seconds=0.25).answer(CHAT)
        assert time.monotonic() - began < 3


def test_addresses_and_keys_that_would_leak_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for address in (
        "file:///etc/passwd",
        "api.openai.com/v1",
        "https://me:word@host/v1",
        "http://",
    ):
        with pytest.raises(JudgeError, match="has to begin with http") as raised:
            Endpoint(address, "m")
        assert "word" not in str(raised.value)
    with pytest.raises(JudgeError, match="ends in a query"):
        Endpoint("https://host/v1?key=1", "m")
    with StandIn() as api:
        monkeypatch.setenv("OTHER", f"  {KEY}\n")
        Endpoint(f"{api.address}/", "m", "OTHER").answer(CHAT)
        monkeypatch.setenv("OTHER", "")
        Endpoint(api.address, "m", "OTHER").answer(CHAT)
        assert [key for _, key in api.requests] == [f"Bearer {KEY}", None]
        monkeypatch.setenv("OTHER", f"{KEY}\nX: y")
        with pytest.raises(JudgeError, match="the key in OTHER has a character") as raised:
            Endpoint(api.address, "m", "OTHER").answer(CHAT)
    assert KEY not in str(raised.value) and KEY not in repr(Endpoint(api.address, "m"))


JUDGE_ALL = """
import sys
from pathlib import Path
from dreambooth_lib.__main__ import main
from dreambooth_lib.core.subject import Subject
from dreambooth_lib.evaluation.judge import RubricJudge
from dreambooth_lib.evaluation.judge_models import Endpoint
from dreambooth_lib.evaluation.measures import ImageFiles

address, place = sys.argv[1], Path(sys.argv[2])
images = [[place / f"drawn/{2 * p + s}.png" for s in range(2)] for p in range(3)]
prompts = ["a dog", "a red dog", "a dog in snow"]
files = ImageFiles("tuned", Subject(str(place / "rex"), "dog"), prompts, images, [], [])
for measure, values in RubricJudge(Endpoint(address, "m", parallel=2), place / "judge")(files):
    print(measure, values)
"""


def test_a_second_process_does_not_ask_what_a_killed_one_had_answered(
    files: ImageFiles, tmp_path: Path
) -> None:
    def slowly(messages: list[dict[str, Any]]) -> tuple[int, dict[str, str], bytes]:
        time.sleep(0.1)
        return by_content(messages)

    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with StandIn(slowly) as api:
        command = [sys.executable, "-c", JUDGE_ALL, api.address, str(tmp_path)]
        with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
            while len(kept := list((tmp_path / "judge").glob("*.json"))) < 5:
                assert process.poll() is None, "it ended before it could be killed"
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
        kept = list((tmp_path / "judge").glob("*.json"))
        asked = api.questions()
        assert 5 <= len(kept) < 12 and len(kept) <= len(asked) <= len(kept) + 2
        done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
        again = api.questions()[len(asked) :]
        assert len(again) == 12 - len(kept)
        assert len(set(asked) & set(again)) == len(asked) - len(kept), "what was in flight alone"
        expected = scores_of(RubricJudge(Endpoint(api.address, "m"), tmp_path / "fresh"), files)
    lines = [line.split(" ", 1) for line in done.stdout.splitlines()]
    assert {name: json.loads(values) for name, values in lines} == {
        name: values.tolist() for name, values in expected.items()
    }


# A model on this machine


@pytest.fixture(scope="module")
def tiny_vlm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield save_tiny_vlm(tmp_path_factory.mktemp("vlm") / "tiny-vlm")


def test_a_local_model_answers_greedily(tiny_vlm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare with a loop that takes the likeliest token of the whole sequence, one by one."""
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

    monkeypatch.setattr(judge_models, "MOST_TOKENS", 6)
    model, images = LocalModel(tiny_vlm), drawings(2)
    chat = CONCEPT_PRESERVATION.chat("References:", images[0], "Generated image:", images[1])
    answer = model.answer(chat)
    assert model.answer(chat) == answer and model.name == "tiny-vlm" and model.parallel == 1
    assert model.settings["dtype"] == "float32" and model.settings["max_new_tokens"] == 6

    plain = LlavaForConditionalGeneration.from_pretrained(tiny_vlm).eval()
    processor = LlavaProcessor.from_pretrained(tiny_vlm)
    task, plan, _ = (parts[0] for _, parts in chat)
    text = (f"user : {task} assistant : {plan} user : References: <image> Generated image: <image> "
            "assistant : ")  # fmt: skip
    inputs = dict(processor(text=text, images=images, return_tensors="pt"))
    ids = inputs.pop("input_ids")
    assert (ids == 3).sum() == 2 * 16, "a token for each patch of either image"
    start = ids.shape[1]
    for _ in range(6):
        with torch.inference_mode():
            logits = plain(ids, pixel_values=inputs["pixel_values"]).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
        if ids[0, -1] == 2:
            break
    assert answer == processor.tokenizer.decode(ids[0, start:], skip_special_tokens=True)


def test_a_local_model_judges_once(
    tiny_vlm: Path, files: ImageFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judge_models, "MOST_TOKENS", 4)
    judge = RubricJudge(LocalModel(tiny_vlm), tmp_path / "judge")
    first = scores_of(judge, files)
    assert judge.missing == 12, "random weights write no score"
    monkeypatch.setattr(LocalModel, "answer", None)
    second = scores_of(RubricJudge(LocalModel(tiny_vlm), tmp_path / "judge"), files)
    assert all(np.array_equal(first[m], second[m], equal_nan=True) for m in first)
    assert str(tmp_path) not in "".join(f.read_text() for f in (tmp_path / "judge").iterdir())


def test_a_model_that_is_none_is_one_sentence(tiny_vlm: Path, tmp_path: Path) -> None:
    def broken(name: str, remove: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for file in tiny_vlm.iterdir():
            if file.name != remove:
                (folder / file.name).write_bytes(file.read_bytes())
        return folder

    sentence = "give a Hub id or a folder of a vision-language model"
    with pytest.raises(JudgeError, match=f"weights' cannot be read.*{sentence}"):
        LocalModel(broken("weights", "model.safetensors"))
    with pytest.raises(JudgeError, match=f"template' has no chat template; {sentence}"):
        LocalModel(broken("template", "chat_template.jinja"))
    pickled = broken("pickled", "model.safetensors")
    torch.save({}, pickled / "pytorch_model.bin")
    with pytest.raises(JudgeError, match="cannot be read"):
        LocalModel(pickled)
    remote = broken("remote", "")
    config = json.loads((remote / "config.json").read_text())
    config |= {"model_type": "x", "auto_map": {"AutoConfig": "m.C",
               "AutoModelForImageTextToText": "m.M"}}  # fmt: skip
    (remote / "config.json").write_text(json.dumps(config))
    (remote / "m.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(JudgeError, match="cannot be read"):
        LocalModel(remote)
    assert not (tmp_path / "ran").exists(), "code of the model's was run"
    hostile = broken("hostile", "")
    (hostile / "chat_template.jinja").write_text("{{ messages.__class__.__mro__[1].x() }}")
    with pytest.raises(JudgeError, match="cannot be asked"):
        LocalModel(hostile).answer(CHAT)


# The command


def test_the_command_judges_and_says_what_is_missing(
    tmp_path: Path, tiny_sd1: str, clip_folder: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    data, out = tmp_path / "data", tmp_path / "out"
    save_photos(data / "rex", 1)
    (data / "prompts_and_classes.txt").write_text(
        "subject_name,class,type\nrex,dog,live\n\n"
        "Live Subject Prompts\n\n'a {0} {1}'.format(unique_token, class_token),\n"
    )

    def command(*words: str) -> str:
        given = ["evaluate", str(data), "--base", tiny_sd1, "--encoders", str(clip_folder),
                 "--images-per-prompt", "3", "--steps", "1", "--class-images", "2", "--scorer",
                 str(clip_folder), "--out", str(out)]  # fmt: skip
        monkeypatch.setattr(sys, "argv", ["dreambooth_lib", *given, *words])
        main()
        return capsys.readouterr().out

    def reply(messages: list[dict[str, Any]]) -> tuple[int, dict[str, str], bytes]:
        return says("Score: 4" if len(images_in(messages)) > 1 else "no idea")

    with StandIn(reply) as api:
        words = ("--vlm", "org/a-model", "--vlm-url", api.address, "--vlm-key-env", "NO_SUCH_KEY")
        said = command(*words)
        # Six images, unless some are alike; the prompt's question is asked three times.
        assert 4 <= len(api.requests) <= 6 + 6 * TRIES and {key for _, key in api.requests} == {
            None
        }
        count = len(api.requests)
        assert command(*words) in said and len(api.requests) == count
        for key in ("sk-a0b1c2d3", "abcdefghijklmnop"):
            with pytest.raises(SystemExit, match="--vlm-key-env takes the name of an") as refused:
                command(*words[:-1], key)
            assert key not in str(refused.value) + "".join(capsys.readouterr())
        with pytest.raises(SystemExit, match="--vlm-url is given without a model"):
            command("--vlm-url", api.address)
    name = f"org/a-model by {rubric.VERSION}"
    assert f"concept preservation (VLM) ↑ ({name})" in said and "1.000 [1.000, 1.000]" in said
    assert f"{name} gave no score to 6 of 12 questions; its words are in `judge`." in said
    judged = [row for row in read_csv(out / "scores.csv") if row.encoder == name]
    assert [(row.measure, row.value) for row in judged] == [("concept_preservation", 1.0)] * 6
    command()
    assert name not in {row.encoder for row in read_csv(out / "scores.csv")}
