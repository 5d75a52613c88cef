"""From answers to scores: every metric of every question under every condition, with intervals, tests and controls."""

from collections.abc import Callable

import numpy as np

from . import metrics as metric_functions
from .conditions import CONTROLS, SEEING, SHUFFLED
from .objects import EvalObject
from .statistics import bootstrap, holm, in_words, paired_difference, wilson
from .suites import METRICS, Question, Suite
from .vocabulary.colors import COLORS, OTHER_WORDS
from .vocabulary.kinds import KINDS, answer_nouns


def default_prompt(name: str) -> str:
    """What a judge is asked for a metric, by the prompt's name."""
    return metric_functions.PROMPTS[name]


def shuffle(objects: list[EvalObject], field: str, seed: int) -> dict[str, EvalObject]:
    """For each object another one, which its answer is compared with: a cycle through all of them, drawn by the seed.

    Chance pairs two objects of one class as often as their shares say, as it would for answers that know the shares alone.
    """
    order = np.random.default_rng([seed, *field.encode()]).permutation(len(objects))
    return {objects[a].object_id: objects[b] for a, b in zip(order, np.roll(order, 1), strict=True)}


def is_judged(suite: Suite, name: str) -> bool:
    """Whether it is the judge who scores this metric, if there is one."""
    metric = METRICS[name]
    return metric.needs == "judge" or bool(metric.prompt and suite.judges_classes)


class Scorer:
    """Scores of a suite.

    Args:
        suite: the row.
        objects: all of them, by id.
        judge: prompts → replies; None: what needs one is not scored.
        encoders: folder or Hub id by metric, of those that take another than `METRICS` has.
        prompts: the user's own prompts for the judge, by name (of `JUDGE_PROMPTS`).
        seed: of the shuffled control and of the bootstrap.
    """

    def __init__(
        self,
        suite: Suite,
        objects: dict[str, EvalObject],
        judge: Callable | None,
        encoders: dict[str, str],
        prompts: dict[str, str],
        seed: int,
    ):
        self.suite, self.objects, self.judge, self.seed = suite, objects, judge, seed
        self.encoders, self.prompts = encoders, prompts

    def score(self, question: Question, condition: str, answers: dict[str, str], metrics: list[str]):
        """Score the answers to one question under one condition.

        Args:
            answers: text by object_id.
            metrics: of `METRICS`.

        Returns:
            The entries of results.json; scores by object and metric; the judge's replies by object and metric.
        """
        entries, scores, reasons = [], {i: {} for i in answers}, {i: {} for i in answers}
        computed: dict[str, dict] = {}
        for name in metrics:
            metric = METRICS[name]
            compared = self.truths(metric.reference, answers, condition)
            if not compared:
                continue
            texts = [answers[object_id] for object_id in compared]
            references = list(compared.values())
            if metric.module not in computed or metric.module in ("closed_set_accuracy", "sentence_similarity"):
                wanted = [each for each in metrics if METRICS[each].module == metric.module]
                computed[metric.module] = self._compute(name, wanted, texts, references)
            result = computed[metric.module]
            values = result["values"][_VALUES[name]] if isinstance(result["values"], dict) else result["values"]
            if metric.is_ratio:
                right, wrong = (np.array(result["values"][each], float) for each in ("correct", "wrong"))
                total = right + wrong
                if not total.any():  # no detail was counted: there is no ratio
                    continue
                values = [float(r / t) if t else None for r, t in zip(right, total, strict=True)]
                low, high = bootstrap((right, total), seed=self.seed)
            elif metric.is_hit:
                low, high = wilson(int(sum(values)), len(values))
            else:
                low, high = bootstrap(values, seed=self.seed)
            for object_id, value in zip(compared, values, strict=True):
                if value is not None:
                    scores[object_id][name] = value
            judged = self.judge is not None and is_judged(self.suite, name)
            if judged:
                for object_id, reply in zip(compared, result["replies"], strict=True):
                    reasons[object_id][name] = reply
            entries.append(
                {
                    "question": question.name,
                    "condition": condition,
                    "metric": name,
                    "value": result[_AGGREGATES.get(name, name)],
                    "low": low,
                    "high": high,
                    "unit": metric.unit,
                    "objects": len(values),
                    "unparsed": result.get("unparsed", 0),
                    "judge": self.judge.name if judged else None,
                    "interval": "Wilson" if metric.is_hit else "bootstrap",
                }
            )
        return entries, scores, reasons

    def truths(self, field: str, answers: dict[str, str], condition: str) -> dict[str, str]:
        """What the answers are compared with, for the objects that have it; under `SHUFFLED` another object's."""
        having = [each for each in self.objects.values() if getattr(each, field) and each.object_id in answers]
        if condition == SHUFFLED and len(having) < 2:
            return {}  # there is no other object
        if condition == SHUFFLED:
            other = shuffle(having, field, self.seed)
            return {each.object_id: getattr(other[each.object_id], field) for each in having}
        return {each.object_id: getattr(each, field) for each in having}

    def _compute(self, name: str, wanted: list[str], texts: list[str], references: list[str]) -> dict:
        metric, options = METRICS[name], {}
        judged = self.judge is not None and is_judged(self.suite, name)
        if metric.module == "closed_set_accuracy":
            options = self._classes(metric.reference)
            if judged:
                options.pop("aliases", None)  # a judge knows other names by itself
        elif metric.module == "caption_overlap":
            options["scores"] = tuple(wanted)
        elif metric.module == "sentence_similarity":
            options["encoder"] = self.encoders.get(name, metric.needs)
            options["pooling"] = "pooler_output" if name == "simcse" else "sentence-transformers"
        if judged:
            options["judge"] = self.judge
            if metric.prompt in self.prompts:
                options["prompt"] = self.prompts[metric.prompt]
        return getattr(metric_functions, metric.module)(texts, references, **options)

    def _classes(self, field: str) -> dict:
        if field == "color":
            aliases = {color: [word for word, name in OTHER_WORDS.items() if name == color] for color in COLORS}
            return {"classes": list(COLORS), "aliases": {color: words for color, words in aliases.items() if words}}
        if self.suite.classes is not None:
            classes = list(self.suite.classes)
        else:
            classes = sorted({each.label for each in self.objects.values() if each.label})
        if set(classes) <= set(KINDS):
            return {"classes": classes, "aliases": {kind: answer_nouns(kind) for kind in classes}}
        return {"classes": classes}


# Where a metric's module has it, if not under its own name.
_AGGREGATES = {
    "closed_set_accuracy": "accuracy",
    "open_vocabulary_accuracy": "accuracy",
    "color_accuracy": "accuracy",
    "caption_score": "score",
    "s_bert": "similarity",
    "simcse": "similarity",
}
_VALUES = {"correctness": "correct", "hallucination": "wrong", "precision": "correct"} | {
    name: name for name in ("bleu_1", "bleu_4", "rouge_l", "meteor")
}


# ---- Tests ----------------------------------------------------------------------------------------------------------


def compare_conditions(
    values: dict[tuple[str, str], dict[str, dict[str, float]]], metric_names: list[str]
) -> list[dict]:
    """Paired tests of what the model says of the objects as they are against each control, corrected for their number.

    Args:
        values: by (question, condition), by object and metric.

    Returns:
        The entries of `tests` in results.json.
    """
    tests = []
    for (question, condition), scores in values.items():
        if condition not in CONTROLS:
            continue
        for name in (each for each in metric_names if not METRICS[each].is_ratio):
            seeing = values.get((question, SEEING), {})
            common = [i for i in scores if name in scores[i] and name in seeing.get(i, {})]
            if not common:
                continue
            a, b = ([side[i][name] for i in common] for side in (seeing, scores))
            tests.append({"question": question, "metric": name, "a": SEEING, "b": condition} | paired_difference(a, b))
    for entry, p in zip(tests, holm([entry["p"] for entry in tests]), strict=True):
        entry["p"] = p
        entry["words"] = in_words(
            entry["difference"],
            entry["low"],
            entry["high"],
            p,
            METRICS[entry["metric"]].unit,
            "as it is",
            CONTROLS[entry["b"]],
        )
    return tests
