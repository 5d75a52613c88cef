"""A run for people: `report.md`, `report.html` and pictures, all made from `results.json` and `objects.jsonl`.

The page holds everything itself, pictures too, and runs no script. What a model or a judge said is escaped.
"""

import base64
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader

from minigpt3d.model_card.words import escaped, interval, markdown_table, number, with_interval

from .charts import draw_cloud, draw_confusion, draw_robustness, draw_scores
from .conditions import BLIND, CONTROLS, NO_COLOR, SEEING, SHUFFLED
from .results import as_corruption, cautions, is_gain, is_mute, main_score, read_objects, read_results, values_of
from .statistics import SIGNIFICANT, bootstrap, wilson
from .suites import METRICS


NUM_SHOWN = 10  # best and worst objects
POINTS_TITLE = "Each difference, and whether it is more than noise"
# What a control tells: where the objects as they are do better, and where they do not.
READINGS = {
    BLIND: (
        "The geometry is used: with every point and color at zero the main score is worse.",
        "The main score does not show that the geometry is used: with every point and color at zero it cannot be told from this one.",
    ),
    SHUFFLED: (
        "The answers belong to their objects: scored against another object, the main score is worse.",
        "The main score does not show that the answers belong to their objects: scored against another object, it cannot be told from this one.",
    ),
    NO_COLOR: (
        "Color is used: without it the main score is worse.",
        "The main score does not show that color is used: without it, it cannot be told from this one.",
    ),
}


@dataclass
class Section:
    """A part of the report: sentences, a table whose first row is its head, and names of pictures."""

    title: str
    words: list[str] = field(default_factory=list)
    points: list[str] = field(default_factory=list)
    table: list[list[str]] = field(default_factory=list)
    pictures: list[str] = field(default_factory=list)


def write_report(out: Path, read_cloud: Callable[[str], np.ndarray | None]):
    """Write `report.md`, `report.html` and `pictures/` into a run's folder; each file appears whole or not at all.

    Args:
        out: with `results.json` and `objects.jsonl`.
        read_cloud: object_id → (N, 6), xyz and rgb in [0, 1]; None where there is no cloud to draw.

    Raises:
        ValueError: the folder is no finished run.
        ImportError: matplotlib is missing.
    """
    out = Path(out)
    results, rows = read_results(out), read_objects(out)
    pictures = {}
    sections = [
        _scores(results, pictures),
        _differences(results),
        *_robustness(results, rows, pictures),
        *_classes(results, rows, pictures),
        _settings(results),
    ]
    title = f"{results['model']['name']}: {results['title']}"
    best, worst, about = best_and_worst(results, rows)
    template = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    ).get_template("report.html.jinja")
    page = template.render(
        title=title,
        points_title=POINTS_TITLE,
        date=results["date"],
        sections=sections,
        pictures={name: _data_uri(picture) for name, picture in pictures.items()},
        about=about,
        groups=[
            (name, [_card(object_id, results, rows, read_cloud) for object_id in chosen])
            for name, chosen in (("Best", best), ("Worst", worst))
        ],
    )
    (out / "pictures").mkdir(exist_ok=True)
    for name, picture in pictures.items():
        _write(out / "pictures" / f"{name}.png", picture)
    # What a model said may hold half a surrogate pair, which no file can.
    _write(out / "report.md", to_markdown(title, sections).encode("utf-8", errors="replace"))
    _write(out / "report.html", page.encode("utf-8", errors="replace"))


def score_table(results: dict) -> str:
    """Scores with their controls, as lines for a terminal."""
    rows = _scores(results, {}).table
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)


# ---- Sections -------------------------------------------------------------------------------------------------------


def _scores(results: dict, pictures: dict[str, bytes]) -> Section:
    """Every score of the objects as they are, with its controls beside it."""
    section = Section("Scores", words=["In brackets: 95 % intervals.", *cautions(results)])
    by_row = _by_question_and_metric(results)
    controls = [control for control in CONTROLS if any(control in row for row in by_row.values())]
    judged = any(row[SEEING]["judge"] for row in by_row.values())
    section.table = [
        ["question", "score", *(["judge"] if judged else []), "as it is", *(CONTROLS[c] for c in controls)]
        + ["objects", "unparsed"]
    ]
    for (question, metric), row in by_row.items():
        seeing = row[SEEING]
        name = METRICS[metric].title + (" (lower is better)" if METRICS[metric].lower_is_better else "")
        section.table.append(
            [results["questions"][question], name, *([seeing["judge"] or "none"] if judged else [])]
            + [with_interval(row[condition]) if condition in row else "–" for condition in (SEEING, *controls)]
            + [f"{seeing['objects']:,}", f"{seeing['unparsed']:,}"]
        )
    if picture := draw_scores(results):
        pictures["scores"] = picture
        section.pictures.append("scores")
    return section


def _differences(results: dict) -> Section:
    """What the controls say about the main score, and about each difference whether it is noise."""
    section = Section("What the numbers say")
    main, tests = main_score(results), results["tests"]
    section.words.append(f"The main score, {_named(results, main)}, is {with_interval(main)}.")
    about_main = {test["b"]: test for test in tests if test["a"] == SEEING and _key(test) == _key(main)}
    for control, (used, not_used) in READINGS.items():
        if control not in about_main:
            continue
        test = about_main[control]
        if test["p"] >= SIGNIFICANT:
            others = [_named(results, each) for each in tests if each["b"] == control and is_gain(each)]
            section.words.append(not_used + (f" Others show it: {'; '.join(others)}." if others else ""))
        elif is_gain(test):
            section.words.append(used)
        else:
            section.words.append(f"Unexpected: {CONTROLS[control]}, the main score is better than as it is.")
    if BLIND not in about_main:
        section.words.append("There is no blind control, so nothing here says whether the geometry is used.")
    section.points = [f"{_named(results, test)}: {test['words']}" for test in tests]
    if len(tests) > 1:
        section.words.append(f"Each p is corrected for the {len(tests)} comparisons that are made here (Holm).")
    section.words += _unparsed_and_cut(results)
    return section


def _unparsed_and_cut(results: dict) -> list[str]:
    unparsed = [score for score in results["scores"] if score["unparsed"] and score["condition"] == SEEING]
    words = [
        f"{score['unparsed']:,} of {score['objects']:,} could not be read for {_named(results, score)} "
        f"({'no verdict came from the judge' if score['judge'] else 'the answer names no class'}) and count as wrong."
        + (
            " So this number says nothing of the model: take another judge, or --judge-max-tokens."
            if is_mute(score)
            else ""
        )
        for score in unparsed
    ]
    if not unparsed:
        words = ["Every answer could be read."]
    if (generation := results["generation"]) and generation["cut"] is not None:  # not known of others' answers
        limit = f" of {results['decoding']['max_new_tokens']} tokens" if results["decoding"] else ""
        words.append(
            f"{generation['cut']:,} of {generation['answers']:,} answers reached the limit{limit} and were cut."
            if generation["cut"]
            else f"No answer reached the limit{limit}."
        )
    return words


def _robustness(results: dict, rows: list[dict], pictures: dict[str, bytes]) -> list[Section]:
    """A section for each score that was also measured on corrupted objects: curves, table and one figure."""
    sections = []
    for (question, metric), row in _by_question_and_metric(results).items():
        corrupted = {corruption: score for condition, score in row.items() if (corruption := as_corruption(condition))}
        if not corrupted:
            continue
        seeing, unit = row[SEEING], row[SEEING]["unit"]
        title = _named(results, seeing)
        names = list(dict.fromkeys(name for name, _ in corrupted))
        severities = sorted({severity for _, severity in corrupted})
        means = {name: np.mean([s["value"] for (other, _), s in corrupted.items() if other == name]) for name in names}
        section = Section(f"Robustness: {title}")
        section.table = [["corruption", *(f"severity {severity}" for severity in severities), "mean"]] + [
            [name.replace("_", " ")]
            + [number(corrupted[name, s]["value"], unit) if (name, s) in corrupted else "–" for s in severities]
            + [number(means[name], unit)]
            for name in names
        ]
        overall = np.mean([score["value"] for score in corrupted.values()])
        sentence = f"Over {len(corrupted)} corruptions and severities the mean is {number(overall, unit)}"
        by_object = _mean_by_object(rows, question, metric, set(row) - {SEEING, *CONTROLS})
        if not METRICS[metric].is_ratio and by_object:
            sentence += f" {interval(*bootstrap(by_object), unit)}"
        if seeing["value"] > 0:
            sentence += (
                f", {100 * overall / seeing['value']:.0f} % of the {number(seeing['value'], unit)} without corruption"
            )
        worst = (max if METRICS[metric].lower_is_better else min)(names, key=means.get)
        section.words = [f"{sentence}. Hardest: {worst.replace('_', ' ')}, {number(means[worst], unit)}."]
        name = f"robustness-{_slug(question)}-{metric}"
        pictures[name] = draw_robustness(list(row.values()), title)
        section.pictures.append(name)
        sections.append(section)
    return sections


def _mean_by_object(rows: list[dict], question: str, metric: str, conditions: set[str]) -> list[float]:
    """Each object's mean over the conditions; nothing if an object lacks one."""
    values = {condition: values_of(rows, question, metric, condition) for condition in sorted(conditions)}
    objects = {frozenset(found) for found in values.values()}
    if len(objects) != 1:
        return []
    return np.mean([[found[object_id] for object_id in sorted(found)] for found in values.values()], axis=0).tolist()


def _classes(results: dict, rows: list[dict], pictures: dict[str, bytes]) -> list[Section]:
    """The main score by class, and beside it the class by likelihood where that was measured."""
    main, classes = main_score(results), results["classes"]
    answered = _main_score_by_label(main, rows, is_closed=classes is not None)
    if not answered and not classes:
        return []
    names = classes["names"] if classes else []
    names = [*names, *sorted(set(answered) - set(names))]
    section = Section("Classes", table=[["class", *([METRICS[main["metric"]].title] if answered else [])]])
    for name in names:
        hits = answered.get(name, [])
        section.table.append([name, *([_share(sum(hits), len(hits))] if answered else [])])
    if classes:
        pictures["confusion"] = draw_confusion(classes["names"], classes["confusion"])
        section.pictures.append("confusion")
        first_five = (
            f", and {number(classes['top_5'], 'share')} are among the first five" if "top_5" in classes else ""
        )
        section.words.append(
            f"By the likelihood of each of {len(classes['names'])} class names as the answer, "
            f"{number(classes['top_1'], 'share')} are right{first_five}. This needs no judge and no parsing. "
            f"{_forms(classes['phrases'])}"
        )
        section.table[0] += ["likelihood, top 1", "most often mistaken for"]
        for own, taken in enumerate(np.array(classes["confusion"])):
            wrong = np.where(np.arange(len(taken)) == own, 0, taken)
            most = f"{names[wrong.argmax()]} ({wrong.max():,})" if wrong.any() else "–"
            section.table[own + 1] += [_share(taken[own], taken.sum()), most]
        for line in section.table[len(classes["names"]) + 1 :]:
            line += ["–", "–"]
    section.words.append("With few objects in a class its interval is wide: read the classes as hints.")
    return [section]


def _forms(phrases: list[str]) -> str:
    """In which forms of an answer a class was looked for: in others a model may know more, or less."""
    said = [f"“{phrase.replace('{}', '…')}”" for phrase in phrases]
    if len(said) == 1:
        return f"The answer was to be {said[0]}; in another form the model may know more, or less."
    return f"Of each class {len(said)} forms of the answer count together: {', '.join(said)}."


def _main_score_by_label(main: dict, rows: list[dict], is_closed: bool) -> dict[str, list[float]]:
    """{label: hits}; nothing where the score is no hit or miss, or where labels are no classes but say each its own."""
    if not METRICS[main["metric"]].is_hit:
        return {}
    labels = {row["object_id"]: row["label"] for row in rows if row["label"] is not None}
    by_label = {}
    for object_id, value in values_of(rows, main["question"], main["metric"]).items():
        if object_id in labels:
            by_label.setdefault(labels[object_id], []).append(value)
    return by_label if is_closed or len(by_label) <= len(labels) / 2 else {}


def _share(hits: float, total: int) -> str:
    if not total:
        return "–"
    low, high = wilson(int(hits), int(total))
    return f"{int(hits)}/{int(total)} ({100 * low:.0f}–{100 * high:.0f} %)"


def _settings(results: dict) -> Section:
    """Everything that one needs to repeat the run."""
    model, dataset, decoding, judge = (results[key] for key in ("model", "dataset", "decoding", "judge"))
    of = f", the first of {dataset['of']:,}" if dataset["objects"] < dataset["of"] else ""
    facts = {
        "command": results["command"],
        "model": model["name"],
        "parameters": model["parameters"] and f"{model['parameters']:,}",
        "weights": model["fingerprint"] and f"fingerprint {model['fingerprint']}, {model['dtype']}",
        "objects": f"{dataset['objects']:,} of {dataset['name']}{of}, fingerprint {dataset['fingerprint']}",
        "decoding": _listed(decoding) if decoding else "not known",
        "chat template": results["template"] or "not known",
        "seed": str(results["seed"]),
        "date": results["date"],
        "versions": _listed(results["versions"]),
        "device": results["device"],
    }
    if (generation := results["generation"]) and generation["objects_per_second"]:
        facts["speed"] = f"{generation['objects_per_second']:.2f} objects/s, {generation['seconds']:.0f} s in all"
    if encoders := results.get("encoders"):
        facts["encoders"] = _listed(encoders)
    if judge:
        facts["judge"] = f"{judge['model']}{' at ' + judge['endpoint'] if judge['endpoint'] else ''}, {judge['date']}"
        facts["judge's prompts"] = _listed(judge["prompts"], " sha256 ")
        tokens_in, tokens_out, cost = (judge[name] for name in ("prompt_tokens", "completion_tokens", "cost"))
        cut = f", {judge['cut']:,} of them cut off" if judge["cut"] else ""
        if judge["sampled"]:
            cut += f", {judge['sampled']:,} sampled, for the model refuses temperature 0: asked anew, it may say other things"
        facts["judge's use"] = (
            f"{judge['replies']:,} replies{cut}; {_known(tokens_in)} tokens in, {_known(tokens_out)} out; cost "
            f"{'unknown' if cost is None else f'{cost:.4f} US dollars'}"
        )
        if judge["served_models"]:
            facts["judge's own name"] = ", ".join(judge["served_models"])
    table = [["setting", "value"], *([name, fact] for name, fact in facts.items() if fact)]
    return Section("How it was made", table=table)


def _known(number: int | None) -> str:
    return "an unknown number of" if number is None else f"{number:,}"


def _listed(settings: dict, joint: str = " ") -> str:
    return ", ".join(f"{name}{joint}{value}" for name, value in settings.items())


def _by_question_and_metric(results: dict) -> dict[tuple[str, str], dict[str, dict]]:
    """{(question, metric): {condition: score}}, of what was scored on the objects as they are."""
    rows = {}
    for score in results["scores"]:
        rows.setdefault(_key(score), {})[score["condition"]] = score
    return {key: row for key, row in rows.items() if SEEING in row}


def _key(score: dict) -> tuple[str, str]:
    return score["question"], score["metric"]


def _named(results: dict, score: dict) -> str:
    return f"{METRICS[score['metric']].title}, “{results['questions'][score['question']].strip()}”"


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_]+", "-", text).strip("-")


# ---- Best and worst objects -----------------------------------------------------------------------------------------


def best_and_worst(results: dict, rows: list[dict]) -> tuple[list[str], list[str], str]:
    """Object ids from the best down and from the worst up, and a sentence on how they were chosen.

    By the main score; between equals by the mean of the object's other shares, then by `object_id`. No object is in both.
    """
    main = main_score(results)
    values = values_of(rows, main["question"], main["metric"])
    units = {_key(score): score["unit"] for score in results["scores"]}
    others = {object_id: [] for object_id in values}
    for row in rows:
        if row["condition"] == SEEING and row["object_id"] in others:
            for metric, value in row["scores"].items():
                key = (row["question"], metric)
                if key != _key(main) and units[key] == "share":
                    others[row["object_id"]].append(value)
    sign = -1 if METRICS[main["metric"]].lower_is_better else 1
    goodness = {
        object_id: (sign * value, np.mean(others[object_id]) if others[object_id] else 0.0)
        for object_id, value in values.items()
    }
    in_order = sorted(goodness)  # Python's sorting is stable: equals stay in this order
    half = -(-len(in_order) // 2)
    best = sorted(in_order, key=goodness.get, reverse=True)[: min(NUM_SHOWN, half)]
    worst = [object_id for object_id in sorted(in_order, key=goodness.get) if object_id not in best][:NUM_SHOWN]
    about = (
        f"By {_named(results, main)}; between equals by the mean of the object's other scores, then by name. "
        f"{sum(value == max(values.values()) for value in values.values()):,} of {len(values):,} objects have the highest "
        f"score, {sum(value == min(values.values()) for value in values.values()):,} the lowest."
    )
    return best, worst, about


def _card(object_id: str, results: dict, rows: list[dict], read_cloud: Callable) -> dict:
    """What the page shows of an object: its picture, what is true, and each question with answer, scores and reasons."""
    own = [row for row in rows if row["object_id"] == object_id and row["condition"] == SEEING]
    own.sort(key=lambda row: row["question"] != main_score(results)["question"])
    units = {_key(score): score["unit"] for score in results["scores"]}
    cloud = read_cloud(object_id)
    return {
        "object_id": object_id,
        "picture": None if cloud is None else _data_uri(draw_cloud(cloud)),
        "label": own[0]["label"],
        "caption": own[0]["caption"],
        "answers": [
            {
                "prompt": row["prompt"],
                "answer": row["answer"],
                "scores": [
                    (METRICS[metric].title, _of_one(metric, value, units[row["question"], metric]))
                    for metric, value in row["scores"].items()
                ],
                "reasons": [(METRICS[metric].title, reason) for metric, reason in row["reasons"].items() if reason],
            }
            for row in own
        ],
    }


def _of_one(metric: str, value: float, unit: str) -> str:
    if METRICS[metric].is_hit:
        return "right" if value else "wrong"
    return f"{value:.0f}" if unit == "count" else number(value, unit)


# ---- Writing --------------------------------------------------------------------------------------------------------


def to_markdown(title: str, sections: list[Section]) -> str:
    """The text of report.md, with pictures by their place beside it."""
    parts = [f"# {escaped(title)}"]
    for section in sections:
        parts.append(f"## {escaped(section.title)}")
        parts += map(escaped, section.words)
        if section.points:
            points = "\n".join(f"- {escaped(point)}" for point in section.points)
            parts.append(f"<details><summary>{POINTS_TITLE}</summary>\n\n{points}\n\n</details>")
        parts += [f"![{escaped(section.title)}](pictures/{name}.png)" for name in section.pictures]
        if section.table:
            parts.append(markdown_table(section.table))
    return "\n\n".join(parts) + "\n"


def _data_uri(picture: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(picture).decode("ascii")


def _write(path: Path, content: bytes):
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        unfinished.write_bytes(content)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
