"""`minigpt3d serve`: one server with the bundled model, and OpenAI's client."""

import asyncio
import base64
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import bad_readers
import numpy as np
import openai
import pytest
import torch
import uvicorn

from minigpt3d.cli import main as cli
from minigpt3d.cli.serve import Options, bind
from minigpt3d.data.reading import FileReader
from minigpt3d.hub import default_model, load_model
from minigpt3d.pipeline_minigpt3d import PointCloudToTextPipeline
from minigpt3d.point_cloud_minigpt3d import load_orientations, load_point_cloud
from minigpt3d.serving.app import make_app
from minigpt3d.serving.conversation import MOST_CLOUDS, Conversation, Source, make_conversation
from minigpt3d.serving.engine import Engine, Settings
from minigpt3d.serving.generation import Answer, Decoding, answer_batch
from minigpt3d.serving.metrics import Metrics
from minigpt3d.serving.protocol import parse_request
from minigpt3d.serving.serve_options import KEY_VARIABLE


OBJECTS = Path(__file__).parents[2] / "demo" / "objects"
TABLE, CHAIR, CABINET = OBJECTS / "oakTable.ply", OBJECTS / "osakaChair.obj", OBJECTS / "drawersCabinet.npy"
QUESTION, COLOR, CAPTION = "What is this?", "What color is it?", "Caption this 3D model in detail."
WAIT = 60  # seconds, at most


class Running:
    """A server in a thread of this process."""

    def __init__(self, root: Path):
        self.options, self.metrics = Options(root=root, max_requests=8), Metrics()
        model, processor = load_model(default_model(), dtype="auto")
        self.pipeline = PointCloudToTextPipeline(model=model, processor=processor, device="cpu", dtype="auto")
        settings = Settings({}, self.options.limits, max_new_tokens=60, batch_size=4)
        self.engine = Engine(self.pipeline, settings, self.options, self.metrics)
        app = make_app(self.engine, "household", self.options, self.metrics)
        listener = bind("127.0.0.1", 0)
        self.port = listener.getsockname()[1]
        self.server = uvicorn.Server(uvicorn.Config(app, log_level="critical", ws="none"))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [listener]})
        self.thread.start()
        self.client = openai.OpenAI(
            base_url=f"http://127.0.0.1:{self.port}/v1", api_key="unused", max_retries=0, timeout=WAIT
        )
        wait_until(lambda: self.server.started)

    def stop(self):
        self.server.should_exit = True
        self.thread.join(WAIT)

    def ask(self, *messages, **arguments):
        return self.client.chat.completions.create(model="household", messages=list(messages), **arguments)

    def http(self, method: str, path: str, **arguments):
        """A request that OpenAI's client has no function for."""
        return self.client._client.request(method, f"http://127.0.0.1:{self.port}{path}", **arguments)

    def count(self, name: str, **labels) -> float:
        return self.metrics.registry.get_sample_value(f"minigpt3d_{name}", labels) or 0

    def send(self, body: dict) -> socket.socket:
        """A request on a connection of its own."""
        content = json.dumps(body).encode()
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=WAIT)
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
        connection.sendall(f"{head}\r\n\r\n".encode() + content)
        return connection


def wait_until(condition):
    end = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    root = tmp_path_factory.mktemp("root")
    (root / "below").mkdir()
    (root / "below" / "table.ply").write_bytes(TABLE.read_bytes())
    (root / "out.ply").symlink_to(TABLE)
    running = Running(root)
    yield running
    running.stop()
    assert not running.thread.is_alive()


@pytest.fixture(scope="module")
def expected(running):
    """The pipeline's answers: the same code without a server, one at a time."""
    return {
        (path, question): running.pipeline(str(path), prompt=question)[0]["generated_text"]
        for path in (TABLE, CHAIR, CABINET)
        for question in (QUESTION, COLOR, CAPTION)
    }


def data_url(path: Path) -> str:
    return f"data:application/octet-stream;name={path.name};base64,{base64.b64encode(path.read_bytes()).decode()}"


def cloud(url: str, **reading) -> dict:
    return {"type": "point_cloud_url", "point_cloud_url": {"url": url, **reading}}


def user(text: str, *clouds: dict) -> dict:
    return {"role": "user", "content": [*clouds, {"type": "text", "text": text}]}


# ---- Answers --------------------------------------------------------------------------------------------------------


def test_answers_are_those_of_the_pipeline(running, expected):
    answer = running.ask(user(QUESTION, cloud(data_url(TABLE))))
    (choice,) = answer.choices
    assert choice.message.content == expected[TABLE, QUESTION] and "table" in choice.message.content
    assert (choice.finish_reason, choice.message.role, answer.model) == ("stop", "assistant", "household")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens > 8
    assert answer.warnings == []


def test_a_stream_adds_up_to_the_answer(running, expected):
    stream = running.ask(user(CAPTION, cloud(data_url(CABINET))), stream=True, stream_options={"include_usage": True})
    *chunks, last = list(stream)
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(texts) == expected[CABINET, CAPTION] and sum(map(bool, texts)) > 5
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert last.choices == [] and last.usage.completion_tokens > 5
    assert len({chunk.id for chunk in (*chunks, last)}) == 1


def test_a_conversation_goes_on(running):
    messages = [user(QUESTION, cloud(data_url(TABLE)))]
    messages += [running.ask(*messages).choices[0].message, user(COLOR)]
    content = [{"type": "point_cloud", "point_cloud": str(TABLE)}, {"type": "text", "text": QUESTION}]
    chat = [{"role": "user", "content": content}, {"role": "assistant", "content": messages[1].content}]
    (direct,) = running.pipeline([*chat, {"role": "user", "content": COLOR}])
    assert running.ask(*messages).choices[0].message.content == direct["generated_text"]


def test_several_clouds(running):
    content = [{"type": "point_cloud", "point_cloud": str(path)} for path in (TABLE, CABINET)]
    (direct,) = running.pipeline([{"role": "user", "content": [*content, {"type": "text", "text": QUESTION}]}])
    answer = running.ask(user(QUESTION, cloud(data_url(TABLE)), cloud(data_url(CABINET))))
    assert answer.choices[0].message.content == direct["generated_text"]
    one = running.ask(user(QUESTION, cloud(data_url(TABLE))))
    assert answer.usage.prompt_tokens > one.usage.prompt_tokens + 8
    files = [("file", (path.name, path.read_bytes())) for path in (TABLE, CABINET)]
    assert upload(running, files, user(QUESTION)) == direct["generated_text"]


def upload(running, files, *messages) -> str:
    answer = running.client.post(
        "/chat/completions",
        cast_to=openai.types.chat.ChatCompletion,
        body={"request": json.dumps({"messages": list(messages)})},
        files=files,
        options={"headers": {"Content-Type": "multipart/form-data"}},
    )
    return answer.choices[0].message.content


def test_uploads(running, expected):
    """Materials and textures go with their object; messages may say where an object is shown."""
    parts = [CHAIR, CHAIR.with_suffix(".mtl"), OBJECTS / "Wood_013_COLOR.jpg"]
    files = [("file", (path.name, path.read_bytes())) for path in parts]
    assert upload(running, files, user(COLOR)) == expected[CHAIR, COLOR] == "It is brown."
    turns = [user(QUESTION, cloud("attachment:osakaChair.obj")), {"role": "assistant", "content": "A chair."}]
    assert upload(running, files, *turns, user(COLOR)) == "It is brown."
    with pytest.raises(openai.BadRequestError, match="lamp.ply.*osakaChair.obj"):
        upload(running, files, user(COLOR, cloud("attachment:lamp.ply")))
    with pytest.raises(openai.BadRequestError, match="osakaChair.obj.*Rename"):
        upload(running, files[:1] * 2, user(COLOR))
    with pytest.raises(openai.BadRequestError, match="osakaChair.mtl"):
        upload(running, files[1:2], user(COLOR))
    large = cloud(f"data:;name=a.xyz,{'0 0 0%0A' * 200_000}")  # a part of the form may have more than a megabyte
    with pytest.raises(openai.BadRequestError, match="a.xyz"):
        upload(running, files[:1], user(COLOR, large))


def test_requests_that_arrive_together_share_batches_and_keep_their_order(running, expected):
    batches, questions = running.count("batch_size_count"), running.count("batch_size_sum")
    keys = [(path, question) for path, question in expected if path != CHAIR] * 2

    def ask(key):
        path, question = key
        if question == CAPTION:  # streams and whole answers share a batch
            stream = running.ask(user(question, cloud(data_url(path))), stream=True)
            return "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        return running.ask(user(question, cloud(data_url(path)))).choices[0].message.content

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, keys))
    assert answers == [expected[key] for key in keys]
    assert running.count("batch_size_sum") - questions == len(keys)
    assert running.count("batch_size_count") - batches < len(keys)


def test_answers_do_not_depend_on_their_batch(running):
    points = load_point_cloud(TABLE, num_points=running.pipeline.processor.feature_extractor.num_points)
    chat = [{"role": "user", "content": [{"type": "point_cloud"}, {"type": "text", "text": CAPTION}]}]
    table = running.engine.encode(Conversation(chat, [None])), [points]
    nothing = running.engine.encode(Conversation([user("Is it new? Is it old?")], [])), []
    cases = [
        (table, Decoding(60)),
        (table, Decoding(60, temperature=1.2, seed=3)),
        (nothing, Decoding(20, temperature=0.9, top_p=0.8, seed=4)),
        (table, Decoding(4)),
        (table, Decoding(60, stops=("used", "shape"))),
    ]

    def answers(cases):
        answers = [Answer(*question, decoding) for question, decoding in cases]
        answer_batch(running.pipeline, answers, lambda: None)
        return [(answer.text, answer.finish_reason, answer.num_tokens) for answer in answers]

    together = answers(cases)
    assert together == [answer for case in cases for answer in answers([case])]
    assert [reason for _, reason, _ in together][3:] == ["length", "stop"] and len(
        {text for text, *_ in together}
    ) == 5


def test_samples_have_the_probabilities_of_the_model(running):
    scores = torch.tensor([2.0, 1.0, 0.0, -1.0])
    answer = Answer([], [], Decoding(1, temperature=2.0, top_p=0.85, seed=0))
    answer.begin(running.pipeline.processor.tokenizer, [], set())
    counts = torch.bincount(torch.stack([answer.choose(scores).argmax() for _ in range(1500)]), minlength=4)
    kept = (scores / 2).softmax(0) * torch.tensor([1, 1, 1, 0])  # the first two are 0.73
    assert counts[3] == 0 and torch.allclose(counts / 1500, kept / kept.sum(), atol=0.05)


def test_sampling_length_and_stops(running):
    question = user(CAPTION, cloud(data_url(TABLE)))
    settings = {"temperature": 1.5, "seed": 7, "max_tokens": 12}
    first, again = (running.ask(question, **settings).choices[0].message.content for _ in range(2))
    others = {running.ask(question, **settings | {"seed": seed}).choices[0].message.content for seed in range(3)}
    greedy = running.ask(question, temperature=0).choices[0].message.content
    assert first == again and len(others) > 1
    short = running.ask(question, max_tokens=3)
    assert short.choices[0].finish_reason == "length" and short.usage.completion_tokens == 3
    assert greedy.startswith(short.choices[0].message.content)
    stopped = running.ask(question, stop=["table", "chair"]).choices[0]
    assert stopped.message.content == greedy.partition("table")[0].strip() and stopped.finish_reason == "stop"


def test_reading_options_and_warnings(running, tmp_path):
    points = "\n".join(f"{x} {y} {z}" for x in range(5) for y in range(5) for z in range(9))
    url = f"data:;name=bare.xyz,{points}".replace(" ", "%20").replace("\n", "%0A")
    answer = running.ask(user(COLOR, cloud(url, missing_color="white", up_axis="z", clean="none")))
    assert any("bare.xyz" in text and "white" in text for text in answer.warnings)
    assert "no message" in running.ask(user(QUESTION)).warnings[0]


def test_clouds_are_read_as_the_request_says(running, tmp_path):
    path = tmp_path / "bare.xyz"
    path.write_text("\n".join(f"{x} {y} {z}" for x in range(5) for y in range(5) for z in range(9)))

    def read(**reading) -> np.ndarray:
        (points,), warnings = asyncio.run(running.engine.read([Source(path, "my.xyz", "param", reading)]))
        assert all(text.startswith("my.xyz: ") for text in warnings)
        return points

    for reading in (
        {"up_axis": "z"},
        {"up_axis": "x", "missing_color": "white"},
        {"up_axis": "auto", "clean": "none"},
    ):
        orientations, _ = load_orientations(path, **running.pipeline.reading_arguments(**reading))
        np.testing.assert_array_equal(read(**reading), running.pipeline.choose_orientation(orientations).cloud)
    assert len({read(up_axis=axis).tobytes() for axis in "xyz"}) > 1


def test_files_below_root(running, expected):
    for url in ("below/table.ply", "./below/../below/table.ply", f"file://{running.options.root}/below/table.ply"):
        assert running.ask(user(QUESTION, cloud(url))).choices[0].message.content == expected[TABLE, QUESTION]


@pytest.mark.parametrize(
    "url",
    ["../x.ply", "/etc/passwd", "file:///etc/passwd", "file://host/x.ply", "out.ply", "below", "nope.ply", "a%00", "~/x.ply",
     "below/" + "x" * 5000, "below/\0"],
)  # fmt: skip
def test_nothing_above_root_is_read(running, url):
    with pytest.raises((openai.NotFoundError, openai.BadRequestError)) as caught:
        running.ask(user(QUESTION, cloud(url)))
    assert caught.value.body["param"] == "messages[0].content[0].point_cloud_url"
    assert str(running.options.root) not in caught.value.body["message"]


def test_without_root_no_file_is_read(running, monkeypatch):
    monkeypatch.setattr(running.options, "root", None)
    with pytest.raises(openai.BadRequestError, match="data:"):
        running.ask(user(QUESTION, cloud("below/table.ply")))


# ---- Errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("https://127.0.0.1/a.ply", ["https://127.0.0.1/a.ply", "public", "Send the file"]),
        ("https://169.254.169.254/latest", ["public"]),
        ("http://example.com/a.ply", ["http", "https"]),
        ("ftp://example.com/a.ply", ["ftp", "https"]),
        ("https:a.ply", ["https:a.ply", "data:"]),
        ("data:;base64,####", ["base64"]),
        ("data:;base64", ["comma"]),
        ("data:,", ["empty"]),
        ("data:;name=a.ply,ply%0Anonsense", ["a.ply"]),
        ("data:;name=..,1", ["name"]),
        ("data:;name=a.dwg,1", ["a.dwg"]),
        ("data:,hello", ["text"]),
        ("attachment:a.ply", ["a.ply", "none"]),
    ],
)
def test_clouds_that_cannot_be_read(running, url, words):
    with pytest.raises(openai.BadRequestError) as caught:
        running.ask(user(QUESTION, cloud(url)))
    message = caught.value.body["message"]
    assert [word for word in words if word not in message] == [] and "/tmp" not in message
    assert caught.value.type == "invalid_request_error" and "MINIGPT3D" not in message


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": ""}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [cloud("x", paint="red")]}]}, "messages[0].content[0].point_cloud_url.paint"),
        ({"messages": [{"role": "user", "content": [cloud("x", up_axis="w")]}]}, "messages[0].content[0].point_cloud_url.up_axis"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "messages[1].role"),
        ({"messages": [{"role": "tool", "content": "a"}, {"role": "user", "content": "b"}]}, "messages"),
        ({"messages": [{"role": "assistant", "content": [cloud("x")]}, user("b")]}, "messages[0].content[0].point_cloud_url"),
        ({"messages": [{"role": "user", "content": "a", "tool_calls": [1]}]}, "messages[0].tool_calls"),
        ({"messages": [{"role": "user", "content": "word " * 10_000}]}, "messages"),
        ({"messages": [{"role": "user", "content": [cloud("x")] * 100}]}, None),
        ({"temperature": 3}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": 1.5}, "max_completion_tokens"),
        ({"seed": 2**70}, "seed"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": [""]}, None),
        ({"n": 2}, "n"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"logprobs": True}, "logprobs"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"paint": "red"}, "paint"),
        ({"stream": "yes"}, "stream"),
    ],
)  # fmt: skip
def test_requests_that_cannot_be_answered(running, change, param):
    body = {"messages": [user(QUESTION)]} | change
    with pytest.raises(openai.APIStatusError) as caught:
        running.client.post("/chat/completions", cast_to=object, body=body)
    assert caught.value.status_code in (400, 404)
    error = caught.value.body
    assert error["type"] == "invalid_request_error" and len(error["message"]) < 500
    assert param is None or error["param"] == param, error


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"stop": 5}, ["text or a list", "got 5"]),
        ({"messages": [{"role": "user", "content": None}]}, ["text or a list of parts", "got null"]),
        ({"messages": [user("a", {"type": "image_url", "image_url": {"url": "x"}})]}, ["'point_cloud_url'", '"image_url"']),
        ({"messages": [user("a", cloud("data:;base64,"))]}, ["empty"]),
        ({"messages": [{"role": "tool", "content": "a"}, user("b")]}, ["template"]),
    ],
)  # fmt: skip
def test_messages_of_errors_say_what_is_expected(running, change, words):
    with pytest.raises(openai.BadRequestError) as caught:
        running.client.post("/chat/completions", cast_to=object, body={"messages": [user(QUESTION)]} | change)
    message = caught.value.body["message"]
    assert [word for word in words if word not in message] == [] and "Error" not in message, message


def test_a_developer_is_a_system_and_blanks_are_no_question(running, expected):
    system = [running.engine.encode(make_conversation(parse_request(json.dumps({"messages": [
        {"role": role, "content": "Be brief."}, user(QUESTION)]}).encode()), {}, None, None)) for role in ("system", "developer")]  # fmt: skip
    assert system[0] == system[1]
    answer = running.ask(user("  ", cloud(data_url(TABLE))))
    assert (
        answer.choices[0].message.content == running.ask(user("", cloud(data_url(TABLE)))).choices[0].message.content
    )
    body = b"\xef\xbb\xbf" + json.dumps({"messages": [user(QUESTION)]}).encode()
    headers = {"Content-Type": "application/json"}
    assert running.http("POST", "/v1/chat/completions", content=body, headers=headers).status_code == 200
    headers |= {"Content-Encoding": "gzip"}
    assert running.http("POST", "/v1/chat/completions", content=body, headers=headers).status_code == 415
    assert running.http("HEAD", "/health").status_code == 200


def test_neutral_arguments_are_accepted(running):
    neutral = {"n": 1, "user": "me", "tools": [], "logprobs": False, "presence_penalty": 0, "metadata": {"a": "b"}}
    assert running.ask(user(QUESTION), **neutral).choices[0].finish_reason in ("stop", "length")


@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [
        (b"{", "application/json", 400),
        (b"\xff", "application/json", 400),
        (b"[" * 100_000, "application/json", 400),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "application/json", 400),
        (b"{}", "text/plain", 415),
        (b"", "", 415),
        (b"--a\r\n", "multipart/form-data", 400),
        (b"--a\r\nContent-Disposition: form-data; name=x\r\n\r\ny\r\n--a--", "multipart/form-data; boundary=a", 400),
        (b"--a--", "multipart/form-data; boundary=a", 400),
        (b"nonsense", "multipart/form-data; boundary=a", 400),
        (b"--a\r\n\xff: x\r\n\r\ny\r\n--a--\r\n", "multipart/form-data; boundary=a", 400),
        (b"--a\r\nContent-Disposition: form-data\r\n\r\ny\r\n--a--\r\n", "multipart/form-data; boundary=a", 400),
    ],
)
def test_bodies_that_are_no_requests(running, content, kind, status):
    answer = running.http("POST", "/v1/chat/completions", content=content, headers={"Content-Type": kind})
    assert answer.status_code == status and answer.json()["error"]["type"] == "invalid_request_error"


def test_other_models_and_routes(running):
    assert [model.id for model in running.client.models.list()] == ["household"]
    assert running.client.models.retrieve("household").id == "household"
    with pytest.raises(openai.NotFoundError, match="household"):
        running.client.models.retrieve("gpt/x")
    with pytest.raises(openai.NotFoundError, match="household"):
        running.client.chat.completions.create(model="gpt", messages=[user(QUESTION)])
    with pytest.raises(openai.NotFoundError, match="embeddings"):
        running.client.embeddings.create(model="household", input="x")
    health = running.http("GET", "/health")
    assert (health.status_code, health.json()["status"]) == (200, "ok")
    assert "minigpt3d_batch_size_bucket" in running.http("GET", "/metrics").text


# ---- Limits ---------------------------------------------------------------------------------------------------------


def test_the_key(running, monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, "secret")
    with pytest.raises(openai.AuthenticationError) as caught:
        running.ask(user(QUESTION))
    assert caught.value.code == "invalid_api_key" and "secret" not in str(caught.value)
    with pytest.raises(openai.AuthenticationError):
        running.client.models.list()
    assert running.http("GET", "/health").status_code == 200
    assert running.client.with_options(api_key="secret").models.list().data[0].id == "household"


def test_the_size_of_a_request(running, monkeypatch):
    monkeypatch.setattr(running.options, "max_body", 0.01)
    question = {"messages": [user(QUESTION, cloud(data_url(TABLE)))]}
    with pytest.raises(openai.APIStatusError) as caught:
        running.client.post("/chat/completions", cast_to=object, body=question)
    assert caught.value.status_code == 413
    parts = iter([json.dumps(question).encode()])  # without a length
    answer = running.http("POST", "/v1/chat/completions", content=parts, headers={"Content-Type": "application/json"})
    assert answer.status_code == 413 and "10,000" in answer.json()["error"]["message"]


@pytest.fixture
def sleeper(running, monkeypatch):
    """One process reads, and sleeps over files that are called so."""
    with FileReader(bad_readers.load_orientations) as reader:
        monkeypatch.setattr(running.engine, "_reader", reader)
        yield cloud(data_url(TABLE).replace(TABLE.name, "sleeps.ply"))
        wait_until(lambda: running.count("requests_in_progress") == 0)


def test_clouds_that_nobody_waits_for_are_not_read(running, sleeper, expected):
    """The client left, or another cloud of the request cannot be read."""
    start = time.monotonic()
    connection = running.send({"messages": [user(QUESTION, sleeper)]})
    wait_until(lambda: running.engine._reader._idle.empty())
    time.sleep(0.3)  # it reads
    connection.close()
    assert running.ask(user(QUESTION, cloud(data_url(TABLE)))).choices[0].message.content == expected[TABLE, QUESTION]
    with pytest.raises(openai.BadRequestError, match="bad.ply"):
        running.ask(user(QUESTION, cloud("data:;name=bad.ply,ply%0Anonsense"), *[sleeper] * 3))
    assert running.ask(user(QUESTION, cloud(data_url(TABLE)))).choices[0].message.content == expected[TABLE, QUESTION]
    assert time.monotonic() - start < 40  # a file may take 60


def test_the_number_of_clouds(running):
    few = "0 0 0%0A1 0 0%0A0 1 0%0A0 0 1"
    with pytest.raises(openai.BadRequestError, match=f"{MOST_CLOUDS + 1} clouds.*{MOST_CLOUDS}"):
        running.ask(user(QUESTION, *[cloud(f"data:;name=a.xyz,{few}")] * (MOST_CLOUDS + 1)))


@pytest.mark.parametrize(
    ("host", "status"),
    [("localhost", 200), ("127.0.0.1:8000", 200), ("[::1]:8000", 200), ("LOCALHOST", 200), ("evil.example:8000", 421), ("[", 421), ("\xff", 421)],
)  # fmt: skip
def test_a_page_of_another_host_gets_no_answer(running, monkeypatch, host, status):
    """Its name may lead to this machine (DNS rebinding), but it does not know a key."""
    assert running.http("GET", "/v1/models", headers={"Host": host.encode("latin-1")}).status_code == status
    monkeypatch.setenv(KEY_VARIABLE, "secret")
    headers = {"Host": host.encode("latin-1"), "Authorization": "Bearer secret"}
    assert running.http("GET", "/v1/models", headers=headers).status_code == 200


@pytest.fixture
def slow(running, monkeypatch):
    """The model does not answer before its client leaves; the answers that it was asked for."""
    asked = []

    def wait_for_departure(answers, on_step):
        asked.extend(answers)
        wait_until(lambda: all(answer.is_over for answer in answers))

    monkeypatch.setattr(running.engine.batcher, "_answer", wait_for_departure)
    yield asked
    wait_until(lambda: running.count("requests_in_progress") == 0)


@pytest.mark.parametrize("body", [b"{", b"--a\r\nContent-Disposition: form-data; name=request\r\n\r\n{"])
def test_a_client_that_leaves_while_it_sends(running, body, caplog):
    left = running.count("requests_total", status="499")
    kind = "application/json" if body == b"{" else "multipart/form-data; boundary=a"
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\nContent-Length: 1000\r\n\r\n"
    with socket.create_connection(("127.0.0.1", running.port), timeout=WAIT) as connection:
        connection.sendall(head.encode() + body)
        wait_until(lambda: running.count("requests_in_progress"))
    wait_until(lambda: running.count("requests_total", status="499") == left + 1)
    assert not [record for record in caplog.records if record.exc_info]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_answer(running, slow, stream):
    left = running.count("requests_total", status="499") + running.count("requests_total", status="200")
    connection = running.send({"messages": [user(QUESTION)], "stream": stream})
    wait_until(lambda: slow)
    connection.close()
    wait_until(lambda: slow[0].is_cancelled)
    wait_until(lambda: running.count("requests_in_progress") == 0)
    gone = running.count("requests_total", status="499") + running.count("requests_total", status="200")
    assert gone == left + 1


def test_a_client_that_leaves_the_queue_is_not_answered(running, slow):
    first = running.send({"messages": [user(QUESTION)]})
    wait_until(lambda: slow)
    second = running.send({"messages": [user(QUESTION)]})
    wait_until(lambda: running.engine.batcher.num_waiting == 1)
    second.close()
    wait_until(lambda: running.engine.batcher.num_waiting == 0)
    first.close()
    wait_until(lambda: running.count("requests_in_progress") == 0)
    assert len(slow) == 1


def test_the_number_of_requests(running, slow, monkeypatch):
    monkeypatch.setattr(running.options, "max_requests", 1)
    connection = running.send({"messages": [user(QUESTION)]})
    wait_until(lambda: slow)
    with pytest.raises(openai.RateLimitError) as caught:
        running.ask(user(QUESTION))
    assert caught.value.response.headers["retry-after"] == "1"
    connection.close()


@pytest.mark.parametrize("stream", [False, True])
def test_the_time_of_a_request(running, slow, monkeypatch, stream):
    monkeypatch.setattr(running.options, "timeout", 0.3)
    with pytest.raises(openai.APIError, match="0.3 seconds") as caught:
        list(running.ask(user(QUESTION), stream=stream))
    assert caught.value.body["code"] == "timeout" and slow[0].is_cancelled
    assert stream or caught.value.status_code == 504


@pytest.mark.parametrize("stream", [False, True])
def test_a_model_that_fails(running, monkeypatch, stream):
    def fail(answers, on_step):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(running.engine.batcher, "_answer", fail)
    with pytest.raises(openai.APIError, match="out of memory"):
        list(running.ask(user(QUESTION), stream=stream))


def test_a_batch_that_fails_is_answered_one_by_one(running, expected, monkeypatch):
    answer_batch, sizes = running.engine.batcher._answer, []

    def fail_together(answers, on_step):
        sizes.append(len(answers))
        if len(answers) > 1:
            raise RuntimeError("out of memory")
        answer_batch(answers, on_step)

    monkeypatch.setattr(running.engine.batcher, "_answer", fail_together)
    monkeypatch.setattr(running.engine.batcher, "_wait", 2)
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: running.ask(user(QUESTION, cloud("below/table.ply"))), range(4)))
    assert {answer.choices[0].message.content for answer in answers} == {expected[TABLE, QUESTION]}
    assert max(sizes) > 1 and sizes.count(1) >= 4


# ---- Command --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--root", "nope"], ["--root", "nope"]), (["--port", "70000"], ["--port", "70000"]), (["--host", "256.1.1.1"], ["--host"])],
)  # fmt: skip
def test_a_server_that_cannot_start(arguments, words, capsys, monkeypatch):
    monkeypatch.setattr("minigpt3d.hub.load_model", lambda *_, **__: pytest.fail("before the model is loaded"))
    assert cli.main(["serve", *arguments]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert [word for word in words if word not in line] == []


def test_a_port_that_is_taken(running, capsys):
    assert cli.main(["serve", "--port", str(running.port)]) == 1
    assert str(running.port) in capsys.readouterr().err
