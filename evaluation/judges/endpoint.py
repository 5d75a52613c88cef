"""A judge behind an OpenAI-compatible endpoint: a paid service, or vLLM, llama.cpp or Ollama on your own machine."""

import json
import os
import re
import threading
import time
import warnings
from collections.abc import Iterator
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
GRACE = 10  # seconds for requests that are in flight when the run ends early
KEY_VARIABLE = "OPENAI_API_KEY"
SHORTEST_SECRET = (
    6  # a shorter key, such as the "EMPTY" of local servers, protects nothing and may be a word of a reply
)
REPLACEMENTS = {"seed": None, "temperature": None, "max_tokens": "max_completion_tokens"}  # of refused settings
FIXES = {
    401: f"Set the environment variable {KEY_VARIABLE} to a key that it accepts.",
    402: "Top up the account, or use another endpoint.",
    403: f"Set the environment variable {KEY_VARIABLE} to a key that may use this model.",
    404: "Check the model's name and the URL, which ends in /v1 for most servers.",
    429: "Top up the account, or use another endpoint.",
}


class _NoReplyError(Exception):
    """One prompt got no reply."""


class EndpointJudge(Judge):
    """A model behind an OpenAI-compatible endpoint; the API key is read from `OPENAI_API_KEY`.

    The openai client repeats requests after rate limits, server errors and timeouts. The run ends at once if the server
    refuses the key or the model, or if `concurrency` prompts in a row (at least three) get no reply. If fewer fail, all other
    prompts are answered first. A prompt that a content filter refuses has the reply None.

    Args:
        model: its name at the endpoint.
        url: the part before `/chat/completions`, such as http://127.0.0.1:8000/v1.
        cache_dir: where replies are kept; runs and processes may share it.
        concurrency: requests in flight at a time.
        requests_per_minute: upper limit; None for no limit.
        price: US dollars per million prompt and completion tokens; None if unknown.
        timeout: seconds without a byte from the server, after which a request is repeated.
        max_tokens: of a reply. A model that thinks before it replies needs more.
    """

    def __init__(
        self, model: str, url: str, cache_dir: str | Path, *, concurrency: int = 8, requests_per_minute: float | None = None,
        price: tuple[float, float] | None = None, timeout: float = 120.0, max_tokens: int = MAX_TOKENS,
    ):  # fmt: skip
        if openai is None:
            raise ImportError('a judge behind an endpoint needs the openai client: pip install "minigpt3d[eval]"')
        parts = urlsplit(url)
        host = parts.netloc.rpartition("@")[2]  # without a password
        self._shown_url = parts._replace(netloc=host, query="", fragment="").geturl()
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"`url` must look like http://127.0.0.1:8000/v1, got {self._shown_url!r}")
        self._api_key = os.environ.get(KEY_VARIABLE, "").strip()
        if not (self._api_key.isascii() and self._api_key.isprintable()):
            raise ValueError(f"the environment variable {KEY_VARIABLE} holds no key: expected one line of ASCII")
        self._settings = {"temperature": 0, "seed": 0, "max_tokens": max_tokens}  # replaced if some are refused
        key = {"kind": "chat completions", "model": model, "settings": self._settings}
        super().__init__(model, cache_dir, key, host, price)
        self._url, self._concurrency, self._timeout = url, concurrency, timeout
        self._interval = 60 / requests_per_minute if requests_per_minute else 0.0
        self._next_start = 0.0  # monotonic time before which no request starts
        self._has_warned = False
        self._lock = threading.Lock()
        self._thread = threading.local()  # of the last attempt: trouble, completion

    def _make_client(self) -> "openai.OpenAI":
        hooks = {"request": [self._before_request], "response": [self._after_response]}
        return openai.OpenAI(
            api_key=self._api_key or "none",  # the client requires one
            base_url=self._url, max_retries=ATTEMPTS - 1, timeout=self._timeout,
            http_client=openai.DefaultHttpxClient(event_hooks=hooks),
        )  # fmt: skip

    def _ask(self, prompts: list[str]) -> Iterator[Reply]:
        outcomes, stop, remaining = SimpleQueue(), threading.Event(), iter(prompts)
        failures, in_a_row = [], 0
        with self._make_client() as client:
            # Daemon threads, because an executor's would keep the process alive until the last request has timed out.
            threads = [
                threading.Thread(target=self._work, args=(client, remaining, outcomes, stop), daemon=True)
                for _ in range(min(self._concurrency, len(prompts)))
            ]
            try:
                for thread in threads:
                    thread.start()
                for _ in prompts:
                    outcome = outcomes.get()
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

    def _work(self, client: "openai.OpenAI", prompts: Iterator[str], outcomes: SimpleQueue, stop: threading.Event):
        """In a thread: ask about prompts, which all threads take from one list iterator, and pass on replies and errors."""
        for prompt in prompts:
            if stop.is_set():
                return
            try:
                outcomes.put(self._ask_one(client, prompt))
            except Exception as error:
                outcomes.put(error)
                if not isinstance(error, _NoReplyError):
                    stop.set()

    def _ask_one(self, client: "openai.OpenAI", prompt: str) -> Reply:
        settings, self._thread.trouble = self._settings, None
        messages = [{"role": "user", "content": without_surrogates(prompt)}]
        try:
            client.chat.completions.create(model=self.name, messages=messages, **settings)
            reply = self._thread.completion | {"sampled": "temperature" not in settings}
        except openai.APIStatusError as error:
            if error.code != "content_filter":
                if self._replace_setting(error, settings):
                    return self._ask_one(client, prompt)
                raise self._failure(error, settings) from None  # the error may contain the key
            reply = dict.fromkeys(("reply", "served_model", "prompt_tokens", "completion_tokens"))  # price unknown
            reply |= {"finish_reason": "content_filter", "sampled": False}
        except openai.OpenAIError as error:  # no connection
            raise _NoReplyError(self._shown(f"{error} {error.__cause__ or ''} ({ATTEMPTS} attempts)")) from None
        return self._keep(prompt, reply)

    def _failure(self, error: "openai.APIStatusError", settings: dict) -> Exception:
        """The error to raise for a status, after the client's last attempt."""
        is_temporary = error.status_code >= 500 or error.status_code in (408, 409, 429)
        if is_temporary and error.code != "insufficient_quota":
            return _NoReplyError(f"{self._thread.trouble} (up to {ATTEMPTS} attempts)")
        fix = FIXES.get(error.status_code, f"It was sent {settings}.")
        return JudgeError(f"{self._shown_url} refuses to judge with {self.name!r}: {self._thread.trouble}. {fix}")

    def _replace_setting(self, error: "openai.APIStatusError", settings: dict) -> bool:
        """Leave out or rename the setting that a request was refused for, from now on; whether there was one."""
        if error.status_code not in (400, 422):
            return False
        for name, replacement in REPLACEMENTS.items():
            if name in settings and re.search(rf"\b{name}\b", error.response.text):
                others = {key: value for key, value in self._settings.items() if key != name}
                self._settings = others | ({replacement: settings[name]} if replacement else {})
                return True
        return False

    def _before_request(self, request):
        """Before each attempt of the client: wait for the rate limit; warn about the first retry of all."""
        if request.headers.get("x-stainless-retry-count", "0") != "0":
            trouble = self._thread.trouble or f"no reply within {self._timeout:g} s, or no connection"
            with self._lock:
                is_first, self._has_warned = not self._has_warned, True
            if is_first:
                warnings.warn(f"{self._shown_url}: {trouble}. A prompt is tried up to {ATTEMPTS} times.", stacklevel=2)
        self._thread.trouble = None
        with self._lock:
            start = max(time.monotonic(), self._next_start)
            self._next_start = start + self._interval
        time.sleep(max(0.0, start - time.monotonic()))

    def _after_response(self, response):
        """After each attempt: read the completion, or note what is wrong."""
        response.read()
        if response.is_success:
            try:
                completion = _read_completion(response.content.decode(errors="replace"))
                self._thread.completion = {name: self._without_key(value) for name, value in completion.items()}
            except ValueError as error:
                self._thread.trouble = self._shown(f"no chat completion came, but {error}")
                response.status_code = 502  # bad gateway: the client retries after errors only
            return
        wait = f" (Retry-After {response.headers['retry-after']})" if "retry-after" in response.headers else ""
        self._thread.trouble = self._shown(f"HTTP {response.status_code} {response.text}") + wait
        if "insufficient_quota" in response.text:
            response.headers["x-should-retry"] = "false"  # the client obeys this header

    def _shown(self, trouble: str) -> str:
        """On one line, not too long, and without the key, which some servers repeat."""
        return " ".join(self._without_key(trouble).split())[:300].rstrip(".")

    def _without_key(self, value):
        is_secret = isinstance(value, str) and len(self._api_key) >= SHORTEST_SECRET
        return value.replace(self._api_key, "***") if is_secret else value


def _read_completion(text: str) -> dict:
    """The fields of a `Reply` in a chat completion. Without a choice or a text, as after a content filter, the reply is None.

    Raises:
        ValueError: the text is no chat completion. The message is the text.
    """
    try:
        completion = json.loads(text)
        choice = completion["choices"][0] if completion["choices"] != [] else {"message": {}}
        content, usage = choice["message"].get("content"), completion.get("usage") or {}
        fields = {name: usage.get(name) for name in ("prompt_tokens", "completion_tokens")} | {
            "reply": content and without_surrogates(content),
            "finish_reason": choice.get("finish_reason"),
            "served_model": completion.get("model"),
        }
        Reply(key={}, date="", endpoint=None, sampled=False, **fields)  # checks the types
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(repr(text)) from None
    return fields
