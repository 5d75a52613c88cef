"""Runs side by side, with the published scores that are their like: the same suite, prompt, metric and judge.

Scores of different judges are different measures and never stand in one table.
"""

import json
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np

from minigpt3d.model_card.words import escaped, markdown_table, same_judge, with_interval

from .conditions import SEEING
from .results import hash_prompt, judge_of, prompt_hash, read_run, values_of, variant_of
from .score import default_prompt
from .statistics import bootstrap, holm, in_words, paired_difference
from .suites import METRICS


PUBLISHED_FILE = Path(__file__).with_name("published.json")


def compare(folders: list[str | Path]) -> str:
    """The comparison as Markdown: see `tabulate`."""
    return to_markdown(tabulate(folders))


def tabulate(folders: list[str | Path]) -> dict:
    """What is alike in these runs.

    Returns:
        "runs": for each, its name here and how it was made; "tables": for each suite and judge (None: no judge)
            "columns": names of runs, then of published models
            "rows": {"prompts", "metric", "variant" (None: as by default), "unit", "cells": {column: {"value", "low", "high", …}}}; a row of several
                prompts is their mean; a published cell has no "low" and "high", but its "source"
            "tests": paired, between runs on the same objects, "p" corrected for their number (Holm), "words"
            "notes": what sets the runs apart that a reader must know

    Raises:
        ValueError: no folder, one given twice, or one that is no finished run.
    """
    if not folders:
        raise ValueError("There is nothing to compare: expected folders of finished runs, got none.")
    folders = [Path(folder) for folder in folders]
    read = [read_run(folder) for folder in folders]
    names = _names(folders, [results for results, _ in read])
    runs = {name: {"results": results, "rows": rows} for name, (results, rows) in zip(names, read, strict=True)}
    keys = dict.fromkeys(
        (run["results"]["suite"], judge_of(run["results"], score))
        for run in runs.values()
        for score in run["results"]["scores"]
    )
    return {
        "runs": [{"name": name} | _facts(run["results"]) for name, run in runs.items()],
        "tables": [
            _table(suite, judge, runs) for suite, judge in sorted(keys, key=lambda key: (key[0], key[1] or ()))
        ],
    }


def _names(folders: list[Path], results: list[dict]) -> list[str]:
    """The shortest names that tell the runs apart."""
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ValueError(f"A run is given twice: {', '.join(map(str, folders))}. Give each folder once.")
    names = [result["model"]["name"] for result in results]
    for suffixes in ([folder.name for folder in folders], folders):
        counts = Counter(names)
        names = [f"{n} ({suffix})" if counts[n] > 1 else n for n, suffix in zip(names, suffixes, strict=True)]
    return names


def _facts(results: dict) -> dict:
    return {
        key: results[key] for key in ("suite", "date", "model", "dataset", "decoding", "template", "seed", "judge")
    }


def _table(suite: str, judge: tuple[tuple[str, ...], str] | None, runs: dict[str, dict]) -> dict:
    rows, columns, spelling = {}, [], None
    for name, run in runs.items():
        if run["results"]["suite"] != suite:
            continue
        for score in run["results"]["scores"]:
            if score["condition"] == SEEING and judge_of(run["results"], score) == judge:
                spelling = spelling or score["judge"]
                key = ((_prompt(run, score["question"]),), score["metric"], variant_of(run["results"], score))
                row = rows.setdefault(key, {"unit": score["unit"], "cells": {}})
                row["cells"][name] = score
                columns += [name] if name not in columns else []
    runs = {name: runs[name] for name in columns}
    with_published = _add_published(rows, suite, judge, runs)
    tests, notes = _tests(rows, runs)
    return {
        "suite": suite,
        "judge": judge and _name_judge(spelling, *judge),
        "columns": columns + with_published,
        "rows": [
            {"prompts": list(prompts), "metric": metric, "variant": variant, **row}
            for (prompts, metric, variant), row in rows.items()
        ],
        "tests": tests,
        "notes": notes + _notes(runs, judge is not None, [row[1] for row in rows if _is_published(rows[row])]),
    }


def _name_judge(spelling: str, served: tuple[str, ...], files: str) -> str:
    """Its name, and what tells it from others of that name."""
    if served != (same_judge(spelling),):
        return f"{spelling} (served by {', '.join(served)})"
    return f"{spelling} (files {files})" if files else spelling


def _add_published(
    rows: dict, suite: str, judge: tuple[tuple[str, ...], str] | None, runs: dict[str, dict]
) -> list[str]:
    """Put the published scores into the rows that they are the like of, and return the names of their columns."""
    published = json.loads(PUBLISHED_FILE.read_text(encoding="utf-8"))
    columns = {}
    for line in published["rows"]:
        if line["suite"] != suite or (line["judge"] and (same_judge(line["judge"]),)) != (judge and judge[0]):
            continue
        prompts, metric = tuple(published["prompts"][prompt] for prompt in line["prompts"]), line["metric"]
        if len(prompts) > 1:
            _add_mean(rows, prompts, metric, runs)
        if (prompts, metric, None) in rows:
            for model, (value, source) in line["scores"].items():
                cell = {"value": value, "source": published["sources"][source]}
                rows[prompts, metric, None]["cells"][f"{model}, published"] = cell
                columns[f"{model}, published"] = None
    return list(columns)


def _prompt(run: dict, question: str) -> str:
    return run["results"]["questions"][question].strip()


def _add_mean(rows: dict, prompts: tuple[str, ...], metric: str, runs: dict[str, dict]):
    """A row for the mean over several prompts, of the runs that answered them all about the same objects."""
    for name, run in runs.items():
        cells = [rows.get(((prompt,), metric, None), {"cells": {}})["cells"].get(name) for prompt in prompts]
        if None in cells:
            continue
        values = [values_of(run["rows"], cell["question"], metric) for cell in cells]
        if any(found.keys() != values[0].keys() for found in values):
            continue
        means = [np.mean([found[object_id] for found in values]) for object_id in sorted(values[0])]
        low, high = bootstrap(means)
        row = rows.setdefault((prompts, metric, None), {"unit": cells[0]["unit"], "cells": {}})
        row["cells"][name] = {"value": float(np.mean(means)), "low": low, "high": high, "unit": cells[0]["unit"]}


def _tests(rows: dict, runs: dict[str, dict]) -> tuple[list[dict], list[str]]:
    """Each pair of runs in each row, where the objects, and the judge's prompt, are the same; and why others are not."""
    tests, notes = [], []
    for (prompts, metric, variant), row in rows.items():
        if len(prompts) > 1 or METRICS[metric].is_ratio:
            continue
        for names in combinations([name for name in runs if name in row["cells"]], 2):
            cells, pair = [row["cells"][name] for name in names], [runs[name] for name in names]
            a, b = (values_of(run["rows"], cell["question"], metric) for run, cell in zip(pair, cells, strict=True))
            if a.keys() != b.keys() or len({run["results"]["dataset"]["fingerprint"] for run in pair}) > 1:
                notes.append(f"{' and '.join(names)} are not of the same objects: their difference is not tested.")
                continue
            if cells[0]["judge"] and len({prompt_hash(run["results"], metric) for run in pair}) > 1:
                notes.append(
                    f"{METRICS[metric].title}: {' and '.join(names)} were judged with different prompts. That is another "
                    "measure, and their difference is not tested."
                )
                continue
            a, b = (np.array([found[object_id] for object_id in sorted(found)]) for found in (a, b))
            tests.append(
                {
                    "prompt": prompts[0],
                    "metric": metric,
                    "variant": variant,
                    "a": names[0],
                    "b": names[1],
                    "unit": row["unit"],
                }
                | paired_difference(a, b)
            )
    for test, p in zip(tests, holm([test["p"] for test in tests]) if tests else [], strict=True):
        test["p"] = float(p)
        test["words"] = in_words(*(test[key] for key in ("difference", "low", "high", "p", "unit", "a", "b")))
    return tests, list(dict.fromkeys(notes))


def _is_published(row: dict) -> bool:
    return any("source" in cell for cell in row["cells"].values())


def _notes(runs: dict[str, dict], is_judged: bool, published: list[str]) -> list[str]:
    """What sets runs apart, and them from the published scores of these metrics."""
    notes = []
    for what, key in (("decoding", "decoding"), ("chat template", "template")):
        known = [run["results"][key] for run in runs.values() if run["results"][key] is not None]
        if len({json.dumps(value, sort_keys=True) for value in known}) > 1:
            notes.append(f"The runs differ in their {what}.")
    if published:
        notes.append("Published scores come without intervals, so no difference from them is tested.")
        if is_judged:
            whose = {}
            for name, run in runs.items():
                is_ours = any(_has_our_rubric(run["results"], metric) for metric in published)
                whose.setdefault("this project's own rubric" if is_ours else "a prompt of the user's", []).append(name)
            told = ", ".join(f"{' and '.join(names)} with {prompt}" for prompt, names in whose.items())
            notes.append(
                f"Published scores were judged with PointLLM's prompts, {told}: only where the prompt is the same is the "
                "score the same measure."
            )
    return notes


def _has_our_rubric(results: dict, metric: str) -> bool:
    """Whether the judge was asked for a score by the prompt that comes along."""
    return prompt_hash(results, metric) == hash_prompt(default_prompt(METRICS[metric].prompt))


# ---- As Markdown ----------------------------------------------------------------------------------------------------


def to_markdown(comparison: dict) -> str:
    """What `tabulate` returns, as people read it."""
    head = ["run", "suite", "objects", "date", "template", "decoding", "judge"]
    runs = [head] + [
        [run["name"], run["suite"], f"{run['dataset']['objects']:,}", run["date"], run["template"] or "not known"]
        + [", ".join(f"{k} {v}" for k, v in run["decoding"].items()) if run["decoding"] else "not known"]
        + [f"{run['judge']['model']}, {run['judge']['date']}" if run["judge"] else "none"]
        for run in comparison["runs"]
    ]
    parts = ["# Comparison", markdown_table(runs)]
    for table in comparison["tables"]:
        parts.append(
            f"## {table['suite']}, {'judge ' + escaped(table['judge']) if table['judge'] else 'without a judge'}"
        )
        parts.append("Objects as they are; in brackets 95 % intervals.")
        lines = [["prompt", "score", *table["columns"]]]
        for row in table["rows"]:
            cells = [_cell(row["cells"].get(column), row["unit"]) for column in table["columns"]]
            prompts = " and ".join(f"“{prompt}”" for prompt in row["prompts"])
            lines.append([f"mean of {prompts}" if len(row["prompts"]) > 1 else prompts, _title(row), *cells])
        parts.append(markdown_table(lines))
        if table["tests"]:
            parts.append(f"Differences, p corrected for {len(table['tests'])} comparisons (Holm):")
            parts.append(
                "\n".join(
                    f"- {escaped(_title(test))}, “{escaped(test['prompt'])}”: {escaped(test['words'])}"
                    for test in table["tests"]
                )
            )
        sources = {}
        for row in table["rows"]:
            for column, cell in row["cells"].items():
                if "source" in cell:
                    sources.setdefault(cell["source"], {})[column] = None
        notes = table["notes"] + [f"{'; '.join(columns)}: {source}." for source, columns in sources.items()]
        if notes:
            parts.append("\n".join(f"- {escaped(note)}" for note in notes))
    return "\n\n".join(parts) + "\n"


def _title(row: dict) -> str:
    """A metric's title, with what was chosen otherwise than by default."""
    return METRICS[row["metric"]].title + (f" ({row['variant']})" if row["variant"] else "")


def _cell(score: dict | None, unit: str) -> str:
    if score is None:
        return "–"
    if "source" in score:  # as printed
        return f"{score['value']:.2f}{' %' if unit == 'share' else ''} (no interval)"
    unparsed = f", {score['unparsed']:,} of {score['objects']:,} unparsed" if score.get("unparsed") else ""
    return with_interval(score) + unparsed
