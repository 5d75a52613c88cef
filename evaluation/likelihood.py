"""Closed-set classification without a judge: the likelihood of each class name as the answer, given cloud and prompt.

The likelihood is that of the complete answer as in training: its text and the `###` after it. Without `###`, "lamp" would get
the likelihood of all answers that begin with it, "lamp post" too, which favors short names.

The likelihood also depends on the form of the answer. A model that was trained on "This is a white chair." gives the answer
"chair" a low likelihood that hardly depends on the cloud. So each class has several forms (see `suites`), whose likelihoods
are added up: forms that the model does not know change the sum little.

Cloud and prompt are computed once per object; all answers share their keys and values.

Shapes: B objects, C classes, P phrases (forms of the answer), A answers of one pass, T tokens, V vocabulary.
"""

import copy
import os
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch

from minigpt3d.modeling_minigpt3d import MiniGPT3DForConditionalGeneration
from minigpt3d.processing_minigpt3d import END_OF_ANSWER, END_OF_PROMPT, POINT_TOKEN, MiniGPT3DProcessor

from .conditions import read_clouds


NAME_MARK = "{}"  # stands for the class name in an answer
ANSWERS_AT_ONCE = 16  # rows of a batch per object


@torch.inference_mode()
def class_log_likelihoods(
    model: MiniGPT3DForConditionalGeneration,
    processor: MiniGPT3DProcessor,
    clouds: Sequence[np.ndarray],
    question: str,
    classes: Sequence[str],
    phrases: Sequence[str] = (NAME_MARK,),
    template: str = "default",
    batch_size: int = 32,
    up_axis: str | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Log-likelihood of each class as the complete answer to a question about each cloud.

    Args:
        model: in evaluation mode.
        processor: of the model.
        clouds: B clouds (N, 6), as `conditions.apply` returns them.
        question: the text of the prompt.
        classes: C different names.
        phrases: P different forms of the answer with "{}" for the class name: ["This is a {}."]. Their likelihoods are added up.
        template: name of one of the processor's chat templates.
        batch_size: objects at a time. Memory grows with it, but not with the number of classes or phrases beyond
            `ANSWERS_AT_ONCE`.
        up_axis: of the clouds; None for the processor's own.

    Returns:
        Log-likelihoods, (B, C) float64 in nats, and the number of tokens of a class's answer with `###`, (C,) float64, the mean
        over the phrases.
    """
    texts = [phrase.replace(NAME_MARK, name) for name in classes for phrase in phrases]
    prompt, ids = encode_answers(processor, question, texts, template)
    scores = [
        _score(model, read_clouds(processor, clouds[first : first + batch_size], up_axis), prompt, ids)
        for first in range(0, len(clouds), batch_size)
    ]
    shape = (len(classes), len(phrases))
    sums = np.logaddexp.reduce(np.concatenate(scores).reshape(-1, *shape), axis=-1)  # (B, C, P) → (B, C)
    return sums, np.array([len(tokens) for tokens in ids]).reshape(shape).mean(1)


def rank_classes(log_likelihoods: np.ndarray, tokens: np.ndarray, class_of_name: Sequence[int]) -> np.ndarray:
    """Sort the classes of each object by likelihood, the most likely first: (B, C) int64. Ties keep their order.

    A class has the log-likelihood per token of its best name; without the division, long names would rank low.

    Args:
        log_likelihoods, tokens: (B, N) and (N,) of N names, as `class_log_likelihoods` returns them.
        class_of_name: (N,) the class of each name; each of the C classes has at least one.
    """
    per_token, class_of_name = np.asarray(log_likelihoods) / tokens, np.asarray(class_of_name)
    best = np.stack(
        [per_token[:, class_of_name == number].max(1) for number in range(class_of_name.max() + 1)], axis=1
    )
    return np.argsort(-best, axis=1, kind="stable")


def encode_answers(
    processor: MiniGPT3DProcessor, question: str, answers: list[str], template: str = "default"
) -> tuple[list[int], list[list[int]]]:
    """Token ids of the prompt, with the placeholders of one cloud, and of each answer with its `###`, as in training.

    Each answer is tokenized together with the prompt, since many tokenizers would give it another first token without.

    Raises:
        ValueError: an answer is too long for the context, or the template changes the prompt.
    """
    content = [{"type": "point_cloud"}, {"type": "text", "text": question}]
    chat = [{"role": "user", "content": content}]
    chats = [[*chat, {"role": "assistant", "content": answer}] for answer in answers]
    texts = [
        processor.apply_chat_template(chat, chat_template=template, add_generation_prompt=True),
        *processor.apply_chat_template(chats, chat_template=template),
    ]
    texts = [text.replace(POINT_TOKEN, POINT_TOKEN * processor.num_query_tokens) for text in texts]
    prompt, *complete = processor.tokenizer(texts, add_special_tokens=False)["input_ids"]
    if any(ids[: len(prompt)] != prompt for ids in complete):
        raise ValueError("The chat template changes the prompt where an answer follows, so answers cannot be ranked.")
    longest, limit = (
        max(range(len(complete)), key=lambda index: len(complete[index])),
        processor.tokenizer.model_max_length,
    )
    if len(complete[longest]) > limit:
        raise ValueError(
            f"The answer {answers[longest]!r:.60} has {len(complete[longest]) - len(prompt)} tokens after {len(prompt)} of the "
            f"prompt, but the context has {limit}. Shorten it."
        )
    return prompt, [ids[len(prompt) :] for ids in complete]


def check_texts(classes: Sequence[str], phrases: Sequence[str]):
    """Check names of classes and forms of the answer.

    Raises:
        ValueError: one is repeated or contains a mark of the prompt, or a form does not contain {} exactly once.
    """
    for name, texts in (("classes", classes), ("`phrase`", phrases)):
        if repeated := [text for text, count in Counter(texts).items() if count > 1]:
            raise ValueError(f"{name}: {', '.join(map(repr, repeated))} given more than once. All must be different.")
        for mark in (END_OF_ANSWER, END_OF_PROMPT, POINT_TOKEN):
            if marked := [text for text in texts if mark in text]:
                raise ValueError(
                    f"{name}: {marked[0]!r} contains {mark}, which has a meaning in prompts. Leave it out."
                )
    for phrase in phrases:
        if phrase.count(NAME_MARK) != 1:
            raise ValueError(f"`phrase` must contain {NAME_MARK} once, for the name of a class; got {phrase!r}.")


def _score(
    model: MiniGPT3DForConditionalGeneration, point_clouds: torch.Tensor, prompt: list[int], answers: list[list[int]]
) -> np.ndarray:
    """Clouds (B, P, 6), ids of the prompt and of each answer → log-likelihood of each answer, (B, answers) float64."""
    device, batch_size = model.device, len(point_clouds)

    def log_probabilities(input_ids: torch.Tensor, **kwargs):
        """Of the tokens after the last T input tokens: (rows, T, V) float32, and the cache."""
        outputs = model(input_ids=input_ids.to(device), use_cache=True, **kwargs)
        return outputs.logits.log_softmax(-1, dtype=torch.float32), outputs.past_key_values

    # The common prefix of the answers, such as "This is a", is computed with the prompt; each answer keeps at least one token.
    num_shared = min(len(os.path.commonprefix(answers)), min(map(len, answers)) - 1)
    shared = answers[0][:num_shared]
    steps, cache = log_probabilities(
        torch.tensor([*prompt, *shared]).expand(batch_size, -1),
        point_clouds=point_clouds.to(device),
        logits_to_keep=num_shared + 1,
    )
    scores = torch.empty(batch_size, len(answers), dtype=torch.float64)
    for index, ids in enumerate(answers):
        first = ids[: num_shared + 1]
        scores[:, index] = steps[:, range(len(first)), first].double().sum(1).cpu()
    # The rest of the answers, grouped by length, so that no padding and no masks are needed.
    by_length: dict[int, list[int]] = {}
    for index, ids in enumerate(answers):
        by_length.setdefault(len(ids) - num_shared, []).append(index)
    for length, indices in by_length.items():
        for start in range(0, len(indices) if length > 1 else 0, ANSWERS_AT_ONCE):
            group = indices[start : start + ANSWERS_AT_ONCE]
            rest = torch.tensor([answers[index][num_shared:] for index in group]).repeat(batch_size, 1)  # (B*A, T)
            # A copy, because a cache grows in place, and cropping it differs between classes and versions of caches.
            group_cache = copy.deepcopy(cache)
            group_cache.batch_repeat_interleave(len(group))
            following, _ = log_probabilities(
                rest[:, :-1], past_key_values=group_cache
            )  # nothing follows the last token
            gained = following.gather(-1, rest[:, 1:, None].to(device)).double().sum((1, 2))  # (B*A,)
            scores[:, group] += gained.view(batch_size, -1).cpu()
    return scores.numpy()
