"""The table of stages: trainable parameters, learning rates and samples are the paper's."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from training_runs import STAGES

from minigpt3d.configuration_minigpt3d import MiniGPT3DConfig
from minigpt3d.conversion.names import authors_name
from minigpt3d.modeling_minigpt3d import MiniGPT3DForConditionalGeneration
from minigpt3d.training.stages import learning_rate, select_trainable
from minigpt3d.training.weights import named_parameters, prepare_model, trainable_table


FACTS = {"I": "stage_1", "II": "stage_2", "III": "stage_3", "IV": "stage_4"}


@pytest.mark.parametrize("name", FACTS)
def test_trainable_parameters_equal_the_paper(name, golden):
    """At full size: names, shapes and counts of facts/trainable_full.json, one to one."""
    facts = golden("trainable_full.json")[FACTS[name]]
    with torch.device("meta"):
        model = prepare_model(MiniGPT3DForConditionalGeneration(MiniGPT3DConfig(router_type="none")), STAGES[name])
    shapes = {authors_name(n): list(p.shape) for n, p in named_parameters(model).items() if p.requires_grad}
    expected_shapes = facts["trainable_shapes"]
    assert shapes.keys() == expected_shapes.keys()
    for key, shape in expected_shapes.items():  # their query tokens have a batch dimension
        assert shapes[key] == (shape[1:] if key.startswith("query_") and len(shape) == 3 else shape), key
    total = sum(p.numel() for p in model.parameters() if p.requires_grad)
    expected = {"I": 1_378_432, "II": 47_417_984, "III": 47_417_984, "IV": 395_528}[name]
    assert total == expected == facts["trainable_total"]
    assert f"{expected:,}" in trainable_table(model).splitlines()[-1]


def test_union_of_the_stages_equals_the_paper(golden):
    facts = golden("trainable_full.json")
    assert facts["union"]["total"] == 47_788_936
    with torch.device("meta"):
        model = prepare_model(MiniGPT3DForConditionalGeneration(MiniGPT3DConfig(router_type="none")), STAGES["II"])
    sizes = {name: parameter.numel() for name, parameter in named_parameters(model).items()}
    union = set().union(*(select_trainable(stage, sizes) for stage in STAGES.values()))
    assert sum(sizes[name] for name in union) == 47_788_936


def test_learning_rates_equal_the_authors(golden):
    facts = golden("data_facts.json")["lr_schedule"]["values"]
    for name, key in FACTS.items():
        for value in facts[key]["values"]:
            assert learning_rate(STAGES[name], value["global_step"]) == pytest.approx(value["lr"], rel=1e-12)
    case = facts["synthetic_warmup_crosses_epoch"]
    stage = replace(
        STAGES["I"],
        peak_lr=case["init_lr"],
        min_lr=case["min_lr"],
        warmup_lr=case["warmup_lr"],
        warmup_steps=case["warmup_steps"],
        steps_per_epoch=case["iters_per_epoch"],
        epochs=case["max_epoch"],
    )
    rates = [learning_rate(stage, step) for step in range(stage.steps)]
    assert rates == pytest.approx(case["values"], rel=1e-12)


def test_paper_sees_a_million_and_a_half_samples():
    def samples(stage):
        weights = sum(source.weight for source in stage.mixture)
        return stage.steps * sum(source.batch * source.weight for source in stage.mixture) / weights

    assert sum(samples(STAGES[name]) for name in FACTS) == pytest.approx(1.53e6, rel=0.01)


def test_a_pattern_that_matches_nothing_is_an_error():
    stage = replace(STAGES["I"], trainable=(r"model\.point_projection\..*", r"model\.proj2\..*"))
    with pytest.raises(ValueError, match=r"proj2.*none of"):
        select_trainable(stage, ["model.point_projection.linear_1.weight"])


def test_importing_the_table_is_cheap():
    code = (
        "import sys, minigpt3d.training.stages\n"
        "assert not {'torch', 'transformers', 'accelerate', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
