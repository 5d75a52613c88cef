"""`minigpt3d look`: the attention of the queries, and the page that shows it."""

import json
import re

import numpy as np
import pytest
import torch
from ways_in import make_cloud, make_processor, make_seeing_model

from minigpt3d.cli.main import main
from minigpt3d.evaluation.attention import Attention, measure_attention, spread
from minigpt3d.hub import save_pretrained


@pytest.fixture(scope="module")
def cloud():
    return make_processor().feature_extractor([make_cloud(0)])["point_clouds"][0]


@pytest.mark.parametrize("router_type", ["sparse", "soft", "none"])
def test_attention_is_that_of_the_cross_attention(router_type, cloud):
    model = make_seeing_model()
    model.config.router_type = router_type
    clouds = torch.from_numpy(cloud)[None]
    before = model.get_point_features(clouds).pooler_output
    attention = measure_attention(model, cloud)
    assert torch.equal(model.get_point_features(clouds).pooler_output, before), "nothing is left behind"
    config = model.config
    assert attention.groups.shape == (config.num_query_tokens, config.point_config.num_groups)
    assert attention.center.shape == (config.point_config.num_groups, 3)
    features = model.model.point_encoder(clouds).last_hidden_state
    experts, weights = model.model.router(features)
    assert [number for number, _ in attention.experts] == experts[0].tolist()
    assert [weight for _, weight in attention.experts] == pytest.approx(weights[0].tolist())
    # Expert by expert, with the attention that the Q-Former itself returns.
    model.set_attn_implementation({"qformer_config": "eager"})
    expected = 0
    for number, weight in zip(experts[0], weights[0] / weights.sum(), strict=True):
        output = model.model.qformer(
            model.model.query_experts[number]()[None],
            encoder_hidden_states=model.model.point_projection(features),
            output_attentions=True,
        )
        expected += weight * torch.stack(output.cross_attentions)[:, 0].mean((0, 1))[:, 1:]
    np.testing.assert_allclose(attention.groups, expected.detach().numpy(), atol=1e-6)


def test_a_point_has_the_attention_of_the_groups_around_it():
    center = np.array([[0, 0, 0], [1, 0, 0], [9, 9, 9], [8, 8, 8]], dtype=np.float32)
    attention = Attention(center, np.array([[1.0, 0.0, 0.5, 0.5], [0.2, 0.4, 0.0, 0.0]]), [])
    at_points = spread(attention, np.array([[0, 0, 0], [0.5, 0, 0], [1, 0, 0]]), num_nearest=2)
    np.testing.assert_allclose(at_points, [[1, 0.5, 0], [0.2, 0.3, 0.4]], atol=1e-4)


def test_the_page_holds_all_it_shows(tmp_path, cloud, capsys):
    pytest.importorskip("plotly")
    model = make_seeing_model()
    save_pretrained(model, make_processor(), tmp_path / "model")
    np.save(tmp_path / "<b>.npy", make_cloud(0))
    page = tmp_path / "page.html"
    arguments = [
        str(tmp_path / "<b>.npy"),
        "--model",
        str(tmp_path / "model"),
        "--device",
        "cpu",
        "--max-new-tokens",
        "3",
    ]
    assert main(["look", *arguments, "--out", str(page)]) == 0
    printed = capsys.readouterr().out
    html = page.read_text(encoding="utf-8")
    assert "<b>.npy" not in html and "&lt;b&gt;.npy" in html
    assert not re.search(r'<(?:script|link|img)[^>]*(?:src|href)="?https?:', html), "it needs no network"
    start = html.index('"sliders":') + len('"sliders":')
    (slider,), _ = json.JSONDecoder().raw_decode(html[start:])
    labels = [step["label"] for step in slider["steps"]]
    assert labels == ["colors", "all queries", *map(str, range(1, model.config.num_query_tokens + 1))]
    attention = measure_attention(model.eval(), cloud)
    shown = slider["steps"][2]["args"][0]["marker.color"][0]
    expected = spread(attention, cloud[:, :3])[0] * len(attention.center)
    np.testing.assert_allclose(shown, expected, atol=2e-3)
    for number, weight in attention.experts:
        assert f"<td>{number}</td><td>{weight:.3f}</td>" in html and f"{number} ({weight:.2f})" in printed


def test_mistakes_are_found_before_the_model_is_loaded(tmp_path, capsys):
    pytest.importorskip("plotly")
    np.save(tmp_path / "a.npy", make_cloud(0))
    for path, out in ((tmp_path / "a.npy", tmp_path / "none" / "page.html"), (tmp_path, tmp_path / "page.html")):
        assert main(["look", str(path), "--out", str(out), "--model", "no/model"]) == 1
        assert "folder" in capsys.readouterr().err
