"""Every way to save gives a folder that a process without this package loads, pipeline included.

One process, where the package is absent, reads what this one has saved, saves it in the same ways, and answers; a second reads
that. Imports of torch and transformers take most of the time.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from ways_in import make_cloud, make_processor, make_seeing_model

from minigpt3d.hub import save_pretrained


# Defines `save_all(model, processor, folder)`, and `answer(folder, cloud)`; run here and where the package is absent.
WAYS = """
import copy
from pathlib import Path
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments, pipeline

def save_all(model, processor, describe, folder):
    for name in ("model and processor", "checkpoint", "merged"):
        processor.save_pretrained(folder / name)
    model.save_pretrained(folder / "model and processor")
    describe.save_pretrained(folder / "pipeline")
    arguments = TrainingArguments(str(folder / "trainer"), report_to=[], use_cpu=True, save_strategy="no")
    Trainer(model, arguments, processing_class=processor).save_model(str(folder / "checkpoint"))
    lora = LoraConfig(target_modules=["query_key_value"], modules_to_save=["router.linear_1", "router.linear_2"])
    adapted = get_peft_model(copy.deepcopy(model), lora)
    adapted.merge_and_unload().save_pretrained(folder / "merged")
    processor.tokenizer.save_pretrained(folder / "tokenizer")
    model.config.save_pretrained(folder / "config")
    processor.feature_extractor.save_pretrained(folder / "feature extractor")

def answer(folder, cloud, **options):
    describe = pipeline("point-cloud-to-text", model=str(folder), device="cpu", **options)
    return describe, describe(cloud, max_new_tokens=8)[0]["generated_text"]
"""
FOLDERS = ("model and processor", "pipeline", "checkpoint", "merged")

# argv: a folder of folders, a cloud, and a folder to save to, or "". Prints the answers as JSON.
FRESH_PROCESS = f"""
import json, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "minigpt3d":
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
{WAYS}
torch.set_num_threads(1)
read, cloud, write = sys.argv[1:]
answers = {{}}
for name in {FOLDERS}:
    describe, answers[name] = answer(Path(read) / name, cloud, trust_remote_code=True)
assert type(describe.model).__module__.startswith("transformers_modules.")
if write:
    model = AutoModelForImageTextToText.from_pretrained(Path(read) / "pipeline", trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(Path(read) / "pipeline", trust_remote_code=True)
    save_all(model, processor, describe, Path(write))
print(json.dumps(answers))
"""


def run_fresh(cwd: Path, *arguments) -> dict:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HOME": str(cwd / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", FRESH_PROCESS, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict:
    """Folders that were saved with the package and without it, and the answers of all of them."""
    root = tmp_path_factory.mktemp("saves")
    np.save(root / "cloud.npy", make_cloud(0))
    save_pretrained(make_seeing_model(), make_processor(), root / "original")
    ways = {}
    exec(WAYS, ways)
    describe, expected = ways["answer"](root / "original", root / "cloud.npy")
    ways["save_all"](make_seeing_model(), make_processor(), describe, root / "package")
    answers = {"package": run_fresh(root, root / "package", root / "cloud.npy", root / "remote code")}
    answers["remote code"] = run_fresh(root, root / "remote code", root / "cloud.npy", "")
    return {"root": root, "expected": expected, "answers": answers}


@pytest.mark.parametrize("saver", ["package", "remote code"])
def test_every_save_answers_without_the_package(saved, saver):
    assert saved["expected"]
    assert saved["answers"][saver] == dict.fromkeys(FOLDERS, saved["expected"])


def auto_maps(content) -> list[str]:
    """All classes that the auto_maps and pipelines of a JSON file name."""
    if isinstance(content, list):
        return [name for item in content for name in auto_maps(item)]
    if not isinstance(content, dict):
        return []
    named = [*content.get("auto_map", {}).values(), *([content["impl"]] if "impl" in content else [])]
    return named + [name for item in content.values() for name in auto_maps(item)]


@pytest.mark.parametrize("saver", ["package", "remote code"])
def test_named_code_is_there(saved, saver):
    folders = [folder for folder in (saved["root"] / saver).iterdir() if any(folder.glob("*.json"))]
    assert len(folders) >= 7
    named = {folder: [auto_maps(json.loads(file.read_text())) for file in folder.glob("*.json")] for folder in folders}
    for folder, names in named.items():
        modules = {name.split(".")[0] for names_of_file in names for name in names_of_file}
        assert bool(modules) is (folder.name != "tokenizer"), folder
        assert all((folder / f"{module}.py").is_file() for module in modules), folder
