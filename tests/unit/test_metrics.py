"""Metrics: values computed by hand and by the libraries, and the folders for `evaluate.load`."""

import doctest
import math
import re
import runpy
import sys
from pathlib import Path
from unittest.mock import MagicMock

import evaluate
import numpy as np
import pytest
import torch
import yaml

from minigpt3d.evaluation import metrics
from minigpt3d.evaluation.metrics import similarity
from minigpt3d.evaluation.metrics.hub_metric import SPACES, write_space
from minigpt3d.evaluation.metrics.table import JUDGE_PROMPTS


NAMES = sorted(path.name for path in SPACES.iterdir())
PROMPT_NAMES = {
    "caption_judge_score": "caption_score",
    "closed_set_accuracy": "closed_set_accuracy",
    "hallucination": "hallucination",
    "open_vocabulary_accuracy": "open_vocabulary_accuracy",
}
JUDGED = list(PROMPT_NAMES)


class Judge:
    """Returns these replies and stores the prompts."""

    def __init__(self, *replies):
        self.replies = list(replies)

    def __call__(self, prompts):
        self.prompts = prompts
        return self.replies


# ---- Folders for evaluate.load and the Hub --------------------------------------------------------------------------


def load(name: str):
    """A metric from its folder. In memory: after an error, evaluate would wait a second for the failed call's file."""
    return evaluate.load(str(SPACES / name), keep_in_memory=True)


def test_names_of_the_metrics():
    assert NAMES == sorted([*JUDGED, "caption_overlap", "sentence_similarity"])
    assert {*NAMES, "PROMPTS"} == set(metrics.__all__)
    assert set(metrics.PROMPTS) == set(PROMPT_NAMES.values()) == set(JUDGE_PROMPTS)


@pytest.mark.parametrize("name", NAMES)
def test_folder_is_a_space_of_the_hub(name, tmp_path):
    folder = tmp_path / name
    write_space(name, folder)
    files = {path.name for path in folder.iterdir() if path.name != "__pycache__"}
    assert files == {f"{name}.py", "README.md", "app.py", "requirements.txt"}
    _, front_matter, card = (folder / "README.md").read_text().split("---\n", 2)
    front_matter = yaml.safe_load(front_matter)
    assert front_matter["tags"] == ["evaluate", "metric"] and front_matter["sdk"] == "gradio"
    assert front_matter["app_file"] == "app.py" and front_matter["title"] and front_matter["description"]
    assert front_matter["license"] == "apache-2.0"
    assert f"# Metric Card for {front_matter['title']}\n" in card
    assert (folder / "requirements.txt").read_text() == "minigpt3d[eval]\n"


@pytest.mark.parametrize("name", NAMES)
def test_page_of_a_space(name, monkeypatch, tmp_path):
    """gradio and nltk's download are replaced: the page shows the card, or a form for the metric of this folder."""
    shown = []
    gradio = MagicMock()
    gradio.Markdown = shown.append
    monkeypatch.setitem(sys.modules, "gradio", gradio)
    monkeypatch.setattr("evaluate.utils.launch_gradio_widget", lambda metric: shown.append(f"# {metric.name}"))
    monkeypatch.setattr("nltk.download", lambda package: shown.append(package))
    write_space(name, tmp_path / name)
    monkeypatch.chdir(tmp_path / name)
    runpy.run_path("app.py")
    if name == "caption_overlap":
        assert shown == ["wordnet", f"# {name}"]
    else:
        assert len(shown) == 1 and "# Metric Card for" in shown[0]


@pytest.mark.parametrize("name", NAMES)
def test_examples_of_the_card(name, monkeypatch):
    monkeypatch.chdir(SPACES.parents[2])
    blocks = re.findall(r"```python\n(.*?)```", (SPACES / name / "README.md").read_text(), re.DOTALL)
    examples = doctest.DocTestParser().get_doctest("\n".join(blocks), {}, name, None, 0)
    assert len(examples.examples) >= 3 or name == "sentence_similarity"  # which needs an encoder from the Hub
    assert doctest.DocTestRunner(verbose=False).run(examples).failed == 0


def test_loaded_metric_is_the_function():
    texts = {"predictions": ["a chair", "a lamp", "a sofa"], "references": ["chair", "sofa", "sofa"]}
    loaded, function = load("closed_set_accuracy"), metrics.closed_set_accuracy
    classes = ["chair", "lamp", "sofa"]
    assert loaded.compute(**texts, classes=classes) == function(**texts, classes=classes)
    assert "Share of answers" in loaded.description and "aliases:" in loaded.inputs_description
    judge, same_judge = Judge("T#", "F#", None), Judge("T#", "F#", None)
    by_folder = load("open_vocabulary_accuracy").compute(**texts, judge=judge)
    assert by_folder == metrics.open_vocabulary_accuracy(**texts, judge=same_judge)
    assert judge.prompts == same_judge.prompts
    for references in (texts["references"], [["a chair", "chair"], ["sofa"], ["sofa"]]):
        pair = {"predictions": texts["predictions"], "references": references, "scores": ["bleu_1", "rouge_l"]}
        assert load("caption_overlap").compute(**pair) == metrics.caption_overlap(**pair)


def test_answers_can_be_added_in_batches():
    metric = load("open_vocabulary_accuracy")
    metric.add_batch(predictions=["a", "b"], references=["a", "b"])
    metric.add_batch(predictions=["c"], references=["c"])
    assert metric.compute(judge=Judge("T#", "F#", "T#"))["values"] == [1, 0, 1]


# ---- Checks ----------------------------------------------------------------------------------------------------------


KEYWORDS = {
    "closed_set_accuracy": {"classes": ["a", "b"]},
    "caption_overlap": {},
    "sentence_similarity": {"encoder": "nowhere"},
}  # the others need a judge


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ([], [], "predictions` is empty"),
        (["a"], [], "references"),
        (None, ["a"], "predictions`.*list.* None"),
        (["a"], None, "references`.*list"),
        ("a chair", ["a"], "predictions`.*list.* 'a chair'"),
        (["a"], "a", "references`.*list"),
        (["a", None], ["a", "b"], r"predictions\[1\]`.* None"),
        (["a", "b"], ["a", 5], r"references\[1\]`.* 5"),
        (["a", "b"], ["a"], "2 `predictions`.*1 `references`"),
    ],
)
def test_columns_are_checked(name, predictions, references, message):
    keywords = KEYWORDS.get(name, {"judge": Judge()})
    with pytest.raises(ValueError, match=message):
        getattr(metrics, name)(predictions, references, **keywords)
    with pytest.raises(ValueError, match=message):
        load(name).compute(predictions=predictions, references=references, **keywords)


@pytest.mark.parametrize("name", JUDGED)
def test_judge_is_checked(name):
    def compute(judge, **keywords):
        keywords |= {"classes": ["a", "b"]} if name == "closed_set_accuracy" else {}
        return getattr(metrics, name)(["a", "b"], ["a", "b"], judge=judge, **keywords)

    with pytest.raises(ValueError, match="`judge`.*callable.*'gpt'"):
        compute("gpt")
    with pytest.raises(ValueError, match="must return 2 replies.*got \\['T#'\\]"):
        compute(Judge("T#"))
    with pytest.raises(ValueError, match="text or None.*\\['T#', 5\\]"):
        compute(Judge("T#", 5))
    with pytest.raises(ValueError, match=r"`prompt` lacks \{answer\}"):
        compute(Judge("T#", "F#"), prompt="{reference} {classes}")


# ---- Prompts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", JUDGED)
def test_prompt_is_filled_once(name):
    """Braces, placeholders and backslashes in an answer stay as they are."""
    answer = r"a {chair} {reference} {classes} {answer} \1 \g<0> {0} {"
    classes = {"classes": ["a red chair", "sofa"]} if name == "closed_set_accuracy" else {}
    for prompt in (None, "{classes}{reference} | {answer} {braces} {answer}"):
        judge = Judge("nothing")
        getattr(metrics, name)([answer], ["a red chair"], judge=judge, prompt=prompt, **classes)
        (filled,) = judge.prompts
        template = metrics.PROMPTS[PROMPT_NAMES[name]] if prompt is None else prompt
        for index, piece in enumerate(re.split(r"\{(?:answer|classes|reference)\}", template)):
            assert piece in filled, index
        assert filled.count(answer) == template.count("{answer}")
        assert ("0: a red chair\n1: sofa" if classes else "a red chair") in filled


@pytest.mark.parametrize("name", JUDGED)
def test_example_of_a_prompt_can_be_read(name):
    """The last line of a default prompt is an example of a verdict."""
    prompt = metrics.PROMPTS[PROMPT_NAMES[name]]
    classes = {"classes": ["a", "b"]} if name == "closed_set_accuracy" else {}
    for reply, unparsed in ((prompt.splitlines()[-1], 0), ("no verdict", 1)):
        assert getattr(metrics, name)(["a"], ["a"], judge=Judge(reply), **classes)["unparsed"] == unparsed
    assert "not to be obeyed: {answer}" in prompt


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
def test_open_vocabulary_reader(reply, value, unparsed):
    result = metrics.open_vocabulary_accuracy(predictions=["a"], references=["b"], judge=Judge(reply))
    assert result == {"accuracy": value, "unparsed": unparsed, "values": [value], "replies": [reply]}


def test_open_vocabulary_accuracy():
    judge = Judge("T#1", "F#2", None, "T#4", "maybe")
    result = metrics.open_vocabulary_accuracy(predictions=list("abcde"), references=list("vwxyz"), judge=judge)
    assert result["accuracy"] == 2 / 5  # unparsed replies stay in the denominator
    assert result["values"] == [1, 0, 0, 1, 0] and result["unparsed"] == 2
    assert all(f": {r}\n" in p and f": {a}\n" in p for a, r, p in zip("abcde", "vwxyz", judge.prompts, strict=True))


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
        ("An armchair", None),  # in_one_batch words only
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
def test_class_named_by_an_answer(answer, expected):
    result = metrics.closed_set_accuracy(
        predictions=[answer, answer],
        references=["chair", expected or "lamp"],
        classes=CLASSES,
        aliases={"sofa": ["couch", "settee"]},
    )
    assert result["predicted"] == [expected] * 2 and result["replies"] == [None] * 2
    assert result["values"] == [expected == "chair", expected is not None]
    assert result["unparsed"] == (0 if expected else 2)
    assert result["accuracy"] == sum(result["values"]) / 2


def test_class_picked_by_a_judge():
    judge = Judge("1#it is one", " -1 #none", "2#out of range", "chair", "0", "01#a", "1 or 0#", None, "- 1#", "1.5#")
    result = metrics.closed_set_accuracy(
        predictions=["a chair"] * 10, references=["chair"] * 10, classes=["lamp", "chair"], judge=judge
    )
    assert result["predicted"] == ["chair", None, None, None, "lamp", "chair", None, None, None, None]
    assert result["values"] == [1, 0, 0, 0, 0, 1, 0, 0, 0, 0] and result["accuracy"] == 0.2
    assert result["unparsed"] == 6  # none of the classes is a verdict


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": []}, "classes` is empty"),
        ({"classes": "chair"}, "classes` must be a list"),
        ({"classes": ["chair", "chair"]}, "each name once"),
        ({"classes": ["lamp"]}, "1 names that are not in `classes`: 'chair'"),
        ({"classes": ["chair", "-"]}, "'-' .* has no letters"),
        ({"classes": ["chair"], "aliases": {"sofa": ["couch"]}}, "sofa.*not in `classes`"),
        ({"classes": ["chair"], "aliases": {"chair": "seat"}}, r"aliases\['chair'\]` must be a list of texts"),
        ({"classes": ["chair", "sofa"], "aliases": {"chair": ["Sofa"]}}, "names two classes, 'chair' and 'sofa'"),
        ({"classes": ["chair", "tv_stand", "TV-Stand"]}, "names two classes"),
        ({"classes": ["chair"], "prompt": "{answer}{classes}"}, "no judge"),
        ({"classes": ["chair"], "aliases": {}, "judge": Judge("0#")}, "leave out `aliases`"),
    ],
)
def test_classes_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        metrics.closed_set_accuracy(predictions=["a chair"], references=["chair"], **options)


# ---- Captions by judge ----------------------------------------------------------------------------------------------


def test_caption_score():
    replies = ["85#good", "0#", " 100 ", "87.5#", "101#", "-5#", "eighty#", "85/100#", "٨٥#", None, "85 good", "1000#"]
    result = metrics.caption_judge_score(predictions=["a"] * 12, references=["b"] * 12, judge=Judge(*replies))
    assert result["values"] == [85, 0, 100, 87.5] + [0] * 8
    assert result["unparsed"] == 8 and result["score"] == 272.5 / 12 and result["replies"] == replies


def test_hallucination():
    replies = ["2#1#reason", "0#0#", " 10 # 3 ", "2#", "2#-1#", "a#b", "2#1 wrong", "100#0#", None]
    result = metrics.hallucination(predictions=["a"] * 9, references=["b"] * 9, judge=Judge(*replies))
    assert result["values"] == {"correct": [2, 0, 10] + [0] * 6, "wrong": [1, 0, 3] + [1] * 6}
    assert result["correctness"] == 12 / 9 and result["hallucination"] == 10 / 9 and result["precision"] == 12 / 22
    assert result["unparsed"] == 6
    nothing = metrics.hallucination(predictions=["a"], references=["b"], judge=Judge("0#0#nothing said"))
    assert nothing["precision"] == 0 and nothing["unparsed"] == 0


# ---- Overlap --------------------------------------------------------------------------------------------------------


class TinyWordNet:
    """The part of WordNet that nltk's METEOR uses: synonyms."""

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


def overlap(prediction, *references, scores=("bleu_1", "bleu_4", "rouge_l", "meteor")):
    result = metrics.caption_overlap([prediction], [list(references)], scores=list(scores))
    assert {score: [result[score]] for score in scores} == result["values"]
    return [result[score] for score in scores]


def test_overlap_by_hand(wordnet):
    """ "a red chair with legs" (5 words) against "a red chair with four legs" (6).

    BLEU: 5/5 words, 3/4 pairs, 2/3 triples, 1/2 quadruples; brevity exp(1 − 6/5). ROUGE-L: 5 words in order, of 5 and
    of 6. METEOR: precision 1, recall 5/6, 2 chunks of 5 matches.
    """
    brevity = math.exp(1 - 6 / 5)
    fmean = (5 / 6) / (0.9 + 0.1 * 5 / 6)
    assert overlap("a red chair with legs", "a red chair with four legs") == pytest.approx(
        [brevity, brevity * (1 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25, 10 / 11, fmean * (1 - 0.5 * (2 / 5) ** 3)]
    )


def test_smoothing_by_hand():
    """Without a common pair of words, method 1 counts 0.1 instead of 0, also for longer n-grams."""
    bleu_1, bleu_4 = overlap("red chair", "chair red", scores=["bleu_1", "bleu_4"])
    assert bleu_1 == 1 and bleu_4 == pytest.approx((1 * 0.1 * 0.1 * 0.1) ** 0.25)


def test_overlap_takes_one_reference_or_many(wordnet):
    metric = metrics.caption_overlap
    one = metric(predictions=["a sofa", "a lamp"], references=["a chair", "a lamp"])
    assert one == metric(predictions=["a sofa", "a lamp"], references=[["a chair"], ["a lamp"]])
    assert one["rouge_l"] == 0.75 and one["values"]["rouge_l"] == [0.5, 1.0]
    mixed = metric(predictions=["a sofa", "a lamp"], references=["a chair", ["a chair", "a lamp"]])
    assert mixed == one


def test_overlap_equals_the_libraries(wordnet):
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
    from rouge_score.rouge_scorer import RougeScorer

    answer = "This is a 3D model of a wooden chair , which has four legs and a red seat ."
    references = ["A wooden chair with a red cushion.", "a chair that has four wooden legs and a seat"]
    words = [text.split() for text in references]
    method = SmoothingFunction().method1
    rouge = [RougeScorer(["rougeL"]).score(text, answer)["rougeL"].fmeasure for text in references]
    assert overlap(answer, *references, scores=["bleu_1", "bleu_4", "rouge_l"]) == [
        sentence_bleu(words, answer.split(), (1,), method),
        sentence_bleu(words, answer.split(), (0.25, 0.25, 0.25, 0.25), method),
        max(rouge),
    ]


def test_overlap_of_other_scripts():
    """rouge-score's tokenizer would find no words, and every score would be 0."""
    scores = ["bleu_1", "rouge_l"]
    assert overlap("большой красный стул", "большой красный стул", scores=scores) == [1, 1]
    assert overlap("Ein süßer Stuhl", "ein Stuhl", scores=["rouge_l"]) == [pytest.approx(0.8)]
    assert overlap("这是椅子", "这是桌子", scores=["rouge_l"]) == [0]
    assert overlap("कुर्सी लाल", "मेज़ लाल", scores=["rouge_l"]) == [0.5]  # vowel signs are marks, not letters
    assert overlap("su\u0308\u00df", "s\u00fc\u00df", scores=["rouge_l"]) == [1]


def test_meteor_knows_synonyms_and_stems(wordnet):
    """All 3 words match in one chunk, in each of the three ways."""
    for reference in ("two red sofas", "two red sofa", "Two red couch"):
        (score,) = overlap("two red sofa", reference, scores=["meteor"])
        assert score == pytest.approx(1 - 0.5 / 27)
    assert overlap("two red sofa", "lamp", scores=["meteor"]) == [0]


def test_overlap_of_an_empty_answer(wordnet):
    assert overlap("", "a chair") == [0, 0, 0, 0]


def test_meteor_without_wordnet(monkeypatch):
    """The error comes before any other score is computed."""
    import nltk

    monkeypatch.setattr(nltk.data, "path", [])
    monkeypatch.setattr("nltk.translate.bleu_score.sentence_bleu", None)
    with pytest.raises(LookupError, match="python -m nltk.downloader wordnet"):
        metrics.caption_overlap(predictions=["a"], references=["a"])


@pytest.mark.parametrize("scores", [[], ["bleu"], "bleu_1"])
def test_scores_are_checked(scores):
    with pytest.raises(ValueError, match="bleu_1, bleu_4, rouge_l, meteor"):
        metrics.caption_overlap(predictions=["a"], references=["a"], scores=scores)


def test_references_are_checked():
    with pytest.raises(ValueError, match=r"references\[1\]` is empty"):
        metrics.caption_overlap(predictions=["a", "b"], references=["a", []])
    with pytest.raises(ValueError, match=r"references\[0\]\[1\]`.*text.* 3"):
        metrics.caption_overlap(predictions=["a"], references=[["a", 3]])


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
REFERENCES = ["a red chair", "a blue lamp", "a chair", "a lamp"]


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
def test_similarity(encoder, pooling, which):
    """Batching and padding do not change the cosine; sentence-transformers takes the mean of the tokens by default."""
    if pooling == "sentence-transformers":
        pytest.importorskip("sentence_transformers")
    result = metrics.sentence_similarity(
        predictions=ANSWERS, references=REFERENCES, encoder=str(encoder), pooling=pooling
    )
    expected = [
        cosine(vectors(encoder, a)[which], vectors(encoder, t)[which])
        for a, t in zip(ANSWERS[:3], REFERENCES[:3], strict=True)
    ]
    assert result["values"] == pytest.approx([*expected, 0.0], abs=1e-5)
    assert result["values"][0] == pytest.approx(1, abs=1e-12) and max(result["values"][1:]) < 0.999
    assert result["similarity"] == sum(result["values"]) / 4


def test_batches_of_many_texts(encoder, monkeypatch):
    """The result does not depend on the batch size."""
    metric = metrics.sentence_similarity
    options = {"encoder": str(encoder), "pooling": "pooler_output"}
    answers, references = ANSWERS[:3] * 4, REFERENCES[1:] * 4
    in_one_batch = metric(predictions=answers, references=references, **options)["values"]
    monkeypatch.setattr(similarity, "BATCH_SIZE", 2)
    assert metric(predictions=answers, references=references, **options)["values"] == pytest.approx(
        in_one_batch, abs=1e-5
    )


def test_long_answers_are_truncated(encoder):
    long = "a red chair " * 50
    result = metrics.sentence_similarity(
        predictions=[long], references=[long + "lamp"], encoder=str(encoder), pooling="pooler_output"
    )
    assert result["similarity"] == pytest.approx(1, abs=1e-9)


def test_missing_pooler(encoder, tmp_path):
    from transformers import AutoTokenizer, BertModel

    BertModel.from_pretrained(encoder, add_pooling_layer=False).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(encoder).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="weights pooler.*random"):
        metrics.sentence_similarity(
            predictions=["a"], references=["a"], encoder=str(tmp_path), pooling="pooler_output"
        )


def test_pooling_is_checked():
    with pytest.raises(ValueError, match="sentence-transformers or pooler_output, got 'mean'"):
        metrics.sentence_similarity(predictions=["a"], references=["a"], encoder="nowhere", pooling="mean")


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
def test_missing_libraries_are_named(monkeypatch, missing, name, options):
    metric = getattr(metrics, name)
    monkeypatch.setitem(sys.modules, missing, None)
    package = missing.split(".")[0].replace("_", "-")
    with pytest.raises(ImportError, match=rf'needs .*{package}: pip install "minigpt3d\[eval\]"'):
        metric(predictions=["a"], references=["a"], **options)
