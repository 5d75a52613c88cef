"""Judges: a local endpoint with all known failures, and a tiny local chat model."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from datetime import date
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from minigpt3d.cli.main import main
from minigpt3d.evaluation.judges import (
    MAX_TOKENS,
    EndpointJudge,
    JudgeError,
    LocalJudge,
    endpoint as endpoint_module,
    local,
)
from minigpt3d.evaluation.judges.endpoint import ATTEMPTS


KEY = "sk-do-not-show-me"


# ---- An endpoint ----------------------------------------------------------------------------------------------------


class Request(NamedTuple):
    time: float
    prompt: str
    body: dict
    headers: Message
    path: str


class Answer(NamedTuple):
    content: bytes
    status: int = 200
    headers: dict = {}
    missing: int = 0  # bytes that are promised and never come


def completion(content: str | None = "T#yes", finish_reason="stop", tokens: tuple | None = (10, 4)) -> dict:
    result = {"choices": [{"message": {"content": content}, "finish_reason": finish_reason}], "model": "served"}
    return result | ({"usage": {"prompt_tokens": tokens[0], "completion_tokens": tokens[1]}} if tokens else {})


def refusal(status: int, message: str, **others) -> Answer:
    return as_answer({"error": {"message": message} | others})._replace(status=status)


def as_answer(value: dict) -> Answer:
    return Answer(json.dumps(value).encode())


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_POST(self):
        body, endpoint = json.loads(self.rfile.read(int(self.headers["Content-Length"]))), self.server.endpoint
        request = Request(time.monotonic(), body["messages"][0]["content"], body, self.headers, self.path)
        with endpoint.lock:
            endpoint.requests.append(request)
            endpoint.active += 1
            endpoint.most_active = max(endpoint.active, endpoint.most_active)
            nth = sum(other.prompt == request.prompt for other in endpoint.requests)
        answer = endpoint.answer(request, nth)
        with endpoint.lock:
            endpoint.active -= 1
        try:
            self.reply(answer if isinstance(answer, Answer) else as_answer(answer))
        except OSError:  # the client has gone
            self.close_connection = True

    def reply(self, answer: Answer):
        self.send_response(answer.status)
        length = str(len(answer.content) + answer.missing)
        for name, value in ({"Content-Type": "application/json", "Content-Length": length} | answer.headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(answer.content)
        self.close_connection |= answer.missing > 0


class Endpoint:
    """Replies "reply to PROMPT" unless `answer` is set: (request, how often its prompt was asked) → answer."""

    def __init__(self):
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.endpoint, self.lock, self.over = self, threading.Lock(), threading.Event()
        self.requests: list[Request] = []
        self.active = self.most_active = 0
        self.host = f"127.0.0.1:{self.server.server_port}"
        self.url = f"http://{self.host}/v1"

    def answer(self, request: Request, nth: int) -> Answer | dict:
        return completion(f"reply to {request.prompt}")

    def asked(self) -> Counter:
        """Number of requests by prompt."""
        return Counter(request.prompt for request in self.requests)


@pytest.fixture
def endpoint():
    endpoint = Endpoint()
    threading.Thread(target=endpoint.server.serve_forever, args=(0.01,), daemon=True).start()
    yield endpoint
    endpoint.over.set()
    endpoint.server.shutdown()
    endpoint.server.server_close()


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in [name for name in os.environ if name.startswith("OPENAI_") or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    set_waits(monkeypatch, 0.001, 0.002)


def set_waits(monkeypatch, first: float, longest: float):
    """Set the openai client's waits before its retries: the first, doubled up to the longest."""
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", first)
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", longest)


@pytest.fixture
def make_judge(endpoint, tmp_path):
    def make(model="a-model", url=endpoint.url, cache_dir=tmp_path / "cache", **options) -> EndpointJudge:
        return EndpointJudge(model, url, cache_dir, **options)

    return make


def replies_to(prompts: list[str]) -> list[str]:
    return [f"reply to {prompt}" for prompt in prompts]


def read_entries(folder: Path) -> list[dict]:
    """All files of a cache, which must be entries."""
    return [json.loads(path.read_text()) for path in sorted(folder.iterdir())]


# ---- Replies --------------------------------------------------------------------------------------------------------


def test_replies_come_in_the_order_of_the_prompts(endpoint, make_judge):
    others_replied = threading.Barrier(4)

    def reply_to_3_last(request, nth):
        if request.prompt != "3":
            others_replied.wait(10) if request.prompt in "012" else None
            return completion(f"reply to {request.prompt}")
        others_replied.wait(10)
        time.sleep(0.1)
        return completion("reply to 3")

    endpoint.answer = reply_to_3_last
    prompts = list("3012465")
    assert make_judge(concurrency=4)(prompts) == replies_to(prompts)


def test_request_body_and_headers(endpoint, make_judge, monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/not/there")
    make_judge("org/model", max_tokens=17)(["Größe 灯?"])
    (request,) = endpoint.requests
    messages = [{"role": "user", "content": "Größe 灯?"}]
    assert request.body == {
        "model": "org/model", "messages": messages, "temperature": 0, "seed": 0, "max_tokens": 17
    }  # fmt: skip
    assert request.path == "/v1/chat/completions" and request.headers["Authorization"] == f"Bearer {KEY}"


def test_equal_prompts_are_asked_once(endpoint, make_judge):
    judge = make_judge()
    assert judge(["a", "b", "a", "a"]) == replies_to(["a", "b", "a", "a"])
    assert judge([]) == []
    assert endpoint.asked() == {"a": 1, "b": 1}


def test_concurrency(endpoint, make_judge):
    three = threading.Barrier(3)

    def together(request, nth):
        three.wait(10)
        time.sleep(0.05)  # in this time a fourth request would come
        return completion()

    endpoint.answer = together
    make_judge(concurrency=3)([str(i) for i in range(12)])
    assert endpoint.most_active == 3


def test_requests_per_minute(endpoint, make_judge):
    judge, interval = make_judge(requests_per_minute=600, concurrency=6), 0.1
    endpoint.answer = lambda request, nth: refusal(500, "oops") if (request.prompt, nth) == ("1", 1) else completion()
    begin = time.monotonic()
    judge([str(i) for i in range(6)])
    times = [request.time - begin for request in endpoint.requests]
    assert len(times) == 7 and all(at >= i * interval for i, at in enumerate(sorted(times)))


@pytest.mark.parametrize(
    ("answer", "reply"),
    [
        (completion(None), None),
        (completion(""), ""),
        (completion(" \n"), " \n"),
        (completion("", "length"), ""),
        (completion(None, "content_filter"), None),
        ({"choices": [{"message": {}}]}, None),
        ({"choices": []}, None),
        (refusal(400, "filtered", code="content_filter"), None),
        (completion("T#beca", "length"), "T#beca"),
        (completion("half an emoji: \ud83d"), "half an emoji: ?"),
    ],
)
def test_replies_without_text_or_cut_off(endpoint, make_judge, tmp_path, answer, reply):
    """A run asks once. The next run asks again if there is no text and no reason for that, as from a broken server."""
    endpoint.answer = lambda request, nth: answer
    judge = make_judge()
    assert judge(["a"]) == judge(["a"]) == [reply]
    assert len(endpoint.requests) == 1 and judge.sum_up()["replies"] == 1
    (entry,) = read_entries(tmp_path / "cache")
    assert entry["reply"] == reply and judge.sum_up()["cut"] == (entry["finish_reason"] == "length")
    endpoint.answer = lambda request, nth: completion("mended")
    is_final = entry["finish_reason"] in ("length", "content_filter") or (reply or "").strip()
    assert make_judge()(["a"]) == [reply if is_final else "mended"]
    assert make_judge()(["a"]) == [reply if is_final else "mended"] and len(endpoint.requests) == (
        1 if is_final else 2
    )


def test_thoughts_are_cached_but_not_returned(endpoint, make_judge, tmp_path):
    """With or without the mark at the start, which some templates put into the prompt."""
    quoted = 'F#the answer says "</think>T#the same"'
    replies = {
        "a": ("<think>\nF#? No.\n</think>\n\nT#the same", "T#the same"),
        "b": ("It may be.\n</think>T#so", "T#so"),
        "c": ("<think>F#", "<think>F#"),
        "d": (quoted, quoted),  # a quoted answer must not change the verdict
        "e": (f"<think>{quoted}</think>F#no", f"<think>{quoted}</think>F#no"),
        "f": (" 85.5 # so </think> 3#", " 85.5 # so </think> 3#"),
    }
    endpoint.answer = lambda request, nth: completion(replies[request.prompt][0])
    for _ in range(2):
        assert make_judge()(list(replies)) == [read for _, read in replies.values()]
    assert len(endpoint.requests) == 6
    assert sorted(e["reply"] for e in read_entries(tmp_path / "cache")) == sorted(kept for kept, _ in replies.values())
    endpoint.answer = lambda request, nth: completion("<think>Hm.</think>\n" if nth == 1 else "T#")
    assert [make_judge()(["g"]) for _ in range(3)] == [[""], ["T#"], ["T#"]]  # a thought alone is no reply


def test_half_an_emoji_is_replaced(endpoint, make_judge):
    assert make_judge()(["a \ud83d b"]) == ["reply to a ? b"]


def test_sum_up_counts_cached_and_new_replies(endpoint, make_judge, tmp_path):
    """As in a run that was resumed on another day."""
    make_judge()(["a", "b"])
    for path in (tmp_path / "cache").iterdir():
        path.write_text(path.read_text().replace(date.today().isoformat(), "2026-01-31"))
    judge = make_judge(price=(1e6, 2e6))
    judge(["a", "b", "a"])
    complete = {"replies": 2, "cut": 0, "sampled": 0, "date": "2026-01-31", "served_models": ["served"]}
    complete |= {"endpoint": endpoint.host}
    assert judge.sum_up() == complete | {"prompt_tokens": 20, "completion_tokens": 8, "cost": 36.0}
    judge(["a", "c"])
    complete |= {"replies": 3, "date": f"2026-01-31 to {date.today().isoformat()}"}
    assert judge.sum_up() == complete | {"prompt_tokens": 30, "completion_tokens": 12, "cost": 54.0}
    assert make_judge().sum_up()["replies"] == 0


def test_sum_up_names_the_endpoint_that_replied(endpoint, make_judge):
    """Not the one that this run would have asked."""
    elsewhere = "http://someone:secret@127.0.0.2:9/v1?token=secret"
    make_judge()(["a", "b"])
    judge = make_judge(url=elsewhere)
    judge(["a", "b"])
    assert judge.sum_up()["endpoint"] == endpoint.host
    other = make_judge(url=endpoint.url.replace("127.0.0.1", "localhost"))
    other(["a", "c"])
    assert other.sum_up()["endpoint"] == f"{endpoint.host}, {endpoint.host.replace('127.0.0.1', 'localhost')}"


def test_usage_adds_up_over_calls(endpoint, make_judge):
    counts = {"a": (100, 10), "b": (200, 20), "c": (300, 30), "d": (0, 0)}
    endpoint.answer = lambda request, nth: completion("cut", "length", counts[request.prompt])
    judge = make_judge(price=(2, 10))
    judge(["a", "b", "a"])
    judge(["b", "c", "d"])
    assert judge.name == "a-model"
    facts = judge.sum_up()
    assert (facts["replies"], facts["cut"], facts["prompt_tokens"], facts["completion_tokens"]) == (4, 4, 600, 60)
    assert facts["cost"] == pytest.approx((600 * 2 + 60 * 10) / 1e6)
    without_price = make_judge()
    without_price(["a"])
    assert without_price.sum_up()["cost"] is None


@pytest.mark.parametrize(("tokens", "known"), [(None, (None, None)), ((None, 4), (None, 8)), ((10, None), (20, None))])
def test_unknown_tokens_make_the_sum_unknown(endpoint, make_judge, tokens, known):
    endpoint.answer = lambda request, nth: completion(tokens=tokens if request.prompt == "a" else (10, 4))
    judge = make_judge(price=(1, 1))
    for prompt in "bac":
        judge([prompt])
    expected = tuple(None if total is None else total * 3 // 2 for total in known)
    facts = judge.sum_up()
    assert (facts["prompt_tokens"], facts["completion_tokens"]) == expected
    assert facts["cost"] is None and facts["replies"] == 3


# ---- Cache ----------------------------------------------------------------------------------------------------------


def test_only_equal_requests_use_the_cache(endpoint, make_judge, tmp_path):
    prompts = ["a", "b"]
    make_judge(concurrency=2, timeout=5)(prompts)
    again = make_judge()
    assert again(prompts) == replies_to(prompts) and len(endpoint.requests) == 2
    assert again.sum_up()["replies"] == 2
    for count, changes in enumerate(({"model": "other"}, {"max_tokens": 9}, {"cache_dir": tmp_path / "other"}), 2):
        assert make_judge(**changes)(prompts) == replies_to(prompts)
        assert len(endpoint.requests) == 2 * count
    again(["a ", "A", "a", "b"])
    assert endpoint.asked()["a "] == endpoint.asked()["A"] == 1 and len(endpoint.requests) == 10


def test_fields_of_a_cache_entry(endpoint, make_judge, tmp_path):
    make_judge()(["a"])
    (entry,) = read_entries(tmp_path / "cache")
    settings = {"temperature": 0, "seed": 0, "max_tokens": MAX_TOKENS}
    assert entry == {
        "key": {"kind": "chat completions", "model": "a-model", "settings": settings, "prompt": "a"},
        "reply": "reply to a", "date": date.today().isoformat(), "finish_reason": "stop", "served_model": "served",
        "prompt_tokens": 10, "completion_tokens": 4, "sampled": False, "endpoint": endpoint.host,
    }  # fmt: skip


def test_damaged_entries_are_asked_again(endpoint, make_judge, tmp_path):
    prompts, cache = list("abcdefgh"), tmp_path / "cache"
    make_judge()(prompts)
    paths = {json.loads(path.read_text())["key"]["prompt"]: path for path in cache.iterdir()}
    complete = json.loads(paths["e"].read_text())
    damaged = {
        "a": b"", "b": paths["b"].read_bytes()[:-9], "c": b"[1, 2]", "d": b"\xff\xfe\x00",
        "e": json.dumps(complete | {"reply": 3}).encode(), "f": json.dumps({"key": complete["key"]}).encode(),
        "g": json.dumps(complete).encode(),  # of another prompt
    }  # fmt: skip
    for prompt, content in damaged.items():
        paths[prompt].write_bytes(content)
    assert make_judge()(prompts) == make_judge()(prompts) == replies_to(prompts)
    assert endpoint.asked() == {prompt: 2 if prompt in damaged else 1 for prompt in prompts}


def test_judges_at_the_same_time_share_a_cache(endpoint, make_judge, tmp_path):
    prompts, results = [str(i) for i in range(30)], []
    runs = [threading.Thread(target=lambda: results.append(make_judge()(prompts))) for _ in range(3)]
    for run in runs:
        run.start()
    for run in runs:
        run.join(30)
    assert results == [replies_to(prompts)] * 3
    assert sorted(entry["key"]["prompt"] for entry in read_entries(tmp_path / "cache")) == sorted(prompts)


ASK = """
import sys
from minigpt3d.evaluation.judges import EndpointJudge

url, cache_dir, *prompts = sys.argv[1:]
EndpointJudge("a-model", url, cache_dir, concurrency=2)(prompts)
"""


def test_killed_run_resumes_without_asking_twice(endpoint, make_judge, tmp_path):
    prompts, arrived = [str(i) for i in range(12)], threading.Semaphore(0)

    def seven_then_silence(request, nth):
        if len(endpoint.requests) > 7:
            arrived.release()
            endpoint.over.wait()
        return completion(f"reply to {request.prompt}")

    endpoint.answer = seven_then_silence
    run = subprocess.Popen([sys.executable, "-c", ASK, endpoint.url, str(tmp_path / "cache"), *prompts])
    # Both threads have sent new requests, so their replies are written.
    came = arrived.acquire(timeout=60) and arrived.acquire(timeout=60)
    run.send_signal(signal.SIGKILL)
    assert came and run.wait(10) == -signal.SIGKILL
    in_flight = {request.prompt for request in endpoint.requests[7:]}
    assert len(endpoint.requests) == 9 and len(read_entries(tmp_path / "cache")) == 7

    del endpoint.answer
    judge = make_judge()
    assert judge(prompts) == replies_to(prompts)
    assert endpoint.asked() == {prompt: 2 if prompt in in_flight else 1 for prompt in prompts}
    assert judge.sum_up()["replies"] == 12


# ---- Servers that are busy, broken or silent ------------------------------------------------------------------------


def test_retry_after_is_respected(endpoint, make_judge):
    endpoint.answer = lambda request, nth: (
        refusal(429, "slow down")._replace(headers={"Retry-After": "1"}) if nth == 1 else completion("at last")
    )
    assert make_judge()(["a"]) == ["at last"]
    first, second = (request.time for request in endpoint.requests)
    assert second - first >= 1


def test_long_retry_after_is_not_waited_for(endpoint, make_judge):
    endpoint.answer = lambda request, nth: refusal(429, "daily limit")._replace(headers={"Retry-After": "7200"})
    with pytest.raises(JudgeError, match=r"HTTP 429 .*daily limit.*Retry-After 7200"):
        make_judge()(["a"])
    assert len(endpoint.requests) == 1


def test_waits_double(endpoint, make_judge, monkeypatch):
    set_waits(monkeypatch, 0.01, 0.08)
    endpoint.answer = lambda request, nth: refusal(500, "oops")
    with pytest.raises(JudgeError):
        make_judge()(["a"])
    times = [request.time for request in endpoint.requests]
    waits = [after - before for before, after in zip(times[:-1], times[1:], strict=True)]
    assert len(waits) == ATTEMPTS - 1
    assert all(wait >= 0.75 * min(0.01 * 2**i, 0.08) for i, wait in enumerate(waits))  # a quarter may be jitter


@pytest.mark.parametrize(
    "trouble",
    [
        *(pytest.param(refusal(status, "oops"), id=f"{status}") for status in (408, 409, 429, 500, 502, 503, 529)),
        pytest.param(Answer(b"<h1>oops</h1>", 500), id="500 as HTML"),
        pytest.param(Answer(b"<html>hi</html>", headers={"Content-Type": "text/html"}), id="HTML"),
        pytest.param(Answer(b'{"choices": [{"mess'), id="half of JSON"),
        pytest.param(Answer(b'{"choices": [{"mess', missing=100), id="cut connection"),
        pytest.param(Answer(b"zzz", headers={"Content-Encoding": "gzip"}), id="no gzip"),
        pytest.param(Answer(b""), id="nothing"),
        *(
            pytest.param(Answer(content), id=content.decode())
            for content in (
                b"null", b"3", b"[1, 2]", b'{"hello": 1}', b'{"choices": null}', b'{"choices": "no"}',
                b'{"choices": [3]}', b'{"choices": [{"message": null}]}', b'{"choices": [{"message": {"content": 3}}]}',
                b'{"choices": [{"message": {"content": "x"}}], "usage": {"prompt_tokens": "x"}}',
                b'{"choices": [{"message": {"content": "x"}}], "usage": 3}', b'{"error": {"message": "overloaded"}}',
            )
        ),
    ],
)  # fmt: skip
def test_temporary_errors_are_retried(endpoint, make_judge, trouble):
    endpoint.answer = lambda request, nth: trouble if nth < 3 else completion("at last")
    judge = make_judge()
    assert judge(["a"]) == ["at last"]
    assert len(endpoint.requests) == 3
    assert (judge.sum_up()["replies"], judge.sum_up()["prompt_tokens"]) == (1, 10)


def test_silent_server_is_retried(endpoint, make_judge):
    endpoint.answer = lambda request, nth: endpoint.over.wait() if nth == 1 else completion("at last")
    begin = time.monotonic()
    with pytest.warns(UserWarning, match=rf"0.3 s.* {ATTEMPTS} times"):
        assert make_judge(timeout=0.3)(["a"]) == ["at last"]
    assert 0.3 <= endpoint.requests[1].time - begin < 5


def test_single_failure_ends_the_run_after_all_others(endpoint, make_judge, tmp_path):
    prompts = list("abcde")
    endpoint.answer = lambda request, nth: (
        refusal(500, "cannot do a") if request.prompt == "a" else completion(f"reply to {request.prompt}")
    )
    judge = make_judge(concurrency=1)
    with pytest.raises(JudgeError) as caught:
        judge(prompts)
    facts = [endpoint.url, "1 of 5 prompts", "HTTP 500", "cannot do a", f"{ATTEMPTS} attempts", "4 of 5 replies"]
    assert [fact for fact in [*facts, str(tmp_path / "cache")] if fact not in str(caught.value)] == []
    assert endpoint.asked() == {"a": ATTEMPTS, "b": 1, "c": 1, "d": 1, "e": 1}
    del endpoint.answer
    assert judge(prompts) == replies_to(prompts)
    assert endpoint.asked() == {"a": ATTEMPTS + 1, "b": 1, "c": 1, "d": 1, "e": 1}
    assert judge.sum_up()["replies"] == 5


def test_failures_between_replies_do_not_end_the_run(endpoint, make_judge):
    endpoint.answer = lambda request, nth: refusal(500, "oops") if request.prompt in "ace" else completion()
    with pytest.raises(JudgeError, match="3 of 9 prompts.* 6 of 9 replies"):
        make_judge(concurrency=1)(list("abcdefghi"))


@pytest.mark.parametrize(("concurrency", "in_vain"), [(1, 3), (5, 5)])
def test_broken_server_ends_the_run(endpoint, make_judge, concurrency, in_vain):
    def slow_page(request, nth):
        time.sleep(0.01)  # so that the main thread can stop the others before their next prompt fails
        return Answer(b"<html>no API here</html>")

    endpoint.answer = slow_page
    with (
        pytest.warns(UserWarning, match=f"no API here.* {ATTEMPTS} times") as warned,
        pytest.raises(JudgeError, match=rf"{in_vain} of 40 .*no API here.* 0 of 40 replies"),
    ):
        make_judge(concurrency=concurrency)([str(i) for i in range(40)])
    # Each thread may have begun one more prompt.
    assert in_vain <= len(endpoint.asked()) <= in_vain + concurrency
    assert len(warned) == 1, [str(warning.message) for warning in warned]


def test_no_server_at_all(endpoint, make_judge):
    endpoint.server.shutdown()
    endpoint.server.server_close()
    url = endpoint.url.replace("127", "me:my-password@127") + "?token=my-token"
    judge = make_judge(url=url)
    with pytest.raises(JudgeError, match="Connection refused") as caught:
        judge(["a"])
    assert endpoint.url in f"{caught.value}" and "1 of 1 prompts" in f"{caught.value}"
    assert "my-" not in "".join(traceback.format_exception(caught.value))


# ---- Servers that refuse --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "others", "fix"),
    [
        (400, {"code": "context_length_exceeded"}, r"\{'temperature': 0, 'seed': 0, 'max_tokens': 256\}"),
        (401, {}, "OPENAI_API_KEY"),
        (402, {}, "account"),
        (403, {}, "OPENAI_API_KEY"),
        (404, {}, "model.*URL.*/v1"),
        (429, {"code": "insufficient_quota"}, "account"),
    ],
)
def test_a_refusal_ends_the_run_at_once(endpoint, make_judge, tmp_path, status, others, fix):
    endpoint.answer = lambda request, nth: (
        completion("kept") if request.prompt == "a" else refusal(status, f"I do not like {KEY} for a-model", **others)
    )
    with pytest.raises(JudgeError, match=fix) as caught:
        make_judge(concurrency=1)(list("abcdefgh"))
    message = str(caught.value)
    assert endpoint.url in message and "'a-model'" in message and f"HTTP {status}" in message
    assert "I do not like *** for a-model" in message and "1 of 8 replies" in message
    assert endpoint.asked() == {"a": 1, "b": 1}
    assert KEY not in "".join(traceback.format_exception(caught.value))
    assert KEY not in "".join(path.read_text() for path in (tmp_path / "cache").iterdir())


def test_an_echoed_key_is_not_kept(endpoint, make_judge, tmp_path):
    endpoint.answer = lambda request, nth: completion(f"Yes, {KEY}!") | {"model": f"model-of-{KEY}"}
    judge = make_judge()
    assert judge(["a"]) == ["Yes, ***!"]
    assert judge.sum_up()["served_models"] == ["model-of-***"]
    assert KEY not in "".join(path.read_text() for path in (tmp_path / "cache").iterdir())


def refuses(name: str, status: int) -> Answer:
    """In the words of OpenAI or, with 422, of Mistral."""
    if status == 422:
        return Answer(json.dumps({"detail": [{"loc": ["body", name], "type": "extra_forbidden"}]}).encode(), 422)
    message = f"Unsupported parameter: '{name}' is not supported with this model."
    return refusal(400, message + " Use 'max_completion_tokens' instead." if name == "max_tokens" else message)


@pytest.mark.parametrize(
    ("refused", "status", "left"),
    [
        (["seed"], 422, {"temperature": 0, "max_tokens": 256}),
        (["max_tokens"], 400, {"temperature": 0, "seed": 0, "max_completion_tokens": 256}),
        (["max_tokens", "seed"], 400, {"temperature": 0, "max_completion_tokens": 256}),
        (["temperature"], 400, {"seed": 0, "max_tokens": 256}),
    ],
)
def test_refused_settings_are_left_out_or_renamed(endpoint, make_judge, refused, status, left):
    def old_names_only(request, nth):
        found = [name for name in refused if name in request.body]
        return refuses(found[0], status) if found else completion(f"reply to {request.prompt}")

    endpoint.answer = old_names_only
    prompts = [str(i) for i in range(20)]
    judge = make_judge(concurrency=4)
    assert judge(prompts) == replies_to(prompts)
    # Each of four threads is refused at most once per setting; the limit on the reply's length is kept.
    assert len(endpoint.requests) <= 20 + 4 * len(refused)
    assert all({"max_tokens", "max_completion_tokens"} & request.body.keys() for request in endpoint.requests)
    sent = endpoint.requests[-1].body
    assert {name: sent[name] for name in sent.keys() - {"model", "messages"}} == left
    num_requests = len(endpoint.requests)
    judge(["one more"])
    again = make_judge()
    assert again(prompts) == replies_to(prompts) and len(endpoint.requests) == num_requests + 1
    # Replies without temperature 0 would differ in another run; results count them, cached ones too.
    assert again.sum_up()["sampled"] == (20 if "temperature" in refused else 0)


def test_a_refusal_does_not_wait_for_busy_requests(endpoint, make_judge, monkeypatch):
    monkeypatch.setattr(endpoint_module, "GRACE", 0.5)
    three_wait = threading.Barrier(4)

    def one_refuses(request, nth):
        three_wait.wait(10)
        time.sleep(0.2 if request.prompt == "3" else 0)
        return (
            refusal(401, "no")
            if request.prompt == "3"
            else refusal(429, "busy")._replace(headers={"Retry-After": "20"})
        )

    endpoint.answer = one_refuses
    judge, begin = make_judge(concurrency=4), time.monotonic()
    with pytest.raises(JudgeError, match="'a-model'.*HTTP 401"):
        judge([str(i) for i in range(40)])
    assert time.monotonic() - begin < 5
    assert len(endpoint.requests) == 4


def test_replies_in_flight_at_a_refusal_are_kept(endpoint, make_judge, tmp_path):
    refused = threading.Event()

    def one_is_slow(request, nth):
        if request.prompt == "slow":
            refused.wait(10)
            time.sleep(0.2)
            return completion("came late")
        while len(endpoint.requests) < 2:
            time.sleep(0.01)
        refused.set()
        return refusal(401, "no")

    endpoint.answer = one_is_slow
    judge = make_judge(concurrency=2)
    with pytest.raises(JudgeError, match="1 of 4 replies"):
        judge(["slow", "b", "c", "d"])
    assert len(endpoint.requests) == 2
    assert [entry["reply"] for entry in read_entries(tmp_path / "cache")] == ["came late"]


def test_ctrl_c_does_not_wait_for_a_silent_server(endpoint, make_judge, tmp_path, monkeypatch):
    monkeypatch.setattr(endpoint_module, "GRACE", 0.5)

    def interrupt(request, nth):
        if len(endpoint.requests) == 3:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        return completion("kept") if request.prompt == "a" else endpoint.over.wait(20) and completion()

    endpoint.answer = interrupt
    begin = time.monotonic()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore SIGINT
    try:
        with pytest.raises(KeyboardInterrupt):
            make_judge(concurrency=2)(list("abcdef"))
    finally:
        signal.signal(signal.SIGINT, before)
    assert 0.5 <= time.monotonic() - begin < 10
    assert endpoint.asked() == {"a": 1, "b": 1, "c": 1}
    assert [entry["reply"] for entry in read_entries(tmp_path / "cache")] == ["kept"]
    assert [thread for thread in threading.enumerate() if not thread.daemon] == [threading.main_thread()]


# ---- Keys and arguments ---------------------------------------------------------------------------------------------


def test_no_key_is_needed_and_no_other_is_sent(endpoint, make_judge, monkeypatch):
    endpoint.answer = lambda request, nth: refusal(401, "nonetheless: none of your business")
    monkeypatch.delenv("OPENAI_API_KEY")
    monkeypatch.setenv("OPENAI_ADMIN_KEY", KEY)
    with pytest.raises(JudgeError, match="nonetheless: none of .*variable OPENAI_API_KEY"):
        make_judge()(["a"])
    assert KEY not in str(endpoint.requests[0].headers)


@pytest.mark.parametrize("key", [f"{KEY}\nX-Other: 1", f"{KEY}…"])
def test_malformed_key_is_not_shown(make_judge, monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(ValueError, match="variable OPENAI_API_KEY holds no key") as caught:
        make_judge()
    assert KEY not in str(caught.value)


def test_blanks_around_a_key_are_removed(endpoint, make_judge, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", f" {KEY}\n")
    make_judge()(["a"])
    assert endpoint.requests[0].headers["Authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize("url", ["", "localhost:8000/v1", "127.0.0.1:8000", "ftp://x/v1", "http://", "/v1"])
def test_urls_are_checked(make_judge, url):
    with pytest.raises(ValueError, match="`url`.*http://127.0.0.1:8000/v1"):
        make_judge(url=url)


@pytest.mark.parametrize("prompts", ["a text", ["a", None], [["a"]]])
def test_prompts_are_checked(endpoint, make_judge, prompts):
    with pytest.raises(ValueError, match="`prompts`.*list"):
        make_judge()(prompts)
    assert not endpoint.requests


# ---- Local ----------------------------------------------------------------------------------------------------------

TEMPLATE = "{% for message in messages %}<user>{{ message.content }}<end>{% endfor %}<assistant>"
PROMPTS = [
    "Is it a chair?",
    "灯",
    "The answer is: a long one, of many words. Is it right?",
    "x",
    "What is this?",
    "No.",
]
LOCAL_MAX_TOKENS = 12


def greedy(model, tokenizer, prompt: str) -> list[int]:
    """The tokens of the reply, with a complete forward pass per token."""
    ids = tokenizer(f"<user>{prompt}<end><assistant>", return_tensors="pt").input_ids
    start, ends = ids.shape[1], model.generation_config.eos_token_id
    while ids.shape[1] < start + LOCAL_MAX_TOKENS and (ids.shape[1] == start or int(ids[0, -1]) not in ends):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    return ids[0, start:].tolist()


@pytest.fixture(scope="module")
@torch.no_grad()
def chat_model(tmp_path_factory):
    """A folder with a tiny random Llama, and prompt → (greedy reply, whether it is cut, its tokens).

    The model's own generation settings sample and penalize, and a second token ends its replies.
    """
    folder, special = tmp_path_factory.mktemp("judges") / "tiny-llama", ["<end>", "<user>", "<assistant>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(special + alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", chat_template=TEMPLATE)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=256, initializer_range=0.3, bos_token_id=None, eos_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.generation_config = GenerationConfig(eos_token_id=[0], do_sample=True, repetition_penalty=1.9, top_k=3)
    model.generation_config.eos_token_id = ends = [0, greedy(model, tokenizer, PROMPTS[0])[3]]
    model.save_pretrained(folder)
    replies = {prompt: greedy(model, tokenizer, prompt) for prompt in PROMPTS}
    assert replies[PROMPTS[0]][-1] == ends[1]
    return folder, {
        prompt: (tokenizer.decode(ids, skip_special_tokens=True), ids[-1] not in ends, len(ids))
        for prompt, ids in replies.items()
    }


@pytest.mark.parametrize("batch_size", [1, 4])
def test_local_replies_are_greedy_whatever_the_batch(chat_model, tmp_path, batch_size):
    folder, expected = chat_model
    judge = LocalJudge(folder, tmp_path, "cpu", batch_size=batch_size, max_tokens=LOCAL_MAX_TOKENS)
    assert judge(PROMPTS + PROMPTS[:1]) == [expected[prompt][0] for prompt in PROMPTS + PROMPTS[:1]]
    cut = sum(is_cut for _, is_cut, _ in expected.values())
    assert 0 < cut < len(PROMPTS) and len({reply for reply, _, _ in expected.values()}) > 3
    assert judge.name == "tiny-llama"
    assert judge.sum_up() == {
        "replies": len(PROMPTS), "cut": cut, "sampled": 0, "date": date.today().isoformat(), "endpoint": None,
        "served_models": [],
        "prompt_tokens": sum(len(prompt.encode()) + 3 for prompt in PROMPTS),
        "completion_tokens": sum(tokens for _, _, tokens in expected.values()), "cost": None,
    }  # fmt: skip


def test_local_replies_are_kept_as_they_come(chat_model, tmp_path, monkeypatch):
    folder, expected = chat_model
    judge = LocalJudge(folder, tmp_path, "cpu", batch_size=2, max_tokens=LOCAL_MAX_TOKENS)
    generate, batches = judge._generate, []

    def killed_at_the_third(prompts):
        if len(batches) == 2:
            raise KeyboardInterrupt
        batches.append(prompts)
        return generate(prompts)

    monkeypatch.setattr(judge, "_generate", killed_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        judge(PROMPTS)
    again = LocalJudge(folder, tmp_path, "cpu", max_tokens=LOCAL_MAX_TOKENS)
    generate, asked = again._generate, []
    monkeypatch.setattr(again, "_generate", lambda prompts: asked.extend(prompts) or generate(prompts))
    assert again(PROMPTS) == [expected[prompt][0] for prompt in PROMPTS]
    assert sorted([*asked, *batches[0], *batches[1]]) == sorted(PROMPTS)

    def no_weights(*args, **options):
        raise AssertionError("The weights are loaded though there is nothing to ask.")

    monkeypatch.setattr(local.AutoModelForCausalLM, "from_pretrained", no_weights)
    assert LocalJudge(folder, tmp_path, "cpu", max_tokens=LOCAL_MAX_TOKENS)(PROMPTS) == again(PROMPTS)
    with pytest.raises(AssertionError):  # other settings
        LocalJudge(folder, tmp_path, "cpu", max_tokens=LOCAL_MAX_TOKENS - 1)(PROMPTS)
    os.utime(folder / "config.json", ns=(0, 0))
    with pytest.raises(AssertionError):  # another content
        LocalJudge(folder, tmp_path, "cpu", max_tokens=LOCAL_MAX_TOKENS)(PROMPTS)


def test_half_an_emoji_is_asked_of_a_local_judge(chat_model, tmp_path):
    one, other = LocalJudge(chat_model[0], tmp_path, max_tokens=3)(["a \ud83d b", "a ? b"])
    assert one == other


def test_local_model_must_be_a_chat_model(chat_model, tmp_path):
    with pytest.raises(ValueError, match="`model` '.*nothing'.*Hub id.*chat"):
        LocalJudge(tmp_path / "nothing", tmp_path)
    with pytest.raises(ValueError, match="`model` 'gpt-4o'.*`url`.*endpoint"):
        LocalJudge("gpt-4o", tmp_path)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(chat_model[0])
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="base has no chat template"):
        LocalJudge(tmp_path / "base", tmp_path)


def test_a_wrong_judge_is_named_by_its_flag(tmp_path, capsys):
    for judge, flag in ((["nosuch/model"], "--judge"), (["m", "--judge-url", "ftp://x"], "--judge-url")):
        command = ["evaluate", "household", "--out", str(tmp_path / "out"), "--limit", "2", "--judge", *judge]
        assert main(command) == 1
        assert f"{flag} " in capsys.readouterr().err
