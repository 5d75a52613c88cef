"""Every way in which transformers generates, with clouds in the prompt, against plain passes over prompt and answer.

transformers' own tests of generation are not distributed; these check the same for this model. test_modeling.py has prompt
lookup, assistants, and caches of earlier turns.
"""

from importlib.metadata import version

import pytest
import torch
from packaging.version import Version
from tiny_model import POINT_TOKEN_ID
from ways_in import make_seeing_model

from minigpt3d.modeling_minigpt3d import MiniGPT3DForConditionalGeneration


NEW = 6
GREEDY = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 292}
RECORDS = {"return_dict_in_generate": True, "output_logits": True, "output_scores": True}


@pytest.fixture(scope="module")
def model() -> MiniGPT3DForConditionalGeneration:
    """One whose answers vary."""
    model = make_seeing_model()
    model.lm_head.bias.data.zero_()
    model.get_input_embeddings().weight.data.mul_(10)
    model.set_attn_implementation("eager")
    return model


@pytest.fixture
def prompt(point_clouds) -> dict:
    """Two rows with different clouds; the second begins with padding."""
    input_ids = torch.randint(0, 280, (2, 15), generator=torch.Generator().manual_seed(0))
    input_ids[:, 3:9] = POINT_TOKEN_ID
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, :2] = 0
    return {"input_ids": input_ids, "attention_mask": attention_mask, "point_clouds": point_clouds[:2]}


@torch.no_grad()
def compute_logits(model, prompt: dict, answer: torch.Tensor) -> torch.Tensor:
    """The logits (B, K+1, V) before and behind each token of answers (B, K), in one pass without a cache."""
    mask = torch.cat([prompt["attention_mask"], torch.ones_like(answer)], dim=1)
    logits = model(
        input_ids=torch.cat([prompt["input_ids"], answer], dim=1),
        attention_mask=mask,
        position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
        point_clouds=prompt["point_clouds"],
        use_cache=False,
    ).logits
    return logits[:, -answer.shape[1] - 1 :]


@pytest.fixture
def greedy(model, prompt) -> torch.Tensor:
    """(2, NEW): the best token after each pass."""
    answer = torch.empty(2, 0, dtype=torch.long)
    for _ in range(NEW):
        answer = torch.cat([answer, compute_logits(model, prompt, answer)[:, -1:].argmax(-1)], dim=1)
    assert all(len(set(row)) > 2 for row in answer.tolist()) and not torch.equal(answer[0], answer[1])
    return answer


@pytest.mark.parametrize(
    "way",
    [
        {},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"cache_implementation": "hybrid"},
        {"prefill_chunk_size": 4},
        {"prefill_chunk_size": 4, "cache_implementation": "static"},
        {"prefill_chunk_size": 100},
        {"do_sample": True, "top_k": 1},
        {"num_beams": 1, "num_return_sequences": 1},
    ],
    ids=str,
)
def test_the_best_tokens(model, prompt, greedy, way):
    assert torch.equal(model.generate(**prompt, **GREEDY | way)[:, -NEW:], greedy)


def test_embeddings_in_place_of_tokens(model, prompt, greedy):
    tokens, clouds = prompt.pop("input_ids"), prompt.pop("point_clouds")
    embeddings, _ = model.model.embed(tokens, clouds)
    assert torch.equal(model.generate(inputs_embeds=embeddings, **prompt, **GREEDY), greedy)
    both = model.generate(input_ids=tokens, inputs_embeds=embeddings, **prompt, **GREEDY)
    assert torch.equal(both[:, -NEW:], greedy)
    words = model.get_input_embeddings()(tokens)
    assert torch.equal(model.generate(inputs_embeds=words, point_clouds=clouds, **prompt, **GREEDY), greedy)


def test_positions_and_masks_of_the_caller(model, prompt, greedy):
    mask = prompt["attention_mask"]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    assert torch.equal(model.generate(**prompt, position_ids=positions, **GREEDY)[:, -NEW:], greedy)
    seen = mask.bool()[:, None, None] & torch.ones(15, 15, dtype=torch.bool).tril()  # (B, 1, T, T)
    unpadded = {"input_ids": prompt["input_ids"], "point_clouds": prompt["point_clouds"], "position_ids": positions}
    with torch.no_grad():
        logits = model(**unpadded, attention_mask=torch.zeros(seen.shape).masked_fill(~seen, -1e9)).logits
    assert torch.equal(logits[:, -1].argmax(-1), greedy[:, 0])


@pytest.mark.parametrize("way", [{}, {"cache_implementation": "static"}, {"use_cache": False}], ids=str)
def test_records_of_a_generation(model, prompt, greedy, way):
    """Logits, hidden states and attentions of each step."""
    states = {"output_hidden_states": True, "output_attentions": True}
    result = model.generate(**prompt, **GREEDY | RECORDS | states | way)
    assert torch.equal(result.sequences[:, -NEW:], greedy)
    logits = torch.stack(result.logits, dim=1)  # (B, NEW, V)
    torch.testing.assert_close(logits, compute_logits(model, prompt, greedy)[:, :-1], rtol=1e-4, atol=1e-4)
    assert torch.equal(torch.stack(result.scores, dim=1), logits)
    chosen = model.compute_transition_scores(result.sequences, result.scores, normalize_logits=True)
    torch.testing.assert_close(chosen, logits.log_softmax(-1).gather(-1, greedy[..., None])[..., 0])
    assert len(result.hidden_states) == len(result.attentions) == NEW
    for step in range(NEW):
        seen = 15 + step
        width = 1 if step and way != {"use_cache": False} else seen
        assert {tuple(states.shape) for states in result.hidden_states[step]} == {(2, width, 64)}
        keys = 15 + NEW - 1 if "cache_implementation" in way else seen
        assert {tuple(weights.shape[:3]) for weights in result.attentions[step]} == {(2, 4, width)}
        assert {weights.shape[3] for weights in result.attentions[step]} <= {keys, keys + 1}
        assert len(result.hidden_states[step]) == 4 and len(result.attentions[step]) == 3


@pytest.mark.parametrize(
    "way", [{}, {"use_cache": False}, {"cache_implementation": "static"}, {"prefill_chunk_size": 4}], ids=str
)
def test_beams(model, prompt, greedy, way):
    """Three beams a row, the best two returned: their scores are those of plain passes, above the greedy answer's."""
    result = model.generate(**prompt, **GREEDY | RECORDS | {"num_beams": 3, "num_return_sequences": 2} | way)
    answers = result.sequences[:, -NEW:]  # (4, NEW)

    def score(answers: torch.Tensor, rows: list[int]) -> torch.Tensor:
        of_rows = {name: tensor[rows] for name, tensor in prompt.items()}
        logits = compute_logits(model, of_rows, answers)[:, :-1].log_softmax(-1)
        return logits.gather(-1, answers[..., None])[..., 0].mean(-1)

    scores = score(answers, [0, 0, 1, 1])
    torch.testing.assert_close(result.sequences_scores, scores, rtol=1e-4, atol=1e-4)
    assert scores[0] > scores[1] and scores[2] > scores[3]
    assert (scores[[0, 2]] >= score(greedy, [0, 1]) - 1e-4).all()
    steps = model.compute_transition_scores(result.sequences, result.scores, result.beam_indices)
    torch.testing.assert_close(steps.mean(-1), scores, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "decoding", [{}, {"num_beams": 2, "top_p": 0.7, "temperature": 0.2, "min_length": 10}], ids=str
)
def test_samples(model, prompt, decoding):
    """Samples depend on the seed alone, not on the cache; the second decoding is the benchmarks'."""
    answers = []
    for way in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        torch.manual_seed(0)
        options = GREEDY | {"do_sample": True, "num_return_sequences": 2} | decoding | way
        answers.append(model.generate(**prompt, **options)[:, -NEW:])
    assert answers[0].shape == (4, NEW)
    assert torch.equal(answers[0], answers[1]) and torch.equal(answers[0], answers[2])


def test_an_answer_is_continued(model, prompt, greedy):
    """From the cache of its first half."""
    first = model.generate(**prompt, **GREEDY | {"max_new_tokens": NEW // 2, "return_dict_in_generate": True})
    mask = torch.cat([prompt["attention_mask"], torch.ones(2, NEW // 2, dtype=torch.long)], dim=1)
    second = model.generate(
        input_ids=first.sequences,
        attention_mask=mask,
        past_key_values=first.past_key_values,
        **GREEDY | {"max_new_tokens": NEW - NEW // 2},
    )
    assert torch.equal(second[:, -NEW:], greedy)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("size", [None, 4])
def test_a_second_turn(model, prompt, padded, size):
    """With another cloud, behind the cache of the first; chunks split its placeholders."""
    if size and Version(version("transformers")) < Version("5.23"):
        pytest.skip("5.18 reads what is in the cache again")
    first, clouds = prompt["input_ids"], prompt["point_clouds"][[0, 1, 1, 0]]  # two a row
    second = torch.cat([first, first[:, :2]], dim=1)
    both = torch.cat([first, second], dim=1)
    mask = torch.ones_like(both)
    if padded:
        mask[:, :15] = prompt["attention_mask"]
    expected = model.generate(input_ids=both, attention_mask=mask, point_clouds=clouds, **GREEDY)[:, -NEW:]
    positions = (mask[:, :15].cumsum(-1) - 1).clamp(min=0)
    for tokens, given in ((both, clouds), (both, clouds[[1, 3]]), (second, clouds[[1, 3]])):
        cache = model(
            input_ids=first, attention_mask=mask[:, :15], position_ids=positions, point_clouds=clouds[[0, 2]]
        ).past_key_values
        answer = model.generate(
            input_ids=tokens,
            attention_mask=mask,
            point_clouds=given,
            past_key_values=cache,
            prefill_chunk_size=size,
            **GREEDY,
        )
        assert torch.equal(answer[:, -NEW:], expected)


def test_beams_of_a_second_turn(model, prompt):
    """With the cache's rows copied for the beams, as transformers expects."""
    first, clouds = prompt["input_ids"], prompt["point_clouds"][[0, 1, 1, 0]]
    both = torch.cat([first, first], dim=1)
    inputs = {"attention_mask": torch.ones_like(both), **GREEDY, "num_beams": 2}
    expected = model.generate(input_ids=both, point_clouds=clouds, **inputs)[:, -NEW:]
    for tokens, given in ((both, clouds), (first, clouds[[1, 3]])):
        cache = model(input_ids=first, point_clouds=clouds[[0, 2]]).past_key_values
        cache.batch_repeat_interleave(2)
        answer = model.generate(input_ids=tokens, point_clouds=given, past_key_values=cache, **inputs)
        assert torch.equal(answer[:, -NEW:], expected)


def test_arguments_that_exclude_each_other(model, prompt):
    """Before anything is computed: candidates behind a cache of earlier turns, and chunks of embeddings."""
    tokens, clouds = prompt["input_ids"][:1], prompt["point_clouds"]
    both = torch.cat([tokens, tokens], dim=1)
    for candidates in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": model}):
        for ids, given in ((both, clouds), (tokens, clouds[1:])):
            cache = model(input_ids=tokens, point_clouds=clouds[:1]).past_key_values
            with pytest.raises(ValueError, match=r"past_key_values that hold 15 tokens.*without past_key_values"):
                model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(both),
                    point_clouds=given,
                    past_key_values=cache,
                    **candidates,
                    **GREEDY,
                )
    words = model.get_input_embeddings()(tokens)
    for given in ({"point_clouds": clouds[:1]}, {}):
        with pytest.raises(ValueError, match="prefill_chunk_size=4 with inputs_embeds"):
            model.generate(inputs_embeds=words, **given, prefill_chunk_size=4, **GREEDY)


def test_without_a_prompt(model):
    """A beginning-of-sequence token stands in for one."""
    answer = model.generate(**GREEDY | {"bos_token_id": 292})
    with_token = model.generate(input_ids=torch.tensor([[292]]), **GREEDY)
    assert answer.shape == (1, 1 + NEW) and torch.equal(answer, with_token)


@pytest.mark.parametrize(
    "option",
    [
        {"repetition_penalty": 1.5},
        {"no_repeat_ngram_size": 1},
        {"encoder_repetition_penalty": 2.0},
        {"sequence_bias": [[[5], 100.0]]},
        {"bad_words_ids": [[11], [150]]},
        {"guidance_scale": 3.0},
        {"watermarking_config": {"bias": 10.0}},
        {"prefix_allowed_tokens_fn": lambda row, tokens: [7, 8, 9]},
    ],
    ids=lambda option: next(iter(option)),
)
def test_options_that_change_the_scores(model, prompt, greedy, option):
    answers = [model.generate(**prompt, **GREEDY | option | way)[:, -NEW:] for way in ({}, {"use_cache": False})]
    assert torch.equal(*answers) and not torch.equal(answers[0], greedy)
