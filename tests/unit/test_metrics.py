"""The metrics as `evaluate` loads them from their folders, against hand-computed values and the libraries."""

import ast
import doctest
import math
import re
import sys
from functools import cache
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
import yaml


METRICS_DIR = Path(__file__).parents[2] / "evaluation" / "metrics"
NAMES = sorted(path.name for path in METRICS_DIR.iterdir())
JUDGED = ["caption_judge_score", "closed_set_accuracy", "hallucination", "open_vocabulary_accuracy"]


@pytest.fixture(scope="module")
def load():
    """A metric by its name. In memory: after an error, evaluate would wait a second for the failed call's file."""
    return cache(lambda name: evaluate.load(str(METRICS_DIR / name), keep_in_memory=True))


class Judge:
    """Gives these replies, and keeps the prompts."""

    def __init__(self, *replies):
        self.replies = list(replies)

    def __call__(self, prompts):
        self.prompts = prompts
        return self.replies


# ---- As folders that can be pushed ----------------------------------------------------------------------------------


def test_which_metrics_there_are():
    assert NAMES == sorted([*JUDGED, "caption_overlap", "sentence_similarity"])


@pytest.mark.parametrize("name", NAMES)
def test_folder_is_a_space_of_the_hub(name):
    folder = METRICS_DIR / name
    assert {path.name for path in folder.iterdir() if path.name != "__pycache__"} == {
        f"{name}.py",
        "README.md",
        "app.py",
        "requirements.txt",
    }
    _, front_matter, card = (folder / "README.md").read_text().split("---\n", 2)
    front_matter = yaml.safe_load(front_matter)
    assert front_matter["tags"] == ["evaluate", "metric"] and front_matter["sdk"] == "gradio"
    assert front_matter["app_file"] == "app.py" and front_matter["title"] and front_matter["description"]
    assert f"# Metric Card for {front_matter['title']}\n" in card
    required = set(re.findall(r"^[a-z-]+", (folder / "requirements.txt").read_text(), re.MULTILINE))
    imported = {
        name.split(".")[0].replace("_", "-")
        for node in ast.walk(ast.parse((folder / f"{name}.py").read_text()))
        for name in (
            [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in getattr(node, "names", [])]
        )
        if isinstance(node, (ast.Import, ast.ImportFrom))
    }
    assert imported - {"numpy"} - sys.stdlib_module_names == required  # numpy comes with evaluate


@pytest.mark.parametrize("name", NAMES)
def test_examples_of_the_card(name, monkeypatch):
    monkeypatch.chdir(METRICS_DIR.parent.parent)
    blocks = re.findall(r"```python\n(.*?)```", (METRICS_DIR / name / "README.md").read_text(), re.DOTALL)
    examples = doctest.DocTestParser().get_doctest("\n".join(blocks), {}, name, None, 0)
    assert len(examples.examples) >= 3 or name == "sentence_similarity"  # which needs an encoder from the Hub
    assert doctest.DocTestRunner(verbose=False).run(examples).failed == 0


def test_what_the_metrics_share_is_the_same():
    """Each is loaded alone, so it has a copy."""
    copies = {"_check_texts": [], "_ask": []}
    for name in NAMES:
        for node in ast.parse((METRICS_DIR / name / f"{name}.py").read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name in copies:
                copies[node.name].append(ast.unparse(node))
    assert {name: (len(texts), len(set(texts))) for name, texts in copies.items()} == {
        "_check_texts": (len(NAMES), 1),
        "_ask": (len(JUDGED), 1),
    }


# ---- What is checked first ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ([], [], "predictions is empty"),
        (["a"], [], "references"),
        (None, ["a"], "predictions must be a list of texts, got None"),
        (["a"], None, "references must be a list"),
        ("a chair", ["a"], "predictions must be a list of texts, got 'a chair'"),
        (["a"], "a", "references must be a list"),
        (["a", None], ["a", "b"], r"predictions\[1\] must be a text, got None"),
        (["a", "b"], ["a", 5], r"references\[1\] must be a"),
        (["a", "b"], ["a"], r"predictions \(2\) and references \(1\)"),
    ],
)
def test_columns_are_checked(load, name, predictions, references, message):
    with pytest.raises(ValueError, match=message):
        load(name).compute(predictions=predictions, references=references)


@pytest.mark.parametrize("name", JUDGED)
def test_a_judge_must_be_one(load, name):
    texts = {"predictions": ["a", "b"], "references": ["a", "b"]}
    if name == "closed_set_accuracy":
        texts["classes"] = ["a", "b"]
    metric = load(name)
    with pytest.raises(ValueError, match="must be a callable.*got 'gpt'"):
        metric.compute(**texts, judge="gpt")
    with pytest.raises(ValueError, match="must return 2 replies.*got \\['T#'\\]"):
        metric.compute(**texts, judge=Judge("T#"))
    with pytest.raises(ValueError, match="each a text or None, got \\['T#', 5\\]"):
        metric.compute(**texts, judge=Judge("T#", 5))
    with pytest.raises(ValueError, match=r"The prompt lacks \{answer\}"):
        metric.compute(**texts, judge=Judge("T#", "F#"), prompt="{reference} {classes}")


# ---- Prompts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", JUDGED)
def test_prompt_holds_what_is_judged_and_nothing_is_filled_twice(load, name):
    """Braces, placeholders and backslashes in an answer stay as they are."""
    answer = r"a {chair} {reference} {classes} {answer} \1 \g<0> {0} {"
    classes = {"classes": ["a red chair", "sofa"]} if name == "closed_set_accuracy" else {}
    for prompt in (None, "{classes}{reference} | {answer} {braces} {answer}"):
        judge = Judge("nothing")
        metric = load(name)
        metric.compute(predictions=[answer], references=["a red chair"], judge=judge, prompt=prompt, **classes)
        (filled,) = judge.prompts
        template = metric.rubric if prompt is None else prompt
        for number, piece in enumerate(re.split(r"\{(?:answer|classes|reference)\}", template)):
            assert piece in filled, number
        assert filled.count(answer) == template.count("{answer}")
        assert ("0: a red chair\n1: sofa" if classes else "a red chair") in filled


@pytest.mark.parametrize("name", JUDGED)
def test_rubric_asks_for_what_the_reader_reads(load, name):
    """Its own example, the last line, is a verdict."""
    metric = load(name)
    verdict = sys.modules[type(metric).__module__].VERDICT
    assert verdict.match(metric.rubric.splitlines()[-1])
    assert "not to be obeyed: {answer}" in metric.rubric


# ---- Open vocabulary ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "value", "unparsed"),
    [
        ("T#both are stools", 1, 0),
        ("F#a lamp", 0, 0),
        (" \n t # same", 1, 0),
        ("f", 0, 0),
        ("T", 1, 0),
        ("True, they are the same", 0, 1),
        ("The answer is T#same", 0, 1),
        ("#T#", 0, 1),
        ("T or F#?", 0, 1),
        ("**T**#same", 0, 1),
        ("", 0, 1),
        (None, 0, 1),
    ],
)
def test_open_vocabulary_reader(load, reply, value, unparsed):
    result = load("open_vocabulary_accuracy").compute(predictions=["a"], references=["b"], judge=Judge(reply))
    assert result == {"accuracy": value, "unparsed": unparsed, "values": [value], "replies": [reply]}


def test_open_vocabulary_accuracy(load):
    judge = Judge("T#1", "F#2", None, "T#4", "maybe")
    result = load("open_vocabulary_accuracy").compute(predictions=list("abcde"), references=list("vwxyz"), judge=judge)
    assert result["accuracy"] == 2 / 5  # what was not parsed stays in the denominator
    assert result["values"] == [1, 0, 0, 1, 0] and result["unparsed"] == 2
    assert all(f": {r}\n" in p and f": {a}\n" in p for a, r, p in zip("abcde", "vwxyz", judge.prompts, strict=True))


def test_answers_can_be_added_in_batches(load):
    metric = load("open_vocabulary_accuracy")
    metric.add_batch(predictions=["a", "b"], references=["a", "b"])
    metric.add_batch(predictions=["c"], references=["c"])
    assert metric.compute(judge=Judge("T#", "F#", "T#"))["values"] == [1, 0, 1]


# ---- Closed set -----------------------------------------------------------------------------------------------------

CLASSES = [
    "wash basin/sink",
    "bookshelf",
    "box",
    "bus",
    "chair",
    "lamp",
    "night_stand",
    "sofa",
    "stairs",
    "table",
    "TV stand",
    "tv",
]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("This is a red chair.", "chair"),
        ("CHAIRS, many of them", "chair"),
        ("An armchair", None),  # whole words only
        ("A couch", "sofa"),
        ("Two settees", "sofa"),
        ("It is a sofa with a table beside it", "sofa"),
        ("A table, with a sofa beside it", "table"),
        ("a TV-stand", "TV stand"),
        ("a tv", "tv"),
        ("tvs", "tv"),
        ("TV stands", "TV stand"),
        ("a tv on a stand", "tv"),
        ("a night stand", "night_stand"),
        ("the nightstands", "night_stand"),
        ("night_stand", "night_stand"),
        ("a wash basin sink", "wash basin/sink"),
        ("Wash-basin/sink.", "wash basin/sink"),
        ("chair/table", "chair"),
        ("a wash basin / sink", "wash basin/sink"),
        ("washbasin sink", "wash basin/sink"),
        ("a night/stand", None),
        ("chair\ntable", "chair"),
        ("A chair\n\nTable next to it.", "chair"),
        ("chair\tlamp", "chair"),
        ("a table lamp", "lamp"),
        ("table-lamps", "lamp"),
        ("a table; lamp", "table"),
        ("a table lamp and a chair", "lamp"),
        ("a stair", "stairs"),
        ("bookshelves", "bookshelf"),
        ("boxes and buses", "box"),
        ("buses", "bus"),
        ("tables' legs", "table"),
        ("portable", None),
        ("", None),
        ("(sofa)?", "sofa"),
    ],
)
def test_class_that_an_answer_names(load, answer, expected):
    result = load("closed_set_accuracy").compute(
        predictions=[answer, answer],
        references=["chair", expected or "lamp"],
        classes=CLASSES,
        aliases={"sofa": ["couch", "settee"]},
    )
    assert result["predicted"] == [expected] * 2 and result["replies"] == [None] * 2
    assert result["values"] == [expected == "chair", expected is not None]
    assert result["unparsed"] == (0 if expected else 2)
    assert result["accuracy"] == sum(result["values"]) / 2


def test_class_that_a_judge_picks(load):
    judge = Judge("1#it is one", " -1 #none", "2#out of range", "chair", "0", "01#a", "1 or 0#", None, "- 1#", "1.5#")
    result = load("closed_set_accuracy").compute(
        predictions=["a chair"] * 10, references=["chair"] * 10, classes=["lamp", "chair"], judge=judge
    )
    assert result["predicted"] == ["chair", None, None, None, "lamp", "chair", None, None, None, None]
    assert result["values"] == [1, 0, 0, 0, 0, 1, 0, 0, 0, 0] and result["accuracy"] == 0.2
    assert result["unparsed"] == 6  # none of the classes is a verdict


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": []}, "classes is empty"),
        ({"classes": "chair"}, "classes must be a list"),
        ({"classes": ["chair", "chair"]}, "each name once"),
        ({"classes": ["lamp"]}, "1 names that are no class: 'chair'"),
        ({"classes": ["chair", "-"]}, "'-' is no name"),
        ({"classes": ["chair"], "aliases": {"sofa": ["couch"]}}, "sofa.*no classes"),
        ({"classes": ["chair"], "aliases": {"chair": "seat"}}, r"aliases\['chair'\] must be a list of texts"),
        ({"classes": ["chair", "sofa"], "aliases": {"chair": ["Sofa"]}}, "names two classes, 'chair' and 'sofa'"),
        ({"classes": ["chair", "tv_stand", "TV-Stand"]}, "names two classes"),
        ({"classes": ["chair"], "prompt": "{answer}{classes}"}, "there is none"),
        ({"classes": ["chair"], "aliases": {}, "judge": Judge("0#")}, "leave aliases out"),
    ],
)
def test_classes_are_checked(load, options, message):
    with pytest.raises(ValueError, match=message):
        load("closed_set_accuracy").compute(predictions=["a chair"], references=["chair"], **options)


# ---- Captions by judge ----------------------------------------------------------------------------------------------


def test_caption_score(load):
    replies = ["85#good", "0#", " 100 ", "87.5#", "101#", "-5#", "eighty#", "85/100#", "٨٥#", None, "85 good", "1000#"]
    result = load("caption_judge_score").compute(predictions=["a"] * 12, references=["b"] * 12, judge=Judge(*replies))
    assert result["values"] == [85, 0, 100, 87.5] + [0] * 8
    assert result["unparsed"] == 8 and result["score"] == 272.5 / 12 and result["replies"] == replies


def test_hallucination(load):
    replies = ["2#1#reason", "0#0#", " 10 # 3 ", "2#", "2#-1#", "a#b", "2#1 wrong", "100#0#", None]
    result = load("hallucination").compute(predictions=["a"] * 9, references=["b"] * 9, judge=Judge(*replies))
    assert result["values"] == {"correct": [2, 0, 10] + [0] * 6, "wrong": [1, 0, 3] + [1] * 6}
    assert result["correctness"] == 12 / 9 and result["hallucination"] == 10 / 9 and result["precision"] == 12 / 22
    assert result["unparsed"] == 6
    nothing = load("hallucination").compute(predictions=["a"], references=["b"], judge=Judge("0#0#nothing said"))
    assert nothing["precision"] == 0 and nothing["unparsed"] == 0


# ---- Overlap --------------------------------------------------------------------------------------------------------


class TinyWordNet:
    """Of WordNet, what nltk's METEOR asks for: the words of the same meaning."""

    MEANINGS = {"sofa": ["sofa", "couch"], "couch": ["sofa", "couch"]}

    def ensure_loaded(self):
        pass

    def synsets(self, word):
        return [self] if word in self.MEANINGS else []

    def lemmas(self):
        return [Lemma(name) for name in ("sofa", "couch")]


class Lemma:
    def __init__(self, name):
        self.name = lambda: name


@pytest.fixture
def wordnet(monkeypatch):
    pytest.importorskip("nltk")
    import nltk.corpus

    monkeypatch.setattr(nltk.corpus, "wordnet", TinyWordNet())


def overlap(metric, prediction, *references, scores=("bleu_1", "bleu_4", "rouge_l", "meteor")):
    result = metric.compute(predictions=[prediction], references=[list(references)], scores=list(scores))
    assert {score: [result[score]] for score in scores} == result["values"]
    return [result[score] for score in scores]


def test_overlap_by_hand(load, wordnet):
    """ "a red chair with legs" (5 words) against "a red chair with four legs" (6).

    BLEU: 5/5 words, 3/4 pairs, 2/3 triples, 1/2 quadruples; brevity exp(1 − 6/5). ROUGE-L: 5 words in order, of 5 and
    of 6. METEOR: precision 1, recall 5/6, 2 chunks of 5 matches.
    """
    brevity = math.exp(1 - 6 / 5)
    fmean = (5 / 6) / (0.9 + 0.1 * 5 / 6)
    assert overlap(load("caption_overlap"), "a red chair with legs", "a red chair with four legs") == pytest.approx(
        [brevity, brevity * (1 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25, 10 / 11, fmean * (1 - 0.5 * (2 / 5) ** 3)]
    )


def test_smoothing_by_hand(load):
    """No pair in common: 0.1 of 1 pair in place of 0 (method 1), and of the longer ones that there are none of."""
    bleu_1, bleu_4 = overlap(load("caption_overlap"), "red chair", "chair red", scores=["bleu_1", "bleu_4"])
    assert bleu_1 == 1 and bleu_4 == pytest.approx((1 * 0.1 * 0.1 * 0.1) ** 0.25)


def test_overlap_takes_one_reference_or_many(load, wordnet):
    metric = load("caption_overlap")
    one = metric.compute(predictions=["a sofa", "a lamp"], references=["a chair", "a lamp"])
    assert one == metric.compute(predictions=["a sofa", "a lamp"], references=[["a chair"], ["a lamp"]])
    assert one["rouge_l"] == 0.75 and one["values"]["rouge_l"] == [0.5, 1.0]
    mixed = metric.compute(predictions=["a sofa", "a lamp"], references=["a chair", ["a chair", "a lamp"]])
    assert mixed == one


def test_overlap_is_that_of_the_libraries(load, wordnet):
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
    from rouge_score.rouge_scorer import RougeScorer

    answer = "This is a 3D model of a wooden chair , which has four legs and a red seat ."
    references = ["A wooden chair with a red cushion.", "a chair that has four wooden legs and a seat"]
    words = [text.split() for text in references]
    method = SmoothingFunction().method1
    rouge = [RougeScorer(["rougeL"]).score(text, answer)["rougeL"].fmeasure for text in references]
    assert overlap(load("caption_overlap"), answer, *references, scores=["bleu_1", "bleu_4", "rouge_l"]) == [
        sentence_bleu(words, answer.split(), (1,), method),
        sentence_bleu(words, answer.split(), (0.25, 0.25, 0.25, 0.25), method),
        max(rouge),
    ]


def test_overlap_of_other_scripts(load):
    """rouge-score's own words would be none, and every score zero."""
    metric, scores = load("caption_overlap"), ["bleu_1", "rouge_l"]
    assert overlap(metric, "большой красный стул", "большой красный стул", scores=scores) == [1, 1]
    assert overlap(metric, "Ein süßer Stuhl", "ein Stuhl", scores=["rouge_l"]) == [pytest.approx(0.8)]
    assert overlap(metric, "这是椅子", "这是桌子", scores=["rouge_l"]) == [0]
    assert overlap(metric, "कुर्सी लाल", "मेज़ लाल", scores=["rouge_l"]) == [0.5]  # with vowel signs, which are no letters
    assert overlap(metric, "su\u0308\u00df", "s\u00fc\u00df", scores=["rouge_l"]) == [1]


def test_meteor_knows_synonyms_and_stems(load, wordnet):
    """All of 3 words match in one chunk, whatever way."""
    metric = load("caption_overlap")
    for reference in ("two red sofas", "two red sofa", "Two red couch"):
        (score,) = overlap(metric, "two red sofa", reference, scores=["meteor"])
        assert score == pytest.approx(1 - 0.5 / 27)
    assert overlap(metric, "two red sofa", "lamp", scores=["meteor"]) == [0]


def test_an_empty_answer_overlaps_with_nothing(load, wordnet):
    assert overlap(load("caption_overlap"), "", "a chair") == [0, 0, 0, 0]


def test_meteor_without_wordnet(load, monkeypatch):
    """The error comes before any other score is computed."""
    import nltk

    monkeypatch.setattr(nltk.data, "path", [])
    monkeypatch.setattr("nltk.translate.bleu_score.sentence_bleu", None)
    with pytest.raises(LookupError, match="python -m nltk.downloader wordnet"):
        load("caption_overlap").compute(predictions=["a"], references=["a"])


@pytest.mark.parametrize("scores", [[], ["bleu"], "bleu_1"])
def test_scores_are_checked(load, scores):
    with pytest.raises(ValueError, match="one or more of bleu_1, bleu_4, rouge_l, meteor"):
        load("caption_overlap").compute(predictions=["a"], references=["a"], scores=scores)


def test_references_are_checked(load):
    with pytest.raises(ValueError, match=r"references\[1\] is empty"):
        load("caption_overlap").compute(predictions=["a", "b"], references=["a", []])
    with pytest.raises(ValueError, match=r"references\[0\]\[1\] must be a text, got 3"):
        load("caption_overlap").compute(predictions=["a"], references=[["a", 3]])


# ---- Similarity -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    """A tiny random BERT with a tokenizer, as a folder of transformers."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("encoder")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "blue", "chair", "lamp", "with", "legs"]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(vocab={word: i for i, word in enumerate(words)}, model_max_length=16).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    model = BertModel(BertConfig(vocab_size=len(words), max_position_embeddings=16, initializer_range=0.5, **sizes))
    model.save_pretrained(folder)
    return folder


ANSWERS = ["a red chair", "a lamp", "a blue chair with legs", " "]
TRUTHS = ["a red chair", "a blue lamp", "a chair", "a lamp"]


def vectors(encoder: Path, text: str) -> tuple[np.ndarray, np.ndarray]:
    """Pooler output and mean of the tokens of one text, alone in its batch."""
    from transformers import AutoModel, AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(encoder)(text, return_tensors="pt")
    with torch.no_grad():
        output = AutoModel.from_pretrained(encoder).eval()(**tokens)
    return output.pooler_output[0].double().numpy(), output.last_hidden_state[0].mean(0).double().numpy()


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return a @ b / np.sqrt((a @ a) * (b @ b))


@pytest.mark.parametrize(("pooling", "which"), [("pooler_output", 0), ("sentence-transformers", 1)])
def test_similarity(load, encoder, pooling, which):
    """Batched and padded it is the cosine of texts encoded alone; sentence-transformers takes the mean by default."""
    if pooling == "sentence-transformers":
        pytest.importorskip("sentence_transformers")
    result = load("sentence_similarity").compute(
        predictions=ANSWERS, references=TRUTHS, encoder=str(encoder), pooling=pooling
    )
    expected = [
        cosine(vectors(encoder, a)[which], vectors(encoder, t)[which])
        for a, t in zip(ANSWERS[:3], TRUTHS[:3], strict=True)
    ]
    assert result["values"] == pytest.approx([*expected, 0.0], abs=1e-5)
    assert result["values"][0] == pytest.approx(1, abs=1e-12) and max(result["values"][1:]) < 0.999
    assert result["similarity"] == sum(result["values"]) / 4


def test_batches_of_many_texts(load, encoder, monkeypatch):
    """Each text keeps its place, whatever batch it falls into."""
    metric = load("sentence_similarity")
    options = {"encoder": str(encoder), "pooling": "pooler_output"}
    answers, truths = ANSWERS[:3] * 4, TRUTHS[1:] * 4
    whole = metric.compute(predictions=answers, references=truths, **options)["values"]
    monkeypatch.setattr(sys.modules[type(metric).__module__], "BATCH_SIZE", 2)
    assert metric.compute(predictions=answers, references=truths, **options)["values"] == pytest.approx(
        whole, abs=1e-5
    )


def test_long_answers_are_cut(load, encoder):
    long = "a red chair " * 50
    result = load("sentence_similarity").compute(
        predictions=[long], references=[long + "lamp"], encoder=str(encoder), pooling="pooler_output"
    )
    assert result["similarity"] == pytest.approx(1, abs=1e-9)


def test_pooler_that_a_folder_lacks(load, encoder, tmp_path):
    from transformers import AutoTokenizer, BertModel

    BertModel.from_pretrained(encoder, add_pooling_layer=False).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(encoder).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="lacks the weights pooler.*would be random"):
        load("sentence_similarity").compute(
            predictions=["a"], references=["a"], encoder=str(tmp_path), pooling="pooler_output"
        )


def test_pooling_is_checked(load):
    with pytest.raises(ValueError, match="sentence-transformers or pooler_output, got 'mean'"):
        load("sentence_similarity").compute(predictions=["a"], references=["a"], encoder="nowhere", pooling="mean")


# ---- Without the libraries ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("missing", "name", "options"),
    [
        ("nltk.translate.bleu_score", "caption_overlap", {"scores": ["bleu_4"]}),
        ("nltk.translate.meteor_score", "caption_overlap", {"scores": ["meteor"]}),
        ("rouge_score.rouge_scorer", "caption_overlap", {"scores": ["rouge_l"]}),
        ("sentence_transformers", "sentence_similarity", {"encoder": "nowhere"}),
    ],
)
def test_missing_libraries_are_named(load, monkeypatch, missing, name, options):
    metric = load(name)
    monkeypatch.setitem(sys.modules, missing, None)
    package = missing.split(".")[0].replace("_", "-")
    with pytest.raises(ImportError, match=rf'needs .*{package}: pip install "minigpt3d\[eval\]"'):
        metric.compute(predictions=["a"], references=["a"], **options)
