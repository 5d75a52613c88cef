"""The options of an evaluation; the command line is made from this class."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from minigpt3d.arguments import natural_int, number_between, option, positive_int
from minigpt3d.data.reading import LimitOptions
from minigpt3d.data.reading_options import ReadingOptions
from minigpt3d.hub import check_device
from minigpt3d.messages import one_line

from .metrics.table import JUDGE_PROMPTS
from .suites import SUITES


# What `data` must be; household needs none.
DATA = {
    "modelnet40": "modelnet40_test_8192pts_fps.dat of PointLLM's data",
    "objaverse": "the folder of PointLLM's clouds",
    "caption": "the folder of PointLLM's clouds",
    "own": "a .csv or .jsonl of your objects, or a packed data set",
}
MODEL_OPTIONS = ("robustness", "greedy", "phrase", "device", "dtype")
ENDPOINT_OPTIONS = ("judge_concurrency", "judge_timeout", "judge_rpm", "judge_price")
JUDGE_OPTIONS = ("judge_url", "judge_prompt", "judge_cache", "judge_max_tokens", *ENDPOINT_OPTIONS)


@dataclass
class EvaluateOptions(ReadingOptions, LimitOptions):
    """Options of an evaluation; see the help of each field."""

    suite: str = option("objects and questions, see below", positional=True, metavar="SUITE", choices=list(SUITES))
    out: Path = option("folder for answers, scores and report", metavar="DIR")
    model: str | None = option("folder or Hub id (default: the bundled model)", None)
    answers: Path | None = option("score the answers in this file instead of asking a model", None, metavar="FILE")
    data: str | None = option("the suite's objects, see below", None, metavar="PATH")
    annotations: list[Path] = option("PointLLM's annotations of the objects", [], metavar="JSON")
    limit: int | None = option("evaluate only the first N objects, as a trial", None, type=positive_int, metavar="N")
    robustness: bool = option("also ask about corrupted clouds: eleven corruptions at five severities", False)

    greedy: bool = option(
        "take the most likely answer (default: sampling with 2 beams, as in the paper)", False, group="decoding"
    )
    template: Literal["default", "benchmark"] = option(
        "default: the prompt format of training; benchmark: exactly that of the authors' evaluation",
        "default",
        group="decoding",
    )
    phrase: list[str] = option(
        "answer whose likelihood is computed for each class, with {} for the class's name, such as 'This is a {}.'; may be "
        "repeated (default: the suite's)",
        [],
        group="decoding",
        metavar="TEXT",
        action="append",
    )
    batch_size: int = option("objects per batch", 16, group="decoding", type=positive_int, metavar="N")
    seed: int = option("seed of sampling, corruptions, shuffling and intervals", 0, group="decoding", type=natural_int)
    device: str | None = option(
        "cpu, cuda, cuda:1, mps (default: the accelerator if there is one)", None, group="decoding"
    )
    dtype: Literal["float16", "bfloat16", "float32"] | None = option(
        "of the weights (default: as stored, but float32 on a CPU)", None, group="decoding"
    )

    metrics: list[str] = option(
        "compute only these, and those that `out` already has scores of (default: all that need no download)",
        [],
        group="scores",
        metavar="NAME",
    )
    s_bert: str | None = option("also compute s_bert, with this encoder", None, group="scores", metavar="DIR_OR_ID")
    simcse: str | None = option("also compute simcse, with this encoder", None, group="scores", metavar="DIR_OR_ID")

    judge: str | None = option(
        "language model that judges answers: its name at the endpoint, else a folder or Hub id for transformers",
        None,
        group="judge",
        metavar="MODEL",
    )
    judge_url: str | None = option(
        "OpenAI-compatible endpoint, such as http://localhost:8000/v1 (vLLM, llama.cpp, Ollama, ...); the key is read from "
        "OPENAI_API_KEY",
        None,
        group="judge",
        metavar="URL",
    )
    judge_prompt: list[str] = option(
        "your own prompt for open_vocabulary_accuracy, caption_score or hallucination, with the placeholders {answer} and "
        "{reference}, or for closed_set_accuracy, with {answer} and {classes}; may be repeated",
        [],
        group="judge",
        metavar="METRIC=FILE",
        action="append",
    )
    judge_cache: Path | None = option(
        "folder of replies, which runs may share (default: judge/ in the output folder)",
        None,
        group="judge",
        metavar="DIR",
    )
    judge_concurrency: int | None = option(
        "requests at once (default: 8)", None, group="judge", type=positive_int, metavar="N"
    )
    judge_max_tokens: int | None = option(
        "length of a reply (default: 256); a model that thinks before it replies needs more",
        None,
        group="judge",
        type=positive_int,
        metavar="N",
    )
    judge_timeout: int | None = option(
        "seconds until a request without a reply is sent again (default: 120); a slow server needs more",
        None,
        group="judge",
        type=positive_int,
        metavar="SECONDS",
    )
    judge_rpm: int | None = option("requests per minute, at most", None, group="judge", type=positive_int, metavar="N")
    judge_price: list[float] | None = option(
        "US dollars per million tokens, to compute the cost",
        None,
        group="judge",
        type=number_between(0, 1e6),
        nargs=2,
        metavar=("IN", "OUT"),
    )

    @property
    def encoders(self) -> dict[str, str]:
        """The given sentence encoders, by metric."""
        return {name: encoder for name, encoder in (("s_bert", self.s_bert), ("simcse", self.simcse)) if encoder}

    def check(self):
        """Check the options against each other, before any heavy work.

        Raises:
            ValueError: options contradict each other, or a required one is missing.
        """
        if self.model is not None and self.answers is not None:
            raise ValueError("give `model` or `answers`, not both.")
        if self.answers is not None and (unused := self._given(MODEL_OPTIONS)):
            raise ValueError(
                f"`{unused[0]}` is for asking a model, but `answers` are given: leave it out. (Answers about corrupted "
                'objects have a "condition" such as "jitter-3".)'
            )
        if self.answers is not None and not self.answers.is_file():
            raise ValueError(
                f"`answers` {self.answers}: no such file. Expected answers of a program, as JSON or JSONL."
            )
        self._check_judge()
        check_device(self.device)
        if self.reading and self.suite != "own":
            names = ", ".join(f"`{name}`" for name in self.reading)
            raise ValueError(f"only your own files are read with {names}: leave it out, or choose the suite own.")
        if self.suite in DATA and self.data is None:
            raise ValueError(f"{self.suite} needs `data`: {DATA[self.suite]}.")
        if self.suite in ("objaverse", "caption") and not self.annotations:
            raise ValueError(f"{self.suite} needs `annotations`: PointLLM_brief_description_val_200_GT.json.")

    def _check_judge(self):
        if self.judge is None and (unused := self._given(JUDGE_OPTIONS)):
            raise ValueError(f"`{unused[0]}` belongs to a judge: name its model with `judge`.")
        if self.judge is not None and not self.judge.strip():
            raise ValueError("`judge` is empty: expected the name of a model.")
        if self.judge_url is None and (unused := self._given(ENDPOINT_OPTIONS)):
            raise ValueError(f"`{unused[0]}` belongs to a judge behind an endpoint: give its `judge_url`.")

    def _given(self, names: tuple[str, ...]) -> list[str]:
        return [name for name in names if getattr(self, name)]

    def read_judge_prompts(self) -> dict[str, str]:
        """The texts of `judge_prompt`, by name of `JUDGE_PROMPTS`.

        Raises:
            ValueError: an item is not METRIC=FILE, or its file cannot be read.
        """
        prompts = {}
        for item in self.judge_prompt:
            name, _, path = item.partition("=")
            if name not in JUDGE_PROMPTS or not path:
                raise ValueError(
                    f"`judge_prompt` {item}: expected METRIC=FILE, METRIC one of {', '.join(JUDGE_PROMPTS)}."
                )
            try:
                prompts[name] = Path(path).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise ValueError(
                    f"`judge_prompt` {item}: cannot be read as UTF-8 text ({one_line(error)})."
                ) from error
        return prompts
