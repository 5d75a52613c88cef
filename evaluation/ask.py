"""Answers of a model: batched, on as many processes as Accelerate has, appended to files, resumed after any end.

A job is a question under a condition; its objects are cut into batches, always the same ones. A batch's answers are
appended in one write and drawn with a seed of its own, so a run that was killed goes on with the batches that are not
there, and neither it nor the number of processes changes an answer.

Shapes: B objects of a batch, N points, T tokens.
"""

import json
import os
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from transformers import BatchFeature

from minigpt3d.modeling_minigpt3d import MiniGPT3DForConditionalGeneration
from minigpt3d.processing_minigpt3d import END_OF_ANSWER, MiniGPT3DProcessor

from .conditions import apply, read_clouds
from .objects import EvalObject
from .progress import progress
from .suites import Question


ANSWERS_DIR = "answers"


@dataclass(frozen=True)
class Job:
    """One question, asked about objects under one condition (see `conditions`)."""

    question: Question
    condition: str
    objects: tuple[EvalObject, ...]


# ---- Lines that survive ---------------------------------------------------------------------------------------------


def read_lines(folder: Path) -> Iterator[dict]:
    """All whole lines of the parts in a folder; one that was torn when a run was killed is passed over.

    Raises:
        ValueError: a line is damaged.
    """
    for path in sorted(folder.glob("part-*.jsonl")):
        for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
            try:
                yield json.loads(line)
            except ValueError as error:
                raise ValueError(
                    f"{path}, line {number}: damaged ({error}). Delete the line, and the same command asks again."
                ) from error


def open_part(folder: Path, process_index: int) -> Path:
    """This process's part, without the line that a killed run may have torn."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"part-{process_index}.jsonl"
    if path.exists() and (torn := len(path.read_bytes().rpartition(b"\n")[2])):
        os.truncate(path, path.stat().st_size - torn)
    return path


def append_lines(path: Path, lines: list[dict]):
    """Append lines in one write, which is on disk when this returns."""
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    with open(path, "ab") as file:
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def line_key(line: dict) -> tuple[str, str, str]:
    """What a line is the answer to: question, condition and object."""
    return line["question"], line["condition"], line["object_id"]


# ---- Batches --------------------------------------------------------------------------------------------------------


def run_batches(
    jobs: list[Job],
    folder: Path,
    batch_size: int,
    seed: int,
    work: Callable[[Job, list[EvalObject], list[np.ndarray], int], list[dict]],
    what: str,
):
    """Do what is not done yet, this process its share.

    Args:
        folder: for the parts.
        seed: of conditions that draw by chance, and of the batches.
        work: (job, objects, clouds, seed of the batch) → a line for each object, without the three parts of its key.
        what: for the progress bar.
    """
    state = PartialState()
    state.wait_for_everyone()
    done = {line_key(line) for line in read_lines(folder)}
    state.wait_for_everyone()  # nobody writes before everybody has read
    part = open_part(folder, state.process_index)
    batches = [
        (job, list(job.objects[first : first + batch_size]), first)
        for job in jobs
        for first in range(0, len(job.objects), batch_size)
    ]
    missing = [
        batch
        for batch in batches
        if any((batch[0].question.name, batch[0].condition, each.object_id) not in done for each in batch[1])
    ]
    mine = missing[state.process_index :: state.num_processes]

    def load(batch) -> list[np.ndarray]:
        job, objects, _ = batch
        return [apply(job.condition, each.read(), each.object_id, seed) for each in objects]

    # Of all processes together: as far as this one is, so are the others.
    rounds = [missing[first : first + state.num_processes] for first in range(0, len(missing), state.num_processes)]
    sizes = [sum(len(objects) for _, objects, _ in batches) for batches in rounds]
    with (
        ThreadPoolExecutor(1) as pool,  # the next batch's clouds are read while this one is worked on
        progress(sum(sizes), what, "object", shown=state.is_main_process) as bar,
    ):
        waiting = [pool.submit(load, batch) for batch in mine[:1]]
        for number, (job, objects, first) in enumerate(mine):
            clouds = waiting.pop().result()
            waiting += [pool.submit(load, batch) for batch in mine[number + 1 : number + 2]]
            key = {"question": job.question.name, "condition": job.condition}
            name = zlib.crc32(f"{job.question.name} {job.condition}".encode())
            batch_seed = int(np.random.SeedSequence([seed, name, first]).generate_state(1)[0])
            before = time.perf_counter()
            lines = work(job, objects, clouds, batch_seed)
            key["seconds"] = round((time.perf_counter() - before) / len(objects) / state.num_processes, 4)
            lines = [{"object_id": each.object_id} | key | line for each, line in zip(objects, lines, strict=True)]
            append_lines(part, [line for line in lines if line_key(line) not in done])
            bar.set_postfix_str(f"{job.question.name}, {job.condition}", refresh=False)
            bar.update(sizes[number])
    state.wait_for_everyone()


# ---- Generation -----------------------------------------------------------------------------------------------------


def encode_question(
    processor: MiniGPT3DProcessor, clouds: list[np.ndarray], prompt: str, template: str
) -> BatchFeature:
    """Inputs of the model for one question about each of B clouds: `input_ids`, `attention_mask` (B, T), `point_clouds`."""
    content = [{"type": "point_cloud", "point_cloud": _STAND_IN}, {"type": "text", "text": prompt}]
    inputs = processor.apply_chat_template(
        [[{"role": "user", "content": content}]] * len(clouds),
        chat_template=template,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
        processor_kwargs={"padding": True},
    )
    inputs["point_clouds"] = read_clouds(processor, clouds)
    return inputs


# The chat template wants some cloud, and would not read a blind one.
_STAND_IN = np.eye(2, 6, dtype=np.float32)


@torch.inference_mode()
def generate(
    model: MiniGPT3DForConditionalGeneration,
    processor: MiniGPT3DProcessor,
    clouds: list[np.ndarray],
    prompt: str,
    template: str,
    decoding: dict,
    seed: int,
) -> list[dict]:
    """Answers to one question about each of B clouds.

    Args:
        template: name of one of the processor's chat templates.
        decoding: arguments of `generate`, `max_new_tokens` among them.
        seed: of the sampling.

    Returns:
        For each cloud `answer`, `tokens` (new ones, `###` among them and eos not) and `cut`: whether the limit ended it.
    """
    tokenizer = processor.tokenizer
    inputs = encode_question(processor, clouds, prompt, template)
    torch.manual_seed(seed)
    # Only eos is an end token: were `###` one, too, as a model's own settings may have it, `min_new_tokens` would forbid it.
    output = model.generate(
        **inputs.to(model.device),
        **decoding,
        eos_token_id=tokenizer.eos_token_id,
        stop_strings=[END_OF_ANSWER],
        tokenizer=tokenizer,
    )
    ends = {tokenizer.eos_token_id, tokenizer.pad_token_id}
    lines = []
    for row in output[:, inputs["input_ids"].shape[1] :].tolist():
        row = row[: next((place for place, token in enumerate(row) if token in ends), len(row))]
        text = tokenizer.decode(row, skip_special_tokens=True)
        ended = len(row) < decoding["max_new_tokens"] or END_OF_ANSWER in text
        lines.append({"answer": text.split(END_OF_ANSWER)[0].strip(), "tokens": len(row), "cut": not ended})
    return lines


def generate_answers(
    model: MiniGPT3DForConditionalGeneration,
    processor: MiniGPT3DProcessor,
    jobs: list[Job],
    out: Path,
    template: str,
    decoding: dict,
    batch_size: int,
    seed: int,
):
    """Ask everything that is not answered yet (see `read_lines`)."""

    def work(job: Job, objects: list[EvalObject], clouds: list[np.ndarray], batch_seed: int) -> list[dict]:
        return generate(model, processor, clouds, job.question.prompt, template, decoding, batch_seed)

    run_batches(jobs, out / ANSWERS_DIR, batch_size, seed, work, "answers")
