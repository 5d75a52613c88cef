"""Time generation: stopped at `###`, as here, beside decoding to the limit and cutting afterwards, as the authors' scripts do.

    python benchmarks/generate.py [--model DIR] [--question "What is this?"] [--max-new-tokens 150] [--batches 1 2 4 8 16 32 64]

All ways run in turn in one process, on the same clouds (those of demo/objects, repeated) with the same question, greedily.
One call of `generate` is timed, from clouds and prompts to ids. In fp32 the texts before `###` must be equal, or the run
fails; in bf16 rounding may change some texts, and the table has the share of equal ones. The authors sample with two
beams, which costs the same in every way.

Tokens are those of the answer with its `###`; for the limit, all decoded tokens. So compare all ways by objects/s, and by
tokens/s only those that stop.

Shapes: B objects, T tokens.
"""

import argparse
import copy
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from encode import measure, print_setup

from minigpt3d.arguments import positive_int
from minigpt3d.hub import BUNDLED_MODEL, load_model
from minigpt3d.modeling_minigpt3d import MiniGPT3DForConditionalGeneration
from minigpt3d.pipeline_minigpt3d import DEFAULT_MAX_NEW_TOKENS
from minigpt3d.processing_minigpt3d import DEFAULT_PROMPT, END_OF_ANSWER, MiniGPT3DProcessor


ROOT = Path(__file__).resolve().parent.parent
OBJECTS = ("drawersCabinet.npy", "oakTable.ply", "osakaChair.obj")


@dataclass
class Row:
    """One line of the table, of one way at one batch size; times are medians."""

    batch: int
    way: str
    objects_per_second: float
    tokens_per_second: float
    ratio: float  # of objects/s to decoding to the limit
    same_texts: float  # share of the answers that are those of decoding to the limit


def make_inputs(processor: MiniGPT3DProcessor, batch_size: int, question: str, device: torch.device) -> dict:
    """Prompts and clouds of the demo's objects in turn, as `generate` takes them."""
    clouds = processor.feature_extractor([ROOT / "demo" / "objects" / name for name in OBJECTS])["point_clouds"]
    conversations = [
        [
            {
                "role": "user",
                "content": [
                    {"type": "point_cloud", "point_cloud": clouds[number % len(clouds)]},
                    {"type": "text", "text": question},
                ],
            }
        ]
        for number in range(batch_size)
    ]
    return processor.apply_chat_template(conversations, tokenize=True, return_dict=True, return_tensors="pt").to(
        device
    )


@torch.inference_mode()
def run(
    model: MiniGPT3DForConditionalGeneration,
    processor: MiniGPT3DProcessor,
    inputs: dict,
    max_new_tokens: int,
    repeats: int,
) -> list[Row]:
    """Every way on one batch.

    Args:
        model: in eval mode, fp32.
        processor: of the model.
        inputs: of `generate`, on the model's device.
        max_new_tokens: the limit.
        repeats: timed calls of each way, in turn; the median counts.

    Raises:
        RuntimeError: a way that gives other texts in fp32.
    """
    tokenizer, device = processor.tokenizer, model.device
    batch_size, prompt_length = inputs["input_ids"].shape
    # A generation_config may name the token of `###` as an end, too; the authors' has eos alone.
    limit = {
        "max_new_tokens": max_new_tokens,
        "do_sample": False,
        "num_beams": 1,
        "eos_token_id": tokenizer.eos_token_id,
    }
    stop = limit | {"stop_strings": [END_OF_ANSWER], "tokenizer": tokenizer}
    ways = {
        "limit": (model, limit),
        "stop": (model, stop),
        "stop, static cache": (model, stop | {"cache_implementation": "static"}),
        "stop, bf16": (copy.deepcopy(model).to(torch.bfloat16), stop),
    }
    seconds, texts, num_tokens = {way: [] for way in ways}, {}, {}
    for way, (which, options) in ways.items():  # not timed: memory is fetched, kernels and caches are made
        answers = which.generate(**inputs, **options)[:, prompt_length:]  # (B, T)
        texts[way] = [
            text.split(END_OF_ANSWER)[0] for text in tokenizer.batch_decode(answers, skip_special_tokens=True)
        ]
        num_tokens[way] = int((answers != tokenizer.pad_token_id).sum())
        if which.dtype == model.dtype and texts[way] != texts["limit"]:
            one, other = next(pair for pair in zip(texts["limit"], texts[way], strict=True) if pair[0] != pair[1])
            raise RuntimeError(f"{way}: says {other!r} where decoding to the limit says {one!r}; both are greedy.")
    for _ in range(repeats):
        for way, (which, options) in ways.items():
            seconds[way].append(measure(lambda: which.generate(**inputs, **options), device))  # noqa: B023
    median = {way: statistics.median(times) for way, times in seconds.items()}
    return [
        Row(
            batch=batch_size,
            way=way,
            objects_per_second=batch_size / median[way],
            tokens_per_second=num_tokens[way] / median[way],
            ratio=median["limit"] / median[way],
            same_texts=sum(map(str.__eq__, texts[way], texts["limit"])) / batch_size,
        )
        for way in ways
    ]


def format_table(rows: list[Row]) -> str:
    """A Markdown table."""
    lines = ["| batch | way | objects/s | tokens/s | ratio to limit | same texts |", "|-|-|-|-|-|-|"]
    lines += [
        f"| {row.batch} | {row.way} | {row.objects_per_second:.1f} | {row.tokens_per_second:.0f} | {row.ratio:.2f} | "
        f"{row.same_texts:.0%} |"
        for row in rows
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--model", default=BUNDLED_MODEL, help="folder or Hub id of the model (default: the bundled one)"
    )
    parser.add_argument("--question", default=DEFAULT_PROMPT, help="question about each object (default: %(default)s)")
    parser.add_argument(
        "--max-new-tokens",
        type=positive_int,
        default=DEFAULT_MAX_NEW_TOKENS,
        help="the limit (default: %(default)s, as on Objaverse)",
    )
    parser.add_argument(
        "--batches",
        type=positive_int,
        nargs="+",
        default=[1, 2, 4, 8, 16, 32, 64],
        help="batch sizes (default: 1 2 4 8 16 32 64)",
    )
    parser.add_argument(
        "--repeats",
        type=positive_int,
        default=3,
        help="timed calls of each way; the table has their median (default: 3)",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1 …")
    parser.add_argument("--threads", type=positive_int, help="CPU threads (default: torch's choice)")
    args = parser.parse_args(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    print_setup(device, limit=args.max_new_tokens, repeats=args.repeats)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        model, processor = load_model(args.model)
    except ValueError as error:
        sys.exit(f"error: {error}")
    model = model.to(device, torch.float32).eval()
    rows = []
    for batch_size in args.batches:
        inputs = make_inputs(processor, batch_size, args.question, device)
        rows += run(model, processor, inputs, args.max_new_tokens, args.repeats)
    print(format_table(rows))


if __name__ == "__main__":
    main()
