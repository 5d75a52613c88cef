"""An evaluation from start to end: open the folder, ask, score, write, report."""

from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from minigpt3d.hub import default_model, fingerprint_model

from .answers import match_answers
from .ask import Asked, ask_model, keep_answers
from .evaluate_options import EvaluateOptions
from .judges import Judge
from .metrics.table import METRICS
from .plan import Answers, EvaluationPlan, make_plan
from .report import write_report
from .results import Dataset, Generation, JudgeFacts, ModelFacts, Results, hash_prompt
from .score import score
from .suites import SEEING


def evaluate(
    options: EvaluateOptions,
    *,
    command: str = "",
    name: str | None = None,
    judge: Judge | None = None,
    notify: Callable[[str], None] = print,
) -> Results | None:
    """Evaluate a model or another program's answers. What the folder already contains is not computed again.

    Args:
        command: the command line of this run, for the report.
        name: of the model in the report (default: its Hub id, or the name of its folder).
        judge: replaces the judge of the options.
        notify: called with messages for the user.

    Returns:
        The content of results.json; None on all processes but the first.

    Raises:
        ValueError: options or files are invalid; most are checked before any heavy work.
        ImportError: a package is missing.
    """
    plan = make_plan(options, judge)
    given = None if options.answers is None else match_answers(plan)
    source = str(options.answers or options.model or default_model())
    name, fingerprint = name or (Path(source).name if Path(source).exists() else source), fingerprint_model(source)
    # Processes wait for the slowest one, which may take hours.
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=1))])
    with plan.folder.locked() if accelerator.is_main_process else nullcontext():
        if accelerator.is_main_process:
            _notify_left_out(plan, notify)
        if given is None:
            asked = ask_model(plan, source, fingerprint, command)
        else:
            asked = keep_answers(plan, given, fingerprint, command)
        accelerator.wait_for_everyone()
        if not accelerator.is_main_process:
            return None
        lines = list(plan.folder.answers.read())
        answers, incomplete = plan.arrange(lines, plan.objects.values())
        likelihoods, _ = plan.arrange(plan.folder.likelihoods.read() if plan.has_likelihoods else (), plan.labelled)
        _notify_incomplete(plan, incomplete, notify)
        _notify_judge(plan, answers, notify)
        scores, tests, classes, rows = score(plan, answers, likelihoods)
        results = Results(**_describe(plan, asked, lines, name), scores=scores, tests=tests, classes=classes)
        _notify_mute_judge(plan, results, notify)
        plan.folder.write(results, rows)
        write_report(plan.folder.path, results, rows, lambda object_id: plan.objects[object_id].read())
        for words in results.cautions():
            notify(words)
        return results


def _describe(plan: EvaluationPlan, asked: Asked, lines: list[dict], name: str) -> dict:
    """The fields of `Results` other than scores: how the run was made."""
    settings, suite = asked.settings, plan.suite
    encoders = {metric: plan.encoder(metric) for metric in plan.metrics if "/" in METRICS[metric].needs}
    labels = {item.label for item in plan.labelled}
    return asked.history | {
        "suite": suite.name,
        "title": suite.title,
        "seed": settings.seed,
        "model": ModelFacts(name, settings.model, asked.parameters, settings.dtype),
        "decoding": settings.decoding,
        "template": settings.template,
        "batch_size": settings.batch_size,
        "questions": {question.name: question.prompt for question in suite.questions},
        "generation": _sum_up(lines),
        "encoders": {metric: Path(name).resolve().name if Path(name).exists() else name for metric, name in encoders.items()},
        "judge": _describe_judge(plan),
        "dataset": Dataset(suite.name, len(plan.objects), plan.available, settings.dataset, len(labels)),
        "not_scored": plan.not_scored,
    }  # fmt: skip


def _describe_judge(plan: EvaluationPlan) -> JudgeFacts | None:
    if plan.judge is None:
        return None
    prompts = {prompt: hash_prompt(text) for prompt, text in plan.prompts().items()}
    return JudgeFacts(plan.judge.name, plan.judge.files, prompts, **plan.judge.sum_up())


def _sum_up(lines: list[dict]) -> Generation:
    seconds = sum(line.get("seconds", 0.0) for line in lines)
    return Generation(
        answers=len(lines),
        new_tokens=sum(line.get("tokens", 0) for line in lines) or None,
        seconds=round(seconds, 2),
        objects_per_second=round(len(lines) / seconds, 2) if seconds else None,
        cut=sum(line["cut"] for line in lines) if all("cut" in line for line in lines) else None,
    )


# ---- Messages for the user ------------------------------------------------------------------------------------------


def _notify_left_out(plan: EvaluationPlan, notify: Callable[[str], None]):
    """Report on one line what is not scored and why, and on another what the folder has scores of."""
    for prefix, is_earlier in (("not scored", False), ("not scored any more", True)):
        names: dict[str, list[str]] = {}
        for name, reason in plan.not_scored.items():
            if (name in plan.earlier_judges) == is_earlier:
                names.setdefault(reason, []).append(name)
        if names:
            reasons = "; ".join(f"{', '.join(metrics)}: {reason}" for reason, metrics in names.items())
            notify(f"{prefix}: {reasons}")


def _notify_incomplete(plan: EvaluationPlan, incomplete: dict[tuple[str, str], int], notify: Callable[[str], None]):
    for (_, condition), count in incomplete.items():
        of = f"{count} of {len(plan.objects)} objects"
        notify(
            f"not scored: {condition}, with answers about only {of}. With `robustness`, the others are asked about."
        )


def _notify_judge(plan: EvaluationPlan, answers: Answers, notify: Callable[[str], None]):
    """Tell how many questions the judge gets, and which judge's scores are replaced."""
    if plan.judge is None:
        return
    if others := {judge for judge in plan.earlier_judges.values() if judge} - {plan.judge.name}:
        notify(
            f"scores by {', '.join(sorted(others))} are replaced by those of {plan.judge.name}; the replies are kept"
        )
    judged = [name for name in plan.metrics if plan.judge_for(METRICS[name])]
    prompts = {
        question.name: len({METRICS[name].prompt for name in question.metrics if name in judged})
        for question in plan.suite.questions
    }
    # Answers about objects as they are count twice: each is also scored against another object.
    count = sum(
        prompts[name] * len(lines) * (1 + (condition == SEEING)) for (name, condition), lines in answers.items()
    )
    notify(f"{plan.judge.name} is asked up to {count:,} questions; kept replies are not asked for again")


def _notify_mute_judge(plan: EvaluationPlan, results: Results, notify: Callable[[str], None]):
    if mute := sorted({score.about.title for score in results.seeing if score.is_mute}):
        notify(
            f"{plan.judge.name} gave no readable verdict on {', '.join(mute)}, so these scores say nothing about the model. Use "
            "another judge; one that thinks before it replies needs more `judge_max_tokens`. If the server was at fault, run "
            f"again: replies without text are asked for again. To ask for all again, delete {plan.judge.cache_dir}."
        )
