"""The plan of an evaluation: objects, questions, conditions, metrics and judge, checked before any heavy work."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from minigpt3d.hub import is_hub_id

from .conditions import CORRUPTION_CONDITIONS
from .evaluate_options import EvaluateOptions
from .judges import Judge, make_judge
from .likelihood import check_texts
from .metrics import PROMPTS
from .metrics.closed_set import class_namer
from .metrics.table import METRICS, Metric
from .objects import EvalObject, read_objects
from .run_folder import RunFolder
from .suites import BLIND, NO_COLOR, SEEING, SHUFFLED, SUITES, Question, Suite
from .vocabulary.colors import COLORS, OTHER_WORDS
from .vocabulary.kinds import KINDS, answer_nouns


Answers = dict[tuple[str, str], dict[str, dict]]  # lines by (question, condition) and object_id


@dataclass(frozen=True)
class Job:
    """One question, asked about objects under one condition."""

    question: Question
    condition: str
    objects: tuple[EvalObject, ...]


@dataclass
class EvaluationPlan:
    """One evaluation.

    Args:
        options: of the user.
        suite: row of `SUITES`, adapted to the objects.
        objects: by object_id.
        metrics: names of those that are computed.
        judge: takes prompts, returns replies; None without one.
        judge_prompts: the user's own, by name of `JUDGE_PROMPTS`.
        available: number of objects in the suite, of which a limit may have left out some.
        not_scored: metrics of the suite that are not computed, and why.
        earlier_judges: metrics that the folder has scores of, each with its judge or None.
    """

    options: EvaluateOptions
    suite: Suite
    objects: dict[str, EvalObject]
    metrics: list[str]
    judge: Judge | None = None
    judge_prompts: dict[str, str] = field(default_factory=dict)
    available: int = 0
    not_scored: dict[str, str] = field(default_factory=dict)
    earlier_judges: dict[str, str | None] = field(default_factory=dict)

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self.options.out)

    # ---- Asking -----------------------------------------------------------------------------------------------------

    @property
    def has_likelihoods(self) -> bool:
        return self.suite.classes is not None and self.options.answers is None

    @property
    def labelled(self) -> tuple[EvalObject, ...]:
        return tuple(item for item in self.objects.values() if item.label)

    def conditions(self, robustness: bool) -> list[str]:
        """Conditions of the clouds: as they are, controls and, with `robustness`, corruptions."""
        corruptions = CORRUPTION_CONDITIONS if robustness else ()
        names = [SEEING, BLIND, NO_COLOR, *corruptions]
        return [name for name in names if self.suite.has_color or "color" not in name]

    def answer_jobs(self) -> list[Job]:
        """All questions; only the main one is asked about corrupted objects."""
        objects, jobs = tuple(self.objects.values()), []
        for number, question in enumerate(self.suite.questions):
            for condition in self.conditions(self.options.robustness and number == 0):
                # All blind objects are the same, so greedy decoding gives the same answer for all.
                is_same = condition == BLIND and self.options.greedy
                jobs.append(Job(question, condition, objects[:1] if is_same else objects))
        return jobs

    def likelihood_jobs(self) -> list[Job]:
        """The main question about the objects that have a class, without corruptions."""
        if not self.has_likelihoods:
            return []
        return [
            Job(self.suite.questions[0], condition, self.labelled[:1] if condition == BLIND else self.labelled)
            for condition in self.conditions(robustness=False)
        ]

    def arrange(
        self, lines: Iterable[dict], objects: Iterable[EvalObject]
    ) -> tuple[Answers, dict[tuple[str, str], int]]:
        """Lines of all processes in the suite's order; a single line about a blind object is used for all objects.

        Returns:
            By (question, condition): lines about all objects; and the number of objects where some are missing, for a killed run
            may have begun a condition that this run does not ask about.
        """
        by_key: Answers = {}
        for line in lines:
            by_key.setdefault((line["question"], line["condition"]), {})[line["object_id"]] = line
        order = [item.object_id for item in objects]
        complete, incomplete = {}, {}
        for key in ((question.name, name) for question in self.suite.questions for name in self.conditions(True)):
            by_object = by_key.get(key, {})
            if key[1] == BLIND and len(by_object) == 1:
                by_object = dict.fromkeys(order, *by_object.values())
            in_order = {object_id: by_object[object_id] for object_id in order if object_id in by_object}
            if in_order and len(in_order) == len(order):
                complete[key] = in_order
            elif in_order:
                incomplete[key] = len(in_order)
        return complete, incomplete

    # ---- Scoring ----------------------------------------------------------------------------------------------------

    def judge_for(self, metric: Metric) -> Judge | None:
        """The judge of a metric; None if the metric or the run has none."""
        is_judged = metric.needs == "judge" or (metric.prompt and self.suite.judges_classes)
        return self.judge if is_judged else None

    def prompts(self) -> dict[str, str]:
        """The prompts of the judge in this run, by name of `JUDGE_PROMPTS`."""
        judged = [METRICS[name] for name in self.metrics if self.judge_for(METRICS[name])]
        return {metric.prompt: self.judge_prompts.get(metric.prompt, PROMPTS[metric.prompt]) for metric in judged}

    def encoder(self, name: str) -> str:
        """Folder or Hub id of the sentence encoder of a metric."""
        return self.options.encoders.get(name, METRICS[name].needs)

    def references(self, reference: str, ids: Iterable[str], condition: str) -> dict[str, str]:
        """References of the objects that have one; under `SHUFFLED`, those of other objects."""
        ids = set(ids)
        objects = [item for item in self.objects.values() if getattr(item, reference) and item.object_id in ids]
        compared = objects
        if condition == SHUFFLED:
            compared = shuffle(objects, reference, self.options.seed) if len(objects) > 1 else []
            objects = objects[: len(compared)]
        return {item.object_id: getattr(other, reference) for item, other in zip(objects, compared, strict=True)}

    def classes(self, reference: str) -> dict:
        """Classes and their other names, as `closed_set_accuracy` takes them."""
        if reference == "color":
            aliases = {color: [word for word, name in OTHER_WORDS.items() if name == color] for color in COLORS}
            return {"classes": list(COLORS), "aliases": {color: words for color, words in aliases.items() if words}}
        classes = list(self.suite.classes or sorted({item.label for item in self.labelled}))
        aliases = {kind: answer_nouns(kind) for kind in classes} if set(classes) <= set(KINDS) else {}
        return {"classes": classes, "aliases": aliases}


def shuffle(objects: list[EvalObject], reference: str, seed: int) -> list[EvalObject]:
    """Assign another object to each one: a random cycle through all objects.

    Objects of one class are paired as often as by chance, so the control measures answers that only know how frequent each class
    is.
    """
    order = np.random.default_rng([seed, *reference.encode()]).permutation(len(objects))
    partner = dict(zip(order, np.roll(order, 1), strict=True))
    return [objects[partner[index]] for index in range(len(objects))]


# ---- Make the plan, with all checks ---------------------------------------------------------------------------------


def make_plan(options: EvaluateOptions, judge: Judge | None = None) -> EvaluationPlan:
    """Read the objects and make the plan.

    Args:
        judge: instead of the one that the options describe.

    Raises:
        ValueError: something is missing, unknown or contradictory.
        ImportError: a package is missing.
    """
    options.check()
    judge_prompts = options.read_judge_prompts()
    folder = RunFolder(options.out)
    folder.check()
    available = read_objects(options)
    objects = {item.object_id: item for item in available[: options.limit]}
    suite = _adapt_suite(options, objects)
    plan = EvaluationPlan(options, suite, objects, [], judge or make_judge(options), judge_prompts, len(available))
    plan.earlier_judges = folder.earlier_judges()
    _choose_metrics(plan)
    _check_judge(plan)
    _check_texts(plan)
    return plan


def _adapt_suite(options: EvaluateOptions, objects: dict[str, EvalObject]) -> Suite:
    """The suite with the user's phrases; for own objects, with their labels as classes and the metrics they have references for."""
    suite = SUITES[options.suite]
    if options.phrase:
        suite = replace(suite, phrases=tuple(options.phrase))
    if suite.name != "own":
        return suite
    known = {name for name in ("label", "caption", "color") if any(getattr(item, name) for item in objects.values())}
    questions = []
    for question in suite.questions:
        metrics = tuple(name for name in question.metrics if METRICS[name].reference in known)
        questions += [replace(question, metrics=metrics)] if metrics else []
    labels = sorted({item.label for item in objects.values() if item.label})
    classes = {label: (label,) for label in labels} if len(labels) > 1 else None  # one class leaves no choice
    return replace(suite, questions=tuple(questions), classes=classes)


def _choose_metrics(plan: EvaluationPlan):
    """Set `metrics` and `not_scored`: all metrics, or the given ones and those with earlier scores."""
    known = list(dict.fromkeys(name for question in plan.suite.questions for name in question.metrics))
    given = plan.options.metrics
    if unknown := [name for name in given if name not in known]:
        raise ValueError(f"`metrics` {unknown[0]}: {plan.suite.name} has {', '.join(known)}.")
    for package, module in (("evaluate", "evaluate"), ("nltk", "nltk"), ("rouge-score", "rouge_score")):
        if find_spec(module) is None:
            raise ImportError(f'evaluation needs {package}, which is not installed. pip install "minigpt3d[eval]"')
    for name in known:
        if given and name not in {*plan.earlier_judges, *given}:
            continue
        problem = _find_problem(plan, name)
        if problem is None:
            plan.metrics.append(name)
        elif name in (*given, *plan.options.encoders):
            raise ValueError(f"{name} was asked for, but {problem}.")
        else:
            plan.not_scored[name] = problem
    if not plan.metrics and not plan.has_likelihoods:
        reasons = "; ".join(f"{name} {reason}" for name, reason in plan.not_scored.items())
        raise ValueError(f"{plan.suite.name} has no metric that can be computed: {reasons}. Meet the needs of one.")


def _find_problem(plan: EvaluationPlan, name: str) -> str | None:
    """Why a metric cannot be computed; None if it can."""
    needs, options = METRICS[name].needs, plan.options
    if needs == "judge" and plan.judge is None:
        return "needs a judge (`judge`)"
    if needs == "wordnet" and not _has_wordnet():
        return "needs WordNet (python -m nltk.downloader wordnet)"
    if "/" in needs:
        encoder = plan.encoder(name)
        if not is_hub_id(encoder) and not Path(encoder).is_dir():
            return f"has no encoder {encoder}: give a folder, or a model's name on the Hub, such as {needs}"
        if name not in (*options.metrics, *options.encoders):
            return f"downloads an encoder, {needs} (`{name}` {needs}, or a folder)"
        if name == "s_bert" and find_spec("sentence_transformers") is None:
            return 'needs sentence-transformers (pip install "minigpt3d[eval]")'
    return None


def _has_wordnet() -> bool:
    from nltk.corpus import wordnet

    try:
        wordnet.ensure_loaded()
    except LookupError:
        return False
    return True


def _check_judge(plan: EvaluationPlan):
    """
    Raises:
        ValueError: the judge has nothing to do, its prompts do not fit, or its earlier scores would be lost.
    """
    earlier = sorted({judge for judge in plan.earlier_judges.values() if judge})
    if plan.judge is None and earlier:
        raise ValueError(
            f"`out` {plan.folder.path} holds scores by the judge {', '.join(earlier)}. Give `judge` again (kept replies are "
            "not asked for again), or another folder."
        )
    prompts = plan.prompts()
    if plan.judge is not None and not prompts:
        raise ValueError(
            f"`judge` {plan.judge.name}: no judge is needed for {', '.join(plan.metrics)}. Leave it out, or name other `metrics`."
        )
    for name, text in plan.judge_prompts.items():
        if name not in prompts:
            raise ValueError(
                f"`judge_prompt` {name}: in this run of {plan.suite.name} the judge is only asked for {', '.join(sorted(prompts))}."
            )
        placeholders = dict.fromkeys(re.findall(r"\{[a-z]+\}", PROMPTS[name]))
        if missing := [placeholder for placeholder in placeholders if placeholder not in text]:
            raise ValueError(f"`judge_prompt` {name}: the text lacks the placeholder {' and '.join(missing)}.")


def _check_texts(plan: EvaluationPlan):
    """
    Raises:
        ValueError: classes or phrases cannot be used.
    """
    if "closed_set_accuracy" in plan.metrics and plan.labelled:
        class_namer(**plan.classes("label"))
    if plan.has_likelihoods:
        check_texts([name for names in plan.suite.classes.values() for name in names], plan.suite.phrases)
    elif plan.options.phrase:
        raise ValueError("`phrase`: likelihoods need a closed set of classes and a model.")
