"""The benchmark's plain algorithm and the model agree at tiny size; times are not looked at."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_tiny_config


@pytest.fixture(scope="module")
def encode():
    path = Path(__file__).parent.parent / "benchmarks" / "encode.py"
    spec = importlib.util.spec_from_file_location("benchmark_encode", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_plain_and_ours_agree(encode):
    model = encode.make_model(make_tiny_config())
    rows = encode.run(model, encode.make_point_clouds(batch_size=3, num_points=256), repeats=1)
    assert [row.part for row in rows] == [
        "grouping",
        "mini-PointNet",
        "transformer",
        "point encoder as a whole",
        "Q-Former, none",
        "Q-Former, sparse",
        "Q-Former, soft",
        "cloud to vectors, sparse",
        "the same, ours in bf16",
    ]
    assert all(row.difference <= encode.FP32_TOLERANCE for row in rows[:-1])
    assert all(row.plain_seconds > 0 and row.ours_seconds > 0 for row in rows)
    table = encode.format_table(rows).splitlines()
    assert len(table) == 2 + len(rows)


def test_a_difference_ends_the_run(encode, monkeypatch):
    model = encode.make_model(make_tiny_config())
    right = model.get_query_output
    monkeypatch.setattr(model, "get_query_output", lambda features: right(features) * 1.001)
    with pytest.raises(RuntimeError, match="Q-Former, none: ours differs"):
        encode.run(model, encode.make_point_clouds(batch_size=2, num_points=128), repeats=1)


def test_clouds_are_normalised(encode):
    point_clouds = encode.make_point_clouds(batch_size=2, num_points=500)
    assert point_clouds.shape == (2, 500, 6)
    assert torch.allclose(point_clouds[..., :3].mean(1), torch.zeros(2, 3), atol=1e-6)
    assert torch.allclose(point_clouds[..., :3].norm(dim=-1).amax(1), torch.ones(2))
    assert point_clouds[..., 3:].min() >= 0 and point_clouds[..., 3:].max() <= 1
