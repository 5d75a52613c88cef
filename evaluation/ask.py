"""Ask a model: in batches, on all processes of Accelerate; answers are appended to files, and an interrupted run resumes.

Batches are the same in every run. Each has its own seed and its answers are appended in one write, so a killed run resumes with
the missing batches, and answers do not depend on interruptions or the number of processes.

Shapes: B objects of a batch, N points, T tokens.
"""

import hashlib
import json
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import PartialState
from transformers import BatchFeature

from minigpt3d.hub import load_model
from minigpt3d.messages import one_line
from minigpt3d.modeling_minigpt3d import MiniGPT3DForConditionalGeneration
from minigpt3d.pipeline_minigpt3d import default_dtype
from minigpt3d.processing_minigpt3d import MiniGPT3DProcessor

from .conditions import apply, read_clouds
from .evaluate_options import EvaluateOptions
from .likelihood import class_log_likelihoods, encode_answers
from .objects import EvalObject, check_clouds
from .plan import EvaluationPlan, Job
from .progress import progress
from .run_folder import Lines, Settings, append_lines, line_key
from .suites import DECODING, GREEDY


Work = Callable[[Job, list[EvalObject], list[np.ndarray], int], list[dict]]


@dataclass
class Asked:
    """How the answers in a folder were made.

    Args:
        history: what `RunFolder.record_run` returns; None on all processes but the first.
    """

    settings: Settings
    history: dict | None
    parameters: int | None = None


def keep_answers(plan: EvaluationPlan, answers: list[dict], fingerprint: str, command: str) -> Asked:
    """Write another program's answers to the folder."""
    settings = _make_settings(plan, fingerprint)
    if not PartialState().is_main_process:
        return Asked(settings, None)
    plan.folder.claim(settings)
    part = plan.folder.answers.open(0)
    part.unlink(missing_ok=True)
    append_lines(part, answers)
    return Asked(settings, plan.folder.record_run(command, None, asked=False))


def ask_model(plan: EvaluationPlan, name: str, fingerprint: str, command: str) -> Asked:
    """Write a model's missing answers, and its likelihoods of classes, to the folder.

    Args:
        name: folder or Hub id of the model.
    """
    options, folder, suite = plan.options, plan.folder, plan.suite
    settings = _make_settings(plan, fingerprint)
    model, processor = load_for_evaluation(name, options)
    settings.decoding = (GREEDY if options.greedy else DECODING) | {"max_new_tokens": suite.max_new_tokens}
    settings.template, settings.batch_size = options.template, options.batch_size
    settings.prompts = _hash_questions(plan, processor)
    settings.phrases = None if suite.classes is None else list(suite.phrases)
    settings.dtype, settings.device = str(model.dtype).removeprefix("torch."), model.device.type
    asked = Asked(settings, None, model.num_parameters())
    jobs, likelihood_jobs = plan.answer_jobs(), plan.likelihood_jobs()
    if PartialState().is_main_process:
        folder.claim(settings)
        is_complete = _is_done(jobs, folder.answers) and _is_done(likelihood_jobs, folder.likelihoods)
        device = torch.cuda.get_device_name() if model.device.type == "cuda" else str(model.device)
        asked.history = folder.record_run(command, device, asked=not is_complete)
    up_axis = "y" if options.up_axis else None  # then the reader has rotated the objects

    def answer(job: Job, objects: list[EvalObject], clouds: list[np.ndarray], seed: int) -> list[dict]:
        prompt = job.question.prompt
        return generate(model, processor, clouds, prompt, options.template, settings.decoding, seed, up_axis)

    run_batches(jobs, folder.answers, options.batch_size, options.seed, answer, "answers")
    if likelihood_jobs:
        take_likelihoods(plan, model, processor, up_axis)
    return asked


def _make_settings(plan: EvaluationPlan, fingerprint: str) -> Settings:
    is_main = PartialState().is_main_process
    dataset = check_clouds(plan.objects.values(), plan.options.limits) if is_main else ""
    return Settings(plan.suite.name, len(plan.objects), dataset, fingerprint, seed=plan.options.seed)


def load_for_evaluation(
    name: str, options: EvaluateOptions
) -> tuple[MiniGPT3DForConditionalGeneration, MiniGPT3DProcessor]:
    """Model and processor, on the device of this process.

    Raises:
        ValueError: there is no such model, or the device cannot be used.
    """
    model, processor = load_model(name)
    try:
        device = torch.device(options.device) if options.device else PartialState().device
        dtype = getattr(torch, options.dtype) if options.dtype else default_dtype(model, device)
        return model.to(device, dtype).eval(), processor
    except Exception as error:
        raise ValueError(
            f"`device` {options.device} cannot be used: {one_line(error)}. Leave it out for the default."
        ) from error


def _hash_questions(plan: EvaluationPlan, processor: MiniGPT3DProcessor) -> str:
    """Hash of the token ids of all questions, which template and tokenizer determine."""
    ids = [
        encode_answers(processor, question.prompt, ["a"], plan.options.template)[0]
        for question in plan.suite.questions
    ]
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:16]


def _is_done(jobs: list[Job], lines: Lines) -> bool:
    keys = {(job.question.name, job.condition, item.object_id) for job in jobs for item in job.objects}
    return keys <= lines.keys()


# ---- Batches --------------------------------------------------------------------------------------------------------


def run_batches(jobs: list[Job], lines: Lines, batch_size: int, seed: int, work: Work, title: str):
    """Process this process's share of the batches that are missing in `lines`.

    Args:
        lines: where the results go.
        seed: of corruptions, and of the batches.
        work: (job, objects, clouds, seed of the batch) → a line per object, without question, condition and object_id.
        title: of the progress bar.
    """
    state = PartialState()
    state.wait_for_everyone()
    done = lines.keys()
    state.wait_for_everyone()  # no process writes before all have read
    part = lines.open(state.process_index)
    batches = [
        (job, list(job.objects[first : first + batch_size]), first)
        for job in jobs
        for first in range(0, len(job.objects), batch_size)
    ]
    missing = [
        (job, objects, first)
        for job, objects, first in batches
        if any((job.question.name, job.condition, item.object_id) not in done for item in objects)
    ]
    share = missing[state.process_index :: state.num_processes]
    # The bar counts all processes, assuming that the others are as far as this one.
    rounds = [missing[first : first + state.num_processes] for first in range(0, len(missing), state.num_processes)]
    sizes = [sum(len(objects) for _, objects, _ in batches) for batches in rounds]

    def load(batch: tuple) -> list[np.ndarray]:
        job, objects, _ = batch
        return [apply(job.condition, item.read(), item.object_id, seed) for item in objects]

    with (
        ThreadPoolExecutor(1) as pool,  # reads the next batch's clouds meanwhile
        progress(sum(sizes), title, "object", shown=state.is_main_process) as bar,
    ):
        waiting = [pool.submit(load, batch) for batch in share[:1]]
        for number, (job, objects, first) in enumerate(share):
            clouds = waiting.pop().result()
            waiting += [pool.submit(load, batch) for batch in share[number + 1 : number + 2]]
            key = {"question": job.question.name, "condition": job.condition}
            name = zlib.crc32(f"{job.question.name} {job.condition}".encode())
            batch_seed = int(np.random.SeedSequence([seed, name, first]).generate_state(1)[0])
            start = time.perf_counter()
            results = work(job, objects, clouds, batch_seed)
            key["seconds"] = round((time.perf_counter() - start) / len(objects) / state.num_processes, 4)
            new = [{"object_id": item.object_id} | key | line for item, line in zip(objects, results, strict=True)]
            append_lines(part, [line for line in new if line_key(line) not in done])
            bar.set_postfix_str(f"{job.question.name}, {job.condition}", refresh=False)
            bar.update(sizes[number])
    state.wait_for_everyone()


# ---- Generation -----------------------------------------------------------------------------------------------------

# The chat template needs a cloud that the processor can read, which a blind one is not; it is replaced afterwards.
_PLACEHOLDER_CLOUD = np.eye(2, 6, dtype=np.float32)


def encode_question(
    processor: MiniGPT3DProcessor, clouds: list[np.ndarray], prompt: str, template: str, up_axis: str | None = None
) -> BatchFeature:
    """Inputs of the model for one question about each of B clouds: `input_ids`, `attention_mask` (B, T), `point_clouds`."""
    content = [{"type": "point_cloud", "point_cloud": _PLACEHOLDER_CLOUD}, {"type": "text", "text": prompt}]
    inputs = processor.apply_chat_template(
        [[{"role": "user", "content": content}]] * len(clouds),
        chat_template=template,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
        processor_kwargs={"padding": True},
    )
    inputs["point_clouds"] = read_clouds(processor, clouds, up_axis)
    return inputs


@torch.inference_mode()
def generate(
    model: MiniGPT3DForConditionalGeneration,
    processor: MiniGPT3DProcessor,
    clouds: list[np.ndarray],
    prompt: str,
    template: str,
    decoding: dict,
    seed: int,
    up_axis: str | None = None,
) -> list[dict]:
    """Answers to one question about each of B clouds.

    Args:
        template: name of one of the processor's chat templates.
        decoding: arguments of `generate`, with `max_new_tokens`.
        seed: of the sampling.
        up_axis: of the clouds; None for the processor's own.

    Returns:
        For each cloud `answer`, `tokens` (new ones, with `###` and without eos) and `cut`: whether the limit ended it.
    """
    tokenizer, end_of_answer = processor.tokenizer, processor.end_of_answer
    inputs = encode_question(processor, clouds, prompt, template, up_axis)
    torch.manual_seed(seed)
    # Only eos ends an answer here: if `###` did, as in the model's settings, `min_new_tokens` would suppress it.
    output = model.generate(
        **inputs.to(model.device),
        **decoding,
        eos_token_id=tokenizer.eos_token_id,
        stop_strings=[end_of_answer],
        tokenizer=tokenizer,
    )
    ends = {tokenizer.eos_token_id, tokenizer.pad_token_id}
    lines = []
    for row in output[:, inputs["input_ids"].shape[1] :].tolist():
        row = row[: next((position for position, token in enumerate(row) if token in ends), len(row))]
        text = tokenizer.decode(row, skip_special_tokens=True)
        ended = len(row) < decoding["max_new_tokens"] or end_of_answer in text
        lines.append({"answer": text.split(end_of_answer)[0].strip(), "tokens": len(row), "cut": not ended})
    return lines


def take_likelihoods(
    plan: EvaluationPlan,
    model: MiniGPT3DForConditionalGeneration,
    processor: MiniGPT3DProcessor,
    up_axis: str | None = None,
):
    """Compute the missing likelihoods of all class names as the answer to the main question."""
    options = plan.options
    names = [name for names in plan.suite.classes.values() for name in names]
    settings = {"template": options.template, "batch_size": max(1, options.batch_size // 4), "up_axis": up_axis}

    def work(job: Job, objects: list[EvalObject], clouds: list[np.ndarray], seed: int) -> list[dict]:
        sums, tokens = class_log_likelihoods(
            model, processor, clouds, job.question.prompt, names, plan.suite.phrases, **settings
        )
        return [{"log_likelihood": row.tolist(), "tokens": tokens.tolist()} for row in sums]

    jobs = plan.likelihood_jobs()
    run_batches(jobs, plan.folder.likelihoods, options.batch_size, options.seed, work, "likelihoods")
