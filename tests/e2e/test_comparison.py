"""Comparisons of runs: tables per judge, paired tests, published scores, and results in the Hub's format."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from eval_runs import foreign_run, household_run, judged_run
from huggingface_hub import ModelCard, ModelCardData, parse_eval_result_entries
from markdown_it import MarkdownIt

from minigpt3d.evaluation.comparison import Table, compare, tabulate
from minigpt3d.evaluation.metrics import PROMPTS
from minigpt3d.evaluation.results import hash_prompt, values_of
from minigpt3d.evaluation.run_folder import RunFolder
from minigpt3d.evaluation.statistics import mcnemar, newcombe
from minigpt3d.model_card.model_index import eval_results, model_index
from minigpt3d.model_card.words import escaped


QWEN = "Qwen2-72B-Instruct"


def read_results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def change_results(folder: Path, **changes) -> Path:
    results = read_results(folder) | changes
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    return {
        "a": household_run(root / "a", corruptions=False),
        "b": household_run(root / "b", seed=1, skill=0.4, corruptions=False),
        "foreign": foreign_run(root / "foreign"),
        "qwen": judged_run(root / "qwen"),
        "qwen_path": judged_run(
            root / "qwen_path", judge="Qwen/Qwen2-72B-Instruct", seed=1, skill=0.6, name="you/Other"
        ),
        "gpt": judged_run(root / "gpt", judge="gpt-4-0613", seed=2, name="me/GPT-judged"),
        "caption": judged_run(root / "caption", suite="caption"),
        "modelnet40": judged_run(root / "modelnet40", suite="modelnet40"),
    }


def tables(*folders) -> dict[tuple, Table]:
    return {(table.suite, table.judge): table for table in tabulate(list(folders))[1]}


# ---- Judges ---------------------------------------------------------------------------------------------------------


def test_judges_never_share_a_table(runs):
    """All scores of a table are of its judge, published ones too."""
    compared, all_tables = tabulate(list(runs.values()))
    folder_of = {run.name: folder for run, folder in zip(compared, runs.values(), strict=True)}
    published = json.loads((Path(__file__).parents[2] / "evaluation/published.json").read_text(encoding="utf-8"))[
        "rows"
    ]
    seen = set()
    for table in all_tables:
        key = (table.suite, table.judge)
        assert key not in seen
        seen.add(key)
        for row in table.rows:
            for column, cell in row.cells.items():
                if cell.source:
                    (line,) = [
                        line for line in published
                        if (line["suite"], line["metric"]) == (table.suite, row.metric)
                        and line["scores"].get(column.removesuffix(", published"), [None])[0] == cell.value
                    ]  # fmt: skip
                    assert line["judge"] == table.judge
                else:
                    results = read_results(folder_of[column])
                    assert results["suite"] == table.suite
                    judges = {s["judge"] for s in results["scores"] if s["metric"] == row.metric}
                    assert {judge and judge.removeprefix("Qwen/") for judge in judges} == {table.judge}
    assert seen == {
        ("household", None), ("objaverse", QWEN), ("objaverse", "gpt-4-0613"), ("caption", QWEN), ("caption", None),
        ("modelnet40", QWEN),
    }  # fmt: skip


def test_same_judge_under_two_names(runs):
    table = tables(runs["qwen"], runs["qwen_path"])["objaverse", QWEN]
    assert table.columns[:2] == ["me/MiniGPT-3D", "you/Other"]
    assert len(table.tests) == 2


def test_different_judge_prompts_are_not_tested(runs, tmp_path):
    folder = judged_run(tmp_path / "own_rubric", seed=3, name="me/own-rubric")
    judge = read_results(folder)["judge"] | {"prompts": {"open_vocabulary_accuracy": "ee" * 8}}
    change_results(folder, judge=judge)
    table = tables(runs["qwen"], folder)["objaverse", QWEN]
    assert table.tests == []
    assert any("judged with different prompts" in note for note in table.notes)


@pytest.mark.parametrize(
    "change, name",
    [
        ({"served_models": ["qwen2-72b-instruct-awq"]}, f"{QWEN} (served by qwen2-72b-instruct-awq)"),
        ({"served_models": [QWEN, "qwen3"]}, f"{QWEN} (served by {QWEN.lower()}, qwen3)"),
        ({"served_models": [], "files": "0a" * 8}, f"{QWEN} (files {'0a' * 8})"),
    ],
)
def test_different_judges_of_one_name_have_separate_tables(runs, tmp_path, change, name):
    folder = judged_run(tmp_path / "other", seed=3, name="me/other")
    assert set(tables(runs["qwen"], folder)) == {("objaverse", QWEN)}
    change_results(folder, judge=read_results(folder)["judge"] | change)
    found = tables(runs["qwen"], folder)
    assert set(found) == {("objaverse", QWEN), ("objaverse", name)}
    assert not found["objaverse", QWEN].tests and found["objaverse", name].columns[0] == "me/other"
    assert f"judge {name}" in compare([runs["qwen"], folder])


def test_judges_are_identified_by_the_served_name(runs, tmp_path):
    folder = judged_run(tmp_path / "alias", judge="judge", seed=3, name="me/alias")
    change_results(folder, judge=read_results(folder)["judge"] | {"served_models": [f"Qwen/{QWEN}"]})
    (table,) = tables(runs["qwen"], folder).values()
    assert len(table.tests) == 2


@pytest.mark.slow
def test_other_encoders_or_phrases_have_separate_rows(runs, tmp_path):
    """Without tests and published scores."""
    folder = judged_run(tmp_path / "encoder", suite="caption", seed=3, name="me/encoder")
    assert len([t for t in tables(runs["caption"], folder)["caption", None].tests if t.row.metric == "s_bert"]) == 1
    change_results(folder, encoders={"s_bert": "all-mpnet-base-v2"})  # a folder with the name of the default
    assert len([t for t in tables(runs["caption"], folder)["caption", None].tests if t.row.metric == "s_bert"]) == 1
    change_results(folder, encoders={"s_bert": "tiny-encoder"})
    table = tables(runs["caption"], folder)["caption", None]
    assert not [test for test in table.tests if test.row.metric == "s_bert"]
    (other,) = [row for row in table.rows if row.variant]
    assert set(other.cells) == {"me/encoder"} and other.variant == "tiny-encoder"
    assert "S-BERT (tiny-encoder)" in compare([runs["caption"], folder])

    folder = household_run(tmp_path / "phrases", seed=1, corruptions=False)
    classes = read_results(folder)["classes"]
    assert {row.variant for row in tables(runs["a"], folder)["household", None].rows} == {None}
    change_results(folder, classes=classes | {"phrases": ["a {}"]})
    table = tables(runs["a"], folder)["household", None]
    assert {row.variant for row in table.rows} == {None, "“a {}”"}
    assert not [test for test in table.tests if test.row.metric.startswith("likelihood")]


# ---- Published scores -----------------------------------------------------------------------------------------------


def cells(table: Table, prompts: list[str], metric: str) -> dict:
    (row,) = [row for row in table.rows if list(row.prompts) == prompts and row.metric == metric]
    return {column: cell.value for column, cell in row.cells.items() if cell.source}


INSTRUCTION, COMPLETION, CAPTION = "What is this?", "This is an object of", "Caption this 3D model in detail."


def test_published_scores(runs):
    """Numbers of the papers, typed again."""
    by_key = tables(runs["qwen"], runs["gpt"], runs["caption"], runs["modelnet40"])
    objaverse, gpt, modelnet40 = (
        by_key["objaverse", QWEN],
        by_key["objaverse", "gpt-4-0613"],
        by_key["modelnet40", QWEN],
    )
    accuracy = "open_vocabulary_accuracy"
    assert cells(objaverse, [INSTRUCTION], accuracy) == {"MiniGPT-3D, published": 65.0, "PointAlign, published": 72.5}
    assert cells(objaverse, [COMPLETION], accuracy) == {"MiniGPT-3D, published": 68.5, "PointAlign, published": 69.5}
    assert cells(objaverse, [INSTRUCTION, COMPLETION], accuracy) == {
        "HCC-3D, published": 67.75, "PointLLM-7B, published": 62.5, "PointLLM-13B, published": 62.25
    }  # fmt: skip
    assert cells(gpt, [INSTRUCTION], accuracy) == {"MiniGPT-3D, published": 60.0}
    assert cells(gpt, [COMPLETION], accuracy) == {"MiniGPT-3D, published": 60.5}
    accuracy = "closed_set_accuracy"
    assert cells(modelnet40, [INSTRUCTION], accuracy) == {
        "MiniGPT-3D, published": 61.99,
        "PointAlign, published": 61.55,
    }
    assert cells(modelnet40, [COMPLETION], accuracy) == {
        "MiniGPT-3D, published": 60.49,
        "PointAlign, published": 60.78,
    }
    for metric, judge, values in (
        ("caption_score", QWEN, (48.17, 53.05, 48.72, 42.20, 40.40)),
        ("s_bert", None, (49.54, 49.94, 50.89, 48.50, 49.07)),
        ("simcse", None, (51.39, 51.32, 50.84, 48.92, 48.41)),
    ):
        models = ("MiniGPT-3D", "PointAlign", "HCC-3D", "PointLLM-7B", "PointLLM-13B")
        expected = {f"{model}, published": value for model, value in zip(models, values, strict=True)}
        assert cells(by_key["caption", judge], [CAPTION], metric) == expected


def test_notes_on_judge_prompts(tmp_path):
    """Published scores are of PointLLM's prompts, which are not part of this project."""
    folders = [judged_run(tmp_path / name, num=4, name=name) for name in ("user", "rubric")]
    notes = " ".join(tables(folders[0])["objaverse", QWEN].notes)
    assert re.search("PointLLM's.*, user with a prompt of the user", notes)
    judge = read_results(folders[1])["judge"]
    judge["prompts"]["open_vocabulary_accuracy"] = hash_prompt(PROMPTS["open_vocabulary_accuracy"])
    change_results(folders[1], judge=judge)
    notes = " ".join(tables(*folders)["objaverse", QWEN].notes)
    assert re.search("user with .*the user, rubric with .*project", notes)
    # Details were judged with this project's prompt, the published metric with the user's.
    caption = judged_run(tmp_path / "caption", suite="caption", num=4, name="caption")
    judge = read_results(caption)["judge"]
    judge["prompts"] |= {"hallucination": hash_prompt(PROMPTS["hallucination"]), "of_another_version": "0"}
    change_results(caption, judge=judge)
    notes = " ".join(tables(caption)["caption", QWEN].notes)
    assert re.search("caption with .*the user", notes)


def test_published_captions_of_gpt4(tmp_path):
    table = tables(judged_run(tmp_path / "run", suite="caption", judge="openai/GPT-4-0613", num=4))
    table = table["caption", "openai/GPT-4-0613"]
    assert list(cells(table, [CAPTION], "caption_score").values()) == [57.06, 44.85, 48.15, 46.92, 48.94]


def test_published_scores_need_equal_prompt_judge_and_suite(runs, tmp_path):
    """Otherwise none are shown."""
    folder = judged_run(tmp_path / "asked", num=4)
    change_results(folder, questions={"instruction": "What is that?", "completion": "Name it."})
    other_judge = judged_run(tmp_path / "judge", judge="Qwen2.5-72B-Instruct", num=4)
    for table in (*tables(folder).values(), *tables(other_judge).values(), *tables(runs["a"]).values()):
        assert len(table.columns) == 1 and not any("ublished" in note for note in table.notes)


def test_mean_of_both_prompts(runs):
    """The mean is by object, so that the interval is over objects."""
    table = tables(runs["qwen"])["objaverse", QWEN]
    (row,) = [row for row in table.rows if len(row.prompts) == 2]
    singles = [row.cells["me/MiniGPT-3D"].value for row in table.rows if len(row.prompts) == 1]
    cell = row.cells["me/MiniGPT-3D"]
    assert cell.value == pytest.approx(np.mean(singles)) and cell.low < cell.value < cell.high


def test_no_mean_of_prompts_about_other_objects(tmp_path):
    folder = judged_run(tmp_path / "run", num=20)
    rows = [json.loads(line) for line in (folder / "objects.jsonl").read_text(encoding="utf-8").splitlines()]
    kept = [row for row in rows if (row["object_id"], row["question"]) != ("0003", "completion")]
    (folder / "objects.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    with pytest.raises(ValueError, match="damaged.* 19 of 20 .*open_vocabulary_acc"):
        compare([folder])
    scores = read_results(folder)["scores"]
    for score in scores:
        score["objects"] -= score["question"] == "completion"
    change_results(folder, scores=scores)
    rows = tables(folder)["objaverse", QWEN].rows
    assert not any("me/MiniGPT-3D" in row.cells for row in rows if len(row.prompts) == 2)
    assert len([row for row in rows if len(row.prompts) == 1]) == 2


# ---- Tests between runs ---------------------------------------------------------------------------------------------


def test_paired_tests(runs):
    """Equal to the same tests made here, corrected for four comparisons."""
    table = tables(runs["a"], runs["b"])["household", None]
    rows = [RunFolder(runs[name]).read_objects() for name in ("a", "b")]
    assert [test.row.metric for test in table.tests] == [
        "closed_set_accuracy", "likelihood_top_1", "likelihood_top_5", "color_accuracy"
    ]  # fmt: skip
    raw = []
    for test in table.tests:
        question = {"color_accuracy": "color"}.get(test.row.metric, "what")
        a, b = (np.array(list(values_of(found, question, test.row.metric).values())) for found in rows)
        raw.append(mcnemar(a, b))
        assert (test.low, test.high) == newcombe(a, b)
        assert test.difference == pytest.approx(a.mean() - b.mean()) and test.test == "McNemar exact"
    order = np.argsort(raw)
    corrected = np.maximum.accumulate(np.array(raw)[order] * [4, 3, 2, 1]).clip(max=1)
    assert [table.tests[i].p for i in order] == pytest.approx(corrected)
    assert table.tests[0].p < 0.05


def test_order_of_lines_does_not_matter(runs, tmp_path):
    """Objects are paired by id."""
    folder = household_run(tmp_path / "c", seed=1, skill=0.4, corruptions=False)
    lines = (folder / "objects.jsonl").read_text(encoding="utf-8").splitlines()
    (folder / "objects.jsonl").write_text("\n".join(lines[::-1]) + "\n", encoding="utf-8")
    tests = [tables(runs["a"], other)["household", None].tests for other in (runs["b"], folder)]
    assert [t.p for t in tests[0]] == [t.p for t in tests[1]]
    assert [t.low for t in tests[0]] == [t.low for t in tests[1]]


@pytest.mark.slow
def test_scores_other_than_hits(tmp_path):
    folders = [
        judged_run(tmp_path / name, suite="caption", seed=seed, name=name) for name, seed in (("x", 0), ("y", 1))
    ]
    by_key = tables(*folders)
    tests = by_key["caption", QWEN].tests + by_key["caption", None].tests
    assert {test.test for test in tests} == {"sign flips"}
    # Precision is a ratio of sums and has no test.
    assert [test.row.metric for test in tests] == ["caption_score", "correctness", "hallucination", "s_bert", "simcse"]


@pytest.mark.parametrize("what", ["objects", "fingerprint"])
def test_other_objects_are_not_tested(runs, tmp_path, what):
    folder = household_run(tmp_path / "c", seed=1, corruptions=False)
    if what == "objects":
        lines = (folder / "objects.jsonl").read_text(encoding="utf-8").splitlines()
        kept = [line.replace("scopia-007", "scopia-777") for line in lines]
        (folder / "objects.jsonl").write_text("\n".join(kept) + "\n", encoding="utf-8")
    else:
        change_results(folder, dataset=read_results(folder)["dataset"] | {"fingerprint": "other"})
    table = tables(runs["a"], folder)["household", None]
    assert table.tests == []
    (note,) = [note for note in table.notes if "have different objects" in note]


# ---- As Markdown ----------------------------------------------------------------------------------------------------


def test_markdown(runs):
    markdown = compare([runs["a"], runs["b"], runs["foreign"], runs["qwen"], runs["gpt"]])
    headings = re.findall(r"^## (.*)$", markdown, re.M)
    assert headings == [
        "household, without a judge", "objaverse, judge gpt-4-0613", "objaverse, judge Qwen2-72B-Instruct"
    ]  # fmt: skip
    household, gpt, qwen = re.split(r"^## .*$", markdown, flags=re.M)[1:]
    assert "| checkpoints/household (a) | checkpoints/household (b) | PointLLM-7B |" in household
    assert "60.00 % (no interval)" in gpt and "60.00 %" not in qwen
    assert "65.00 % (no interval)" in qwen and "65.00 %" not in gpt
    assert "decoding" not in household  # the decoding of another program is unknown
    assert "p corrected for 8 comparisons" in household
    for score in read_results(runs["a"])["scores"]:
        if score["condition"] == "seeing":
            low, high = 100 * score["low"], 100 * score["high"]
            assert f"| {100 * score['value']:.1f} % ({low:.1f}–{high:.1f}) |" in household
    for block in re.findall(r"(?:^\|.*\n)+", markdown, re.M):
        assert len({line.count("|") for line in block.splitlines()}) == 1


def test_no_name_becomes_markup(tmp_path):
    nasty = "<img src=x onerror=alert(1)> | `x` _em_ **b**\n# Head\n[link](javascript:alert(2))"
    sizes = {"a": 20, "b": 20, "c": 10}
    folders = [judged_run(tmp_path / name, num=num, judge=nasty) for name, num in sizes.items()]
    for seed, folder in enumerate(folders):
        results = read_results(folder)
        model = {"name": f"{nasty} {seed}", "fingerprint": "f", "parameters": 1, "dtype": "float32"}
        questions = {name: f"{prompt}{nasty}" for name, prompt in results["questions"].items()}
        change_results(folder, model=model, decoding={"top_p": seed}, questions=questions)
    markdown = compare(folders)
    assert "have different objects" in markdown and "decoding" in markdown
    page = MarkdownIt().enable("table").render(markdown)
    assert set(re.findall(r"<(\w+)", page)) == set("h1 h2 p ul li table thead tbody tr th td".split())
    assert page.count("<h1>") == 1 and page.count("<h2>") == 1 and page.count("alert(1)") > 6
    for block in re.findall(r"(?:^\|.*\n)+", markdown, re.M):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1
    names = ("1. one", "2) two", "- three", "+ four", "---", "# five", "> six", "_seven_", "__init__", "a_b", "8.5 %")
    for name in names:
        assert MarkdownIt().render(escaped(name)).strip() == f"<p>{name.replace('>', '&gt;')}</p>"


def test_names_of_runs(runs, tmp_path):
    same = household_run(tmp_path / "a", seed=9, corruptions=False)
    names = [run.name for run in tabulate([runs["a"], same, runs["b"], runs["foreign"]])[0]]
    assert names == [
        f"checkpoints/household (a) ({runs['a']})", f"checkpoints/household (a) ({same})", "checkpoints/household (b)",
        "PointLLM-7B",
    ]  # fmt: skip


def test_nothing_to_compare(runs, tmp_path):
    with pytest.raises(ValueError, match="got none"):
        compare([])
    with pytest.raises(ValueError, match="twice"):
        compare([runs["a"], runs["a"] / "." / ".." / "a"])
    with pytest.raises(ValueError, match="results.json"):
        compare([runs["a"], tmp_path])
    (tmp_path / "results.json").write_text('{"a": 1}')
    with pytest.raises(ValueError, match="results.json.*schema 2"):
        compare([runs["a"], tmp_path])


# ---- The Hub's format ----------------------------------------------------------------------------------------------


def test_model_index_of_a_card(runs, tmp_path):
    """Written to a card and read by the Hub's library."""
    results = [read_results(runs["qwen"]), read_results(runs["caption"])]
    card = ModelCard(f"---\n{ModelCardData(**{'model-index': model_index(results)})}\n---\n# A model\n")
    card.save(tmp_path / "README.md")
    data = ModelCard.load(tmp_path / "README.md").data
    assert data.model_name == "me/MiniGPT-3D"
    found = {(entry.dataset_name, entry.metric_type, entry.metric_name): entry for entry in data.eval_results}
    all_scores = [(r["suite"], s) for r in results for s in r["scores"]]
    scores = [(suite, score) for suite, score in all_scores if score["condition"] == "seeing"]
    assert len(found) == len(data.eval_results) == len(scores) == 2 + 6
    for (suite, metric, name), entry in found.items():
        (score,) = [
            s for r, s in scores
            if (r, s["metric"]) == (suite, metric) and results[suite == "caption"]["questions"][s["question"]].strip() in name
        ]  # fmt: skip
        factor = 100 if score["unit"] == "share" else 1
        assert entry.metric_value == pytest.approx(factor * score["value"], abs=0.006)
        assert entry.dataset_type == "RunsenXu/PointLLM" and entry.metric_args["objects"] == 200
        low, high = re.match(r"(.+) to (.+) \(95 %, \w+\)", entry.metric_args["interval"]).groups()
        assert (float(low), float(high)) == pytest.approx((factor * score["low"], factor * score["high"]), abs=0.006)
        assert ("judge" in entry.metric_args) == (score["judge"] is not None)
        (blind,) = [
            s for r, s in all_scores
            if s["condition"] == "blind" and (r, s["question"], s["metric"]) == (suite, score["question"], metric)
        ]  # fmt: skip
        assert (
            entry.metric_args["blind_control"]
            == pytest.approx(factor * blind["value"], abs=0.006)
            != entry.metric_value
        )
    judge = found["caption", "precision", "precision of details, “Caption this 3D model in detail.”"].metric_args[
        "judge"
    ]
    assert judge == "Qwen2-72B-Instruct, 2026-11-23, prompt sha256 dddddddddddddddd"


def test_two_runs_of_one_suite(runs, tmp_path):
    """Greedy and sampled: both keep their settings, in the card and in files."""
    greedy = change_results(judged_run(tmp_path / "greedy", seed=4), decoding={"num_beams": 1})
    results = [read_results(runs["qwen"]), read_results(greedy)]
    first, second = model_index(results)[0]["results"]
    assert first["dataset"]["config"] == "objaverse" and second["dataset"]["config"] == "objaverse-2"
    assert second["dataset"]["args"]["decoding"] == {"num_beams": 1} != first["dataset"]["args"]["decoding"]
    assert [metric["value"] for metric in second["metrics"]] == [
        pytest.approx(100 * s["value"], abs=0.006) for s in results[1]["scores"] if s["condition"] == "seeing"
    ]
    assert list(eval_results(results)) == ["objaverse-qwen2-72b-instruct.yaml", "objaverse-2-qwen2-72b-instruct.yaml"]


def test_model_index_of_household(runs):
    (index,) = model_index([read_results(runs["a"])])
    assert index["name"] == "checkpoints/household"
    (result,) = index["results"]
    assert result["dataset"]["type"] == "household" and result["dataset"]["args"]["objects"] == 100
    assert [metric["type"] for metric in result["metrics"]] == [
        "closed_set_accuracy", "likelihood_top_1", "likelihood_top_5", "color_accuracy"
    ]  # fmt: skip
    yaml.safe_dump(index)  # plain types only


def test_eval_results(runs):
    files = eval_results([read_results(runs["qwen"]), read_results(runs["caption"])])
    assert set(files) == {"objaverse-qwen2-72b-instruct.yaml", "caption-qwen2-72b-instruct.yaml", "caption.yaml"}
    entries = {name: parse_eval_result_entries(yaml.safe_load(text)) for name, text in files.items()}
    assert [entry.task_id for entry in entries["caption.yaml"]] == ["caption-caption-s_bert", "caption-caption-simcse"]
    tasks = [entry.task_id for found in entries.values() for entry in found]
    assert len(set(tasks)) == len(tasks) == 8
    scores = read_results(runs["qwen"])["scores"]
    for entry, score in zip(entries["objaverse-qwen2-72b-instruct.yaml"], scores, strict=False):
        assert entry.value == pytest.approx(100 * score["value"], abs=0.006) and entry.date == "2026-11-23"
        assert entry.dataset_id == "RunsenXu/PointLLM"
        assert "judge Qwen2-72B-Instruct" in entry.notes and "blind control" in entry.notes and "95 %" in entry.notes


def test_eval_results_need_a_data_set_on_the_hub(runs):
    results = [read_results(runs["a"])]
    assert eval_results(results) == {}
    (text,) = eval_results(results, {"household": "me/household-objects"}).values()
    assert {entry.dataset_id for entry in parse_eval_result_entries(yaml.safe_load(text))} == {"me/household-objects"}


@pytest.mark.parametrize("make", [model_index, eval_results])
def test_card_of_one_model(runs, make):
    with pytest.raises(ValueError, match="got none"):
        make([])
    with pytest.raises(ValueError, match="about one model"):
        make([read_results(runs["a"]), read_results(runs["qwen"])])
