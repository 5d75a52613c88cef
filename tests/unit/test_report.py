"""The report of an evaluation: its statements about known runs, escaping of texts, and pictures."""

import re
import sys
import warnings
from dataclasses import replace
from html.parser import HTMLParser
from io import BytesIO

import numpy as np
import pytest
from eval_runs import foreign_run, household_run, judged_run, read_cloud
from markdown_it import MarkdownIt
from PIL import Image

from minigpt3d.evaluation import charts as pictures
from minigpt3d.evaluation.report import best_and_worst, write_report
from minigpt3d.evaluation.run_folder import RunFolder
from minigpt3d.evaluation.suites import SUITES
from minigpt3d.model_card.words import same_judge


def report_on(folder, read_cloud):
    """Write the report of a finished run."""
    write_report(folder, *RunFolder(folder).read(), read_cloud)


@pytest.fixture(scope="module")
def household(tmp_path_factory):
    folder = household_run(tmp_path_factory.mktemp("eval") / "household")
    report_on(folder, read_cloud)
    return folder


def changed(folder, change) -> str:
    """report.md after `change(results, rows)`."""
    results, rows = RunFolder(folder).read()
    change(results, rows)
    write_report(folder, results, rows, lambda object_id: None)
    return (folder / "report.md").read_text(encoding="utf-8")


VOID = ("meta", "img", "link", "br")


class Page(HTMLParser):
    """Tags, addresses and text of a page, and whether tags are closed in order."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.addresses, self.handlers, self.open, self.text = [], [], [], [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.handlers += [name for name, _ in attributes if name.startswith("on")]
        self.addresses += [value for name, value in attributes if name in ("src", "href", "action", "data", "srcset")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert tag in VOID or self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text += data


def page_of(folder) -> Page:
    return Page((folder / "report.html").read_text(encoding="utf-8"))


# ---- Statements -----------------------------------------------------------------------------------------------------


def test_household(household):
    """Both reports have the numbers of results.json, formatted."""
    results = RunFolder(household).read_results()
    markdown, page = (household / "report.md").read_text(encoding="utf-8"), page_of(household)
    for score in results.scores:
        if score.condition in ("seeing", "blind", "no_color", "shuffled"):
            value, low, high = (100 * end for end in (score.value, score.low, score.high))
            for text in (markdown, page.text):
                assert f"{value:.1f} % ({low:.1f}–{high:.1f})" in text
    for text in (markdown, page.text):
        assert "geometry is used" in text and "belong to their objects" in text
        assert re.search("3 of 5,800 answers .*100 tokens", text)
        assert all(test.words in text for test in results.tests)
    assert sorted(path.name for path in (household / "pictures").iterdir()) == [
        "confusion.png",
        "robustness-what-closed_set_accuracy.png",
        "scores.png",
    ]
    assert set(re.findall(r"\(pictures/(.+?)\)", markdown)) == {
        path.name for path in (household / "pictures").iterdir()
    }
    assert not list(household.rglob("*unfinished"))


def test_table_of_classes(household):
    """A class's row equals a count made here."""
    results, rows = RunFolder(household).read()
    chairs = [row for row in rows if row.label == "chair" and row.condition == "seeing" and row.question == "what"]
    hits = sum(row.answer.endswith(" chair.") for row in chairs)
    index = results.classes.names.index("chair")
    own = results.classes.confusion[index][index]
    (line,) = re.findall(r"^\| chair \|.*$", (household / "report.md").read_text(encoding="utf-8"), re.M)
    assert line.startswith(f"| chair | {hits}/16 (") and f"| {own}/16 (" in line


def test_robustness_figure(household):
    """One number for all corruptions: the mean, with an interval over objects."""
    results, rows = RunFolder(household).read()
    values = [row.scores["closed_set_accuracy"] for row in rows if row.condition[-1].isdigit()]
    assert len(values) == 50 * 100
    (seeing,) = [s for s in results.seeing if s.metric == "closed_set_accuracy"]
    markdown = (household / "report.md").read_text(encoding="utf-8")
    (mean, low, high, share) = re.search(
        r"Over 50 corruptions and severities the mean is (.+?) % \((.+?)–(.+?)\), (\d+) % of", markdown
    ).groups()
    assert float(mean) == pytest.approx(100 * np.mean(values), abs=0.05)
    assert float(low) < float(mean) < float(high)
    assert int(share) == round(100 * np.mean(values) / seeing.value)
    assert "Hardest: fewer points" in markdown


def test_judged_run(tmp_path):
    folder = judged_run(tmp_path / "run")
    report_on(folder, read_cloud)
    markdown, page = (folder / "report.md").read_text(encoding="utf-8"), page_of(folder)
    assert "open-vocabulary accuracy | Qwen2-72B-Instruct |" in markdown
    assert re.search("2 of 200 .*open-vocabulary accuracy.*wrong", markdown)
    assert "open_vocabulary_accuracy sha256 bbbbbbbbbbbbbbbb" in markdown and "cost unknown" in markdown
    assert re.search("200 replies, 4 .*cut off, 196 sampled", markdown)
    assert "judge as served | Qwen2-72B-Instruct" in markdown
    assert "Classes" not in markdown  # every object has a different label
    assert "T#the same" in page.text and "F#another" in page.text


def test_answers_of_another_program(tmp_path):
    """Without model, clouds and blind control, which the report states."""
    folder = foreign_run(tmp_path / "run")
    report_on(folder, lambda object_id: None)
    markdown, page = (folder / "report.md").read_text(encoding="utf-8"), page_of(folder)
    assert f"# PointLLM-7B: {SUITES['household'].title}\n" in markdown and "| decoding | not known |" in markdown
    assert "There is no blind control" in markdown and "The geometry is used" not in markdown
    assert len([address for address in page.addresses if address.startswith("data:")]) == 1  # the scores
    assert page.text.count("What is this?") >= 20


def _set_tests(p: float, difference: float):
    def change(results, rows):
        for test in results.tests:
            test.p, test.difference = p, difference

    return change


def test_classes_with_one_object(tmp_path):
    """In a closed set, a label of a single object is in the table of classes."""

    def change(results, rows):
        first = {row.label: row.object_id for row in reversed(rows)}
        rows[:] = [row for row in rows if first[row.label] == row.object_id]

    text = changed(household_run(tmp_path / "run", corruptions=False), change)
    assert "| class | closed-set accuracy | likelihood, top 1 | most often mistaken for |" in text

    def change_without_classes(results, rows):
        change(results, rows)
        results.classes = None

    assert "| class |" not in changed(household_run(tmp_path / "other", corruptions=False), change_without_classes)


def test_phrases_are_listed(tmp_path, household):
    text = (household / "report.md").read_text(encoding="utf-8")
    assert re.search("11 forms.*“This is a black ….”, “This is a white ….”,", text)

    def change(results, rows):
        results.classes.phrases = ["a {}"]

    one = changed(household_run(tmp_path / "run", corruptions=False), change)
    assert "“a …”" in one


@pytest.mark.parametrize(
    ("p", "difference", "sentence"),
    [
        (1e-9, 0.5, "geometry is used:"),
        (0.8, 0.01, "not show that the geometry is used"),
        (0.06, 0.1, "not show that the geometry is used"),
        (1e-9, -0.5, "Unexpected: blind"),
    ],
)
def test_blind_control_in_words(tmp_path, p, difference, sentence):
    folder = household_run(tmp_path / "run", corruptions=False)
    markdown = changed(folder, _set_tests(p, difference))
    assert sentence in markdown and "Other scores show it" not in markdown


def test_significant_scores_other_than_the_main_one(tmp_path):
    def change(results, rows):
        for test in results.tests:
            test.p = 0.5 if test.metric == "closed_set_accuracy" else 0.01
            test.difference = -0.1 if test.metric == "likelihood_top_5" else 0.1

    markdown = changed(household_run(tmp_path / "run", corruptions=False), change)
    (sentence,) = [line for line in markdown.splitlines() if "does not show that color is used" in line]
    shown = sentence.partition("Other scores show it:")[2]
    assert re.findall("[a-z][^“;]+, “.*?”", shown) == [
        "likelihood, top 1, “What is this?”",
        "color accuracy, “What color is it?”",
    ]


def test_no_answer_unparsed_or_cut(tmp_path):
    def change(results, rows):
        results.generation.cut = 0

    markdown = changed(household_run(tmp_path / "run", corruptions=False), change)
    assert "Every answer could be read" in markdown and "No answer reached" in markdown


# ---- Best and worst objects -----------------------------------------------------------------------------------------


def test_best_and_worst(household):
    """Sorted by main score, other scores and name, whatever the order of the lines."""
    results, rows = RunFolder(household).read()
    best, worst, about = best_and_worst(results, rows)
    assert len(best) == len(worst) == 10 and not set(best) & set(worst)
    seeing = {}
    for row in rows:
        if row.condition == "seeing":
            seeing.setdefault(row.object_id, {}).update(row.scores)
    assert all(set(seeing[object_id].values()) == {1.0} for object_id in best) and best == sorted(best)
    assert all(seeing[object_id]["closed_set_accuracy"] == 0 for object_id in worst)
    others = [sum(seeing[object_id].values()) for object_id in worst]
    assert others == sorted(others)
    assert others[-1] <= min(
        sum(s.values()) for i, s in seeing.items() if s["closed_set_accuracy"] == 0 and i not in worst
    )
    assert best_and_worst(results, rows[::-1]) == (best, worst, about)
    right = sum(scores["closed_set_accuracy"] for scores in seeing.values())
    assert f"{right:.0f} of 100 objects" in about


def test_few_objects(tmp_path):
    """No object is in both lists."""
    folder = judged_run(tmp_path / "run", suite="caption", num=5)
    best, worst, _ = best_and_worst(*RunFolder(folder).read())
    assert len(best) == 3 and len(worst) == 2 and not set(best) & set(worst)
    scores = {row.object_id: row.scores for row in RunFolder(folder).read_objects() if row.condition == "seeing"}
    assert [scores[i]["caption_score"] for i in best + worst[::-1]] == sorted(
        (s["caption_score"] for s in scores.values()), reverse=True
    )


def test_objects_of_the_page(household):
    page = page_of(household)
    best, worst, _ = best_and_worst(RunFolder(household).read_results(), RunFolder(household).read_objects())
    places = [page.text.index(object_id) for object_id in [*best, *worst]]
    assert places == sorted(places)
    assert len(page.addresses) == 20 + 3 and all(a.startswith("data:image/png;base64,") for a in page.addresses)


# ---- Escaping -------------------------------------------------------------------------------------------------------

NASTY = (
    "</p></div><script>alert(1)</script><img src=x onerror=alert(2)> {{ 7 * 7 }} {% raw %} & \" ' | `a` \n\n# head\n"
    "| a | b |\n|-|-|\n[link](javascript:alert(3)) $x$ \x00 \ud800 ‮ ] -->" + "x" * 3000
)


def test_texts_are_escaped(tmp_path):
    def change(results, rows):
        results.model.name = results.suite = results.command = NASTY
        results.questions["instruction"] = results.judge.model = NASTY
        for score in results.scores:
            score.judge = NASTY
        for test in results.tests:
            test.words = NASTY
        for row in rows:
            row.answer = row.caption = row.label = row.prompt = NASTY
            row.object_id += NASTY
            row.reasons = {"open_vocabulary_accuracy": NASTY}

    folder = judged_run(tmp_path / "run", num=25)
    markdown = changed(folder, change)
    page = page_of(folder)
    assert set(page.tags) <= set(
        "html head meta title style body h1 h2 h3 p details summary ul li img div table tr th td span b".split()
    )
    assert page.handlers == [] and all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert "{{ 7 * 7 }}" in page.text and "<script>alert(1)</script>" in page.text
    shown = Page(MarkdownIt().enable("table").render(markdown))
    assert set(shown.tags) <= set("h1 h2 p details summary ul li img table thead tbody tr th td".split())
    assert all(re.fullmatch(r"pictures/[\w-]+\.png", address) for address in shown.addresses)
    assert "<script>alert(1)</script>" in shown.text and "| a | b |" in shown.text
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    cells = {len(re.findall(r"(?<!\\)\|", line)) for line in lines}
    assert cells == {8 + 1, 2 + 1}  # question, score, judge, three conditions, objects, unparsed; setting and value


def test_page_is_self_contained(household):
    text = (household / "report.html").read_text(encoding="utf-8")
    assert "http://" not in text and "https://" not in text and "url(" not in text and "@import" not in text
    assert len(text) < 2_000_000


def test_reports_repeat_exactly(tmp_path):
    folders = [judged_run(tmp_path / name, suite="caption", num=4) for name in ("a", "b")]
    for folder in folders:
        report_on(folder, read_cloud)
    for name in ("report.md", "report.html", "pictures/scores.png"):
        first, second = ((folder / name).read_bytes() for folder in folders)
        assert first == second


# ---- Pictures -------------------------------------------------------------------------------------------------------


def pixels(picture: bytes) -> np.ndarray:
    with Image.open(BytesIO(picture)) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


@pytest.fixture
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_cloud_has_colors_and_two_views(no_warnings):
    """A ball, red in front and blue behind."""
    coord = np.random.default_rng(0).normal(size=(30000, 3))  # dense enough to look solid
    coord /= np.linalg.norm(coord, axis=1, keepdims=True)
    color = np.where(coord[:, 2:] > 0, [[1.0, 0.0, 0.0]], [[0.0, 0.0, 1.0]])
    image = pixels(pictures.draw_cloud(np.concatenate([coord, color], axis=1).astype(np.float32))).astype(int)
    assert image.shape == (240, 480, 3)
    first, second = ((half[..., 0] - half[..., 2] > 100, half[..., 2] - half[..., 0] > 100)
                     for half in (image[:, :240], image[:, 240:]))  # fmt: skip
    assert first[0].sum() > 2 * first[1].sum() > 0 and second[1].sum() > 2 * second[0].sum() > 0
    assert len(np.unique(image[[0, -1]].reshape(-1, 3), axis=0)) == 1  # nothing is cut off at the edge


def test_cloud_stands_upright(no_warnings):
    """y is up: green above, red below, in both views."""
    coord = np.random.default_rng(0).uniform(-0.2, 0.2, (4000, 3))
    coord[:, 1] = np.linspace(-1, 1, 4000)
    color = np.where(coord[:, 1:2] > 0, [[0.0, 1.0, 0.0]], [[1.0, 0.0, 0.0]])
    image = pixels(pictures.draw_cloud(np.concatenate([coord, color], axis=1))).astype(int)
    for half in (image[:, :240], image[:, 240:]):
        green, red = (
            np.argwhere(half[..., channel] > half[..., 1 - channel] + 100)[:, 0].mean() for channel in (1, 0)
        )
        assert green < 120 < red


@pytest.mark.parametrize("color", [0.0, 1.0])
def test_cloud_without_colors_is_shaded(no_warnings, color):
    cloud = np.concatenate([read_cloud("a")[:, :3], np.full((2000, 3), color)], axis=1)
    assert len(np.unique(pixels(pictures.draw_cloud(cloud)).reshape(-1, 3), axis=0)) > 30


@pytest.mark.parametrize("cloud", [np.zeros((8192, 6)), np.zeros((1, 6)), np.eye(6)[:3], np.full((4, 6), 1.5)])
def test_odd_clouds_can_be_drawn(no_warnings, cloud):
    assert pixels(pictures.draw_cloud(cloud.astype(np.float32))).shape == (240, 480, 3)


def test_every_score_changes_the_picture(household, no_warnings):
    results = RunFolder(household).read_results()
    before = pixels(pictures.draw_scores(results))
    assert before.shape[1] == 880
    for score in results.scores:
        if score.question == "color":
            for key in ("value", "low", "high"):
                kept = getattr(score, key)
                setattr(score, key, kept - 0.03)
                assert (pixels(pictures.draw_scores(results)) != before).any(), (score, key)
                setattr(score, key, kept)


def test_counts_are_not_drawn(tmp_path, no_warnings):
    results = RunFolder(judged_run(tmp_path / "run", suite="caption", num=20)).read_results()
    before = pictures.draw_scores(results)
    results.scores = [score for score in results.scores if score.unit != "count"]
    assert pictures.draw_scores(results) == before
    results.scores = []
    assert pictures.draw_scores(results) is None


def test_robustness_curves(household, no_warnings):
    """Another value changes the panel of its corruption only."""
    scores = [s for s in RunFolder(household).read_results().scores if s.metric == "closed_set_accuracy"]
    before = pixels(pictures.draw_robustness(scores, "score"))
    (changed,) = [score for score in scores if score.condition == "jitter-5"]
    changed.value -= 0.02
    different = np.argwhere((pixels(pictures.draw_robustness(scores, "score")) != before).any(-1))
    assert len(different) and (different < np.array(before.shape[:2]) * [0.5, 0.25]).all()
    assert pictures.draw_robustness([s for s in scores if not s.condition[-1].isdigit()], "score") is None


@pytest.mark.parametrize("kept", [{"jitter-3"}, {"jitter-1", "jitter-2", "scale-5"}])
def test_few_corruptions(household, no_warnings, kept):
    scores = [s for s in RunFolder(household).read_results().scores if s.metric == "closed_set_accuracy"]
    shown = [s for s in scores if s.condition in {"seeing", *kept}]
    before = pixels(pictures.draw_robustness(shown, "$odd_ title"))
    assert (before != 255).any(-1).mean() > 0.02 and max(before.shape) < 2000
    for name in kept:  # all are in the picture
        changed = [
            replace(s, value=s.value / 2, low=s.low / 2, high=s.high / 2) if s.condition == name else s for s in shown
        ]
        after = pixels(pictures.draw_robustness(changed, "$odd_ title"))
        assert after.shape != before.shape or (after != before).any()


@pytest.mark.parametrize("num_classes", [1, 2, 24, 200])
def test_confusion_of_any_size(no_warnings, num_classes):
    generator = np.random.default_rng(0)
    counts = generator.multinomial(60, np.full(num_classes, 1 / num_classes), size=num_classes)
    counts[0, 1:] = 0
    image = pixels(pictures.draw_confusion([f"class $_{i}" for i in range(num_classes)], counts.tolist()))
    assert max(image.shape) < 1500


def test_confusion_omits_classes_that_do_not_occur():
    """A class that is only predicted is kept."""
    few = pixels(pictures.draw_confusion(["bed", "chair", "sofa"], [[1, 0, 2], [1, 1, 0], [0, 0, 0]]))
    names = ["bed", "bowl", "chair", "sofa", "vase"]
    counts = [[1, 0, 0, 2, 0], [0] * 5, [1, 0, 1, 0, 0], [0] * 5, [0] * 5]
    assert np.array_equal(pixels(pictures.draw_confusion(names, counts)), few)


def test_names_that_the_font_cannot_draw(no_warnings):
    assert pixels(pictures.draw_confusion(["стул", "椅子"], [[1, 2], [3, 4]])).size


def test_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "minigpt3d\[eval\]"'):
        report_on(household_run(tmp_path / "run", corruptions=False), read_cloud)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["objects.jsonl", "results.json"]


# ---- Reading --------------------------------------------------------------------------------------------------------


def test_main_score(tmp_path):
    assert (
        RunFolder(household_run(tmp_path / "h", corruptions=False)).read_results().main_score.metric
        == "closed_set_accuracy"
    )
    for suite, question, metric in (
        ("objaverse", "instruction", "open_vocabulary_accuracy"),
        ("modelnet40", "instruction", "closed_set_accuracy"),
        ("caption", "caption", "caption_score"),
    ):
        main = RunFolder(judged_run(tmp_path / suite, suite=suite, num=4)).read_results().main_score
        assert (main.question, main.metric, main.condition) == (question, metric, "seeing")


def test_same_judge():
    assert same_judge("Qwen/Qwen2-72B-Instruct") == same_judge("models/qwen2-72b_instruct/") == "qwen2-72b-instruct"
    assert same_judge("Qwen2-72B-Instruct-AWQ") != same_judge("Qwen2-72B-Instruct") != same_judge("Qwen2-7B-Instruct")
    assert same_judge(None) is None


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("results.json", None, "no results.json"),
        ("results.json", '{"schema": 2', "schema 2"),
        ("results.json", "[]", "schema 2"),
        ("results.json", '{"schema": 2}', "schema 2"),
        ("results.json", '{"schema": 1}', "schema 1"),
        ("objects.jsonl", None, "has no objects.jsonl"),
        ("objects.jsonl", '{"object_id": 1}\n', "objects.jsonl, line 1"),
        ("objects.jsonl", "[1]\n", "objects.jsonl, line 1"),
    ],
)
def test_unfinished_runs(tmp_path, name, content, message):
    folder = judged_run(tmp_path / "run", num=2)
    (folder / name).unlink() if content is None else (folder / name).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(message)):
        report_on(folder, read_cloud)
