"""`PointCloudToTextPipeline`: inputs, outputs, and where an answer ends."""

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, TextIteratorStreamer, TextStreamer, pipeline
from transformers.generation.streamers import BaseStreamer
from ways_in import make_cloud, make_processor, make_seeing_model

from minigpt3d.hub import save_pretrained
from minigpt3d.modeling_minigpt3d import StreamerWithoutEnd
from minigpt3d.pipeline_minigpt3d import PointCloudToTextPipeline


def make_chat(cloud, *texts: str) -> list[dict]:
    """A chat about one cloud: question, answer, question …"""
    messages = []
    for i, text in enumerate(texts):
        content = [{"type": "text", "text": text}]
        if i == 0:
            content.insert(0, {"type": "point_cloud", "point_cloud": cloud})
        messages.append({"role": ("user", "assistant")[i % 2], "content": content})
    return messages


@pytest.fixture
def clouds() -> list[np.ndarray]:
    return [make_cloud(seed) for seed in range(3)]


def make_pipeline(model, **arguments) -> PointCloudToTextPipeline:
    return PointCloudToTextPipeline(model=model, processor=make_processor(), device="cpu", **arguments)


@pytest.fixture(scope="module")
def model():
    return make_seeing_model()


@pytest.fixture
def describe(model) -> PointCloudToTextPipeline:
    return make_pipeline(model, max_new_tokens=8)


@pytest.fixture
def ending() -> PointCloudToTextPipeline:
    """Writes `#` until it is stopped."""
    ending = make_pipeline(make_seeing_model(), max_new_tokens=20)
    (token, *_) = ending.processor.tokenizer("#", add_special_tokens=False)["input_ids"]
    head = ending.model.get_output_embeddings()
    head.weight.data.zero_()
    head.bias.data.zero_()
    head.bias.data[token] = 1.0
    return ending


def text_of(output: list[dict[str, str]]) -> str:
    assert [set(answer) for answer in output] == [{"generated_text"}]
    return output[0]["generated_text"]


def test_one_input_of_each_type_gives_one_answer(describe, clouds, tmp_path):
    np.save(tmp_path / "cloud.npy", clouds[0])
    answer = text_of(describe(clouds[0]))
    assert answer
    for same in (tmp_path / "cloud.npy", str(tmp_path / "cloud.npy"), torch.from_numpy(clouds[0])):
        assert text_of(describe(same)) == answer


def test_a_list_gives_a_list_for_any_batch_size(describe, clouds):
    alone = [describe(cloud) for cloud in clouds]
    assert describe(clouds) == alone
    assert describe(clouds, batch_size=2) == alone
    assert list(describe(cloud for cloud in clouds)) == alone
    assert describe([]) == []
    assert len({text_of(answer) for answer in alone}) > 1  # answers depend on the clouds


def test_questions_of_unequal_length_in_one_batch(describe, clouds):
    chats = [make_chat(clouds[0], "What?"), make_chat(clouds[1], "Which color does this 3D object have?")]
    assert describe(chats, batch_size=2) == [describe(chat) for chat in chats]


def test_a_prompt_is_a_chat_of_one_turn(describe, clouds):
    question = "What color is it?"
    assert describe(clouds[0], prompt=question) == describe(make_chat(clouds[0], question))
    assert describe(clouds[0]) == describe(make_chat(clouds[0], "What is this?"))


def test_a_prompt_for_each_input(describe, clouds):
    prompts = ["What color is it?", "What is this?", None]
    chat = make_chat(clouds[2], "Is it new?")
    answers = describe([*clouds[:2], chat], prompt=prompts, batch_size=2)
    assert answers == [describe(clouds[0], prompt=prompts[0]), describe(clouds[1]), describe(chat)]
    for refused in (["What?"], ["What?", " "], ["What?", "Why?", "How?"]):
        with pytest.raises(ValueError, match="prompt"):
            describe(clouds[:2], prompt=refused)


def test_reading_options_of_a_call(describe, clouds, monkeypatch):
    seen = []
    monkeypatch.setattr(
        describe.model, "generate", lambda **inputs: seen.append(inputs["point_clouds"]) or inputs["input_ids"]
    )
    bare = clouds[0][:, :3]
    describe(bare)
    describe(bare, up_axis="z", missing_color="white")
    describe(make_chat(bare, "What?"), up_axis="z", missing_color=(1.0, 1.0, 1.0))
    describe.processor.feature_extractor.up_axis = "z"
    describe(bare, up_axis="y")
    plain, turned, chat, kept = seen
    assert torch.equal(turned[..., 1], plain[..., 2]) and (turned[..., 3:] == 1).all()
    assert torch.equal(chat, turned) and torch.equal(kept, plain)


def test_a_chat_of_several_turns(describe, clouds):
    chat = make_chat(clouds[0], "What is this?", "A chair.", "What color is it?")
    before = repr(chat)
    assert text_of(describe(chat)) != text_of(describe(make_chat(clouds[0], "What color is it?")))
    assert repr(chat) == before  # the caller's messages are not changed


def test_chats_and_files_mixed(describe, clouds):
    chat = make_chat(clouds[1], "What color is it?")
    assert describe([clouds[0], chat], batch_size=2) == [describe(clouds[0]), describe(chat)]


def test_chats_with_none_one_and_two_clouds_in_one_batch(describe, clouds):
    none = [{"role": "user", "content": [{"type": "text", "text": "Hello?"}]}]
    two = make_chat(clouds[0], "What is this?", "A chair.", "And this?")
    two[2]["content"].insert(0, {"type": "point_cloud", "point_cloud": clouds[1]})
    chats = [none, make_chat(clouds[2], "What is this?"), two]
    assert describe(chats, batch_size=3) == [describe(chat) for chat in chats]


def test_arguments_of_generate(describe, clouds):
    assert len(describe(clouds[0], num_beams=3, num_return_sequences=2)) == 2
    batched = describe(clouds, num_beams=3, num_return_sequences=2, batch_size=3)
    assert batched == [describe(cloud, num_beams=3, num_return_sequences=2) for cloud in clouds]
    torch.manual_seed(0)
    sampled = describe(clouds[0], do_sample=True, temperature=5.0)
    assert sampled != describe(clouds[0])
    assert len(text_of(describe(clouds[0], max_new_tokens=2))) < len(text_of(describe(clouds[0])))
    config = GenerationConfig(max_new_tokens=2, pad_token_id=describe.processor.tokenizer.pad_token_id)
    assert make_pipeline(describe.model)(clouds[0], generation_config=config) == describe(clouds[0], max_new_tokens=2)
    assert describe(clouds[0], generate_kwargs={"max_new_tokens": 2}) == describe(clouds[0], max_new_tokens=2)
    assert config.stop_strings is None  # the caller's configuration is not changed


def test_an_answer_ends_at_its_mark(ending, clouds):
    """Three `#` and no fourth: the mark stops the generation and is removed."""
    steps = []
    ending.model.register_forward_hook(lambda *_: steps.append(1))
    assert ending(clouds[0]) == [{"generated_text": ""}]
    assert len(steps) == 3
    config = GenerationConfig(max_new_tokens=20)
    assert ending(clouds[:2], generation_config=config, batch_size=2) == [[{"generated_text": ""}]] * 2


def test_the_caller_can_stop_earlier(ending, clouds):
    assert ending(clouds[0], stop_strings="##") == [{"generated_text": "##"}]


def test_streaming(describe, ending, clouds, capsys):
    tokenizer = describe.processor.tokenizer
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    answer = text_of(describe(clouds[0], streamer=streamer))
    assert "".join(streamer).strip() == answer
    describe(clouds[0], streamer=TextStreamer(tokenizer, skip_prompt=True))
    assert capsys.readouterr().out.strip() == answer
    ending(clouds[0], streamer=TextStreamer(tokenizer, skip_prompt=True))
    assert capsys.readouterr().out == "\n"
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    ending(clouds[0], streamer=streamer)
    assert "".join(streamer) == ""


class Recorder(BaseStreamer):
    def __init__(self):
        self.ids, self.is_ended = [], False

    def put(self, value):
        self.ids += value.flatten().tolist()

    def end(self):
        self.is_ended = True


@pytest.mark.parametrize("is_processor", [True, False])
def test_streamers_get_all_but_the_end(is_processor):
    processor = make_processor()
    tokenizer = processor.tokenizer
    for text, expected in (
        ("a chair.###", "a chair."),
        ("#1 of ##", "#1 of ##"),
        ("a ## b###", "a ## b"),
        ("###", ""),
    ):
        recorder = Recorder()
        streamer = StreamerWithoutEnd(recorder, processor if is_processor else tokenizer, ["###", ".###"])
        streamer.put(torch.tensor([[7]]))  # the prompt
        for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
            streamer.put(torch.tensor([token]))
        streamer.end()
        assert recorder.ids[0] == 7 and recorder.is_ended
        assert tokenizer.decode(recorder.ids[1:]) == expected


@pytest.mark.parametrize("inputs", [[], ()])
def test_no_inputs_give_no_answers(describe, inputs):
    assert describe(inputs) == describe(inputs, prompt="Why?", batch_size=2) == []
    assert list(describe(item for item in inputs)) == []


@pytest.mark.parametrize(
    ("inputs", "arguments", "message"),
    [
        ({"path": "chair.ply"}, {}, "keys ['path']"),
        (make_chat(make_cloud(0), "What is this?"), {"prompt": "Why?"}, "prompt, got 'Why?'"),
        (np.zeros((0, 6), np.float32), {}, "point"),
        (make_cloud(0), {"prompt": ["What?", "Why?"]}, "['What?', 'Why?']"),
        (make_cloud(0), {"prompt": " "}, "got ' '"),
        (None, {}, "None cannot be read"),
        ([make_cloud(0), None], {}, "None cannot be read"),
    ],
    ids=["dict", "prompt beside a chat", "empty cloud", "several prompts", "empty prompt", "None", "None in a list"],
)
def test_inputs_that_are_refused(describe, inputs, arguments, message):
    with pytest.raises(ValueError) as error:
        describe(inputs, **arguments)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("auto", torch.float32),  # what transformers.pipeline passes if nothing is given
        (None, torch.float16),
        (torch.float16, torch.float16),
        (torch.float64, torch.float16),  # the caller has loaded the model in it
    ],
)
def test_half_precision_is_computed_in_float32_on_a_cpu(dtype, expected):
    half = make_seeing_model().half()
    assert make_pipeline(half, dtype=dtype).model.dtype == expected


def test_dtype_of_a_loaded_folder(tmp_path):
    save_pretrained(make_seeing_model().half(), make_processor(), tmp_path / "half")
    assert pipeline("point-cloud-to-text", model=str(tmp_path / "half"), device="cpu").dtype == torch.float32
    half = pipeline("point-cloud-to-text", model=str(tmp_path / "half"), device="cpu", dtype="float16")
    assert half.dtype == torch.float16


@pytest.mark.parametrize("task", ["image-text-to-text", "any-to-any"])
def test_pipelines_of_transformers_take_the_same_chat(describe, clouds, task):
    general = pipeline(task, model=describe.model, processor=describe.processor, device="cpu")
    chat = make_chat(clouds[0], "What is this?", "A chair.", "What color is it?")
    (output,) = general(text=chat, max_new_tokens=8, return_full_text=False)
    assert output["generated_text"].strip() == text_of(describe(chat))
    (output,) = general(text=chat, max_new_tokens=8)
    assert output["generated_text"][-1]["role"] == "assistant"


def test_image_text_to_text_ends_at_the_mark(ending, clouds):
    general = pipeline("image-text-to-text", model=ending.model, processor=ending.processor, device="cpu")
    chat = make_chat(clouds[0], "What is this?", "A chair.", "What color is it?")
    (output,) = general(text=chat, max_new_tokens=20, return_full_text=False)
    assert output["generated_text"] == ""
