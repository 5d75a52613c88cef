"""`minigpt3d evaluate`: objects of every suite, interrupted runs, scores, and the command line."""

import hashlib
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import bad_readers
import numpy as np
import pytest
from accelerate import debug_launcher
from accelerate.state import AcceleratorState
from ways_in import make_cloud, make_processor, make_seeing_model

from minigpt3d.cli import main as minigpt3d_cli
from minigpt3d.evaluation.answers import read_answers
from minigpt3d.evaluation.ask import generate, run_batches
from minigpt3d.evaluation.conditions import read_clouds
from minigpt3d.evaluation.evaluate_options import EvaluateOptions
from minigpt3d.evaluation.judges import Judge
from minigpt3d.evaluation.metrics.table import METRICS
from minigpt3d.evaluation.objects import (
    EvalObject,
    check_clouds,
    read_household,
    read_modelnet40,
    read_objaverse,
    read_own,
)
from minigpt3d.evaluation.plan import EvaluationPlan, Job, shuffle
from minigpt3d.evaluation.results import Score, ScoredAnswer
from minigpt3d.evaluation.run import evaluate
from minigpt3d.evaluation.run_folder import Lines, RunFolder, append_lines
from minigpt3d.evaluation.score import compare_conditions, score_answers
from minigpt3d.evaluation.statistics import bootstrap, holm, mcnemar
from minigpt3d.evaluation.suites import DECODING, GREEDY, MODELNET40_CLASSES, SUITES, Question
from minigpt3d.evaluation.vocabulary.colors import COLORS, main_color
from minigpt3d.evaluation.vocabulary.kinds import KINDS
from minigpt3d.hub import save_pretrained
from minigpt3d.messages import MultilineError
from minigpt3d.modeling_minigpt3d import MiniGPT3DForConditionalGeneration
from minigpt3d.processing_minigpt3d import MiniGPT3DProcessor


SHIPPED = Path(__file__).parents[2] / "checkpoints" / "household"


@pytest.fixture(autouse=True)
def short_answers(monkeypatch):
    """A random model seldom ends an answer."""
    monkeypatch.setitem(SUITES, "own", replace(SUITES["own"], max_new_tokens=24))


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """A folder with a tiny random model."""
    output_dir = tmp_path_factory.mktemp("evaluate") / "model"
    save_pretrained(make_seeing_model(), make_processor(), output_dir)
    return output_dir


@pytest.fixture(scope="module")
def own_objects(tmp_path_factory) -> Path:
    """Seven boxes with labels, captions and colors, in a .jsonl file."""
    folder = tmp_path_factory.mktemp("own")
    lines = []
    for seed in range(7):
        cloud = make_cloud(seed)
        np.save(folder / f"box{seed}.npy", cloud)
        line = {"file": f"box{seed}.npy", "label": ("box", "crate")[seed % 2], "caption": f"A box, number {seed}."}
        lines.append(json.dumps(line | {"color": main_color(cloud[:, 3:])}))
    (folder / "objects.jsonl").write_text("\n".join(lines))
    return folder / "objects.jsonl"


def run_command(*arguments: object) -> int:
    return minigpt3d_cli.main(["evaluate", *map(str, arguments)])


# ---- Objects --------------------------------------------------------------------------------------------------------


def write_modelnet40(path: Path, protocol: int = 2) -> tuple[list, list]:
    """A file like PointLLM's: clouds with normals, labels as arrays of one."""
    rng = np.random.default_rng(0)
    clouds = [rng.normal(size=(64, 6)).astype(np.float32) for _ in range(3)]
    labels = [np.array([label], dtype=np.int32) for label in (7, 0, 39)]
    path.write_bytes(pickle.dumps([clouds, labels], protocol=protocol))
    return clouds, labels


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_modelnet40_file(tmp_path, protocol):
    clouds, _ = write_modelnet40(tmp_path / "test.dat", protocol)
    objects = read_modelnet40(tmp_path / "test.dat")
    assert [item.label for item in objects] == ["car", "airplane", "xbox"]
    assert [item.object_id for item in objects] == ["0000", "0001", "0002"]
    cloud = objects[1].read()
    assert cloud.shape == (64, 6) and not cloud[:, 3:].any()  # black
    xyz = clouds[1][:, :3] - clouds[1][:, :3].mean(0)
    np.testing.assert_allclose(cloud[:, :3], xyz / np.linalg.norm(xyz, axis=1).max(), atol=1e-6)


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize(
    "wrap", [lambda evil: evil, lambda evil: [[evil], [1]], lambda evil: np.array([evil], dtype=object)]
)
def test_modelnet40_runs_nothing(tmp_path, wrap):
    trap = tmp_path / "trap"
    (tmp_path / "evil.dat").write_bytes(pickle.dumps(wrap(Hostile(str(trap)))))
    with pytest.raises(ValueError, match="evil.dat.*(mkdir|'O8')"):
        read_modelnet40(tmp_path / "evil.dat")
    assert not trap.exists()


# Pickles with which numpy's functions would read or write memory outside their arrays.
FORGED_ARRAYS = """
import pickle, sys
from pathlib import Path
import numpy as np
from minigpt3d.evaluation.objects import read_modelnet40

_reconstruct, scalar = np.zeros(1).__reduce__()[0], np.float32(1).__reduce__()[0]
frombuffer = np.zeros(1).__reduce_ex__(5)[0]

class Call:
    def __init__(self, *parts):
        self.parts = parts
    def __reduce__(self):
        return self.parts

def dtype(code, *state):
    return Call(np.dtype, (code, False, True), (3, "|", *state)) if state else Call(np.dtype, (code, False, True))

def array(dtype):
    return Call(_reconstruct, (np.ndarray, (0,), b"b"), (1, (1,), dtype, False, b"AAAAAAAA"))

no_objects = dtype("O8", None, None, None, -1, -1, 0)
for forged in (
    array(no_objects), array(dtype("O8")), Call(scalar, (no_objects, b"AAAAAAAA")),
    Call(np.ndarray, ((1,), dtype("O8"), b"AAAAAAAA")),
    array(dtype("V8", None, ("f",), {"f": (dtype("O8"), 0)}, 8, 1, 0)),
    array(dtype("V8", None, ("f",), {"f": (dtype("i8"), 1 << 40)}, 8, 1, 0)),
    array(dtype("i8", None, ("f",), {"f": (dtype("O8"), 0)}, 8, 1, 0)),
    Call(scalar, (dtype("V8", None, None, None, 1 << 40, 1, 0), b"AAAAAAAA")),
    Call(np.dtype, ("f4", False, True), (None, {"dtype": 3})),
    Call(_reconstruct, (np.ndarray, (0,), b"b"), (1, (1 << 40,), dtype("f4"), False, b"AAAA")),
    Call(frombuffer, (24 << 30, np.dtype("f4"), (1 << 30, 6), "C")),
):
    for content in ([[np.zeros((4, 6), np.float32)], [forged]], [[forged], [1]]):
        Path(sys.argv[1]).write_bytes(pickle.dumps(content, protocol=2))
        try:
            read_modelnet40(Path(sys.argv[1]))
        except ValueError as error:
            print("refused:", error)
"""


def test_modelnet40_accesses_no_other_memory(tmp_path):
    done = subprocess.run([sys.executable, "-c", FORGED_ARRAYS, tmp_path / "x.dat"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len([line for line in done.stdout.splitlines() if line.startswith("refused: `data`")]) == 22


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"<html>",
        pickle.dumps([[], []]),
        pickle.dumps([[np.zeros((4, 6), np.float32)], [40]]),
        pickle.dumps([[np.zeros((4, 6), np.float32)], [3.0]]),
        pickle.dumps([[np.zeros((4, 6), np.float32)], ["3"]]),
        pickle.dumps([[np.zeros((4, 2), np.float32)], [0]]),
        pickle.dumps([[np.zeros((4, 6), np.float32)], [0, 1]]),
        pickle.dumps({"a": 1}),
        pickle.dumps(3),
    ],
)
def test_modelnet40_errors_name_the_expected_file(tmp_path, content):
    (tmp_path / "bad.dat").write_bytes(content)
    with pytest.raises(ValueError, match="`data` .*bad.dat"):
        read_modelnet40(tmp_path / "bad.dat")
    with pytest.raises(ValueError, match="cannot be read"):
        read_modelnet40(tmp_path / "absent.dat")


def test_modelnet40_has_40_classes():
    assert len(set(MODELNET40_CLASSES)) == 40 and sorted(MODELNET40_CLASSES) == list(MODELNET40_CLASSES)


def test_objaverse_files(tmp_path):
    for object_id in "ba":
        np.save(tmp_path / f"{object_id}_8192.npy", make_cloud(0))
    turns = [{"from": "human", "value": "<point>\nWhat is this?"}]
    records = [{"object_id": i, "conversations": [*turns, {"from": "gpt", "value": f"Object {i}."}]} for i in "ba"]
    (tmp_path / "gt.json").write_text(json.dumps(records))
    objects = read_objaverse(tmp_path, [tmp_path / "gt.json"])
    assert [(item.object_id, item.caption) for item in objects] == [("b", "Object b."), ("a", "Object a.")]
    np.testing.assert_array_equal(objects[0].read(), make_cloud(0))
    (tmp_path / "a_8192.npy").unlink()
    with pytest.raises(ValueError, match="a_8192.npy .1 of 2 missing"):
        read_objaverse(tmp_path, [tmp_path / "gt.json"])


def test_household_objects_are_the_held_out_ones():
    objects = read_household()
    assert len(objects) == 100 == len({item.object_id for item in objects})
    assert {item.label for item in objects} <= set(KINDS)
    for item in objects[::10]:
        cloud = item.read()
        assert cloud.shape == (8192, 6) and cloud.dtype == np.float32
        assert np.linalg.norm(cloud[:, :3], axis=1).max() == pytest.approx(1, abs=1e-4)
        assert item.color == main_color(cloud[:, 3:])
        assert item.color in item.caption


def test_own_objects(own_objects):
    objects = read_own(str(own_objects))
    assert [item.object_id for item in objects] == [f"box{i}" for i in range(7)]
    assert objects[1].label == "crate" and objects[1].caption == "A box, number 1." and objects[1].color in COLORS
    assert objects[0].read().shape == (8192, 6)


def test_own_objects_in_a_table(own_objects):
    """With a byte order mark, Windows line ends, blanks and capitals."""
    table = own_objects.with_suffix(".csv")
    table.write_bytes(
        "\ufefffile, label ,color\r\nbox0.npy,Big  box ,Red\r\nbox1.npy,crate,\r\nbox2.npy, big box,red\r\n".encode()
    )
    objects = [(item.object_id, item.label, item.color) for item in read_own(str(table))]
    assert objects == [("box0", "Big box", "red"), ("box1", "crate", None), ("box2", "Big box", "red")]


def test_texts_may_contain_other_line_breaks(own_objects):
    """Such as U+2028, which does not end a line of JSON."""
    lines = own_objects.with_name("breaks.jsonl")
    lines.write_text('{"file": "box0.npy", "caption": "A box.\u2028Red."}\r\n\n', encoding="utf-8", newline="")
    assert [item.caption for item in read_own(str(lines))] == ["A box.\u2028Red."]


def test_unused_and_repeated_columns(own_objects):
    table = own_objects.with_name("colour.csv")
    table.write_text("file,label,colour\nbox0.npy,box,red\n")
    with pytest.warns(UserWarning, match="colour.csv: .*not used: colour"):
        read_own(str(table))
    table.write_text("file,label,,\nbox0.npy,box,,\n")  # a spreadsheet keeps the commas of cleared columns
    assert [item.label for item in read_own(str(table))] == ["box"]
    table.write_text("file, label,label\nbox0.npy,box,chair\n")
    with pytest.raises(ValueError, match="column 'label'"):
        read_own(str(table))
    table.write_text("file;label\nbox0.npy;box\n")
    with pytest.raises(ValueError, match="column file.*commas.*file;label"):
        read_own(str(table))
    table.write_bytes("file,label\nbox0.npy,Möbel\n".encode("latin-1"))
    with pytest.raises(ValueError, match="UTF-8"):
        read_own(str(table))


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"file": "box0.npy"}', "line 1: .*'file'.*'label'"),
        ('{"label": "x"}', "line 1: expected 'file'"),
        ('{"file": "no.npy", "label": "x"}', "line 1: no such file"),
        ('{"file": "box0.npy", "label": 3}', "line 1: 'label'.* 3"),
        ('{"file": "box0.npy", "color": "mauve"}', "'color'.*black.*'mauve'"),
        ("[1]", "line 1: expected 'file'"),
        ("{", "line 1: not JSON"),
        ('{"file": "box0.npy", "label": "a"}\n{"file": "box0.npy", "label": "b"}', "'box0'.* 2 times"),
        ("", "bad.jsonl.*no rows"),
    ],
)
def test_malformed_lines_of_own_objects(own_objects, line, message):
    bad = own_objects.with_name("bad.jsonl")
    bad.write_text(line)
    with pytest.raises(ValueError, match=message):
        read_own(str(bad))


def test_own_files_that_end_their_reader_are_listed(own_objects, monkeypatch):
    monkeypatch.setattr("minigpt3d.evaluation.objects.load_point_cloud", bad_readers.load_point_cloud)
    (own_objects.with_name("aborts.npy")).write_bytes(own_objects.with_name("box0.npy").read_bytes())
    table = own_objects.with_name("crash.csv")
    table.write_text("file,label\nbox0.npy,box\naborts.npy,box\n")
    with pytest.raises(MultilineError, match="1 of 2 objects .*\n.*aborts: .*SIGABRT"):
        check_clouds(read_own(str(table)))
    table.write_text("file,label\nbox0.npy,box\n")
    assert len(check_clouds(read_own(str(table)))) == 16


def test_ids_are_printable(own_objects):
    (own_objects.with_name("a\x1b.npy")).write_bytes(own_objects.with_name("box0.npy").read_bytes())
    table = own_objects.with_name("escape.jsonl")
    table.write_text(json.dumps({"file": "a\x1b.npy", "label": "box"}))
    assert [item.object_id for item in read_own(str(table))] == ["a\\x1b"]


def test_packed_own_objects(own_objects, tmp_path):
    out = tmp_path / "packed"
    assert minigpt3d_cli.main(["pack", "--from", str(own_objects), "--out", str(out), "--num-workers", "1"]) == 0
    objects = {item.object_id: item for item in read_own(str(out))}
    assert sorted(objects) == [f"box{i}" for i in range(7)]
    assert objects["box3"].caption == "A box, number 3." and objects["box3"].read().shape == (8192, 6)


def test_answers_of_pointllm(tmp_path):
    results = [{"object_id": 3, "ground_truth": 1, "model_output": "A cup.", "label_name": "cup"}]
    (tmp_path / "pointllm.json").write_text(json.dumps({"prompt": "What is this?", "results": results}))
    (answer,) = read_answers(tmp_path / "pointllm.json")
    assert answer == {
        "object_id": 3, "answer": "A cup.", "question": None, "condition": None, "prompt": "What is this?"
    }  # fmt: skip
    (tmp_path / "bad.jsonl").write_text('{"object_id": "a", "text": "?"}')
    with pytest.raises(ValueError, match="line 1: expected 'object_id' and a text 'answer'"):
        read_answers(tmp_path / "bad.jsonl")


# ---- Suites ---------------------------------------------------------------------------------------------------------


def test_prompts_and_decoding_of_the_paper():
    modelnet, objaverse, caption = SUITES["modelnet40"], SUITES["objaverse"], SUITES["caption"]
    assert [q.prompt for q in modelnet.questions] == ["What is this?", "This is an object of "]
    assert [q.prompt for q in objaverse.questions] == ["What is this?", "This is an object of "]
    assert [q.prompt for q in caption.questions] == ["Caption this 3D model in detail."]
    assert (modelnet.max_new_tokens, objaverse.max_new_tokens, caption.max_new_tokens) == (100, 150, 150)
    assert DECODING == {"num_beams": 2, "do_sample": True, "top_p": 0.7, "temperature": 0.2, "min_new_tokens": 10}
    for suite in SUITES.values():
        for question in suite.questions:
            assert set(question.metrics) <= set(METRICS)


# ---- Answers --------------------------------------------------------------------------------------------------------


@pytest.fixture
def jobs() -> list[Job]:
    objects = tuple(EvalObject(f"o{seed}", lambda seed=seed: make_cloud(seed)) for seed in range(5))
    return [
        Job(Question(name, name, ()), condition, objects) for name in ("q", "r") for condition in ("seeing", "blind")
    ]


def note(log: list):
    """Work that logs what it is asked and returns it as the answer."""

    def work(job, objects, clouds, seed):
        log.extend((job.question.name, job.condition, item.object_id) for item in objects)
        return [{"answer": f"{seed}"} for _ in objects]

    return work


def test_every_object_is_asked_once(jobs, tmp_path):
    log = []
    run_batches(jobs, Lines(tmp_path), 2, 0, note(log), "")
    assert len(log) == len(set(log)) == 20
    assert {(line["question"], line["condition"], line["object_id"]) for line in Lines(tmp_path).read()} == set(log)
    run_batches(jobs, Lines(tmp_path), 2, 0, note(log), "")
    assert len(log) == 20  # nothing is left to ask


def test_only_a_torn_line_is_asked_again(jobs, tmp_path):
    run_batches(jobs, Lines(tmp_path), 2, 0, note([]), "")
    whole = {json.dumps(line) for line in without_seconds(Lines(tmp_path).read())}
    part = tmp_path / "part-0.jsonl"
    part.write_bytes(part.read_bytes()[:-7])
    log = []
    run_batches(jobs, Lines(tmp_path), 2, 0, note(log), "")
    assert len(log) <= 2  # the batch of the torn line
    lines = list(without_seconds(Lines(tmp_path).read()))
    assert len(lines) == 20 and {json.dumps(line) for line in lines} == whole


def test_an_incomplete_batch_writes_missing_answers_only(jobs, tmp_path):
    """The complete batch is asked again, so that sampling repeats; existing answers are not written again."""
    run_batches(jobs, Lines(tmp_path), 2, 0, note([]), "")
    whole = list(without_seconds(Lines(tmp_path).read()))
    (tmp_path / "part-0.jsonl").unlink()
    append_lines(
        Lines(tmp_path).open(0), [line | {"seconds": 0.0} for line in whole[:6]]
    )  # two batches of two and one, and half a batch
    run_batches(jobs, Lines(tmp_path), 2, 0, note([]), "")
    lines = list(without_seconds(Lines(tmp_path).read()))
    assert len(lines) == 20 and sorted(map(json.dumps, lines)) == sorted(map(json.dumps, whole))


def test_every_batch_has_its_own_seed(jobs, tmp_path):
    def run(folder, seed):
        seeds = {}

        def work(job, objects, clouds, batch_seed):
            seeds[job.question.name, job.condition, objects[0].object_id] = batch_seed
            return [{"answer": ""} for _ in objects]

        run_batches(jobs, Lines(folder), 2, seed, work, "")
        return seeds

    first, again, other = run(tmp_path / "a", 0), run(tmp_path / "b", 0), run(tmp_path / "c", 1)
    assert first == again and len(set(first.values())) == len(first) == 12
    assert not set(first.values()) & set(other.values())


def without_seconds(lines):
    for line in lines:
        line.pop("seconds")
        yield line


def test_a_damaged_line_is_named(tmp_path):
    append_lines(Lines(tmp_path).open(0), [{"question": "what", "condition": "seeing", "object_id": "a"}])
    with open(tmp_path / "part-0.jsonl", "ab") as file:
        file.write(b'{"n":\n')
    with pytest.raises(ValueError, match="part-0.jsonl, line 2: not JSON"):
        list(Lines(tmp_path).read())


def test_files_of_more_processes_are_read(tmp_path):
    for rank in range(3):
        line = {"question": "what", "condition": "seeing", "object_id": f"object {rank}"}
        append_lines(Lines(tmp_path).open(rank), [line])
    assert [line["object_id"] for line in Lines(tmp_path).read()] == ["object 0", "object 1", "object 2"]


def test_results_are_in_the_order_of_the_suite(tmp_path):
    objects = [EvalObject("a", None), EvalObject("b", None)]
    lines = [
        {"question": question, "condition": condition, "object_id": object_id}
        for question, condition, object_id in
        [("color", "seeing", "b"), ("what", "jitter-1", "a"), ("what", "blind", "b"), ("what", "seeing", "b"), ("what", "seeing", "a")]
    ]  # fmt: skip
    append_lines(Lines(tmp_path).open(0), lines)
    complete, incomplete = make_plan("household", objects).arrange(Lines(tmp_path).read(), objects)
    assert list(complete) == [("what", "seeing"), ("what", "blind")]
    assert incomplete == {("what", "jitter-1"): 1, ("color", "seeing"): 1}
    assert list(complete["what", "seeing"]) == list(complete["what", "blind"]) == ["a", "b"]


def make_plan(suite: str, objects: list[EvalObject], judge=None, **fields) -> EvaluationPlan:
    """An evaluation of all metrics of a suite."""
    options = EvaluateOptions(suite, Path("nowhere"), seed=fields.pop("seed", 0))
    return EvaluationPlan(
        options, SUITES[suite], {item.object_id: item for item in objects}, list(METRICS), judge, **fields
    )


def score_texts(
    plan: EvaluationPlan, question: Question, answers: dict[str, str]
) -> tuple[dict[str, Score], dict[str, dict[str, float]]]:
    """Scores by metric, and the objects' scores, of answers about objects as they are."""
    rows = [ScoredAnswer(i, question.name, "", "seeing", text, None, None, None) for i, text in answers.items()]
    scores = {score.metric: score for score in score_answers(plan, question, rows)}
    return scores, {row.object_id: row.scores for row in rows}


def test_sampling_depends_on_the_seed(tiny_processor):
    model, clouds = make_seeing_model(), [make_cloud(1), make_cloud(2)]
    decoding = DECODING | {"max_new_tokens": 12, "temperature": 5.0, "top_p": 1.0}
    first, again, other = (
        generate(model, tiny_processor, clouds, "What is this?", "default", decoding, seed) for seed in (1, 1, 2)
    )
    assert first == again != other


def test_min_new_tokens_allows_the_end_mark(monkeypatch):
    """`###` is an end token in the model's own settings, and one token of its tokenizer."""
    model, processor = (
        cls.from_pretrained(SHIPPED) for cls in (MiniGPT3DForConditionalGeneration, MiniGPT3DProcessor)
    )
    end = processor.tokenizer.convert_tokens_to_ids("###")
    assert end in model.generation_config.eos_token_id and DECODING["min_new_tokens"] == 10
    clouds = [item.read() for item in read_household()[:6]]
    lines = generate(model.eval(), processor, clouds, "What is this?", "default", DECODING | {"max_new_tokens": 40}, 0)
    assert min(line["tokens"] for line in lines) < 10 and not any(line["cut"] for line in lines)
    assert all(re.fullmatch("This is an? [a-z ]+\\.", line["answer"]) for line in lines), lines
    # An answer that ends exactly at the limit is complete; with a limit of one token less it is cut.
    longest = max(line["tokens"] for line in lines)
    for limit in (longest, longest - 1):
        again = generate(model, processor, clouds, "What is this?", "default", GREEDY | {"max_new_tokens": limit}, 0)
        assert max(line["tokens"] for line in again) == limit
        assert any(line["cut"] for line in again) == (limit < longest)


@pytest.mark.parametrize("template", ["default", "benchmark"])
def test_blind_clouds_reach_the_model_as_zeros(tiny_processor, template, monkeypatch):
    model, seen = make_seeing_model(), []
    forward = model.model.point_encoder.forward

    def see(clouds, *args, **kwargs):
        seen.append(clouds.clone())
        return forward(clouds, *args, **kwargs)

    monkeypatch.setattr(model.model.point_encoder, "forward", see)
    clouds = [make_cloud(1), np.zeros((128, 6), np.float32)]
    lines = generate(model, tiny_processor, clouds, "What?", template, GREEDY | {"max_new_tokens": 3}, 0)
    assert len(lines) == 2 and seen[0][0].any() and not seen[0][1].any()
    assert all(line["tokens"] <= 3 for line in lines)


def test_one_object_has_no_shuffled_control(own_objects, model_dir, tmp_path):
    arguments = ["own", "--data", own_objects, "--model", model_dir, "--greedy", "--device", "cpu", "--limit", 1]
    assert run_command(*arguments, "--out", tmp_path / "out") == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {entry["condition"] for entry in results["scores"]} == {"seeing", "blind", "no_color"}
    assert results["tests"] and all(test["p"] == 1 for test in results["tests"])


def test_no_precision_without_details():
    """Without any detail there is no ratio; an unreadable verdict counts as wrong."""
    objects = [EvalObject(name, None, caption="A red chair.") for name in "ab"]
    question = Question("caption", "", ("precision", "hallucination"))

    def scored(*replies):
        def judge(prompts):
            return replies

        judge.name = "judge"
        scores, by_object = score_texts(
            make_plan("caption", objects, judge), question, dict.fromkeys("ab", "A chair.")
        )
        return {name: score.value for name, score in scores.items()}, by_object

    assert scored("0#0#none", "0#0#none") == ({"hallucination": 0}, {name: {"hallucination": 0} for name in "ab"})
    values, scores = scored("3#1#a red chair", "0#0#none")
    assert values == {"precision": 0.75, "hallucination": 0.5} and scores["b"] == {"hallucination": 0}
    values, scores = scored("3#0#a red chair", "I cannot say.")
    assert values == {"precision": 0.75, "hallucination": 0.5} and scores["b"] == {"precision": 0, "hallucination": 1}


def test_interval_of_precision_is_over_all_details():
    """Objects are weighted by their number of details, which a mean over objects is not."""
    right, wrong = np.array([9, 1, 2, 0, 1]), np.array([1, 3, 0, 1, 0])
    objects = [EvalObject(str(i), None, caption="A red chair.") for i in range(5)]

    def judge(prompts):
        return [f"{a}#{b}#so" for a, b in zip(right, wrong, strict=True)]

    judge.name = "judge"
    answers = {str(i): f"Answer {i}." for i in range(5)}
    plan = make_plan("caption", objects, judge, seed=3)
    precision = score_texts(plan, Question("caption", "", ("precision",)), answers)[0]["precision"]
    assert precision.value == pytest.approx(13 / 18)
    assert (precision.low, precision.high) == bootstrap((right, right + wrong), seed=3)


def test_p_is_corrected_for_the_number_of_tests():
    """Four tests of one run: p is Holm's, also in words."""
    rng = np.random.default_rng(4)
    values = {
        ("what", condition): [
            ScoredAnswer(
                str(i),
                "what",
                "",
                condition,
                "",
                None,
                None,
                None,
                {"closed_set_accuracy": float(a), "color_accuracy": float(b)},
            )
            for i, (a, b) in enumerate(zip(rng.random(60) < share, rng.random(60) < share + 0.1, strict=True))
        ]
        for condition, share in (("seeing", 0.6), ("blind", 0.4), ("no_color", 0.35))
    }
    tests = compare_conditions(values, ["closed_set_accuracy", "color_accuracy"])

    def hits(condition, metric):
        return [row.scores[metric] for row in values["what", condition]]

    raw = [mcnemar(hits("seeing", test.metric), hits(test.b, test.metric)) for test in tests]
    assert len(tests) == 4 and min(raw) < 0.05 < 4 * max(raw)
    assert [test.p for test in tests] == pytest.approx(holm(raw)) != pytest.approx(raw)
    assert all(f"p = {test.p:.3f}" in test.words or test.p < 0.001 for test in tests)


def test_the_judge_gets_the_users_prompt():
    """One question for all three scores of details, with the prompt whose hash is in the results."""
    asked = []

    def judge(prompts):
        asked.extend(prompts)
        return ["1#0#so"] * len(prompts)

    judge.name = "judge"
    objects, prompts = (
        [EvalObject("a", None, caption="A red chair.")],
        {"hallucination": "Mine: {answer} | {reference}"},
    )
    plan = make_plan("caption", objects, judge, judge_prompts=prompts)
    question = Question("caption", "", ("correctness", "hallucination", "precision"))
    scores, _ = score_texts(plan, question, {"a": "A chair."})
    assert asked == ["Mine: A chair. | A red chair."]
    assert list(scores) == ["correctness", "hallucination", "precision"]


def test_shuffling_assigns_another_object():
    objects = [EvalObject(str(i), None, label="x") for i in range(9)]
    others = shuffle(objects, "label", 0)
    assert all(one.object_id != other.object_id for one, other in zip(objects, others, strict=True))
    assert len({other.object_id for other in others}) == 9


@pytest.mark.parametrize(
    "answer, kind",
    [("This is a light brown table.", "table"), ("It is a light blue sofa.", "sofa"), ("A pine wood table.", "table"),
     ("A rose-colored chair with four legs.", "chair"), ("An oak wardrobe", "cabinet"), ("A child's bed", "bed"),
     ("A chandelier.", "lamp"), ("Three couches", "sofa"), ("A washing machine", "appliance"), ("A mattress", "bed")]
)  # fmt: skip
def test_kinds_in_answers(answer, kind):
    """Words such as "light" and "pine", which are kinds in catalog names only, do not count."""
    plan = make_plan("household", [EvalObject("a", None, label=kind)])
    scores, _ = score_texts(plan, Question("what", "", ("closed_set_accuracy",)), {"a": answer})
    assert scores["closed_set_accuracy"].value == 1


# ---- Complete runs --------------------------------------------------------------------------------------------------


def test_a_run_from_start_to_end(own_objects, model_dir, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["own", "--data", own_objects, "--model", model_dir, "--out", out, "--greedy", "--device", "cpu"]
    assert run_command(*arguments, "--batch-size", 4) == 0
    printed = capsys.readouterr()
    (left_out,) = [line for line in printed.err.splitlines() if "not scored" in line]
    for word in ("open_vocabulary_accuracy", "caption_score", "s_bert", "--simcse", "--judge", "--s-bert"):
        assert left_out.count(word) == 1, word
    results = json.loads((out / "results.json").read_text())
    assert results["dataset"]["objects"] == 7 and results["model"]["name"] == "model"
    assert str(tmp_path) not in (out / "results.json").read_text()
    found = {(e["question"], e["condition"], e["metric"]) for e in results["scores"]}
    for condition in ("seeing", "blind", "no_color", "shuffled"):
        assert {("what", condition, m) for m in ("closed_set_accuracy", "color_accuracy", "likelihood_top_1")} <= found
        assert (
            "what",
            condition,
            "likelihood_top_5",
        ) not in found  # with two classes, both are always among the first five
        assert ("caption", condition, "rouge_l") in found
    for entry in results["scores"]:
        assert entry["low"] <= entry["value"] <= entry["high"] or entry["metric"] == "precision"
    rows = [json.loads(line) for line in (out / "objects.jsonl").read_text().splitlines()]
    assert len(rows) == 7 * 3 * 4
    for name in ("report.md", "report.html"):
        assert "With fewer than 20 objects" in (out / name).read_text()
    # The second run only scores.
    before = sorted(Lines(out / "answers").read(), key=json.dumps)
    assert run_command(*arguments, "--batch-size", 4) == 0
    assert sorted(Lines(out / "answers").read(), key=json.dumps) == before
    assert json.loads((out / "results.json").read_text())["scores"] == results["scores"]
    # More or fewer metrics: earlier scores are kept.
    assert run_command(*arguments, "--batch-size", 4, "--metrics", "rouge_l") == 0
    assert json.loads((out / "results.json").read_text())["scores"] == results["scores"]
    # Other settings are refused.
    assert run_command(*arguments, "--batch-size", 4, "--seed", 1) == 1
    assert re.search("seed 0,.* 1", capsys.readouterr().err)


@pytest.mark.slow
def test_a_killed_run_resumes(own_objects, model_dir, tmp_path, monkeypatch):
    """After two SIGKILLs, the answers equal those of an uninterrupted run."""
    monkeypatch.undo()  # other processes are killed: all have the suite's own limit
    command = [sys.executable, "-m", "minigpt3d.cli", "evaluate", "own", "--data", own_objects, "--model", model_dir]
    command += ["--device", "cpu", "--batch-size", "1", "--metrics", "closed_set_accuracy", "--limit", "3"]
    assert run_command(*command[4:], "--out", tmp_path / "whole") == 0
    out = tmp_path / "killed"
    for num_answers in (3, 9):
        process = subprocess.Popen(
            [*map(str, command), "--out", out], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        until = time.time() + 60
        while (
            len(list(Lines(out / "answers").read())) < num_answers and process.poll() is None and time.time() < until
        ):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert run_command(*command[4:], "--out", out) == 0
    whole, killed = (
        sorted(map(json.dumps, without_seconds(Lines(folder / "answers").read())))
        for folder in (tmp_path / "whole", out)
    )
    assert killed == whole and len(whole) == len(set(whole))


def evaluate_in_processes(own_objects, model_dir, out):
    AcceleratorState._reset_state(True)  # of the parent process
    assert run_command("own", "--data", own_objects, "--model", model_dir, "--out", out, "--batch-size", 2,
                       "--metrics", "closed_set_accuracy", "--device", "cpu") == 0  # fmt: skip


@pytest.mark.slow
def test_two_processes_give_the_answers_of_one(own_objects, model_dir, tmp_path):
    evaluate_in_processes(own_objects, model_dir, tmp_path / "one")
    debug_launcher(evaluate_in_processes, (own_objects, model_dir, tmp_path / "two"), num_processes=2)
    one, two = (
        sorted(map(json.dumps, without_seconds(Lines(tmp_path / name / "answers").read()))) for name in ("one", "two")
    )
    assert one == two
    assert len(list((tmp_path / "two" / "answers").glob("part-*"))) == 2
    assert all((tmp_path / "two" / "answers" / f"part-{rank}.jsonl").stat().st_size for rank in (0, 1))
    results = [json.loads((tmp_path / name / "results.json").read_text())["scores"] for name in ("one", "two")]
    assert results[0] == results[1]


def test_answers_of_two_settings_are_not_mixed(own_objects, model_dir, tmp_path, capsys):
    data, model, out = tmp_path / "data", tmp_path / "model", tmp_path / "out"
    shutil.copytree(own_objects.parent, data)
    shutil.copytree(model_dir, model)
    arguments = ["own", "--data", data / "objects.jsonl", "--model", model, "--greedy", "--device", "cpu", "--out", out,
                 "--metrics", "closed_set_accuracy", "--limit", 2]  # fmt: skip
    assert run_command(*arguments) == 0
    (part,) = (out / "answers").glob("*")
    before, (template,) = part.read_bytes(), model.glob("chat_template.jinja")

    def refuse(name, *change):
        assert run_command(*arguments, *change) == 1
        assert f"answers with {name} " in capsys.readouterr().err
        assert part.read_bytes() == before

    refuse("dtype", "--dtype", "bfloat16")
    refuse("batch_size", "--batch-size", 3)
    refuse("seed", "--seed", 1)
    text = template.read_text()
    template.write_text(text.replace("[INST]", "[ASK]"))
    refuse("prompts")
    template.write_text(text)
    np.save(data / "box1.npy", make_cloud(99))  # not the first cloud
    refuse("dataset")
    for folder in ("answers", "likelihood"):
        shutil.rmtree(out / folder)
    (out / "settings.json.tmp").write_text("{")
    assert run_command(*arguments, "--seed", 1) == 0  # allowed without answers


def test_two_runs_in_one_folder(own_objects, model_dir, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["own", "--data", own_objects, "--model", model_dir, "--greedy", "--device", "cpu", "--out", out]
    with RunFolder(out).locked():
        assert run_command(*arguments) == 1
    error = capsys.readouterr().err
    assert f"--out {out}" in error and "another process" in error
    assert not (out / "answers").exists()


@pytest.mark.slow
def test_scores_are_added_to_earlier_ones(own_objects, model_dir, tmp_path, monkeypatch):
    """Results name all commands, and the versions of the runs that asked."""
    out, installed = tmp_path / "out", version("torch")
    arguments = ["own", "--data", own_objects, "--model", model_dir, "--out", out, "--greedy", "--device", "cpu"]
    found = []
    for name in ("rouge_l", "color_accuracy"):
        assert run_command(*arguments, "--metrics", name) == 0
        results = json.loads((out / "results.json").read_text())
        found.append({entry["metric"] for entry in results["scores"]})
        monkeypatch.setattr("minigpt3d.evaluation.run_folder.version", lambda name: "99")
    assert "color_accuracy" not in found[0] and found[1] == found[0] | {"color_accuracy"}
    first, second = results["command"].split(" && ")
    assert first.endswith("--metrics rouge_l") and second.endswith("--metrics color_accuracy")
    assert results["versions"]["torch"] == installed and results["device"] == "cpu"
    # A missing answer is given with the new versions.
    (part,) = (out / "answers").glob("*.jsonl")
    part.write_text("".join(part.read_text().splitlines(keepends=True)[:-1]))
    assert run_command(*arguments, "--metrics", "rouge_l") == 0
    results = json.loads((out / "results.json").read_text())
    assert results["versions"]["torch"] == f"{installed}, 99" and results["command"].count(" && ") == 1
    # All answers are new.
    for folder in ("answers", "likelihood"):
        shutil.rmtree(out / folder)
    assert run_command(*arguments) == 0
    results = json.loads((out / "results.json").read_text())
    assert results["versions"]["torch"] == "99" and " && " not in results["command"]


@pytest.mark.slow
def test_incomplete_conditions_are_not_scored(own_objects, model_dir, tmp_path, capsys):
    """As after a killed run with --robustness that is resumed without it."""
    out = tmp_path / "out"
    arguments = ["own", "--data", own_objects, "--model", model_dir, "--out", out, "--greedy", "--device", "cpu"]
    assert run_command(*arguments) == 0
    results = json.loads((out / "results.json").read_text())
    begun = [line | {"condition": "jitter-1"} for line in Lines(out / "answers").read()
             if line["question"] == "what" and line["condition"] == "seeing"]  # fmt: skip
    (part,) = (out / "answers").glob("*.jsonl")
    append_lines(part, begun[:3])
    capsys.readouterr()
    assert run_command(*arguments) == 0
    assert re.search("not scored: jitter-1.* 3 of 7", capsys.readouterr().err)
    assert json.loads((out / "results.json").read_text())["scores"] == results["scores"]
    append_lines(part, begun[3:])
    assert run_command(*arguments) == 0
    scores = json.loads((out / "results.json").read_text())["scores"]
    assert {score["objects"] for score in scores if score["condition"] == "jitter-1"} == {7}


def test_a_judge_without_verdicts_is_reported(own_objects, model_dir, tmp_path, capsys):
    """Its scores of zero are not the model's fault."""

    class Mute(Judge):
        def _ask(self, prompts):
            facts = dict.fromkeys(("finish_reason", "served_model", "prompt_tokens", "completion_tokens"))
            yield from [self._keep(prompt, {"reply": "hm", "sampled": False} | facts) for prompt in prompts]

    messages = []
    options = EvaluateOptions("own", tmp_path / "out", str(model_dir), data=str(own_objects), greedy=True,
                              metrics=["caption_score"])  # fmt: skip
    judge = Mute("m", tmp_path / "judge", {"model": "m"})
    results = evaluate(options, judge=judge, notify=messages.append)
    (words,) = (line for line in messages if "m gave no readable verdict on caption score" in line)
    assert f"delete {tmp_path / 'judge'}" in words
    assert set(results.judge.prompts) == {"caption_score"}  # the only prompt in use
    assert "says nothing" in (tmp_path / "out" / "report.md").read_text()
    folders = [str(tmp_path / "out"), str(shutil.copytree(tmp_path / "out", tmp_path / "twin"))]
    assert minigpt3d_cli.main(["compare", *folders]) == 0
    assert "0.0 (0.0–0.0), 7 of 7 unparsed" in capsys.readouterr().out


def test_one_label_gives_no_closed_set(own_objects, model_dir, tmp_path, capsys):
    """A warning about a file is printed once, on one line, however often the file is read."""
    table = own_objects.with_name("one.csv")
    table.write_text("file,label,caption\nbox0.npy,box,\nhole.npy,box,\nbox3.npy,,A box.\n")
    cloud = make_cloud(1)
    cloud[:3] = np.nan
    np.save(own_objects.with_name("hole.npy"), cloud)
    arguments = [
        "own",
        "--data",
        table,
        "--model",
        model_dir,
        "--out",
        tmp_path / "out",
        "--greedy",
        "--device",
        "cpu",
    ]
    assert run_command(*arguments) == 0
    messages = capsys.readouterr().err
    for text in (messages, (tmp_path / "out" / "report.md").read_text()):
        assert "All labels are the same" in text
    (warning,) = re.findall("[^\r\n]*NaN[^\r\n]*", messages)
    assert warning.startswith("minigpt3d: warning: ") and "dropped" in warning


def test_a_run_with_a_judge(own_objects, model_dir, tmp_path):
    """Scores and report of a judge whose every second reply is nonsense; nothing is asked twice."""
    asked = []

    class TestJudge(Judge):
        def _ask(self, prompts):
            for prompt in prompts:
                asked.append(prompt)
                reply = "nonsense" if len(asked) % 2 else "T#so" if "F#" in prompt else "7#1#so"
                facts = {
                    "finish_reason": "stop",
                    "sampled": False,
                    "served_model": "m-1",
                    "prompt_tokens": 10,
                    "completion_tokens": 2,
                }
                yield self._keep(prompt, {"reply": reply} | facts)

    (tmp_path / "prompt.txt").write_text("MINE {answer} {reference} 7#1#so")
    shared = {
        "suite": "own",
        "out": tmp_path / "out",
        "model": str(model_dir),
        "data": str(own_objects),
        "greedy": True,
    }

    def run():
        judge = TestJudge("m", tmp_path / "out" / "judge", {"model": "m"}, price=(1e5, 1e5))
        options = EvaluateOptions(**shared, judge_prompt=[f"hallucination={tmp_path / 'prompt.txt'}"], judge="m")
        return evaluate(options, judge=judge, notify=messages.append)

    messages = []
    first = run()
    (message,) = [line for line in messages if line.startswith("m is asked up to ")]
    count = len(asked)
    # Three prompts about seven objects under four conditions, some of them equal.
    assert "up to 84 questions" in message and 84 * 0.6 < count <= 84
    assert [line for line in messages if "no readable verdict" in line] == []  # some verdicts were readable
    judged = {score.metric: score for score in first.seeing if score.judge}
    assert set(judged) == {"open_vocabulary_accuracy", "caption_score", "correctness", "hallucination", "precision"}
    assert sum(prompt.startswith("MINE") for prompt in asked) > 0
    assert first.judge.prompts["hallucination"] == hashlib.sha256(b"MINE {answer} {reference} 7#1#so").hexdigest()[:16]
    right, wrong = judged["correctness"].value, judged["hallucination"].value
    assert judged["precision"].value == pytest.approx(right / (right + wrong))
    assert wrong == 1 and judged["hallucination"].unparsed > 0
    assert first.judge.replies == count and first.judge.served_models == ["m-1"]
    assert first.judge.cost == pytest.approx(1.2 * count)
    again = run()
    assert len(asked) == count and again.judge == first.judge and again.scores == first.scores
    assert f"{count} replies" in (tmp_path / "out" / "report.md").read_text()
    # Runs without a judge, or with another one, report that its scores are lost.
    with pytest.raises(ValueError, match="judge m.*`judge`"):
        evaluate(EvaluateOptions(**shared))
    messages.clear()
    other = TestJudge("n", tmp_path / "n", {"model": "n"})
    again = evaluate(EvaluateOptions(**shared, metrics=["rouge_l"]), judge=other, notify=messages.append)
    assert any(re.search(r"\bm are replaced .*\bn;", message) for message in messages)
    assert {score.judge for score in again.scores} == {None, "n"} and again.judge.files is None


@pytest.mark.slow
def test_limited_runs_are_reported_as_such(own_objects, model_dir, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["own", "--data", own_objects, "--model", model_dir, "--out", out, "--greedy", "--device", "cpu"]
    assert run_command(*arguments, "--limit", 3) == 0
    messages = capsys.readouterr().err
    results = json.loads((out / "results.json").read_text())
    assert (results["dataset"]["objects"], results["dataset"]["of"]) == (3, 7)
    for text in (messages, (out / "report.md").read_text()):
        assert "3 of 7" in text and "fewer than 20" in text
    assert "3 of own, the first of 7" in (out / "report.md").read_text()
    assert run_command(*arguments, "--limit", 5) == 1
    assert re.search("objects 3,.* 5.*--limit", capsys.readouterr().err)
    assert run_command(*arguments[:-4], tmp_path / "all", *arguments[-3:]) == 0
    assert "Only the first" not in capsys.readouterr().err + (tmp_path / "all" / "report.md").read_text()


def test_ctrl_c_reports_that_answers_are_kept(own_objects, model_dir, tmp_path, monkeypatch, capsys):
    def stop(*_, **__):
        raise KeyboardInterrupt

    arguments = [
        "own",
        "--data",
        own_objects,
        "--model",
        model_dir,
        "--out",
        tmp_path / "out",
        "--greedy",
        "--device",
        "cpu",
    ]
    with monkeypatch.context() as patch:
        patch.setattr("minigpt3d.evaluation.ask.take_likelihoods", stop)
        assert run_command(*arguments) == minigpt3d_cli.INTERRUPTED
    messages = capsys.readouterr().err
    assert "minigpt3d: stopped" in messages and str(tmp_path / "out") in messages
    assert run_command(*arguments) == 0


def test_a_judge_with_nothing_to_judge(own_objects, tmp_path):
    class Unasked(Judge):
        def _ask(self, prompts):
            raise AssertionError("nothing is to be asked")

    options = EvaluateOptions("own", tmp_path / "out", data=str(own_objects), metrics=["rouge_l"])
    with pytest.raises(ValueError, match="`judge` m.*rouge_l"):
        evaluate(options, judge=Unasked("m", tmp_path / "judge", {}))
    assert not (tmp_path / "out").exists()


def test_answers_of_another_program(own_objects, tmp_path, capsys):
    lines = [{"object_id": f"box{i}", "answer": "It is a crate."} for i in range(7)]
    (tmp_path / "answers.jsonl").write_text("\n".join(map(json.dumps, lines)))
    out = tmp_path / "out"
    arguments = ["own", "--data", own_objects, "--answers", tmp_path / "answers.jsonl", "--out", out]
    assert run_command(*arguments) == 0
    results = json.loads((out / "results.json").read_text())
    (entry,) = [e for e in results["scores"] if e["metric"] == "closed_set_accuracy" and e["condition"] == "seeing"]
    assert entry["value"] == pytest.approx(3 / 7) and entry["objects"] == 7
    assert results["decoding"] is None and results["model"]["parameters"] is None
    assert results["device"] is None and "the limit" not in (out / "report.md").read_text()
    # Numbers as object ids, without leading zeros.
    for number, ids in enumerate((["7", "0007"], ["7", "12"], ["0007", "0012"])):
        table, numbered = tmp_path / f"{number}.csv", tmp_path / f"{number}.jsonl"
        table.write_text("file,label,object_id\n" + "".join(f"{own_objects.parent}/box{i}.npy,{label},{ids[i]}\n"
                                                             for i, label in enumerate(("box", "crate"))))  # fmt: skip
        given = [7, ids[1]] if number == 0 else [7, 12]
        numbered.write_text("\n".join(json.dumps({"object_id": i, "answer": "A box."}) for i in given))
        folder = tmp_path / f"numbers{number}"
        assert run_command("own", "--data", table, "--answers", numbered, "--out", folder) == 0
        rows = [json.loads(line) for line in (folder / "objects.jsonl").read_text().splitlines()]
        found = {
            row["object_id"]: row["scores"]["closed_set_accuracy"] for row in rows if row["condition"] == "seeing"
        }
        assert found == {ids[0]: 1.0, ids[1]: 0.0}
    # A file with a prompt of the suite, and with another one.
    numbered = [{"object_id": f"box{i}", "model_output": "A red box."} for i in range(7)]
    for prompt, question in (
        ("What color is it?", "color"),
        (" What is this? ", "what"),
        ("Hello, what is it?", None),
    ):
        (tmp_path / "pointllm.json").write_text(json.dumps({"prompt": prompt, "results": numbered}))
        folder = tmp_path / f"to-{question}"
        code = run_command("own", "--data", own_objects, "--answers", tmp_path / "pointllm.json", "--out", folder)
        assert code == (question is None)
        if question:
            rows = [json.loads(line) for line in (folder / "objects.jsonl").read_text().splitlines()]
            assert {row["question"] for row in rows} == {question}
    error = capsys.readouterr().err
    assert [word for word in ("'box0'", "'Hello, what is it?'", "what: 'What is this?'") if word not in error] == []
    (tmp_path / "both.jsonl").write_text(
        "\n".join(json.dumps({"object_id": f"box{i}", "answer": "?", "question": "what", "prompt": "What color is it?"})
                  for i in range(7))
    )  # fmt: skip
    code = run_command("own", "--data", own_objects, "--answers", tmp_path / "both.jsonl", "--out", tmp_path / "both")
    assert code == 1 and "'What color is it?'" in capsys.readouterr().err
    # An object that lacks an answer.
    lines.append({"object_id": "box0", "question": "caption", "answer": "A box."})
    (tmp_path / "answers.jsonl").write_text("\n".join(map(json.dumps, lines)))
    arguments[-1] = tmp_path / "more"
    assert run_command(*arguments) == 1
    assert re.search("7 objects, 6 .*'caption'.*'box1'", capsys.readouterr().err)
    assert not (tmp_path / "more").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["modelnet40"], "modelnet40 needs --data"),
        (["objaverse", "--data", "x"], "objaverse needs --annotations"),
        (["own", "--data", "nowhere"], "nowhere"),
        (["household", "--metrics", "bleu"], "--metrics bleu: household has"),
        (["household", "--metrics", "caption_score"], "caption_score.*judge"),
        (["household", "--s-bert", "nowhere"], "s_bert.*nowhere"),
        (["household", "--phrase", "a thing"], "--phrase.*{} once"),
        (
            ["caption", "--data", "DIR", "--annotations", "GT", "--phrase", "a {}"],
            "--phrase.*closed set",
        ),
        (
            ["household", "--judge", "m", "--judge-url", "http://x/v1", "--judge-prompt", "hallucination=PROMPT"],
            "--judge-prompt hallucination.*{reference}",
        ),
        (
            ["household", "--judge", "m", "--judge-price", "1", "2"],
            "--judge-price.*--judge-url",
        ),
        (
            [
                "household",
                "--judge",
                "m",
                "--judge-url",
                "http://x/v1",
                "--metrics",
                "caption_score",
                "--judge-prompt",
                "closed_set_accuracy=PROMPT",
            ],
            "--judge-prompt closed_set_accuracy.* caption_score",
        ),
        (["own", "--data", "TWINS"], "'a_box' names two classes"),
        (["own", "--data", "DIR"], "a folder without packed.json"),
        (["own", "--data", "BROKEN"], "7 of 8 .*\n  nan: "),
        (["own", "--data", "BROKEN"], "\n  torn: "),
        (["own", "--data", "BROKEN"], "\n  nan5: "),
        (["own", "--data", "sub/mine.csv"], "sub/mine.csv: no such file"),
        (["own", "--data", "sub/mine.jsonl"], "sub/mine.jsonl: no such file"),
        (["own", "--data", "sub/mine.xlsx"], "sub/mine.xlsx: no such file"),
        (["own", "--data", "TABS"], ".tsv is not read.*.csv"),
        (["own", "--data", "SHEET"], ".xlsx is not read.*.csv"),
        (["household", "--answers", "GT", "--robustness"], "--robustness .*--answers"),
        (["household", "--answers", "GT", "--greedy"], "--greedy .*--answers"),
        (["household", "--answers", "GT", "--phrase", "a {}"], "--phrase .*--answers"),
        (["household", "--answers", "GT", "--device", "cpu"], "--device .*--answers"),
        (["household", "--answers", "GT", "--dtype", "float32"], "--dtype .*--answers"),
        (["household", "--judge-url", "http://x"], "--judge-url.*--judge"),
        (["household", "--judge", "m", "--judge-url", "http://x", "--judge-prompt", "what=x"], "expected METRIC=FILE"),
        (["household", "--model", "a", "--answers", "b"], "give --model or --answers"),
        (["household", "--answers", "nowhere.jsonl"], "nowhere.jsonl"),
        (
            ["household", "--judge", "m", "--judge-url", "http://x/v1", "--judge-prompt", "hallucination=SHEET"],
            "SHEET.xlsx.*UTF-8",
        ),
        (
            ["household", "--judge", "m", "--judge-timeout", "9"],
            "--judge-timeout.*--judge-url",
        ),
    ],
)
def test_mistakes_are_reported_before_heavy_work(arguments, message, tmp_path, capsys):
    (tmp_path / "DIR").mkdir()
    np.save(tmp_path / "DIR" / "a_8192.npy", make_cloud(1))
    np.save(tmp_path / "DIR" / "nan.npy", np.full((9, 6), np.nan, np.float32))
    (tmp_path / "DIR" / "torn.npy").write_bytes(b"\x93NUMPY")
    conversations = [{"from": "human", "value": "<point>\nWhat?"}, {"from": "gpt", "value": "A."}]
    (tmp_path / "GT").write_text(json.dumps([{"object_id": "a", "conversations": conversations}]))
    (tmp_path / "PROMPT").write_text("Is it so? {answer}")
    (tmp_path / "TABS.tsv").write_text("file\tlabel\nDIR/a_8192.npy\tthing\n")
    (tmp_path / "SHEET.xlsx").write_bytes(b"PK\x03\x04\xff")
    more = [shutil.copyfile(tmp_path / "DIR" / "nan.npy", tmp_path / "DIR" / f"nan{i}.npy").stem for i in range(1, 6)]
    lines = [json.dumps({"file": f"DIR/{name}.npy", "label": "thing"}) for name in ("a_8192", "nan", "torn", *more)]
    (tmp_path / "BROKEN.jsonl").write_text("\n".join(lines))
    lines = [
        json.dumps({"object_id": label, "file": "DIR/a_8192.npy", "label": label}) for label in ("a box", "a_box")
    ]
    lines.insert(0, json.dumps({"object_id": "first", "file": "DIR/a_8192.npy", "caption": "A box."}))
    (tmp_path / "TWINS.jsonl").write_text("\n".join(lines))
    files = {"DIR": "DIR", "GT": "GT", "BROKEN": "BROKEN.jsonl", "TWINS": "TWINS.jsonl", "TABS": "TABS.tsv"}
    files["SHEET"] = "SHEET.xlsx"
    arguments = [tmp_path / files[argument] if argument in files else argument for argument in arguments]
    arguments = [str(argument).replace("PROMPT", str(tmp_path / "PROMPT")) for argument in arguments]
    arguments = [argument.replace("=SHEET", f"={tmp_path / files['SHEET']}") for argument in arguments]
    assert run_command(*arguments, "--out", tmp_path / "out") == 1
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists() or [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]


def test_an_empty_judge_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`judge` is empty"):
        EvaluateOptions("household", tmp_path, judge=" ").check()


def test_without_metrics_nothing_is_asked(tmp_path, capsys):
    """Objaverse without a judge and an encoder has no metric."""
    (tmp_path / "clouds").mkdir()
    np.save(tmp_path / "clouds" / "a_8192.npy", make_cloud(1))
    conversations = [{"from": "human", "value": "<point>\nWhat?"}, {"from": "gpt", "value": "A."}]
    (tmp_path / "GT.json").write_text(json.dumps([{"object_id": "a", "conversations": conversations}]))
    arguments = ["objaverse", "--data", tmp_path / "clouds", "--annotations", tmp_path / "GT.json"]
    assert run_command(*arguments, "--out", tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert "open_vocabulary_accuracy" in error and "(--judge)" in error
    assert "(--s-bert sentence-transformers/all-mpnet-base-v2, or a folder)" in error
    assert not (tmp_path / "out").exists()


def test_up_axis_and_missing_color(tmp_path, capsys, monkeypatch):
    """Objects are not rotated twice, by the reader and by the model's processor."""
    coord = np.random.default_rng(0).uniform(-1, 1, (500, 3)) * [0.2, 0.4, 1.0]
    np.save(tmp_path / "tower.npy", coord.astype(np.float32))
    (tmp_path / "own.csv").write_text("file,label\ntower.npy,tower\n")
    reading = {"up_axis": "z", "missing_color": "white"}
    ((plain,), (turned,)) = (read_own(str(tmp_path / "own.csv"), given) for given in (None, reading))
    assert np.ptp(plain.read(), axis=0).argmax() == 2 and not plain.read()[:, 3:].any()
    assert np.ptp(turned.read()[:, :3], axis=0).argmax() == 1 and (turned.read()[:, 3:] == 1).all()
    model = shutil.copytree(SHIPPED, tmp_path / "model")
    settings = json.loads((model / "processor_config.json").read_text())
    settings["feature_extractor"]["up_axis"] = "x"
    (model / "processor_config.json").write_text(json.dumps(settings))
    seen = []

    def spy(processor, clouds, up_axis=None):
        result = read_clouds(processor, clouds, up_axis)
        heights = [np.ptp(cloud[:, :3].numpy(), axis=0).argmax() for cloud in result if cloud.any()]
        seen.extend((processor.feature_extractor.up_axis, up_axis, height) for height in heights)
        return result

    for module in ("ask", "likelihood"):
        monkeypatch.setattr(f"minigpt3d.evaluation.{module}.read_clouds", spy)
    arguments = ["own", "--data", tmp_path / "own.csv", "--model", model, "--greedy", "--device", "cpu"]
    assert run_command(*arguments, "--out", tmp_path / "turned", "--up-axis", "z", "--missing-color", "white") == 0
    assert set(seen) == {("x", "y", 1)}  # rotated by the reader only
    seen.clear()
    assert run_command(*arguments, "--out", tmp_path / "plain") == 0
    assert set(seen) == {("x", None, 2)}  # rotated by the model's processor
    monkeypatch.undo()
    assert run_command("household", "--up-axis", "z", "--out", tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert "--up-axis" in error and "--missing-color" not in error
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "packed.json").write_text("{}")
    with pytest.raises(ValueError, match="packed data .*`up_axis`, `missing_color`"):
        read_own(str(tmp_path / "packed"), reading)


def test_folders_with_other_files_are_refused(tmp_path, own_objects, model_dir, capsys):
    (tmp_path / "letter.txt").write_text("dear")
    (tmp_path / "results.json").write_text("{}")
    assert run_command("own", "--data", own_objects, "--model", model_dir, "--out", tmp_path) == 1
    assert "other files than an evaluation" in capsys.readouterr().err
