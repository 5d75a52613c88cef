"""`--set` of the fine-tuning: other values than the row's, named by the model card."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from training_runs import STAGES, history, options, tiny, write_release

from minigpt3d.data.shards import pack, release_entries
from minigpt3d.training import command
from minigpt3d.training.loop import train
from minigpt3d.training.run_options import FinetuneOptions, RunOptions
from minigpt3d.training.stages import change_stage, departures, parse_settings


def test_a_run_with_other_values(base, release, tmp_path):
    folder, annotations = write_release(tmp_path)
    pack(release_entries(folder, annotations), tmp_path / "held_out", num_workers=1)
    chosen = options(base, tmp_path / "mine", release, validation_data=str(tmp_path / "held_out"))
    chosen = FinetuneOptions(**vars(chosen), set=["lr=3e-4", "epochs=1", "batch=4", "eval_every=2"])
    row = tiny(STAGES["own"], steps_per_epoch=100, warmup_lr=1e-6, min_lr=1e-6, warmup_steps=50)
    result = train(row, chosen)
    entries = history(result)
    assert len(entries) == 24 / 4  # six objects, of four kinds
    assert [entry["step"] for entry in entries if "validation" in entry] == [1, 3]
    assert "validation_before" in entries[0] and "validation_after" in entries[-1]
    assert 1e-4 < max(entry["lr"] for entry in entries) <= 3e-4
    recorded = json.loads((result / "stage.json").read_text())["departures"]
    assert recorded["peak_lr"] == [1e-2, 3e-4] and recorded["steps"] == [100, 6] and recorded["batch"] == [3, 4]
    (line,) = [line for line in (result / "README.md").read_text().splitlines() if "departs" in line]
    assert all(word in line for word in ("peak_lr", "0.0003", "eval_every", "steps", "batch"))
    sources = json.loads((result / "card_sources.json").read_text())
    assert any("departures/peak_lr" in source["source"] for source in sources)


def test_a_run_resumes_with_the_same_values_only(base, release, tmp_path):
    interrupted = {"init": base, "output_dir": tmp_path / "out", "release": release}
    row = tiny(STAGES["own"], steps_per_epoch=4)
    chosen = FinetuneOptions(**vars(options(**interrupted, save_every=1, max_steps=2)), set=["lr=1e-3"])
    train(row, chosen)
    (tmp_path / "out").rename(tmp_path / "done")
    work = chosen.work_dir
    from minigpt3d.training.run_state import check_checkpoint

    checkpoint = work / "checkpoint-1"
    checkpoint.mkdir(parents=True)
    facts = json.loads((tmp_path / "done" / "stage.json").read_text())
    (checkpoint / "stage.json").write_text(json.dumps(facts))
    assert check_checkpoint(checkpoint, facts, 4) == 2
    with pytest.raises(ValueError, match="`set`"):
        check_checkpoint(checkpoint, facts | {"departures": {}}, 4)


def test_values_change_the_row_and_nothing_else():
    row = STAGES["own"]
    assert change_stage(row, {}, 12) == row and departures(row, row) == {}
    changed = change_stage(row, parse_settings(["epochs=5", "lr=1e-7"]), 80)
    assert (changed.steps, changed.warmup_steps, changed.peak_lr) == (50, 5, 1e-7)
    assert max(changed.warmup_lr, changed.min_lr) <= 1e-7
    assert replace(changed, **{name: getattr(row, name) for name in vars(row) if name not in VALUES}) == changed
    kept = change_stage(row, parse_settings(["steps=7", "warmup_steps=3", "min_lr=1e-9", "weight_decay=0"]), 80)
    assert (kept.steps, kept.warmup_steps, kept.min_lr, kept.weight_decay) == (7, 3, 1e-9, 0)
    assert change_stage(row, parse_settings(["epochs=0.01"]), 8).steps == 1


VALUES = ("peak_lr", "min_lr", "warmup_lr", "warmup_steps", "steps_per_epoch", "epochs")


@pytest.mark.parametrize(
    "text",
    ["rate=1", "lr", "lr=fast", "lr=0", "lr=-1", "lr=nan", "epochs=inf", "batch=0", "batch=2.5", "eval_every=0"],
)
def test_wrong_values(text):
    with pytest.raises(ValueError, match="`set`.*" + text.partition("=")[0]):
        parse_settings([text])


@pytest.mark.parametrize("texts", [["lr=1", "lr=1"], ["steps=3", "epochs=1"]])
def test_values_that_exclude_each_other(texts):
    with pytest.raises(ValueError, match="`set`"):
        parse_settings(texts)


def test_only_the_fine_tuning_has_the_option(monkeypatch, capsys):
    runs = []
    monkeypatch.setattr(command, "_run", lambda stage, options: runs.append(options))
    required = ["--init", "org/model", "--data", "org/data", "--output_dir", "result"]
    command.main("own", [*required, "--set", "lr=3e-4", "--set", "epochs=5"])
    assert runs[0].settings == {"lr": 3e-4, "epochs": 5} and RunOptions("a", "b", Path("c")).settings == {}
    for stage, arguments, code in (("II", ["--set", "lr=1"], 2), ("own", ["--set", "lr=0"], None)):
        with pytest.raises(SystemExit) as end:
            command.main(stage, [*required, *arguments])
        assert "set" in capsys.readouterr().err if code else "--set" in str(end.value.code)
    with pytest.raises(SystemExit, match="--validation_data"):
        command.main("own", [*required, "--set", "eval_every=50"])
