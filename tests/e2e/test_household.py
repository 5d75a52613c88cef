"""The household recipe: furniture libraries, kinds and colors, the split, captions, the data release and the scores."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
from ways_in import make_processor, make_seeing_model

from minigpt3d.data.clouds import read_point_cloud
from minigpt3d.data.records import read_annotations
from minigpt3d.data.shards import NUM_POINTS
from minigpt3d.evaluation.vocabulary.articles import with_article
from minigpt3d.evaluation.vocabulary.colors import COLORS, color_indices, first_color, main_color, names_color
from minigpt3d.evaluation.vocabulary.kinds import KINDS, kind_of, names_kind
from minigpt3d.hub import load_model, save_pretrained
from minigpt3d.point_cloud_minigpt3d import load_point_cloud
from minigpt3d.recipes.household.__main__ import main
from minigpt3d.recipes.household.build_data import build
from minigpt3d.recipes.household.captions import annotate, get_facts, what_is_this
from minigpt3d.recipes.household.heldout import write_heldout
from minigpt3d.recipes.household.library import FurnitureLibrary, read_properties
from minigpt3d.recipes.household.procedural import make_object
from minigpt3d.recipes.household.split import choose_validation, group_objects, normalized_name
from minigpt3d.recipes.household.stage_scores import evaluate_models, to_table
from minigpt3d.recipes.household.views import augment_views, color_shares, group_views, recolor


BOX = """mtllib box.mtl
v 0 0 0
v {w} 0 0
v {w} {h} 0
v 0 {h} 0
v 0 0 {d}
v {w} 0 {d}
v {w} {h} {d}
v 0 {h} {d}
usemtl paint
f 1 2 3 4
f 5 8 7 6
f 1 5 6 2
f 2 6 7 3
f 3 7 8 4
f 4 8 5 1
"""


def make_library(path, names, extra: dict[str, bytes] | None = None):
    """A `.sh3f` with one box for each name, each of another size and color; "Broken" has no faces."""
    rng = np.random.default_rng(len(names))
    lines = ["# made for a test", "id=Test", "name=Test", "license=CC0"]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for number, name in enumerate(names, start=1):
            w, h, d = rng.uniform(0.2, 3, 3)
            color = rng.uniform(0, 1, 3)
            obj = "v 0 0 0\n" if name == "Broken" else BOX.format(w=w, h=h, d=d)
            archive.writestr(f"models/m{number}/box.obj", obj)
            archive.writestr(f"models/m{number}/box.mtl", f"newmtl paint\nKd {' '.join(map(str, color))}\n")
            fields = {
                "id": f"Test#box{number}",
                "name": name.encode("unicode_escape").decode().replace("\\xf4", "\\u00f4"),
                "category": "Kitchen",
                "model": f"/models/m{number}/box.obj",
                "width": 100 * w,
                "height": 100 * h,
                "depth": 100 * d,
                "creator": "A. Maker",
            }
            if number == 1:
                fields["modelRotation"] = "1 0 0 0 0 1 0 -1 0"
            lines += [f"{key}#{number}={value}" for key, value in fields.items()]
        archive.writestr("PluginFurnitureCatalog.properties", "\n".join(lines).encode("latin-1"))
        for member, content in (extra or {}).items():
            archive.writestr(member, content)
    return path


# ---- Kinds and colors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("Double window 3 panes", "window"),
        ("Sofa 2 seats", "sofa"),
        ("Glass door cabinet", "cabinet"),
        ("Chair with cushion", "chair"),
        ("Desk lamp", "lamp"),
        ("Cactus", "plant"),
        ("Quadruple French windows", "window"),
        ("Clothes washing machine", "appliance"),
        ("Flower box", None),
        ("Rocking horse", None),
        ("Toilet paper dispenser", None),
        ("Stapler", None),
    ],
)
def test_kind_of_a_name(name, kind):
    assert (kind_of(name) or (None,))[0] == kind


def test_no_noun_belongs_to_two_kinds():
    assert len(KINDS) >= 14
    nouns = [noun for row in KINDS.values() for nouns in row.values() for noun in nouns]
    assert len(nouns) == len(set(nouns))
    for kind, row in KINDS.items():
        for answer in row:
            text = f"This is a brown {answer}."
            assert [other for other in KINDS if names_kind(text, other)] == [kind]


def test_names_kind_takes_whole_words_and_plurals():
    assert names_kind("Two brown chairs.", "chair") and names_kind("A wooden SHELF", "cabinet")
    assert not names_kind("A carpet", "car") and not names_kind("", "chair")


@pytest.mark.parametrize(
    ("rgb", "name"),
    [
        ((0, 0, 0), "black"),
        ((1, 1, 1), "white"),
        ((0.5, 0.5, 0.5), "gray"),
        ((0.8, 0.05, 0.05), "red"),
        ((1, 0.5, 0), "orange"),
        ((1, 0.9, 0.1), "yellow"),
        ((0.1, 0.6, 0.2), "green"),
        ((0.1, 0.2, 0.8), "blue"),
        ((0.5, 0.1, 0.6), "purple"),
        ((1, 0.6, 0.7), "pink"),
        ((0.45, 0.28, 0.15), "brown"),
    ],
)
def test_basic_colors(rgb, name):
    assert main_color(np.tile(rgb, (10, 1))) == name


def test_main_color_is_the_most_frequent():
    rgb = np.concatenate([np.tile((1, 0, 0), (6, 1)), np.tile((0, 0, 1), (4, 1))])
    assert main_color(rgb) == "red"
    assert set(np.unique(color_indices(np.random.default_rng(0).random((5000, 3))))) == set(range(len(COLORS)))


def test_first_color_of_an_answer():
    assert first_color("It is mostly grey, with some red.") == "gray"
    assert names_color("A Red chair, blue inside", "red") and not names_color("A red and blue chair", "blue")
    assert first_color("A chair.") is None and first_color("It is redder.") is None


# ---- Libraries -------------------------------------------------------------------------------------------------------


def test_java_properties():
    text = "# c\na=1\nb : two \\\n   words\nname#1=H\\u00f4i \\= An\n\n!x\nempty="
    assert read_properties(text) == {"a": "1", "b": "two words", "name#1": "Hôi = An", "empty": ""}


def test_library_lists_and_extracts(tmp_path):
    path = make_library(tmp_path / "Test.sh3f", ["Oak chair", "Hôi table"])
    with FurnitureLibrary(path) as library:
        first, second = library.pieces()
        assert (first.object_id, second.name, second.license) == ("test-box1", "Hôi table", "CC0")
        model = library.extract(second, tmp_path / "out")
        assert model.read_text().startswith("mtllib") and (model.parent / "box.mtl").exists()
    assert first.rotation.tolist() == [[1, 0, 0], [0, 0, 1], [0, -1, 0]]


def test_zip_slip_and_bombs_are_refused(tmp_path):
    slip = make_library(tmp_path / "a.sh3f", ["Chair"], {"models/m1/../../../evil": b"x"})
    bomb = make_library(tmp_path / "b.sh3f", ["Chair"], {"models/m1/zeros": bytes(30_000_000)})
    for path, message in ((slip, "leads out"), (bomb, "bomb")):
        with FurnitureLibrary(path) as library:
            if path == bomb:
                library.archive.getinfo("models/m1/zeros").compress_size = 1
            with pytest.raises(ValueError, match=message):
                library.extract(next(library.pieces()), tmp_path / "x" / "y" / "z")
    assert not list(tmp_path.rglob("evil"))


def test_files_that_are_no_library_are_refused(tmp_path):
    (tmp_path / "no.sh3f").write_bytes(b"no zip")
    with pytest.raises(ValueError, match="not a furniture library"):
        FurnitureLibrary(tmp_path / "no.sh3f")


# ---- Split -----------------------------------------------------------------------------------------------------------


def test_names_of_variants_are_equal():
    assert normalized_name("Concept Sedan 02") == normalized_name("White concept sedans")
    assert normalized_name("Small") == "small"


def test_no_group_is_split():
    rng = np.random.default_rng(0)
    names = [
        f"{adjective} {noun}" for noun in ("chair", "table") for adjective in "oak iron glass 1 2 3 osaka".split()
    ]
    kinds = [name.split()[1] for name in names]
    coords = [rng.uniform(-0.5, 0.5, (500, 3)) for _ in names]
    coords[5] = coords[0]  # a twin under another name
    groups = group_objects(names, kinds, coords)
    assert groups[0] == groups[5] and groups[3] == groups[4] and groups[1] != groups[2]
    held_out = choose_validation(names, kinds, groups)
    assert any(held_out) and not all(held_out)
    assert held_out == choose_validation(names, kinds, groups)
    assert not {g for g, out in zip(groups, held_out, strict=True) if out} & {
        g for g, out in zip(groups, held_out, strict=True) if not out
    }


# ---- Captions --------------------------------------------------------------------------------------------------------


def test_captions_name_kind_and_color():
    rng = np.random.default_rng(0)
    for noun in ("chair", "table", "plant", "appliance"):
        _, kind, cloud = make_object(rng)
        facts = get_facts(f"Small red {noun if noun != 'appliance' else 'oven'} 3", "Kitchen", cloud)
        records = annotate("x", facts, 4, rng)
        for record in records:
            question, answer = (turn["value"] for turn in record["conversations"][:2])
            assert question.startswith("<point>\n")
            if record["conversation_type"] in ("simple_description", "detailed_description", "multi_round"):
                assert names_kind(answer, facts.kind) and names_color(answer, facts.colors[0])
        assert {r["conversation_type"] for r in records} == {
            "simple_description", "detailed_description", "single_round", "multi_round"
        }  # fmt: skip


def test_articles():
    assert [with_article(w) for w in ("orange lamp", "chair", "gray scissors", "glass")] == [
        "an orange lamp", "a chair", "gray scissors", "a glass"
    ]  # fmt: skip


# ---- Views and generated objects -------------------------------------------------------------------------------------


def test_views_keep_shapes_and_stay_in_range(tiny_config):
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    _, kind, cloud = make_object(rng)
    assert kind in KINDS and cloud.shape == (2048, 6) and np.isfinite(cloud).all()
    neighborhood, center = group_views(cloud, tiny_config.point_config, 256, 5, rng)
    assert neighborhood.shape == (5, 16, 8, 6) and center.shape == (5, 16, 3)
    assert torch.allclose(color_shares(neighborhood[..., 3:]).sum(-1), torch.ones(5))
    new, moved = augment_views(neighborhood, center, generator)
    assert new.shape == neighborhood.shape and moved.norm(dim=-1).max() <= 1.001
    assert new[..., 3:].min() >= 0 and new[..., 3:].max() <= 1


def test_recoloring_leaves_the_others_alone():
    color = torch.rand(3, 50, 3)
    new = recolor(color, torch.tensor([True, False, True]), torch.Generator().manual_seed(0))
    assert torch.equal(new[1], color[1]) and not torch.equal(new[0], color[0])


# ---- The build -------------------------------------------------------------------------------------------------------


def test_build_is_complete_and_repeatable(tmp_path):
    names = [f"{kind} chair" for kind in ("Oak", "Iron", "Beach", "Deck", "Osaka")] + [
        "Broken",
        "Stapler",
        "Round table",
    ]
    library = make_library(tmp_path / "Test.sh3f", names)
    counts = build([library], tmp_path / "one", num_workers=1)
    assert list(counts["broken"]) == ["test-box6"] and counts["objects"] == 7
    assert counts["scored_validation"] >= 2
    rows = [json.loads(line) for line in (tmp_path / "one" / "metadata.jsonl").read_text().splitlines()]
    train = {row["object_id"] for row in rows if row["split"] == "train"}
    annotations = [tmp_path / "one" / f"{name}.json" for name in ("brief", "detailed", "single_round", "multi_round")]
    samples = read_annotations(annotations)
    annotated = {sample.object_id.rsplit("-r", 1)[0] for group in samples.values() for sample in group}
    assert annotated == train and all(samples.values())
    for sample in samples["brief"]:
        cloud = read_point_cloud(tmp_path / "one" / "clouds", sample.object_id)
        assert cloud.shape == (8192, 6) and names_color(sample.rounds[0][1], main_color(cloud[:, 3:]))
    build([library], tmp_path / "two", num_workers=1)
    for path in sorted((tmp_path / "one").rglob("*")):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes()
    with pytest.raises(ValueError, match="used twice"):
        build([library, library], tmp_path / "three")
    with pytest.raises(ValueError, match="`held_out_library`.*Test"):
        build([library], tmp_path / "three", held_out_library="Other")


def test_clouds_equal_those_of_inference(tmp_path):
    library = make_library(tmp_path / "Test.sh3f", ["Hall table", "Oak table"])
    build([library], tmp_path / "data", held_out_library="Test", num_workers=1)
    with FurnitureLibrary(library) as opened:
        model = opened.extract(list(opened.pieces())[1], tmp_path)
    cloud = np.load(tmp_path / "data" / "validation" / "test-box2_8192.npy")
    np.testing.assert_array_equal(cloud, load_point_cloud(model))


def write_release(folder: Path, kinds_and_colors: list[tuple[str, str, str]]) -> Path:
    """A release of objects (split, kind, color), of which the validation objects have clouds."""
    rng, rows = np.random.default_rng(0), []
    (folder / "validation").mkdir(parents=True)
    for number, (split, kind, color) in enumerate(kinds_and_colors):
        rows.append(
            {"object_id": f"o{number}", "name": f"Nice {kind}", "kind": kind, "main_color": color, "split": split}
            | {"category": "Things", "creator": "A. Maker", "license": "CC0", "library": "box.sh3f"}
        )
        cloud = rng.uniform(0, 1, (NUM_POINTS, 6)).astype(np.float32)
        if split == "validation":
            np.save(folder / "validation" / f"o{number}_{NUM_POINTS}.npy", cloud)
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def test_models_and_the_majority_answer_are_scored(tmp_path):
    things = [("train", "lamp", "red")] * 2 + [("train", "chair", "blue"), ("train", "", "blue")]
    things += [("validation", "chair", "red"), ("validation", "lamp", "red"), ("validation", "", "red")]
    data = write_release(tmp_path / "data", things)
    heldout = tmp_path / "heldout.parquet"
    assert write_heldout(data, heldout) == 2
    assert set(pyarrow.parquet.read_table(heldout)["creator"].to_pylist()) == {"A. Maker"}
    save_pretrained(make_seeing_model(), make_processor(), tmp_path / "model")
    summary = evaluate_models(data, heldout, {"IV": tmp_path / "model"}, tmp_path / "reports")
    assert summary["objects"] == 2 and summary["majority"]["answer"] == "This is a red lamp."
    assert summary["majority"]["kind"] == {"value": 0.5, "low": 0.0945, "high": 0.9055}  # Wilson's interval, by hand
    assert summary["majority"]["color"]["value"] == summary["majority"]["color_asked"]["value"] == 1
    model = summary["models"]["IV"]
    assert set(model["seeing"]) == set(model["blind"]) == {"kind", "color", "color_asked"}
    hits = {kind: int(hit[0]) for kind, hit in model["by_kind"].items()}
    assert set(hits) == {"chair", "lamp"} and model["seeing"]["kind"]["value"] == sum(hits.values()) / 2
    table = to_table(summary)
    assert "| stage IV |" in table and "| IV, blind |" in table
    assert "| majority answer | 0.50 (0.09 to 0.91) | 1.00" in table
    assert (tmp_path / "reports" / "IV" / "report.html").is_file()


def test_brief_answers_name_the_kind():
    assert names_kind(what_is_this(get_facts("Desk lamp", "Lights", np.zeros((8, 6)))), "lamp")


# ---- The complete recipe ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_complete_recipe_with_few_steps(tmp_path):
    names = [f"{adjective} {noun}" for noun in ("chair", "table") for adjective in "Oak Iron Beach Deck Osaka".split()]
    library, output_dir = make_library(tmp_path / "Test.sh3f", names), tmp_path / "household"
    command = [sys.executable, "-m", "minigpt3d.recipes.household", library, "--work-dir", tmp_path / "work"]
    command += ["--output_dir", output_dir, "--max_steps", "1"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}

    def run() -> str:
        result = subprocess.run(
            list(map(str, command)), env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=1200
        )
        assert result.returncode == 0, result.stderr[-3000:]
        return result.stdout

    assert "majority answer" in run()
    scores = json.loads((output_dir / "scores.json").read_text())
    assert list(scores["models"]) == ["I", "II", "III", "IV", "shipped"] and scores["objects"] > 0
    assert json.loads((output_dir / "evaluation" / "results.json").read_text())["suite"] == "household"
    assert "| libraries | 1 |" in (output_dir / "README.md").read_text()
    assert "A. Maker" in (output_dir / "CREATORS.md").read_text()
    load_model(output_dir)
    assert run().count(" exists") == 10  # the second run skips all steps but the writing of the checkpoint


def test_missing_library_is_reported(tmp_path):
    with pytest.raises(SystemExit, match="error: no such file: .*none.sh3f"):
        main([str(tmp_path / "none.sh3f")])
