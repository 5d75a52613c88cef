"""One evaluation, from the command line's options to a folder with answers, scores and report.

    OUT/settings.json       what decides about answers: with other settings, a rerun is refused
    OUT/history.json        each run: when, by which command and versions, and whether it asked the model anything
    OUT/answers/            what the model said; likelihood/ what it finds likely
    OUT/judge/              the judge's replies
    OUT/objects.jsonl       every scored answer
    OUT/results.json        scores with intervals, tests, and all that a reader needs to repeat them
    OUT/report.md, report.html, pictures/

Answers are kept, so that other metrics or a judge can be added later by the same command.
"""

import hashlib
import json
import platform
import re
from collections.abc import Callable, Iterable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import date, timedelta
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import InitProcessGroupKwargs
from filelock import FileLock, Timeout

from minigpt3d.files import write_text

from .ask import ANSWERS_DIR, Job, append_lines, generate_answers, line_key, open_part, read_lines, run_batches
from .conditions import BLIND, CORRUPTION_CONDITIONS, NO_COLOR, SEEING, SHUFFLED
from .likelihood import check_answers, class_log_likelihoods, encode_answers, rank_classes
from .objects import EvalObject, read_answers, read_household, read_modelnet40, read_objaverse, read_own
from .progress import progress
from .report import write_report
from .results import OBJECTS_FILE, RESULTS_FILE, cautions, hash_prompt, is_mute, read_results
from .score import Scorer, compare_conditions, default_prompt, is_judged
from .statistics import wilson
from .suites import DECODING, GREEDY, METRICS, SUITES, Suite


LIKELIHOOD_DIR = "likelihood"
SETTINGS_FILE, HISTORY_FILE, LOCK_FILE = "settings.json", "history.json", ".lock"
PACKAGES = ("torch", "transformers", "accelerate", "evaluate")  # whose versions matter
LIKELIHOOD_METRICS = {"likelihood_top_1": 1, "likelihood_top_5": 5}


class BrokenObjectsError(ValueError):
    """Some clouds cannot be read. The message names each, on a line of its own."""


@dataclass
class Options:
    """What is evaluated and how. The suites themselves are in `suites`.

    Args:
        suite: of `SUITES`.
        out: folder for everything.
        model: public name of the model, and what identifies its weights.
        data: what the suite reads; None for the household's own file.
        annotations: of Objaverse.
        reading: `up_axis` and `missing_color` of one's own files, see `load_point_cloud`.
        answers: file of another program's answers, instead of a model.
        limit: the first so many objects.
        greedy: the most likely answers instead of the paper's sampling.
        template: of the processor.
        batch_size: objects that are answered together.
        phrases: answers whose likelihood is taken, with {} for a class's name; empty: the suite's.
        robustness: whether corruptions are tried, too.
        metrics: names; empty: all of the suite that are at hand. What `out` holds of others is scored again.
        encoders: folder or Hub id of a sentence encoder, by metric, where it is not the one of `METRICS`.
        judge: prompts → replies.
        judge_prompts: the user's own, by name (of `JUDGE_PROMPTS`).
        seed: of sampling, corruptions, shuffling and bootstrap.
        command: that repeats this, for the report.
    """

    suite: str
    out: Path
    model: str = ""
    fingerprint: str = ""
    data: str | None = None
    annotations: list[Path] = field(default_factory=list)
    reading: dict[str, str] = field(default_factory=dict)
    answers: Path | None = None
    limit: int | None = None
    greedy: bool = False
    template: str = "default"
    batch_size: int = 16
    phrases: list[str] = field(default_factory=list)
    robustness: bool = False
    metrics: list[str] = field(default_factory=list)
    encoders: dict[str, str] = field(default_factory=dict)
    judge: Callable | None = None
    judge_prompts: dict[str, str] = field(default_factory=dict)
    seed: int = 0
    command: str = ""


# ---- Before anything heavy ------------------------------------------------------------------------------------------


def read_objects(options: Options) -> list[EvalObject]:
    """All objects of the suite.

    Raises:
        ValueError: `--data` or `--annotations` is missing, or not what the suite reads.
    """
    if options.reading and options.suite != "own":
        raise ValueError(
            "--up-axis and --missing-color are for the files of own objects; those of the suites are as they must be."
        )
    wanted = {
        "modelnet40": "modelnet40_test_8192pts_fps.dat of PointLLM's data",
        "objaverse": "the folder of PointLLM's clouds",
        "caption": "the folder of PointLLM's clouds",
        "own": "a .csv or .jsonl of your objects, or a packed data set",
    }
    if options.suite in wanted and options.data is None:
        raise ValueError(f"{options.suite} needs --data: {wanted[options.suite]}.")
    if options.suite in ("objaverse", "caption"):
        if not options.annotations:
            raise ValueError(f"{options.suite} needs --annotations, too: PointLLM_brief_description_val_200_GT.json.")
        objects = read_objaverse(Path(options.data), options.annotations)
    elif options.suite == "modelnet40":
        objects = read_modelnet40(Path(options.data))
    elif options.suite == "own":
        objects = read_own(options.data, options.reading)
    else:
        objects = read_household(*([] if options.data is None else [Path(options.data)]))
    return objects


def suite_for(options: Options, objects: list[EvalObject]) -> Suite:
    """The suite's row; for own objects without what they do not say anything of."""
    suite = SUITES[options.suite]
    if options.phrases:
        suite = replace(suite, phrases=tuple(options.phrases))
    if suite.name != "own":
        return suite
    known = {name for name in ("label", "caption", "color") if any(getattr(each, name) for each in objects)}
    questions = []
    for question in suite.questions:
        metrics = tuple(name for name in question.metrics if METRICS[name].reference in known)
        if metrics:
            questions.append(replace(question, metrics=metrics))
    labels = sorted({each.label for each in objects if each.label})
    classes = {label: (label,) for label in labels} if len(labels) > 1 else None  # of one, there is nothing to choose
    return replace(suite, questions=tuple(questions), classes=classes)


def scored_before(out: Path) -> dict[str, str | None]:
    """Metrics of the run's earlier results, if it has any, and who judged each; None: nobody."""
    if not (out / RESULTS_FILE).is_file():
        return {}
    return {score["metric"]: score["judge"] for score in read_results(out)["scores"]}


def choose_metrics(suite: Suite, options: Options, before: Iterable[str]) -> tuple[list[str], dict[str, str]]:
    """Metrics that are scored, and of the suite's others why they are not.

    Args:
        before: metrics that are scored beside those that were asked for.

    Raises:
        ValueError: one that was asked for is unknown or not at hand.
        ImportError: a package is missing.
    """
    known = [name for question in suite.questions for name in question.metrics]
    known = list(dict.fromkeys(known))
    unknown = [name for name in options.metrics if name not in known]
    if unknown:
        raise ValueError(f"--metrics {unknown[0]}: {suite.name} has {', '.join(known)}.")
    for package, module in (("evaluate", "evaluate"), ("nltk", "nltk"), ("rouge-score", "rouge_score")):
        if find_spec(module) is None:
            raise ImportError(f'evaluation needs {package}, which is not installed. pip install "minigpt3d[eval]"')
    chosen, left_out = [], {}
    for name in [each for each in known if not options.metrics or each in {*before, *options.metrics}]:
        problem = _problem(name, options)
        if problem is None:
            chosen.append(name)
        elif name in (*options.metrics, *options.encoders):
            raise ValueError(f"{name} was asked for, but {problem}.")
        else:
            left_out[name] = problem
    return chosen, left_out


def _problem(name: str, options: Options) -> str | None:
    """Why a metric cannot be scored; None if it can."""
    needs = METRICS[name].needs
    if needs == "judge" and options.judge is None:
        return "needs a judge (--judge)"
    if needs == "wordnet":
        import nltk

        try:
            nltk.data.find("corpora/wordnet.zip")
        except LookupError:
            try:
                nltk.data.find("corpora/wordnet")
            except LookupError:
                return "needs WordNet (python -m nltk.downloader wordnet)"
    if "/" in needs:
        given = options.encoders.get(name, needs)
        if given.count("/") != 1 and not Path(given).is_dir():
            return f"has no encoder {given}: give a folder, or a model's name on the Hub, such as {needs}"
        if name not in (*options.metrics, *options.encoders):
            return f"downloads an encoder, {needs} (--{name.replace('_', '-')} {needs}, or a folder)"
        if name == "s_bert" and find_spec("sentence_transformers") is None:
            return 'needs sentence-transformers (pip install "minigpt3d[eval]")'
    return None


def check_judge(suite: Suite, metrics: list[str], options: Options, before: dict[str, str | None]):
    """
    Raises:
        ValueError: the judge has nothing to do, or scores by a judge would give way to others by none.
    """
    judges = sorted({judge for judge in before.values() if judge})
    if options.judge is None and judges:
        raise ValueError(
            f"--out {options.out} holds scores by the judge {', '.join(judges)}. Give --judge again, which asks for no reply "
            "that is kept, or another --out."
        )
    if options.judge is not None and not any(is_judged(suite, name) for name in metrics):
        raise ValueError(
            f"--judge {options.judge.name}: no judge is asked for {', '.join(metrics)}. Leave it out, or name other --metrics."
        )


def check_out(out: Path):
    """
    Raises:
        ValueError: a folder holds other things than an evaluation.
    """
    others = (
        [path for path in out.iterdir() if path.suffix != ".tmp" and path.name != LOCK_FILE] if out.is_dir() else []
    )
    if (out.exists() and not out.is_dir()) or (others and not (out / SETTINGS_FILE).exists()):
        raise ValueError(f"--out {out} is a file, or holds other things than an evaluation. Give a new folder.")


@contextmanager
def alone_in(out: Path):
    """A new folder, or that of an evaluation, for this process and those that it leads alone.

    Raises:
        ValueError: somebody is at work in it.
    """
    out.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(out / LOCK_FILE, timeout=0):
            yield
    except Timeout:
        raise ValueError(
            f"--out {out}: another process is at work there. Wait for it, or give another folder. (Processes of one run "
            "know of each other by `accelerate launch`; by torchrun on a CPU they need ACCELERATE_USE_CPU=true.)"
        ) from None


def claim_settings(out: Path, settings: dict):
    """Write settings.json, or see that it says the same.

    Raises:
        ValueError: the folder holds answers that were given under other settings.
    """
    path = out / SETTINGS_FILE
    if path.exists() and any(next(read_lines(out / name), None) for name in (ANSWERS_DIR, LIKELIHOOD_DIR)):
        theirs = json.loads(path.read_text(encoding="utf-8"))
        for name, value in settings.items():
            if theirs.get(name) != value:
                hint = ": a run with another --limit is another run" if name == "objects" else ""
                raise ValueError(
                    f"--out {out} holds answers with {name} {theirs.get(name)!r}, but now it is {value!r}. Give another "
                    f"--out, or the settings it had{hint}."
                )
    else:
        (out / HISTORY_FILE).unlink(missing_ok=True)  # of answers that somebody deleted
    write_json(path, settings)


def note_run(out: Path, command: str, device: str | None, asks: bool) -> dict:
    """Add this run to the folder's history.

    Args:
        asks: whether it asks the model anything.

    Returns:
        Of all runs the "command"s, and of those that asked the last "date", "versions" and "device"s.
    """
    path = out / HISTORY_FILE
    history = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    versions = {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}
    history.append(
        {"date": date.today().isoformat(), "command": command, "versions": versions, "device": device}
        | {"asked": asks or not history}
    )
    write_json(path, history)
    asked = [each for each in history if each["asked"]]

    def joined(values: Iterable[str], by: str = ", ") -> str:
        return by.join(dict.fromkeys(values))

    return {
        "date": asked[-1]["date"],
        "command": joined((each["command"] for each in history), " && "),
        "versions": {name: joined(each["versions"][name] for each in asked) for name in versions},
        "device": joined(each["device"] for each in asked if each["device"]) or None,
    }


def write_json(path: Path, content):
    """As `write_text`."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def check_objects(objects: list[EvalObject]) -> str:
    """Read every cloud once; returns a digest of ids, references and clouds.

    Raises:
        BrokenObjectsError: some cannot be read.
    """
    digest, broken = hashlib.sha256(), []
    bar = progress(len(objects), "reading", "object")
    for each in objects:
        bar.update()
        digest.update(json.dumps([each.object_id, each.label, each.caption, each.color]).encode())
        try:
            digest.update(np.ascontiguousarray(each.read(), dtype=np.float32).tobytes())
        except (ValueError, OSError) as error:
            broken.append(f"{each.object_id}: {' '.join(str(error).split())[:200]}")
    bar.close()
    if broken:
        listed = "\n  ".join(broken)
        raise BrokenObjectsError(
            f"{len(broken)} of {len(objects)} objects cannot be read:\n  {listed}\nMend them or leave them out."
        )
    return digest.hexdigest()[:16]


def check_texts(suite: Suite, objects: list[EvalObject], metrics: list[str], options: Options):
    """
    Raises:
        ValueError: classes, phrases or a judge's prompt that cannot be used.
    """
    labelled = [each.object_id for each in objects if each.label]
    if "closed_set_accuracy" in metrics and labelled:
        scorer = Scorer(suite, {each.object_id: each for each in objects}, None, {}, {}, options.seed)
        scorer.score(replace(suite.questions[0], metrics=()), SEEING, {labelled[0]: ""}, ["closed_set_accuracy"])
    if suite.classes is not None and options.answers is None:
        check_answers([name for row in suite.classes.values() for name in row], suite.phrases)
    elif options.phrases:
        raise ValueError("--phrase: there is no closed set of classes here, or no model, to take likelihoods of.")
    asked = {METRICS[name].prompt for name in metrics if is_judged(suite, name)}
    for name, text in options.judge_prompts.items():
        if name not in asked:
            raise ValueError(
                f"--judge-prompt {name}: in this run of {suite.name} the judge is asked for {', '.join(sorted(asked))}."
            )
        wanted = dict.fromkeys(re.findall(r"\{[a-z]+\}", default_prompt(name)))
        if missing := [place for place in wanted if place not in text]:
            raise ValueError(
                f"--judge-prompt {name}: the text lacks {' and '.join(missing)}: put it where that shall stand."
            )


# ---- Answers --------------------------------------------------------------------------------------------------------


def conditions_of(suite: Suite, robustness: bool) -> list[str]:
    """The object as it is, blind and without color, and with `robustness` the corruptions."""
    corruptions = CORRUPTION_CONDITIONS if robustness else ()
    of_color = (NO_COLOR, *(name for name in corruptions if name.startswith("color")))
    return [name for name in (SEEING, BLIND, NO_COLOR, *corruptions) if suite.has_color or name not in of_color]


def make_jobs(suite: Suite, objects: list[EvalObject], options: Options) -> list[Job]:
    """All that is asked; of corrupted objects the main question alone."""
    jobs = []
    for number, question in enumerate(suite.questions):
        for condition in conditions_of(suite, options.robustness and number == 0):
            # Blind, every object is the same object: greedily there is one answer for all.
            asked = objects[:1] if condition == BLIND and options.greedy else objects
            jobs.append(Job(question, condition, tuple(asked)))
    return jobs


def take_answers(suite: Suite, objects: list[EvalObject], options: Options) -> list[dict]:
    """Another program's answers, as lines of ours: all objects' for each question and condition that is answered.

    Raises:
        ValueError: an object, a question or a condition that the suite does not have, or an answer that is there twice or
            not at all.
    """
    names, ids, given = [question.name for question in suite.questions], {each.object_id for each in objects}, {}
    prompts = {" ".join(question.prompt.split()): question.name for question in suite.questions}
    for answer in read_answers(options.answers):
        question, condition = answer["question"] or names[0], answer["condition"] or SEEING
        object_id, prompt = answer["object_id"], answer["prompt"]
        if prompt is not None:
            asked = prompts.get(" ".join(str(prompt).split()))
            if asked is None or answer["question"] not in (None, "", asked):
                raise ValueError(
                    f"--answers {options.answers}: {object_id!r} has an answer to {prompt!r}; {suite.name} asks "
                    f"{', '.join(f'{name}: {text!r}' for text, name in prompts.items())}."
                )
            question = asked
        if isinstance(object_id, int):  # as people number their own, or as PointLLM numbers those of ModelNet40
            object_id = next((name for name in (str(object_id), f"{object_id:04d}") if name in ids), str(object_id))
        for value, known, what in (
            (question, names, "question"),
            (condition, conditions_of(suite, True), "condition"),
            (object_id, ids, "object"),
        ):
            if value not in known:
                some = ", ".join(sorted(known)[:8]) + (" …" if len(known) > 8 else "")
                raise ValueError(f"--answers {options.answers}: {value!r} is no {what} of {suite.name} ({some}).")
        key = (question, condition, object_id)
        if key in given:
            raise ValueError(f"--answers {options.answers}: {', '.join(key)} is answered twice.")
        given[key] = {"object_id": key[2], "question": question, "condition": condition, "answer": answer["answer"]}
    asked = dict.fromkeys(key[:2] for key in given)
    for question, condition in dict.fromkeys([*((question, SEEING) for question, _ in asked), *asked]):
        missing = ids - {object_id for *key, object_id in given if key == [question, condition]}
        if missing:
            raise ValueError(
                f"--answers {options.answers}: of {len(ids)} objects {len(missing)} have no answer to {question!r}, "
                f"{condition}, such as {min(missing)!r}. Give all answers, or --limit to the first objects."
            )
    return list(given.values())


def likelihood_jobs(suite: Suite, objects: list[EvalObject]) -> list[Job]:
    """The main question about what has a class, under all conditions but the corruptions."""
    labelled = tuple(each for each in objects if each.label)
    return [
        Job(suite.questions[0], condition, labelled[:1] if condition == BLIND else labelled)
        for condition in conditions_of(suite, robustness=False)
    ]


def is_done(jobs: list[Job], folder: Path) -> bool:
    """Whether there is a line for each object of each job."""
    wanted = {(job.question.name, job.condition, each.object_id) for job in jobs for each in job.objects}
    return wanted <= {line_key(line) for line in read_lines(folder)}


def take_likelihoods(model, processor, suite: Suite, objects: list[EvalObject], options: Options):
    """How likely each class name is as the answer to the main question, for every object."""
    names = [name for row in suite.classes.values() for name in row]

    def work(job: Job, group: list[EvalObject], clouds: list[np.ndarray], seed: int) -> list[dict]:
        sums, tokens = class_log_likelihoods(
            model,
            processor,
            clouds,
            job.question.prompt,
            names,
            suite.phrases,
            options.template,
            max(1, options.batch_size // 4),
        )
        return [{"log_likelihood": row.tolist(), "tokens": tokens.tolist()} for row in sums]

    run_batches(
        likelihood_jobs(suite, objects),
        options.out / LIKELIHOOD_DIR,
        options.batch_size,
        options.seed,
        work,
        "likelihoods",
    )


# ---- Scores ---------------------------------------------------------------------------------------------------------


def read_conditions(folder: Path, suite: Suite, objects: list[EvalObject]) -> dict[tuple[str, str], dict[str, dict]]:
    """Lines by (question, condition) and object, whichever process was first; one line for the blind stands for all.

    Of a condition that a killed run began, and this one does not go on with, there may be some objects only.
    """
    found: dict[tuple[str, str], dict[str, dict]] = {}
    for line in read_lines(folder):
        found.setdefault((line["question"], line["condition"]), {})[line["object_id"]] = line
    order = [each.object_id for each in objects]
    for (_, condition), lines in found.items():
        if condition == BLIND and len(lines) == 1:
            (line,) = lines.values()
            lines |= {object_id: line for object_id in order}
    keys = [(question.name, condition) for question in suite.questions for condition in conditions_of(suite, True)]
    return {key: {i: found[key][i] for i in order if i in found[key]} for key in keys if key in found}


def read_complete(folder: Path, suite: Suite, objects: list[EvalObject]) -> dict[tuple[str, str], dict[str, dict]]:
    """As `read_conditions`, of those that all objects have lines of: a score is of all objects or of none."""
    found = read_conditions(folder, suite, objects)
    return {key: lines for key, lines in found.items() if len(lines) == len(objects)}


def score_likelihoods(suite: Suite, objects: list[EvalObject], options: Options):
    """Entries of results.json, values by (question, condition), object and metric, and the confusion matrix."""
    classes = list(suite.classes)
    ranks = {
        name: k for name, k in LIKELIHOOD_METRICS.items() if k == 1 or k < len(classes)
    }  # of five, five are certain
    owner = [classes.index(name) for name, row in suite.classes.items() for _ in row]
    labelled = [each for each in objects if each.label]
    scorer = Scorer(suite, {each.object_id: each for each in objects}, None, {}, {}, options.seed)
    entries, values, table = [], {}, None
    found = read_complete(options.out / LIKELIHOOD_DIR, suite, labelled)
    for question, condition in [*found, *((q, SHUFFLED) for q, c in list(found) if c == SEEING)]:
        lines = found[question, SEEING if condition == SHUFFLED else condition]
        compared = scorer.truths("label", dict.fromkeys(lines, ""), condition)
        if not compared:
            continue
        scores = values.setdefault((question, condition), {})
        confusion = np.zeros((len(classes), len(classes)), dtype=int)
        for object_id, label in compared.items():
            line = lines[object_id]
            (order,) = rank_classes([line["log_likelihood"]], line["tokens"], owner)
            place = int(np.flatnonzero(order == classes.index(label))[0])
            scores[object_id] = {name: float(place < k) for name, k in ranks.items()}
            confusion[classes.index(label), order[0]] += 1
        for name in ranks:
            hits = [row[name] for row in scores.values()]
            low, high = wilson(int(sum(hits)), len(hits))
            entries.append(
                {"question": question, "condition": condition, "metric": name, "value": float(np.mean(hits))}
                | {"low": low, "high": high, "unit": "share", "objects": len(hits), "unparsed": 0, "judge": None}
                | {"interval": "Wilson"}
            )
        if condition == SEEING:
            table = {"question": question, "method": "likelihood", "phrases": list(suite.phrases), "names": classes}
            table |= {"confusion": confusion.tolist()}
            table |= {name.removeprefix("likelihood_"): entry["value"]
                      for name, entry in zip(ranks, entries[-len(ranks) :], strict=True)}  # fmt: skip
    return entries, values, table


def score_all(suite: Suite, objects: list[EvalObject], metrics: list[str], options: Options) -> dict:
    """Score every answer that there is; writes objects.jsonl and returns scores, tests and classes for results.json."""
    scorer = Scorer(
        suite, {each.object_id: each for each in objects}, options.judge, options.encoders, options.judge_prompts, options.seed
    )  # fmt: skip
    found = read_complete(options.out / ANSWERS_DIR, suite, objects)
    questions = {question.name: question for question in suite.questions}
    entries, values, rows = [], {}, []
    truth = {each.object_id: each for each in objects}
    for name, condition in [*found, *((name, SHUFFLED) for name, condition in found if condition == SEEING)]:
        question = questions[name]
        lines = found[name, SEEING if condition == SHUFFLED else condition]
        wanted = [metric for metric in question.metrics if metric in metrics]
        texts = {object_id: line["answer"] for object_id, line in lines.items()}
        scored, scores, reasons = scorer.score(question, condition, texts, wanted)
        entries += scored
        values[name, condition] = scores
        for object_id, line in lines.items():
            rows.append(
                {"object_id": object_id, "question": name, "prompt": question.prompt, "condition": condition}
                | {"answer": line["answer"], "label": truth[object_id].label, "caption": truth[object_id].caption}
                | {"color": truth[object_id].color, "scores": scores[object_id], "reasons": reasons[object_id]}
            )
    classes = None
    if (options.out / LIKELIHOOD_DIR).exists():
        likelihoods, by_key, classes = score_likelihoods(suite, objects, options)
        entries += likelihoods
        for row in rows:
            row["scores"] |= by_key.get((row["question"], row["condition"]), {}).get(row["object_id"], {})
        for key, scores in by_key.items():
            for object_id, each in scores.items():
                values.setdefault(key, {}).setdefault(object_id, {}).update(each)
    names = [*metrics, *(LIKELIHOOD_METRICS if classes else ())]
    tests = compare_conditions(values, names)
    # At the very end, so that results.json, which belongs to it, is written right after.
    write_text(options.out / OBJECTS_FILE, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return {"scores": entries, "tests": tests, "classes": classes}


# ---- The whole ------------------------------------------------------------------------------------------------------


def evaluate(options: Options, load: Callable | None = None, say: Callable[[str], None] = print) -> dict:
    """Answer, score and report; what is in the folder already is not done again.

    Args:
        options: what and how.
        load: gives model and processor, once it is sure that they are needed; None with `options.answers`.
        say: takes lines for the user.

    Returns:
        What is in results.json; {} on all processes but the first.

    Raises:
        ValueError: with what is wrong and what to do, before anything heavy.
        ImportError: a package is missing.
    """
    check_out(options.out)
    everything = read_objects(options)
    objects = everything[: options.limit]
    suite = suite_for(options, objects)
    before = scored_before(options.out)
    metrics, left_out = choose_metrics(suite, options, before)
    if not metrics and (suite.classes is None or options.answers is not None):
        reasons = "; ".join(f"{name} {why}" for name, why in left_out.items())
        raise ValueError(f"there is nothing that {suite.name} could be scored by: {reasons}. Give one of these.")
    check_judge(suite, metrics, options, before)
    check_texts(suite, objects, metrics, options)
    given = None if options.answers is None else take_answers(suite, objects, options)
    # Processes wait for the slowest, which may take its time.
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=1))])
    with alone_in(options.out) if accelerator.is_main_process else nullcontext():
        if accelerator.is_main_process:
            for name, why in left_out.items():
                say(f"not scored{' any more' if name in before else ''}: {name} {why}")
        settings, facts = answer_all(suite, objects, options, given, load)
        accelerator.wait_for_everyone()
        if not accelerator.is_main_process:
            return {}
        for (_, condition), lines in read_conditions(options.out / ANSWERS_DIR, suite, objects).items():
            if len(lines) < len(objects):
                say(
                    f"not scored: {condition}, for {len(lines)} of {len(objects)} objects were asked. --robustness asks the others"
                )
        if options.judge is not None:
            if others := {judge for judge in before.values() if judge} - {options.judge.name}:
                say(
                    f"scores by {', '.join(sorted(others))} give way to those by {options.judge.name}; the replies are kept"
                )
            asked = count_judged(suite, objects, metrics, options.out)
            say(
                f"{options.judge.name} is asked up to {asked:,} questions, but none again that it has replied to before"
            )
        scored = score_all(suite, objects, metrics, options)
        seeing = [score for score in scored["scores"] if score["condition"] == SEEING]
        if mute := {METRICS[score["metric"]].title for score in seeing if is_mute(score)}:
            say(
                f"{options.judge.name} gave no verdict that can be read on {', '.join(sorted(mute))}: that says nothing of "
                "the model. Take another judge; one that thinks before it replies needs more --judge-max-tokens. If the server "
                "was at fault, run again: replies without text are asked for anew. Others are kept: delete "
                f"{options.judge.cache_dir} before."
            )
        about = describe_run(suite, metrics, options, settings, facts)
        about["dataset"] = describe_objects(suite, objects, everything, settings)
        results = about | {"not_scored": left_out} | scored
        write_json(options.out / RESULTS_FILE, results)
        clouds = {each.object_id: each.read for each in objects}
        write_report(options.out, lambda object_id: clouds[object_id]())
        for words in cautions(results):
            say(words)
        return results


def answer_all(suite: Suite, objects: list[EvalObject], options: Options, given: list[dict] | None, load: Callable):
    """Answers and likelihoods in their folders; returns what is in settings.json, and what is told of the model."""
    is_main = PartialState().is_main_process
    dataset = check_objects(objects) if is_main else None
    facts = {"parameters": None}
    settings = {"suite": suite.name, "objects": len(objects), "dataset": dataset, "model": options.fingerprint}
    names = ("decoding", "template", "prompts", "phrases", "batch_size", "dtype", "device")
    settings |= dict.fromkeys(names) | {"seed": options.seed}
    if given is not None:
        if is_main:
            claim_settings(options.out, settings)
            part = open_part(options.out / ANSWERS_DIR, 0)
            part.unlink(missing_ok=True)
            append_lines(part, given)
            facts |= note_run(options.out, options.command, None, asks=False)
        return settings, facts
    model, processor = load()
    facts = {"parameters": model.num_parameters()}
    decoding = (GREEDY if options.greedy else DECODING) | {"max_new_tokens": suite.max_new_tokens}
    settings |= {
        "decoding": decoding,
        "template": options.template,
        "prompts": fingerprint_prompts(processor, suite, options.template),
        "phrases": None if suite.classes is None else list(suite.phrases),
        "batch_size": options.batch_size,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
    }
    jobs = make_jobs(suite, objects, options)
    if is_main:
        claim_settings(options.out, settings)
        device = torch.cuda.get_device_name() if model.device.type == "cuda" else str(model.device)
        done = is_done(jobs, options.out / ANSWERS_DIR) and (
            suite.classes is None or is_done(likelihood_jobs(suite, objects), options.out / LIKELIHOOD_DIR)
        )
        facts |= note_run(options.out, options.command, device, asks=not done)
    generate_answers(model, processor, jobs, options.out, options.template, decoding, options.batch_size, options.seed)
    if suite.classes is not None:
        take_likelihoods(model, processor, suite, objects, options)
    return settings, facts


def fingerprint_prompts(processor, suite: Suite, template: str) -> str:
    """A digest of the token ids of all questions: of template and tokenizer, as far as they matter."""
    ids = [encode_answers(processor, question.prompt, ["a"], template)[0] for question in suite.questions]
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:16]


def sum_up_answers(out: Path) -> dict:
    """How many answers there are and how long they took, in whichever runs they were given."""
    answers = list(read_lines(out / ANSWERS_DIR))
    seconds = sum(line.get("seconds", 0.0) for line in answers)
    return {
        "answers": len(answers),
        "new_tokens": sum(line.get("tokens", 0) for line in answers) or None,
        "seconds": round(seconds, 2),
        "objects_per_second": round(len(answers) / seconds, 2) if seconds else None,
        "cut": sum(line["cut"] for line in answers) if all("cut" in line for line in answers) else None,
    }


def count_judged(suite: Suite, objects: list[EvalObject], metrics: list[str], out: Path) -> int:
    """How many prompts a judge has to reply to, where none are equal."""
    prompts = {
        question.name: len(
            {METRICS[name].prompt for name in question.metrics if name in metrics and is_judged(suite, name)}
        )
        for question in suite.questions
    }
    # Answers to objects as they are count twice, for each is compared with another object, too.
    return sum(
        prompts[question] * len(lines) * (1 + (condition == SEEING))
        for (question, condition), lines in read_complete(out / ANSWERS_DIR, suite, objects).items()
    )


def describe_run(suite: Suite, metrics: list[str], options: Options, settings: dict, facts: dict) -> dict:
    """All of results.json but objects and scores: by what, when and how it was made."""
    encoders = {name: METRICS[name].needs for name in metrics if "/" in METRICS[name].needs}
    return {
        "schema": 1,
        "suite": suite.name,
        "title": suite.title,
        **{name: facts[name] for name in ("date", "command", "versions", "device")},
        "seed": options.seed,
        "model": {"name": options.model, "fingerprint": options.fingerprint, "parameters": facts["parameters"]}
        | {"dtype": settings["dtype"]},
        **{name: settings[name] for name in ("decoding", "template", "batch_size")},
        "questions": {question.name: question.prompt for question in suite.questions},
        "generation": sum_up_answers(options.out),
        "encoders": {name: name_encoder(options.encoders.get(name, default)) for name, default in encoders.items()},
        "judge": None if options.judge is None else describe_judge(suite, metrics, options),
    }


def describe_objects(suite: Suite, objects: list[EvalObject], everything: list[EvalObject], settings: dict) -> dict:
    """How many objects of how many, and which."""
    return {
        "name": suite.name,
        "objects": len(objects),
        "of": len(everything),
        "fingerprint": settings["dataset"],
        "labels": len({each.label for each in objects if each.label}),
    }


def name_encoder(given: str) -> str:
    """Its Hub id, or its folder's name."""
    return Path(given).resolve().name if Path(given).exists() else given


def describe_judge(suite: Suite, metrics: list[str], options: Options) -> dict:
    """Who judged, by which prompts, when, and what it took."""
    prompts = {}
    for name in metrics:
        if is_judged(suite, name):
            metric = METRICS[name]
            text = options.judge_prompts.get(metric.prompt) or default_prompt(metric.prompt)
            prompts[metric.prompt] = hash_prompt(text)
    judge = options.judge
    return {"model": judge.name, "files": judge.files, "prompts": prompts} | judge.sum_up()
