"""Mark a model's answers about held-out objects, by rule, beside a blind control.

    python -m minigpt3d.recipes.open_objects.marks --model MODEL --data DATA --out FILE.json [--split validation]

    kind, noun        the first known noun of the answer to "What is this?" is of the object's kind, or is its noun
    kind_top5         the kind is among the five that the answer to "What kind of thing is it?" most likely begins with
    color             the first color of the answer to "What is its main color?" is the main color of the points
    shape             the proportions that the answer names are those of the points
    yes_no            the answer begins with the right word of yes and no; half are no
    not_sure          "I am not sure what this is." for shapes that are nothing, and for known objects (lower is better)
    sentences, nouns  distinct ones among the answers to "What is this?"
    talk              three questions in one conversation: what it is, whether it is that, and its color; the second answer
                      is yes, and the colors of the first and the third are the same

Packs and furniture (the household suite's objects) are marked apart. The kind is also marked on spoiled clouds: 1 % of
outliers, a floor, z up.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from minigpt3d.arguments import option, run_script
from minigpt3d.evaluation.conditions import read_clouds
from minigpt3d.evaluation.likelihood import answer_log_likelihoods, encode_answers
from minigpt3d.evaluation.statistics import wilson
from minigpt3d.evaluation.vocabulary.articles import with_article
from minigpt3d.evaluation.vocabulary.colors import first_color, names_color
from minigpt3d.files import write_json
from minigpt3d.hub import load_model
from minigpt3d.processing_minigpt3d import END_OF_ANSWER, MiniGPT3DProcessor

from .augment import make_floor, make_outliers
from .build import read_lines, to_described
from .captioned_objects import FURNITURE_SOURCE, to_cloud
from .nothing import NOTHING
from .text import KIND_QUESTIONS, NAMING_KINDS, NOT_SURE, SHAPES, Described, yes_no


BATCH = 25
MAX_NEW_TOKENS = 40
MOST_YES_NO = 300
MOST_TALKS = 100
Z_UP = np.array([[1, 0, 0], [0, 0, -1], [0, 1, 0]], dtype=np.float32)


@dataclass(frozen=True)
class MarksOptions:
    """Options of the command."""

    model: str = option("folder or Hub id of the model", metavar="MODEL")
    data: Path = option("folder that `build` wrote", metavar="DIR")
    out: Path = option("file for marks and answers", metavar="FILE.json")
    split: str = option("objects that are marked", default="validation", choices=("validation", "test"))
    threads: int = option("threads of torch; 1 where other programs use the cores", default=1)


class Nouns:
    """Finds the nouns of captions in answers.

    Args:
        lines: of objects.jsonl.
    """

    def __init__(self, lines: list[dict]):
        self.kind_of: dict[str, set[str]] = {}
        for line in lines:
            self.kind_of.setdefault(line["noun"], set()).add(line["kind"])
        for kind in {line["kind"] for line in lines}:
            for word in NAMING_KINDS & set(kind.split()):
                self.kind_of.setdefault(word, set()).add(kind)
        names = sorted(self.kind_of, key=len, reverse=True)
        self.pattern = re.compile(rf"\b({'|'.join(map(re.escape, names))})s?\b")

    def first(self, answer: str) -> str | None:
        """The first noun; of several that begin there, the longest."""
        found = self.pattern.search(answer.lower())
        return found and found[1]

    def kinds(self, answer: str) -> set[str]:
        """The kinds of the first noun."""
        return self.kind_of.get(self.first(answer) or "", set())


def spoil(cloud: np.ndarray, condition: str, rng: np.random.Generator) -> np.ndarray:
    """A cloud (N, 6) with "outliers", on a "floor", or with "z up"."""
    if condition == "outliers":
        return np.concatenate([cloud, make_outliers(cloud, 0.01, rng)]).astype(np.float32)
    if condition == "floor":
        return np.concatenate([cloud, make_floor(cloud, 0.25, rng)]).astype(np.float32)
    return np.concatenate([cloud[:, :3] @ Z_UP.T, cloud[:, 3:]], axis=1)


class Asker:
    """Asks a model greedily.

    Args:
        model, processor: from `load_model`.
        blind: whether zeros take the place of every cloud.
    """

    def __init__(self, model, processor: MiniGPT3DProcessor, blind: bool = False):
        self.model, self.processor, self.blind = model.eval(), processor, blind

    def ask(self, clouds: list[np.ndarray], questions: list[str]) -> list[str]:
        """Answers to one question about each cloud (N, 6)."""
        return self.go_on(clouds, [[] for _ in clouds], questions)

    @torch.inference_mode()
    def go_on(self, clouds: list[np.ndarray], talks: list[list[dict]], questions: list[str]) -> list[str]:
        """Answers to a question in each talk, to which question and answer are added."""
        answers, tokenizer = [], self.processor.tokenizer
        for cloud, talk, question in zip(clouds, talks, questions, strict=True):
            content = [{"type": "text", "text": question}]
            talk.append({"role": "user", "content": content})
            if len(talk) == 1:
                content.insert(0, {"type": "point_cloud", "point_cloud": cloud})
        for first in range(0, len(clouds), BATCH):
            inputs = self.processor.apply_chat_template(
                talks[first : first + BATCH],
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                add_generation_prompt=True,
                processor_kwargs={"padding": True},
            )
            if self.blind:
                inputs["point_clouds"].zero_()
            output = self.model.generate(
                **inputs,
                max_new_tokens=MAX_NEW_TOKENS,
                do_sample=False,
                num_beams=1,
                stop_strings=[END_OF_ANSWER],
                tokenizer=tokenizer,
            )
            texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            answers += [text.split(END_OF_ANSWER)[0].strip() for text in texts]
        for talk, answer in zip(talks, answers, strict=True):
            talk.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        return answers

    def talk(self, clouds: list[np.ndarray], nouns: "Nouns") -> list[bool]:
        """Whether three answers about each cloud agree."""
        talks: list[list[dict]] = [[] for _ in clouds]
        what = self.go_on(clouds, talks, ["What is this?"] * len(clouds))
        named = [nouns.first(answer) or "thing" for answer in what]
        verdict = self.go_on(clouds, talks, [f"Is this {with_article(noun)}?" for noun in named])
        color = self.go_on(clouds, talks, ["What is its main color?"] * len(clouds))
        return [
            is_yes(second) is True and first_color(first) in (None, first_color(third))
            for first, second, third in zip(what, verdict, color, strict=True)
        ]


def rank_kinds(model, processor: MiniGPT3DProcessor, clouds: list[np.ndarray], kinds: list[str]) -> np.ndarray:
    """Kinds by the likelihood that the answer to a question for the kind begins with them: (B, kinds), the first first."""
    prompt, ids = encode_answers(processor, KIND_QUESTIONS[0], [f"{kind.capitalize()}: this." for kind in kinds])
    decode = processor.tokenizer.decode
    starts = [tokens[: 1 + next(i for i in range(len(tokens)) if ":" in decode(tokens[: i + 1]))] for tokens in ids]
    scores = [
        answer_log_likelihoods(model, read_clouds(processor, clouds[first : first + BATCH], None), prompt, starts)
        for first in range(0, len(clouds), BATCH)
    ]
    return np.argsort(-np.concatenate(scores), axis=1, kind="stable")


def mark_answers(items: list[Described], sources: list[str], answers: dict[str, list[str]], asked: list, nouns: Nouns):
    """Marks by name: share, interval and number of objects.

    Args:
        items: the objects.
        sources: of each.
        answers: by question: "what", "color" and "shape" about all objects, "yes_no" about the objects of `asked`.
        asked: the right answers of the yes/no questions.
        nouns: of all objects.
    """
    packs = [i for i, source in enumerate(sources) if source not in (FURNITURE_SOURCE, NOTHING)]
    furniture = [i for i, source in enumerate(sources) if source == FURNITURE_SOURCE]
    nothing = [i for i, item in enumerate(items) if item.is_nothing]
    known = packs + furniture
    what = answers["what"]
    kind = {i: items[i].kind in nouns.kinds(what[i]) for i in known}
    hits = {
        "kind": [kind[i] for i in packs],
        "furniture_kind": [kind[i] for i in furniture],
        "noun": [nouns.first(what[i]) == items[i].noun for i in packs],
        "color": [names_color(answers["color"][i], items[i].colors[0]) for i in known],
        "shape": [named_shape(answers["shape"][i]) == items[i].shape for i in known],
        "yes_no": [is_yes(text) == is_yes(truth) for text, truth in zip(answers["yes_no"], asked, strict=True)],
        "not_sure_nothing": [NOT_SURE in what[i] for i in nothing],
        "not_sure_known": [NOT_SURE in what[i] for i in known],
    }
    marks = {name: share(values) for name, values in hits.items() if values}
    marks["sentences"] = len({what[i] for i in known})
    marks["nouns"] = len({nouns.first(what[i]) for i in known} - {None})
    return marks


def named_shape(answer: str) -> str | None:
    """The proportions that an answer names."""
    return next((shape for shape in SHAPES if shape in answer), None)


def is_yes(answer: str) -> bool | None:
    """True for yes, False for no, None for neither."""
    word = re.match(r"(yes|no)\b", answer.lower())
    return None if word is None else word[1] == "yes"


def share(values: list) -> list:
    """Share of hits, its interval, and the number of objects."""
    low, high = wilson(sum(values), len(values))
    return [round(float(np.mean(values)), 3), round(low, 3), round(high, 3), len(values)]


def mark(options: MarksOptions) -> dict:
    """Ask and mark; returns the marks as they are, blind, and on spoiled clouds."""
    torch.set_num_threads(options.threads)
    model, processor = load_model(options.model, dtype=torch.float32)
    lines = read_lines(options.data)
    coord, color = (np.load(options.data / f"{name}.npy", mmap_mode="r") for name in ("coord", "color"))
    chosen = [i for i, line in enumerate(lines) if line["split"] == options.split]
    items, sources = [to_described(lines[i]) for i in chosen], [lines[i]["source"] for i in chosen]
    clouds = [to_cloud(coord[i], color[i]) for i in chosen]
    rng = np.random.default_rng(0)
    order = rng.permutation([i for i, item in enumerate(items) if not item.is_nothing])
    about, talked = order[:MOST_YES_NO], order[:MOST_TALKS]
    pairs = [yes_no(items[i], items, rng) for i in about]
    prompts = {"what": "What is this?", "color": "What is its main color?", "shape": "What shape is it?"}
    packs = [i for i, source in enumerate(sources) if source not in (FURNITURE_SOURCE, NOTHING)]
    kinds = sorted({line["kind"] for line in lines} - {NOTHING})
    result, nouns = {"model": Path(options.model).name, "split": options.split}, Nouns(lines)
    for condition in ("seeing", "blind"):
        asker = Asker(model, processor, condition == "blind")
        answers = {name: asker.ask(clouds, [text] * len(clouds)) for name, text in prompts.items()}
        answers["yes_no"] = asker.ask([clouds[i] for i in about], [question for question, _ in pairs])
        result[condition] = mark_answers(items, sources, answers, [truth for _, truth in pairs], nouns)
        result[condition]["talk"] = share(asker.talk([clouds[i] for i in talked], nouns))
        result[f"answers_{condition}"] = {
            item.object_id: text for item, text in zip(items, answers["what"], strict=True)
        }
        print(condition, json.dumps(result[condition]), flush=True)
    with torch.inference_mode():
        ranked = rank_kinds(model, processor, [clouds[i] for i in packs], kinds)
    truth = np.array([kinds.index(items[i].kind) for i in packs])
    result["seeing"]["kind_top5"] = share((ranked[:, :5] == truth[:, None]).any(1).tolist())
    print("kind_top5", json.dumps(result["seeing"]["kind_top5"]), flush=True)
    asker = Asker(model, processor)
    for condition in ("outliers", "floor", "z up"):
        spoiled = [spoil(clouds[i], condition, rng) for i in packs]
        what = asker.ask(spoiled, [prompts["what"]] * len(spoiled))
        hits = [items[i].kind in nouns.kinds(text) for i, text in zip(packs, what, strict=True)]
        result[condition] = {"kind": share(hits)}
        print(condition, json.dumps(result[condition]), flush=True)
    write_json(options.out, result)
    return result


def main(argv: list[str] | None = None):
    run_script(mark, MarksOptions, argv, __doc__, "minigpt3d.recipes.open_objects.marks")


if __name__ == "__main__":
    main()
