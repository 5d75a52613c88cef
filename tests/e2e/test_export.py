"""The model in one graph: `torch.compile`, `torch.export` and, if its libraries are installed, ONNX."""

import pytest
import torch
from tiny_model import POINT_TOKEN_ID, make_tiny_config, make_tiny_model
from torch.export import Dim


@pytest.fixture(scope="module")
def model():
    config = make_tiny_config()
    config.point_config.num_groups = 6
    return make_tiny_model(config).requires_grad_(False)


class Encoder(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model.model

    def forward(self, point_clouds):
        return self.model.get_point_features(point_clouds).pooler_output


def make_clouds(count: int, num_points: int) -> torch.Tensor:
    return torch.rand(count, num_points, 6, generator=torch.Generator().manual_seed(count))


def make_prompt(rows: int, num_words: int, num_points: int = 128) -> dict:
    """A cloud and some words in each row."""
    words = torch.randint(0, 280, (rows, num_words), generator=torch.Generator().manual_seed(rows))
    input_ids = torch.cat([torch.full((rows, 6), POINT_TOKEN_ID), words], dim=1)
    mask = torch.ones_like(input_ids)
    return {"input_ids": input_ids, "attention_mask": mask, "point_clouds": make_clouds(rows, num_points)}


@pytest.fixture
def prompt():
    return make_prompt(2, 5)


# The sizes that are exported, and others that the result must take.
EXPORTED, OTHERS = (2, 128), ((1, 8), (3, 300))


@pytest.fixture(scope="module")
def exported(model):
    """The encoder, for any number of clouds and points."""
    sizes = {"point_clouds": {0: Dim("clouds"), 1: Dim("points", min=8)}}
    return torch.export.export(Encoder(model), (make_clouds(*EXPORTED),), dynamic_shapes=sizes)


@pytest.mark.slow
def test_encoder_and_prefill_compile_to_one_graph(model, prompt):
    """With the operators of the eager model: the same numbers."""
    torch.compiler.reset()
    clouds = prompt["point_clouds"]
    encode = torch.compile(model.get_point_features, fullgraph=True, backend="eager")
    assert torch.equal(encode(clouds).pooler_output, model.get_point_features(clouds).pooler_output)
    prefill = torch.compile(model.forward, fullgraph=True, backend="eager")
    assert torch.equal(prefill(**prompt, use_cache=False).logits, model(**prompt, use_cache=False).logits)


def test_a_wrong_start_is_refused_in_compiled_code(model, prompt):
    encode = torch.compile(model.get_point_features, fullgraph=True, backend="eager")
    with pytest.raises(ValueError, match="fps_start must be between 0 and"):
        encode(prompt["point_clouds"], torch.tensor([0, 100_000]))


def test_an_exported_encoder_has_operations_of_torch_alone(model, exported):
    targets = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    assert targets and all(target.startswith(("aten.", "<built-in function")) for target in targets), targets
    for sizes in (EXPORTED, *OTHERS):
        clouds = make_clouds(*sizes)
        assert torch.equal(exported.module()(clouds), model.get_point_features(clouds).pooler_output)


@pytest.mark.slow
def test_onnx_encoder(model, exported, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    torch.onnx.export(exported, dynamo=True, verbose=False).save(tmp_path / "encoder.onnx")
    session = runtime.InferenceSession(tmp_path / "encoder.onnx", providers=["CPUExecutionProvider"])
    for sizes in (EXPORTED, *OTHERS):
        clouds = make_clouds(*sizes)
        (vectors,) = session.run(None, {session.get_inputs()[0].name: clouds.numpy()})
        expected = model.get_point_features(clouds).pooler_output
        torch.testing.assert_close(torch.from_numpy(vectors), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_onnx_prefill(model):
    """By transformers' exporter: a prompt with clouds, for any number of rows, words and points."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    exported = OnnxExporter().export(model, make_prompt(2, 5) | {"use_cache": False}, config=OnnxConfig(dynamic=True))
    for sizes in ((2, 5, 128), (1, 9, 64), (3, 20, 300)):
        prompt = make_prompt(*sizes)
        expected = model(**prompt, use_cache=False).logits
        torch.testing.assert_close(exported(**prompt).logits, expected, rtol=1e-4, atol=1e-4)


def make_step(model, rows: int, num_words: int) -> dict:
    """One token after a prompt with clouds, with its cache."""
    prompt = make_prompt(rows, num_words)
    length = prompt["input_ids"].shape[1]
    return {
        "input_ids": torch.arange(7, 7 + rows)[:, None],
        "attention_mask": torch.ones(rows, length + 1, dtype=torch.long),
        "position_ids": torch.full((rows, 1), length),
        "past_key_values": model(**prompt, use_cache=True).past_key_values,
    }


@pytest.mark.slow
def test_onnx_step_of_generation(model):
    """By transformers' exporter, for any number of rows and length of the cache."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    exported = OnnxExporter().export(model, make_step(model, 2, 5), config=OnnxConfig(dynamic=True))
    for rows, num_words in ((2, 5), (1, 9), (3, 20)):
        expected = model(**make_step(model, rows, num_words)).logits
        logits = exported(**make_step(model, rows, num_words)).logits
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
