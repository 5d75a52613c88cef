"""Closed-set classification without a judge: how likely is each class name as the answer, given cloud and prompt?

Scored is the answer as training has it: the text right behind the prompt, then `###`. With `###`, because "lamp" alone
is the likelihood of every answer that begins so, "lamp post" among them, so that short names would gain from long ones;
and because this is the answer that the training loss is about.

An answer is likely for its form, too, and a form that training never showed drowns what the model saw. Taught to say
"This is a white chair.", a small model finds "chair" alone so odd that it hardly tells kinds apart, and "This is a chair."
not much better. So a class may be named in several ways (`suites` has them) and counts with all of them together: the ways
that a model does not know cost the ones that it knows nothing.

Cloud and prompt are computed once for each object, and their keys and values are shared by all answers.

Shapes: B objects, C classes, A answers (ways to name a class), T tokens, V vocabulary.
"""

import copy
import os
from collections.abc import Sequence

import numpy as np
import torch

from minigpt3d.modeling_minigpt3d import MiniGPT3DForConditionalGeneration
from minigpt3d.processing_minigpt3d import END_OF_ANSWER, END_OF_PROMPT, POINT_TOKEN, MiniGPT3DProcessor

from .conditions import read_clouds


NAME_MARK = "{}"  # stands for the name in an answer
ANSWERS_AT_ONCE = 16  # a batch has so many rows for each object


@torch.inference_mode()
def class_log_likelihoods(
    model: MiniGPT3DForConditionalGeneration,
    processor: MiniGPT3DProcessor,
    clouds: Sequence[np.ndarray],
    question: str,
    classes: Sequence[str],
    answers: Sequence[str] = (NAME_MARK,),
    template: str = "default",
    batch_size: int = 32,
    up_axis: str | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Log-likelihood of each class as the whole answer to a question about each cloud.

    Args:
        model: in evaluation mode.
        processor: of the model.
        clouds: B clouds (N, 6), as `conditions.apply` returns them.
        question: as it stands in the prompt.
        classes: C names, all different.
        answers: A ways to name a class, "{}" for its name, all different: ["This is a {}."]. A class is as likely as all of
            them together.
        template: name of one of the processor's chat templates.
        batch_size: objects at once. Memory grows with it, and not with the number of classes or answers beyond
            `ANSWERS_AT_ONCE`.
        up_axis: of the clouds; None for the processor's own.

    Returns:
        Log-likelihoods, (B, C) float64 in nats, and the tokens of a class's answer, (C,) float64, the mean over its A
        answers. The `###` counts.

    Raises:
        ValueError: nothing to score; names or answers that are blank, doubled or hold marks of the prompt; or a model in
            training mode.
    """
    if not len(clouds):
        raise ValueError("clouds is empty. Pass at least one cloud.")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    if model.training:
        raise ValueError("the model is in training mode, where dropout makes every score another. Call model.eval().")
    check_answers(classes, answers)
    texts = [answer.replace(NAME_MARK, name) for name in classes for answer in answers]
    prompt, ids = encode_answers(processor, question, texts, template)
    scores = [
        _score(model, read_clouds(processor, clouds[first : first + batch_size], up_axis), prompt, ids)
        for first in range(0, len(clouds), batch_size)
    ]
    shape = (len(classes), len(answers))
    together = np.logaddexp.reduce(np.concatenate(scores).reshape(-1, *shape), axis=-1)  # (B, C, A) → (B, C)
    return together, np.array([len(tokens) for tokens in ids]).reshape(shape).mean(1)


def rank_classes(log_likelihoods: np.ndarray, tokens: np.ndarray, class_of_name: Sequence[int]) -> np.ndarray:
    """The classes of each object, the most likely first: (B, C) int64, by log-likelihood per token of its best name.

    Per token, because each further one costs, and a long name would lose for its length. Equal ones keep their order.

    Args:
        log_likelihoods, tokens: (B, N) and (N,) of N names, as `class_log_likelihoods` returns them.
        class_of_name: (N,) the class that each name stands for; each of the C classes has one at least.
    """
    each, class_of_name = np.asarray(log_likelihoods) / tokens, np.asarray(class_of_name)
    best = np.stack([each[:, class_of_name == number].max(1) for number in range(class_of_name.max() + 1)], axis=1)
    return np.argsort(-best, axis=1, kind="stable")


def encode_answers(
    processor: MiniGPT3DProcessor, question: str, answers: list[str], template: str = "default"
) -> tuple[list[int], list[list[int]]]:
    """Ids of the prompt, placeholders of one cloud among them, and of each answer with its `###`: as training has both.

    Each answer is tokenized where it stands, behind the prompt: alone, many tokenizers would give it another first token.
    """
    content = [{"type": "point_cloud"}, {"type": "text", "text": question}]
    chat = [{"role": "user", "content": content}]
    chats = [chat, *([*chat, {"role": "assistant", "content": answer}] for answer in answers)]
    texts = processor.apply_chat_template(chats, chat_template=template)
    texts = [text.replace(POINT_TOKEN, POINT_TOKEN * processor.num_query_tokens) for text in texts]
    prompt, *whole = processor.tokenizer(texts, add_special_tokens=False)["input_ids"]
    assert all(ids[: len(prompt)] == prompt for ids in whole), "the processor cuts text behind the prompt"
    return prompt, [ids[len(prompt) :] for ids in whole]


def check_answers(classes: Sequence[str], answers: Sequence[str]):
    """
    Raises:
        ValueError: names of classes, or ways to name one, that are blank, doubled or hold marks of the prompt.
    """
    for what, texts in (("classes", classes), ("answers", answers)):
        if isinstance(texts, str) or not texts or not all(isinstance(x, str) and x.strip() for x in texts):
            raise ValueError(f"{what} must be a list of texts, none of them blank; got {texts!r:.120}.")
        doubled = sorted({text for text in texts if list(texts).count(text) > 1})
        if doubled:
            raise ValueError(f"{what} must all differ, but {', '.join(map(repr, doubled))} comes more than once.")
        for mark in (END_OF_ANSWER, END_OF_PROMPT, POINT_TOKEN):
            marked = next((text for text in texts if mark in text), None)
            if marked is not None:
                raise ValueError(f"{what}: {marked!r} holds {mark}, which is no part of an answer. Leave it out.")
    for answer in answers:
        if answer.count(NAME_MARK) != 1:
            raise ValueError(f"answers must hold {NAME_MARK} once, where the name of a class goes; got {answer!r}.")


def _score(
    model: MiniGPT3DForConditionalGeneration, point_clouds: torch.Tensor, prompt: list[int], answers: list[list[int]]
) -> np.ndarray:
    """Clouds (B, P, 6), ids of the prompt and of each answer → log-likelihood of each answer, (B, answers) float64."""
    device, batch_size = model.device, len(point_clouds)

    def log_probabilities(input_ids: torch.Tensor, **kwargs):
        """Of what follows the last tokens: (rows, T, V) float32, and the cache."""
        outputs = model(input_ids=input_ids.to(device), use_cache=True, **kwargs)
        return outputs.logits.log_softmax(-1, dtype=torch.float32), outputs.past_key_values

    # What all answers begin with, "This is a" perhaps, goes along with the prompt; each keeps one token at least.
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
    # The rest of the answers, those of one length together: no padding, so no masks.
    by_length: dict[int, list[int]] = {}
    for index, ids in enumerate(answers):
        by_length.setdefault(len(ids) - num_shared, []).append(index)
    for length, indices in by_length.items():
        for start in range(0, len(indices) if length > 1 else 0, ANSWERS_AT_ONCE):
            some = indices[start : start + ANSWERS_AT_ONCE]
            rest = torch.tensor([answers[index][num_shared:] for index in some]).repeat(batch_size, 1)  # (B*A, T)
            # A copy, because a cache grows in place, and how it is cut back differs between kinds and versions.
            own = copy.deepcopy(cache)
            own.batch_repeat_interleave(len(some))
            following, _ = log_probabilities(rest[:, :-1], past_key_values=own)  # the last is predicted, and no more
            gained = following.gather(-1, rest[:, 1:, None].to(device)).double().sum((1, 2))  # (B*A,)
            scores[:, some] += gained.view(batch_size, -1).cpu()
    return scores.numpy()
