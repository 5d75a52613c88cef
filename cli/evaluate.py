"""`minigpt3d evaluate`: score a model on a benchmark or on your own objects."""

from minigpt3d.arguments import with_flags
from minigpt3d.evaluation.evaluate_options import EvaluateOptions as Options
from minigpt3d.messages import public_command

from .console import complain, quiet


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


def run(options: Options, argv: list[str]) -> int:
    """Evaluate, and print the scores; returns the exit code."""
    options.check()
    try:
        from minigpt3d.evaluation.report import score_table
        from minigpt3d.evaluation.run import evaluate
    except ImportError as error:
        raise ImportError(f'{error} (pip install "minigpt3d[eval]")') from error

    quiet()
    try:
        results = evaluate(
            options,
            command=public_command(["minigpt3d", *argv]),
            notify=lambda message: complain(with_flags(message, Options, "-")),
        )
    except KeyboardInterrupt:
        complain(f"stopped; the answers so far are kept in {options.out}, and the same command resumes")
        raise
    if results is not None:  # the first process
        print(score_table(results))
        print(
            f"\n{options.out / 'report.html'} shows the best and the worst objects; report.md and results.json have all"
        )
    return 0
