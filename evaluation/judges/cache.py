"""Replies of a judge on disk: FOLDER/DIGEST.json has the fields of a `Reply`; DIGEST is that of its key."""

import hashlib
import json
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from minigpt3d.files import write_text


END_OF_THOUGHT = "</think>"  # of Qwen3, DeepSeek-R1 and most others that think before they reply
FINAL_REASONS = ("length", "content_filter")  # finish reasons for which asking again would give no text either
_VERDICT = re.compile(r"\s*(?:[TF]|-?[0-9.]+)\s*#", re.IGNORECASE)  # how a reply to each default prompt begins


@dataclass(frozen=True)
class Reply:
    """A judge's reply to one prompt.

    Raises:
        TypeError: a field has another type.
    """

    key: dict  # what determines the reply: kind of judge, model, settings, prompt
    reply: str | None  # as it came
    date: str  # YYYY-MM-DD
    endpoint: str | None  # the host that replied; None for a local model
    sampled: bool  # whether the model refused temperature 0
    finish_reason: str | None  # "stop", "length", ...
    served_model: str | None  # the model's name according to the endpoint
    prompt_tokens: int | None  # None if unknown
    completion_tokens: int | None

    def __post_init__(self):
        for field in fields(self):
            if not isinstance(value := getattr(self, field.name), field.type):
                raise TypeError(f"`{field.name}` must be {field.type}, got {value!r:.100}")

    @property
    def text(self) -> str | None:
        """The reply without the thought before it, which some servers and models include.

        A reply that begins with its verdict contains no thought, whatever it quotes; nor does one with several end marks.
        """
        thought, *rest = (self.reply or "").split(END_OF_THOUGHT)
        return rest[0].lstrip() if len(rest) == 1 and not _VERDICT.match(thought) else self.reply

    @property
    def is_final(self) -> bool:
        """Whether later runs use it. A reply without text is requested again unless the model had to stop there."""
        return bool((self.text or "").strip()) or self.finish_reason in FINAL_REASONS


class ReplyCache:
    """Replies of one judge. Runs and processes may share a folder.

    Args:
        key: what determines a reply, apart from the prompt.
    """

    def __init__(self, folder: Path, key: dict):
        self.folder, self._key = folder, key

    def key(self, prompt: str) -> dict:
        """What determines the reply to a prompt."""
        return self._key | {"prompt": prompt}

    def read(self, prompt: str) -> Reply | None:
        """The reply to a prompt; None if there is none, its file is damaged, or it has to be requested again."""
        try:
            reply = Reply(**json.loads(self._path(prompt).read_bytes()))
        except (OSError, ValueError, TypeError):
            return None
        return reply if reply.key == self.key(prompt) and reply.is_final else None

    def write(self, reply: Reply):
        """Write a reply; other processes see the complete file or none."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self._path(reply.key["prompt"]), json.dumps(asdict(reply), indent=1))

    def _path(self, prompt: str) -> Path:
        digest = hashlib.sha256(json.dumps(self.key(prompt), sort_keys=True).encode()).hexdigest()
        return self.folder / f"{digest[:32]}.json"
