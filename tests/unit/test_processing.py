"""Text: the authors' prompts to the character and token, labels, batches, and errors."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from tiny_model import GOLDEN_DIR
from tokenizers import models, trainers
from tokenizers_of_others import llama_style, qwen_style, train, wordpiece_style
from transformers import (
    AutoFeatureExtractor,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)
from transformers.processing_utils import TextKwargs

from minigpt3d.processing_minigpt3d import (
    DEFAULT_PROMPT,
    END_OF_ANSWER,
    POINT_TOKEN,
    QUOTE,
    MiniGPT3DPointCloudProcessor,
    MiniGPT3DProcessor,
    clean_question,
    prepare_tokenizer,
)


BOS = "<|endoftext|>"


def cloud(seed: int = 0, num_points: int = 50) -> np.ndarray:
    return np.random.default_rng(seed).random((num_points, 6), np.float32)


def user(text: str, *clouds) -> dict:
    content = [{"type": "point_cloud", "point_cloud": source} for source in clouds]
    return {"role": "user", "content": [*content, {"type": "text", "text": text}]}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


TENSORS = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}


# The chat template


def test_training_prompt_to_the_character(tiny_processor):
    chat = [user("what is this?", cloud()), assistant("A chair.")]
    expected = f"{BOS}[INST] <PC><point></PC> what is this?  [/INST]A chair.###"
    assert tiny_processor.apply_chat_template(chat) == expected
    assert tiny_processor.apply_chat_template([chat, chat[:1]]) == [expected, expected.removesuffix("A chair.###")]


def test_every_round_has_its_marks(tiny_processor):
    chat = [user("What?", cloud()), assistant("A chair."), user("Is it new?"), assistant("No.")]
    expected = f"{BOS}[INST] <PC><point></PC> What?  [/INST]A chair.###{BOS}[INST] Is it new?  [/INST]No.###"
    assert tiny_processor.apply_chat_template(chat) == expected
    plain = [chat[0], {"role": "assistant", "content": "A chair."}, {"role": "user", "content": "Is it new?"}, chat[3]]
    assert tiny_processor.apply_chat_template(plain) == expected
    assert tiny_processor.apply_chat_template([user("Same?", cloud(), cloud())]) == (
        f"{BOS}[INST] <PC><point></PC> <PC><point></PC> Same?  [/INST]"
    )


def test_benchmark_prompts_are_the_authors(tiny_processor, golden):
    questions = ["What is this?", "This is an object of ", "Caption this 3D model in detail."]
    for question, prompt in zip(questions, golden("data_facts.json")["eval"]["prompts"], strict=True):
        expected = prompt.replace("<PointCloudHere>", POINT_TOKEN)
        assert tiny_processor.apply_chat_template([user(question, cloud())], chat_template="benchmark") == expected


def test_a_system_message_stands_before_the_first_turn(tiny_processor):
    chat = [user("What?", cloud()), assistant("A chair."), user("Is it new?"), assistant("No.")]
    for template, start in (("default", BOS), ("benchmark", "")):
        rest = tiny_processor.apply_chat_template(chat, chat_template=template)
        for content in ("Be brief.", [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]):
            system = {"role": "system", "content": content}
            text = tiny_processor.apply_chat_template([system, *chat], chat_template=template)
            assert text == f"{start}Be brief.{rest}"
    plain, told = (tiny_processor.encode_training([messages]) for messages in (chat, [system, *chat]))
    added = tiny_processor.tokenizer(f"{BOS}Be brief.", add_special_tokens=False)["input_ids"]
    assert told["input_ids"][0].tolist() == added + plain["input_ids"][0].tolist()
    assert told["labels"][0].tolist() == [-100] * len(added) + plain["labels"][0].tolist()


def test_an_answer_can_be_continued(tiny_processor):
    chat = [user("What?", cloud()), assistant("A wooden")]
    text = tiny_processor.apply_chat_template(chat, continue_final_message=True)
    assert text.endswith("[/INST]A wooden")


@pytest.mark.parametrize(
    ("chat", "words"),
    [
        ([{"role": "tool", "content": "4"}], "'user' or 'assistant', got 'tool'"),
        ([user("What?"), {"role": "system", "content": "Be brief."}], "first"),
        ([{"role": "system", "content": user("Be brief.", cloud())["content"]}], "'text', got 'point_cloud'"),
        ([{"role": "user", "content": [{"type": "image", "image": "a.png"}]}], "'text' or 'point_cloud', got 'image'"),
    ],
)
def test_other_roles_and_contents_are_refused(tiny_processor, chat, words):
    with pytest.raises(Exception, match=words):
        tiny_processor.apply_chat_template(chat)


def test_unknown_template(tiny_processor):
    with pytest.raises(ValueError, match="default, benchmark.*'demo'"):
        tiny_processor.apply_chat_template([user("What?")], chat_template="demo")


# Questions


def test_questions_are_cleaned_as_blip_does(golden):
    for fact in golden("data_facts.json")["blip_caption"]:
        assert clean_question(fact["input"]) == fact["output"]


# Parity with the authors


def golden_conversations(golden, kind: str) -> list[list[dict]]:
    sample = golden("full.loss.json")["samples"][kind]
    questions, answers = (
        (sample["conv_q"], sample["conv_a"]) if kind == "multi" else (sample["instruction_input"], sample["answer"])
    )
    conversations = []
    for question, answer in zip(questions, answers, strict=True):
        chat = []
        for index, (q, a) in enumerate(zip(question.split("!@#"), answer.split("!@#"), strict=True)):
            q = q.removeprefix("<PC><PointCloudHere></PC> ").removesuffix(" ")
            chat += [user(q, *([cloud()] if index == 0 else [])), assistant(a)]
        conversations.append(chat)
    return conversations


@pytest.mark.parametrize(
    ("case", "max_text_length"), [("single", 1024), ("multi", 1024), ("single_trunc", 12), ("multi_trunc", 15)]
)
def test_ids_labels_and_mask_are_the_authors(tiny_processor, golden, case, max_text_length):
    """Their batches are embeddings; each text embedding is compared with its row of the embedding table.

    A known fault of theirs: bos has mask 0 inside multi-round batches, because bos = pad. Ours is 1 there.
    """
    expected = golden("full.loss.io")
    conversations = golden_conversations(golden, case.removesuffix("_trunc"))
    inputs = tiny_processor.encode_training(conversations, max_text_length=max_text_length)
    # Theirs are as wide as the longest prompt plus the longest remainder: beyond our width they are padding.
    width = inputs["input_ids"].shape[1]
    targets, reference = expected[f"{case}.sparse.targets"], expected[f"{case}.sparse.attention_mask"].long()
    assert (targets[:, width:] == -100).all() and (reference[:, width:] == 0).all()
    assert torch.equal(inputs["labels"], targets[:, :width])

    mask, reference = inputs["attention_mask"], reference[:, :width]
    if case.startswith("multi"):
        later_bos = (inputs["input_ids"] == tiny_processor.tokenizer.bos_token_id) & (mask == 1)
        later_bos[:, 0] = False
        reference = torch.where(later_bos, 1, reference)
    assert torch.equal(mask, reference)

    table = golden("full.state")["llama_model.base_model.model.model.embed_tokens.weight"]
    is_text = mask.bool() & (inputs["input_ids"] != tiny_processor.point_token_id)
    torch.testing.assert_close(
        table[inputs["input_ids"][is_text]],
        expected[f"{case}.sparse.inputs_embeds"][:, :width][is_text],
        rtol=0,
        atol=0,
    )
    assert (inputs["input_ids"] == tiny_processor.point_token_id).sum() == 6 * len(conversations)


# Labels


def answers_of(labels: torch.Tensor, tokenizer) -> list[str]:
    return [tokenizer.decode(row[row != -100]) for row in labels]


def test_labels_are_the_answers_and_their_ends_only(tiny_processor):
    chat = [
        user("What?", cloud()),
        assistant("(A) chair###, \u00e4 bit \U0001fa91"),
        user("[/INST]### is it?"),
        assistant(" No"),
    ]
    inputs = tiny_processor.encode_training([chat, [user("Hm?", cloud()), assistant("")]])
    assert answers_of(inputs["labels"], tiny_processor.tokenizer) == [
        "(A) chair###, \u00e4 bit \U0001fa91### No###",
        "###",
    ]
    assert not (inputs["labels"] == tiny_processor.point_token_id).any()
    assert (inputs["labels"][inputs["attention_mask"] == 0] == -100).all()
    assert (inputs["attention_mask"].diff(dim=1) <= 0).all()  # padded on the right


def test_training_clouds_are_normalized_and_in_order(tiny_processor):
    chats = [[user("What?", cloud(seed)), assistant("A chair.")] for seed in (1, 2)]
    without_sources = [
        [{"role": "user", "content": [{"type": "point_cloud"}, {"type": "text", "text": "What?"}]}, chat[1]]
        for chat in chats
    ]
    inputs = tiny_processor.encode_training(chats)
    assert inputs["point_clouds"].shape == (2, 128, 6) and inputs["point_clouds"].dtype == torch.float32
    same = tiny_processor.encode_training(without_sources, [cloud(1), cloud(2)])
    assert all(torch.equal(inputs[name], same[name]) for name in inputs)
    torch.testing.assert_close(inputs["point_clouds"][..., :3].norm(dim=-1).max(1).values, torch.ones(2))


def test_training_pads_to_the_longest_row_and_no_further(tiny_processor):
    """One long question and one long answer: no row is as long as their sum."""
    chats = [[user("what " * 20, cloud()), assistant("A.")], [user("Hm?", cloud()), assistant("a chair " * 10)]]
    mask = tiny_processor.encode_training(chats)["attention_mask"]
    assert mask.shape[1] == mask.sum(1).max()


def test_training_needs_an_answer(tiny_processor):
    with pytest.raises(ValueError, match="Conversation 1 has no answer"):
        tiny_processor.encode_training([[user("What?"), assistant("A chair.")], [user("What?")]])


def test_training_never_truncates_a_cloud(tiny_processor):
    chat = [user("What?", cloud()), assistant("A chair."), user("And this?", cloud()), assistant("A lamp.")]
    with pytest.raises(ValueError, match="Conversation 0: max_text_length=15.*point cloud"):
        tiny_processor.encode_training([chat], max_text_length=15)
    assert tiny_processor.encode_training([chat], max_text_length=200)["point_clouds"].shape[0] == 2


# Batches


def test_batches_are_padded_on_the_left(tiny_processor):
    chats = [[user("What is this object?", cloud(1))], [user("Hm?", cloud(2))]]
    batch = tiny_processor.apply_chat_template(chats, **TENSORS)
    assert batch["point_clouds"].shape == (2, 128, 6)
    for row, (chat, mask) in enumerate(zip(chats, batch["attention_mask"], strict=True)):
        alone = tiny_processor.apply_chat_template(chat, **TENSORS)
        assert torch.equal(batch["input_ids"][row][mask.bool()], alone["input_ids"][0])
        assert torch.equal(batch["point_clouds"][row], alone["point_clouds"][0])
        assert (mask.diff() >= 0).all()
        assert (alone["input_ids"] == tiny_processor.point_token_id).sum() == 6
    assert (batch["attention_mask"][1] == 0).any()


def test_prompts_are_tokenized_as_in_training(tiny_processor):
    chat = [user("What?", cloud()), assistant("A chair."), user("Is it new?"), assistant("(No)")]
    training = tiny_processor.encode_training([chat])["input_ids"][0]
    prompt = tiny_processor.apply_chat_template(chat[:3], **TENSORS)["input_ids"][0]
    assert torch.equal(prompt, training[: len(prompt)])


def test_calling_with_text_and_clouds(tiny_processor, tmp_path):
    np.save(tmp_path / "cloud.npy", cloud())
    text = tiny_processor.apply_chat_template([user(DEFAULT_PROMPT, cloud())])
    expected = tiny_processor.apply_chat_template([user(DEFAULT_PROMPT, cloud())], **TENSORS)
    for source in (
        cloud(),
        [cloud()],
        [[torch.from_numpy(cloud())]],
        tmp_path / "cloud.npy",
        str(tmp_path / "cloud.npy"),
        cloud()[None],
    ):
        inputs = tiny_processor(text=text, point_clouds=source, return_tensors="pt")
        assert all(torch.equal(inputs[name], expected[name]) for name in expected)
    assert set(tiny_processor(text="Hello")) == {"input_ids", "attention_mask"}
    assert set(tiny_processor(point_clouds=cloud())) == {"point_clouds"}
    right = tiny_processor(text=["Hello there", "Hm"], padding_side="right", return_tensors="np")
    assert right["attention_mask"][1, -1] == 0
    for padding in (False, "do_not_pad"):
        unpadded = tiny_processor(text=["Hello there", "Hm"], padding=padding)["input_ids"]
        assert len(unpadded[0]) > len(unpadded[1])
    assert tiny_processor(text="Hm", padding="max_length", max_length=9, return_tensors="pt")["input_ids"].shape == (
        1,
        9,
    )


def test_reading_options_of_a_call_override_the_processors(tiny_processor):
    plain = tiny_processor(point_clouds=cloud(), return_tensors="pt")["point_clouds"]
    turned = tiny_processor(point_clouds=cloud(), up_axis="z", return_tensors="pt")["point_clouds"]
    torch.testing.assert_close(turned[..., 1], plain[..., 2])
    chat = tiny_processor.apply_chat_template([user("What?", cloud())], up_axis="z", **TENSORS)
    torch.testing.assert_close(chat["point_clouds"], turned)
    tiny_processor.feature_extractor.up_axis = "z"
    assert torch.equal(tiny_processor(point_clouds=cloud(), up_axis="y", return_tensors="pt")["point_clouds"], plain)
    bare = tiny_processor(point_clouds=cloud()[:, :3], missing_color=(1, 0.5, 0))["point_clouds"]
    assert (bare[..., 3:] == (1, 0.5, 0)).all()


def test_settings_for_scans_do_not_reach_training(tiny_processor):
    chats = [[user("What?", cloud()), assistant("A chair.")]]
    expected = tiny_processor.encode_training(chats)["point_clouds"]
    tiny_processor.feature_extractor.clean = "unknown, so it would be refused"
    tiny_processor.feature_extractor.up_axis = "auto"
    assert torch.equal(tiny_processor.encode_training(chats)["point_clouds"], expected)


def test_decoding_ends_at_the_mark_of_the_last_answer(tiny_processor):
    ids = tiny_processor.tokenizer("[INST] a  [/INST]b###[INST] c  [/INST]d###e###")["input_ids"]
    assert tiny_processor.post_process_image_text_to_text([ids]) == ["[INST] a  [/INST]b###[INST] c  [/INST]d"]


# What transformers' processors take


def test_marks_in_messages_are_text(tiny_processor):
    """They are neither clouds nor ends, in questions and answers, and decode to what was written."""
    quoted = f"<point> [/INST] ### {BOS} [INST]"
    tokenizer, point = tiny_processor.tokenizer, tiny_processor.point_token_id
    chat = [{"role": "system", "content": quoted}]
    chat += [user(f"Is {quoted} it?", cloud()), assistant(f"No {quoted}."), user(quoted)]
    inputs = tiny_processor.apply_chat_template(chat, return_assistant_tokens_mask=True, **TENSORS)
    (ids,) = inputs["input_ids"]
    assert (ids == point).sum() == 6 and (ids == tokenizer.bos_token_id).sum() == 3
    assert tokenizer.decode(ids).count(quoted) == 4
    assert tokenizer.decode(ids[inputs["assistant_masks"][0].bool()]) == f"No {quoted}.###"
    text = tiny_processor.apply_chat_template(chat)
    parts = [{"type": "text", "text": part} for part in ("<po", "int> [/", "IN", "ST] #", "#### ", BOS[:4], BOS[4:])]
    split = tiny_processor.apply_chat_template([{"role": "user", "content": parts}])
    assert [split.count(mark) for mark in ("<point>", "[/INST]", "###", BOS)] == [0, 1, 0, 1]
    assert f"<point> [/INST] ##### {BOS}" in split.replace(QUOTE, "")
    assert torch.equal(tiny_processor(text=text, point_clouds=cloud(), return_tensors="pt")["input_ids"][0], ids)
    end = tokenizer("[/INST]", add_special_tokens=False)["input_ids"]
    quoted_end = tiny_processor.apply_chat_template([user("[/INST]")], **TENSORS)["input_ids"][0].tolist()
    assert sum(quoted_end[i : i + len(end)] == end for i in range(len(quoted_end))) == 1


def test_assistant_masks_are_the_labels(tiny_processor):
    chats = [
        [user("What?", cloud()), assistant("A chair."), user("Is it new?"), assistant("No.")],
        [user("Hm?"), assistant("A lamp.")],
    ]
    inputs = tiny_processor.apply_chat_template(
        chats, return_assistant_tokens_mask=True, padding_side="right", **TENSORS
    )
    labels = tiny_processor.encode_training(chats)["labels"]
    assert torch.equal(inputs["assistant_masks"].bool(), labels != -100)
    with pytest.raises(ValueError, match="continue_final_message"):
        tiny_processor.apply_chat_template(chats, return_assistant_tokens_mask=True, continue_final_message=True)


def test_arguments_of_tokenizers(tiny_processor):
    texts = ["<point> Hello there", "Hm"]
    options = {
        "pad_to_multiple_of": 16,
        "return_offsets_mapping": True,
        "return_special_tokens_mask": True,
        "return_token_type_ids": True,
        "return_mm_token_type_ids": True,
        "return_length": True,
    }
    inputs = tiny_processor(text=texts, point_clouds=[[cloud()], []], return_tensors="pt", **options)
    width = inputs["input_ids"].shape[1]
    assert width % 16 == 0 and inputs["length"].tolist() == [width, width]
    assert inputs["offset_mapping"].shape == (2, width, 2)
    assert torch.equal(inputs["mm_token_type_ids"] == 1, inputs["input_ids"] == tiny_processor.point_token_id)
    assert (inputs["special_tokens_mask"][inputs["attention_mask"] == 0] == 1).all()
    nested = tiny_processor(
        text=texts, point_clouds=[[cloud()], []], text_kwargs=options, common_kwargs={"return_tensors": "pt"}
    )
    assert all(torch.equal(nested[name], inputs[name]) for name in inputs)
    assert "attention_mask" not in tiny_processor(text="Hm", return_attention_mask=False)
    assert tiny_processor(text=["Hm"], padding=False, return_length=True)["length"].tolist() == [
        len(tiny_processor(text="Hm")["input_ids"][0])
    ]
    refused = {
        "text_pair",
        "text_target",
        "text_pair_target",
        "stride",
        "is_split_into_words",
        "return_overflowing_tokens",
    }
    refused |= {"return_text_replacement_offsets", "sanitize_control_tokens"}
    values = {"max_length": 9, "padding_side": "left", "pad_to_multiple_of": 1, "add_special_tokens": False}
    plain = tiny_processor(text="Hm")["input_ids"].tolist()
    for name in TextKwargs.__annotations__.keys() - {"return_tensors"}:
        if name in refused:
            assert tiny_processor(text="Hm", **{name: None})["input_ids"].tolist() == plain
            with pytest.raises(TypeError, match=name):
                tiny_processor(text="Hm", **{name: 1})
        else:
            assert tiny_processor(text="Hm", **{name: values.get(name, True)})["input_ids"].tolist() == plain, name
    assert tiny_processor(text="Hm", images_kwargs={}, verbose=False)["input_ids"].tolist() == plain
    with pytest.raises(TypeError, match="images_kwargs"):
        tiny_processor(text="Hm", images_kwargs={"size": 3})
    with pytest.raises(TypeError, match="max_lenght"):
        tiny_processor(text="Hm", max_lenght=3)
    with pytest.raises(ValueError, match="truncation"):
        tiny_processor(text="Hm", truncation="sometimes")


def test_special_tokens_are_added_if_asked(tmp_path):
    tokenizer = prepare_tokenizer(llama_style())
    processor = MiniGPT3DProcessor(MiniGPT3DPointCloudProcessor(num_points=64), tokenizer, num_query_tokens=4)
    added = tokenizer("Is it?")["input_ids"]
    assert processor(text="Is it?", add_special_tokens=True)["input_ids"][0].tolist() == added
    ids = processor.apply_chat_template([user("Is it?")], add_special_tokens=True, **TENSORS)["input_ids"]
    assert (ids == tokenizer.bos_token_id).sum() == 1  # the template has written it


def test_sources_by_path_and_url(tiny_processor, tmp_path):
    np.save(tmp_path / "cloud.npy", cloud())
    expected = tiny_processor.apply_chat_template([user("What?", cloud())], **TENSORS)
    path = tmp_path / "cloud.npy"
    for source in ({"path": str(path)}, {"url": path.as_uri()}, {"point_cloud": str(path), "path": None}):
        message = {"role": "user", "content": [{"type": "point_cloud"} | source, {"type": "text", "text": "What?"}]}
        inputs = tiny_processor.apply_chat_template([message], **TENSORS)
        assert all(torch.equal(inputs[name], expected[name]) for name in expected)
    message["content"][0] = {"type": "point_cloud", "path": str(path), "url": path.as_uri()}
    with pytest.raises(ValueError, match="path and url"):
        tiny_processor.apply_chat_template([message], **TENSORS)


def test_variables_tools_and_systems_of_other_templates(tiny_processor):
    template = (
        "{%- for message in messages -%}{{- message['role'] + ': ' -}}"
        "{%- if message['content'] is string -%}{{- message['content'] -}}{%- else -%}"
        "{%- for item in message['content'] -%}{{- '<point>' if item['type'] == 'point_cloud' else item['text'] -}}"
        "{%- endfor -%}{%- endif -%}{{- mood | default('') -}}{%- endfor -%}"
    )
    chat = [{"role": "system", "content": "Be brief."}, user("What?", cloud())]
    text = tiny_processor.apply_chat_template(chat, chat_template=template, mood="!", tools=None, documents=None)
    assert text == "system: Be brief.!user: <point>What?!"
    inputs = tiny_processor.apply_chat_template(chat, chat_template=template, mood="!", **TENSORS)
    assert tiny_processor.tokenizer.decode(inputs["input_ids"][0]) == text.replace("<point>", "<point>" * 6)
    with pytest.raises(ValueError, match="tools"):
        tiny_processor.apply_chat_template(chat, chat_template=template, tools=[{"name": "turn"}])
    with pytest.warns(UserWarning, match="enable_thinking"):
        tiny_processor.apply_chat_template(chat[1:], enable_thinking=False)


def test_clouds_beside_messages(tiny_processor):
    message = {"role": "user", "content": [{"type": "point_cloud"}, {"type": "text", "text": "What?"}]}
    expected = tiny_processor.apply_chat_template([user("What?", cloud())], **TENSORS)
    inputs = tiny_processor.apply_chat_template([message], processor_kwargs={"point_clouds": [cloud()]}, **TENSORS)
    assert all(torch.equal(inputs[name], expected[name]) for name in expected)


# Errors


def test_placeholders_and_clouds_must_match(tiny_processor):
    with pytest.raises(ValueError, match="2 <point> placeholders.* 1 point clouds"):
        tiny_processor(text=["<point> a", "<point> b"], point_clouds=cloud())
    with pytest.raises(ValueError, match="0 <point> placeholders.* 1 point clouds"):
        tiny_processor(text="What?", point_clouds=cloud())
    no_source = [{"role": "user", "content": [{"type": "point_cloud"}, {"type": "text", "text": "What?"}]}]
    with pytest.raises(ValueError, match="1 <point> placeholders.* 0 point clouds"):
        tiny_processor.apply_chat_template(no_source, **TENSORS)
    texts = ["<point> a", "<point> <point> b"]
    assert len(tiny_processor(text=texts, point_clouds=[[cloud()], [cloud(), cloud()]])["point_clouds"]) == 3
    assert len(tiny_processor(text=texts, point_clouds=[cloud(), cloud(), cloud()])["point_clouds"]) == 3
    assert len(tiny_processor(text=["a", "<point> b"], point_clouds=[None, cloud()])["point_clouds"]) == 1
    with pytest.raises(ValueError, match="Text 0: 1 <point>.* 2 point clouds"):
        tiny_processor(text=texts, point_clouds=[[cloud(), cloud()], [cloud()]])
    with pytest.raises(ValueError, match="1 lists for 2 texts"):
        tiny_processor(text=texts, point_clouds=[[cloud(), cloud(), cloud()]])
    swapped = [no_source, [user("What?", cloud(), cloud())]]
    with pytest.raises(ValueError, match="Text 0"):
        tiny_processor.apply_chat_template(swapped, **TENSORS)
    with pytest.raises(ValueError, match="1 <point> placeholders.* 2 point clouds"):
        tiny_processor.encode_training([[user("What?", cloud()), assistant("A chair.")]], [cloud(), cloud()])


def test_text_longer_than_the_context(tiny_processor):
    long = user("what " * 3000, cloud())
    with pytest.raises(ValueError, match=" 6 for each cloud.*context has 2048.*truncation=True"):
        tiny_processor.apply_chat_template([long], **TENSORS)
    with pytest.raises(ValueError, match="the context has 2048"):
        tiny_processor.encode_training([[user("What?", cloud()), assistant("a " * 3000)]])
    cut = tiny_processor.apply_chat_template([long], truncation=True, **TENSORS)
    assert cut["input_ids"].shape == (1, 2048)


@pytest.mark.parametrize("max_length", [6, 7, 20, 30])
def test_truncation_never_touches_placeholders(tiny_processor, max_length):
    chat = [user("a", cloud())]
    inputs = tiny_processor.apply_chat_template(chat, truncation=True, max_length=max_length, **TENSORS)
    assert (inputs["input_ids"] == tiny_processor.point_token_id).sum() == 6
    assert inputs["input_ids"].shape[1] <= max_length


def test_no_room_for_the_cloud(tiny_processor):
    with pytest.raises(ValueError, match="max_length=5.* 6 vectors"):
        tiny_processor.apply_chat_template([user("a", cloud())], truncation=True, max_length=5, **TENSORS)


def test_empty_inputs_and_images_are_refused(tiny_processor):
    with pytest.raises(ValueError, match="Nothing to process"):
        tiny_processor()
    with pytest.raises(ValueError, match="got images"):
        tiny_processor(text="a", images=["a.png"])
    with pytest.raises(ValueError, match="empty list"):
        tiny_processor.feature_extractor([])
    with pytest.raises(ValueError, match="text is an empty list"):
        tiny_processor(text=[])
    for options in ({}, TENSORS):
        with pytest.raises(ValueError, match="conversation is an empty list"):
            tiny_processor.apply_chat_template([], **options)
        with pytest.raises(ValueError, match="Conversation 1 is an empty list"):
            tiny_processor.apply_chat_template([[user("a")], []], **options)
    with pytest.raises(ValueError, match="conversations is an empty list"):
        tiny_processor.encode_training([])


@pytest.mark.parametrize("message", [{}, {"content": None}, {"content": []}, {"content": ""}])
def test_a_message_without_text(tiny_processor, message):
    expected = tiny_processor.apply_chat_template([user("")], **TENSORS)
    inputs = tiny_processor.apply_chat_template([{"role": "user"} | message], **TENSORS)
    assert torch.equal(inputs["input_ids"], expected["input_ids"])


def test_unknown_paddings_are_refused(tiny_processor):
    for padding in ("nonsense", None):
        with pytest.raises(ValueError, match=f"padding .*'do_not_pad'.* {padding!r}"):
            tiny_processor(text="a", padding=padding)
    with pytest.raises(ValueError, match="padding_side .*'left', 'right'.*'up'"):
        tiny_processor(text="a", padding_side="up")


# Tokenizers


@pytest.mark.parametrize("make", [qwen_style, llama_style, wordpiece_style])
def test_any_fast_tokenizer(tmp_path, make):
    tokenizer = prepare_tokenizer(make())
    processor = MiniGPT3DProcessor(MiniGPT3DPointCloudProcessor(num_points=64), tokenizer, num_query_tokens=4)
    bos = tokenizer.bos_token or ""
    chat = [user("Is it?", cloud()), assistant("A red chair."), user("new?"), assistant("(Yes)")]
    assert processor.apply_chat_template(chat[:1]) == f"{bos}[INST] <PC><point></PC> Is it?  [/INST]"
    inputs = processor.encode_training([chat])
    (answers,) = answers_of(inputs["labels"], tokenizer)
    assert answers.replace(" ", "") == "Aredchair.###(Yes)###"
    assert (inputs["input_ids"] == processor.point_token_id).sum() == 4
    prompt = processor.apply_chat_template(chat[:3], **TENSORS)["input_ids"][0]
    assert torch.equal(prompt, inputs["input_ids"][0][: len(prompt)])
    if bos:
        assert (inputs["input_ids"] == tokenizer.bos_token_id).sum() == 2

    processor.save_pretrained(tmp_path)
    loaded = MiniGPT3DProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(loaded.tokenizer) is type(tokenizer)
    assert torch.equal(loaded.encode_training([chat])["input_ids"], inputs["input_ids"])


def test_preparing_a_tokenizer_twice_changes_nothing(tiny_tokenizer):
    before, length = tiny_tokenizer.backend_tokenizer.to_str(), len(tiny_tokenizer)
    assert prepare_tokenizer(tiny_tokenizer) is tiny_tokenizer
    assert tiny_tokenizer.backend_tokenizer.to_str() == before and len(tiny_tokenizer) == length
    assert tiny_tokenizer.convert_tokens_to_ids(POINT_TOKEN) == 293
    assert tiny_tokenizer.pad_token == BOS and tiny_tokenizer.padding_side == "left"
    assert tiny_tokenizer.decode([293], skip_special_tokens=True) == ""


def test_no_token_spans_a_mark_and_what_follows(tiny_tokenizer):
    parts = [tiny_tokenizer(text)["input_ids"] for text in ("[INST] a  [/INST]", "] b.###", "# c")]
    assert tiny_tokenizer("[INST] a  [/INST]] b.#### c")["input_ids"] == sum(parts, [])
    assert END_OF_ANSWER == "###"


def test_unsuitable_tokenizers_are_refused():
    backend = train(models.BPE(unk_token="<unk>"), trainers.BpeTrainer(special_tokens=["<unk>"]))
    with pytest.raises(ValueError, match="neither pad nor eos token"):
        prepare_tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))
    with pytest.raises(ValueError, match="needs a fast tokenizer"):
        prepare_tokenizer(type("Slow", (), {"is_fast": False})())


# Saving


def test_threads_render_at_the_same_time(tiny_processor):
    chats = [[user(f"Is it {number}?"), assistant(f"No, {number * 7}.")] for number in range(400)]
    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(tiny_processor.apply_chat_template, chats))
    assert texts == [tiny_processor.apply_chat_template(chat) for chat in chats]


def test_save_and_load(tiny_processor, tmp_path):
    tiny_processor.feature_extractor.missing_color = (0.1, 0.2, 0.3)
    tiny_processor.feature_extractor.up_axis = "z"
    chat = [user("What?", cloud()), assistant("A chair."), user("Is it new?"), assistant("No.")]
    expected = tiny_processor.encode_training([chat])
    tiny_processor.save_pretrained(tmp_path)
    for loaded in (
        MiniGPT3DProcessor.from_pretrained(tmp_path, trust_remote_code=True),
        AutoProcessor.from_pretrained(tmp_path, trust_remote_code=True),
    ):
        assert type(loaded).__name__ == "MiniGPT3DProcessor"
        assert loaded.num_query_tokens == 6 and loaded.chat_template == tiny_processor.chat_template
        again = loaded.encode_training([chat])
        assert all(torch.equal(again[name], expected[name]) for name in expected)
        loaded.save_pretrained(tmp_path / "again")
    extractor = AutoFeatureExtractor.from_pretrained(tmp_path, trust_remote_code=True)
    assert (extractor.num_points, extractor.up_axis, list(extractor.missing_color)) == (128, "z", [0.1, 0.2, 0.3])
    for name in ("processing", "point_cloud", "readers", "meshes"):
        assert (tmp_path / "again" / f"{name}_minigpt3d.py").exists()


def test_the_golden_tokenizer_is_not_changed():
    plain = AutoTokenizer.from_pretrained(GOLDEN_DIR / "tokenizer")
    assert POINT_TOKEN not in plain.get_vocab()
