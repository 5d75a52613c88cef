"""Training with transformers' Trainer and trl's SFTTrainer, in place of the stages' loop."""

import numpy as np
import pytest
import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig
from tiny_model import make_tiny_model, make_tiny_processor
from training_runs import write_release
from transformers import Trainer, TrainingArguments

from minigpt3d import MiniGPT3DCollator
from minigpt3d.data import shards


LORA = LoraConfig(r=2, target_modules=r"model\.language_model\..*\.(query_key_value|dense)")


@pytest.fixture
def rows(tmp_path) -> Dataset:
    """Six objects, one of which two questions are about."""
    folder, _ = write_release(tmp_path)
    rows = []
    for i in range(6):
        cloud = {"type": "point_cloud", "point_cloud": str(folder / f"o{i}_8192.npy"), "text": None}
        turns = [
            {"role": "user", "content": [cloud, text("What is this?")]},
            {"role": "assistant", "content": [text(f"A red chair {i}.")]},
        ]
        if i == 3:
            turns += [{"role": "user", "content": [text("Why?")]}, {"role": "assistant", "content": [text("So.")]}]
        rows.append({"messages": turns})
    return Dataset.from_list(rows)


def text(words: str) -> dict:
    return {"type": "text", "text": words, "point_cloud": None}


def settings(kind, tmp_path, **changes):
    return kind(
        output_dir=str(tmp_path / "run"),
        max_steps=12,
        per_device_train_batch_size=3,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        remove_unused_columns=False,
        **changes,
    )


def assert_learned(trainer):
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert np.isfinite(losses).all() and losses[-1] < losses[0]
    changed = {name for name, p in trainer.model.named_parameters() if name in before and not p.equal(before[name])}
    assert changed
    return changed


def test_labels_are_the_answers(rows):
    processor = make_tiny_processor()
    batch = MiniGPT3DCollator(processor)([rows[3], rows[0]])
    assert batch["point_clouds"].shape == (2, 128, 6)
    learned = [processor.tokenizer.decode(row[row != -100]) for row in batch["labels"]]
    assert learned == ["A red chair 3.###So.###", "A red chair 0.###"]
    everything = MiniGPT3DCollator(processor, assistant_only_loss=False)([rows[3], rows[0]])
    is_padding = batch["attention_mask"] == 0
    is_cloud = batch["input_ids"] == processor.point_token_id
    assert torch.equal(everything["labels"] == -100, is_padding | is_cloud)
    assert torch.equal(everything["input_ids"], batch["input_ids"])
    cut = MiniGPT3DCollator(processor, max_text_length=2)([rows[0]])
    assert (cut["labels"] != -100).sum() == 2


def test_clouds_may_be_a_column(rows):
    collate = MiniGPT3DCollator(make_tiny_processor())
    messages = rows[0]["messages"]
    path = messages[0]["content"][0]["point_cloud"]
    bare = [{"role": "user", "content": [{"type": "point_cloud"}, text("What is this?")]}, messages[1]]
    for cloud in (path, np.load(path), np.load(path).tolist()):
        batch = collate([{"messages": bare, "point_clouds": [cloud]}])
        assert all(torch.equal(batch[name], tensor) for name, tensor in collate([rows[0]]).items())
    only_text = collate([{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}]}])
    assert "point_clouds" not in only_text
    with pytest.raises(ValueError, match="point_clouds.* 2"):
        collate([{"messages": bare, "point_clouds": [path, path]}])
    with pytest.raises(ValueError, match="remove_unused_columns"):
        collate([{}])


def test_packed_data_give_the_same_batches_as_their_sources(tmp_path):
    folder, annotations = write_release(tmp_path)
    shards.pack(shards.release_entries(folder, annotations), tmp_path / "packed", num_workers=1)
    data = load_dataset(str(tmp_path / "packed"), "multi_round", split="train", streaming=True)
    row = next(iter(data))
    processor = make_tiny_processor()
    batch = MiniGPT3DCollator(processor)([row])
    assert batch["point_clouds"].shape == (1, 128, 6)
    learned = batch["labels"][0]
    answers = [turn["value"] for turn in row["conversations"] if turn["from"] == "gpt"]
    assert processor.tokenizer.decode(learned[learned != -100]) == "".join(f"{answer}###" for answer in answers)


def test_transformers_trainer(rows, tmp_path):
    model = make_tiny_model()
    model.requires_grad_(False)
    model.model.language_projection.requires_grad_(True)
    trainer = Trainer(
        model,
        settings(TrainingArguments, tmp_path, prediction_loss_only=True),
        data_collator=MiniGPT3DCollator(make_tiny_processor()),
        train_dataset=rows,
        eval_dataset=rows,
    )
    before = trainer.evaluate()["eval_loss"]
    changed = assert_learned(trainer)
    assert all("language_projection" in name for name in changed)
    assert trainer.evaluate()["eval_loss"] < before


@pytest.mark.parametrize("lora", [None, LORA], ids=["complete", "peft"])
@pytest.mark.parametrize("assistant_only_loss", [True, False])
def test_trl(rows, tmp_path, lora, assistant_only_loss):
    trl = pytest.importorskip("trl")
    model = make_tiny_model()
    processor = make_tiny_processor()
    trainer = trl.SFTTrainer(
        model,
        settings(
            trl.SFTConfig,
            tmp_path,
            assistant_only_loss=assistant_only_loss,
            dataset_kwargs={"skip_prepare_dataset": True},
            gradient_checkpointing=False,
            bf16=False,
        ),
        data_collator=MiniGPT3DCollator(processor, assistant_only_loss),
        train_dataset=rows,
        processing_class=processor,
        peft_config=lora,
    )
    changed = assert_learned(trainer)
    if lora is not None:
        assert all("lora" in name for name in changed)
