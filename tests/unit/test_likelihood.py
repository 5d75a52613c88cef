"""Class likelihoods: equal to separate passes for each answer, tokens as in training, shared prefix computed once."""

from pathlib import Path

import numpy as np
import pytest
import torch
from backbones import BACKBONES
from tiny_model import make_tiny_config, make_tiny_model
from tokenizers_of_others import llama_style, qwen_style, wordpiece_style

from minigpt3d.evaluation.conditions import apply
from minigpt3d.evaluation.likelihood import (
    ANSWERS_AT_ONCE,
    check_texts,
    class_log_likelihoods,
    encode_answers,
    rank_classes,
)
from minigpt3d.evaluation.suites import SUITES
from minigpt3d.evaluation.vocabulary.kinds import KINDS
from minigpt3d.modeling_minigpt3d import MiniGPT3DForConditionalGeneration
from minigpt3d.processing_minigpt3d import MiniGPT3DPointCloudProcessor, MiniGPT3DProcessor, prepare_tokenizer


ROOT = Path(__file__).parents[2]
QUESTION = "What is this?"
# A prefix of another name, names of one and of several tokens, blanks, signs, other scripts.
CLASSES = ["lamp", "lamp post", "chair", "night stand", "TV (old)", "Stühle", "x", "灯"]


@pytest.fixture(scope="module")
def clouds():
    """Very different clouds, because a random network hardly distinguishes similar ones."""
    rng = np.random.default_rng(0)
    rod, sheet, cube = rng.random((100, 6)), rng.random((150, 6)), rng.random((200, 6))
    rod[:, 1:3], rod[:, 3:] = 0, 0
    sheet[:, 2], sheet[:, 3:] = 0, 1
    return [rod, sheet, cube]


def make_model(backbone: str = "phi") -> MiniGPT3DForConditionalGeneration:
    """A tiny model whose projections are scaled up, so that scores of different clouds differ by more than the tolerance."""
    model = make_tiny_model(make_tiny_config(**BACKBONES[backbone]))
    for part in (model.model.point_projection, model.model.language_projection):
        part.linear_2.weight.data *= 20
    return model


@pytest.fixture(scope="module")
def model():
    return make_model()


def conversation(cloud: np.ndarray, answer: str) -> list[dict]:
    content = [{"type": "point_cloud", "point_cloud": cloud}, {"type": "text", "text": QUESTION}]
    return [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]


@torch.no_grad()
def separate_passes(model, processor, clouds, texts) -> tuple[np.ndarray, np.ndarray]:
    """Likelihoods from one pass over the complete text per answer, as in training: (B, texts) and tokens (texts,)."""
    sums, counts = np.zeros((len(clouds), len(texts))), np.zeros(len(texts))
    for row, cloud in enumerate(clouds):
        for column, text in enumerate(texts):
            batch = processor.encode_training([conversation(cloud, text)])
            labels = batch.pop("labels")[0, 1:]
            log_probabilities = model(**batch).logits[0, :-1].double().log_softmax(-1)
            scored = labels != -100
            sums[row, column] = log_probabilities[scored, labels[scored]].sum()
            counts[column] = scored.sum()
    return sums, counts


# ---- Equal to separate passes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", ["phi", "llama", "qwen3", "gpt2-tied", "opt-tied"])
def test_equal_to_separate_passes(tiny_processor, clouds, backbone):
    model = make_model(backbone)
    expected, counts = separate_passes(model, tiny_processor, clouds, CLASSES)
    assert counts.min() == 3 and len(set(counts)) > 4 and expected.std(axis=0).mean() > 1e-3  # the cloud matters
    for batch_size in (1, 2, 32):
        got, tokens = class_log_likelihoods(model, tiny_processor, clouds, QUESTION, CLASSES, batch_size=batch_size)
        assert got.dtype == np.float64 and np.array_equal(tokens, counts)
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("answer", ["This is a {}.", "{} it is", "a{}b"])
def test_names_in_a_phrase(model, tiny_processor, clouds, answer):
    texts = [answer.replace("{}", name) for name in CLASSES]
    expected, counts = separate_passes(model, tiny_processor, clouds, texts)
    got, tokens = class_log_likelihoods(model, tiny_processor, clouds, QUESTION, CLASSES, [answer])
    assert np.array_equal(tokens, counts)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4)


def test_likelihoods_of_several_phrases_are_added(model, tiny_processor, clouds):
    answers = ["A red {}.", "A big {}.", "A {} is it."]
    got, tokens = class_log_likelihoods(model, tiny_processor, clouds, QUESTION, CLASSES, answers)
    texts = [answer.replace("{}", name) for name in CLASSES for answer in answers]
    expected, counts = separate_passes(model, tiny_processor, clouds, texts)
    probabilities = np.exp(expected.reshape(3, len(CLASSES), 3)).sum(-1)
    np.testing.assert_allclose(got, np.log(probabilities), rtol=0, atol=1e-4)
    assert (got - expected.reshape(3, len(CLASSES), 3).max(-1)).min() > 0.01  # the best phrase alone has less
    np.testing.assert_allclose(tokens, counts.reshape(-1, 3).mean(1))


def test_benchmark_template(model, tiny_processor, clouds):
    (got,), _ = class_log_likelihoods(model, tiny_processor, clouds[:1], QUESTION, ["chair"], template="benchmark")
    chat = conversation(clouds[0], "chair")
    arguments = {"chat_template": "benchmark", "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    batch = tiny_processor.apply_chat_template(chat, **arguments)
    length = tiny_processor.apply_chat_template(chat[:1], **arguments)["input_ids"].shape[1]
    with torch.no_grad():
        logits = model(**batch).logits[0, length - 1 : -1].double().log_softmax(-1)
    expected = logits.gather(1, batch["input_ids"][0, length:, None]).sum()
    assert got[0] == pytest.approx(expected.item(), abs=1e-4)
    (default,), _ = class_log_likelihoods(model, tiny_processor, clouds[:1], QUESTION, ["chair"])
    assert abs(default[0] - got[0]) > 1e-3


def test_a_class_has_the_same_likelihood_alone(model, tiny_processor, clouds):
    """Alone, nearly the complete answer is the common prefix."""
    all_classes, tokens = class_log_likelihoods(model, tiny_processor, clouds, QUESTION, CLASSES)
    for column, name in enumerate(CLASSES):
        alone, count = class_log_likelihoods(model, tiny_processor, clouds, QUESTION, [name])
        np.testing.assert_allclose(alone[:, 0], all_classes[:, column], rtol=0, atol=1e-4)
        assert count == tokens[column]


def test_results_repeat_exactly(model, tiny_processor, clouds):
    first, _ = class_log_likelihoods(model, tiny_processor, clouds, QUESTION, CLASSES)
    again, _ = class_log_likelihoods(model, tiny_processor, clouds, QUESTION, CLASSES)
    assert np.array_equal(first, again)


def test_blind_clouds_give_equal_likelihoods(model, tiny_processor, clouds):
    blind = [apply("blind", cloud, "a") for cloud in clouds]
    got, _ = class_log_likelihoods(model, tiny_processor, blind, QUESTION, CLASSES)
    seeing, _ = class_log_likelihoods(model, tiny_processor, clouds, QUESTION, CLASSES)
    np.testing.assert_allclose(got, got[:1].repeat(3, 0), rtol=0, atol=1e-5)
    assert np.abs(got - seeing).max() > 1e-3


def test_half_precision(model, tiny_processor, clouds):
    """Sums are float64, so only the model rounds."""
    expected, _ = class_log_likelihoods(model, tiny_processor, clouds, QUESTION, CLASSES)
    got, _ = class_log_likelihoods(make_model().to(torch.bfloat16), tiny_processor, clouds, QUESTION, CLASSES)
    np.testing.assert_allclose(got, expected, rtol=0.03)


# ---- Tokens -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [None, qwen_style, llama_style, wordpiece_style])
def test_tokens_are_those_of_training(tiny_tokenizer, clouds, make):
    tokenizer = prepare_tokenizer(make()) if make else tiny_tokenizer
    processor = MiniGPT3DProcessor(MiniGPT3DPointCloudProcessor(num_points=32), tokenizer, num_query_tokens=5)
    texts = [*CLASSES, "A chair.", " chair", "It is a chair, with four legs."]
    prompt, answers = encode_answers(processor, QUESTION, texts)
    for text, ids in zip(texts, answers, strict=True):
        batch = processor.encode_training([conversation(clouds[0], text)])
        assert [*prompt, *ids] == batch["input_ids"][0].tolist()
        assert ids == batch["labels"][0][batch["labels"][0] != -100].tolist()
    assert prompt.count(processor.point_token_id) == 5


# ---- Cost -------------------------------------------------------------------------------------------------------------


def test_a_cloud_is_encoded_once_and_rows_are_bounded(model, tiny_processor, clouds, monkeypatch):
    encoded, passes = [], []
    encode, forward = model.model.get_point_features, model.model.forward

    def counting_encode(point_clouds, **kwargs):
        encoded.append(len(point_clouds))
        return encode(point_clouds, **kwargs)

    def counting_forward(input_ids, **kwargs):
        passes.append(tuple(input_ids.shape))
        return forward(input_ids, **kwargs)

    monkeypatch.setattr(model.model, "get_point_features", counting_encode)
    monkeypatch.setattr(model.model, "forward", counting_forward)
    class_log_likelihoods(model, tiny_processor, clouds, QUESTION, CLASSES, ["Here is a {}."], batch_size=2)
    assert encoded == [2, 1]
    assert max(rows for rows, _ in passes) <= 2 * min(ANSWERS_AT_ONCE, len(CLASSES))
    prompt, answers = encode_answers(tiny_processor, QUESTION, [f"Here is a {name}." for name in CLASSES])
    begin = len(encode_answers(tiny_processor, QUESTION, ["Here is a"])[1][0]) - 1  # without ###
    prefixes = [width for rows, width in passes if width >= len(prompt) + begin - 1]
    assert len(prefixes) == 2  # one per batch
    lengths = {len(ids) for ids in answers}
    assert len(passes) <= 2 + 2 * len(lengths)  # answers of equal length share a pass
    assert max(width for _, width in passes if width not in prefixes) <= max(lengths) - begin
    passes.clear()
    monkeypatch.setattr("minigpt3d.evaluation.likelihood.ANSWERS_AT_ONCE", 1)
    class_log_likelihoods(model, tiny_processor, clouds, QUESTION, CLASSES, ["Here is a {}."], batch_size=2)
    assert {rows for rows, _ in passes} == {1, 2}


# ---- Ranking ----------------------------------------------------------------------------------------------------------


def test_rank_by_likelihood_per_token():
    log_likelihoods = np.array([[-4.0, -6.0, -3.0, -3.0], [-8.0, -6.0, -30.0, -1.0]])
    tokens = np.array([2.0, 4.0, 1.0, 1.0])
    # per token: -2, -1.5, -3, -3 and -4, -1.5, -30, -1
    assert rank_classes(log_likelihoods, tokens, range(4)).tolist() == [[1, 0, 2, 3], [3, 1, 0, 2]]
    # A class has the likelihood of its better name. Here names 0 and 2 belong to one class, 1 and 3 to the other.
    assert rank_classes(log_likelihoods.tolist(), tokens.tolist(), [1, 0, 1, 0]).tolist() == [[0, 1], [0, 1]]
    assert rank_classes(log_likelihoods[:1], tokens, [0, 1, 1, 1]).tolist() == [[1, 0]]


@pytest.mark.parametrize("suite", ["household", "own"])
def test_bundled_model_classifies_the_demo_objects(suite):
    """Also with phrases that it was not trained on."""
    folder = ROOT / "checkpoints" / "household"
    model = MiniGPT3DForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    processor = MiniGPT3DProcessor.from_pretrained(folder)
    names = ("drawersCabinet.npy", "oakTable.ply", "osakaChair.obj")
    clouds = [processor.feature_extractor(ROOT / "demo" / "objects" / name)["point_clouds"][0] for name in names]
    result = class_log_likelihoods(model, processor, clouds, QUESTION, list(KINDS), SUITES[suite].phrases)
    assert [list(KINDS)[order[0]] for order in rank_classes(*result, range(len(KINDS)))] == [
        "cabinet",
        "table",
        "chair",
    ]


# ---- Checks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("classes", "phrases", "words"),
    [
        (["a", "b", "a"], ["{}"], "classes.*'a'"),
        (["a###"], ["{}"], "classes.*'a###' contains ###"),
        (["<point>"], ["{}"], "classes.*contains <point>"),
        (["a"], ["{}", "{}"], "`phrase`.*more than once"),
        (["a"], ["a chair"], "`phrase`.*{} once.* got 'a chair'"),
        (["a"], ["{} {}"], "`phrase`.*{} once"),
        (["a"], ["{} [/INST]"], r"`phrase`.*contains \[/INST\]"),
    ],
)
def test_texts_are_checked(classes, phrases, words):
    with pytest.raises(ValueError, match=words):
        check_texts(classes, phrases)


def test_an_answer_that_is_longer_than_the_context_is_named(model, tiny_processor, clouds):
    tiny_processor.tokenizer.model_max_length = 100
    with pytest.raises(ValueError, match="'chair chair .* the context has"):
        class_log_likelihoods(model, tiny_processor, clouds[:1], "What?", ["chair " * 3000, "chair"])
