"""Train the tokenizer and the language model on the texts alone.

    python -m minigpt3d.recipes.open_objects.language --data DATA --output_dir RUN

Conversations about the training objects: keywords (noun, kind, colors, shape, words of the captions) stand between `<PC>`
and `</PC>`, where stages I and II put vectors, so that the model learns to answer from what is there. One in eight asks
about a noun in general (WordNet). The loss counts the answers. A stopped run continues from RUN/checkpoint.pt;
RUN/scores.jsonl has the loss on texts of the validation objects, with their keywords and with those of another object.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import ByteLevelBPETokenizer
from torch import nn
from transformers import PreTrainedTokenizerFast

from minigpt3d.arguments import option, run_script
from minigpt3d.evaluation.vocabulary.articles import with_article
from minigpt3d.files import write_json, written_file
from minigpt3d.modeling_minigpt3d import MiniGPT3DForConditionalGeneration
from minigpt3d.processing_minigpt3d import MiniGPT3DProcessor, clean_question, prepare_tokenizer
from minigpt3d.recipes.household.pretrain import adamw, cosine
from minigpt3d.training.stream import pack_batch

from .build import read_lines, to_described
from .network import CONTEXT, make_config, make_processor
from .text import Described, annotate, keywords


VOCABULARY = 3000
PEAK_LR = 3e-3
GENERAL_SHARE = 1 / 8
SHORT_SHARE = 1 / 2  # of the conversations have short answers alone: of these the keywords decide the most words
SHORT_ANSWER = 9  # words at most
ROUNDS = (2, 8)  # fewest and most of a conversation: many answers share one list of keywords


@dataclass(frozen=True)
class LanguageOptions:
    """Options of the command."""

    data: Path = option("folder that `build` wrote", metavar="DIR")
    output_dir: Path = option("folder of the run", metavar="DIR")
    steps: int = option("steps", default=6000)
    batch_size: int = option("conversations of a step", default=10)
    score_every: int = option("steps between scores", default=100)
    seed: int = option("seed", default=0)
    threads: int = option("threads of torch; 1 where other programs use the cores", default=1)


class Texts:
    """Conversations about the objects of a split.

    Args:
        data: folder that `build` wrote.
        split: of the objects.
    """

    def __init__(self, data: Path, split: str):
        self.items = [to_described(line) for line in read_lines(data) if line["split"] == split]
        path = data / "meanings.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self.meanings = [json.loads(line) for line in lines]

    def conversation(self, rng: np.random.Generator, hint: Described | None = None) -> list[dict]:
        """Chat messages of two to eight rounds; `hint` is another object whose keywords stand there."""
        if self.meanings and hint is None and rng.random() < GENERAL_SHARE:
            return self.general(rng)
        item = self.items[rng.integers(len(self.items))]
        turns = []
        for record in annotate(item, self.items, rng):
            values = [turn["value"].removeprefix("<point>\n") for turn in record["conversations"]]
            turns += list(zip(values[::2], values[1::2], strict=True))
        if rng.random() < SHORT_SHARE:
            turns = [turn for turn in turns if len(turn[1].split()) <= SHORT_ANSWER]
        chosen = rng.permutation(len(turns))[: rng.integers(ROUNDS[0], ROUNDS[1] + 1)]
        return to_chat([turns[i] for i in chosen], f"<PC>{keywords(hint or item, rng)}</PC> ", rng)

    def general(self, rng: np.random.Generator) -> list[dict]:
        """Chat messages about nouns in general, without an object."""
        turns = []
        for index in rng.integers(len(self.meanings), size=2):
            noun, definition, kind_of = (self.meanings[index][name] for name in ("noun", "definition", "kind_of"))
            thing = with_article(noun)
            turns.append((f"What is {thing}?", f"{thing[0].upper()}{thing[1:]} is {definition}."))
            if kind_of and rng.random() < 0.3:
                turns.append((f"What is {thing} a kind of?", f"It is a kind of {kind_of}."))
        return to_chat(turns, "", rng)


def to_chat(turns: list[tuple[str, str]], hint: str, rng: np.random.Generator) -> list[dict]:
    """Messages; a quarter of the conversations have cleaned questions, as single rounds have in training."""
    clean = rng.random() < 0.25
    messages = []
    for question, answer in turns:
        text = clean_question(question) if clean else question
        messages.append({"role": "user", "content": ("" if messages else hint) + text})
        messages.append({"role": "assistant", "content": answer})
    return messages


def train_tokenizer(texts: Texts, seed: int, num_texts: int = 8000) -> PreTrainedTokenizerFast:
    """Byte-level BPE over conversations; `<|endoftext|>` is bos, eos and padding, as in Phi-2."""
    end, rng = "<|endoftext|>", np.random.default_rng(seed)
    frames = {"user": "[INST] {}  [/INST]", "assistant": "{}###"}
    messages = [message for _ in range(num_texts) for message in texts.conversation(rng)]
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(
        [frames[message["role"]].format(message["content"]) for message in messages],
        vocab_size=VOCABULARY,
        special_tokens=[end],
        show_progress=False,
    )
    return prepare_tokenizer(
        PreTrainedTokenizerFast(
            tokenizer_object=trained._tokenizer,
            bos_token=end,
            eos_token=end,
            unk_token=end,
            pad_token=end,
            model_max_length=CONTEXT,
        )
    )


def make_batch(processor: MiniGPT3DProcessor, conversations: list[list[dict]]) -> dict[str, torch.Tensor]:
    """Conversations without clouds, packed without padding."""
    samples = []
    for conversation in conversations:
        encoded = processor.encode_training([conversation], [], max_text_length=CONTEXT - 128)
        sample = {name: encoded[name][0][:CONTEXT] for name in ("input_ids", "labels")}
        samples.append(sample | {"point_clouds": torch.empty(0)})
    batch = pack_batch(samples)
    del batch["point_clouds"]
    return batch


@torch.no_grad()
def score(model, processor: MiniGPT3DProcessor, texts: Texts, count: int = 48) -> dict[str, float]:
    """Loss on the answers about validation objects, given their own keywords or those of another object."""
    model.eval()
    losses = {}
    for name in ("loss", "loss_shuffled"):
        rng, total = np.random.default_rng(7), 0.0
        for _ in range(count // 12):
            others = texts.items
            conversations = [
                texts.conversation(rng, None if name == "loss" else others[rng.integers(len(others))])
                for _ in range(12)
            ]
            total += model(**make_batch(processor, conversations), use_cache=False).loss.item()
        losses[f"validation_{name}"] = round(total / (count // 12), 3)
    model.train()
    return losses


def train(options: LanguageOptions) -> dict:
    """Train, or continue; returns the last scores. RUN/tokenizer and RUN/checkpoint.pt are the result."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    texts, held_out = Texts(options.data, "train"), Texts(options.data, "validation")
    held_out.meanings = []
    tokenizer_dir = options.output_dir / "tokenizer"
    if not tokenizer_dir.exists():
        train_tokenizer(texts, options.seed).save_pretrained(tokenizer_dir)
    tokenizer = prepare_tokenizer(PreTrainedTokenizerFast.from_pretrained(tokenizer_dir))
    processor = make_processor(tokenizer)
    config = make_config(len(tokenizer), processor.point_token_id, tokenizer.eos_token_id)
    model = MiniGPT3DForConditionalGeneration(config).train()
    # The padding token is bos too. transformers' zeros in its row pass every norm with gradients beyond float32.
    nn.init.normal_(model.model.language_model.embed_tokens.weight, std=config.text_config.initializer_range)
    language = nn.ModuleList([model.model.language_model, model.lm_head])
    optimizer = adamw(language)
    checkpoint, first, seconds = options.output_dir / "checkpoint.pt", 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        language.load_state_dict(state["language"])
        optimizer.load_state_dict(state["optimizer"])
        first, seconds = state["step"], state["seconds"]
    print(f"{sum(p.numel() for p in language.parameters())} parameters, {len(tokenizer)} tokens; from step {first}")
    scores, losses, num_tokens, started = {}, [], 0, time.perf_counter()
    for step in range(first, options.steps):
        rng = np.random.default_rng([options.seed, step])
        batch = make_batch(processor, [texts.conversation(rng) for _ in range(options.batch_size)])
        num_tokens += batch["input_ids"].numel()
        loss = model(**batch, use_cache=False).loss
        for parameters in optimizer.param_groups:
            parameters["lr"] = cosine(step, options.steps, PEAK_LR, warmup=50)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(language.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        done = step + 1
        if done % options.score_every == 0 or done == options.steps:
            total = seconds + time.perf_counter() - started
            scores = {"step": done, "minutes": round(total / 60, 1), "loss": round(float(np.mean(losses[-50:])), 3)}
            scores |= {"tokens_a_step": round(num_tokens / (done - first))} | score(model, processor, held_out)
            print(json.dumps(scores), flush=True)
            with open(options.output_dir / "scores.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(scores) + "\n")
            state = {"language": language.state_dict(), "optimizer": optimizer.state_dict()}
            with written_file(checkpoint) as partial:
                torch.save(state | {"step": done, "seconds": total}, partial)
    write_json(options.output_dir / "scores.json", scores)
    return scores


def main(argv: list[str] | None = None):
    run_script(train, LanguageOptions, argv, __doc__, "minigpt3d.recipes.open_objects.language")


if __name__ == "__main__":
    main()
