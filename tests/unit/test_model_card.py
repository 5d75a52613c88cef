"""The model card: its text for each kind of folder, and that every number in it has a source."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from minigpt3d.hub import fingerprint_model
from minigpt3d.model_card.ablation import ablation_report
from minigpt3d.model_card.emissions import estimate_emissions, read_given
from minigpt3d.model_card.evaluations import CardError
from minigpt3d.model_card.facts import Fact, find_unsourced, take_marks
from minigpt3d.model_card.model_index import eval_results, model_index
from minigpt3d.model_card.readme import SOURCES_FILE, write_card
from minigpt3d.model_card.render import TEMPLATES


ROOT = Path(__file__).resolve().parents[2]
HOUSEHOLD = ROOT / "checkpoints" / "household"
SECTIONS = (
    "Intended use", "Input", "Training", "Evaluation", "Limits", "Licenses", "Cost and CO2", "How to cite",
    "Sources of the numbers",
)  # fmt: skip


METRICS = {
    "closed_set_accuracy": {"title": "closed-set accuracy", "unit": "share", "lower_is_better": False},
    "caption_score": {"title": "caption score", "unit": "score100", "lower_is_better": False},
    "hallucination": {"title": "wrong details", "unit": "count", "lower_is_better": True},
}
METRICS = {name: metric | {"is_ratio": False, "prompt": name} for name, metric in METRICS.items()}


def score(condition: str, value: float, metric: str = "closed_set_accuracy", **more) -> dict:
    entry = {"question": "what", "condition": condition, "metric": metric, "value": value, "unit": "share"}
    entry |= {"low": value - 0.07, "high": value + 0.06, "objects": 100, "unparsed": 0, "judge": None}
    return entry | {"interval": "Wilson"} | more


def paired(metric: str, gain: bool = True) -> dict:
    entry = {
        "question": "what",
        "metric": metric,
        "a": "seeing",
        "b": "blind",
        "difference": 0.6,
        "low": 0.5,
        "high": 0.7,
    }
    return entry | {
        "p": 0.01,
        "test": "McNemar exact",
        "gain": gain,
        "words": f"{metric} differs by 0.600 on 100 objects.",
    }


def make_results(**changes) -> dict:
    results = {
        "schema": 2,
        "suite": "household",
        "date": "2026-11-23",
        "command": "minigpt3d evaluate household --model tiny --out out",
        "seed": 7,
        "dataset": {"name": "household", "objects": 100, "of": 100, "fingerprint": "0123456789abcdef"},
        "model": {"name": "tiny", "parameters": 3607193, "dtype": "float32", "fingerprint": "fedcba9876543210"},
        "decoding": {"num_beams": 2, "do_sample": True, "top_p": 0.7, "temperature": 0.2, "max_new_tokens": 100},
        "template": "default",
        "questions": {"what": "What is this?"},
        "versions": {"python": "3.11"},
        "device": "cpu",
        "generation": {"answers": 300, "seconds": 41.2, "objects_per_second": 2.4, "cut": 0},
        "judge": None,
        "metrics": METRICS,
        "confidence": 0.95,
        "few_objects": 20,
        "scores": [
            score("seeing", 0.713),
            score("blind", 0.084),
            score("jitter-1", 0.697),
            score("jitter-5", 0.312),
        ],
        "tests": [paired("closed_set_accuracy")],
        "classes": None,
    }
    return results | changes


JUDGE = {"model": "Qwen2-72B-Instruct", "endpoint": "127.0.0.1", "date": "2026-11-22", "calls": 200, "cached": 0}
JUDGE |= {"prompts": {"caption_score": "aaaabbbbccccdddd"}, "unparsed": 3, "cost": None}
JUDGED = make_results(
    judge=JUDGE,
    scores=[
        score("seeing", 48.17, "caption_score", unit="score100", judge=JUDGE["model"], unparsed=3),
        score("shuffled", 12.5, "caption_score", unit="score100", judge=JUDGE["model"]),
    ],
    tests=[],
    generation={"answers": 300, "seconds": 41.2, "objects_per_second": 2.4, "cut": 4},
)


@pytest.fixture
def make_run(tmp_path):
    """`make_run("name", results)` → folder of an evaluation."""

    def make(name: str, results: dict) -> Path:
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(results))
        return tmp_path / name

    return make


@pytest.fixture
def change_template(tmp_path, monkeypatch):
    """`change_template("card.jinja", old, new)`."""

    def change(name: str, old: str, new: str):
        for template in TEMPLATES.glob("*.jinja"):
            text = template.read_text()
            assert template.name != name or old in text
            (tmp_path / template.name).write_text(text.replace(old, new) if template.name == name else text)
        monkeypatch.setattr("minigpt3d.model_card.render.TEMPLATES", tmp_path)

    return change


@pytest.fixture
def household(tmp_path) -> Path:
    """A copy of the bundled checkpoint."""
    return Path(shutil.copytree(HOUSEHOLD, tmp_path / "household"))


STAGE = {
    "stage": "III", "recipe": "paper", "init": "stage2", "seed": 42, "router_type": "none", "data": "00ff", "step": 3,
    "data_name": "packed", "device": "NVIDIA H200", "processes": 2, "versions": {"Python": "3.11.9", "torch": "2.13.0"},
    "row": {
        "teaches": "the same parameters learn detailed descriptions", "steps": 30000, "warmup_steps": 3000,
        "warmup_lr": 1e-6, "peak_lr": 1e-5, "min_lr": 1e-6,
        "mixture": [{"name": "detailed", "batch": 6, "weight": 2}, {"name": "single_round", "batch": 10, "weight": 3}],
    },
}  # fmt: skip
HISTORY = [
    {"step": 0, "source": "detailed", "loss": 2.25, "samples_per_second": 0.5, "validation_before": 2.5},
    {"step": 1, "source": "single_round", "loss": 2.0, "samples_per_second": 0.25},
    {"step": 2, "source": "detailed", "loss": 1.125, "samples_per_second": 2.0, "validation_after": 1.25},
]
HOURS = (6 / 0.5 + 10 / 0.25 + 6 / 2) / 3600


@pytest.fixture
def adapter(tmp_path) -> Path:
    """What a stage leaves behind."""
    folder = tmp_path / "stage3"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base"}))
    save_file({"a.lora_A.weight": torch.zeros(4, 300)}, folder / "adapter_model.safetensors")
    (folder / "stage.json").write_text(json.dumps(STAGE))
    (folder / "history.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in HISTORY))
    return folder


@pytest.fixture
def release(tmp_path) -> Path:
    """What `minigpt3d convert` makes of the authors' files."""
    folder = tmp_path / "release"
    folder.mkdir()
    for name in ("config.json", "processor_config.json"):
        shutil.copyfile(HOUSEHOLD / name, folder / name)
    slots = ("phi", "blip2", "point_encoder", "tinygpt_v", "stage3", "stage4")
    record = {"files": {slot: {"source": "local", "files": {}} for slot in slots}, "lora": "merge"}
    record |= {"router_type": "sparse", "summary": ["file  tensors", "phi   453"]}
    (folder / "provenance.json").write_text(json.dumps(record))
    return folder


# ---- No number without its source -----------------------------------------------------------------------------------


def resolve(source: str, files: dict[str, Path]):
    """The value at `FILE#/POINTER`."""
    name, pointer = source.split("#/")
    value = json.loads(files[name].read_text())
    for key in pointer.split("/"):
        key = key.replace("~1", "/").replace("~0", "~")
        value = value[int(key)] if isinstance(value, list) else value[key]
    return value


def says(text: str, value) -> bool:
    """Whether a text is a way to print a value: as it is, rounded, or as a percentage."""
    if isinstance(value, str):
        return re.sub(r"\\([|_*`])", r"\1", text) in (value, " ".join(value.split()))
    if isinstance(value, bool) or not re.fullmatch(r"[+-]?[\d.,]+( %)?|[\d.]+e-\d+", text):
        return text == json.dumps(value)
    number = float(text.removesuffix(" %").replace(",", ""))
    value *= 100 if text.endswith(" %") else 1
    digits = len(text.removesuffix(" %").partition(".")[2]) if "e" not in text else 12
    return abs(number - value) <= 0.5000001 * 10**-digits


def numbers_of(card: str) -> list[str]:
    """Numbers in the prose and the tables of a finished card."""
    card = card.split("\n---\n", 1)[1]
    card = re.sub(r"^```.*?^```$", "", card, flags=re.DOTALL | re.MULTILINE)
    card = re.sub(r"`[^`\n]+`|https?://\S+|\]\(.*?\)|arXiv \S+", "", card)
    # A name, a license, a gas or a hash is not a number.
    for name in ("MiniGPT-3D", "BLIP-2", "Phi-2", "ULIP-2", "3D", "CO2e", "CO2", "Apache-2.0", "BSD-3-Clause",
                 "CC BY-NC-SA 4.0", "SHA-256"):  # fmt: skip
        card = card.replace(name, "")
    return re.findall(r"\d+(?:[.,]\d+)*", card)


def check_sources(folder: Path, **files: Path):
    """Every number of the card is in card_sources.json, in order, and every place holds the value that the card states."""
    card = (folder / "README.md").read_text()
    sources = json.loads((folder / SOURCES_FILE).read_text())
    files |= {path.name: path for path in folder.glob("*.json")}
    sourced = [number for entry in sources for number in re.findall(r"\d+(?:[.,]\d+)*", entry["text"])]
    for number in numbers_of(card):
        assert number in sourced, f"{number} has no source"
        sourced = sourced[sourced.index(number) + 1 :]
    for entry in sources:
        if "#/" in entry["source"]:
            value = resolve(entry["source"], files)
            if row := re.match(
                r"ablation.json#(/rows/\d+/)(?!variant)", entry["source"]
            ):  # the percent sign is in the table's head
                value *= 1 if resolve(f"ablation.json#{row[1]}measure", files) == "loss" else 100
            is_key = entry["source"].endswith("/" + entry["text"])  # the label of a row is the last part of its place
            assert is_key or says(entry["text"], value), entry
    return card


def test_bundled_card_is_up_to_date(tmp_path, monkeypatch):
    shutil.copytree(HOUSEHOLD, tmp_path / "checkpoints" / "household")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "model_card", tmp_path / "model_card")
    household, ablation = Path("checkpoints/household"), Path("model_card/ablation.json")
    write_card(household, [household / "evaluation"], ablation=ablation, fingerprint=fingerprint_model(str(household)))
    for name in ("README.md", SOURCES_FILE):
        assert (household / name).read_text() == (HOUSEHOLD / name).read_text(), (
            "run the command at the end of the card"
        )
    results = household / "evaluation" / "results.json"
    card = check_sources(household, **{"evaluation/results.json": results, "ablation.json": ablation})
    assert len(numbers_of(card)) > 600
    sources = [entry["source"] for entry in json.loads((household / SOURCES_FILE).read_text())]
    assert len([source for source in sources if re.fullmatch(r"ablation.json#/rows/\d+/\w+", source)]) > 250


def test_cards_of_all_kinds_hold_no_number_without_source(household, adapter, release, make_run):
    one, two = make_run("one", make_results()), make_run("two", JUDGED)
    given = read_given(["watts=285:nvidia-smi, mean", "pue=1.2:the building, 2025", "grid=56.5:RTE, 2025"])
    runs = {"one/results.json": one / "results.json", "two/results.json": two / "results.json"}
    for folder in (household, adapter, release):
        write_card(folder)
        bare = check_sources(folder)
        write_card(folder, [one, two], given)
        full = check_sources(folder, **runs)
        for card in (bare, full):
            assert [line[3:] for line in card.splitlines() if line.startswith("## ")] == list(SECTIONS)
            assert not re.search("[\ue000-\ue002]|\bNone\b|Undefined", card)
        assert len(numbers_of(full)) > len(numbers_of(bare)) + 20


@pytest.mark.parametrize(
    "text, number",
    [
        ("It is right in 71 % of cases.", "71"),
        ("| accuracy | 0.71 |", "0.71"),
        ("Trained for {{ emissions.inputs[0][1].raw }} hours.", "0.8"),  # from a file, but printed without its place
        ("It was {{ runs|length }}2 times better.", "02"),
        ("It reaches `97 %` of people, see `file-7.json`.", "97"),
        ("It reaches `(97 %)`.", "97"),
        ("It reaches `about 97;` in `jitter-5`, `a_1.json`.", "97"),
        ("````bash\nsome ```\n````\n\n77 people are right.\n\n```bash\nfoo\n```\n", "77"),
        ("**3** of MiniGPT-3D's experts, arXiv 2405.01413, see `file-7.json`", "3"),
    ],
)
def test_number_without_source_is_refused(household, change_template, text, number):
    before = (household / "README.md").read_text()
    change_template("card.jinja", "## Limits\n", f"## Limits\n\n{text}\n")
    with pytest.raises(CardError, match=rf"without a source: “[^”]*{re.escape(number)}[^”]*”\. "):
        write_card(household)
    assert (household / "README.md").read_text() == before


def test_check_sources_finds_changed_numbers(household):
    """The check in this file can fail."""
    card = (household / "README.md").read_text()
    for number, other in (("| 820 |", "| 821 |"), ("0.70 (0.60", "0.98 (0.60"), ("toilet 0/3", "toilet 7/9")):
        assert number in card
        (household / "README.md").write_text(card.replace(number, other, 1))
        with pytest.raises(AssertionError, match="has no source"):
            check_sources(household)
    (household / "README.md").write_text(card)
    sources = json.loads((household / SOURCES_FILE).read_text())
    entry = next(entry for entry in sources if entry["source"] == "recipe.json#/counts/objects")
    entry["source"] = "recipe.json#/counts/libraries"
    (household / SOURCES_FILE).write_text(json.dumps(sources))
    with pytest.raises(AssertionError, match="820"):
        check_sources(household)


def test_numbers_in_texts_of_a_recipe_are_refused(household):
    recipe = json.loads((household / "recipe.json").read_text())
    recipe["limits"].append("It is wrong in 29 % of cases.")
    (household / "recipe.json").write_text(json.dumps(recipe))
    with pytest.raises(CardError, match="29 %.*recipe.json.*counts"):
        write_card(household)


def test_places_of_facts():
    fact = Fact({"a/b": [{"value": 0.5, "none": None}], "zero": 0}, "results.json")
    assert fact["a/b"][0]["value"].place == "results.json#/a~1b/0/value"
    assert fact["a/b"][0]["none"] is None and not fact["zero"] and fact["zero"] == 0
    text, sources = take_marks(f"{fact['zero']} of {next(iter(fact['a/b']))['value'].says('50 %')}, {Fact('no', 'x')}")
    assert text == "0 of 50 %, no"
    assert sources == [
        {"text": "0", "source": "results.json#/zero"},
        {"text": "50 %", "source": "results.json#/a~1b/0/value"},
    ]
    forged = Fact("\ue000made up\ue001 7", "x")  # marks in the text of a fact are removed
    assert take_marks(f"{forged}") == ("made up 7", [{"text": "made up 7", "source": "x"}])
    assert find_unsourced(f"{forged} and 7") == ["and 7"]


# ---- Text of the card -----------------------------------------------------------------------------------------------


def test_results_with_controls(household, make_run):
    card = write_card(household, [make_run("one", make_results())], model_id="org/model").read_text()
    assert "| what | closed-set accuracy | 71.3 % (64.3 % to 77.3 %) | 8.4 % (" in card
    assert "– | – | 100 | 0 | none |" in card  # neither without colors nor with another object's answer
    assert re.search("^- what, closed-set accuracy: .*0.600 on 100 objects", card, re.M)
    assert "No judge" in card and "`top_p` 0.7" in card and "2026-11-23" in card
    assert "```bash\nminigpt3d evaluate household --model tiny --out out\n```" in card
    # The worst corruption is a limit; the others are in the evaluation's report.
    assert "| jitter" not in card
    assert re.search("31.2 %.* 71.3 %.*`jitter-5`", card)
    assert "no better than blind" not in card
    assert 'model="org/model"' in card


def test_subset_of_the_objects_is_a_limit(household, make_run):
    part = make_results()
    part["dataset"] |= {"objects": 12, "of": 1234}
    for entry in part["scores"]:
        entry["objects"] = 12
    card = write_card(household, [make_run("part", part)]).read_text()
    assert "12 of 1,234 objects" in card and "first 12 of 1234 objects" in card
    assert ": fewer than 20 objects" in card
    whole = write_card(household, [make_run("whole", make_results())]).read_text()
    assert "only the first" not in whole and "fewer than" not in whole and "The first" not in whole


def test_names_are_escaped(household, make_run):
    nasty = "<img src=x> | `x` **b**"
    judged = json.loads(json.dumps(JUDGED).replace(JUDGE["model"], nasty))
    judged["tests"] = [paired("caption_score") | {"words": f"{nasty} is better."}]
    path = write_card(household, [make_run("two", judged | {"command": "minigpt3d ```\n# head"})])
    card = path.read_text().partition("\n---\n")[2]
    assert nasty not in card and card.count(r"&lt;img src=x> \| \`x\` \*\*b\*\*") == 3  # judge, row, test
    assert "\n````bash\nminigpt3d ```\n# head\n````\n" in card


def test_number_without_source_in_the_ablation_is_refused(household, change_template):
    content = ROOT / "model_card" / "ablation.json"
    write_card(household, ablation=content)
    change_template("ablation.jinja", "{{ heading }} Findings", "71 % are right.")
    with pytest.raises(CardError, match="71 % are right"):
        write_card(household, ablation=content)


def test_report_of_the_ablation_is_up_to_date():
    content = json.loads((ROOT / "model_card" / "ablation.json").read_text())
    assert ablation_report(content) == (ROOT / "model_card" / "ablation.md").read_text()


@pytest.mark.parametrize("value, significant", [(0.049, True), (0.05, False)])
def test_significance_in_the_ablation(value, significant):
    content = json.loads((ROOT / "model_card" / "ablation.json").read_text())
    rows = [row for row in content["rows"] if row["variant"] in ("full recipe", "without stage II")]
    rows[3]["p"], rows[4]["p"], rows[5]["p"] = value, 1, 1
    content |= {"rows": rows, "same": []}
    text = ablation_report(content)
    assert ("**-5.5 (-10.3 to -0.7)**" in text) is significant
    assert bool(re.search("Significant: .*stage II: kind named -5.5", text)) is significant
    assert "**experts**" not in text and "Different names" not in text


def test_judge_and_unparsed_answers(household, make_run):
    card = write_card(household, [make_run("two", JUDGED)]).read_text()
    assert re.search("Judge: Qwen2-72B-Instruct, 2026-11-22.*`caption_score` `aaaabbbbccccdddd`", card)
    assert (
        "| what | caption score | 48.2 (48.1 to 48.2) | – | – | 12.5 (12.4 to 12.6) | 100 | 3 | Qwen2-72B-Instruct |"
        in card
    )
    assert re.search("`caption_score`: 3 of 100 .*parsed", card)
    assert re.search("4 .*cut off", card)
    assert "no blind control" in card


@pytest.mark.parametrize("gain", [True, False])
def test_no_gain_over_the_blind_control_is_a_limit(household, make_run, gain):
    run = make_run("one", make_results(tests=[paired("closed_set_accuracy", gain)]))
    assert ("`closed_set_accuracy`: no better than blind" in write_card(household, [run]).read_text()) is not gain


def test_worst_corruption_of_a_metric_with_lower_is_better(household, make_run):
    scores = [score(condition, value, "hallucination", unit="count") for condition, value in
              (("seeing", 1.5), ("jitter-1", 1.25), ("jitter-5", 3.0))]  # fmt: skip
    card = write_card(household, [make_run("one", make_results(scores=scores, tests=[]))]).read_text()
    assert re.search("3.00 instead of 1.50 .*`jitter-5`", card)


def test_metadata_is_made_from_the_results(household, make_run):
    whole = {"name": "modelnet40", "objects": 2468, "of": 2468, "fingerprint": "0123456789abcdef"}
    results = make_results(suite="modelnet40", dataset=whole)
    card = write_card(household, [make_run("one", results)]).read_text()
    metadata = yaml.safe_load(card.split("---\n")[1])
    assert metadata["license"] == "apache-2.0" and "arxiv:2405.01413" in metadata["tags"]
    assert metadata["model-index"] == model_index([results]) and "71.3" in str(metadata["model-index"])
    written = {path.name: path.read_text() for path in (household / ".eval_results").iterdir()}
    assert set(written) == {"modelnet40.yaml"} and written == eval_results([results])
    assert metadata["model-index"][0]["results"][0]["dataset"]["type"] == "RunsenXu/PointLLM"
    # A subset is not the Hub's data set, and files of an earlier card are removed.
    (household / ".eval_results" / "mine.yaml").write_text("[]")
    card = write_card(household, [make_run("two", make_results(suite="modelnet40"))]).read_text()
    assert [path.name for path in (household / ".eval_results").iterdir()] == ["mine.yaml"]
    assert "RunsenXu" not in card.split("---\n")[1]


def test_card_of_a_stage(adapter):
    card = write_card(adapter, model_id="org/model").read_text()
    assert yaml.safe_load(card.split("---\n")[1])["base_model"] == "org/base"
    assert "# MiniGPT-3D, stage III\n" in card and "1,200 parameters" in card
    assert 'PeftModel.from_pretrained(model, "org/model")' in card
    assert re.search(r"\| steps \| 3 of .*30,000 .*paper.* 42 \|", card)
    assert "| detailed 6 (weight 2), single_round 10 (weight 3) |" in card
    assert re.search(r"\| loss \| 2.250 .*first.* 1.125 .*last", card)
    assert re.search(r"held-out data \| 2.500 before, 1.250 after", card)
    assert "| devices | 2 × NVIDIA H200 |" in card
    assert f"| wall time of the training | {HOURS:.3g} h | history.jsonl: batch of each step" in card
    assert "curves.png" not in card
    assert "No evaluation is given" in card and "error rate was not measured" in card
    # minigpt3d convert records less about a stage.
    (adapter / "stage.json").write_text(
        json.dumps({"stage": "III", "init": "minigpt3d convert", "router_type": "none"})
    )
    card = write_card(adapter).read_text()
    assert "Stage III, from `minigpt3d convert`." in card
    assert "fine-tuned" not in card.lower()
    assert re.search("Not measured: wall time.*; mean power", card)


def test_card_of_a_fine_tuned_model(adapter):
    stage = json.loads((adapter / "stage.json").read_text())
    for content in (stage | {"stage": "own"}, {"stage": "own", "init": "x", "router_type": "none"}):
        (adapter / "stage.json").write_text(json.dumps(content))
        card = write_card(adapter).read_text()
        assert "fine-tuned" in card.lower() and "stage own" not in card.lower()


def test_card_of_a_release_lists_licenses(release):
    card = write_card(release).read_text()
    metadata = yaml.safe_load(card.split("---\n")[1])
    assert metadata["license"] == "cc-by-nc-sa-4.0" and metadata["base_model"] == "microsoft/phi-2"
    for row in (
        "| Phi-2, the language model | Microsoft | MIT |",
        "| BLIP-2's Q-Former and queries | Salesforce | BSD-3-Clause |",
        "| weights of MiniGPT-3D's stage IV | the authors of MiniGPT-3D | CC BY-NC-SA 4.0 |",
        "| code | the contributors of MiniGPT-3D for the Hub | Apache-2.0 |",
    ):
        assert row in card
    assert "phi   453" in card and "arXiv 2405.01413" in card and "@article{tang2024minigpt," in card


# ---- Cost -----------------------------------------------------------------------------------------------------------


def test_emissions_need_all_inputs(adapter):
    options = [
        "hours=10:my watch",
        "watts=300:nvidia-smi, mean",
        "pue=1.5:the building",
        "grid=50:the grid's operator",
    ]
    full = estimate_emissions(None, read_given(options))
    assert full["energy"].raw == pytest.approx(4.5) and full["emissions"].raw == pytest.approx(0.225)
    assert full["missing"] == []
    for left_out in range(4):
        part = estimate_emissions(None, read_given(options[:left_out] + options[left_out + 1 :]))
        assert part["emissions"] is None and len(part["missing"]) == 1
        assert (part["energy"] is None) is (left_out < 3)
    card = write_card(adapter, given=read_given(options)).read_text()
    assert "| wall time of the training | 10 h | my watch |" in card  # it precedes the history's
    assert "| energy | 4.5 kWh | hours × watts × pue |" in card
    assert "| emissions | 0.225 kg CO2e | hours × watts × pue × grid |" in card and "Not measured" not in card
    check_sources(adapter)
    card = write_card(adapter, given=read_given(options[:3])).read_text()
    assert re.search("Not measured: emissions.*not stated", card)


@pytest.mark.parametrize(
    "option", ["watts=300", "watts=300:", "watts=much:me", "power=3:me", "pue=0.9:me", "grid=-1:me", "watts=inf:me"]
)
def test_given_numbers_need_a_source(option):
    with pytest.raises(ValueError, match=f"`co2` '{option}': expected NAME=VALUE:SOURCE"):
        read_given([option])


# ---- Files ----------------------------------------------------------------------------------------------------------


def test_command_of_the_card_writes_it_again(household, make_run, monkeypatch, tmp_path):
    make_run("one", make_results())
    content = json.loads((HOUSEHOLD.parent.parent / "model_card" / "ablation.json").read_text())
    (tmp_path / "ablation").mkdir()
    (tmp_path / "ablation" / "ablation.json").write_text(json.dumps(content | {"command": "## a comment"}))
    (tmp_path / "ablation" / "ablation.png").write_bytes(b"picture")
    monkeypatch.chdir(tmp_path)
    given = read_given(["watts=85.5:a meter, 5 minutes"])
    card = write_card("household", ["one"], given, ablation="ablation").read_text()
    files = {name: tmp_path / name for name in ("one/results.json", "ablation/ablation.json")}
    check_sources(household, **files | {"ablation.json": files["ablation/ablation.json"]})
    words = shlex.split(card.rsplit("```bash\n", 1)[1].removesuffix("\n```\n"))
    assert words == ["minigpt3d", "card", "household", "--results", "one", "--co2", "watts=85.5:a meter, 5 minutes",
                     "--ablation", "ablation"]  # fmt: skip
    assert write_card("household", ["one"], read_given([words[6]]), words[8]).read_text() == card
    assert "### Ablations\n\nVariants of" in card and (household / "ablation.png").read_bytes() == b"picture"
    assert "\n#### Findings\n\n" in card and "\n```bash\n## a comment\n```\n" in card


def test_command_has_the_model_id(household, monkeypatch):
    monkeypatch.chdir(household.parent)
    card = write_card("household", model_id="me/model").read_text()
    assert card.endswith("```bash\nminigpt3d card household --model-id me/model\n```\n") and 'model="me/model"' in card
    with pytest.raises(ValueError, match="`model_id` 'not an id/x/y'.*Hub id"):
        write_card("household", model_id="not an id/x/y")


def test_card_holds_no_local_path(household, make_run, tmp_path):
    card = write_card(household, [make_run("one", make_results())]).read_text()
    assert str(tmp_path) not in card + (household / SOURCES_FILE).read_text()


def test_wrong_folders_and_results_are_refused(household, make_run, tmp_path):
    with pytest.raises(ValueError, match="config.json"):
        write_card(tmp_path)
    with pytest.raises(ValueError, match="`results` .*none: no such file"):
        write_card(household, [tmp_path / "none"])
    with pytest.raises(ValueError, match="schema 2.* 1"):
        write_card(household, [make_run("old", make_results(schema=1))])
    run = make_run("one", make_results())
    with pytest.raises(CardError, match="weights 00,.*tiny.*fedcba9876543210"):
        write_card(household, [run], fingerprint="00")
    with pytest.raises(ValueError, match="twice.*one, .*one"):
        write_card(household, [run, run / "results.json"])
    before = (household / "README.md").read_text()
    for name, text in (("list.json", "[1]"), ("notes.md", "# Notes\n\n| 99.9 |"), ("results.json", '{"rows": []}')):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=f"`ablation` .*{name}: expected an ablation.json"):
            write_card(household, ablation=tmp_path / name)
    with pytest.raises(FileNotFoundError):
        write_card(household, ablation=tmp_path)
    assert (household / "README.md").read_text() == before
    write_card(household, [run], fingerprint="fedcba9876543210")
    (run / "results.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        write_card(household, [run])
