"""Parity with the authors' code: every tensor in tests/golden, in float32.

The goldens were made by the authors' repository in its own environment (golden/MANIFEST.json names commit and versions).
A test says where a golden contains a fault of the authors' that this code does not copy.
"""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from tiny_model import make_tiny_config, tiny_phi_config

from minigpt3d.conversion.lora import lora_config
from minigpt3d.conversion.names import authors_name, our_name
from minigpt3d.conversion.state_dict import authors_state_dict, convert_state_dict
from minigpt3d.grouping_minigpt3d import farthest_point_sampling, group, nearest_neighbors
from minigpt3d.modeling_minigpt3d import MiniGPT3DForConditionalGeneration


LOGITS = {"rtol": 1e-4, "atol": 1e-5}
GRADIENTS = {"rtol": 1e-3, "atol": 0}


def close(actual, expected, rtol, atol):
    torch.testing.assert_close(actual.float(), expected.float(), rtol=rtol, atol=atol)


def relative_close(actual, expected, tolerance=1e-5):
    """Relative to the tensor's largest value, as a feature's error is."""
    error, scale = (actual - expected).abs().max(), expected.abs().max()
    assert error <= tolerance * scale, f"error {error:.2e} on a scale of {scale:.2e}, allowed {tolerance:.0e} of it"


def load_part(golden, file: str, part: str, prefix: str = "", config=None):
    """The tiny model with one part from a golden file, the rest random."""
    config = config or make_tiny_config()
    model = MiniGPT3DForConditionalGeneration(config).eval()
    converted = convert_state_dict({prefix + k: v for k, v in golden(file).items()}, config, part=part)
    result = model.load_state_dict(converted, strict=False)
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if key.startswith(part)]
    return model


@pytest.fixture(scope="module")
def full_models(golden) -> dict[str, MiniGPT3DForConditionalGeneration | PeftModel]:
    """The golden full model: LoRA merged into the weights, or beside them as a PEFT adapter."""
    config = make_tiny_config()
    merged = MiniGPT3DForConditionalGeneration(config).eval()
    merged.load_state_dict(convert_state_dict(golden("full.state"), config))

    converted = convert_state_dict(golden("full.state"), config, merge_lora=False)
    adapter = {name: tensor for name, tensor in converted.items() if ".lora_" in name}
    base = MiniGPT3DForConditionalGeneration(make_tiny_config()).eval()
    base.load_state_dict({name: tensor for name, tensor in converted.items() if name not in adapter})
    model = get_peft_model(base, lora_config(converted)).eval()
    loading_info = set_peft_model_state_dict(model, {f"base_model.model.{name}": t for name, t in adapter.items()})
    assert not loading_info.unexpected_keys
    assert not [key for key in loading_info.missing_keys if "lora_" in key]
    return {"merge": merged, "adapter": model}


@pytest.fixture
def full_model(full_models):
    """`full_model("sparse", "adapter")` → that model with this router, all of it trainable, without gradients."""

    def prepare(router_type: str = "sparse", lora: str = "merge"):
        model = full_models[lora]
        model.config.router_type = router_type
        model.zero_grad()
        return model.requires_grad_(True)

    return prepare


# Point encoder


@pytest.mark.parametrize("run", ["force0", "rand"])
def test_point_encoder(golden, run):
    """The authors draw the first center at random; the run's own start is passed in."""
    expected = {k.removeprefix(f"{run}."): v for k, v in golden("point_encoder.io").items() if k.startswith(run)}
    points = golden("point_encoder.io")["points"]
    model = load_part(golden, "point_encoder.state", "model.point_encoder", prefix="pc_encoder.")
    encoder = model.model.point_encoder
    start = expected["fps_start"]

    indices = farthest_point_sampling(points[..., :3], 16, start)
    assert torch.equal(indices, expected["fps_idx"])
    center = points[..., :3].gather(1, indices[..., None].expand(-1, -1, 3))
    assert torch.equal(center, expected["centers"])
    neighbors = nearest_neighbors(points[..., :3], center, 8).sort(-1).values
    assert torch.equal(neighbors, expected["knn_idx_sorted"])

    neighborhood, center = group(points, 16, 8, start)
    # The order of neighbors does not matter: compare both sides sorted.
    for row, (ours, theirs) in enumerate(
        zip(neighborhood.flatten(0, 1), expected["neighborhood_sorted"].flatten(0, 1), strict=True)
    ):
        ours = ours[torch.argsort(ours[:, 0], stable=True)]
        assert torch.equal(ours, theirs[torch.argsort(theirs[:, 0], stable=True)]), row

    relative_close(encoder.mini_pointnet(neighborhood), expected["mini_pointnet_out"])
    relative_close(encoder.group_projection(encoder.mini_pointnet(neighborhood)), expected["group_tokens"])
    relative_close(encoder.position_embedding(center), expected["pos_embed"])
    blocks = []
    for block in encoder.blocks:
        block.register_forward_hook(lambda module, args, output: blocks.append(output))
    relative_close(encoder(points, start).last_hidden_state, expected["output"])
    for layer, output in enumerate(blocks):
        relative_close(output, expected[f"block_{layer}_out"])
    if run == "force0":
        again = encoder(points).last_hidden_state
        assert torch.equal(again, encoder(points, start).last_hidden_state), "the default start is point 0"


def test_grouping_falls_back_to_the_distance_matrix(golden, monkeypatch):
    """Without scipy the neighbors come from torch, and are the same."""
    monkeypatch.setattr("minigpt3d.grouping_minigpt3d.cKDTree", None)
    expected = golden("point_encoder.io")
    neighbors = nearest_neighbors(expected["points"][..., :3], expected["force0.centers"], 8)
    assert torch.equal(neighbors.sort(-1).values, expected["force0.knn_idx_sorted"])


# Q-Former


@pytest.mark.parametrize("variant", ["nolora", "lora"])
def test_qformer(golden, variant):
    """The LoRA golden was made with the adapters' dropout forced off: in the authors' evaluation it stays on."""
    expected, state = golden(f"qformer_{variant}.io"), golden(f"qformer_{variant}.state")
    query_tokens = state.pop("query_tokens")
    config = make_tiny_config()
    model = MiniGPT3DForConditionalGeneration(config).eval()
    converted = convert_state_dict(state, config, part="model.qformer")
    qformer = model.model.qformer
    qformer.load_state_dict({k.removeprefix("model.qformer."): v for k, v in converted.items()})
    assert any("lora_" in key for key in state) == (variant == "lora")

    inputs = {
        "query_embeds": query_tokens.expand(2, -1, -1),
        "encoder_hidden_states": expected["encoder_hidden_states"],
    }
    output = qformer(**inputs, encoder_attention_mask=expected["encoder_attention_mask"], output_hidden_states=True)
    relative_close(output.last_hidden_state, expected["last_hidden_state"])
    hidden = [qformer.layernorm(query_tokens.expand(2, -1, -1)), *output.hidden_states[-4:]]
    for layer, state in enumerate(hidden):
        relative_close(state, expected[f"hidden_{layer}"])
    masked = qformer(**inputs, encoder_attention_mask=expected["masked_encoder_attention_mask"])
    relative_close(masked.last_hidden_state, expected["masked_last_hidden_state"])
    relative_close(qformer(**inputs).last_hidden_state, expected["last_hidden_state"])  # no mask: all is seen


# Phi


@pytest.fixture
def phi(golden):
    """The complete model, fed with embeddings, so that only its language model computes."""
    config = make_tiny_config()
    model = MiniGPT3DForConditionalGeneration(config).eval()
    for part in ("model.language_model", "lm_head"):
        state = {k: v for k, v in golden("phi.state").items() if our_name(k).startswith(part)}
        loading_info = model.load_state_dict(convert_state_dict(state, config, part=part), strict=False)
        assert not loading_info.unexpected_keys and not [
            key for key in loading_info.missing_keys if key.startswith(part)
        ]
    return model


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_phi_forward(golden, phi, attention):
    """Logits count where the mask is 1: padded rows attend to garbage in the authors' code."""
    phi.set_attn_implementation(attention)
    expected = golden("phi.io")
    right = expected["attention_mask_right"].bool()
    output = phi(
        inputs_embeds=expected["inputs_embeds"],
        attention_mask=expected["attention_mask_right"],
        labels=expected["labels"],
        output_hidden_states=True,
    )
    close(output.logits[right], expected["logits_right"][right], **LOGITS)
    close(output.loss, expected["loss"], **LOGITS)
    for layer, hidden in enumerate(output.hidden_states):
        relative_close(hidden[right], expected[f"right_hidden_{layer}"][right])
    left = expected["attention_mask_left"].bool()
    for positions, name in ((None, "default"), (expected["position_ids_left"], "cumsum")):
        logits = phi(
            inputs_embeds=expected["inputs_embeds_left"],
            attention_mask=expected["attention_mask_left"],
            position_ids=positions,
        ).logits
        close(logits[left], expected[f"logits_left_{name}_positions"][left], **LOGITS)
    close(phi(expected["input_ids"]).logits, expected["logits_input_ids"], **LOGITS)


def test_phi_generation(golden, phi):
    """The golden ids begin with one bos that the authors' transformers put in front and never fed to the model."""
    expected = golden("phi.io")
    output = phi.generate(
        inputs_embeds=expected["inputs_embeds_left"],
        attention_mask=expected["attention_mask_left"],
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=292,
        pad_token_id=292,
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert torch.equal(output.sequences, expected["generate_ids"][:, 1:])
    close(torch.stack(output.logits, 1), expected["generate_scores"], **LOGITS)


# From the cloud to the language model


@pytest.mark.parametrize("lora", ["merge", "adapter"])
@pytest.mark.parametrize("router_type", ["none", "sparse", "soft", "constant"])
def test_point_features(golden, full_model, router_type, lora):
    expected = golden("full.encode_pc.io")
    model = full_model(router_type, lora)
    inner = model.model if lora == "merge" else model.base_model.model.model
    features = inner.point_encoder(expected["points"]).last_hidden_state
    relative_close(features, expected["none.pc_feature"])
    relative_close(inner.point_projection(features), expected["none.pc_embeds"])
    query_output = inner.get_query_output(features).last_hidden_state
    relative_close(query_output, expected[f"{router_type}.query_output"])
    relative_close(inner.language_projection.linear_1(query_output), expected[f"{router_type}.llama_proj_out"])
    relative_close(model.get_point_features(expected["points"]).pooler_output, expected[f"{router_type}.inputs_llama"])


def test_router(golden, full_model):
    expected = golden("full.encode_pc.io")
    inner = full_model().model
    features = inner.point_encoder(expected["points"]).last_hidden_state
    relative_close(torch.cat([features[:, 0], features[:, 1:].amax(1)], dim=-1), expected["sparse.pc_global_feature"])
    logits = inner.router.get_logits(features)
    relative_close(logits, expected["sparse.router_logits"])
    relative_close(logits.softmax(-1), expected["sparse.router_softmax"])
    experts, weights = inner.router(features)
    order = experts.argsort(-1)  # the authors list the chosen experts by number
    assert torch.equal(experts.gather(1, order), expected["sparse.chosen_experts_sorted"])
    chosen = expected["sparse.router_softmax"].gather(1, expected["sparse.chosen_experts_sorted"])
    relative_close(weights.gather(1, order), chosen)
    relative_close(weights.sort(-1).values, expected["sparse.chosen_weights"].sort(-1).values)
    assert (weights.sum(-1) < 1).all(), "the chosen weights are used as they are"


# Losses and gradients


CASES = ["single.none", "single.sparse", "multi.none", "multi.sparse", "single_trunc.sparse", "multi_trunc.sparse"]


def training_inputs(golden, processor, case: str):
    """The golden's samples through our processor, as training does it."""
    kind = case.split(".")[0].removesuffix("_trunc")
    sample = golden("full.loss.json")["samples"][kind]
    clean = lambda text: text.replace("<PC><PointCloudHere></PC> ", "").removesuffix(" ")  # noqa: E731
    if kind == "single":
        rounds = [[pair] for pair in zip(sample["instruction_input"], sample["answer"], strict=True)]
    else:
        rounds = [
            list(zip(questions.split("!@#"), answers.split("!@#"), strict=True))
            for questions, answers in zip(sample["conv_q"], sample["conv_a"], strict=True)
        ]
    conversations = []
    for pairs in rounds:
        messages = []
        for index, (question, answer) in enumerate(pairs):
            content = [{"type": "point_cloud"}] if index == 0 else []
            content.append({"type": "text", "text": clean(question)})
            messages += [{"role": "user", "content": content}]
            messages += [{"role": "assistant", "content": [{"type": "text", "text": answer}]}]
        conversations.append(messages)
    points = golden("full.encode_pc.io")["points"][: len(conversations)]
    max_text_length = golden("full.loss.json")["results"][case]["max_txt_len"]
    return processor.encode_training(conversations, list(points.numpy()), max_text_length=max_text_length), points


@pytest.mark.parametrize("lora", ["merge", "adapter"])
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients(golden, full_model, tiny_processor, case, lora):
    results, expected = golden("full.loss.json")["results"][case], golden("full.loss.io")
    model = full_model(case.split(".")[1], lora)
    inputs, points = training_inputs(golden, tiny_processor, case)
    inputs["point_clouds"] = points  # bit for bit those of the golden: normalizing again moves the last digit
    width = inputs["input_ids"].shape[1]
    reference = expected.get(f"{case}.attention_mask")
    if reference is not None:
        # The authors pad prompts and answers separately, so that their batch can be wider than its longest row.
        assert (reference[:, width:] == 0).all() and (expected[f"{case}.targets"][:, width:] == -100).all()
        assert torch.equal(inputs["labels"], expected[f"{case}.targets"][:, :width])
        reference = reference[:, :width].long()
        # The authors keep the first prompt, without its bos, separate from all that follows it.
        for row, labels in enumerate(inputs["labels"]):
            prompt = int(expected[f"{case}.cond_attention"][row].sum())
            assert prompt + 1 == (labels != -100).nonzero()[0]
            length = int(inputs["attention_mask"][row].sum())
            rest = slice(prompt + 1, length)
            assert torch.equal(expected[f"{case}.part_targets"][row, : length - prompt - 1], labels[rest])
            seen = inputs["attention_mask"][row] * (inputs["input_ids"][row] != 292)  # their bos = pad fault, as below
            assert torch.equal(expected[f"{case}.regress_attention"][row, : length - prompt - 1].long(), seen[rest])
    if case.startswith("multi"):
        # A fault of the authors': inside a multi-round batch every bos but the first is masked away, because bos = pad.
        faulty = inputs["attention_mask"] * (inputs["input_ids"] != 292)
        faulty[:, 0] = 1
        assert reference is None or torch.equal(faulty, reference)
        inputs["attention_mask"] = faulty
    else:
        assert reference is None or torch.equal(inputs["attention_mask"], reference)

    output = model(**inputs)
    close(output.loss, torch.tensor(results["loss"]), **LOGITS)
    assert (inputs["labels"][:, 1:] != -100).sum() == results["n_target_tokens"]
    if f"{case}.inputs_embeds" in expected:
        inner = model.model if lora == "merge" else model.base_model.model.model
        embeds, _ = inner.embed(inputs["input_ids"], points)
        seen = inputs["attention_mask"].bool()
        relative_close(embeds[seen], expected[f"{case}.inputs_embeds"][:, :width][seen])

    output.loss.backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        name = authors_name(
            name.removeprefix("base_model.model.").replace(".base_layer.", ".").replace(".default.", ".")
        )
        gradients[name] = parameter.grad
    for name, norm in results["grad_norms"].items():
        if lora == "merge" and "lora_" in name:  # merged into its weight
            continue
        gradient = gradients[name]
        if norm is None:
            assert gradient is None or gradient.abs().max() == 0, name
        else:
            close(gradient.norm(), torch.tensor(norm), **GRADIENTS)
        if (full := expected.get(f"{case}.grad.{name}")) is not None:
            relative_close(gradient.reshape(full.shape), full, 1e-3)


# Generation


RUNS = [
    "greedy",
    "greedy_minlen",
    "beam2",
    "beam2_minlen10",
    "greedy_eos_bump",
    "greedy_eos_bump_minlen10",
    "beam2_eos_bump",
    "beam3_eos_bump_lp2",
]


@pytest.mark.parametrize("run", RUNS)
def test_generation(golden, full_model, tiny_processor, run):
    """The benchmark's prompt, through our template and processor.

    The authors' ids begin with a bos that is never fed to the model but counts towards min_length, so their
    min_length n is our min_new_tokens n-1.
    """
    expected, runs = golden("full.generate.io"), golden("full.generate.json")["runs"]
    recorded, model = runs[run], full_model()
    if "eos_bump" in run:
        model = copy.deepcopy(model)
        model.lm_head.bias.data[292] += runs["greedy_eos_bump"]["lm_head_bias_added_at_eos"]
    points = golden("full.encode_pc.io")["points"][:2]
    conversations = [
        [{"role": "user", "content": [{"type": "point_cloud", "point_cloud": cloud}, {"type": "text", "text": text}]}]
        for cloud, text in zip(points.numpy(), ["What is this?", "Caption this 3D model in detail."], strict=True)
    ]
    inputs = tiny_processor.apply_chat_template(
        conversations,
        chat_template="benchmark",
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
        processor_kwargs={"padding": True},
    )
    inputs["point_clouds"] = points
    assert torch.equal(inputs["attention_mask"], expected["attention_mask"].long())
    seen = inputs["attention_mask"].bool()
    embeds, _ = model.model.embed(inputs["input_ids"], points)
    relative_close(embeds[seen], expected["inputs_embeds"][seen])

    arguments = recorded["kwargs_to_hf"]
    output = model.generate(
        **inputs,
        max_new_tokens=arguments["max_new_tokens"],
        min_new_tokens=arguments["min_length"] - 1,
        num_beams=arguments["num_beams"],
        length_penalty=float(arguments["length_penalty"]),
        do_sample=False,
        eos_token_id=292,
        pad_token_id=292,
        return_dict_in_generate=True,
        output_scores=True,
    )
    new = output.sequences[:, inputs["input_ids"].shape[1] :]
    reference = expected[f"{run}.ids"][:, 1:]
    assert torch.equal(new, reference[:, : new.shape[1]])
    assert (reference[:, new.shape[1] :] == 292).all()
    if "sequences_scores" in recorded:
        close(output.sequences_scores, torch.tensor(recorded["sequences_scores"]), **LOGITS)
    answers = tiny_processor.tokenizer.batch_decode(new, skip_special_tokens=True)
    assert [a.strip() for a in answers] == [a.strip() for a in recorded["answers"]]


# The state dict in both directions


def test_every_key_is_accounted_for(golden):
    state, config = golden("full.state"), make_tiny_config()
    converted = convert_state_dict(state, config, merge_lora=False)
    lora = {name for name in converted if ".lora_" in name}
    with torch.device("meta"):
        ours = set(MiniGPT3DForConditionalGeneration(config).state_dict())
    assert converted.keys() - lora == ours
    authors = authors_state_dict(converted)
    assert authors.keys() == state.keys() - {"Qformer.bert.embeddings.position_ids"}
    assert all(tensor.shape == state[key].shape for key, tensor in authors.items())
    merged = convert_state_dict(state, config)
    assert merged.keys() == ours


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_ours_as_the_authors_is_ours_again(golden, dtype):
    """BatchNorms that change nothing are folded without rounding."""
    state, config = golden("full.state"), make_tiny_config()
    ours = {name: t.to(dtype) for name, t in convert_state_dict(state, config, merge_lora=False).items()}
    again = convert_state_dict(authors_state_dict(ours), config, merge_lora=False)
    assert again.keys() == ours.keys()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in again.items())


def test_aliases_and_peft_spellings(golden):
    state, config = golden("full.state"), make_tiny_config()
    reference = convert_state_dict(state, config)
    second = {"point_encoder." + k.removeprefix("pc_encoder."): v for k, v in state.items() if k.startswith("pc_enc")}
    aliased = state | second | {"query_expert_dict.0": state["query_tokens"]}
    renamed = {}
    for key, tensor in aliased.items():  # newer peft: the wrapped weight becomes base_layer
        module, _, leaf = key.rpartition(".")
        renamed[f"{module}.base_layer.{leaf}" if f"{module}.lora_A.default.weight" in aliased else key] = tensor
    assert any("base_layer" in key for key in renamed)
    for variant in (aliased, renamed):
        converted = convert_state_dict(variant, config)
        assert all(torch.equal(converted[name], tensor) for name, tensor in reference.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("llama_proj.bias"), "llama_proj.bias is missing"),
        (lambda s: s.update(llama_proj3=torch.zeros(1)), "llama_proj3 is no tensor of MiniGPT-3D"),
        (lambda s: s.update({"llama_proj.bias": torch.zeros(3)}), r"llama_proj.bias has shape \(3,\)"),
        (lambda s: s.update({"query_expert_dict.9": torch.zeros(1, 6, 32)}), "is not in this configuration"),
        (lambda s: s.update({"query_expert_dict.0": torch.zeros(1, 6, 32)}), "differs"),
        (
            lambda s: s.pop("llama_model.base_model.model.model.layers.0.self_attn.dense.lora_A.default.weight"),
            "has no partner",
        ),
        (
            lambda s: s.update(
                {
                    "llama_model.base_model.model.model.layers.0.self_attn.dense.lora_A.default.weight": torch.zeros(
                        8, 63
                    )
                }
            ),
            r"their product does not fit \(64, 64\)",
        ),
    ],
)
def test_a_wrong_state_dict_is_refused(golden, change, message):
    state = golden("full.state")
    change(state)
    with pytest.raises(ValueError, match=message):
        convert_state_dict(state, make_tiny_config())


def test_phi_config_is_the_golden_one(golden):
    """The tests' Phi has the settings of the manifest."""
    settings = golden("MANIFEST.json")["files"]["phi.state.safetensors"]["config"]
    config = tiny_phi_config()
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "hidden_act", "resid_pdrop"):
        assert getattr(config, name) == settings[name]
    assert config.rope_parameters["partial_rotary_factor"] == settings["partial_rotary_factor"]
