"""Compare runs with each other, and with published scores of the same suite, prompt, metric and judge.

There is one table per judge model, since scores of different judges are different measures.
"""

import json
from collections import Counter
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

import numpy as np

from minigpt3d.files import read_json
from minigpt3d.model_card.words import escaped, interval, markdown_table, number, same_judge

from .metrics import PROMPTS
from .metrics.table import METRICS
from .results import Results, ScoredAnswer, hash_prompt, values_of
from .run_folder import RunFolder
from .statistics import bootstrap, holm, in_words, paired_difference


PUBLISHED_FILE = Path(__file__).with_name("published.json")
JudgeKey = tuple[tuple[str, ...], str] | None  # see `Results.judge_of`


@dataclass(frozen=True)
class Run:
    name: str
    results: Results
    answers: list[ScoredAnswer]

    def prompt(self, question: str) -> str:
        return self.results.questions[question].strip()

    def values(self, question: str, metric: str) -> dict[str, float]:
        return values_of(self.answers, question, metric)


@dataclass
class Cell:
    """A score in a table: of a run's question (empty for a mean over several), or from a published `source`."""

    value: float
    low: float | None = None
    high: float | None = None
    question: str = ""
    objects: int = 0
    unparsed: int = 0
    source: str = ""

    def text(self, unit: str) -> str:
        if self.source:  # as printed
            return f"{self.value:.2f}{' %' if unit == 'share' else ''} (no interval)"
        unparsed = f", {self.unparsed:,} of {self.objects:,} unparsed" if self.unparsed else ""
        return f"{number(self.value, unit)} {interval(self.low, self.high, unit)}{unparsed}"


@dataclass
class Row:
    """Scores of one metric by column; of several prompts, the mean. `variant` as in `Results.variant_of`."""

    prompts: tuple[str, ...]
    metric: str
    variant: str | None
    cells: dict[str, Cell] = field(default_factory=dict)

    @property
    def title(self) -> str:
        return METRICS[self.metric].title + (f" ({self.variant})" if self.variant else "")

    @property
    def is_published(self) -> bool:
        return any(cell.source for cell in self.cells.values())


@dataclass
class RunTest:
    """A paired test of the runs `a` and `b`, with p corrected for the number of tests in the table (Holm)."""

    row: Row
    a: str
    b: str
    difference: float
    low: float
    high: float
    p: float
    test: str
    words: str = ""


@dataclass
class Table:
    """Runs of one suite, scored by one judge (None: without a judge)."""

    suite: str
    judge: str | None
    runs: list[Run]
    columns: list[str]
    rows: list[Row]
    tests: list[RunTest] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def compare(folders: list[str | Path]) -> str:
    """The comparison of finished runs as Markdown; see `tabulate`."""
    return to_markdown(*tabulate(folders))


def tabulate(folders: list[str | Path]) -> tuple[list[Run], list[Table]]:
    """The runs and a table for each suite and judge.

    Raises:
        ValueError: no folder, a repeated one, or one without a finished run.
    """
    if not folders:
        raise ValueError("there is nothing to compare: expected folders of finished runs, got none.")
    folders = [Path(folder) for folder in folders]
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ValueError(f"a run is given twice: {', '.join(map(str, folders))}. Give each folder once.")
    contents = [RunFolder(folder).read() for folder in folders]
    names = _names(folders, [results.model.name for results, _ in contents])
    runs = [Run(name, *content) for name, content in zip(names, contents, strict=True)]
    keys = {(run.results.suite, run.results.judge_of(score)) for run in runs for score in run.results.scores}
    return runs, [_table(suite, judge, runs) for suite, judge in sorted(keys, key=lambda key: (key[0], key[1] or ()))]


def _names(folders: list[Path], names: list[str]) -> list[str]:
    """The shortest names that distinguish the runs."""
    for suffixes in ([folder.name for folder in folders], folders):
        counts = Counter(names)
        names = [f"{n} ({suffix})" if counts[n] > 1 else n for n, suffix in zip(names, suffixes, strict=True)]
    return names


def _table(suite: str, judge: JudgeKey, runs: list[Run]) -> Table:
    rows: dict[tuple, Row] = {}
    columns, judge_name = {}, None
    for run in (run for run in runs if run.results.suite == suite):
        for score in run.results.seeing:
            if run.results.judge_of(score) == judge:
                judge_name = judge_name or score.judge
                key = ((run.prompt(score.question),), score.metric, run.results.variant_of(score))
                cell = Cell(score.value, score.low, score.high, score.question, score.objects, score.unparsed)
                rows.setdefault(key, Row(*key)).cells[run.name] = cell
                columns[run.name] = run
    runs = list(columns.values())
    published = _add_published(rows, suite, judge, runs)
    table = Table(suite, judge and _name_judge(judge_name, *judge), runs, [*columns, *published], list(rows.values()))
    _add_tests(table)
    _add_notes(table)
    return table


def _name_judge(name: str, served: tuple[str, ...], files: str) -> str:
    """A judge's name, and what distinguishes it from others of that name."""
    if served != (same_judge(name),):
        return f"{name} (served by {', '.join(served)})"
    return f"{name} (files {files})" if files else name


def _add_published(rows: dict[tuple, Row], suite: str, judge: JudgeKey, runs: list[Run]) -> list[str]:
    """Add published scores to the rows they are comparable with; returns the names of their columns."""
    published = read_json(PUBLISHED_FILE)
    columns = {}
    for line in published["rows"]:
        if line["suite"] != suite or (line["judge"] and (same_judge(line["judge"]),)) != (judge and judge[0]):
            continue
        prompts, metric = tuple(published["prompts"][prompt] for prompt in line["prompts"]), line["metric"]
        if len(prompts) > 1:
            _add_mean(rows, prompts, metric, runs)
        if row := rows.get((prompts, metric, None)):
            for model, (value, source) in line["scores"].items():
                row.cells[f"{model}, published"] = Cell(value, source=published["sources"][source])
                columns[f"{model}, published"] = None
    return list(columns)


def _add_mean(rows: dict[tuple, Row], prompts: tuple[str, ...], metric: str, runs: list[Run]):
    """A row for the mean over several prompts, of runs that answered all of them about the same objects."""
    key = (prompts, metric, None)
    singles = [rows.get(((prompt,), metric, None), Row((prompt,), metric, None)) for prompt in prompts]
    for run in runs:
        if any(run.name not in single.cells for single in singles):
            continue
        values = [run.values(single.cells[run.name].question, metric) for single in singles]
        if any(by_object.keys() != values[0].keys() for by_object in values):
            continue
        means = [np.mean([by_object[object_id] for by_object in values]) for object_id in sorted(values[0])]
        rows.setdefault(key, Row(*key)).cells[run.name] = Cell(float(np.mean(means)), *bootstrap(means))


def _add_tests(table: Table):
    """Test each pair of runs in each row, or note why they are not comparable."""
    for row in table.rows:
        if len(row.prompts) > 1 or METRICS[row.metric].is_ratio:
            continue
        for pair in combinations([run for run in table.runs if run.name in row.cells], 2):
            names = [run.name for run in pair]
            a, b = (run.values(row.cells[run.name].question, row.metric) for run in pair)
            if a.keys() != b.keys() or len({run.results.dataset.fingerprint for run in pair}) > 1:
                table.notes.append(f"{' and '.join(names)} have different objects: their difference is not tested.")
            elif table.judge and len({run.results.prompt_hash(row.metric) for run in pair}) > 1:
                table.notes.append(
                    f"{METRICS[row.metric].title}: {' and '.join(names)} were judged with different prompts. These are "
                    "different measures, so their difference is not tested."
                )
            else:
                a, b = (np.array([values[object_id] for object_id in sorted(values)]) for values in (a, b))
                table.tests.append(RunTest(row, *names, **paired_difference(a, b)))
    for test, p in zip(table.tests, holm([test.p for test in table.tests]), strict=True):
        test.p = p
        unit = METRICS[test.row.metric].unit
        test.words = in_words(test.difference, test.low, test.high, p, unit, test.a, test.b)
    table.notes = list(dict.fromkeys(table.notes))


def _add_notes(table: Table):
    """Note differences between the runs, and between them and the published scores."""
    for title, field_name in (("decoding", "decoding"), ("chat template", "template")):
        settings = [getattr(run.results, field_name) for run in table.runs]
        if len({json.dumps(value, sort_keys=True) for value in settings if value is not None}) > 1:
            table.notes.append(f"The runs differ in their {title}.")
    published = [row.metric for row in table.rows if row.is_published]
    if not published:
        return
    table.notes.append("Published scores come without intervals, so no difference from them is tested.")
    if table.judge is not None:
        names_by_prompt: dict[str, list[str]] = {}
        for run in table.runs:
            is_ours = any(_has_our_prompt(run.results, metric) for metric in published)
            prompt = "this project's prompt" if is_ours else "a prompt of the user"
            names_by_prompt.setdefault(prompt, []).append(run.name)
        judged = ", ".join(f"{' and '.join(names)} with {prompt}" for prompt, names in names_by_prompt.items())
        table.notes.append(
            f"Published scores were judged with PointLLM's prompts, {judged}: scores by different prompts are different "
            "measures."
        )


def _has_our_prompt(results: Results, metric: str) -> bool:
    return results.prompt_hash(metric) == hash_prompt(PROMPTS[METRICS[metric].prompt])


# ---- As Markdown ----------------------------------------------------------------------------------------------------


def to_markdown(runs: list[Run], tables: list[Table]) -> str:
    """Runs and tables as Markdown."""
    lines = [["run", "suite", "objects", "date", "template", "decoding", "judge"]]
    for run in runs:
        results = run.results
        decoding = ", ".join(f"{name} {value}" for name, value in results.decoding.items()) if results.decoding else ""
        judge = f"{results.judge.model}, {results.judge.date}" if results.judge else "none"
        objects = f"{results.dataset.objects:,}"
        lines.append([run.name, results.suite, objects, results.date, results.template or "not known"])
        lines[-1] += [decoding or "not known", judge]
    return (
        "\n\n".join(["# Comparison", markdown_table(lines), *(part for table in tables for part in _parts(table))])
        + "\n"
    )


def _parts(table: Table) -> list[str]:
    parts = [f"## {table.suite}, {'judge ' + escaped(table.judge) if table.judge else 'without a judge'}"]
    parts.append("Objects as they are; in brackets 95 % intervals.")
    lines = [["prompt", "score", *table.columns]]
    sources: dict[str, dict[str, None]] = {}
    for row in table.rows:
        prompts = " and ".join(f"“{prompt}”" for prompt in row.prompts)
        cells = [row.cells[c].text(METRICS[row.metric].unit) if c in row.cells else "–" for c in table.columns]
        lines.append([f"mean of {prompts}" if len(row.prompts) > 1 else prompts, row.title, *cells])
        for column, cell in row.cells.items():
            if cell.source:
                sources.setdefault(cell.source, {})[column] = None
    parts.append(markdown_table(lines))
    if table.tests:
        tests = [f"{test.row.title}, “{test.row.prompts[0]}”: {test.words}" for test in table.tests]
        parts.append(f"Differences, p corrected for {len(tests)} comparisons (Holm):")
        parts.append("\n".join(f"- {escaped(test)}" for test in tests))
    notes = table.notes + [f"{'; '.join(columns)}: {source}." for source, columns in sources.items()]
    if notes:
        parts.append("\n".join(f"- {escaped(note)}" for note in notes))
    return parts
