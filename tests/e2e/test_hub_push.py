"""A model, packed data and an adapter are pushed by the Hub's real clients and read back by them, on a Hub on loopback.

The clients read their environment once, at import, and this process is offline, so one new process pushes and one reads.
"""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hub_double import serve
from release_files import release_options, write_release_files
from tiny_model import make_tiny_config
from ways_in import make_cloud

from minigpt3d.cli.main import main
from minigpt3d.data import shards as packing


pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
HOUSEHOLD = ROOT / "checkpoints" / "household"
MODEL, DATA, BASE, ADAPTER = "org/minigpt3d-household", "org/chairs", "org/tiny-base", "org/tiny-adapter"

# argv: the folders of model, data, base and adapter. Prints the results of the client's calls as JSON.
PUSH = f"""
import json, sys
from pathlib import Path
import datasets
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError
from minigpt3d.data import shards as packing
from minigpt3d.data.sources import open_sources

model, data, base, adapter = map(Path, sys.argv[1:])
api, result = HfApi(), {{}}
result["whoami"] = api.whoami()["name"]

def status(call, *arguments, **options):
    try:
        call(*arguments, **options)
    except HfHubHTTPError as error:
        return [type(error).__name__, error.response.status_code]

def commit(text, parent):
    change = CommitOperationAdd("README.md", text)
    return api.create_commit("{MODEL}", operations=[change], commit_message="README", parent_commit=parent).oid

result["refused"] = status(api.create_repo, "{MODEL}")
result["created"] = [str(api.create_repo("{MODEL}", private=True, exist_ok=True)) for _ in range(2)]
result["broken off"] = status(api.upload_folder, repo_id="{MODEL}", folder_path=model)
result["left"] = api.list_repo_files("{MODEL}")
first = api.upload_folder(repo_id="{MODEL}", folder_path=model).oid
result["again"] = api.upload_folder(repo_id="{MODEL}", folder_path=model).oid
api.create_tag("{MODEL}", tag="v1")
api.create_branch("{MODEL}", branch="old", revision="v1")
second = commit(b"Better.", first)
result["stale"] = status(commit, b"Best.", first)
result["taken"] = status(api.create_tag, "{MODEL}", tag="v1")
result["commits"] = first, second
refs = api.list_repo_refs("{MODEL}")
result["refs"] = {{ref.name: ref.target_commit for ref in refs.branches + refs.tags}}
result["readme"] = {{
    name: Path(api.hf_hub_download("{MODEL}", "README.md", revision=name)).read_text() for name in ("main", "v1", first)
}}
result["snapshot"] = api.snapshot_download("{MODEL}", revision="v1")
info = api.model_info("{MODEL}", revision="v1", files_metadata=True)
result["info"] = info.private, info.sha, [sibling.rfilename for sibling in info.siblings if sibling.lfs]
(weights,) = api.get_paths_info("{MODEL}", "model.safetensors")
result["weights"] = weights.size, weights.lfs.sha256
result["a stranger"] = status(api.model_info, "{MODEL}", token=False)
result["nothing there"] = [
    status(api.model_info, "org/nothing"),
    status(api.hf_hub_download, "{MODEL}", "README.md", revision="v2"),
    status(api.hf_hub_download, "{MODEL}", "nothing"),
]

for repo_id, folder in (("{BASE}", base), ("{ADAPTER}", adapter)):
    api.create_repo(repo_id)
    api.upload_folder(repo_id=repo_id, folder_path=folder)

result["address"] = packing.push(data, "{DATA}", private=True)
datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0
rows = datasets.load_dataset("{DATA}", split="train", streaming=True)
result["rows"] = [[row["object_id"], len(row["coord"]), row["conversations"][1]["value"]] for row in rows]
result["samples"] = []
for dataset in ("{DATA}", str(data)):
    sample, cloud = open_sources(["brief"], dataset, [])["brief"].read(0, 1)
    result["samples"].append([sample.object_id, sample.rounds, cloud.shape, float(cloud.sum())])
print(json.dumps(result))
"""

# argv: the folders of model, base and adapter, a mesh, a cloud. Prints what is computed with the folders, then with the Hub.
READ = f"""
import json, sys
import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

torch.set_num_threads(1)
*folders, mesh, cloud = sys.argv[1:]
results = []
for model, base, adapter in (folders, ("{MODEL}", "{BASE}", "{ADAPTER}")):
    result = {{}}
    loaded = AutoModelForImageTextToText.from_pretrained(model, trust_remote_code=True)
    result["parameters"] = sum(parameter.double().sum().item() for parameter in loaded.parameters())
    describe = pipeline("point-cloud-to-text", model=model, trust_remote_code=True, device="cpu")
    result["answer"] = describe(mesh)[0]["generated_text"]
    processor = AutoProcessor.from_pretrained(base, trust_remote_code=True)
    content = [{{"type": "point_cloud", "point_cloud": cloud}}, {{"type": "text", "text": "What is this?"}}]
    inputs = processor.apply_chat_template(
        [{{"role": "user", "content": content}}], tokenize=True, return_dict=True, return_tensors="pt"
    )
    loaded = AutoModelForImageTextToText.from_pretrained(base, trust_remote_code=True).eval()
    with torch.no_grad():
        result["without adapter"] = loaded(**inputs).logits[0, -1].tolist()
        result["with adapter"] = PeftModel.from_pretrained(loaded, adapter).eval()(**inputs).logits[0, -1].tolist()
    results.append(result)
results[-1]["class"] = type(loaded).__module__
print(json.dumps(results))
"""

# Prints for a model and an adapter what the results of an evaluation say about the model.
EVALUATE = f"""
import json
from minigpt3d.cli.main import main

models = {{}}
for model in ("{MODEL}", "{ADAPTER}"):
    out = model.replace("/", "-")
    options = ["--limit", "2", "--greedy", "--metrics", "closed_set_accuracy", "--device", "cpu"]
    assert main(["evaluate", "household", "--model", model, "--out", out, *options]) == 0
    models[model] = json.load(open(f"{{out}}/results.json"))["model"]
print(json.dumps(models))
"""


@pytest.fixture(scope="module")
def hub():
    with serve() as hub:
        yield hub


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chairs")
    rng = np.random.default_rng(0)
    lines = []
    for i in range(3):
        np.save(folder / f"chair{i}.npy", rng.uniform(size=(8192, 6)).astype(np.float32))
        lines.append(json.dumps({"file": f"chair{i}.npy", "caption": f"Chair {i}."}))
    (folder / "chairs.jsonl").write_text("\n".join(lines))
    packing.pack(packing.table_entries(folder / "chairs.jsonl"), folder / "packed", num_workers=1)
    return folder / "packed"


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kept")
    make_tiny_config().to_json_file(folder / "config.json")
    files = release_options(write_release_files(folder / "release"))
    options = ["--config", str(folder / "config.json"), "--dtype", "float32", "--lora", "keep"]
    assert main(["convert", *files, "--out", str(folder / "model"), *options]) == 0
    config = folder / "model" / "adapter" / "adapter_config.json"  # who publishes an adapter names its base on the Hub
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": BASE}))
    return folder / "model"


@pytest.fixture(scope="module")
def run(hub, tmp_path_factory):
    """Run a script in a new process that uses our Hub as the real one; returns what it prints as JSON."""
    home = tmp_path_factory.mktemp("home")
    environment = os.environ | {
        "HF_ENDPOINT": hub.address, "HF_HOME": str(home), "HF_TOKEN": "hf_secret", "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip

    def run(script: str, *arguments):
        command = [sys.executable, "-c", script, *map(str, arguments)]
        done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run


@pytest.fixture(scope="module")
def pushed(hub, run, data, kept):
    hub.fail_next(1, 401, "/repos/create")
    hub.fail_next(1, 500, "/preupload/")  # the client retries this one
    hub.fail_next(1, 500, "/commit/")
    return run(PUSH, HOUSEHOLD, data, kept / "base", kept / "adapter")


@pytest.fixture(scope="module")
def read(run, pushed, kept, tmp_path_factory):
    cloud = tmp_path_factory.mktemp("cloud") / "cloud.npy"
    np.save(cloud, make_cloud(0))
    return run(READ, HOUSEHOLD, kept / "base", kept / "adapter", ROOT / "demo" / "objects" / "osakaChair.obj", cloud)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_model_is_pushed_completely(pushed, hub):
    assert pushed["whoami"] == "somebody"
    assert pushed["created"] == [f"{hub.address}/{MODEL}"] * 2
    snapshot = contents(Path(pushed["snapshot"]))
    assert snapshot.pop(".gitattributes") and snapshot == contents(HOUSEHOLD)
    assert pushed["info"] == [True, pushed["commits"][0], ["model.safetensors"]]
    weights = (HOUSEHOLD / "model.safetensors").read_bytes()
    assert pushed["weights"] == [len(weights), hashlib.sha256(weights).hexdigest()]


def test_a_tag_keeps_its_commit(pushed):
    first, second = pushed["commits"]
    assert pushed["again"] == first != second, "a push without changes makes no commit"
    assert pushed["refs"] == {"main": second, "v1": first, "old": first}
    before = (HOUSEHOLD / "README.md").read_text()
    assert pushed["readme"] == {"main": "Better.", "v1": before, first: before}
    assert pushed["stale"] == ["HfHubHTTPError", 412] and pushed["taken"] == ["HfHubHTTPError", 409]


def test_an_interrupted_push_is_repeated(pushed, hub):
    assert pushed["refused"] == ["HfHubHTTPError", 401]
    assert pushed["broken off"] == ["HfHubHTTPError", 500] and pushed["left"] == [".gitattributes"]
    sha256 = pushed["weights"][1]
    assert [method for method, path, *_ in hub.requests if sha256 in path].count("PUT") == 1, (
        "weights are uploaded once"
    )


def test_what_is_missing_is_named(pushed):
    assert pushed["a stranger"] == ["RepositoryNotFoundError", 401]
    errors = ["RepositoryNotFoundError", "RevisionNotFoundError", "RemoteEntryNotFoundError"]
    assert pushed["nothing there"] == [[name, 404] for name in errors]


def test_the_token_goes_to_the_hub_alone(pushed, read, hub):
    by_host = {False: set(), True: set()}
    for request in hub.requests:
        by_host[request.path.startswith("/store/")].add(request.authorization)
    assert by_host == {False: {"Bearer hf_secret", None}, True: {None}}
    assert [path for _, path, _, token in hub.requests if not token and not path.startswith("/store/")] == [
        f"/api/models/{MODEL}"
    ], "the stranger"


def test_packed_data_are_pushed_and_stream(pushed, hub):
    assert pushed["address"].startswith(f"{hub.address}/datasets/{DATA}/commit/")
    assert sorted(pushed["rows"]) == [[f"chair{i}", 8192 * 3 * 2, f"Chair {i}."] for i in range(3)]
    from_hub, from_folder = pushed["samples"]
    assert from_hub == from_folder


def test_model_pipeline_and_adapter_answer_from_the_hub_as_from_folders(read):
    from_folders, from_hub = read
    code = from_hub.pop("class")
    assert from_hub == from_folders
    assert from_hub["answer"] == "This is a brown chair."
    assert from_hub["with adapter"] != from_hub["without adapter"]
    assert code.startswith("transformers_modules.org."), "the code comes from the Hub too"


@pytest.mark.slow
def test_an_evaluation_names_the_commit_on_the_hub(run, pushed):
    models = run(EVALUATE)
    assert models[MODEL]["name"] == MODEL and models[MODEL]["fingerprint"] == pushed["commits"][1][:16]
    assert models[ADAPTER]["name"] == ADAPTER and len(models[ADAPTER]["fingerprint"]) == 16
