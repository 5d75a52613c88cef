"""The recipe of the open vocabulary: captions, splits, nothing-shapes, texts, augmentation, data and marks."""

import json
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch

from minigpt3d.data.records import read_annotations
from minigpt3d.data.sources import open_sources
from minigpt3d.evaluation.objects import read_household
from minigpt3d.evaluation.vocabulary.colors import COLORS, main_color
from minigpt3d.hub import load_model
from minigpt3d.recipes.open_objects import build as build_module, encoder, language, marks, qformer, stages
from minigpt3d.recipes.open_objects.augment import augment, normalize
from minigpt3d.recipes.open_objects.build import BuildOptions, as_seen, build, read_lines
from minigpt3d.recipes.open_objects.captioned_objects import FURNITURE_SOURCE, NUM_POINTS, read_captions, read_clouds
from minigpt3d.recipes.open_objects.creators import CREATORS_FILE, creators
from minigpt3d.recipes.open_objects.marks import Asker, Nouns, is_yes, mark_answers, spoil
from minigpt3d.recipes.open_objects.nothing import NOTHING, make_nothing
from minigpt3d.recipes.open_objects.splits import TEST_PACKS, VALIDATION_PACKS, find_twins
from minigpt3d.recipes.open_objects.text import (
    NOT_SURE,
    SHAPES,
    Described,
    annotate,
    keywords,
    measure,
    what_is_this,
    yes_no,
)
from minigpt3d.recipes.open_objects.wordnet import Entry, WordNet


CAR = Described(
    "car-1", "sports car", "car", "A low red sports car.", "It has four wheels.",
    (("Is it blue?", "No, it is red."), ("How many wheels has it?", "It has four."), ("What is it for?", "Driving.")),
    "metal", ("red", "black"), (1.0, 0.5, 0.4), Entry("a small low car", "car", ("wheel", "door")),
)  # fmt: skip
TREE = replace(CAR, object_id="tree-1", noun="pine tree", kind="tree", colors=("green",), extent=(0.3, 1.0, 0.3))
SHAPELESS = Described("nothing-1", NOTHING, NOTHING, "", "", (), "", ("blue",), (1.0, 1.0, 1.0))


@pytest.fixture(scope="module")
def captions():
    return read_captions()


@pytest.fixture(scope="module")
def split():
    return json.loads(build_module.SPLIT_FILE.read_text(encoding="utf-8"))


def box(rng: np.random.Generator, size: tuple[float, float, float]) -> np.ndarray:
    """A red cloud (4096, 6) that fills a box."""
    coord = rng.uniform(-0.5, 0.5, size=(NUM_POINTS, 3)) * size
    return normalize(np.concatenate([coord, np.tile([0.8, 0.1, 0.1], (NUM_POINTS, 1))], axis=1))


# ---- Captions and splits --------------------------------------------------------------------------------------------


def test_captions_are_complete_and_free(captions):
    assert len(captions) > 3000 and len({item.object_id for item in captions}) == len(captions)
    assert {item.license for item in captions} == {"CC0-1.0", "CC-BY-3.0", "CC-BY-3.0-US"}
    assert len({item.kind for item in captions}) == 53
    assert all(item.creator and item.noun and item.brief and item.detailed for item in captions)
    assert all(len(item.questions) == 3 for item in captions)


def test_the_split_holds_packs_creators_and_the_household_suite_out(captions, split):
    by_id = {item.object_id: item for item in captions}
    ids = [object_id for ids in split.values() for object_id in ids]
    assert sorted(set(ids)) == sorted(ids)
    assert by_id.keys() <= set(ids)
    train = [by_id[i] for i in split["train"] if i in by_id]
    assert not {item.pack for item in train} & (VALIDATION_PACKS | TEST_PACKS)
    assert {item.creator for item in train if item.source == "market"} == {"kenney"}
    suite = {f"{FURNITURE_SOURCE}/{item.object_id}" for item in read_household()}
    assert not suite & set(split["train"] + split["test"])
    assert len(suite & set(split["validation"])) > 80
    furniture_nouns = {
        name: {by_id[i].noun for i in split[name] if i in by_id and by_id[i].source == FURNITURE_SOURCE}
        for name in ("train", "test")
    }
    assert not furniture_nouns["train"] & furniture_nouns["test"]


def test_twins_of_packs_leave_the_held_out_side_and_twins_of_the_suite_leave_training(captions):
    rng = np.random.default_rng(0)
    flat, tall = box(rng, (1, 0.1, 1))[:, :3], box(rng, (0.1, 1, 0.1))[:, :3]
    first = replace(captions[0], source="kenney", kind="table", creator="A", file="a.glb")
    items = [
        first,  # train
        replace(first, file="b.glb"),  # validation: the shape and kind of the first
        replace(first, file="c.glb", kind="rug or pillow"),  # validation: another kind
        replace(first, file="x/a.glb", creator="A"),  # test: another shape, the same name and creator
        replace(first, file="d.glb", source=FURNITURE_SOURCE),  # of the suite: the first one's shape
    ]
    coords = [flat, flat, flat, tall, flat]
    splits = ["train", "validation", "validation", "test", "validation"]
    assert find_twins(items[:4], coords[:4], splits[:4]) == {1, 3}
    assert find_twins([items[0], items[4]], [flat, flat], ["train", "validation"]) == {0}


# ---- Clouds ---------------------------------------------------------------------------------------------------------


def test_nothing_shapes_are_normalized_clouds():
    rng = np.random.default_rng(0)
    whole = box(rng, (1, 1, 1))
    for _ in range(30):
        cloud = make_nothing([whole], rng)
        assert cloud.shape == (NUM_POINTS, 6) and np.isfinite(cloud).all()
        assert np.linalg.norm(cloud[:, :3], axis=1).max() == pytest.approx(1, abs=1e-3)
        assert cloud[:, 3:].min() >= 0 and cloud[:, 3:].max() <= 1


def test_augmented_clouds_are_normalized_and_keep_their_object_apart():
    rng = np.random.default_rng(0)
    cloud = box(rng, (1, 0.5, 0.5))
    before = cloud.copy()
    colors = []
    for _ in range(60):
        points, item = augment(cloud, 1024, rng, recolored=0)
        assert points.shape == (1024, 6) and points.dtype == np.float32 and np.isfinite(points).all()
        assert np.linalg.norm(points[:, :3], axis=1).max() == pytest.approx(1, abs=1e-5)
        assert points[:, 3:].min() >= 0 and points[:, 3:].max() <= 1
        colors.append(main_color(item[:, 3:]))
    assert (cloud == before).all()
    assert set(colors) == {"red", "black"} and colors.count("red") > 40  # some lose their colors
    assert len({main_color(augment(cloud, 1024, rng, recolored=1)[1][:, 3:]) for _ in range(30)}) > 3


def test_clouds_are_read_from_shards_and_missing_ones_are_named(tmp_path, captions):
    items = [replace(captions[0], shard="a.npz", row=row) for row in (2, 0)]
    xyz = np.arange(3 * NUM_POINTS * 3, dtype=np.int16).reshape(3, NUM_POINTS, 3)
    np.savez(tmp_path / "a.npz", xyz=xyz, rgb=xyz.astype(np.uint8))
    found, coord, color = read_clouds(tmp_path, items)
    assert found == items
    assert (coord == xyz[[2, 0]]).all() and (color == xyz[[2, 0]].astype(np.uint8)).all()
    with pytest.raises(ValueError, match="b.npz"):
        read_clouds(tmp_path, [replace(items[0], shard="b.npz")])
    with pytest.raises(ValueError, match="more than 7"):
        read_clouds(tmp_path, [replace(items[0], row=7)])


def test_furniture_is_read_from_its_library_by_id(tmp_path, captions):
    catalog = "id#1=Maker#lamp\nname#1=Lamp\ncategory#1=Lights\nmodel#1=/lamp.obj\ncreator#1=A. Maker\n"
    with zipfile.ZipFile(tmp_path / "Good Things.sh3f", "w") as archive:
        archive.writestr("PluginFurnitureCatalog.properties", catalog)
        archive.writestr("lamp.obj", "v 0 0 0\nv 2 0 0\nv 0 4 0\nf 1 2 3\n")
    lamp = replace(captions[0], source=FURNITURE_SOURCE, pack="Good Things", object_id="sh3d/good-things-lamp")
    found, coord, _ = read_clouds(tmp_path, [captions[0], lamp])
    assert found == [lamp] and coord.shape == (1, NUM_POINTS, 3)


def test_clouds_are_read_from_packs_as_far_as_they_are_there(tmp_path, captions):
    items = [replace(captions[0], pack="Toys", file=f"models/{name}.obj") for name in ("box", "ball")]
    (tmp_path / "Toys" / "models").mkdir(parents=True)
    (tmp_path / "Toys" / "models" / "box.obj").write_text("v 0 0 0\nv 2 0 0\nv 0 4 0\nf 1 2 3\n", encoding="utf-8")
    found, coord, color = read_clouds(tmp_path, items)
    assert found == items[:1] and coord.shape == color.shape == (1, NUM_POINTS, 3)
    assert np.abs(coord).max() > 20000 and np.ptp(coord[0, :, 1].astype(int)) > 1.5 * np.ptp(
        coord[0, :, 0].astype(int)
    )
    with pytest.raises(ValueError, match="holds none of the 1 models"):
        read_clouds(tmp_path, items[1:])


# ---- Texts ----------------------------------------------------------------------------------------------------------


def test_yes_and_no_are_balanced_and_true():
    rng = np.random.default_rng(0)
    verdicts = []
    for _ in range(600):
        question, answer = yes_no(CAR, [CAR, TREE, SHAPELESS], rng)
        verdicts.append(is_yes(answer))
        if question.startswith(("Is this a", "Is this an")):
            assert is_yes(answer) == ("car" in question)
        for color in COLORS:
            if question in (f"Is it {color}?", f"Is it mostly {color}?") and "mostly" in answer:
                assert is_yes(answer) == (color == "red")
        for shape in SHAPES:
            if question == f"Is it {shape}?":
                assert is_yes(answer) == (shape == CAR.shape)
    assert None not in verdicts and 0.45 < np.mean(verdicts) < 0.55


def test_texts_name_the_object_and_never_name_nothing():
    rng = np.random.default_rng(0)
    assert what_is_this(CAR) == "This is a red sports car."
    assert what_is_this(replace(CAR, noun="candles")) == "These are red candles."
    assert what_is_this(replace(CAR, noun="bread")) == "This is red bread."
    for item in (CAR, TREE, SHAPELESS):
        records = annotate(item, [CAR, TREE], rng)
        turns = [turn for record in records for turn in record["conversations"]]
        answers = [turn["value"] for turn in turns if turn["from"] == "gpt"]
        assert {record["object_id"] for record in records} == {item.object_id}
        if item is SHAPELESS:
            assert NOT_SURE in answers and not any("nothing" in answer for answer in answers)
        else:
            assert any(item.noun in answer for answer in answers)
            assert item.brief in answers and NOT_SURE not in answers
    assert "sports car" in " ".join(keywords(CAR, rng) for _ in range(3))


def test_facts_are_measured_on_the_points():
    rng = np.random.default_rng(0)
    colors, extent = measure(box(rng, (0.1, 1, 0.1)))
    assert colors == ("red",)
    assert replace(CAR, extent=extent).shape == "tall and narrow"
    black = box(rng, (1, 1, 1))
    black[:, 3:] = 0
    view = as_seen(CAR, "car-1-v1", black)
    assert view.colors == ("black",) and view.detailed == ""
    records = annotate(view, [CAR, TREE], rng)
    assert not any("red" in turn["value"].split() for record in records for turn in record["conversations"])


def test_wordnet_gives_the_first_sense(tmp_path):
    (tmp_path / "index.noun").write_text(
        "  1 license\ncastle n 1 2 @ %p 1 1 00000200  \nfort n 1 0 1 0 00000300  \n", encoding="utf-8"
    )
    (tmp_path / "data.noun").write_text(
        '00000200 06 n 02 castle 0 palace 0 002 @ 00000300 n 0000 %p 00000400 n 0000 | a large building; "a castle"\n'
        "00000300 06 n 01 fort 0 000 | a strong place\n00000400 06 n 01 great_hall 0 000 | a room\n",
        encoding="utf-8",
    )
    meanings = WordNet(tmp_path)
    assert meanings.look_up("small castle") == Entry("a large building", "fort", ("great hall",))
    assert meanings.look_up("castles").kind_of == "fort" and meanings.look_up("zzz") is None
    assert [line["noun"] for line in meanings.concrete_nouns()] == ["castle", "fort"]
    with pytest.raises(ValueError, match="index.noun"):
        WordNet(tmp_path / "absent")


# ---- The command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def few_objects(tmp_path, monkeypatch, captions):
    """A folder of clouds of a few captioned objects, which are all that the recipe knows."""
    chosen = [
        next(item for item in captions if item.pack == pack)
        for pack in ("Space Kit", "Train Pack", "Castle Kit", "Potion Pack")
    ]
    rng = np.random.default_rng(0)
    clouds = [box(rng, size) for size in ((1, 0.2, 1), (1, 0.5, 0.2), (0.2, 1, 0.2), (1, 1, 1))]
    np.savez(
        tmp_path / "few.npz",
        xyz=np.stack([np.round(cloud[:, :3] * 32767) for cloud in clouds]).astype(np.int16),
        rgb=np.stack([np.round(cloud[:, 3:] * 255) for cloud in clouds]).astype(np.uint8),
    )
    objects = [replace(item, shard="few.npz", row=row) for row, item in enumerate(chosen)]
    monkeypatch.setattr(build_module, "read_captions", lambda path: objects)
    monkeypatch.setattr(build_module, "NUM_NOTHING", {"train": 2, "validation": 1, "test": 1})
    return tmp_path, objects


def test_the_command_writes_views_with_true_texts_and_resumes(few_objects):
    folder, objects = few_objects
    options = BuildOptions(clouds=folder, output_dir=folder / "data", views=3)
    report = build(options)
    lines = read_lines(folder / "data")
    assert [line["split"] for line in lines[:4]] == ["train", "train", "validation", "test"]
    assert report["objects"] == {"train": 4, "validation": 2, "test": 2}
    annotations = [folder / "data" / f"{name}.json" for name in report["records"]]
    samples = read_annotations(annotations)
    trained = {line["object_id"] for line in lines if line["split"] == "train"}
    seen = {sample.object_id.rsplit("-v", 1)[0] for of_source in samples.values() for sample in of_source}
    assert seen == trained
    sources = open_sources(["brief", "single_round"], str(folder / "data" / "views"), annotations)
    sample, cloud = sources["brief"].read(0, 0)
    assert cloud.shape == (1024, 6) and sample.rounds[0][1]
    before = (folder / "data" / "brief.json").read_bytes()
    (folder / "data" / "report.json").unlink()  # as if it had been stopped at the end
    assert build(replace(options, clouds=folder / "absent")) == report  # the arrays are there already
    assert (folder / "data" / "brief.json").read_bytes() == before
    views = read_lines(folder / "data", "views.jsonl")
    assert [view["object_id"][-3:] for view in views[:4]] == ["-v0", "-v1", "-v2", "-v0"] and len(views) == 3 * len(
        trained
    )
    assert all(sum(view["colors"]) == pytest.approx(1, abs=0.01) and view["shape"] in SHAPES for view in views)


def test_the_encoder_trains_scores_and_resumes(few_objects):
    folder, _ = few_objects
    build(BuildOptions(clouds=folder, output_dir=folder / "data", views=1))
    options = encoder.EncoderOptions(
        data=folder / "data", output_dir=folder / "run", width=64, layers=1, batch_size=4, steps=2, score_every=1
    )
    first = encoder.train(options)
    assert {"kind", "kind_top5", "color", "nothing_found", "linear_probe"} <= first.keys()
    again = encoder.train(replace(options, steps=3))
    steps = [json.loads(line)["step"] for line in (folder / "run" / "scores.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3] and again["step"] == 3
    before, after = (
        torch.load(folder / "run" / "checkpoint.pt", weights_only=True)[k] for k in ("network", "average")
    )
    weight = "point_encoder.blocks.0.attention.qkv.weight"
    assert not torch.equal(before[weight], after[weight]) and torch.isfinite(before[weight]).all()


@pytest.mark.slow
def test_a_step_of_the_language_model_moves_its_weights(few_objects, monkeypatch):
    folder, _ = few_objects
    build(BuildOptions(clouds=folder, output_dir=folder / "data", views=1))
    options = language.LanguageOptions(
        data=folder / "data", output_dir=folder / "run", batch_size=2, steps=1, score_every=1
    )
    monkeypatch.setattr(language, "score", lambda model, processor, texts: {"validation_loss": 0.0})
    sizes = []
    clip = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *args: sizes.append(clip(*args)) or sizes[-1])
    scores = language.train(options)
    assert scores["step"] == 1 and 0 < sizes[0] < 1e3  # no path of exploding gradients
    assert (folder / "run" / "tokenizer" / "tokenizer.json").is_file()


@pytest.mark.slow
def test_encoded_views_lead_from_the_parts_to_a_model_that_answers(few_objects, monkeypatch):
    folder, _ = few_objects
    data, base, run = folder / "data", folder / "base", folder / "stages"
    build(BuildOptions(clouds=folder, output_dir=data, views=2))
    encoder.train(encoder.EncoderOptions(data=data, output_dir=folder / "encoder", batch_size=2, steps=1))
    language.train(language.LanguageOptions(data=data, output_dir=folder / "language", batch_size=2, steps=1))
    options = qformer.QFormerOptions(
        data=data, encoder=folder / "encoder", language=folder / "language", output_dir=base, views=2, steps=1
    )
    with pytest.raises(ValueError, match="`views` is 3"):
        qformer.pretrain(replace(options, views=3))
    assert {"qformer_kind", "qformer_color"} <= qformer.pretrain(options).keys()
    stages.train_stages(stages.StageOptions(data=data, base=base, output_dir=run, views=2, steps=[1, 1, 1, 1]))
    model, processor = load_model(run / "checkpoint", dtype=torch.float32)
    assert model.config.router_type == "sparse"
    # What the stages read in place of a view's cloud is what the complete model makes of the cloud.
    view = np.load(data / "views" / f"{read_lines(data, 'views.jsonl')[1]['object_id']}_8192.npy").astype(np.float32)
    features = np.load(folder / "base.features" / "features.npy")[1]
    torch.testing.assert_close(
        model.model.point_encoder(torch.from_numpy(view[None])).last_hidden_state[0],
        torch.from_numpy(features).float(),
        atol=5e-3,
        rtol=5e-3,
    )
    assert len(Asker(model, processor).ask([view], ["What is this?"])) == 1


# ---- Marks ----------------------------------------------------------------------------------------------------------


def test_marks_count_true_answers():
    items = [CAR, TREE, SHAPELESS]
    lines = [{"noun": item.noun, "kind": item.kind} for item in items[:2]]
    nouns = Nouns(lines)
    assert nouns.first("Two pine trees beside a car.") == "pine tree" and nouns.kinds("A shiny car") == {"car"}
    assert nouns.first("I am not sure.") is None
    answers = {
        "what": ["This is a red sports car.", "This is a red sports car.", NOT_SURE],
        "color": ["It is red.", "It is red.", "It is blue."],
        "shape": [f"It is {CAR.shape}.", f"It is {CAR.shape}.", ""],
        "yes_no": ["Yes, it is a car.", "It is a tree."],
    }
    result = mark_answers(items, ["kenney", "sh3d", NOTHING], answers, ["Yes, it is.", "No, it is not."], nouns)
    shares = {name: value[0] for name, value in result.items() if isinstance(value, list)}
    assert shares == {
        "kind": 1, "furniture_kind": 0, "noun": 1, "color": 0.5, "shape": 0.5, "yes_no": 0.5,
        "not_sure_nothing": 1, "not_sure_known": 0,
    }  # fmt: skip
    assert result["sentences"] == 1 and result["nouns"] == 1


def test_spoiled_clouds():
    rng = np.random.default_rng(0)
    cloud = box(rng, (0.2, 1, 0.4))
    assert len(spoil(cloud, "outliers", rng)) == NUM_POINTS + NUM_POINTS // 100
    floor = spoil(cloud, "floor", rng)[NUM_POINTS:]
    assert len(floor) == NUM_POINTS // 4 and floor[:, 1].max() < cloud[:, 1].min() + 0.1
    turned = spoil(cloud, "z up", rng)
    assert np.ptp(turned[:, 2]) == pytest.approx(np.ptp(cloud[:, 1])) and turned.dtype == np.float32


def test_a_model_is_asked_in_batches_and_in_talks(tiny_model, tiny_processor, monkeypatch):
    monkeypatch.setattr(marks, "BATCH", 2)
    clouds = [box(np.random.default_rng(seed), (1, seed, 1)) for seed in (1, 2, 3)]
    asker = Asker(tiny_model, tiny_processor)
    questions = ["What is this?", "What is its main color of all?", "Is it?"]
    assert asker.ask(clouds, questions) == [
        asker.ask([cloud], [q])[0] for cloud, q in zip(clouds, questions, strict=True)
    ]
    talks = [[], []]
    for question in ("What is this?", "Is it?"):
        asker.go_on(clouds[:2], talks, [question] * 2)
    assert [message["role"] for message in talks[1]] == ["user", "assistant"] * 2
    blind = Asker(tiny_model, tiny_processor, blind=True).ask(clouds, ["What is this?"] * 3)
    assert len(set(blind)) == 1


def test_kinds_are_ranked_by_the_likelihood_of_their_whole_name(tiny_model, tiny_processor, monkeypatch):
    kinds, clouds = (
        ["car", "boat", "carpet of wool"],
        [box(np.random.default_rng(seed), (1, seed, 1)) for seed in (1, 2)],
    )
    asked = []

    def fake(model, point_clouds, prompt, answers):
        asked[:] = [tiny_processor.tokenizer.decode(ids) for ids in answers]
        return np.array([[-2.0, -1.0, -3.0]] * len(point_clouds))

    monkeypatch.setattr(marks, "answer_log_likelihoods", fake)
    assert marks.rank_kinds(tiny_model, tiny_processor, clouds, kinds).tolist() == [[1, 0, 2]] * 2
    assert [text.strip() for text in asked] == ["Car:", "Boat:", "Carpet of wool:"]


def test_a_talk_agrees_if_it_says_yes_and_keeps_its_color(monkeypatch):
    asker = Asker.__new__(Asker)
    replies = iter(
        (["A red car.", "A car.", "A red car."], ["Yes.", "Yes.", "No."], ["It is red.", "It is blue.", "Red."])
    )
    monkeypatch.setattr(asker, "go_on", lambda clouds, talks, questions: next(replies), raising=False)
    assert asker.talk([None] * 3, Nouns([{"noun": "car", "kind": "car"}])) == [True, True, False]


def test_the_list_of_creators_is_up_to_date(captions):
    text = creators(captions)
    assert CREATORS_FILE.read_text(encoding="utf-8") == text
    assert all(item.creator in text for item in captions if item.license != "CC0-1.0")
