"""A judge behind an OpenAI-compatible endpoint: a paid one, or vLLM, llama.cpp, Ollama on a machine of one's own."""

import json
import os
import re
import threading
import time
import warnings
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from pathlib import Path
from queue import SimpleQueue
from urllib.parse import urlsplit

from .cache import Reply
from .judge import MAX_TOKENS, Judge, JudgeError, without_surrogates


try:
    import openai
except ImportError:  # a local judge does not need it
    openai = None

# The client waits 0.5 to 8 s between attempts: a minute in all, after which most rate limits are reset.
ATTEMPTS = 11
MAX_RETRY_AFTER = 300  # seconds; a server that asks for more has no quota left
GRACE = 10  # seconds for requests that are in flight when the run ends early
REPLACEMENTS = {"seed": None, "temperature": None, "max_tokens": "max_completion_tokens"}  # of refused settings
FIXES = {
    401: "Set the environment variable {variable} to a key that it accepts.",
    402: "Top up the account, or use another endpoint.",
    403: "Set the environment variable {variable} to a key that may use this model.",
    404: "Check the model's name and the URL, which ends in /v1 for most servers.",
    429: "Top up the account, or use another endpoint.",
}


class _NoReplyError(Exception):
    """One prompt got no reply."""


class EndpointJudge(Judge):
    """A model behind an OpenAI-compatible endpoint.

    The openai client retries requests that a busy, broken or silent server does not answer. A refusal (key, model) ends the run
    at once, and so do `concurrency` prompts in a row without a reply, but at least three; a single one does so after all others
    are answered. A prompt that a content filter refuses has the reply None. A model that thinks before it replies
    needs a larger `max_tokens`, or a server that turns thinking off.

    Args:
        model: its name at the endpoint.
        url: the part before `/chat/completions`, such as http://127.0.0.1:8000/v1.
        cache_dir: where replies are kept; runs and processes may share it.
        api_key_variable: environment variable that holds the API key; unset if none is needed.
        concurrency: requests in flight at a time.
        requests_per_minute: upper limit; None for no limit.
        price: US dollars per million prompt and completion tokens; None if unknown.
        timeout: seconds without a byte from the server, after which a request is lost.
        max_tokens: of a reply.
    """

    def __init__(
        self, model: str, url: str, cache_dir: str | Path, *, api_key_variable: str = "OPENAI_API_KEY", concurrency: int = 8,
        requests_per_minute: float | None = None, price: tuple[float, float] | None = None, timeout: float = 120.0,
        max_tokens: int = MAX_TOKENS,
    ):  # fmt: skip
        if openai is None:
            raise ImportError('a judge behind an endpoint needs the openai client: pip install "minigpt3d[eval]"')
        parts = urlsplit(url)
        host = parts.netloc.rpartition("@")[2]  # without a password
        self._shown_url = parts._replace(netloc=host, query="", fragment="").geturl()
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"`url` must look like http://127.0.0.1:8000/v1, got {self._shown_url!r}")
        if concurrency < 1:
            raise ValueError(f"`concurrency` must be at least 1, got {concurrency}")
        if requests_per_minute is not None and requests_per_minute <= 0:
            raise ValueError(f"`requests_per_minute` must be above 0, or None for no limit, got {requests_per_minute}")
        self._api_key = os.environ.get(api_key_variable, "").strip()
        if not (self._api_key.isascii() and self._api_key.isprintable()):
            raise ValueError(f"the environment variable {api_key_variable} holds no key: expected one line of ASCII")
        self._settings = {"temperature": 0, "seed": 0, "max_tokens": max_tokens}  # replaced if some are refused
        key = {"kind": "chat completions", "model": model, "settings": self._settings}
        super().__init__(model, cache_dir, key, host, price)
        self._url, self._key_variable, self._concurrency, self._timeout = url, api_key_variable, concurrency, timeout
        self._interval = 60 / requests_per_minute if requests_per_minute else 0.0
        self._next_start = 0.0  # monotonic time before which no request starts
        self._has_warned = False
        self._lock = threading.Lock()
        self._thread = threading.local()  # stop: ends the run; of the current prompt: attempts, trouble, completion

    def _make_client(self) -> "openai.OpenAI":
        hooks = {"request": [self._before_request], "response": [self._after_response]}
        return openai.OpenAI(
            api_key=self._api_key or "none",  # the client insists on one, and without it takes another variable's
            base_url=self._url, max_retries=ATTEMPTS - 1, timeout=self._timeout,
            http_client=openai.DefaultHttpxClient(event_hooks=hooks),
        )  # fmt: skip

    def _ask(self, prompts: list[str]) -> Iterator[Reply]:
        todo, done, stop = SimpleQueue(), SimpleQueue(), threading.Event()
        # Not an executor's threads: those keep the process from ending until the last request has timed out.
        threads = [
            threading.Thread(target=self._work, args=(todo, done, stop), daemon=True)
            for _ in range(min(self._concurrency, len(prompts)))
        ]
        for prompt in [*prompts, *[None] * len(threads)]:
            todo.put(prompt)
        failures, in_a_row = [], 0
        try:
            for thread in threads:
                thread.start()
            for _ in prompts:
                outcome = done.get()
                if isinstance(outcome, Reply):
                    in_a_row = 0
                    yield outcome
                elif isinstance(outcome, _NoReplyError):
                    failures.append(outcome)
                    in_a_row += 1
                    if in_a_row == max(3, self._concurrency):
                        break
                else:
                    raise outcome
        finally:
            stop.set()
            end = time.monotonic() + GRACE  # replies that come until then are kept
            for thread in threads:
                thread.join(max(0, end - time.monotonic()))
        if failures:
            missing = f"{len(failures)} of {len(prompts)} prompts"
            raise JudgeError(f"{self._shown_url} did not reply to {missing}; the last: {failures[-1]}.")

    def _work(self, todo: SimpleQueue, done: SimpleQueue, stop: threading.Event):
        """In a thread of its own: ask about the prompts of `todo` until None comes; put replies and errors into `done`."""
        self._thread.stop = stop
        with self._make_client() as client:
            for prompt in iter(todo.get, None):
                try:
                    done.put(self._ask_one(client, prompt))
                except Exception as error:
                    done.put(error)  # before the errors of the threads that the next line stops
                    if not isinstance(error, _NoReplyError):
                        stop.set()  # here, or this thread would begin the next prompt

    def _ask_one(self, client: "openai.OpenAI", prompt: str) -> Reply:
        state, settings = self._thread, self._settings
        state.attempts, state.trouble = 0, None
        if state.stop.is_set():
            raise _NoReplyError("the run ended")
        messages = [{"role": "user", "content": without_surrogates(prompt)}]
        try:
            client.chat.completions.create(model=self.name, messages=messages, **settings)
            reply = state.completion | {"sampled": "temperature" not in settings}
        except openai.APIStatusError as error:
            if error.code != "content_filter":
                if self._replace_setting(error, settings):
                    return self._ask_one(client, prompt)
                raise self._failure(error, settings) from None  # the error may contain the key
            reply = dict.fromkeys(("reply", "served_model", "prompt_tokens", "completion_tokens"))  # price unknown
            reply |= {"finish_reason": "content_filter", "sampled": False}
        except openai.OpenAIError as error:  # no connection, or of `_before_request`
            raise _NoReplyError(self._shown(f"{error} {error.__cause__ or ''} ({state.attempts} attempts)")) from None
        return self._keep(prompt, reply)

    def _failure(self, error: "openai.APIStatusError", settings: dict) -> Exception:
        """The error to raise for a status, after the client's last attempt."""
        is_passing = error.status_code >= 500 or error.status_code in (408, 409, 429)
        if is_passing and error.code != "insufficient_quota":
            return _NoReplyError(f"{self._thread.trouble} ({self._thread.attempts} attempts)")
        fix = FIXES.get(error.status_code, "It was sent {settings}.")
        fix = fix.format(variable=self._key_variable, settings=settings)
        return JudgeError(f"{self._shown_url} refuses to judge with {self.name!r}: {self._thread.trouble}. {fix}")

    def _replace_setting(self, error: "openai.APIStatusError", settings: dict) -> bool:
        """Leave out or rename the setting that a request was refused for, from now on; whether there was one."""
        if error.status_code not in (400, 422):
            return False
        for name, replacement in REPLACEMENTS.items():
            if name in settings and re.search(rf"\b{name}\b", error.response.text):
                with self._lock:  # another thread may have replaced it before
                    others = {key: value for key, value in self._settings.items() if key != name}
                    self._settings = others | ({replacement: settings[name]} if replacement else {})
                return True
        return False

    def _before_request(self, request):
        """Before each attempt of the client: wait for the rate limit, and as long as the server asked any thread to wait.

        Raises:
            openai.OpenAIError: the run ended. The client would retry after other errors.
        """
        state = self._thread
        if state.attempts == 2 or (state.attempts == 1 and state.trouble is None):
            self._warn(state.trouble or f"no reply within {self._timeout:g} s, or no connection")
        state.attempts, state.trouble = state.attempts + 1, None
        while not state.stop.is_set():
            with self._lock:
                now = time.monotonic()
                if now >= self._next_start:
                    self._next_start = now + self._interval
                    return
                wait = self._next_start - now
            state.stop.wait(wait)
        raise openai.OpenAIError("the run ended")

    def _after_response(self, response):
        """After each attempt: read the completion, or tell the client whether to retry and all threads how long to wait."""
        response.read()
        if response.is_redirect:
            return
        if response.is_success:
            try:
                self._thread.completion = _read_completion(response.content.decode(errors="replace"))
            except ValueError as error:
                self._thread.trouble = self._shown(f"no chat completion came, but {error}")
                response.status_code = 502  # bad gateway: the client retries after errors only
            return
        wait = _retry_after(response.headers)
        self._thread.trouble = self._shown(f"HTTP {response.status_code} {response.text}")
        if wait > MAX_RETRY_AFTER:
            self._thread.trouble += f" (it asks to wait {wait:.0f} s)"
        if wait > MAX_RETRY_AFTER or "insufficient_quota" in response.text:
            response.headers["x-should-retry"] = "false"  # the client obeys this header
        elif wait:
            with self._lock:
                self._next_start = max(self._next_start, time.monotonic() + wait)
        response.headers.pop("retry-after", None)  # else the client would sleep, and a refusal could not wake it

    def _warn(self, trouble: str):
        """Warn once about what keeps the run waiting."""
        with self._lock:
            is_first, self._has_warned = not self._has_warned, True
        if is_first:
            warnings.warn(f"{self._shown_url}: {trouble}. Each prompt is tried up to {ATTEMPTS} times.", stacklevel=2)

    def _shown(self, trouble: str) -> str:
        """On one line, not too long, and without the key, which some servers repeat."""
        trouble = trouble.replace(self._api_key, "***") if self._api_key else trouble
        return " ".join(trouble.split())[:300].rstrip(".")


def _retry_after(headers) -> float:
    """Seconds of a Retry-After header, which holds a number or a date; 0 if it cannot be read."""
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
    """The fields of a `Reply` in a chat completion. Without a choice or a text, as after a content filter, the reply is None.

    Raises:
        ValueError: the text is no chat completion. The message is the text.
    """
    try:
        completion = json.loads(text)
        choice = completion["choices"][0] if completion["choices"] != [] else {"message": {}}
        reply, usage = choice["message"].get("content"), completion.get("usage") or {}
        tokens = {name: usage.get(name) for name in ("prompt_tokens", "completion_tokens")}
        facts = {"finish_reason": choice.get("finish_reason"), "served_model": completion.get("model")}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(repr(text)) from None
    is_valid = all(isinstance(value, str | None) for value in (reply, *facts.values()))
    if not is_valid or not all(isinstance(count, int | None) for count in tokens.values()):
        raise ValueError(repr(text))
    return {"reply": reply and without_surrogates(reply)} | facts | tokens
