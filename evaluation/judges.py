"""Judges: language models that are asked about answers, behind an OpenAI-compatible endpoint or in this process.

A judge is a callable, prompts → replies. What prompts ask and how replies are read is the matter of the metrics; a judge
only asks, as repeatably as it can (temperature 0, a fixed seed), and never twice: each reply is kept as it comes, so a
killed run loses no more than the requests on their way.

    CACHE_DIR/DIGEST.json    {"key": {kind, model, settings, prompt}, "reply": text or null, "finish_reason",
                              "served_model", "prompt_tokens", "completion_tokens"}; DIGEST is that of the key
"""

import hashlib
import json
import os
import random
import re
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from email.utils import parsedate_to_datetime
from functools import cached_property
from pathlib import Path
from urllib.parse import urlsplit

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer


try:
    import openai
except ImportError as error:
    raise ImportError("Judges need the openai client: pip install 'minigpt3d[eval]'") from error


MAX_TOKENS = 256  # of a reply: a verdict and its reason


class JudgeError(RuntimeError):
    """A judge did not reply to all prompts. The replies that came are kept."""


class Judge:
    """What both kinds share: cache, count and progress bar. They differ in how they ask: `_ask`.

    Attributes:
        name: the model's.
        usage: what was asked since the judge was made: `calls` that got a reply; different prompts whose reply was
            `cached`; those that `failed`; of the calls, the replies `cut` off at `max_tokens`, their `prompt_tokens` and
            `completion_tokens`, and the `cost` in US dollars (each null where endpoint or price does not tell); the
            `endpoint`'s host, null for a local model.
    """

    def __init__(self, name: str, cache_dir: str | Path, key: dict, endpoint: str | None = None, price=None):
        self.name, self._key, self._price = name, key, price or (0, 0)
        self._cache_dir = Path(cache_dir)
        self._cache_dir.mkdir(parents=True, exist_ok=True)
        counts = dict.fromkeys(("calls", "cached", "failed", "cut", "prompt_tokens", "completion_tokens"), 0)
        self.usage = counts | {"cost": None if price is None else 0.0, "endpoint": endpoint}

    def __call__(self, prompts: list[str]) -> list[str | None]:
        """The replies, in order, as they came: maybe cut off, None where one held no text. Equal prompts are asked once.

        Raises:
            JudgeError: some prompts got no reply. The same call goes on from there.
        """
        if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError(f"A judge takes a list of prompts, each a text; got {prompts!r:.200}.")
        entries = {prompt: self._recall(prompt) for prompt in prompts}
        missing = [prompt for prompt, entry in entries.items() if entry is None]
        cached = len(entries) - len(missing)
        self.usage["cached"] += cached
        bar = tqdm(total=len(entries), initial=cached, desc=f"judge {self.name}", unit="reply", disable=None)
        try:
            with bar, closing(self._ask(missing)) as answered:  # closed: no request starts after an error or Ctrl-C
                for entry in answered:
                    entries[entry["key"]["prompt"]] = entry
                    self._count(entry)
                    bar.set_postfix(
                        {name: self.usage[name] for name in ("prompt_tokens", "completion_tokens", "cost")}
                    )
                    bar.update()
        except JudgeError as error:
            kept = sum(self._recall(prompt) is not None for prompt in entries)
            raise JudgeError(
                f"{error} {kept} of {len(entries)} replies are kept in {self._cache_dir}; run again to go on from there."
            ) from None
        return [entries[prompt]["reply"] for prompt in prompts]

    def _ask(self, prompts: list[str]) -> Iterator[dict]:
        """The entries of the cache, already written, in the order in which the replies come."""
        raise NotImplementedError

    def _count(self, entry: dict):
        self.usage["calls"] += 1
        self.usage["cut"] += entry["finish_reason"] == "length"
        for name, usd_per_million in zip(("prompt_tokens", "completion_tokens"), self._price, strict=True):
            tokens = entry[name]
            self.usage[name] = _plus(self.usage[name], tokens)
            self.usage["cost"] = _plus(self.usage["cost"], tokens and tokens * usd_per_million / 1e6)

    def _path(self, prompt: str) -> Path:
        key = json.dumps(self._key | {"prompt": prompt}, sort_keys=True)
        return self._cache_dir / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"

    def _recall(self, prompt: str) -> dict | None:
        """A prompt's entry, or None if there is none or it is damaged."""
        try:
            entry = json.loads(self._path(prompt).read_bytes())
            whole = entry["key"] == self._key | {"prompt": prompt} and isinstance(entry["reply"], str | None)
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None
        return entry if whole else None

    def _keep(self, prompt: str, reply: dict) -> dict:
        """The entry of a reply, written in one step: other processes and later runs see all of it or nothing."""
        entry = {"key": self._key | {"prompt": prompt}, **reply}
        path = self._path(prompt)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        temporary.write_text(json.dumps(entry, indent=1), encoding="utf-8")
        os.replace(temporary, path)
        return entry


def _plus(total: float | None, more: float | None) -> float | None:
    """The sum, unknown if one of them is."""
    return None if total is None or more is None else total + more


# ---- Endpoint -------------------------------------------------------------------------------------------------------

ATTEMPTS = 7  # with waits of up to 1, 2, … 32 s between them: about a minute, after which most rate limits begin anew
MAX_RETRY_AFTER = 300  # seconds; who asks for more is out of quota rather than busy
REPLACEMENTS = {"seed": None, "max_tokens": "max_completion_tokens"}  # of settings that some models refuse
FIXES = {
    401: "Set the environment variable {variable} to a key that it accepts.",
    403: "Set the environment variable {variable} to a key that may use this model.",
    404: "Check the model's name, and the URL: that of most servers ends in /v1.",
    429: "Top up the account, or take another endpoint.",
}


class _NoReplyError(Exception):
    """One prompt was asked in vain."""


class EndpointJudge(Judge):
    """A model behind an OpenAI-compatible endpoint: a paid one, or vLLM, llama.cpp, Ollama on one's own machine.

    A server that is busy, broken or silent is asked again, later and later, and not before the time that it names. One
    that refuses (the key, the model, the URL) ends the run at once, and so do `concurrency` prompts in vain in a row; a
    stray one does when all others are answered. A model that thinks before it replies needs more `max_tokens`, or a
    server that turns thinking off: a reply that is cut off before its verdict cannot be read.

    Args:
        model: its name at the endpoint.
        url: what `/chat/completions` is appended to, such as http://127.0.0.1:8000/v1.
        cache_dir: where replies are kept; runs and processes may share it.
        api_key_variable: the environment variable that holds the key; unset where none is needed.
        concurrency: requests on their way at a time.
        requests_per_minute: at most; None for no limit.
        price: US dollars per million prompt and completion tokens; None if unknown.
        timeout: seconds without a byte from the server, after which a request counts as lost.
        max_tokens: of a reply.
    """

    first_wait = 1.0  # seconds before the second attempt, doubled before each further one

    def __init__(
        self,
        model: str,
        url: str,
        cache_dir: str | Path,
        *,
        api_key_variable: str = "OPENAI_API_KEY",
        concurrency: int = 8,
        requests_per_minute: float | None = None,
        price: tuple[float, float] | None = None,
        timeout: float = 120.0,
        max_tokens: int = MAX_TOKENS,
    ):
        parts = urlsplit(url)
        self._shown_url = parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"A judge's URL looks like http://127.0.0.1:8000/v1, got {self._shown_url!r}.")
        if concurrency < 1 or (requests_per_minute is not None and requests_per_minute <= 0):
            raise ValueError(
                "concurrency must be 1 or more, requests_per_minute above 0 or None for no limit; got "
                f"{concurrency} and {requests_per_minute}."
            )
        # Less what the model turns out to refuse.
        self._settings = {"temperature": 0, "seed": 0, "max_tokens": max_tokens}
        key = {"kind": "chat completions", "model": model, "settings": dict(self._settings)}
        super().__init__(model, cache_dir, key, parts.hostname, price)
        self._key_variable, self._concurrency = api_key_variable, concurrency
        self._api_key = os.environ.get(api_key_variable, "").strip() or "none"  # the client insists on one
        # The client's own retries wait 8 s at most, know nothing of each other, and stop at a reply that is no JSON.
        self._client = openai.OpenAI(api_key=self._api_key, base_url=url, max_retries=0, timeout=timeout)
        self._lock = threading.Lock()
        self._interval = 60 / requests_per_minute if requests_per_minute else 0.0
        self._next_start = 0.0  # on the monotonic clock: no request starts before

    def _ask(self, prompts: list[str]) -> Iterator[dict]:
        stop = threading.Event()
        pool = ThreadPoolExecutor(self._concurrency)
        in_vain = in_a_row = 0
        try:
            for future in as_completed([pool.submit(self._ask_until_answered, prompt, stop) for prompt in prompts]):
                try:
                    entry = future.result()
                except _NoReplyError as error:
                    last, in_vain, in_a_row = error, in_vain + 1, in_a_row + 1
                    self.usage["failed"] += 1
                    if in_a_row == self._concurrency:
                        break
                else:
                    in_a_row = 0
                    yield entry
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)  # waits for the requests on their way: their replies are kept
        if in_vain:
            raise JudgeError(
                f"{self._shown_url} did not reply to {in_vain} of {len(prompts)} prompts; the last: {last}."
            )

    def _ask_until_answered(self, prompt: str, stop: threading.Event) -> dict:
        for attempt in range(ATTEMPTS):
            if attempt:
                _pause(self.first_wait * 2 ** (attempt - 1) * random.uniform(0.5, 1), stop)
            with self._lock:
                now = time.monotonic()
                start = max(now, self._next_start)
                self._next_start = start + self._interval
            _pause(start - now, stop)
            settings = dict(self._settings)
            try:
                return self._keep(prompt, self._request(prompt, settings))
            except openai.APIStatusError as error:
                trouble = self._tell(f"HTTP {error.status_code} {error.response.text}")
                if not (self._is_passing(error) or self._can_do_without(error, settings)):
                    fix = FIXES.get(error.status_code, "It was sent {settings}.")
                    raise JudgeError(
                        f"{self._shown_url} refuses to judge with {self.name!r}: {trouble}. "
                        + fix.format(variable=self._key_variable, settings=settings)
                    ) from None  # what is chained may show the key
                wait = _retry_after(error.response.headers)
                if wait > MAX_RETRY_AFTER:
                    raise _NoReplyError(f"{trouble} (it asks to wait {wait:.0f} s)") from None
                with self._lock:  # for all threads: each would be told the same
                    self._next_start = max(self._next_start, time.monotonic() + wait)
            except openai.APIConnectionError as error:  # timed out, refused or cut
                trouble = self._tell(f"{error} {error.__cause__ or ''}")
            except ValueError as error:  # something else than a completion
                trouble = self._tell(f"no chat completion came: {error}")
        raise _NoReplyError(f"{trouble} ({ATTEMPTS} attempts)")

    def _request(self, prompt: str, settings: dict) -> dict:
        content = prompt.encode("utf-8", "replace").decode()  # half an emoji, cut by a token limit, is no UTF-8
        response = self._client.chat.completions.with_raw_response.create(
            model=self.name, messages=[{"role": "user", "content": content}], **settings
        )
        return _read_completion(json.loads(response.http_response.content))

    def _is_passing(self, error: openai.APIStatusError) -> bool:
        return error.status_code in (408, 409, 429) and error.code != "insufficient_quota" or error.status_code >= 500

    def _can_do_without(self, error: openai.APIStatusError, settings: dict) -> bool:
        """Whether a request was refused for a setting that can be left out or renamed. It is, from now on."""
        for name in settings.keys() & REPLACEMENTS.keys() if error.status_code in (400, 422) else ():
            if re.search(rf"\b{name}\b", error.response.text):
                with self._lock:
                    if name in self._settings:  # no other thread was told before
                        value, instead = self._settings.pop(name), REPLACEMENTS[name]
                        self._settings |= {instead: value} if instead else {}
                return True
        return False

    def _tell(self, trouble: str) -> str:
        """On one line, not too long, and without the key, which some servers repeat."""
        return " ".join(trouble.replace(self._api_key, "***").split())[:300].rstrip(".")


def _pause(seconds: float, stop: threading.Event):
    if stop.wait(seconds):
        raise _NoReplyError("the run ended")


def _retry_after(headers) -> float:
    """Seconds that a Retry-After header asks to wait, given as such or as a date; 0 if it cannot be read."""
    value = headers.get("retry-after", "")
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, OverflowError):
            return 0.0
    return seconds if seconds > 0 else 0.0  # neither negative nor NaN


def _read_completion(completion) -> dict:
    """What is kept of a chat completion. Where there is no choice or no text, as after a content filter, the reply is None.

    Raises:
        ValueError: it is none.
    """
    try:
        choice = {"message": {}} if completion["choices"] == [] else completion["choices"][0]
        reply = choice["message"].get("content")
        usage = completion.get("usage") or {}
        tokens = {name: usage.get(name) for name in ("prompt_tokens", "completion_tokens")}
        finish_reason, served_model = choice.get("finish_reason"), completion.get("model")
    except (KeyError, IndexError, TypeError, AttributeError):
        raise ValueError(json.dumps(completion)) from None
    if not isinstance(reply, str | None) or not all(isinstance(number, int | None) for number in tokens.values()):
        raise ValueError(json.dumps(completion))
    return {"reply": reply, "finish_reason": finish_reason, "served_model": served_model, **tokens}


# ---- Local ----------------------------------------------------------------------------------------------------------


class LocalJudge(Judge):
    """A chat model of transformers in this process, greedy. Its weights are loaded when there is something to ask.

    Args:
        model: a folder or a Hub id.
        cache_dir: where replies are kept; runs and processes may share it.
        device: where it runs.
        batch_size: prompts at a time.
        max_tokens: of a reply.
    """

    def __init__(
        self,
        model: str | Path,
        cache_dir: str | Path,
        device: str = "cpu",
        *,
        batch_size: int = 8,
        max_tokens: int = MAX_TOKENS,
    ):
        self._source, self._device, self._batch_size, self._max_tokens = model, device, batch_size, max_tokens
        self._tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
        if self._tokenizer.chat_template is None:
            raise ValueError(f"{model} has no chat template, so it is no chat model. Take an instruction-tuned one.")
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        folder = Path(model)
        name = folder.resolve().name if folder.is_dir() else str(model)
        key = {"kind": "transformers", "model": name, "settings": {"do_sample": False, "max_tokens": max_tokens}}
        if folder.is_dir():  # a folder's content may change under its name, and another may have the same
            files = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(folder.iterdir())]
            key["files"] = hashlib.sha256(json.dumps(files).encode()).hexdigest()[:16]
        super().__init__(name, cache_dir, key)

    @cached_property
    def _model(self):
        return AutoModelForCausalLM.from_pretrained(self._source, dtype="auto").to(self._device).eval()

    def _ask(self, prompts: list[str]) -> Iterator[dict]:
        prompts = sorted(prompts, key=len)  # less padding
        for first in range(0, len(prompts), self._batch_size):
            batch = prompts[first : first + self._batch_size]
            yield from [self._keep(prompt, reply) for prompt, reply in zip(batch, self._generate(batch), strict=True)]

    @torch.inference_mode()
    def _generate(self, prompts: list[str]) -> list[dict]:
        inputs = self._tokenizer.apply_chat_template(
            [[{"role": "user", "content": prompt}] for prompt in prompts],
            add_generation_prompt=True,
            padding=True,
            return_dict=True,
            return_tensors="pt",
            enable_thinking=False,  # for templates that know it: a thought would use up the tokens
        ).to(self._device)
        ends = self._model.generation_config.eos_token_id  # one id or several
        ends = self._tokenizer.eos_token_id if ends is None else ends
        output = self._model.generate(
            **inputs,
            max_new_tokens=self._max_tokens,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,  # spelled out, for the model's own defaults stand in for what is left out
            eos_token_id=ends,
            pad_token_id=self._tokenizer.pad_token_id,
        )
        replies = []
        for tokens, mask in zip(output[:, inputs["input_ids"].shape[1] :], inputs["attention_mask"], strict=True):
            end = torch.isin(tokens, torch.tensor(ends, device=tokens.device)).nonzero().flatten()[:1]
            tokens = tokens[: int(end) + 1] if len(end) else tokens
            replies.append(
                {
                    "reply": self._tokenizer.decode(tokens, skip_special_tokens=True),
                    "finish_reason": "stop" if len(end) else "length",
                    "served_model": None,
                    "prompt_tokens": int(mask.sum()),
                    "completion_tokens": len(tokens),
                }
            )
        return replies
