"""Answers of another program, which are scored instead of a model's."""

import json
from collections.abc import Iterator
from pathlib import Path

from minigpt3d.data.tables import read_table

from .plan import EvaluationPlan
from .suites import SEEING


def read_answers(path: Path) -> list[dict]:
    """Answers in lines of JSON, in a .csv, or in the JSON file that PointLLM's evaluation writes.

    A line has `object_id` and `answer`, and may have `question` (the name of one of the suite's) or `prompt` (its text),
    and `condition`. PointLLM's file has one prompt for all its answers.

    Returns:
        Dictionaries with `object_id`, a text or a number; `answer`; and `question`, `prompt` and `condition`, or None.

    Raises:
        ValueError: the file has another format; with the line.
    """
    answers = []
    for where, line, prompt in _read_lines(path):
        answer = line.get("answer", line.get("model_output")) if isinstance(line, dict) else None
        if not isinstance(answer, str) or type(line.get("object_id")) not in (str, int):
            raise ValueError(
                f"{where}: expected 'object_id' and a text 'answer' (or 'model_output'), got {json.dumps(line)[:80]}."
            )
        given = {name: line.get(name) for name in ("question", "condition")}
        answers.append(
            {"object_id": line["object_id"], "answer": answer, "prompt": line.get("prompt") or prompt} | given
        )
    if not answers:
        raise ValueError(f"`answers` {path}: holds no answers.")
    return answers


def _read_lines(path: Path) -> Iterator[tuple[str, dict, str | None]]:
    """Each line with its place in the file, and the prompt of the file or None."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError:
        content = None
    except UnicodeDecodeError as error:
        raise ValueError(f"`answers` {path}: not UTF-8 ({error}). Save it as UTF-8.") from error
    except OSError as error:
        raise ValueError(f"`answers` {path}: cannot be read ({error}).") from error
    if isinstance(content, dict) and isinstance(content.get("results"), list):
        for number, line in enumerate(content["results"], start=1):
            yield f"{path}, result {number}", line, content.get("prompt")
    else:
        for where, line in read_table(path, {"object_id", "answer"}):
            yield where, line, None


def match_answers(plan: EvaluationPlan) -> list[dict]:
    """The answers as lines for the run's folder, checked against the suite.

    Raises:
        ValueError: an unknown object, question or condition, an answer that is given twice, or one that is missing.
    """
    path, questions = plan.options.answers, [question.name for question in plan.suite.questions]
    matched: dict[tuple[str, str, str], dict] = {}
    for answer in read_answers(path):
        question = _question_of(plan, answer)
        condition, object_id = answer["condition"] or SEEING, answer["object_id"]
        if isinstance(object_id, int):  # PointLLM's ModelNet40 ids lack the leading zeros
            spellings = (str(object_id), f"{object_id:04d}")
            object_id = next((spelling for spelling in spellings if spelling in plan.objects), spellings[0])
        for value, known, name in (
            (question, questions, "question"),
            (condition, plan.conditions(robustness=True), "condition"),
            (object_id, plan.objects, "object"),
        ):
            if value not in known:
                examples = ", ".join(sorted(known)[:8]) + (" …" if len(known) > 8 else "")
                raise ValueError(f"`answers` {path}: {value!r} is not a {name} of {plan.suite.name} ({examples}).")
        key = (question, condition, object_id)
        if key in matched:
            raise ValueError(f"`answers` {path}: {', '.join(key)} is answered twice.")
        line = {"object_id": object_id, "question": question, "condition": condition}
        matched[key] = line | {"answer": answer["answer"]}
    _check_complete(plan, set(matched))
    return list(matched.values())


def _question_of(plan: EvaluationPlan, answer: dict) -> str:
    """Name of the answered question: by its prompt, else as given, else the main one."""
    if answer["prompt"] is None:
        return answer["question"] or plan.suite.questions[0].name
    prompts = {" ".join(question.prompt.split()): question.name for question in plan.suite.questions}
    question = prompts.get(" ".join(str(answer["prompt"]).split()))
    if question is None or answer["question"] not in (None, "", question):
        raise ValueError(
            f"`answers` {plan.options.answers}: {answer['object_id']!r} has an answer to {answer['prompt']!r}; "
            f"{plan.suite.name} asks {', '.join(f'{name}: {text!r}' for text, name in prompts.items())}."
        )
    return question


def _check_complete(plan: EvaluationPlan, keys: set[tuple[str, str, str]]):
    asked = {key[:2] for key in keys}
    for question, condition in sorted(asked | {(question, SEEING) for question, _ in asked}):
        missing = [object_id for object_id in plan.objects if (question, condition, object_id) not in keys]
        if missing:
            raise ValueError(
                f"`answers` {plan.options.answers}: of {len(plan.objects)} objects, {len(missing)} have no answer to "
                f"{question!r}, {condition}, such as {min(missing)!r}. Give all answers, or a `limit`."
            )
