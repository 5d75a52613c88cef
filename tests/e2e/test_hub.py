"""A saved folder, read through transformers' Auto classes and pipelines.

Once in a fresh process where the package cannot be imported, so that the folder's own code is used; once here, where
the package is installed and `trust_remote_code` is not needed.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    pipeline,
)
from ways_in import make_cloud, make_processor, make_seeing_model

import minigpt3d
from minigpt3d.hub import load_model, save_pretrained


QUESTION = "What color is it?"
AUTO_CLASSES = (AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor)

# argv: the model's folder, a cloud, a question. Prints results as JSON.
FRESH_PROCESS = """
import json, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("minigpt3d",):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
folder, cloud, question = sys.argv[1:]

import numpy as np
import torch
import transformers
from transformers import pipeline

torch.set_num_threads(1)
result = {}
loaded = {}
for name in ("AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoModelForMultimodalLM", "AutoProcessor"):
    loaded[name] = getattr(transformers, name).from_pretrained(folder, trust_remote_code=True)
    result[name] = [type(loaded[name]).__module__.split(".")[0], type(loaded[name]).__name__]
chat = [{"role": "user", "content": [{"type": "point_cloud", "point_cloud": cloud}, {"type": "text", "text": question}]}]
inputs = loaded["AutoProcessor"].apply_chat_template(
    chat, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
)
with torch.no_grad():
    features = loaded["AutoModel"].get_point_features(inputs["point_clouds"]).pooler_output
    logits = loaded["AutoModelForImageTextToText"](**inputs).logits[0, -1]
result["features"], result["logits"] = features.flatten().tolist(), logits.tolist()
arguments = {"model": folder, "trust_remote_code": True, "device": "cpu"}
describe = pipeline("point-cloud-to-text", **arguments)
result["pipeline"] = [type(describe).__module__.split(".")[0], type(describe).__name__]
result["answer"] = describe(cloud, prompt=question, max_new_tokens=8)
result["batch"] = describe([cloud, np.load(cloud)], prompt=question, max_new_tokens=8, batch_size=2)
result["unnamed"] = type(pipeline(**arguments)).__name__
general = pipeline("image-text-to-text", **arguments)
result["general"] = general(text=chat, max_new_tokens=8, return_full_text=False)[0]["generated_text"].strip()
general = pipeline("any-to-any", **arguments)
result["any"] = general(text=chat, max_new_tokens=8, return_full_text=False)[0]["generated_text"].strip()
result["imported"] = sorted(name for name in sys.modules if name.split(".")[0].startswith("minigpt3d"))
print(json.dumps(result))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("hub") / "tiny-minigpt3d"
    save_pretrained(make_seeing_model(), make_processor(), output_dir)
    return output_dir


@pytest.fixture(scope="module")
def cloud(tmp_path_factory):
    path = tmp_path_factory.mktemp("cloud") / "cloud.npy"
    np.save(path, make_cloud(0))
    return path


@pytest.fixture(scope="module")
def installed(folder, cloud) -> dict:
    """Results of the installed package, without `trust_remote_code`."""
    loaded = {auto.__name__: auto.from_pretrained(folder) for auto in AUTO_CLASSES}
    content = [{"type": "point_cloud", "point_cloud": str(cloud)}, {"type": "text", "text": QUESTION}]
    chat = [{"role": "user", "content": content}]
    inputs = loaded["AutoProcessor"].apply_chat_template(
        chat, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    with torch.no_grad():
        features = loaded["AutoModel"].get_point_features(inputs["point_clouds"]).pooler_output
        logits = loaded["AutoModelForImageTextToText"](**inputs).logits[0, -1]
    describe = pipeline("point-cloud-to-text", model=str(folder), device="cpu")
    answer = describe(cloud, prompt=QUESTION, max_new_tokens=8)
    return {"loaded": loaded, "features": features, "logits": logits, "describe": describe, "answer": answer}


@pytest.fixture(scope="module")
def fresh(folder, cloud, tmp_path_factory) -> dict:
    """Results of a process without the package, in another working directory and with an empty cache."""
    cwd = tmp_path_factory.mktemp("elsewhere")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HOME": str(cwd / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", FRESH_PROCESS, str(folder), str(cloud), QUESTION],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_folder_holds_its_code_byte_for_byte(folder):
    sources = sorted(Path(minigpt3d.__file__).parent.glob("*_minigpt3d.py"))
    assert [source.name for source in sources] == sorted(path.name for path in folder.glob("*.py"))
    assert all((folder / source.name).read_bytes() == source.read_bytes() for source in sources)


def test_auto_classes_where_the_package_is_absent(fresh):
    assert fresh["imported"] == []
    classes = {
        "AutoConfig": "MiniGPT3DConfig",
        "AutoModel": "MiniGPT3DModel",
        "AutoModelForImageTextToText": "MiniGPT3DForConditionalGeneration",
        "AutoModelForMultimodalLM": "MiniGPT3DForConditionalGeneration",
        "AutoProcessor": "MiniGPT3DProcessor",
    }
    assert {name: fresh[name] for name in classes} == {k: ["transformers_modules", v] for k, v in classes.items()}


def test_pipelines_where_the_package_is_absent(fresh):
    assert fresh["pipeline"] == ["transformers_modules", "PointCloudToTextPipeline"]
    assert fresh["unnamed"] == "PointCloudToTextPipeline"
    assert fresh["batch"] == [fresh["answer"], fresh["answer"]]
    assert fresh["general"] == fresh["any"] == fresh["answer"][0]["generated_text"]


def test_installed_classes_are_used_without_trust_remote_code(installed):
    assert all(type(item).__module__.startswith("minigpt3d.") for item in installed["loaded"].values())
    assert type(installed["describe"]) is minigpt3d.PointCloudToTextPipeline


def test_remote_code_and_package_compute_the_same(installed, fresh):
    torch.testing.assert_close(installed["features"].flatten(), torch.tensor(fresh["features"]))
    torch.testing.assert_close(installed["logits"], torch.tensor(fresh["logits"]))
    assert installed["answer"] == fresh["answer"]


def test_installed_pipeline_reads_the_folder_with_trust_remote_code(folder, cloud, installed):
    describe = pipeline("point-cloud-to-text", model=str(folder), device="cpu", trust_remote_code=True)
    assert describe(cloud, prompt=QUESTION, max_new_tokens=8) == installed["answer"]


def test_a_folders_tokenizer_code_is_neither_run_nor_asked_about(folder, tmp_path, monkeypatch):
    other = shutil.copytree(folder, tmp_path / "other")
    config = json.loads((other / "tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": [None, "evil.EvilTokenizer"]}, "tokenizer_class": "EvilTokenizer"}
    (other / "tokenizer_config.json").write_text(json.dumps(config))
    (other / "evil.py").write_text(f"open({str(tmp_path / 'evil')!r}, 'w')")
    asked = []
    monkeypatch.setattr("builtins.input", lambda *question: asked.append(question) or "y")
    with contextlib.suppress(ValueError):  # transformers may read tokenizer.json without the code, or refuse
        load_model(other)
    assert not asked and not (tmp_path / "evil").exists()


REGISTERED = """
import sys
import minigpt3d
from transformers import CONFIG_MAPPING, AutoConfig, AutoProcessor, pipelines

assert type(AutoConfig.from_pretrained(sys.argv[1])) is CONFIG_MAPPING["minigpt3d"] is minigpt3d.MiniGPT3DConfig
assert type(AutoProcessor.from_pretrained(sys.argv[1])) is minigpt3d.MiniGPT3DProcessor
assert pipelines.check_task("point-cloud-to-text")[1]["impl"] is minigpt3d.PointCloudToTextPipeline
"""


@pytest.mark.parametrize(
    "imports",
    [
        "import transformers, minigpt3d",
        pytest.param("import minigpt3d.pipeline_minigpt3d", marks=pytest.mark.slow),
        pytest.param(
            "import importlib, minigpt3d; importlib.reload(minigpt3d); import transformers; importlib.reload(minigpt3d)",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["after transformers", "a module that imports transformers", "before transformers, reloaded"],
)
def test_classes_are_registered_in_any_order_of_imports(folder, tmp_path, imports):
    done = subprocess.run(
        [sys.executable, "-c", imports + REGISTERED, str(folder)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
