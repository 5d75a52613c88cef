"""The report of a run: report.md, report.html and pictures, made from `Results` and the scored answers.

The HTML page contains its pictures and runs no script. Texts of models and judges are escaped.
"""

import base64
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader

from minigpt3d.files import write_bytes
from minigpt3d.model_card.words import CONDITIONS, escaped, interval, markdown_table, number

from .charts import draw_cloud, draw_confusion, draw_robustness, draw_scores
from .metrics.table import METRICS
from .results import Classes, JudgeFacts, Results, Score, ScoredAnswer, as_corruption, values_of
from .statistics import SIGNIFICANT, bootstrap, wilson
from .suites import BLIND, CONTROLS, NO_COLOR, SEEING, SHUFFLED


NUM_SHOWN = 10  # best and worst objects
POINTS_TITLE = "Each difference, and whether it is significant"
# What a control shows: if the main score of the objects as they are is significantly better, and if not.
READINGS = {
    BLIND: (
        "The geometry is used: with every point and color at zero, the main score is worse.",
        "The main score does not show that the geometry is used: with every point and color at zero, it is not significantly worse.",
    ),
    SHUFFLED: (
        "The answers belong to their objects: scored against another object, the main score is worse.",
        "The main score does not show that the answers belong to their objects: scored against another object, it is not significantly worse.",
    ),
    NO_COLOR: (
        "Color is used: without it, the main score is worse.",
        "The main score does not show that color is used: without it, it is not significantly worse.",
    ),
}


@dataclass
class Section:
    """A part of the report: sentences, a folded list, a table whose first row is its head, and pictures by name."""

    title: str
    words: list[str] = field(default_factory=list)
    points: list[str] = field(default_factory=list)
    table: list[list[str]] = field(default_factory=list)
    pictures: dict[str, bytes] = field(default_factory=dict)


def write_report(
    folder: Path, results: Results, answers: list[ScoredAnswer], read_cloud: Callable[[str], np.ndarray | None]
):
    """Write report.md, report.html and pictures/ into a run's folder; each file is written completely or not at all.

    Args:
        read_cloud: object_id → (N, 6), xyz and rgb in [0, 1]; None if there is no cloud to draw.

    Raises:
        ImportError: matplotlib is missing.
    """
    sections = [
        _scores(results),
        _differences(results),
        *_robustness(results, answers),
        *_classes(results, answers),
        _settings(results),
    ]
    title = f"{results.model.name}: {results.title}"
    best, worst, how_chosen = best_and_worst(results, answers)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.get_template("report.html.jinja").render(
        title=title,
        points_title=POINTS_TITLE,
        date=results.date,
        sections=sections,
        data_uri=_data_uri,
        how_chosen=how_chosen,
        groups={
            name: [_card(object_id, results, answers, read_cloud(object_id)) for object_id in chosen]
            for name, chosen in (("Best", best), ("Worst", worst))
        },
    )
    (folder / "pictures").mkdir(exist_ok=True)
    for section in sections:
        for name, picture in section.pictures.items():
            write_bytes(folder / "pictures" / f"{name}.png", picture)
    # A model's answer may contain half a surrogate pair, which UTF-8 cannot encode.
    write_bytes(folder / "report.md", to_markdown(title, sections).encode("utf-8", errors="replace"))
    write_bytes(folder / "report.html", page.encode("utf-8", errors="replace"))


def score_table(results: Results) -> str:
    """Scores with their controls, as lines for a terminal."""
    rows = _score_rows(results)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)


# ---- Sections -------------------------------------------------------------------------------------------------------


def _scores(results: Results) -> Section:
    section = Section("Scores", ["In brackets: 95 % intervals.", *results.cautions()], table=_score_rows(results))
    if picture := draw_scores(results):
        section.pictures["scores"] = picture
    return section


def _score_rows(results: Results) -> list[list[str]]:
    """Every score of the objects as they are, with its controls beside it."""
    by_key = results.by_key()
    controls = [control for control in CONTROLS if any(control in row for row in by_key.values())]
    judged = any(score.judge for score in results.seeing)
    head = ["question", "score", *(["judge"] if judged else []), *(CONDITIONS[name] for name in (SEEING, *controls))]
    rows = [[*head, "objects", "unparsed"]]
    for row in by_key.values():
        score = row[SEEING]
        name = score.about.title + (" (lower is better)" if score.about.lower_is_better else "")
        judge = [score.judge or "none"] if judged else []
        values = [str(row.get(condition, "–")) for condition in (SEEING, *controls)]
        rows.append([results.questions[score.question], name, *judge, *values])
        rows[-1] += [f"{score.objects:,}", f"{score.unparsed:,}"]
    return rows


def _differences(results: Results) -> Section:
    """What the controls say about the main score, and whether each difference is significant."""
    section, main = Section("What the numbers say"), results.main_score
    section.words.append(f"The main score, {results.name_of(main)}, is {main}.")
    about_main = {test.b: test for test in results.tests if test.a == SEEING and test.key == main.key}
    for control, (used, not_used) in READINGS.items():
        test = about_main.get(control)
        if test is None:
            continue
        if test.p >= SIGNIFICANT:
            others = [results.name_of(other) for other in results.tests if other.b == control and other.is_gain]
            section.words.append(not_used + (f" Other scores show it: {'; '.join(others)}." if others else ""))
        elif test.is_gain:
            section.words.append(used)
        else:
            section.words.append(f"Unexpected: {CONTROLS[control]}, the main score is better than as it is.")
    if BLIND not in about_main:
        section.words.append("There is no blind control, so it is unknown whether the geometry is used.")
    section.points = [f"{results.name_of(test)}: {test.words}" for test in results.tests]
    if len(results.tests) > 1:
        section.words.append(f"Each p is corrected for the {len(results.tests)} tests of this run (Holm).")
    section.words += _unparsed_and_cut(results)
    return section


def _unparsed_and_cut(results: Results) -> list[str]:
    words = []
    for score in results.seeing:
        if score.unparsed:
            reason = "no verdict came from the judge" if score.judge else "the answer names no class"
            words.append(
                f"{score.unparsed:,} of {score.objects:,} could not be read for {results.name_of(score)} ({reason}) and "
                "count as wrong."
            )
        if score.is_mute:
            words[-1] += " So this score says nothing about the model: use another judge, or allow it longer replies."
    words = words or ["Every answer could be read."]
    cut, count = results.generation.cut, results.generation.answers
    if cut is not None:  # unknown for another program's answers
        limit = f" of {results.decoding['max_new_tokens']} tokens" if results.decoding else ""
        reached = f"{cut:,} of {count:,} answers reached the limit{limit} and were cut."
        words.append(reached if cut else f"No answer reached the limit{limit}.")
    return words


def _robustness(results: Results, answers: list[ScoredAnswer]) -> list[Section]:
    """A section for each score that was also measured on corrupted objects: table, curves and one mean."""
    sections = []
    for (question, metric), row in results.by_key().items():
        corrupted = {corruption: score for condition, score in row.items() if (corruption := as_corruption(condition))}
        if not corrupted:
            continue
        seeing, title = row[SEEING], results.name_of(row[SEEING])
        by_name: dict[str, list[float]] = {}
        for (name, _), score in corrupted.items():
            by_name.setdefault(name, []).append(score.value)
        means = {name: float(np.mean(values)) for name, values in by_name.items()}
        severities = sorted({severity for _, severity in corrupted})
        section = Section(f"Robustness: {title}")
        section.table = [["corruption", *(f"severity {severity}" for severity in severities), "mean"]]
        for name, mean in means.items():
            scores = [corrupted.get((name, severity)) for severity in severities]
            cells = [number(score.value, score.unit) if score else "–" for score in scores]
            section.table.append([name.replace("_", " "), *cells, number(mean, seeing.unit)])
        conditions = [condition for condition in row if as_corruption(condition)]
        mean = _mean_in_words(seeing, list(corrupted.values()), _mean_by_object(answers, question, metric, conditions))
        hardest = (max if seeing.about.lower_is_better else min)(means, key=means.get)
        section.words = [f"{mean}. Hardest: {hardest.replace('_', ' ')}, {number(means[hardest], seeing.unit)}."]
        slug = re.sub(r"[^A-Za-z0-9_]+", "-", question).strip("-")
        section.pictures[f"robustness-{slug}-{metric}"] = draw_robustness(list(row.values()), title)
        sections.append(section)
    return sections


def _mean_in_words(seeing: Score, corrupted: list[Score], by_object: list[float]) -> str:
    mean, unit = float(np.mean([score.value for score in corrupted])), seeing.unit
    words = f"Over {len(corrupted)} corruptions and severities the mean is {number(mean, unit)}"
    if by_object and not seeing.about.is_ratio:
        words += f" {interval(*bootstrap(by_object), unit)}"
    if seeing.value > 0:
        words += f", {100 * mean / seeing.value:.0f} % of the {number(seeing.value, unit)} without corruption"
    return words


def _mean_by_object(answers: list[ScoredAnswer], question: str, metric: str, conditions: list[str]) -> list[float]:
    """Each object's mean over the conditions; empty if an object lacks one."""
    values = [values_of(answers, question, metric, condition) for condition in sorted(conditions)]
    if any(by_object.keys() != values[0].keys() for by_object in values):
        return []
    return np.mean([[by_object[i] for i in sorted(by_object)] for by_object in values], axis=0).tolist()


def _classes(results: Results, answers: list[ScoredAnswer]) -> list[Section]:
    """The main score by class, and the classes by likelihood if there are any."""
    main, classes = results.main_score, results.classes
    by_label = _main_score_by_label(main, answers, is_closed=classes is not None)
    if not by_label and not classes:
        return []
    names = classes.names if classes else []
    names = [*names, *sorted(set(by_label) - set(names))]
    section = Section("Classes", table=[["class", *([main.about.title] if by_label else [])]])
    for name in names:
        hits = by_label.get(name, [])
        section.table.append([name, *([_share(sum(hits), len(hits))] if by_label else [])])
    if classes:
        section.pictures["confusion"] = draw_confusion(classes.names, classes.confusion)
        section.words.append(_likelihoods_in_words(classes))
        section.table[0] += ["likelihood, top 1", "most often mistaken for"]
        for index, row in enumerate(np.array(classes.confusion)):
            wrong = np.where(np.arange(len(row)) == index, 0, row)
            most = f"{names[wrong.argmax()]} ({wrong.max():,})" if wrong.any() else "–"
            section.table[index + 1] += [_share(row[index], row.sum()), most]
        for line in section.table[len(classes.names) + 1 :]:
            line += ["–", "–"]
    section.words.append("With few objects in a class, its interval is wide: the shares by class are only hints.")
    return [section]


def _likelihoods_in_words(classes: Classes) -> str:
    """The shares, and the forms of the answer whose likelihoods were computed."""
    forms = [f"“{phrase.replace('{}', '…')}”" for phrase in classes.phrases]
    top_5 = "" if classes.top_5 is None else f", and {number(classes.top_5, 'share')} are among the first five"
    return (
        f"By the likelihood of each of {len(classes.names)} class names as the answer, {number(classes.top_1, 'share')} are "
        f"right{top_5}. This needs no judge and no parsing. "
    ) + (
        f"The answer has the form {forms[0]}; in another form the result may differ."
        if len(forms) == 1
        else f"For each class, the likelihoods of {len(forms)} forms of the answer are added up: {', '.join(forms)}."
    )


def _main_score_by_label(main: Score, answers: list[ScoredAnswer], is_closed: bool) -> dict[str, list[float]]:
    """{label: hits}; empty if the score is not a share of hits, or if there are too many labels for a table."""
    if not main.about.is_hit:
        return {}
    labels = {answer.object_id: answer.label for answer in answers if answer.label is not None}
    by_label: dict[str, list[float]] = {}
    for object_id, value in values_of(answers, *main.key).items():
        if object_id in labels:
            by_label.setdefault(labels[object_id], []).append(value)
    return by_label if is_closed or len(by_label) <= len(labels) / 2 else {}


def _share(hits: float, total: int) -> str:
    if not total:
        return "–"
    low, high = wilson(int(hits), int(total))
    return f"{int(hits)}/{int(total)} ({100 * low:.0f}–{100 * high:.0f} %)"


def _settings(results: Results) -> Section:
    """What is needed to repeat the run."""
    model, dataset, generation = results.model, results.dataset, results.generation
    of = f", the first of {dataset.of:,}" if dataset.objects < dataset.of else ""
    facts = {
        "command": results.command,
        "model": model.name,
        "parameters": model.parameters and f"{model.parameters:,}",
        "weights": model.fingerprint and f"fingerprint {model.fingerprint}, {model.dtype}",
        "objects": f"{dataset.objects:,} of {dataset.name}{of}, fingerprint {dataset.fingerprint}",
        "decoding": _listed(results.decoding) if results.decoding else "not known",
        "chat template": results.template or "not known",
        "seed": str(results.seed),
        "date": results.date,
        "versions": _listed(results.versions),
        "device": results.device,
        "speed": generation.objects_per_second
        and f"{generation.objects_per_second:.2f} objects/s, {generation.seconds:.0f} s in all",
        "encoders": _listed(results.encoders),
    } | (_judge_facts(results.judge) if results.judge else {})
    return Section("How it was made", table=[["setting", "value"], *([k, fact] for k, fact in facts.items() if fact)])


def _judge_facts(judge: JudgeFacts) -> dict[str, str]:
    cut = f", {judge.cut:,} of them cut off" if judge.cut else ""
    sampled = (
        f", {judge.sampled:,} sampled, since the model refuses temperature 0: replies may vary"
        if judge.sampled
        else ""
    )
    tokens = [
        "an unknown number of" if n is None else f"{n:,}" for n in (judge.prompt_tokens, judge.completion_tokens)
    ]
    cost = "unknown" if judge.cost is None else f"{judge.cost:.4f} US dollars"
    return {
        "judge": f"{judge.model}{' at ' + judge.endpoint if judge.endpoint else ''}, {judge.date}",
        "judge's prompts": _listed(judge.prompts, " sha256 "),
        "judge's use": f"{judge.replies:,} replies{cut}{sampled}; {tokens[0]} tokens in, {tokens[1]} out; cost {cost}",
        "judge as served": ", ".join(judge.served_models),
    }


def _listed(settings: dict, separator: str = " ") -> str:
    return ", ".join(f"{name}{separator}{value}" for name, value in settings.items())


# ---- Best and worst objects -----------------------------------------------------------------------------------------


def best_and_worst(results: Results, answers: list[ScoredAnswer]) -> tuple[list[str], list[str], str]:
    """The ids of the best and of the worst objects, and a sentence on how they were chosen.

    Sorted by the main score, then by the mean of the object's other shares, then by `object_id`. No object is in both lists.
    """
    main = results.main_score
    values = values_of(answers, *main.key)
    units = {score.key: score.unit for score in results.scores}
    others: dict[str, list[float]] = {object_id: [] for object_id in values}
    for answer in answers:
        if answer.condition == SEEING and answer.object_id in others:
            for metric, value in answer.scores.items():
                key = (answer.question, metric)
                if key != main.key and units[key] == "share":
                    others[answer.object_id].append(value)
    sign = -1 if main.about.lower_is_better else 1
    goodness = {i: (sign * value, np.mean(others[i]) if others[i] else 0.0) for i, value in values.items()}
    in_order = sorted(goodness)  # sorting is stable: ties keep this order
    half = -(-len(in_order) // 2)
    best = sorted(in_order, key=goodness.get, reverse=True)[: min(NUM_SHOWN, half)]
    worst = [object_id for object_id in sorted(in_order, key=goodness.get) if object_id not in best][:NUM_SHOWN]
    counts = Counter(values.values())
    highest, lowest = counts[max(counts)], counts[min(counts)]
    how_chosen = (
        f"By {results.name_of(main)}; ties by the mean of the object's other scores, then by name. "
        f"{highest:,} of {len(values):,} objects have the highest score, {lowest:,} the lowest."
    )
    return best, worst, how_chosen


def _card(object_id: str, results: Results, answers: list[ScoredAnswer], cloud: np.ndarray | None) -> dict:
    """What the page shows of an object: picture, references, and answers with scores and the judge's replies."""
    shown = [answer for answer in answers if answer.object_id == object_id and answer.condition == SEEING]
    shown.sort(key=lambda answer: answer.question != results.main_score.question)
    units = {score.key: score.unit for score in results.scores}
    return {
        "object_id": object_id,
        "picture": None if cloud is None else draw_cloud(cloud),
        "truth": shown[0],
        "answers": [
            {
                "text": answer,
                "scores": {
                    METRICS[metric].title: _object_score(metric, value, units[answer.question, metric])
                    for metric, value in answer.scores.items()
                },
                "reasons": {METRICS[metric].title: reason for metric, reason in answer.reasons.items() if reason},
            }
            for answer in shown
        ],
    }


def _object_score(metric: str, value: float, unit: str) -> str:
    if METRICS[metric].is_hit:
        return "right" if value else "wrong"
    return f"{value:.0f}" if unit == "count" else number(value, unit)


# ---- Writing --------------------------------------------------------------------------------------------------------


def to_markdown(title: str, sections: list[Section]) -> str:
    """The text of report.md, with links to the pictures."""
    parts = [f"# {escaped(title)}"]
    for section in sections:
        parts += [f"## {escaped(section.title)}", *map(escaped, section.words)]
        if section.points:
            points = "\n".join(f"- {escaped(point)}" for point in section.points)
            parts.append(f"<details><summary>{POINTS_TITLE}</summary>\n\n{points}\n\n</details>")
        parts += [f"![{escaped(section.title)}](pictures/{name}.png)" for name in section.pictures]
        parts += [markdown_table(section.table)] if section.table else []
    return "\n\n".join(parts) + "\n"


def _data_uri(picture: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(picture).decode("ascii")
