"""The folder of a run: all files of an evaluation, written and read here except reports and pictures.

settings.json       what the answers depend on; a run with other settings is refused
history.json        one entry per run: date, command, versions, and whether it asked the model
answers/            answers, one file per process; likelihood/ the same for likelihoods of classes
judge/              the judge's replies
objects.jsonl       every scored answer
results.json        scores with intervals, tests, and what is needed to repeat them
report.md, report.html, pictures/
"""

import json
import os
import platform
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path

from filelock import FileLock, Timeout

from minigpt3d.files import parse_json, read_json, write_json, write_text

from .metrics.table import METRICS
from .results import SCHEMA, Results, ScoredAnswer, values_of


PACKAGES = ("torch", "transformers", "accelerate", "evaluate")  # their versions are recorded
_REPAIR = "Delete this file and run `minigpt3d evaluate` again: answers are kept, only scores are computed again."


@dataclass
class Settings:
    """What the answers depend on. `decoding` to `device` are None for another program's answers."""

    suite: str
    objects: int
    dataset: str
    model: str
    decoding: dict | None = None
    template: str | None = None
    prompts: str | None = None
    phrases: list[str] | None = None
    batch_size: int | None = None
    dtype: str | None = None
    device: str | None = None
    seed: int = 0


class Lines:
    """A folder of JSON lines, each about a question, a condition and an object: part-N.jsonl, one file per process.

    A line is appended in one write, so that a killed process leaves at most one torn line, at the end of its file.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def read(self) -> Iterator[dict]:
        """All complete lines; torn ones are skipped.

        Raises:
            ValueError: a line is damaged.
        """
        for path in sorted(self.folder.glob("part-*.jsonl")):
            for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
                where, advice = f"{path}, line {number}", "Delete the line; the same command asks again."
                content = parse_json(line, where, advice=advice)
                if not all(isinstance(content.get(name), str) for name in ("question", "condition", "object_id")):
                    raise ValueError(f"{where}: expected an answer, got {content!r:.80}. {advice}")
                yield content

    def keys(self) -> set[tuple[str, str, str]]:
        return {line_key(line) for line in self.read()}

    def open(self, process_index: int) -> Path:
        """The file of a process, without a torn line at its end."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"part-{process_index}.jsonl"
        if path.exists() and (torn := len(path.read_bytes().rpartition(b"\n")[2])):
            os.truncate(path, path.stat().st_size - torn)
        return path


def append_lines(path: Path, lines: Iterable[dict]):
    """Append lines in one write; they are on disk when this returns."""
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    with open(path, "ab") as file:
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def line_key(line: dict) -> tuple[str, str, str]:
    return line["question"], line["condition"], line["object_id"]


class RunFolder:
    """The folder of a run; see the head of this file."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.settings, self.history = self.path / "settings.json", self.path / "history.json"
        self.lock = self.path / ".lock"
        self.results, self.objects = self.path / "results.json", self.path / "objects.jsonl"
        self.answers, self.likelihoods = Lines(self.path / "answers"), Lines(self.path / "likelihood")

    # ---- Claim ------------------------------------------------------------------------------------------------------

    def check(self):
        """
        Raises:
            ValueError: the path is a file, or a folder with other content than an evaluation.
        """
        content = self.path.iterdir() if self.path.is_dir() else ()
        foreign = [path for path in content if path.suffix != ".tmp" and path != self.lock]
        if (self.path.exists() and not self.path.is_dir()) or (foreign and not self.settings.exists()):
            raise ValueError(
                f"`out` {self.path} is a file, or contains other files than an evaluation's. Give a new folder."
            )

    @contextmanager
    def locked(self):
        """Create the folder and keep other runs out of it.

        Raises:
            ValueError: another run is using it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.lock, timeout=0):
                yield
        except Timeout:
            raise ValueError(
                f"`out` {self.path}: another process is using it. Wait for it, or give another folder. (Start a run on several "
                "processes by `accelerate launch`; with torchrun on a CPU, set ACCELERATE_USE_CPU=true.)"
            ) from None

    def claim(self, settings: Settings):
        """Write the settings, or check that the folder's answers have the same.

        Raises:
            ValueError: the folder contains answers with other settings.
        """
        settings = asdict(settings)
        if self.settings.exists() and any(next(lines.read(), None) for lines in (self.answers, self.likelihoods)):
            earlier = read_json(self.settings)
            for name, value in settings.items():
                if earlier.get(name) != value:
                    hint = "; another `limit` needs another folder" if name == "objects" else ""
                    raise ValueError(
                        f"`out` {self.path} contains answers with {name} {earlier.get(name)!r}, but now it is {value!r}. Give "
                        f"another folder, or the earlier settings{hint}."
                    )
        else:
            self.history.unlink(missing_ok=True)  # of answers that were deleted
        write_json(self.settings, settings)

    def record_run(self, command: str, device: str | None, asked: bool) -> dict:
        """Add this run to the history.

        Args:
            asked: whether it asks the model anything.

        Returns:
            "command": of all runs; "date": of the last run that asked; "versions" and "device": of all that asked.
        """
        history = self._read_history() if self.history.exists() else []
        versions = {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}
        run = {"date": date.today().isoformat(), "command": command, "versions": versions, "device": device}
        history.append(run | {"asked": asked or not history})
        write_json(self.history, history)
        asking = [run for run in history if run["asked"]]

        def joined(values: Iterable[str], separator: str = ", ") -> str:
            return separator.join(dict.fromkeys(values))

        return {
            "date": asking[-1]["date"],
            "command": joined((run["command"] for run in history), " && "),
            "versions": {name: joined(run["versions"][name] for run in asking) for name in versions},
            "device": joined(run["device"] for run in asking if run["device"]) or None,
        }

    def _read_history(self) -> list[dict]:
        """
        Raises:
            ValueError: history.json is damaged.
        """
        advice = "Remove it; the report then names the runs from now on."
        history = read_json(self.history, list, advice)
        for run in history:
            if not isinstance(run, dict) or not {"date", "command", "versions", "device", "asked"} <= run.keys():
                raise ValueError(f"{self.history}: expected runs of this folder, got {run!r:.80}. {advice}")
        return history

    # ---- Results ----------------------------------------------------------------------------------------------------

    def write(self, results: Results, answers: list[ScoredAnswer]):
        """Write objects.jsonl and results.json, in immediate succession since they must match."""
        lines = (json.dumps(vars(answer), ensure_ascii=False) + "\n" for answer in answers)
        write_text(self.objects, "".join(lines))
        write_json(self.results, results.to_json())

    def earlier_judges(self) -> dict[str, str | None]:
        """The metrics of earlier results, each with its judge or None; empty without results."""
        return {score.metric: score.judge for score in self.read_results().scores} if self.results.is_file() else {}

    def read(self) -> tuple[Results, list[ScoredAnswer]]:
        """The results and scored answers of a finished run.

        Raises:
            ValueError: the run is not finished, or a file is damaged.
        """
        results, answers = self.read_results(), self.read_objects()
        for score in results.scores:
            count = len(values_of(answers, score.question, score.metric, score.condition))
            if count != score.objects and not METRICS[score.metric].is_ratio:  # objects without details have no ratio
                raise ValueError(
                    f"{self.objects} is damaged: it contains {count:,} of {score.objects:,} scores for {score.metric}. {_REPAIR}"
                )
        return results, answers

    def read_results(self) -> Results:
        """
        Raises:
            ValueError: results.json is missing, damaged, of another program or of another version.
        """
        path = self.results
        if not self.path.is_dir():
            raise ValueError(
                f"{self.path}: there is no such folder; expected one that `minigpt3d evaluate SUITE --out {self.path}` writes."
            )
        if not path.is_file():
            raise ValueError(
                f"{self.path} has no {path.name}: expected the folder of a finished run. Run `minigpt3d evaluate` with this "
                "output folder again; it resumes."
            )
        try:
            content = read_json(path)
            if content["schema"] != SCHEMA:
                raise ValueError(f"schema {content['schema']!r}, of another version")
            return Results.from_json(content)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}: expected schema {SCHEMA} as `minigpt3d evaluate` writes it, got {error!r}. Give the folder of a run. "
                f"{_REPAIR}"
            ) from error

    def read_objects(self) -> list[ScoredAnswer]:
        """
        Raises:
            ValueError: objects.jsonl is missing, or a line is not a scored answer.
        """
        if not self.objects.is_file():
            raise ValueError(
                f"{self.path} has no {self.objects.name}: `minigpt3d evaluate` writes it beside results.json."
            )
        answers = []
        with self.objects.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    answers.append(ScoredAnswer(**json.loads(line)))
                except (ValueError, TypeError) as error:
                    raise ValueError(
                        f"{self.objects}, line {number}: expected a scored answer, got {line[:60]!r} ({error!r}). {_REPAIR}"
                    ) from error
        return answers
