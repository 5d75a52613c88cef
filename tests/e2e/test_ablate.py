"""Ablations: the table of variants, encoded clouds, stages that are shared, intervals, and the report."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from scipy import stats
from tiny_model import make_tiny_config, make_tiny_model

from minigpt3d.conversion import save_pretrained
from minigpt3d.data import shards as packing
from minigpt3d.evaluation.statistics import holm
from minigpt3d.recipes.household import ablate
from minigpt3d.recipes.household.ablate import (
    FULL,
    VARIANTS,
    EncodedClouds,
    Lab,
    as_cloud,
    estimate_mean,
    rows_of,
    summarize,
)
from minigpt3d.training.stages import RECIPES, select_trainable
from minigpt3d.training.stream import pack_batch
from minigpt3d.training.weights import named_parameters, prepare_model


VARIANT = {variant.name: variant for variant in VARIANTS}


# ---- The table ------------------------------------------------------------------------------------------------------


def test_the_table_asks_every_question():
    groups = {}
    for variant in VARIANTS[1:]:
        groups.setdefault(variant.group, []).append(variant)
    assert [v.stages for v in groups["stages"]] == [
        ("II", "III", "IV"), ("I", "III", "IV"), ("I", "II", "IV"), ("I", "II", "III")
    ]  # fmt: skip
    assert [v.num_experts for v in groups["experts"]] == [1, 2, 4]
    assert [v.last["router_type"] for v in groups["router"]] == ["none", "constant", "soft"]
    assert {"LoRA rank", "norms", "queries"} < groups.keys() == ablate.REFERENCE.keys()
    assert len(VARIANT) == len(VARIANTS)


def test_the_full_recipe_is_the_recipe():
    assert rows_of(FULL, 1.0) == list(RECIPES["household"].values())[:4]
    assert [row.steps for row in rows_of(FULL, 0.1)] == [30, 80, 50, 20]


def test_variants_change_what_they_say():
    names = named_parameters(prepare_model(make_tiny_model(make_tiny_config(router_type="none")), rows_of(FULL, 1)[1]))
    frozen, trained = (select_trainable(rows_of(VARIANT[v], 1)[1], names) for v in ("norms frozen", "full recipe"))
    assert {name for name in trained - frozen} == {name for name in trained if "norm" in name.lower()} != set()
    for variant in VARIANTS[1:]:
        same = [a == b for a, b in zip(rows_of(variant, 1), rows_of(FULL, 1), strict=False)]
        assert variant.num_experts or variant.random_queries or not all(same) or len(variant.stages) < 4


# ---- Training -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def places(release, tmp_path_factory):  # noqa: F811
    """Base model and packed data, both tiny."""
    from ways_in import make_processor

    folder = tmp_path_factory.mktemp("ablate")
    save_pretrained(make_tiny_model(make_tiny_config(router_type="none")), make_processor(), folder / "base")
    clouds, annotations = release
    packing.pack(packing.release_entries(clouds, annotations), folder / "packed", max_broken=0.1, num_workers=1)
    return folder


@pytest.fixture
def lab(places, tmp_path, monkeypatch) -> Lab:
    few = ablate.read_household()[:3]
    monkeypatch.setattr(ablate, "read_household", lambda: few)
    return Lab(str(places / "base"), str(places / "packed"), tmp_path / "work", scale=0.001, views=2)


def test_encoded_clouds_compute_what_clouds_do(tiny_processor, point_clouds):
    stage = RECIPES["household"]["II"]
    plain = prepare_model(make_tiny_model(make_tiny_config(router_type="none")), stage).eval()
    sample = tiny_processor.encode_training([[
        {"role": "user", "content": [{"type": "point_cloud"}, {"type": "text", "text": "What is this?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A chair."}]},
    ]], [point_clouds[0].numpy()], 64)  # fmt: skip
    sample = {name: tensor if name == "point_clouds" else tensor[0] for name, tensor in sample.items()}
    batch = pack_batch([sample])

    def loss_and_gradients() -> tuple:
        plain.zero_grad()
        loss = plain(**batch, use_cache=False).loss
        loss.backward()
        return loss.detach(), {n: p.grad.clone() for n, p in named_parameters(plain).items() if p.grad is not None}

    loss, gradients = loss_and_gradients()
    inner = plain.base_model.model.model
    with torch.no_grad():
        batch["point_clouds"] = as_cloud(inner.point_encoder(batch["point_clouds"]))
    inner.point_encoder = EncodedClouds(plain.config.point_config)
    encoded_loss, encoded_gradients = loss_and_gradients()
    assert torch.equal(loss, encoded_loss)
    assert gradients.keys() == encoded_gradients.keys() and gradients
    assert all(torch.equal(gradients[name], encoded_gradients[name]) for name in gradients)


def test_shared_stages_are_trained_once_and_runs_go_on(lab, tmp_path, monkeypatch):
    trained, train_stage = [], ablate.train_stage

    def noted(accelerator, model, stage, stream, seed, what):
        trained.append(what)
        return train_stage(accelerator, model, stage, stream, seed, what)

    monkeypatch.setattr(ablate, "train_stage", noted)
    runs = tmp_path / "runs"
    runs.mkdir()
    some = [VARIANT[name] for name in ("full recipe", "without stage IV", "2 experts", "router soft", "LoRA rank 2")]
    ablate.run(lab, some, [0], runs)
    assert trained == [
        *(f"full recipe, seed 0, stage {stage}" for stage in ("I", "II", "III", "IV")),
        "2 experts, seed 0, stage IV",
        "router soft, seed 0, stage IV",
        *(f"LoRA rank 2, seed 0, stage {stage}" for stage in ("II", "III", "IV")),
    ]
    found = ablate.read_runs(runs)
    assert [each["variant"] for each in found] == [variant.name for variant in some]
    assert all(len(each[measure]) == 3 for each in found for measure in ablate.MEASURES)
    ablate.run(lab, some, [0], runs)
    assert len(trained) == 9 and ablate.read_runs(runs) == found


def test_experts_and_queries(lab):
    model = ablate.build_model(lab.base, VARIANT["2 experts"], 0)
    assert len(model.model.query_experts) == 2 == model.model.router.linear_2.out_features
    router, whole = model.model.router.linear_2, ablate.build_model(lab.base, FULL, 0).model.router.linear_2
    assert torch.equal(router.weight, whole.weight[:2]) and torch.equal(router.bias, whole.bias[:2])
    pretrained, random, again = (
        ablate.build_model(lab.base, VARIANT[name], 0).model.query_experts[0].weight
        for name in ("full recipe", "random queries", "random queries")
    )
    assert torch.equal(random, again) and not torch.equal(random, pretrained)


# ---- What differs ---------------------------------------------------------------------------------------------------


def test_intervals_cover_seeds_and_objects():
    rng = np.random.default_rng(0)
    objects = rng.normal(size=400)
    found = estimate_mean(np.tile(objects, (3, 1)))  # seeds agree: an ordinary t interval over the objects
    expected = stats.ttest_1samp(objects, 0)
    assert found["p"] == pytest.approx(expected.pvalue)
    assert (found["low"], found["high"]) == pytest.approx(tuple(expected.confidence_interval()))
    seeds = [0.1, 0.2, 0.6]
    found = estimate_mean(np.tile(seeds, (400, 1)).T)  # objects agree: one over the seeds
    assert (found["low"], found["high"]) == pytest.approx(tuple(stats.ttest_1samp(seeds, 0).confidence_interval()))
    assert estimate_mean(np.zeros((3, 4))) == {"mean": 0, "low": 0, "high": 0, "p": 1}


@pytest.mark.parametrize("of_seeds", [0.0, 0.1, 0.4])
def test_where_nothing_differs_few_differences_are_more_than_noise(of_seeds):
    """One in 20 at the 5 % level; a bootstrap of four seeds finds up to one in 6 when their scatter is the larger one."""
    rng = np.random.default_rng(0)
    found = [
        estimate_mean(of_seeds * rng.normal(size=(4, 1)) + rng.normal(size=(1, 100)))["p"] < 0.05 for _ in range(2_000)
    ]
    assert 0.03 < np.mean(found) < 0.08


def test_one_seed_is_no_interval():
    with pytest.raises(ValueError, match="got 1. Give more --seeds"):
        summarize([run for run in make_runs(0.4) if run["seed"] == 0])
    rows = summarize([run for run in make_runs(0.4) if run["seed"] == 0 or run["variant"] == FULL.name])
    assert {row["variant"] for row in rows} == {FULL.name}


def test_two_names_of_one_computation_are_told(tmp_path):
    runs = make_runs(worse=0.4)
    runs += [run | {"variant": "1 expert"} for run in runs if run["variant"] == "without stage II"]
    assert ablate.find_same(runs) == [("without stage II", "1 expert")]
    ablate.write_report(runs, FACTS, tmp_path)
    assert "for one computation" in (tmp_path / "ablation.md").read_text()
    runs[-1]["loss"] = [0.5, *runs[-1]["loss"][1:]]
    assert not ablate.find_same(runs)


def test_processes_do_not_share_temporary_files(tmp_path):
    """The first to rename must not take the other's unfinished file."""
    names = []
    ablate.write_whole(tmp_path / "views.pt", lambda partial: (names.append(partial.name), partial.write_text("x")))
    assert str(os.getpid()) in names[0] and [path.name for path in tmp_path.iterdir()] == ["views.pt"]


def test_two_processes_at_one_seed(tmp_path):
    with (
        FileLock(tmp_path / "seed-0.lock"),
        pytest.raises(ValueError, match="at work on seed 0 in .*seeds of its own"),
    ):
        ablate.run(None, [FULL], [0], tmp_path)


FACTS = {"date": "2026-01-02", "cpus": 2, "versions": "v", "scale": 0.25, "views": 4}
FACTS |= {"given": {"base": "my/base", "data": "packed"}}


def make_runs(worse: float) -> list[dict]:
    """Three seeds of two variants over 100 objects, of which the second names a share less."""
    rng, runs = np.random.default_rng(0), []
    for seed in range(3):
        kind = (rng.random(100) < 0.9).astype(float)
        other = kind * (rng.random(100) >= worse)
        for name, hits in ((FULL.name, kind), ("without stage II", other)):
            run = {"variant": name, "seed": seed, "minutes": 1.0, "kind": hits.tolist(), "color": kind.tolist()}
            runs.append(run | {"loss": (1 - hits).tolist()})
    return runs


def test_what_differs_is_told_and_what_does_not_is_not():
    clear = {(row["variant"], row["measure"]): row for row in summarize(make_runs(worse=0.4))}
    row = clear["without stage II", "kind"]
    assert row["difference"] < -0.3 and row["difference_high"] < -0.2 and row["p"] < 0.01
    assert clear["without stage II", "color"]["difference"] == 0 and clear["without stage II", "color"]["p"] == 1
    assert "p" not in clear[FULL.name, "kind"]
    noise = {(row["variant"], row["measure"]): row for row in summarize(make_runs(worse=0.003))}
    assert noise["without stage II", "kind"]["p"] > 0.05
    with pytest.raises(ValueError, match="two runs of the 'full recipe'.*got 0"):
        summarize(make_runs(0.1)[1::2])


def test_differences_are_corrected_for_their_number():
    runs = make_runs(worse=0.02)
    values = {
        measure: [
            np.array([r[measure] for r in runs if r["variant"] == name]) for name in (FULL.name, "without stage II")
        ]
        for measure in ablate.MEASURES
    }
    raw = [estimate_mean(other - full)["p"] for full, other in values.values()]
    rows = [row for row in summarize(runs) if "p" in row]
    assert [row["measure"] for row in rows] == list(ablate.MEASURES) and 0 < min(raw) < 0.3
    assert [row["p"] for row in rows] == np.round(holm(raw), 4).tolist() != np.round(raw, 4).tolist()


def test_the_report_says_what_the_numbers_say(tmp_path):
    ablate.write_report(make_runs(worse=0.4), FACTS, tmp_path)
    text = (tmp_path / "ablation.md").read_text()
    content = json.loads((tmp_path / "ablation.json").read_text())
    assert (
        content["command"] in text
        and "given" not in content
        and content["command"]
        == (
            "python training/ablate.py --base my/base --data packed --out DIR --seeds 0 1 2 --scale 0.25 --views 4 "
            "--variants 'full recipe' 'without stage II'"
        )
    )
    every = [{"variant": variant.name} for variant in VARIANTS]
    assert ablate.command_of(every, FACTS | {"seeds": [7]}).endswith("--seeds 7 --scale 0.25 --views 4")
    rows = content["rows"]
    row = next(r for r in rows if r["variant"] == "without stage II" and r["measure"] == "kind")
    cells = f"| {100 * row['value']:.1f} ({100 * row['low']:.1f} to {100 * row['high']:.1f}) | **{100 * row['difference']:+.1f} ("
    assert cells in text
    assert "for one computation" not in text
    assert "More than noise: without stage II: kind named -" in text and "What it cannot show" in text
    assert (tmp_path / "ablation.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--variants", "9 experts"], "'9 experts'"),
        (["--scale", "0"], "above 0"),
        (["--scale", "nan"], "above 0, got nan"),
        (["--report_only"], "holds no runs"),
        ([], "give --base and --data"),
    ],
)
def test_mistakes_are_told(arguments, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        ablate.main(["--out", str(tmp_path / "out"), *arguments])


def test_the_shipped_table_is_of_its_runs():
    folder = Path(__file__).parents[2] / "model_card"
    content = json.loads((folder / "ablation.json").read_text())
    text = (folder / "ablation.md").read_text()
    assert ablate.to_markdown(content) == text
    assert {row["variant"] for row in content["rows"]} == set(VARIANT) and len(content["seeds"]) >= 3
