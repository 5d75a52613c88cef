"""Ablations: the table of variants, encoded clouds, stages that are shared, intervals, and the report."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from scipy import stats
from tiny_model import make_tiny_config, make_tiny_model

from minigpt3d.data import shards as packing
from minigpt3d.evaluation.statistics import holm
from minigpt3d.hub import save_pretrained
from minigpt3d.recipes.household.ablate import __main__ as ablate, lab as lab_module
from minigpt3d.recipes.household.ablate.ablation_files import command_of, write_ablation
from minigpt3d.recipes.household.ablate.differences import MEASURES, estimate_mean, find_equal, summarize
from minigpt3d.recipes.household.ablate.encoded_clouds import EncodedClouds, as_clouds
from minigpt3d.recipes.household.ablate.lab import Lab, build_variant
from minigpt3d.recipes.household.ablate.variants import FULL, REFERENCES, VARIANTS, stage_rows
from minigpt3d.training.stages import RECIPES, select_trainable
from minigpt3d.training.stream import pack_batch
from minigpt3d.training.weights import named_parameters, prepare_model


VARIANT = {variant.name: variant for variant in VARIANTS}


# ---- The table ------------------------------------------------------------------------------------------------------


def test_table_has_every_group():
    groups = {}
    for variant in VARIANTS[1:]:
        groups.setdefault(variant.group, []).append(variant)
    assert [v.stages for v in groups["stages"]] == [
        ("II", "III", "IV"), ("I", "III", "IV"), ("I", "II", "IV"), ("I", "II", "III")
    ]  # fmt: skip
    assert [v.num_experts for v in groups["experts"]] == [1, 2, 4]
    assert [v.last_changes["router_type"] for v in groups["router"]] == ["none", "constant", "soft"]
    assert {"LoRA rank", "norms", "queries"} < groups.keys() == REFERENCES.keys()
    assert len(VARIANT) == len(VARIANTS)


def test_the_full_recipe_is_the_recipe():
    assert stage_rows(FULL, 1.0) == list(RECIPES["household"].values())[:4]
    assert [row.steps for row in stage_rows(FULL, 0.1)] == [30, 80, 50, 20]


def test_variants_differ_from_the_recipe():
    names = named_parameters(
        prepare_model(make_tiny_model(make_tiny_config(router_type="none")), stage_rows(FULL, 1)[1])
    )
    frozen, trained = (select_trainable(stage_rows(VARIANT[v], 1)[1], names) for v in ("norms frozen", "full recipe"))
    assert {name for name in trained - frozen} == {name for name in trained if "norm" in name.lower()} != set()
    for variant in VARIANTS[1:]:
        same = [a == b for a, b in zip(stage_rows(variant, 1), stage_rows(FULL, 1), strict=False)]
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
    few = lab_module.read_household()[:3]
    monkeypatch.setattr(lab_module, "read_household", lambda: few)
    return Lab(str(places / "base"), str(places / "packed"), tmp_path / "work", scale=0.001, views=2)


def test_encoded_clouds_give_equal_gradients(tiny_processor, point_clouds):
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
        batch["point_clouds"] = as_clouds(inner.point_encoder(batch["point_clouds"]).last_hidden_state)
    inner.point_encoder = EncodedClouds(plain.config.point_config)
    encoded_loss, encoded_gradients = loss_and_gradients()
    assert torch.equal(loss, encoded_loss)
    assert gradients.keys() == encoded_gradients.keys() and gradients
    assert all(torch.equal(gradients[name], encoded_gradients[name]) for name in gradients)


@pytest.mark.slow
def test_shared_stages_are_trained_once_and_runs_resume(lab, tmp_path, monkeypatch):
    trained, train_stage = [], lab_module.train_stage

    def record(accelerator, model, stage, stream, seed, title):
        trained.append(title)
        return train_stage(accelerator, model, stage, stream, seed, title)

    monkeypatch.setattr(lab_module, "train_stage", record)
    runs_dir = tmp_path / "runs"
    runs_dir.mkdir()
    some = [VARIANT[name] for name in ("full recipe", "without stage IV", "2 experts", "router soft", "LoRA rank 2")]
    ablate.run_variants(lab, some, [0], runs_dir)
    assert trained == [
        *(f"full recipe, seed 0, stage {stage}" for stage in ("I", "II", "III", "IV")),
        "2 experts, seed 0, stage IV",
        "router soft, seed 0, stage IV",
        *(f"LoRA rank 2, seed 0, stage {stage}" for stage in ("II", "III", "IV")),
    ]
    runs = ablate.read_runs(runs_dir)
    assert [run["variant"] for run in runs] == [variant.name for variant in some]
    assert all(len(run[measure]) == 3 for run in runs for measure in MEASURES)
    ablate.run_variants(lab, some, [0], runs_dir)
    assert len(trained) == 9 and ablate.read_runs(runs_dir) == runs


def test_experts_and_queries(lab):
    model = build_variant(lab.base, VARIANT["2 experts"], 0)
    assert len(model.model.query_experts) == 2 == model.model.router.linear_2.out_features
    router, full_router = model.model.router.linear_2, build_variant(lab.base, FULL, 0).model.router.linear_2
    assert torch.equal(router.weight, full_router.weight[:2]) and torch.equal(router.bias, full_router.bias[:2])
    pretrained, random, again = (
        build_variant(lab.base, VARIANT[name], 0).model.query_experts[0].weight
        for name in ("full recipe", "random queries", "random queries")
    )
    assert torch.equal(random, again) and not torch.equal(random, pretrained)


# ---- Differences ----------------------------------------------------------------------------------------------------


def test_intervals_cover_seeds_and_objects():
    rng = np.random.default_rng(0)
    objects = rng.normal(size=400)
    mean = estimate_mean(np.tile(objects, (3, 1)))  # seeds agree: an ordinary t interval over the objects
    expected = stats.ttest_1samp(objects, 0)
    assert mean["p"] == pytest.approx(expected.pvalue)
    assert (mean["low"], mean["high"]) == pytest.approx(tuple(expected.confidence_interval()))
    seeds = [0.1, 0.2, 0.6]
    mean = estimate_mean(np.tile(seeds, (400, 1)).T)  # objects agree: one over the seeds
    assert (mean["low"], mean["high"]) == pytest.approx(tuple(stats.ttest_1samp(seeds, 0).confidence_interval()))
    assert estimate_mean(np.zeros((3, 4))) == {"mean": 0, "low": 0, "high": 0, "p": 1}


@pytest.mark.slow
@pytest.mark.parametrize("spread_of_seeds", [0.0, 0.1, 0.4])
def test_false_positives_are_one_in_twenty(spread_of_seeds):
    """A bootstrap of four seeds has up to one in 6 if the variance of the seeds is the larger one."""
    rng = np.random.default_rng(0)
    significant = [
        estimate_mean(spread_of_seeds * rng.normal(size=(4, 1)) + rng.normal(size=(1, 100)))["p"] < 0.05
        for _ in range(2_000)
    ]
    assert 0.03 < np.mean(significant) < 0.08


def test_intervals_need_two_seeds():
    with pytest.raises(ValueError, match="got 1. Give more `seeds`"):
        summarize([run for run in make_runs(0.4) if run["seed"] == 0])
    rows = summarize([run for run in make_runs(0.4) if run["seed"] == 0 or run["variant"] == FULL.name])
    assert {row["variant"] for row in rows} == {FULL.name}


def test_equal_variants_are_reported(tmp_path):
    runs = make_runs(worse=0.4)
    runs += [run | {"variant": "1 expert"} for run in runs if run["variant"] == "without stage II"]
    assert find_equal(runs) == [("without stage II", "1 expert")]
    assert write_ablation(runs, SETTINGS, tmp_path)["same"] == [["without stage II", "1 expert"]]
    assert "*without stage II* and *1 expert*" in (tmp_path / "ablation.md").read_text()
    runs[-1]["loss"] = [0.5, *runs[-1]["loss"][1:]]
    assert not find_equal(runs)


def test_two_processes_with_one_seed_are_refused(tmp_path):
    with FileLock(tmp_path / "seed-0.lock"), pytest.raises(ValueError, match="seed 0 .*`seeds`"):
        ablate.run_variants(None, [FULL], [0], tmp_path)


SETTINGS = {"date": "2026-01-02", "cpus": 2, "versions": "v", "scale": 0.25, "views": 4}
SETTINGS |= {"given": {"base": "my/base", "data": "packed"}}


def make_runs(worse: float) -> list[dict]:
    """Three seeds of two variants over 100 objects; the second names a share `worse` fewer kinds."""
    rng, runs = np.random.default_rng(0), []
    for seed in range(3):
        kind = (rng.random(100) < 0.9).astype(float)
        other = kind * (rng.random(100) >= worse)
        for name, hits in ((FULL.name, kind), ("without stage II", other)):
            run = {"variant": name, "seed": seed, "minutes": 1.0, "kind": hits.tolist(), "color": kind.tolist()}
            runs.append(run | {"loss": (1 - hits).tolist()})
    return runs


def test_p_of_true_and_chance_differences():
    clear = {(row["variant"], row["measure"]): row for row in summarize(make_runs(worse=0.4))}
    row = clear["without stage II", "kind"]
    assert row["difference"] < -0.3 and row["difference_high"] < -0.2 and row["p"] < 0.01
    assert clear["without stage II", "color"]["difference"] == 0 and clear["without stage II", "color"]["p"] == 1
    assert "p" not in clear[FULL.name, "kind"]
    noise = {(row["variant"], row["measure"]): row for row in summarize(make_runs(worse=0.003))}
    assert noise["without stage II", "kind"]["p"] > 0.05
    with pytest.raises(ValueError, match="'full recipe'.* 0"):
        summarize(make_runs(0.1)[1::2])


def test_differences_are_corrected_for_their_number():
    runs = make_runs(worse=0.02)
    values = {
        measure: [
            np.array([r[measure] for r in runs if r["variant"] == name]) for name in (FULL.name, "without stage II")
        ]
        for measure in MEASURES
    }
    raw = [estimate_mean(other - full)["p"] for full, other in values.values()]
    rows = [row for row in summarize(runs) if "p" in row]
    assert [row["measure"] for row in rows] == list(MEASURES) and 0 < min(raw) < 0.3
    assert [row["p"] for row in rows] == np.round(holm(raw), 4).tolist() != np.round(raw, 4).tolist()


def test_files_of_an_ablation(tmp_path):
    content = write_ablation(make_runs(worse=0.4), SETTINGS, tmp_path)
    assert json.loads((tmp_path / "ablation.json").read_text()) == content and "given" not in content
    assert content["command"] == (
        "python -m minigpt3d.recipes.household.ablate --base my/base --data packed --out DIR --seeds 0 1 2 --scale 0.25 "
        "--views 4 --variants 'full recipe' 'without stage II'"
    )
    row = next(r for r in content["rows"] if r["variant"] == "without stage II" and r["measure"] == "kind")
    value, low, high, difference = (100 * row[key] for key in ("value", "low", "high", "difference"))
    text = (tmp_path / "ablation.md").read_text()
    assert content["command"] in text and f"| {value:.1f} ({low:.1f} to {high:.1f}) | **{difference:+.1f} (" in text
    assert re.search("Significant: .*stage II: kind named -", text)
    assert (tmp_path / "ablation.png").read_bytes().startswith(b"\x89PNG")


def test_command_leaves_out_the_names_of_all_variants():
    every = [{"variant": variant.name} for variant in VARIANTS]
    assert command_of(every, [7], SETTINGS).endswith("--seeds 7 --scale 0.25 --views 4")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--variants", "9 experts"], "--variants '9 experts'"),
        (["--scale", "0"], "above 0"),
        (["--scale", "nan"], "above 0, got nan"),
        (["--report_only"], "holds no runs"),
        ([], "give --base and --data"),
    ],
)
def test_wrong_options_are_refused(arguments, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        ablate.main(["--out", str(tmp_path / "out"), *arguments])


def test_bundled_ablation_has_every_variant():
    content = json.loads((Path(__file__).parents[2] / "model_card" / "ablation.json").read_text())
    assert (
        list(dict.fromkeys(row["variant"] for row in content["rows"])) == list(VARIANT) and len(content["seeds"]) >= 3
    )
