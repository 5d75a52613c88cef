"""Score answers: each metric of each question under each condition, and tests of the controls. Reads and writes no files."""

import numpy as np

from minigpt3d.model_card.words import CONDITIONS

from . import metrics
from .likelihood import rank_classes
from .metrics.table import METRICS, Metric
from .plan import Answers, EvaluationPlan
from .results import Classes, ControlTest, Score, ScoredAnswer
from .statistics import bootstrap, holm, in_words, paired_difference, wilson
from .suites import CONTROLS, SEEING, SHUFFLED, Question


LIKELIHOOD_METRICS = {"likelihood_top_1": 1, "likelihood_top_5": 5}
Groups = dict[tuple[str, str], list[ScoredAnswer]]  # by (question, condition)


def score(
    plan: EvaluationPlan, answers: Answers, likelihoods: Answers
) -> tuple[list[Score], list[ControlTest], Classes | None, list[ScoredAnswer]]:
    """Score all answers.

    Args:
        answers, likelihoods: complete ones, see `EvaluationPlan.arrange`.

    Returns:
        Scores, tests, classes by likelihood (None without them), and the answers with their scores.
    """
    questions = {question.name: question for question in plan.suite.questions}
    groups = {
        (name, condition): [_to_row(plan, questions[name], condition, *item) for item in lines.items()]
        for (name, condition), lines in _with_shuffled(answers).items()
    }
    scores = [score for (name, _), rows in groups.items() for score in score_answers(plan, questions[name], rows)]
    by_likelihood, classes = score_likelihoods(plan, likelihoods, groups)
    tests = compare_conditions(groups, [*plan.metrics, *LIKELIHOOD_METRICS])
    return scores + by_likelihood, tests, classes, [row for rows in groups.values() for row in rows]


def _with_shuffled(lines: Answers) -> Answers:
    return lines | {(question, SHUFFLED): lines[question, c] for question, c in lines if c == SEEING}


def _to_row(plan: EvaluationPlan, question: Question, condition: str, object_id: str, line: dict) -> ScoredAnswer:
    truth = plan.objects[object_id]
    facts = {"label": truth.label, "caption": truth.caption, "color": truth.color}
    return ScoredAnswer(object_id, question.name, question.prompt, condition, line["answer"], **facts)


# ---- Metrics --------------------------------------------------------------------------------------------------------


def score_answers(plan: EvaluationPlan, question: Question, rows: list[ScoredAnswer]) -> list[Score]:
    """Score the answers to one question under one condition; scores and the judge's replies are also written to the rows."""
    scores, computed = [], {}
    by_id, condition = {row.object_id: row for row in rows}, rows[0].condition
    for name in (name for name in question.metrics if name in plan.metrics):
        metric = METRICS[name]
        references = plan.references(metric.reference, by_id, condition)
        if not references:
            continue
        key = (metric.function, metric.reference, metric.needs)  # metrics that one call computes
        if key not in computed:
            computed[key] = _compute(plan, name, [by_id[i].answer for i in references], list(references.values()))
        result, judge = computed[key], plan.judge_for(metric)
        values, low, high = _summarize(metric, result["values"], plan.options.seed)
        if low is None:
            continue
        for object_id, value in zip(references, values, strict=True):
            if value is not None:
                by_id[object_id].scores[name] = value
        if judge is not None:
            for object_id, reply in zip(references, result["replies"], strict=True):
                by_id[object_id].reasons[name] = reply
        scores.append(
            Score(
                question.name, condition, name, result[metric.result or name], low, high, metric.unit, len(values),
                unparsed=result.get("unparsed", 0),
                judge=judge and judge.name,
                interval="Wilson" if metric.is_hit else "bootstrap",
            )
        )  # fmt: skip
    return scores


def _compute(plan: EvaluationPlan, name: str, answers: list[str], references: list[str]) -> dict:
    """What the function of a metric returns."""
    metric, judge, keywords = METRICS[name], plan.judge_for(METRICS[name]), {}
    if metric.function == "closed_set_accuracy":
        keywords = plan.classes(metric.reference)
    elif metric.function == "caption_overlap":
        same = (metric.function, metric.needs)
        keywords["scores"] = [name for name in plan.metrics if (METRICS[name].function, METRICS[name].needs) == same]
    elif metric.function == "sentence_similarity":
        keywords["encoder"] = plan.encoder(name)
        keywords["pooling"] = "pooler_output" if name == "simcse" else "sentence-transformers"
    if judge is not None:
        keywords.pop("aliases", None)  # a judge knows synonyms
        keywords |= {"judge": judge, "prompt": plan.judge_prompts.get(metric.prompt)}
    return getattr(metrics, metric.function)(answers, references, **keywords)


def _summarize(metric: Metric, values, seed: int) -> tuple[list[float | None], float | None, float | None]:
    """Each object's value of a metric, and the interval of the score; None without a score."""
    if metric.is_ratio:
        right, wrong = (np.array(values[name], float) for name in ("correct", "wrong"))
        total = right + wrong
        ratios = [float(r / t) if t else None for r, t in zip(right, total, strict=True)]
        return ratios, *(bootstrap((right, total), seed=seed) if total.any() else (None, None))
    values = values[metric.values] if metric.values else values
    return values, *(wilson(int(sum(values)), len(values)) if metric.is_hit else bootstrap(values, seed=seed))


# ---- Likelihoods ----------------------------------------------------------------------------------------------------


def score_likelihoods(
    plan: EvaluationPlan, likelihoods: Answers, groups: Groups
) -> tuple[list[Score], Classes | None]:
    """Classify by likelihood; the hits are also written to the rows of `groups`."""
    scores, classes = [], None
    for (question, condition), lines in _with_shuffled(likelihoods).items():
        labels = plan.references("label", lines, condition)
        if not labels:
            continue
        hits, confusion = _classify(plan, lines, labels)
        for row in groups.get((question, condition), ()):
            row.scores |= {name: values[row.object_id] for name, values in hits.items() if row.object_id in values}
        for name, values in hits.items():
            value, interval = float(np.mean(list(values.values()))), wilson(int(sum(values.values())), len(values))
            scores.append(Score(question, condition, name, value, *interval, "share", len(values), 0, None, "Wilson"))
        if condition == SEEING:
            shares = {score.metric.removeprefix("likelihood_"): score.value for score in scores[-len(hits) :]}
            texts = list(plan.suite.phrases), list(plan.suite.classes)
            classes = Classes(question, "likelihood", *texts, confusion.tolist(), **shares)
    return scores, classes


def _classify(
    plan: EvaluationPlan, lines: dict[str, dict], labels: dict[str, str]
) -> tuple[dict[str, dict[str, float]], np.ndarray]:
    """{metric: {object_id: hit}}, and the confusion matrix: true class (row), most likely class (column)."""
    classes = list(plan.suite.classes)
    ranks = {name: k for name, k in LIKELIHOOD_METRICS.items() if k == 1 or k < len(classes)}  # else all are hits
    class_of_name = [index for index, names in enumerate(plan.suite.classes.values()) for _ in names]
    hits, confusion = {name: {} for name in ranks}, np.zeros((len(classes), len(classes)), dtype=int)
    for object_id, label in labels.items():
        line = lines[object_id]
        (order,) = rank_classes([line["log_likelihood"]], line["tokens"], class_of_name)
        rank = int(np.flatnonzero(order == classes.index(label))[0])
        confusion[classes.index(label), order[0]] += 1
        for name, k in ranks.items():
            hits[name][object_id] = float(rank < k)
    return hits, confusion


# ---- Tests ----------------------------------------------------------------------------------------------------------


def compare_conditions(groups: Groups, metric_names: list[str]) -> list[ControlTest]:
    """Paired tests of objects as they are against each control, with p corrected for the number of tests."""
    tests = []
    for (question, condition), rows in groups.items():
        if condition not in CONTROLS:
            continue
        seeing = {row.object_id: row.scores for row in groups.get((question, SEEING), ())}
        for name in (name for name in metric_names if not METRICS[name].is_ratio):
            pairs = [
                (seeing[row.object_id][name], row.scores[name])
                for row in rows
                if name in row.scores and name in seeing.get(row.object_id, {})
            ]
            if pairs:
                tests.append(
                    ControlTest(question, name, SEEING, condition, **paired_difference(*zip(*pairs, strict=True)))
                )
    for test, p in zip(tests, holm([test.p for test in tests]), strict=True):
        test.p = p
        unit, control = METRICS[test.metric].unit, CONTROLS[test.b]
        test.words = in_words(test.difference, test.low, test.high, p, unit, CONDITIONS[SEEING], control)
    return tests
