"""Names of models, where their files are, which folders may be replaced, and files that appear complete or not at all."""

import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from minigpt3d.files import sha256, write_json, write_text, written_file, written_whole
from minigpt3d.hub import (
    check_model_dir,
    find_model,
    has_package_code,
    is_hub_id,
    portable_name,
    public_name,
    write_code,
)


def write_config(folder, model_type="minigpt3d"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return folder


def write_adapter_config(folder, base):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    return folder


# ---- Names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("me/model-1.0", True),
        ("model", False),
        ("a/b/c", False),
        ("/a/b", False),
        ("a b/c", False),
        ("../c", False),
        ("./c", False),
    ],
)
def test_is_hub_id(name, expected):
    assert is_hub_id(name) is expected


def test_public_name_hides_local_paths(tmp_path, monkeypatch):
    (tmp_path / "models" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert public_name(tmp_path / "models" / "mine") == public_name("models/mine") == "mine"
    assert public_name("/gone/model") == public_name("../model") == "model"
    assert public_name("me/model") == "me/model"


def test_names_and_folders_need_no_torch():
    program = "import sys, minigpt3d.hub, minigpt3d.data.records; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert not {"torch", "transformers"} & set(done.stdout.split())


# ---- Files of a model ------------------------------------------------------------------------------------------------


def test_find_a_complete_model(tmp_path):
    write_config(tmp_path)
    write_json(tmp_path / "stage.json", {"stage": "IV"})
    files = find_model(tmp_path)
    assert (files.base, files.adapter, files.stage) == (str(tmp_path), None, {"stage": "IV"})


def test_find_an_adapter_and_the_base_that_it_names(tmp_path):
    base = write_config(tmp_path / "base model")
    adapter = write_adapter_config(tmp_path / "adapter", base)
    assert (find_model(adapter).base, find_model(adapter).adapter) == (str(base), adapter)
    write_adapter_config(adapter, "me/model")
    assert find_model(adapter).base == "me/model"
    write_adapter_config(adapter, "/gone/base")
    with pytest.raises(ValueError, match="base model /gone/base"):
        find_model(adapter)


def test_a_base_beside_its_adapter_is_found_wherever_the_folder_moves(tmp_path):
    base = write_config(tmp_path / "base")
    adapter = write_adapter_config(tmp_path / "adapter", "/written/elsewhere/base")
    write_json(adapter / "stage.json", {"stage": "III"})
    files = find_model(tmp_path)
    assert (files.base, files.adapter, files.stage) == (str(base), adapter, {"stage": "III"})


def test_an_adapter_names_its_base_by_a_relative_path(tmp_path, monkeypatch):
    base = write_config(tmp_path / "models" / "base")
    monkeypatch.chdir(tmp_path)
    for name in (base, "models/base"):
        assert portable_name(name) == "./models/base"
        assert not is_hub_id(portable_name(name))
    assert find_model(write_adapter_config(tmp_path / "adapter", portable_name(base))).base == str(base)
    monkeypatch.chdir(tmp_path / "models")
    assert portable_name(base) == "./base" and portable_name("me/model") == "me/model"
    assert find_model(write_adapter_config(base.parent / "adapter", "../base")).base == str(base)


def test_code_of_this_package_and_of_others(tmp_path):
    assert not has_package_code(write_config(tmp_path / "model") / "not there")
    write_code(tmp_path / "model")
    assert has_package_code(tmp_path / "model")
    write_json(tmp_path / "model" / "config.json", {"auto_map": {"AutoModel": "other/model--modeling.Model"}})
    assert not has_package_code(tmp_path / "model")
    write_config(tmp_path / "model")
    for name in ("modeling_minigpt3d.py", "evil.py", "custom_generate/generate.py"):
        path = tmp_path / "model" / name
        content = path.read_bytes() if path.exists() else None
        path.parent.mkdir(exist_ok=True)
        path.write_text("print('evil')")
        assert not has_package_code(tmp_path / "model"), name
        path.unlink() if content is None else path.write_bytes(content)
    assert has_package_code(tmp_path / "model")


def test_no_model(tmp_path):
    with pytest.raises(ValueError, match="config.json"):
        find_model(tmp_path)
    with pytest.raises(ValueError, match="OWNER/NAME"):
        find_model(tmp_path / "nothing")


def test_write_code_copies_the_flat_files(tmp_path):
    write_code(tmp_path)
    assert {"configuration_minigpt3d.py", "modeling_minigpt3d.py", "point_bert_minigpt3d.py"} <= {
        path.name for path in tmp_path.iterdir()
    }


# ---- Folders that may be replaced ------------------------------------------------------------------------------------


def test_a_new_folder_or_a_models_may_be_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert check_model_dir("new/model") == tmp_path / "new" / "model"
    assert check_model_dir(write_config(tmp_path / "model")) == tmp_path / "model"
    write_config(tmp_path / "kept" / "base")
    assert check_model_dir(tmp_path / "kept") == tmp_path / "kept"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({".git/HEAD": "ref"}, "holds .git"),
        ({"history.jsonl": ""}, "holds history.jsonl"),
        ({"config.json": '{"model_type": "phi"}'}, "other files than a model"),
        ({"config.json": "{"}, "other files than a model"),
    ],
)
def test_a_folder_with_irreplaceable_files_is_refused(content, message, tmp_path):
    folder = write_config(tmp_path / "model")
    for name, text in content.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        check_model_dir(folder)


def test_other_peoples_files_are_refused(tmp_path, monkeypatch):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("years")
    with pytest.raises(ValueError, match="other files than a model"):
        check_model_dir(tmp_path / "thesis")
    for folder in (tmp_path / "thesis" / "thesis.tex", tmp_path / "thesis" / "thesis.tex" / "out"):
        with pytest.raises(ValueError, match="thesis.tex is a file"):
            check_model_dir(folder)
    monkeypatch.chdir(write_config(tmp_path / "model"))
    with pytest.raises(ValueError, match="working directory"):
        check_model_dir(tmp_path / "model")


def test_a_folder_is_not_made_of_itself(tmp_path):
    source = write_config(tmp_path / "phi")
    for folder in (source, source / "inside", tmp_path):
        with pytest.raises(ValueError, match="lie in each other"):
            check_model_dir(folder, [source])


# ---- Files -----------------------------------------------------------------------------------------------------------


def test_a_file_appears_completely_or_not_at_all(tmp_path):
    path = tmp_path / "facts.json"
    write_json(path, {"name": "größe"})
    assert json.loads(path.read_text(encoding="utf-8")) == {"name": "größe"}
    with pytest.raises(RuntimeError), written_file(path) as temporary:
        temporary.write_text("half of")
        raise RuntimeError
    assert json.loads(path.read_text(encoding="utf-8")) == {"name": "größe"}
    assert [path.name for path in tmp_path.iterdir()] == ["facts.json"]


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    with written_file(tmp_path / "a") as one, written_file(tmp_path / "a") as two:
        one.write_text("one")
        two.write_text("two")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a", "one")]


def test_a_folder_appears_completely_or_not_at_all(tmp_path):
    folder = tmp_path / "model"
    for text in ("first", "second"):
        with written_whole(folder) as partial:
            write_text(partial / "weights", text)
    with pytest.raises(OSError, match="is full"), written_whole(folder) as partial:
        write_text(partial / "weights", "third")
        raise OSError(28, "No space left on device")
    assert (folder / "weights").read_text() == "second" and os.listdir(tmp_path) == ["model"]


@pytest.fixture
def small_files():
    """No file can grow beyond 50 kB, which libraries are told as they are told of a full disk."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def torch_save(tensors, path):
    with open(path, "wb") as file:
        torch.save(tensors, file)


@pytest.mark.parametrize("save", [torch_save, save_file, lambda tensors, path: path.write_bytes(bytes(10**5))])
def test_every_library_says_that_the_disk_is_full(save, small_files, tmp_path):
    tensors = {"a": torch.zeros(10**5)}
    with pytest.raises(OSError, match=f"disk of {tmp_path} is full"), written_whole(tmp_path / "model") as partial:
        save(tensors, partial / "weights")
    with pytest.raises(OSError, match=f"disk of {tmp_path} is full"), written_file(tmp_path / "file") as partial:
        save(tensors, partial)
    assert not any(tmp_path.iterdir())


def test_weights_have_the_mode_of_other_files(tmp_path):
    before = os.umask(0o027)
    try:
        with written_whole(tmp_path / "model") as partial:
            save_file({"a": torch.zeros(2)}, partial / "weights")
            (partial / "text").touch()
        with written_file(tmp_path / "file") as partial:
            save_file({"a": torch.zeros(2)}, partial)
    finally:
        os.umask(before)
    modes = [path.stat().st_mode & 0o777 for path in (*(tmp_path / "model").iterdir(), tmp_path / "file")]
    assert modes == [0o640] * 3


def test_what_is_renamed_is_on_disk(tmp_path, monkeypatch):
    events, fsync, replace, rename = [], os.fsync, os.replace, Path.rename
    monkeypatch.setattr(os, "fsync", lambda file: events.append(os.readlink(f"/proc/self/fd/{file}")) or fsync(file))
    monkeypatch.setattr(os, "replace", lambda *paths: events.append("rename") or replace(*paths))
    monkeypatch.setattr(Path, "rename", lambda *paths: events.append("rename") or rename(*paths))
    write_text(tmp_path / "file", "text")
    temporary, *rest = events
    assert Path(temporary).parent == tmp_path and rest == ["rename", str(tmp_path)]
    events.clear()
    with written_whole(tmp_path / "model") as partial:
        (partial / "part").mkdir()
        (partial / "part" / "text").touch()
    expected = {str(partial), str(partial / "part"), str(partial / "part" / "text")}
    assert set(events[:3]) == expected and events[3:] == ["rename", str(tmp_path)]


def test_one_process_at_a_time_writes_a_folder(tmp_path):
    """Of eight that start together."""
    context, folder = multiprocessing.get_context("fork"), tmp_path / "model"
    start, tried = context.Barrier(8), context.Barrier(8)

    def work(results):
        start.wait(60)
        try:
            with written_whole(folder) as partial:
                tried.wait(60)
                (partial / "text").touch()
                results.put("written")
        except ValueError as error:
            tried.wait(60)
            results.put(str(error))

    results = context.Queue()
    processes = [context.Process(target=work, args=(results,)) for _ in range(8)]
    for process in processes:
        process.start()
    outcomes = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(60)
    assert sorted("in use" in outcome for outcome in outcomes) == [False] + 7 * [True]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_folder_is_restored_after_a_kill_between_two_renames(tmp_path):
    folder = tmp_path / "model"
    with written_whole(folder) as partial:
        write_text(partial / "weights", "first")
    folder.rename(tmp_path / ".model.minigpt3d-replaced")
    with pytest.raises(RuntimeError), written_whole(folder):
        raise RuntimeError
    assert (folder / "weights").read_text() == "first"


def test_sha256(tmp_path):
    (tmp_path / "empty").write_bytes(b"")
    assert sha256(tmp_path / "empty").startswith("e3b0c44298fc1c14")


@pytest.mark.parametrize("name", ["stage.json", "adapter_config.json"])
def test_damaged_files_of_an_adapter_are_named(name, tmp_path):
    (tmp_path / "base").mkdir()
    write_adapter_config(tmp_path, tmp_path / "base")
    for content in (b"", b"[]", b"{}", b"null", b'"text"', b"\xff", b'{"stage": 1, "base_model_name_or_path": [1]}'):
        before = (tmp_path / "adapter_config.json").read_bytes()
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name):
            find_model(tmp_path)
        (tmp_path / "adapter_config.json").write_bytes(before)
