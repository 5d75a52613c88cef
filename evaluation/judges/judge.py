"""What judges share, cache, totals and progress bar, and `make_judge`, which chooses one. Judges differ in how they ask."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import closing
from datetime import date
from pathlib import Path

from minigpt3d.evaluation.evaluate_options import EvaluateOptions
from minigpt3d.evaluation.progress import progress

from .cache import Reply, ReplyCache


MAX_TOKENS = 256  # of a reply: a verdict and its reason


class JudgeError(OSError):
    """A judge did not reply to all prompts. The replies that came are kept."""


class Judge(ABC):
    """A language model that replies to prompts.

    Args:
        name: the model's.
        cache_dir: where replies are kept.
        key: what determines a reply, apart from the prompt.
        endpoint: host that replies; None for a local model.
        price: US dollars per million prompt and completion tokens; None if unknown.

    Attributes:
        files: digest of the files of a local folder, whose name other folders may share; else None.
    """

    def __init__(self, name: str, cache_dir: str | Path, key: dict, endpoint: str | None = None, price=None):
        self.name, self.cache_dir, self.files = name, Path(cache_dir), key.get("files")
        self._endpoint, self._price = endpoint, price
        self._cache = ReplyCache(self.cache_dir, key)
        self._used: dict[str, Reply] = {}

    def __call__(self, prompts: list[str]) -> list[str | None]:
        """Ask about the prompts that have no reply yet; equal prompts are asked once.

        Returns:
            The replies in order, without the thoughts before them: possibly cut off, None where there is no text.

        Raises:
            JudgeError: some prompts got no reply. The same call resumes from there.
        """
        if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError(f"`prompts` must be a list of texts, got {prompts!r:.200}")
        replies = {prompt: self._used.get(prompt) or self._cache.read(prompt) for prompt in prompts}
        missing = [prompt for prompt, reply in replies.items() if reply is None]
        bar = progress(len(replies), f"judge {self.name}", "reply", initial=len(replies) - len(missing))
        new = []
        try:
            with bar, closing(self._ask(missing)) as answered:  # closed: no request starts after an error or Ctrl-C
                for reply in answered:
                    replies[reply.key["prompt"]] = reply
                    new.append(reply)
                    bar.set_postfix(self._totals(new), refresh=False)
                    bar.update()
        except JudgeError as error:
            kept = sum(self._cache.read(prompt) is not None for prompt in replies)
            raise JudgeError(
                f"{error} {kept} of {len(replies)} replies are kept in {self.cache_dir}; run again to resume."
            ) from None  # a chained error may contain the API key
        self._used |= replies
        return [replies[prompt].text for prompt in prompts]

    def sum_up(self) -> dict:
        """Facts about all replies that this judge returned, from the cache or new.

        Returns:
            "replies": number of different ones; "cut": of them cut off at the token limit; "sampled": of them by a model that
            refuses temperature 0; "date": first and last; "endpoint": the host or hosts, None for a local model;
            "served_models": names according to the endpoint; "prompt_tokens", "completion_tokens", and "cost" in
            US dollars at today's price, None if unknown.
        """
        replies = list(self._used.values())
        dates = sorted({reply.date for reply in replies})
        return {
            "replies": len(replies),
            "cut": sum(reply.finish_reason == "length" for reply in replies),
            "sampled": sum(reply.sampled for reply in replies),
            "date": " to ".join(dict.fromkeys((*dates[:1], *dates[-1:]))),
            "endpoint": ", ".join(sorted({reply.endpoint for reply in replies} - {None})) or None,
            "served_models": sorted({reply.served_model for reply in replies} - {None}),
        } | self._totals(replies)

    @abstractmethod
    def _ask(self, prompts: list[str]) -> Iterator[Reply]:
        """Ask about each prompt and `_keep` its reply, in the order in which the replies come."""

    def _keep(self, prompt: str, reply: dict) -> Reply:
        """Write a reply to the cache."""
        key = self._cache.key(prompt)
        kept = Reply(key=key, date=date.today().isoformat(), endpoint=self._endpoint, **reply)
        self._cache.write(kept)
        return kept

    def _totals(self, replies: list[Reply]) -> dict:
        totals, cost = {}, None
        for name in ("prompt_tokens", "completion_tokens"):
            counts = [getattr(reply, name) for reply in replies]
            totals[name] = None if None in counts else sum(counts)
        if self._price is not None and None not in totals.values():
            cost = sum(tokens * price / 1e6 for tokens, price in zip(totals.values(), self._price, strict=True))
        return totals | {"cost": cost}


def without_surrogates(text: str) -> str:
    """Replace half an emoji, cut at a token limit or escaped in JSON, by a question mark: it cannot be encoded."""
    return text.encode("utf-8", "replace").decode()


def make_judge(options: EvaluateOptions) -> Judge | None:
    """The judge that the options describe: a model behind an endpoint, or in this process.

    Raises:
        ValueError: it cannot be used; names the option.
        ImportError: a package is missing.
    """
    if options.judge is None:
        return None
    cache = options.judge_cache or options.out / "judge"
    limits = {name: getattr(options, f"judge_{name}") for name in ("max_tokens", "concurrency", "timeout")}
    limits = {name: limit for name, limit in limits.items() if limit is not None}
    try:
        if options.judge_url is None:
            from .local import LocalJudge

            return LocalJudge(options.judge, cache, options.device, **limits)
        from .endpoint import EndpointJudge

        price = None if options.judge_price is None else tuple(options.judge_price)
        settings = {"requests_per_minute": options.judge_rpm, "price": price}
        return EndpointJudge(options.judge, options.judge_url, cache, **settings, **limits)
    except ValueError as error:  # arguments of a judge have other names here
        raise ValueError(str(error).replace("`model`", "`judge`").replace("`url`", "`judge_url`")) from error
