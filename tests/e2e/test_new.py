"""`minigpt3d new`: other language models, from their folders through the four stages."""

import json

import numpy as np
import pytest
import torch
from language_models import LANGUAGE_MODELS, write_language_model
from release_files import write_release_files
from safetensors.torch import load_file
from tiny_model import GOLDEN_DIR, make_tiny_config
from training_runs import STAGES, options, tiny
from transformers import (
    AutoModelForCausalLM,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2VisionConfig,
    OPTConfig,
    pipeline,
)

from minigpt3d.cli.main import main
from minigpt3d.configuration_minigpt3d import MiniGPT3DConfig
from minigpt3d.conversion import parts
from minigpt3d.conversion.state_dict import convert_state_dict
from minigpt3d.hub import load_model
from minigpt3d.training.loop import train


def make_new(tmp_path, base, name, *arguments, qformer=True):
    llm = write_language_model(name, tmp_path / name)
    if qformer:
        arguments = ["--qformer", str(base), *arguments]
    out = tmp_path / "start"
    code = main(["new", "--llm", str(llm), "--point-encoder", str(base), "--out", str(out), *arguments])
    return code, llm, out


@pytest.mark.parametrize(
    "name",
    [name if name == "qwen3" else pytest.param(name, marks=pytest.mark.slow) for name in LANGUAGE_MODELS],
)
def test_a_language_model_goes_through_the_four_stages(name, base, release, tmp_path, point_clouds):
    code, llm, folder = make_new(tmp_path, base, name)
    assert code == 0
    model, processor = load_model(folder)
    of_llm = AutoModelForCausalLM.from_pretrained(llm)
    encoder, _ = load_model(base)
    rows = len(of_llm.get_input_embeddings().weight)
    embedding = model.get_input_embeddings().weight
    assert torch.equal(embedding[:rows], of_llm.get_input_embeddings().weight)
    assert torch.equal(model.lm_head.weight[:rows], of_llm.lm_head.weight)
    text = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(text).logits[..., :rows], of_llm(text).logits, rtol=1e-4, atol=1e-5)
    for part in ("point_encoder", "qformer"):
        ours, theirs = (getattr(m.model, part).state_dict() for m in (model, encoder))
        assert all(torch.equal(ours[key], tensor) for key, tensor in theirs.items())
    assert model.config.point_token_id < len(embedding) and processor.feature_extractor.num_points == 128
    assert "stage I" in (folder / "README.md").read_text()

    for stage in ("I", "II", "III", "IV"):
        folder = train(tiny(STAGES[stage]), options(folder, tmp_path / stage, release, max_steps=2))
    describe = pipeline("point-cloud-to-text", model=str(folder))
    (answer,) = describe(np.array(point_clouds[0]), max_new_tokens=3)
    assert isinstance(answer["generated_text"], str)
    loaded, processor = load_model(folder)
    assert loaded.config.text_config.model_type == of_llm.config.model_type
    own = "<|im_start|>" if name != "llama" else "[INST]"
    assert own in processor.apply_chat_template([{"role": "user", "content": "Hello"}])


@pytest.mark.parametrize("name", ["qwen3", "smollm2"])
def test_the_models_own_chat_template_gives_prompts_and_labels(name, base, tmp_path, point_clouds):
    _, _, folder = make_new(tmp_path, base, name)
    model, processor = load_model(folder)
    cloud = {"type": "point_cloud", "point_cloud": np.array(point_clouds[0])}
    chat = [
        {"role": "user", "content": [cloud, {"type": "text", "text": "What is this?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A chair."}]},
        {"role": "user", "content": "Is it red?"},
        {"role": "assistant", "content": "Yes."},
    ]
    batch = processor.encode_training([chat])
    labels = batch["labels"][0]
    learned = processor.tokenizer.decode(labels[labels != -100])
    assert learned == "A chair.<|im_end|>Yes.<|im_end|>"
    assert (batch["input_ids"] == model.config.point_token_id).sum() == model.config.num_query_tokens
    prompt = processor.apply_chat_template(chat[:1], add_generation_prompt=True)
    assert prompt.endswith("<PC><point></PC> What is this?<|im_end|>\n<|im_start|>assistant\n")
    assert processor.apply_chat_template(chat).startswith(prompt)
    assert ("system" in prompt) == (name == "smollm2")
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end in model.generation_config.eos_token_id and processor.end_of_answer == "<|im_end|>"


def test_blip2_gives_its_qformer(base, tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    blip2 = Blip2ForConditionalGeneration(
        Blip2Config(
            vision_config=Blip2VisionConfig(**sizes, image_size=28).to_dict(),
            qformer_config=sizes | {"encoder_hidden_size": 32},
            text_config=OPTConfig(vocab_size=50, hidden_size=16, word_embed_proj_dim=16, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2).to_dict(),
            num_query_tokens=5,
        )
    )  # fmt: skip
    torch.nn.init.normal_(blip2.query_tokens)
    blip2.save_pretrained(tmp_path / "blip2")
    code, _, folder = make_new(tmp_path, base, "llama", "--qformer", str(tmp_path / "blip2"), qformer=False)
    assert code == 0
    model, processor = load_model(folder)
    assert model.config.num_query_tokens == processor.num_query_tokens == 5
    assert model.config.qformer_config.encoder_hidden_size == 32
    assert model.config.qformer_config.hidden_dropout_prob == 0
    for name, tensor in blip2.qformer.state_dict().items():
        assert torch.equal(model.model.qformer.state_dict()[name], tensor)
    assert all(torch.equal(expert.weight, blip2.query_tokens[0]) for expert in model.model.query_experts)


def test_the_authors_files_give_encoder_and_qformer(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "MiniGPT3DConfig", make_tiny_config)  # the files are of the tiny model
    files = write_release_files(tmp_path / "release")
    llm = write_language_model("llama", tmp_path / "llama")
    parts.write_start(str(llm), str(files["point_encoder"]), tmp_path / "start", str(files["blip2"]))
    model, _ = load_model(tmp_path / "start")
    state = convert_state_dict(load_file(GOLDEN_DIR / "full.state.safetensors"), make_tiny_config())
    frozen = [name for name in state if name.startswith("model.point_encoder") or "qformer.layernorm" in name]
    assert len(frozen) > 40 and all(torch.equal(model.state_dict()[name], state[name]) for name in frozen)
    queries = torch.load(files["blip2"])["model"]["query_tokens"][0]
    assert all(torch.equal(expert.weight, queries) for expert in model.model.query_experts)


def test_without_a_qformer_it_is_random_and_says_so(base, tmp_path, capsys):
    code, _, folder = make_new(tmp_path, base, "qwen3", "--dtype", "bfloat16", qformer=False)
    assert code == 0 and "--qformer" in capsys.readouterr().err
    model, _ = load_model(folder)
    assert model.dtype == torch.bfloat16
    assert model.config.qformer_config.hidden_size == make_tiny_config().qformer_config.hidden_size
    assert "random" in " ".join(json.loads((folder / "provenance.json").read_text())["summary"])


def test_wrong_parts_are_named_before_anything_is_written(base, tmp_path, capsys):
    llm = write_language_model("llama", tmp_path / "llama")
    gemma, empty = tmp_path / "gemma", tmp_path / "empty"
    gemma.mkdir()
    empty.mkdir()
    (gemma / "config.json").write_text(json.dumps({"model_type": "gemma2"}))
    out = ["--out", str(tmp_path / "start")]
    for arguments, message in (
        (["--llm", str(gemma), "--point-encoder", str(base)], "gemma2"),
        (["--llm", str(empty), "--point-encoder", str(base)], "config.json"),
        (["--llm", str(llm), "--point-encoder", str(llm)], "type llama"),
        (["--llm", str(llm), "--point-encoder", str(base), "--qformer", str(llm)], "type llama"),
        (["--llm", str(llm), "--point-encoder", str(tmp_path / "none")], "no folder"),
    ):
        assert main(["new", *arguments, *out]) == 1
        assert message in capsys.readouterr().err
        assert not (tmp_path / "start").exists()


def test_sizes_follow_from_the_language_model():
    tiny = make_tiny_config()
    paper = MiniGPT3DConfig()
    assert (paper.point_projection_hidden_size, paper.language_projection_hidden_size) == (768, 4096)
    assert paper.point_token_id == 50295
    config = MiniGPT3DConfig(text_config=LANGUAGE_MODELS["qwen3"]()[0].config, point_config=tiny.point_config)
    assert (config.point_projection_hidden_size, config.language_projection_hidden_size) == (96, 64)
    assert config.point_token_id == 447
