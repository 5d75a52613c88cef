"""The record of a run: `Results`, which results.json holds, and `ScoredAnswer`, the lines of objects.jsonl."""

import hashlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields

from minigpt3d.model_card.words import interval, number, same_judge

from .metrics.table import METRICS, Metric
from .statistics import CONFIDENCE, SIGNIFICANT
from .suites import SEEING, SUITES


SCHEMA = 2
FEW_OBJECTS = 20  # with fewer, intervals and tests are unreliable


@dataclass
class Score:
    """The score of the answers to one question under one condition by one metric, with its 95 % interval."""

    question: str
    condition: str
    metric: str
    value: float
    low: float
    high: float
    unit: str
    objects: int
    unparsed: int
    judge: str | None
    interval: str

    @property
    def about(self) -> Metric:
        return METRICS[self.metric]

    @property
    def key(self) -> tuple[str, str]:
        return self.question, self.metric

    @property
    def is_mute(self) -> bool:
        """Whether the judge gave no verdict at all, so that the score says nothing about the model."""
        return bool(self.judge) and self.unparsed == self.objects

    def __str__(self) -> str:
        return f"{number(self.value, self.unit)} {interval(self.low, self.high, self.unit)}"


@dataclass
class ControlTest:
    """A paired test of the objects as they are, `a`, against a control, `b`."""

    question: str
    metric: str
    a: str
    b: str
    difference: float
    low: float
    high: float
    p: float
    test: str
    words: str = ""

    @property
    def key(self) -> tuple[str, str]:
        return self.question, self.metric

    @property
    def is_gain(self) -> bool:
        """Whether `a` is significantly better than `b`."""
        gain = -self.difference if METRICS[self.metric].lower_is_better else self.difference
        return self.p < SIGNIFICANT and gain > 0


@dataclass
class ScoredAnswer:
    """An answer about one object, its references, and its scores and the judge's replies by metric."""

    object_id: str
    question: str
    prompt: str
    condition: str
    answer: str
    label: str | None
    caption: str | None
    color: str | None
    scores: dict[str, float] = field(default_factory=dict)
    reasons: dict[str, str | None] = field(default_factory=dict)


@dataclass
class ModelFacts:
    name: str
    fingerprint: str
    parameters: int | None
    dtype: str | None


@dataclass
class Generation:
    """All answers of the folder; None where another program's answers lack the number."""

    answers: int
    new_tokens: int | None
    seconds: float
    objects_per_second: float | None
    cut: int | None


@dataclass
class JudgeFacts:
    """The judge, the hashes of its prompts, and its usage; see `Judge.sum_up`."""

    model: str
    files: str | None
    prompts: dict[str, str]
    replies: int
    cut: int
    sampled: int
    date: str
    endpoint: str | None
    served_models: list[str]
    prompt_tokens: int | None
    completion_tokens: int | None
    cost: float | None


@dataclass
class Dataset:
    """`objects` of the `of` objects that the suite has, and the number of different `labels`."""

    name: str
    objects: int
    of: int
    fingerprint: str
    labels: int


@dataclass
class Classes:
    """Classes by likelihood: `confusion[i][j]` objects of class i have the most likely class j."""

    question: str
    method: str
    phrases: list[str]
    names: list[str]
    confusion: list[list[int]]
    top_1: float
    top_5: float | None = None  # not computed for five classes or fewer


@dataclass
class Results:
    """The content of results.json."""

    suite: str
    title: str
    date: str
    command: str
    versions: dict[str, str]
    device: str | None
    seed: int
    model: ModelFacts
    decoding: dict | None
    template: str | None
    batch_size: int | None
    questions: dict[str, str]
    generation: Generation
    encoders: dict[str, str]
    judge: JudgeFacts | None
    dataset: Dataset
    not_scored: dict[str, str]
    scores: list[Score]
    tests: list[ControlTest]
    classes: Classes | None

    def to_json(self) -> dict:
        """The content of results.json, with the facts about its metrics that readers of the file need."""
        content = asdict(self)
        for line, test in zip(content["tests"], self.tests, strict=True):
            line["gain"] = test.is_gain
        if self.classes is not None and self.classes.top_5 is None:
            del content["classes"]["top_5"]
        keys = ("title", "unit", "lower_is_better", "is_ratio", "prompt")
        names = dict.fromkeys(score.metric for score in self.scores)
        metrics = {name: {key: getattr(METRICS[name], key) for key in keys} for name in names}
        return {"schema": SCHEMA, "metrics": metrics, "confidence": CONFIDENCE, "few_objects": FEW_OBJECTS} | content

    @classmethod
    def from_json(cls, content: dict) -> "Results":
        """
        Raises:
            KeyError, TypeError: a field is missing or unknown.
        """
        content = {item.name: content[item.name] for item in fields(cls)}
        for name, record in (("model", ModelFacts), ("generation", Generation), ("judge", JudgeFacts)):
            content[name] = content[name] and record(**content[name])
        content["dataset"] = Dataset(**content["dataset"])
        content["classes"] = content["classes"] and Classes(**content["classes"])
        content["scores"] = [Score(**line) for line in content["scores"]]
        content["tests"] = [ControlTest(**{k: v for k, v in line.items() if k != "gain"}) for line in content["tests"]]
        return cls(**content)

    @property
    def seeing(self) -> list[Score]:
        """Scores of the objects as they are."""
        return [score for score in self.scores if score.condition == SEEING]

    @property
    def main_score(self) -> Score:
        """The score of the suite's main metric; of several questions, that of the first.

        Raises:
            ValueError: there is no score of the objects as they are.
        """
        if not self.seeing:
            raise ValueError(f"the {self.suite} run has no score of the objects as they are, so it has no main score.")
        metrics, questions = list(METRICS), list(self.questions)
        return min(self.seeing, key=lambda score: (metrics.index(score.metric), questions.index(score.question)))

    def name_of(self, score: Score | ControlTest) -> str:
        """The metric's title and the question."""
        return f"{METRICS[score.metric].title}, “{self.questions[score.question].strip()}”"

    def by_key(self) -> dict[tuple[str, str], dict[str, Score]]:
        """{(question, metric): {condition: score}}, if there is a score of the objects as they are."""
        rows: dict[tuple[str, str], dict[str, Score]] = {}
        for score in self.scores:
            rows.setdefault(score.key, {})[score.condition] = score
        return {key: row for key, row in rows.items() if SEEING in row}

    def cautions(self) -> list[str]:
        """Limits of all numbers of the run."""
        words, dataset = [], self.dataset
        if dataset.objects < dataset.of:
            words.append(
                f"Only the first {dataset.objects:,} of {dataset.of:,} objects were evaluated: this is not a result of the complete suite."
            )
        if any(score.objects < FEW_OBJECTS for score in self.scores):
            words.append(
                f"With fewer than {FEW_OBJECTS} objects, only the largest differences are significant, and the intervals of "
                "scores other than accuracies are too narrow: do not rely on them."
            )
        if dataset.labels == 1:
            words.append("All labels are the same: an accuracy is only the share of answers that name this label.")
        return words

    def prompt_hash(self, metric: str) -> str | None:
        """Hash of the prompt that the judge scored a metric with."""
        return self.judge.prompts.get(METRICS[metric].prompt) if self.judge else None

    def judge_of(self, score: Score) -> tuple[tuple[str, ...], str] | None:
        """What identifies the judge of a score, None without one. Scores of different judges are different measures.

        An endpoint may serve a model under another name than the requested one, and local folders of one name may hold
        different files.
        """
        if not score.judge:
            return None
        served = tuple(sorted({same_judge(name) for name in self.judge.served_models}))
        return served or (same_judge(score.judge),), self.judge.files or ""

    def variant_of(self, score: Score) -> str | None:
        """The encoder or the phrases if they are not the default ones, which makes the score a different measure."""
        if encoder := self.encoders.get(score.metric):
            return None if same_judge(encoder) == same_judge(score.about.needs) else encoder
        if score.about.function or not self.classes:
            return None
        phrases = tuple(self.classes.phrases)
        return None if phrases == SUITES[self.suite].phrases else ", ".join(f"“{phrase}”" for phrase in phrases)


def values_of(
    answers: Iterable[ScoredAnswer], question: str, metric: str, condition: str = SEEING
) -> dict[str, float]:
    """{object_id: score} of one metric, in the order of the answers, without objects that lack the score."""
    return {
        answer.object_id: answer.scores[metric]
        for answer in answers
        if answer.question == question and answer.condition == condition and metric in answer.scores
    }


def as_corruption(condition: str) -> tuple[str, int] | None:
    """ "jitter-3" → ("jitter", 3); None for other conditions."""
    name, dash, severity = condition.rpartition("-")
    return (name, int(severity)) if dash and severity.isdecimal() else None


def hash_prompt(text: str) -> str:
    """Hash by which results identify a judge's prompt."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]
