"""`pipeline("zero-shot-point-cloud-classification")`: scores, forms of labels, batches, errors."""

import numpy as np
import pytest
import transformers
from ways_in import make_cloud, make_processor, make_seeing_model

import minigpt3d
from minigpt3d.evaluation.likelihood import class_log_likelihoods
from minigpt3d.evaluation.suites import OWN
from minigpt3d.evaluation.zero_shot import TASK, rank_labels
from minigpt3d.hub import save_pretrained


LABELS = ["chair", "washing machine", "lamp"]


@pytest.fixture(scope="module")
def classify():
    return minigpt3d.ZeroShotPointCloudClassificationPipeline(model=make_seeing_model(), processor=make_processor())


@pytest.fixture(scope="module")
def clouds():
    return [make_cloud(seed) for seed in range(3)]


def test_scores_are_shares_of_likelihoods(classify, clouds):
    (result,) = classify(clouds[:1], candidate_labels=LABELS, up_axis="y")
    expected, _ = class_log_likelihoods(
        classify.model, classify.processor, clouds[:1], "What is this?", LABELS, OWN.phrases, up_axis="y"
    )
    shares = np.exp(expected[0]) / np.exp(expected[0]).sum()
    got = {entry["label"]: entry["score"] for entry in result}
    assert got == pytest.approx(dict(zip(LABELS, shares, strict=True)), rel=1e-4)
    assert [entry["score"] for entry in result] == sorted(got.values(), reverse=True)
    assert classify(clouds[0], candidate_labels=LABELS, up_axis="y") == result


def test_batches_agree_with_single_objects(classify, clouds):
    single = [
        {entry["label"]: entry["score"] for entry in classify(cloud, candidate_labels=LABELS)} for cloud in clouds
    ]
    for inputs in (clouds, (cloud for cloud in clouds)):
        together = classify(inputs, candidate_labels=LABELS, batch_size=2)
        for one, other in zip(single, together, strict=True):
            assert one == pytest.approx({entry["label"]: entry["score"] for entry in other}, rel=1e-4)
    assert single[0] != single[1]


def test_names_of_a_label_and_forms(classify, clouds):
    alone = classify(clouds[0], candidate_labels=["sofa", "couch", "lamp"], hypothesis_template="It is a {}.")
    shares = {entry["label"]: entry["score"] for entry in alone}
    joined = classify(
        clouds[0], candidate_labels={"sofa": ["sofa", "couch"], "lamp": "lamp"}, hypothesis_template=["It is a {}."]
    )
    got = {entry["label"]: entry["score"] for entry in joined}
    assert got == pytest.approx({"sofa": shares["sofa"] + shares["couch"], "lamp": shares["lamp"]}, rel=1e-4)
    other = classify(clouds[0], candidate_labels=["sofa", "couch", "lamp"], prompt="What color is it?")
    assert {entry["label"]: entry["score"] for entry in other} != shares


def test_the_task_is_registered(tmp_path, classify, clouds):
    save_pretrained(classify.model, classify.processor, tmp_path / "model")
    loaded = transformers.pipeline(TASK, model=str(tmp_path / "model"), device="cpu")
    assert type(loaded) is type(classify)
    expected = classify(clouds[0], candidate_labels=LABELS)
    assert [entry["label"] for entry in loaded(clouds[0], candidate_labels=LABELS)] == [
        entry["label"] for entry in expected
    ]


@pytest.mark.parametrize(
    "arguments, problem",
    [
        ({"candidate_labels": []}, "candidate_labels"),
        ({"candidate_labels": "chair, table"}, "candidate_labels"),
        ({"candidate_labels": ["a", "a"]}, "different"),
        ({"candidate_labels": ["a", " "]}, "empty"),
        ({"candidate_labels": ["a", 1]}, "candidate_labels"),
        ({"candidate_labels": {"a": []}}, "candidate_labels"),
        ({"candidate_labels": ["a###", "b"]}, "###"),
        ({"candidate_labels": ["a", "b"], "hypothesis_template": "This."}, "{}"),
        ({"candidate_labels": ["a", "b"], "prompt": " "}, "prompt"),
        ({"candidate_labels": ["a", "b"], "prompt": ["x"]}, "prompt"),
        ({"candidate_labels": ["a", "b"], "num_beams": 2}, "num_beams"),
    ],
)
def test_wrong_arguments(classify, clouds, arguments, problem):
    with pytest.raises(ValueError, match=problem):
        classify(clouds[0], **arguments)


def test_conversations_are_refused(classify, clouds):
    chat = [{"role": "user", "content": [{"type": "point_cloud", "point_cloud": clouds[0]}]}]
    with pytest.raises(ValueError, match="conversation"):
        classify(chat, candidate_labels=LABELS)


def test_ties_keep_their_order():
    assert [entry["label"] for entry in rank_labels(np.array([-3.0, -1.0, -1.0]), ["a", "b", "c"])] == ["b", "c", "a"]
    assert rank_labels(np.array([-2000.0, -3000.0]), ["a", "b"])[0]["score"] == 1
