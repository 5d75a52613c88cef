"""A run that publishes its results: real clients, a Hub on loopback, and a fresh process that loads what was published."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hub_double import serve
from training_runs import write_base, write_release

from minigpt3d.data.shards import pack, release_entries


pytestmark = pytest.mark.slow

SUPPORT = Path(__file__).parents[1] / "support"
BASE, DATA, ADAPTER, WHOLE = "org/base", "org/data", "org/adapter", "org/whole"

# argv: the folder of the helpers, folders of base and data, one to write into.
PREAMBLE = f"""
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from huggingface_hub import HfApi
from training_runs import STAGES, tiny
from minigpt3d.data import shards
from minigpt3d.training.loop import train
from minigpt3d.training.run_options import RunOptions

base, data, out = map(Path, sys.argv[2:])

def run(stage, name, **options):
    options = dict(data="{DATA}", num_workers=0, push_to_hub=True) | options
    return train(tiny(STAGES[stage]), RunOptions(output_dir=out / name, **options))
"""
TRAIN = f"""{PREAMBLE}
HfApi().create_repo("{BASE}")
HfApi().upload_folder(repo_id="{BASE}", folder_path=base)
shards.push(data, "{DATA}")
run("II", "adapter", init="{BASE}", hub_model_id="{ADAPTER}", hub_every=1, save_every=2, hub_private=True)
run("II", "whole", init=str(base), data=str(data), hub_model_id="{WHOLE}", export=True)
run("III", "third", init="{ADAPTER}", hub_model_id="{ADAPTER}")
for options in (dict(init=str(base)), dict(init="{BASE}", hub_model_id="nonsense"), dict(init="org/nothing")):
    try:
        run("II", "refused", **({{"hub_model_id": "{WHOLE}"}} | options))
    except ValueError as error:
        print("refused:", error)
"""
TRAIN_ONCE = f"""{PREAMBLE}
run("II", "failed", init="{BASE}", hub_model_id="{WHOLE}-2", max_steps=1)
"""

# argv: a point cloud. Prints logits and answers of what was published.
READ = f"""
import json, sys
import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

torch.set_num_threads(1)
*folders, cloud = sys.argv[1:]
processor = AutoProcessor.from_pretrained("{BASE}", trust_remote_code=True)
content = [{{"type": "point_cloud", "point_cloud": cloud}}, {{"type": "text", "text": "What is this?"}}]
chat = [{{"role": "user", "content": content}}]
inputs = processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt")
load = lambda name, **options: AutoModelForImageTextToText.from_pretrained(name, trust_remote_code=True, **options)
models = {{
    "adapter": load("{ADAPTER}"),
    "PEFT": PeftModel.from_pretrained(load("{BASE}"), "{ADAPTER}"),
    "tag": PeftModel.from_pretrained(load("{BASE}"), "{ADAPTER}", revision="stage-II"),
    "whole": load("{WHOLE}"),
    "base": load("{BASE}"),
}} | {{folder: load(folder) for folder in folders}}
with torch.no_grad():
    result = {{name: model.eval()(**inputs).logits[0, -1].tolist() for name, model in models.items()}}
answers = []
for name in ("{ADAPTER}", "{WHOLE}"):
    describe = pipeline("point-cloud-to-text", model=name, trust_remote_code=True, device="cpu")
    answers.append(describe(cloud, max_new_tokens=3)[0]["generated_text"])
print(json.dumps([result, answers]))
"""


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    folder = tmp_path_factory.mktemp("publish")
    write_base(folder / "base")
    (folder / "clouds").mkdir()
    data_dir, annotations = write_release(folder / "clouds", num_objects=4)
    pack(release_entries(data_dir, annotations), folder / "data", num_workers=1)
    np.save(folder / "cloud.npy", np.random.default_rng(0).uniform(size=(200, 6)).astype(np.float32))
    with serve() as hub:
        environment = os.environ | {
            "HF_ENDPOINT": hub.address, "HF_HOME": str(folder / "home"), "HF_TOKEN": "hf_secret", "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1",
        }  # fmt: skip

        def run(script, *arguments):
            command = [sys.executable, "-c", script, *map(str, arguments)]
            done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, done.stderr[-3000:]
            return done.stdout + done.stderr

        printed = run(TRAIN, SUPPORT, folder / "base", folder / "data", folder / "out")
        # The Hub fails: the result stays, and the command that repeats the upload is printed.
        hub.fail_next(1, 500, "/commit/")
        failed = run(TRAIN_ONCE, SUPPORT, folder / "base", folder / "data", folder / "out")
        out = folder / "out"
        read = run(READ, out / "adapter", out / "whole", out / "third", folder / "cloud.npy")
        logits, answers = json.loads(next(line for line in read.splitlines() if line.startswith("[{")))
        yield hub, printed, failed, logits, answers, out


def test_what_was_published_is_what_was_trained(published):
    hub, _, _, logits, answers, out = published
    third, second, whole = (logits[str(out / name)] for name in ("third", "adapter", "whole"))
    assert logits["adapter"] == logits["PEFT"] == pytest.approx(third, abs=1e-5)
    assert logits["tag"] == pytest.approx(second, abs=1e-5)
    assert logits["whole"] == pytest.approx(whole, abs=1e-5)
    assert len({tuple(values) for values in (third, second, logits["base"])}) == 3
    assert all(isinstance(answer, str) for answer in answers)


def test_each_stage_is_a_commit_and_a_tag(published):
    hub, printed, _, _, _, out = published
    repository = hub.repositories["models", ADAPTER]
    assert set(repository.tags) == {"stage-II", "stage-III"} and repository.private
    # The first commit is the repository's own; then come the checkpoint of step 2 in the background, stages II and III.
    assert len(repository.commits) == 4
    background = [json.loads(files["stage.json"]) for files in repository.commits.values() if "stage.json" in files][0]
    assert (background["stage"], background["step"]) == ("II", 2)
    assert printed.count("is published") == 3
    assert not any(
        str(out.parent).encode() in content for files in repository.commits.values() for content in files.values()
    )
    files = repository.files("main")
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md", "curves.png", "stage.json"} <= set(files)
    config = json.loads(files["adapter_config.json"])
    assert config["base_model_name_or_path"] == BASE
    card = files["README.md"].decode()
    assert f"base_model: {BASE}" in card and "stage III" in card and str(out.parent) not in card
    assert f'PeftModel.from_pretrained(model, "{ADAPTER}")' in card


def test_what_cannot_be_published_is_refused_before_the_run(published):
    _, printed, _, _, _, out = published
    local, name, nothing = [line for line in printed.splitlines() if line.startswith("refused:")]
    assert "`push_to_hub`" in local and "`export`" in local
    assert "`hub_model_id` nonsense" in name and "OWNER/NAME" in name
    assert "`init`" in nothing and "org/nothing" in nothing
    assert not (out / "refused").exists()


def test_a_failed_upload_leaves_the_result_and_says_how_to_repeat_it(published):
    hub, printed, failed, _, _, out = published
    assert (out / "failed" / "adapter_model.safetensors").is_file()
    assert f"try again: hf upload {WHOLE}-2 {out / 'failed'} --exclude 'logs/*'" in failed
    assert "hf_secret" not in printed + failed
    assert not any(b"hf_secret" in path.read_bytes() for path in out.rglob("*") if path.is_file())
