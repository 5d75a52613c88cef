"""`minigpt3d evaluate`: score a model on a benchmark or on your own objects."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from minigpt3d.arguments import natural_int, number_between, option, positive_int
from minigpt3d.messages import one_line, public_command

from .console import CommandError, complain, quiet
from .inference import ReadingOptions, device_error


HELP = "score a model on a benchmark or on your own objects, with intervals and controls"
DESCRIPTION = (
    "Ask a model about the objects of a suite, score its answers, and write a report. Answers and a judge's replies are kept "
    "in --out: the same command resumes a run that was stopped, and computes the scores that are still missing. On several "
    "GPUs: accelerate launch -m minigpt3d.cli evaluate ..."
)
EPILOG = (
    "Suites: modelnet40 (--data: PointLLM's .dat file), objaverse and caption (--data: PointLLM's clouds, --annotations: "
    "its 200 objects), household (the bundled checkpoint's held-out objects), own (--data: a .csv or .jsonl with file and "
    "label, caption or color; or what `minigpt3d pack` wrote)."
)
DECODING, SCORES, JUDGE = "decoding", "scores", "judge"


@dataclass(kw_only=True)
class Options(ReadingOptions):
    suite: Literal["modelnet40", "objaverse", "caption", "household", "own"] = option(
        "objects and questions, see below", positional=True, metavar="SUITE"
    )
    out: Path = option("folder for answers, scores and report", metavar="DIR")
    model: str | None = option("folder or Hub id of the model (default: the bundled one)", default=None)
    answers: Path | None = option(
        "score the answers of any other program in this file, instead of a model", default=None, metavar="FILE"
    )
    data: str | None = option("the suite's objects, see below", default=None, metavar="PATH")
    annotations: list[Path] = option("annotations of the suite's objects", default=[], metavar="JSON")
    limit: int | None = option("use only the first N objects, to try it out", None, type=positive_int, metavar="N")
    robustness: bool = option(
        "also ask about corrupted clouds: eleven corruptions, five severities each", default=False
    )
    greedy: bool = option(
        "greedy decoding (default: 2 beams, sampled, as in the paper)", default=False, group=DECODING
    )
    template: Literal["default", "benchmark"] = option(
        "default: the prompt of training; benchmark: exactly the prompt of the authors' evaluation",
        default="default",
        group=DECODING,
    )
    phrase: list[str] = option(
        "answer whose likelihood is computed for each class, with {} for its name, such as 'This is a {}.'; may be repeated "
        "(default: the suite's)",
        default=[],
        action="append",
        metavar="TEXT",
        group=DECODING,
    )
    batch_size: int = option("objects that are answered together", 16, type=positive_int, metavar="N", group=DECODING)
    seed: int = option("seed of sampling, corruptions and intervals", 0, type=natural_int, group=DECODING)
    device: str | None = option(
        "cpu, cuda, cuda:1, mps (default: the accelerator if there is one)", None, group=DECODING
    )
    dtype: Literal["float16", "bfloat16", "float32"] | None = option(
        "dtype of the weights (default: as stored; on a CPU float32)", None, group=DECODING
    )
    metrics: list[str] = option(
        "compute these metrics, and those that --out has already (default: all that need no download)",
        default=[],
        metavar="NAME",
        group=SCORES,
    )
    s_bert: str | None = option("also score s_bert, with this encoder", None, metavar="DIR_OR_ID", group=SCORES)
    simcse: str | None = option("also score simcse, with this encoder", None, metavar="DIR_OR_ID", group=SCORES)
    judge: str | None = option(
        "model that judges: its name at --judge-url, else a folder or Hub id for transformers",
        None,
        metavar="MODEL",
        group=JUDGE,
    )
    judge_url: str | None = option(
        "OpenAI-compatible endpoint, such as http://localhost:8000/v1 (vLLM, llama.cpp, Ollama, ...); the key is read "
        "from OPENAI_API_KEY",
        None,
        metavar="URL",
        group=JUDGE,
    )
    judge_prompt: list[str] = option(
        "your own prompt for open_vocabulary_accuracy, caption_score or hallucination, with the placeholders {answer} and "
        "{reference}, or for closed_set_accuracy, with {answer} and {classes}; may be repeated",
        default=[],
        action="append",
        metavar="METRIC=FILE",
        group=JUDGE,
    )
    judge_cache: Path | None = option(
        "folder of the judge's replies, which runs may share (default: judge/ in --out)",
        None,
        metavar="DIR",
        group=JUDGE,
    )
    judge_concurrency: int | None = option(
        "simultaneous requests (default: 8)", None, type=positive_int, metavar="N", group=JUDGE
    )
    judge_max_tokens: int | None = option(
        "longest reply, in tokens (default: 256); a model that thinks before it replies needs more",
        None,
        type=positive_int,
        metavar="N",
        group=JUDGE,
    )
    judge_timeout: int | None = option(
        "seconds without a reply after which a request is repeated (default: 120); a slow server needs more",
        None,
        type=positive_int,
        metavar="SECONDS",
        group=JUDGE,
    )
    judge_rpm: int | None = option(
        "largest number of requests a minute", None, type=positive_int, metavar="N", group=JUDGE
    )
    judge_price: list[float] | None = option(
        "US dollars per million input and output tokens, to report the cost",
        None,
        nargs=2,
        type=number_between(0, 1e9),
        metavar=("IN", "OUT"),
        group=JUDGE,
    )


ENDPOINT_OPTIONS = ("judge_concurrency", "judge_timeout", "judge_rpm", "judge_price")


def check(options: Options):
    """
    Raises:
        ValueError: options that exclude each other, or that need another one.
    """
    if options.model is not None and options.answers is not None:
        raise ValueError("give `model` or `answers`, not both")
    if options.judge is not None and not options.judge.strip():
        raise ValueError("`judge` is empty: expected a model's name")
    for name in ("robustness", "greedy", "phrase", "device", "dtype"):
        if options.answers is not None and getattr(options, name):
            raise ValueError(
                f"`{name}` is for asking a model, and `answers` has the answers already: leave it out. (Answers about "
                'corrupted objects name their "condition", such as "jitter-3".)'
            )
    for name in ("judge_url", "judge_prompt", "judge_cache", "judge_max_tokens", *ENDPOINT_OPTIONS):
        if getattr(options, name) and options.judge is None:
            raise ValueError(f"`{name}` belongs to a judge: name it with `judge`")
        if getattr(options, name) and options.judge_url is None and name in ENDPOINT_OPTIONS:
            raise ValueError(f"`{name}` belongs to a judge behind an endpoint: give its `judge_url`")
    if options.answers is not None and not options.answers.is_file():
        raise ValueError(
            f"`answers` {options.answers}: no such file (expected answers of another program, JSON or JSONL)"
        )


def run(options: Options, argv: list[str]) -> int:
    """Evaluate, and print the scores; returns the exit code."""
    check(options)
    try:
        from minigpt3d.evaluation import run as core
        from minigpt3d.hub import default_model, fingerprint_model
    except ImportError as error:
        raise CommandError(f'{one_line(error)} (pip install "minigpt3d[eval]")') from error

    judge_prompts = read_judge_prompts(options.judge_prompt)
    name = str(options.answers or options.model or default_model())
    core_options = core.Options(
        suite=options.suite,
        out=options.out,
        model=Path(name).name if Path(name).exists() else name,
        fingerprint=fingerprint_model(name),
        data=options.data,
        annotations=options.annotations,
        reading=options.reading,
        answers=options.answers,
        limit=options.limit,
        greedy=options.greedy,
        template=options.template,
        batch_size=options.batch_size,
        phrases=options.phrase,
        robustness=options.robustness,
        metrics=options.metrics,
        encoders={metric: given for metric in ("s_bert", "simcse") if (given := getattr(options, metric))},
        judge=make_judge(options),
        judge_prompts=judge_prompts,
        seed=options.seed,
        command=public_command(["minigpt3d", *argv]),
    )
    try:
        results = core.evaluate(core_options, lambda: load_for_evaluation(name, options), complain)
    except core.BrokenObjectsError as error:
        raise CommandError(str(error)) from error  # line by line
    except KeyboardInterrupt:
        complain(f"stopped; the answers so far are kept in {options.out}, and the same command resumes")
        raise
    if results:  # the first process
        from minigpt3d.evaluation.report import score_table

        print(score_table(results))
        print(
            f"\n{options.out / 'report.html'} shows the best and the worst objects; report.md and results.json have all"
        )
    return 0


def read_judge_prompts(options: list[str]) -> dict[str, str]:
    """`METRIC=FILE` → the file's text by metric.

    Raises:
        CommandError: an option is not of this form, or its file cannot be read.
    """
    from minigpt3d.evaluation.suites import JUDGE_PROMPTS

    prompts = {}
    for item in options:
        name, _, path = item.partition("=")
        if name not in JUDGE_PROMPTS or not path:
            raise CommandError(f"--judge-prompt {item}: expected METRIC=FILE, with one of {', '.join(JUDGE_PROMPTS)}")
        try:
            prompts[name] = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CommandError(f"--judge-prompt {item}: cannot be read as UTF-8 text ({one_line(error)})") from error
    return prompts


def make_judge(options: Options):
    """The judge that the options describe, or None."""
    if options.judge is None:
        return None
    from minigpt3d.evaluation.judges import EndpointJudge, LocalJudge

    cache = options.judge_cache or options.out / "judge"
    limits = {
        "max_tokens": options.judge_max_tokens,
        "concurrency": options.judge_concurrency,
        "timeout": options.judge_timeout,
    }
    limits = {name: limit for name, limit in limits.items() if limit is not None}
    if options.judge_url is None:
        return LocalJudge(options.judge, cache, options.device, **limits)
    price = None if options.judge_price is None else tuple(options.judge_price)
    try:
        return EndpointJudge(
            options.judge,
            options.judge_url,
            cache,
            requests_per_minute=options.judge_rpm,
            price=price,
            **limits,
        )
    except ImportError as error:
        raise CommandError(one_line(error)) from error


def load_for_evaluation(name: str, options: Options):
    """Model and processor, on the device of this process."""
    import torch
    from accelerate import PartialState

    from minigpt3d.hub import load_model

    quiet()
    model, processor = load_model(name)
    if options.up_axis is not None:
        processor.feature_extractor.up_axis = None  # what it gets has been turned
    try:
        device = torch.device(options.device) if options.device else PartialState().device
        dtype = (
            getattr(torch, options.dtype) if options.dtype else torch.float32 if device.type == "cpu" else model.dtype
        )
        return model.to(device, dtype).eval(), processor
    except Exception as error:
        raise device_error(options.device, error) from error
