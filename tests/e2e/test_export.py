"""The model in one graph: `torch.compile`, `torch.export` and, if its libraries are installed, ONNX."""

import copy

import pytest
import torch
from tiny_model import POINT_TOKEN_ID, make_tiny_config, make_tiny_model


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


@pytest.fixture
def prompt(point_clouds):
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(0, 280, (2, 5), generator=generator)
    input_ids = torch.cat([torch.full((2, 6), POINT_TOKEN_ID), words], dim=1)
    mask = torch.ones_like(input_ids)
    return {"input_ids": input_ids, "attention_mask": mask, "point_clouds": point_clouds[:2]}


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


def test_an_exported_encoder_has_operations_of_torch_alone(model, prompt):
    clouds = prompt["point_clouds"]
    exported = torch.export.export(Encoder(model), (clouds,))
    targets = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    assert targets and all(target.startswith(("aten.", "<built-in function")) for target in targets), targets
    assert torch.equal(exported.module()(clouds), model.get_point_features(clouds).pooler_output)


def test_onnx_encoder(model, prompt, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    clouds = prompt["point_clouds"]
    torch.onnx.export(Encoder(model), (clouds,), dynamo=True, verbose=False).save(tmp_path / "encoder.onnx")
    session = runtime.InferenceSession(tmp_path / "encoder.onnx", providers=["CPUExecutionProvider"])
    (vectors,) = session.run(None, {session.get_inputs()[0].name: clouds.numpy()})
    torch.testing.assert_close(
        torch.from_numpy(vectors), model.get_point_features(clouds).pooler_output, rtol=1e-4, atol=1e-4
    )


def test_onnx_step_of_generation(model, prompt):
    """By transformers' exporter: one token after a prompt with clouds, with its cache."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    cache = model(**prompt, use_cache=True).past_key_values
    length = prompt["input_ids"].shape[1]
    step = {
        "input_ids": torch.tensor([[7], [8]]),
        "attention_mask": torch.ones(2, length + 1, dtype=torch.long),
        "position_ids": torch.full((2, 1), length),
        "past_key_values": cache,
    }
    expected = model(**copy.deepcopy(step)).logits
    exported = OnnxExporter().export(model, copy.deepcopy(step), config=OnnxConfig(dynamic=False))
    torch.testing.assert_close(exported(**step).logits, expected, rtol=1e-4, atol=1e-4)
