"""Judges: language models that are asked about answers, behind an OpenAI-compatible endpoint or in this process.

A judge is a callable, prompts → replies. What prompts ask and how replies are read is the matter of the metrics; a judge
only asks, as repeatably as the model lets it (temperature 0, a fixed seed), and never twice: each reply is kept as it
comes, so a killed run loses no more than the requests on their way.

    CACHE_DIR/DIGEST.json    {"key": {kind, model, settings, prompt}, "reply": text or null, "date", "endpoint", "sampled",
                              "finish_reason", "served_model", "prompt_tokens", "completion_tokens"}; DIGEST is that of
                              the key

A reply without text says nothing, so the next run asks again, unless the model had to stop there (see `FOR_GOOD`).
"""

import hashlib
import json
import os
import random
import re
import threading
import time
import uuid
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import closing
from datetime import date
from email.utils import parsedate_to_datetime
from functools import cached_property
from pathlib import Path
from queue import SimpleQueue
from urllib.parse import urlsplit

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from minigpt3d.evaluation.progress import progress


try:
    import openai
except ImportError:  # a local judge does without
    openai = None


MAX_TOKENS = 256  # of a reply: a verdict and its reason
_VERDICT = re.compile(r"\s*(?:[TF]|-?[0-9.]+)\s*#", re.IGNORECASE)  # how the replies to all prompts begin
END_OF_THOUGHT = "</think>"  # as Qwen3, DeepSeek-R1 and most others that think aloud have it
FOR_GOOD = ("length", "content_filter")  # reasons to end without text that would be the same again


class JudgeError(OSError):
    """A judge did not reply to all prompts. The replies that came are kept."""


class Judge(ABC):
    """What both kinds share: cache, count and progress bar. They differ in how they ask: `_ask`.

    Attributes:
        name: the model's.
        files: a digest of the files of a local folder, whose name others may have, too; else None.
        cache_dir: where replies are kept.
        usage: what was asked since the judge was made: `calls` that got a reply; different prompts whose reply was
            `cached`; those that `failed`; of the calls, the replies `cut` off at `max_tokens`, their `prompt_tokens` and
            `completion_tokens`, and the `cost` in US dollars (each null where endpoint or price does not tell).
    """

    def __init__(self, name: str, cache_dir: str | Path, key: dict, endpoint: str | None = None, price=None):
        self.name, self._key, self._price, self._has_price = name, key, price or (0, 0), price is not None
        self._endpoint = endpoint
        self.files = key.get("files")
        self._used: dict[str, dict] = {}
        self.cache_dir = Path(cache_dir)
        self._lock = threading.Lock()
        counts = dict.fromkeys(("calls", "cached", "failed", "cut", "prompt_tokens", "completion_tokens"), 0)
        self.usage = counts | {"cost": None if price is None else 0.0}

    def __call__(self, prompts: list[str]) -> list[str | None]:
        """The replies, in order, without the thoughts before them: maybe cut off, None where one held no text.

        Equal prompts are asked once.

        Raises:
            JudgeError: some prompts got no reply. The same call goes on from there.
        """
        if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError(f"A judge takes a list of prompts, each a text; got {prompts!r:.200}.")
        entries = {prompt: self._used.get(prompt) or self._recall(prompt) for prompt in prompts}
        missing = [prompt for prompt, entry in entries.items() if entry is None]
        cached = len(entries) - len(missing)
        self.usage["cached"] += cached
        bar = progress(len(entries), f"judge {self.name}", "reply", initial=cached)
        try:
            with bar, closing(self._ask(missing)) as answered:  # closed: no request starts after an error or Ctrl-C
                for entry in answered:
                    entries[entry["key"]["prompt"]] = entry
                    bar.set_postfix(
                        {name: self.usage[name] for name in ("prompt_tokens", "completion_tokens", "cost")},
                        refresh=False,
                    )
                    bar.update()
        except JudgeError as error:
            kept = sum(self._recall(prompt) is not None for prompt in entries)
            raise JudgeError(
                f"{error} {kept} of {len(entries)} replies are kept in {self.cache_dir}; run again to go on from there."
            ) from None  # what is chained may show the key
        self._used |= entries
        return [without_thought(entries[prompt]["reply"]) for prompt in prompts]

    def sum_up(self) -> dict:
        """All replies that were given since the judge was made, whenever they came.

        Returns:
            "replies": how many different ones; "cut": by the limit of tokens; "sampled": by a model that refuses
            temperature 0; "date" of the first and the last; "endpoint": the host that gave them, or several; None for a
            local model; "served_models": as the endpoint called itself;
            "prompt_tokens", "completion_tokens" and "cost" in US dollars, at today's price; None if unknown.
        """
        entries = list(self._used.values())
        dates = sorted({entry["date"] for entry in entries})
        tokens = {}
        for name in ("prompt_tokens", "completion_tokens"):
            known = all(entry[name] is not None for entry in entries)
            tokens[name] = sum(entry[name] for entry in entries) if known else None
        known = self._has_price and None not in tokens.values()
        cost = sum(n * price / 1e6 for n, price in zip(tokens.values(), self._price, strict=True)) if known else None
        return {
            "replies": len(entries),
            "cut": sum(entry["finish_reason"] == "length" for entry in entries),
            "sampled": sum(entry["sampled"] for entry in entries),
            "date": " to ".join(dict.fromkeys((*dates[:1], *dates[-1:]))),
            "endpoint": ", ".join(sorted({entry["endpoint"] for entry in entries} - {None})) or None,
            "served_models": sorted({entry["served_model"] for entry in entries} - {None}),
            **tokens,
            "cost": cost,
        }

    @abstractmethod
    def _ask(self, prompts: list[str]) -> Iterator[dict]:
        """The entries of the cache, already kept, in the order in which the replies come."""

    def _path(self, prompt: str) -> Path:
        key = json.dumps(self._key | {"prompt": prompt}, sort_keys=True)
        return self.cache_dir / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"

    def _recall(self, prompt: str) -> dict | None:
        """A prompt's entry, or None if there is none that says anything, or it is damaged."""
        try:
            entry = json.loads(self._path(prompt).read_bytes())
            whole = entry["key"] == self._key | {"prompt": prompt} and isinstance(entry["reply"], str | None)
            whole = whole and isinstance(entry["date"], str) and isinstance(entry["sampled"], bool)
            whole = whole and isinstance(entry["endpoint"], str | None)
            said = whole and (without_thought(entry["reply"]) or "").strip()
            whole = whole and bool(said or entry["finish_reason"] in FOR_GOOD)
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return entry if whole else None

    def _keep(self, prompt: str, reply: dict) -> dict:
        """The entry of a reply, counted and written in one step: others see all of it or nothing."""
        entry = {
            "key": self._key | {"prompt": prompt},
            "date": date.today().isoformat(),
            "endpoint": self._endpoint,
            **reply,
        }
        path = self._path(prompt)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(entry, indent=1), encoding="utf-8")
        os.replace(temporary, path)
        with self._lock:
            self.usage["calls"] += 1
            self.usage["cut"] += reply["finish_reason"] == "length"
            for name, usd_per_million in zip(("prompt_tokens", "completion_tokens"), self._price, strict=True):
                tokens = reply[name]
                self.usage[name] = _plus(self.usage[name], tokens)
                self.usage["cost"] = _plus(self.usage["cost"], tokens and tokens * usd_per_million / 1e6)
        return entry


def without_thought(reply: str | None) -> str | None:
    """What stands behind a thought, where a server or a local model lets it stand in the reply.

    A reply that begins with its verdict has none, whatever it quotes of an answer; and of several ends none is trusted.
    """
    thought, *rest = (reply or "").split(END_OF_THOUGHT)
    return rest[0].lstrip() if len(rest) == 1 and not _VERDICT.match(thought) else reply


def _plus(total: float | None, more: float | None) -> float | None:
    """The sum, unknown if one of them is."""
    return None if total is None or more is None else total + more


def _as_utf8(text: str) -> str:
    """Half an emoji, cut by a token limit or written as an escape in JSON, has no bytes: it becomes a question mark."""
    return text.encode("utf-8", "replace").decode()


# ---- Endpoint -------------------------------------------------------------------------------------------------------

ATTEMPTS = 7  # with waits of up to 1, 2, … 32 s between them: about a minute, after which most rate limits begin anew
MAX_RETRY_AFTER = 300  # seconds; who asks for more is out of quota rather than busy
GRACE = 10  # seconds that requests on their way get when the run ends early
REPLACEMENTS = {
    "seed": None,
    "temperature": None,
    "max_tokens": "max_completion_tokens",
}  # of settings that some models refuse
FIXES = {
    401: "Set the environment variable {variable} to a key that it accepts.",
    402: "Top up the account, or take another endpoint.",
    403: "Set the environment variable {variable} to a key that may use this model.",
    404: "Check the model's name, and the URL: that of most servers ends in /v1.",
    429: "Top up the account, or take another endpoint.",
}


class _NoReplyError(Exception):
    """One prompt was asked in vain."""


class EndpointJudge(Judge):
    """A model behind an OpenAI-compatible endpoint: a paid one, or vLLM, llama.cpp, Ollama on one's own machine.

    A server that is busy, broken or silent is asked again, later and later, and not before the time that it names. One
    that refuses (the key, the model) ends the run at once, and so do `concurrency` prompts in vain in a row,
    three at least; a stray one does when all others are answered. A prompt that a content filter refuses has the reply
    None. A model that thinks before it replies needs more `max_tokens`, or a server that turns thinking off: a reply that
    is cut off before its verdict cannot be read.

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
        if openai is None:
            raise ImportError('An endpoint is asked by the openai client: pip install "minigpt3d[eval]"')
        parts = urlsplit(url)
        self._shown_url = parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"A judge's URL looks like http://127.0.0.1:8000/v1, got {self._shown_url!r}.")
        if concurrency < 1 or (requests_per_minute is not None and requests_per_minute <= 0):
            raise ValueError(
                "concurrency must be 1 or more, requests_per_minute above 0 or None for no limit; got "
                f"{concurrency} and {requests_per_minute}."
            )
        self._api_key = os.environ.get(api_key_variable, "").strip()
        if not (self._api_key.isascii() and self._api_key.isprintable()):
            raise ValueError(f"The environment variable {api_key_variable} holds no key: expected one line of ASCII.")
        self._settings = {"temperature": 0, "seed": 0, "max_tokens": max_tokens}  # REPLACEMENTS may change them
        key = {"kind": "chat completions", "model": model, "settings": self._settings}
        super().__init__(model, cache_dir, key, parts.netloc.rpartition("@")[2], price)
        self._key_variable, self._concurrency = api_key_variable, concurrency
        # The client's own retries wait 8 s at most, know nothing of each other, and stop at a reply that is no JSON.
        # It insists on a key, and without one would take that of another variable.
        self._client = openai.OpenAI(api_key=self._api_key or "none", base_url=url, max_retries=0, timeout=timeout)
        self._interval = 60 / requests_per_minute if requests_per_minute else 0.0
        self._has_warned = False
        self._next_start = 0.0  # on the monotonic clock: no request starts before

    def _ask(self, prompts: list[str]) -> Iterator[dict]:
        todo, done, stop = SimpleQueue(), SimpleQueue(), threading.Event()

        def work():
            for prompt in iter(todo.get, None):
                try:
                    done.put(self._ask_until_answered(prompt, stop))
                except _NoReplyError as error:
                    done.put(error)
                except Exception as error:
                    done.put(error)  # ahead of those whom the next line stops
                    stop.set()  # here, for this thread would begin with the next prompt

        # Those of an executor would keep the process from ending until the last request has timed out.
        threads = [threading.Thread(target=work, daemon=True) for _ in range(min(self._concurrency, len(prompts)))]
        for prompt in [*prompts, *[None] * len(threads)]:
            todo.put(prompt)
        in_vain = in_a_row = 0
        try:
            for thread in threads:
                thread.start()
            for _ in prompts:
                outcome = done.get()
                if isinstance(outcome, dict):
                    in_a_row = 0
                    yield outcome
                elif isinstance(outcome, _NoReplyError):
                    last, in_vain, in_a_row = outcome, in_vain + 1, in_a_row + 1
                    self.usage["failed"] += 1
                    if in_a_row == max(3, self._concurrency):
                        break
                else:
                    raise outcome
        finally:
            stop.set()
            end = time.monotonic() + GRACE  # the replies that come until then are kept
            for thread in threads:
                thread.join(max(0, end - time.monotonic()))
        if in_vain:
            raise JudgeError(
                f"{self._shown_url} did not reply to {in_vain} of {len(prompts)} prompts; the last: {last}."
            )

    def _ask_until_answered(self, prompt: str, stop: threading.Event) -> dict:
        for attempt in range(ATTEMPTS):
            _pause(self.first_wait * 2 ** (attempt - 1) * random.uniform(0.5, 1) if attempt else 0, stop)
            while wait := self._take_turn():
                _pause(wait, stop)
            settings, is_silent = self._settings, False
            try:
                return self._keep(prompt, self._request(prompt, settings))
            except openai.APIStatusError as error:
                if error.code == "content_filter":  # how Azure refuses a prompt; its price is unknown
                    reply = dict.fromkeys(("reply", "served_model", "prompt_tokens", "completion_tokens"))
                    return self._keep(prompt, reply | {"finish_reason": "content_filter", "sampled": False})
                trouble = self._tell(f"HTTP {error.status_code} {error.response.text}")
                if not (_is_passing(error) or self._can_do_without(error, settings)):
                    fix = FIXES.get(error.status_code, "It was sent {settings}.")
                    raise JudgeError(
                        f"{self._shown_url} refuses to judge with {self.name!r}: {trouble}. "
                        + fix.format(variable=self._key_variable, settings=settings)
                    ) from None
                wait = _retry_after(error.response.headers)
                if wait > MAX_RETRY_AFTER:
                    raise _NoReplyError(f"{trouble} (it asks to wait {wait:.0f} s)") from None
                with self._lock:  # for all threads: each would be told the same
                    self._next_start = max(self._next_start, time.monotonic() + wait)
            except openai.APIConnectionError as error:  # timed out, refused or cut
                is_silent = isinstance(error, openai.APITimeoutError)
                trouble = self._tell(f"{error} {error.__cause__ or ''}")
            except ValueError as error:
                trouble = self._tell(f"no chat completion came, but {error}")
            if is_silent or attempt == 2:  # who is silent has been waited for long enough
                self._warn_of(trouble)
        raise _NoReplyError(f"{trouble} ({ATTEMPTS} attempts)")

    def _warn_of(self, trouble: str):
        """Once, what keeps a run waiting."""
        with self._lock:
            is_first, self._has_warned = not self._has_warned, True
        if is_first:
            warnings.warn(
                f"{self._shown_url}: {trouble}. It is asked again, up to {ATTEMPTS} times, later and later.",
                stacklevel=2,
            )

    def _take_turn(self) -> float:
        """Seconds until a request may start, to be asked again then; 0 if this one may."""
        with self._lock:
            now = time.monotonic()
            if now < self._next_start:
                return self._next_start - now
            self._next_start = now + self._interval
            return 0.0

    def _request(self, prompt: str, settings: dict) -> dict:
        messages = [{"role": "user", "content": _as_utf8(prompt)}]
        # Raw: the client makes something of anything that is JSON.
        completions = self._client.chat.completions.with_raw_response
        response = completions.create(model=self.name, messages=messages, **settings)
        completion = _read_completion(response.http_response.content.decode(errors="replace"))
        return completion | {"sampled": "temperature" not in settings}

    def _can_do_without(self, error: "openai.APIStatusError", settings: dict) -> bool:
        """Whether a request was refused for a setting that can be left out or renamed. It is, from now on."""
        if error.status_code not in (400, 422):
            return False
        for name, instead in REPLACEMENTS.items():
            if name in settings and re.search(rf"\b{name}\b", error.response.text):
                with self._lock:
                    if name in self._settings:  # no other thread was told before
                        others = {key: value for key, value in self._settings.items() if key != name}
                        self._settings = others | ({instead: self._settings[name]} if instead else {})
                return True
        return False

    def _tell(self, trouble: str) -> str:
        """On one line, not too long, and without the key, which some servers repeat."""
        trouble = trouble.replace(self._api_key, "***") if self._api_key else trouble
        return " ".join(trouble.split())[:300].rstrip(".")


def _is_passing(error: "openai.APIStatusError") -> bool:
    return error.status_code >= 500 or (error.status_code in (408, 409, 429) and error.code != "insufficient_quota")


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


def _read_completion(text: str) -> dict:
    """What is kept of a chat completion. Where there is no choice or no text, as after a content filter, the reply is None.

    Raises:
        ValueError: the text is no chat completion. The message is the text.
    """
    try:
        completion = json.loads(text)
        choice = completion["choices"][0] if completion["choices"] != [] else {"message": {}}
        reply, usage = choice["message"].get("content"), completion.get("usage") or {}
        tokens = {name: usage.get(name) for name in ("prompt_tokens", "completion_tokens")}
        finish_reason, served_model = choice.get("finish_reason"), completion.get("model")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(repr(text)) from None
    if not isinstance(reply, str | None) or not all(isinstance(number, int | None) for number in tokens.values()):
        raise ValueError(repr(text))
    reply = reply and _as_utf8(reply)
    return {"reply": reply, "finish_reason": finish_reason, "served_model": served_model, **tokens}


# ---- Local ----------------------------------------------------------------------------------------------------------


class LocalJudge(Judge):
    """A chat model of transformers in this process, greedy. Its weights are loaded when there is something to ask.

    Args:
        model: a folder or a Hub id.
        cache_dir: where replies are kept; runs and processes may share it.
        device: where it runs; None for the accelerator, if there is one.
        batch_size: prompts at a time.
        max_tokens: of a reply.
    """

    def __init__(
        self,
        model: str | Path,
        cache_dir: str | Path,
        device: str | None = None,
        *,
        batch_size: int = 8,
        max_tokens: int = MAX_TOKENS,
    ):
        self._source, self._batch_size, self._max_tokens = model, batch_size, max_tokens
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
        self._device = device or accelerator
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
        except (OSError, ValueError) as error:
            raise ValueError(
                f"No judge at {str(model)!r}: expected a folder or the Hub id of a chat model (one behind an endpoint "
                f"needs a URL). {str(error).splitlines()[0]}"
            ) from error
        if self._tokenizer.chat_template is None:
            raise ValueError(f"{model} has no chat template, so it is no chat model. Take an instruction-tuned one.")
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        folder = Path(model)
        name = folder.resolve().name if folder.is_dir() else str(model)
        key = {"kind": "transformers", "model": name, "settings": {"do_sample": False, "max_tokens": max_tokens}}
        if folder.is_dir():  # a folder's content may change under its name, and another may have the same
            files = [
                (file.name, file.stat().st_size, file.stat().st_mtime_ns)
                for file in sorted(folder.iterdir())
                if file.is_file()
            ]
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
            [[{"role": "user", "content": _as_utf8(prompt)}] for prompt in prompts],
            add_generation_prompt=True,
            padding=True,
            return_dict=True,
            return_tensors="pt",
            enable_thinking=False,  # for templates that know it: a thought would use up the tokens
        ).to(self._device)
        ends = self._model.generation_config.eos_token_id  # one id or several
        ends = self._tokenizer.eos_token_id if ends is None else ends
        output = self._model.generate(
            inputs["input_ids"],
            attention_mask=inputs["attention_mask"],  # and no token types, which most models do not take
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
                    "sampled": False,
                    "served_model": None,
                    "prompt_tokens": int(mask.sum()),
                    "completion_tokens": len(tokens),
                }
            )
        return replies
