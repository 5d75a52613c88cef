"""Every way to save gives a folder, or a repository on the Hub, that a process without this package loads, pipeline included.

One process saves with the package. A second, where the package is absent, reads what the first has saved, saves it in the
same ways, and answers; a third reads that. Imports of torch and transformers take most of the time.
"""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from hub_double import serve
from ways_in import make_cloud, make_processor, make_seeing_model

from minigpt3d.hub import save_pretrained


pytestmark = pytest.mark.slow

PLAIN = ["model and processor", "pipeline", "save_model", "trainer/checkpoint-1", "{hub}-model", "{hub}-pipeline"]
ADAPTED = ["merged", "adapter/checkpoint-1", "{hub}-adapter"]

# argv: "package" or "absent", a folder of folders, the prefix of repositories, a cloud, and the same to save to. Prints the
# answers as JSON.
PROCESS = f"""
import json, sys

package, read, read_hub, cloud, write, write_hub = sys.argv[1:]

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "minigpt3d":
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

if package == "absent":
    sys.meta_path.insert(0, Absent())
else:
    import minigpt3d
from pathlib import Path
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments, pipeline

torch.set_num_threads(1)
read, write = Path(read), Path(write)

def answer(source):
    describe = pipeline("point-cloud-to-text", model=str(source), device="cpu", trust_remote_code=package == "absent")
    return describe, describe(cloud, max_new_tokens=8)[0]["generated_text"]

def load(kind, source):
    return kind.from_pretrained(source, trust_remote_code=package == "absent")

def train(model, processor, folder):
    "One step at a rate of 0: the checkpoint answers as the model."
    content = [{{"type": "point_cloud", "point_cloud": cloud}}, {{"type": "text", "text": "What?"}}]
    row = processor.apply_chat_template(
        [{{"role": "user", "content": content}}], tokenize=True, return_dict=True, return_tensors="pt"
    )
    row = {{name: tensor[0] for name, tensor in row.items()}}
    arguments = TrainingArguments(
        str(folder), max_steps=1, learning_rate=0.0, save_steps=1, report_to=[], use_cpu=True, remove_unused_columns=False
    )
    trainer = Trainer(model, arguments, train_dataset=[row | {{"labels": row["input_ids"]}}], processing_class=processor)
    trainer.train()
    return trainer

def save_all(source):
    model, processor = load(AutoModelForImageTextToText, source), load(AutoProcessor, source)
    describe, _ = answer(source)
    for name in ("model and processor", "merged"):
        processor.save_pretrained(write / name)
    model.save_pretrained(write / "model and processor")
    model.push_to_hub(f"{{write_hub}}-model")
    processor.push_to_hub(f"{{write_hub}}-model")
    describe.save_pretrained(write / "pipeline")
    describe.push_to_hub(f"{{write_hub}}-pipeline")
    train(model, processor, write / "trainer").save_model(str(write / "save_model"))
    lora = LoraConfig(target_modules=["query_key_value"], modules_to_save=["router.linear_1", "router.linear_2"])
    adapted = get_peft_model(load(AutoModelForImageTextToText, f"{{write_hub}}-model"), lora)
    torch.manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    train(adapted, processor, write / "adapter")
    adapted.push_to_hub(f"{{write_hub}}-adapter")
    processor.push_to_hub(f"{{write_hub}}-adapter")
    adapted.merge_and_unload().save_pretrained(write / "merged")
    processor.tokenizer.save_pretrained(write / "tokenizer")
    model.config.save_pretrained(write / "config")
    processor.feature_extractor.save_pretrained(write / "feature extractor")

answers = {{}}
for name in {PLAIN + ADAPTED} if package == "absent" else ["original"]:
    source = name.format(hub=read_hub) if name.startswith("{{hub}}") else read / name
    describe, answers[name] = answer(source)
assert type(describe.model).__module__.startswith("transformers_modules.") == (package == "absent")
if write_hub:
    save_all(read / "pipeline" if package == "absent" else read / "original")
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict:
    """Folders and repositories that were saved with the package and without it, and the answers of all of them."""
    root = tmp_path_factory.mktemp("saves")
    np.save(root / "cloud.npy", make_cloud(0))
    save_pretrained(make_seeing_model(), make_processor(), root / "original")
    with serve() as hub:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {
            "HF_ENDPOINT": hub.address, "HF_HOME": str(root / "hf"), "HF_TOKEN": "hf_secret", "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1",
        }  # fmt: skip

        def run(package: str, read: str, write: str) -> dict:
            read, write = (("", "") if name is None else (root / name, f"org/{name}") for name in (read, write))
            arguments = [package, *read, root / "cloud.npy", *write]
            done = subprocess.run(
                [sys.executable, "-c", PROCESS, *map(str, arguments)],
                cwd=root, env=environment, capture_output=True, text=True, timeout=600,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            return json.loads(done.stdout.splitlines()[-1])

        expected = run("package", ".", "package")["original"]
        answers = {
            "package": run("absent", "package", "remote-code"),
            "remote-code": run("absent", "remote-code", None),
        }
    return {"root": root, "expected": expected, "answers": answers}


@pytest.mark.parametrize("saver", ["package", "remote-code"])
def test_every_save_answers_without_the_package(saved, saver):
    answers = saved["answers"][saver]
    assert saved["expected"]
    assert {name: answers[name] for name in PLAIN} == dict.fromkeys(PLAIN, saved["expected"])
    adapted = saved["answers"]["package"]["merged"]
    assert adapted != saved["expected"]
    assert {name: answers[name] for name in ADAPTED} == dict.fromkeys(ADAPTED, adapted)


def auto_maps(content) -> list[str]:
    """All classes that the auto_maps and pipelines of a JSON file name."""
    if isinstance(content, list):
        return [name for item in content for name in auto_maps(item)]
    if not isinstance(content, dict):
        return []
    named = [*content.get("auto_map", {}).values(), *([content["impl"]] if "impl" in content else [])]
    return named + [name for item in content.values() for name in auto_maps(item)]


@pytest.mark.parametrize("saver", ["package", "remote-code"])
def test_named_code_is_there(saved, saver):
    folders = {file.parent for file in (saved["root"] / saver).rglob("*.json")} - {saved["root"] / saver}
    assert len(folders) >= 9
    named = {folder: [auto_maps(json.loads(file.read_text())) for file in folder.glob("*.json")] for folder in folders}
    for folder, names in named.items():
        modules = {name.split(".")[0] for names_of_file in names for name in names_of_file}
        assert bool(modules) is (folder.name != "tokenizer"), folder
        assert all((folder / f"{module}.py").is_file() for module in modules), folder
