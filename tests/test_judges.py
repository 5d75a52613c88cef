"""Judges: a real HTTP server on loopback that misbehaves, and a tiny chat model in this process."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from minigpt3d.evaluation.judges import ATTEMPTS, EndpointJudge, JudgeError, LocalJudge


PROMPTS = [f"Is answer {number} right?" for number in range(6)]
KEY = "sk-not-for-others"


# ---- A server that does as it is told -------------------------------------------------------------------------------


def completion(text: str | None, finish_reason: str = "stop", **others) -> dict:
    message = {"role": "assistant", "content": text}
    usage = {"prompt_tokens": 10, "completion_tokens": 3, "total_tokens": 13}
    choice = {"index": 0, "message": message, "finish_reason": finish_reason}
    return {"id": "x", "object": "chat.completion", "model": "served", "choices": [choice], "usage": usage} | others


class Server(ThreadingHTTPServer):
    """Replies "T#" and the prompt, unless `behave` does something else.

    Attributes:
        behave: (handler, prompt, how often it was asked before) → None to reply as usual, or what to send: a dict or bytes
            with status 200, or (status, headers, dict or bytes). The handler is there for worse.
        requests: (when, prompt, body, headers) in the order of arrival.
        most_at_once: requests that were answered at the same time.
    """

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.behave: Callable = lambda handler, prompt, before: None
        self.requests: list[tuple] = []
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, client_address):
        pass  # a client that has gone

    def asked(self) -> list[str]:
        return [prompt for _, prompt, *_ in self.requests]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body["messages"][0]["content"]
        server = self.server
        with server.lock:
            before = server.asked().count(prompt)
            server.requests.append((time.monotonic(), prompt, body, self.headers))
            server.at_once += 1
            server.most_at_once = max(server.most_at_once, server.at_once)
        try:
            answer = (
                server.behave(self, prompt, before)
                if self.path == "/v1/chat/completions"
                else error(404, "no such path")
            )
            if not self.close_connection or answer is not None:
                self.send(answer if answer is not None else completion(f"T#{prompt}"))
        finally:
            with server.lock:
                server.at_once -= 1

    def send(self, answer):
        status, headers, content = answer if isinstance(answer, tuple) else (200, {}, answer)
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in (
            {"Content-Type": "application/json", "Content-Length": str(len(content))} | headers
        ).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def server():
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(EndpointJudge, "first_wait", 0.01)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


@pytest.fixture
def make_judge(server, tmp_path):
    def make(model="judge", url=server.url, cache_dir=tmp_path / "cache", **options) -> EndpointJudge:
        return EndpointJudge(model, url, cache_dir, **options)

    return make


def error(status: int, message: str, code: str | None = None, **headers) -> tuple:
    return status, headers, {"error": {"message": message, "type": "x", "param": None, "code": code}}


# ---- When all is well -----------------------------------------------------------------------------------------------


def test_replies_come_back_in_the_order_of_the_prompts(server, make_judge):
    def slow_first(handler, prompt, before):
        time.sleep(0.2 if prompt == PROMPTS[0] else 0)

    server.behave = slow_first
    judge = make_judge()
    assert judge(PROMPTS) == [f"T#{prompt}" for prompt in PROMPTS]
    assert sorted(server.asked()) == sorted(PROMPTS)
    when, _, body, headers = server.requests[0]
    assert (body["model"], body["temperature"], body["seed"], body["max_tokens"]) == ("judge", 0, 0, 256)
    assert headers["Authorization"] == f"Bearer {KEY}"
    assert judge.usage == {
        "calls": 6, "cached": 0, "failed": 0, "cut": 0, "prompt_tokens": 60, "completion_tokens": 18, "cost": None,
        "endpoint": "127.0.0.1",
    }  # fmt: skip


def test_nothing_is_asked_twice(server, make_judge, tmp_path):
    first = make_judge()
    assert first([PROMPTS[0], PROMPTS[1], PROMPTS[0]]) == [f"T#{PROMPTS[n]}" for n in (0, 1, 0)]
    assert sorted(server.asked()) == PROMPTS[:2]
    second = make_judge()
    assert second(PROMPTS[:3]) == [f"T#{prompt}" for prompt in PROMPTS[:3]]
    assert sorted(server.asked()) == PROMPTS[:3]
    assert (second.usage["cached"], second.usage["calls"]) == (2, 1)
    make_judge(model="other")(PROMPTS[:1])
    make_judge(max_tokens=7)(PROMPTS[:1])
    assert server.asked().count(PROMPTS[0]) == 3  # another model, another setting: another question
    second(PROMPTS[:4])
    assert (second.usage["cached"], second.usage["calls"]) == (5, 2)  # of both times


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"key": 1}', b"\xff", b'{"key": {}, "reply": 3}'])
def test_a_damaged_file_of_the_cache_is_asked_again(server, make_judge, tmp_path, content):
    make_judge()(PROMPTS[:1])
    (path,) = (tmp_path / "cache").iterdir()
    whole = path.read_bytes()
    path.write_bytes(content)
    assert make_judge()(PROMPTS[:1]) == [f"T#{PROMPTS[0]}"]
    assert len(server.requests) == 2 and path.read_bytes() == whole


def test_cost_and_tokens(server, make_judge):
    judge = make_judge(price=(2.0, 10.0))
    judge(PROMPTS[:4])
    assert judge.usage["cost"] == pytest.approx(4 * (10 * 2 + 3 * 10) / 1e6)
    server.behave = lambda handler, prompt, before: completion("T#", usage=None)
    judge(PROMPTS)
    assert judge.usage["prompt_tokens"] is None and judge.usage["cost"] is None  # from then on nobody knows


def test_concurrency_and_rate_are_kept(server, make_judge):
    server.behave = lambda handler, prompt, before: time.sleep(0.05)
    prompts = [f"{number}" for number in range(9)]
    make_judge(concurrency=3)(prompts)
    assert server.most_at_once == 3
    server.requests.clear()
    make_judge(model="slow", concurrency=8, requests_per_minute=60 / 0.05)(prompts)
    times = [when for when, *_ in server.requests]
    assert (
        times[-1] - times[0] > 0.05 * 8 * 0.9
    )  # each starts 0.05 s after the one before, the way to the server aside


# ---- When it is not -------------------------------------------------------------------------------------------------


def drop(handler):
    handler.close_connection = True


def cut_in_the_middle(handler):
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", "5000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [{"mess')
    handler.close_connection = True


def hang(handler):
    time.sleep(0.5)
    handler.close_connection = True


PASSING = {
    "429": lambda handler: error(429, "slow down"),
    "500": lambda handler: (500, {"Content-Type": "text/html"}, b"<h1>oops</h1>"),
    "503": lambda handler: error(503, "loading the model"),
    "408": lambda handler: error(408, "too late"),
    "html": lambda handler: (200, {"Content-Type": "text/html"}, b"<html>Sign in</html>"),
    "half json": lambda handler: b'{"choices": [{"mess',
    "no body": lambda handler: b"",
    "null": lambda handler: b"null",
    "a list": lambda handler: b"[1, 2]",
    "no choices": lambda handler: {"hello": 1},
    "choices of another kind": lambda handler: {"choices": "no"},
    "tokens of another kind": lambda handler: completion("T#", usage={"prompt_tokens": "many"}),
    "no utf-8": lambda handler: b'{"choices": [{"message": {"content": "\xff"}}]}',
    "an error with status 200": lambda handler: {"error": {"message": "overloaded"}},
    "cut": cut_in_the_middle,
    "dropped": drop,
    "hangs": hang,
}


@pytest.mark.parametrize("how", PASSING)
def test_what_passes_is_tried_again(server, make_judge, how):
    server.behave = lambda handler, prompt, before: PASSING[how](handler) if before < 2 else None
    judge = make_judge(timeout=0.2)
    assert judge(PROMPTS[:2]) == [f"T#{prompt}" for prompt in PROMPTS[:2]]
    assert [server.asked().count(prompt) for prompt in PROMPTS[:2]] == [3, 3]
    assert (judge.usage["calls"], judge.usage["failed"]) == (2, 0)


@pytest.mark.parametrize("in_words", [False, True])
def test_retry_after_is_kept_by_all(server, make_judge, in_words):
    """In seconds, or as a date, which knows whole seconds only."""
    seconds = 2.2 if in_words else 0.4
    told = threading.Event()

    def busy(handler, prompt, before):
        if not told.is_set():
            told.set()
            value = formatdate(time.time() + seconds, usegmt=True) if in_words else str(seconds)
            return error(429, "slow down", **{"Retry-After": value})

    server.behave = busy
    make_judge(concurrency=1)(PROMPTS[:3])
    times = [when for when, *_ in server.requests]
    assert len(times) == 4 and times[1] - times[0] >= (1.1 if in_words else seconds)


def test_a_long_retry_after_is_not_waited_for(server, make_judge):
    server.behave = lambda handler, prompt, before: error(429, "come back tomorrow", **{"Retry-After": "86400"})
    started = time.monotonic()
    with pytest.raises(JudgeError, match="come back tomorrow.*asks to wait 86400 s"):
        make_judge()(PROMPTS)
    assert time.monotonic() - started < 5 and max(map(server.asked().count, PROMPTS)) == 1


def test_waits_grow(server, make_judge, monkeypatch):
    monkeypatch.setattr(EndpointJudge, "first_wait", 0.04)
    server.behave = lambda handler, prompt, before: error(500, "oops") if before < 4 else None
    make_judge()(PROMPTS[:1])
    times = [when for when, *_ in server.requests]
    waits = [after - before for before, after in zip(times, times[1:], strict=False)]
    assert all(wait >= 0.02 * 2**number for number, wait in enumerate(waits)) and len(waits) == 4


@pytest.mark.parametrize(
    "answer, message",
    [
        (error(401, f"Incorrect API key provided: {KEY}"), "OPENAI_API_KEY"),
        (error(403, "no access"), "OPENAI_API_KEY"),
        (error(404, "The model `judge` does not exist"), "model's name, and the URL"),
        (error(429, "You exceeded your quota", "insufficient_quota"), "Top up the account"),
        (error(400, "messages: too long for the context"), "too long for the context"),
    ],
)
def test_a_refusal_ends_the_run_at_once(server, make_judge, tmp_path, answer, message):
    server.behave = lambda handler, prompt, before: answer if prompt != PROMPTS[0] else None
    judge = make_judge(concurrency=1)
    with pytest.raises(JudgeError, match=message) as caught:
        judge(PROMPTS)
    assert len(server.requests) <= 3  # those that were on their way
    told = "".join(map(str, (caught.value, caught.value.__cause__)))
    assert KEY not in told and "1 of 6 replies are kept" in told
    assert all(KEY not in path.read_text() for path in (tmp_path / "cache").iterdir())


def test_settings_that_a_model_refuses_are_left_out_or_renamed(server, make_judge):
    def picky(handler, prompt, before):
        body = server.requests[-1][2]
        if "seed" in body:
            return error(400, "Unknown parameter: 'seed'.")
        if "max_tokens" in body:
            return error(400, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.")

    server.behave = picky
    judge = make_judge(concurrency=1)
    assert judge(PROMPTS) == [f"T#{prompt}" for prompt in PROMPTS]
    last = server.requests[-1][2]
    assert last["max_completion_tokens"] == 256 and not {"seed", "max_tokens"} & last.keys()
    assert len(server.requests) == len(PROMPTS) + 2  # learned once
    server.requests.clear()
    assert make_judge()(PROMPTS) and not server.requests  # the same question, however it had to be put


def test_in_vain(server, make_judge):
    """One prompt that never gets a reply: all others do, and are kept; the same call goes on from there."""
    broken = {PROMPTS[2]}
    server.behave = lambda handler, prompt, before: error(500, "oops") if prompt in broken else None
    judge = make_judge(concurrency=2)
    with pytest.raises(
        JudgeError, match="did not reply to 1 of 6 prompts.*500.*oops.*5 of 6 replies are kept.*run again"
    ):
        judge(PROMPTS)
    assert server.asked().count(PROMPTS[2]) == ATTEMPTS and judge.usage["failed"] == 1
    server.requests.clear()
    broken.clear()
    assert judge(PROMPTS) == [f"T#{prompt}" for prompt in PROMPTS]
    assert server.asked() == [PROMPTS[2]]


def test_a_dead_server_ends_the_run(make_judge):
    judge = make_judge(url="http://127.0.0.1:1/v1", concurrency=2)
    many = [f"prompt {number}" for number in range(200)]
    started = time.monotonic()
    with pytest.raises(JudgeError, match="did not reply.*0 of 200 replies are kept"):
        judge(many)
    assert judge.usage["failed"] == 2 and time.monotonic() - started < 10  # not each of the 200 in vain


@pytest.mark.parametrize("text, reason", [(None, "content_filter"), ("", "stop"), ("T#because it", "length")])
def test_replies_without_a_verdict_are_replies(server, make_judge, text, reason):
    """Metrics count them as unparsed; asking again would give the same."""
    server.behave = lambda handler, prompt, before: completion(text, reason)
    judge = make_judge()
    assert judge(PROMPTS[:2]) == [text, text] and make_judge()(PROMPTS[:2]) == [text, text]
    assert len(server.requests) == 2 and judge.usage["cut"] == (2 if reason == "length" else 0)


def test_no_choices_are_no_reply(server, make_judge):
    server.behave = lambda handler, prompt, before: completion("x", choices=[])
    assert make_judge()(PROMPTS[:1]) == [None]


def test_odd_texts_arrive_as_they_are(server, make_judge):
    prompts = ["Ünïcödé 🪑", "two\nlines and \x00", "half an emoji \ud83e"]
    assert make_judge()(prompts)[:2] == [f"T#{prompt}" for prompt in prompts[:2]]
    assert set(server.asked()) == {*prompts[:2], "half an emoji ?"}


@pytest.mark.parametrize("prompts", ["a text", ["fine", 3], [None]])
def test_prompts_of_another_kind(make_judge, prompts):
    with pytest.raises(ValueError, match="a list of prompts"):
        make_judge()(prompts)


@pytest.mark.parametrize("options", [{"url": "localhost:8000"}, {"url": "ftp://x/v1"}, {"url": "http:///v1"},
                                     {"concurrency": 0}, {"requests_per_minute": 0}])  # fmt: skip
def test_wrong_options(make_judge, options):
    with pytest.raises(ValueError, match="http://127.0.0.1:8000/v1|concurrency must be 1 or more"):
        make_judge(**options)


def test_no_key_is_needed_where_none_is_set(server, make_judge, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    assert make_judge()(PROMPTS[:1]) == [f"T#{PROMPTS[0]}"]


def test_a_password_in_the_url_is_not_shown(server, make_judge):
    server.behave = lambda handler, prompt, before: error(404, "nothing here")
    with pytest.raises(JudgeError) as caught:
        make_judge(url=server.url.replace("//", "//me:secret@"))(PROMPTS[:1])
    assert "secret" not in str(caught.value) and "127.0.0.1" in str(caught.value)


SCRIPT = """
import sys
from minigpt3d.evaluation.judges import EndpointJudge
prompts = [f"prompt {number}" for number in range(40)]
replies = EndpointJudge("judge", sys.argv[1], sys.argv[2], concurrency=4)(prompts)
assert replies == [f"T#{prompt}" for prompt in prompts]
"""


def test_a_killed_run_goes_on(server, tmp_path):
    server.behave = lambda handler, prompt, before: time.sleep(0.05)
    command = [sys.executable, "-c", SCRIPT, server.url, str(tmp_path / "cache")]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while len(list((tmp_path / "cache").glob("*.json"))) < 8:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = {json.loads(path.read_text())["key"]["prompt"] for path in (tmp_path / "cache").glob("*.json")}
    assert 8 <= len(kept) < 40
    server.requests.clear()
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL, timeout=60)
    assert set(server.asked()) == {f"prompt {number}" for number in range(40)} - kept
    assert len(server.requests) == 40 - len(kept)


# ---- A model in this process ----------------------------------------------------------------------------------------

TEMPLATE = "{% for message in messages %}<{{ message.content }}>{% endfor %}{% if add_generation_prompt %}:{% endif %}"


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory) -> Path:
    """A tiny Llama that reads bytes, with a chat template."""
    folder = tmp_path_factory.mktemp("judges") / "tiny-chat"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<pad>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")
    wrapped.chat_template = TEMPLATE
    wrapped.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        eos_token_id=1, pad_token_id=0, max_position_embeddings=512, initializer_range=0.5,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.generation_config.do_sample = True  # a judge must not sample, whatever a model's own settings are
    model.generation_config.temperature = 5.0
    model.generation_config.eos_token_id = [1, *range(200, 216)]  # several, so that some replies end early
    model.save_pretrained(folder)
    return folder


def test_local_judge(chat_model, tmp_path):
    judge = LocalJudge(chat_model, tmp_path / "a", max_tokens=8)
    replies = judge(PROMPTS + PROMPTS[:1])
    assert len(replies) == 7 and replies[6] == replies[0] and len(set(replies)) > 1
    usage = judge.usage
    assert usage["calls"] == 6 and usage["cost"] is None and usage["endpoint"] is None
    assert usage["prompt_tokens"] == sum(len(f"<{prompt}>:") for prompt in PROMPTS)
    assert 0 < usage["completion_tokens"] <= 6 * 8 and judge.name == "tiny-chat"
    again = LocalJudge(chat_model, tmp_path / "a", max_tokens=8)
    assert again(PROMPTS) == replies[:6] and "_model" not in vars(again)  # nothing to ask: no weights are loaded
    alone = LocalJudge(chat_model, tmp_path / "b", batch_size=1, max_tokens=8)
    assert alone(PROMPTS) == replies[:6]
    assert alone.usage == usage  # what is cut and counted is that of each reply, not of its batch


def test_local_replies_end_where_the_model_ends(chat_model, tmp_path):
    """Replies of a batch are of different lengths: a reply ends at its own end, and only one that has none is cut."""
    prompts = [f"{'x' * number} is this right?" for number in range(24)]
    judge = LocalJudge(chat_model, tmp_path, batch_size=24, max_tokens=200)
    judge(prompts)
    entries = [json.loads(path.read_text()) for path in tmp_path.glob("*.json")]
    ended = [entry for entry in entries if entry["finish_reason"] == "stop"]
    assert 1 < len({entry["completion_tokens"] for entry in ended})
    assert judge.usage["cut"] == len(entries) - len(ended)
    assert all(entry["completion_tokens"] == 200 for entry in entries if entry["finish_reason"] == "length")


def test_a_changed_folder_is_another_judge(chat_model, tmp_path):
    import shutil

    folder = tmp_path / "judge"
    shutil.copytree(chat_model, folder)
    LocalJudge(folder, tmp_path / "cache", max_tokens=2)(PROMPTS[:1])
    os.utime(folder / "model.safetensors", (1, 1))
    judge = LocalJudge(folder, tmp_path / "cache", max_tokens=2)
    judge(PROMPTS[:1])
    assert judge.usage["calls"] == 1


def test_a_model_without_a_chat_template_is_told(chat_model, tmp_path):
    import shutil

    folder = tmp_path / "base"
    shutil.copytree(chat_model, folder)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="no chat template.*instruction-tuned"):
        LocalJudge(folder, tmp_path / "cache")


def test_batches_are_kept_as_they_come(chat_model, tmp_path, monkeypatch):
    judge = LocalJudge(chat_model, tmp_path, batch_size=2, max_tokens=2)
    generate, done = judge._generate, []

    def fail_in_the_third(prompts):
        if len(done) == 2:
            raise MemoryError
        done.append(prompts)
        return generate(prompts)

    monkeypatch.setattr(judge, "_generate", fail_in_the_third)
    with pytest.raises(MemoryError):
        judge(PROMPTS)
    again = LocalJudge(chat_model, tmp_path, max_tokens=2)
    again(PROMPTS)
    assert (again.usage["cached"], again.usage["calls"]) == (4, 2)
