"""A judge in this process: a chat model of transformers."""

import hashlib
import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from .cache import Reply
from .judge import MAX_TOKENS, Judge, without_surrogates


class LocalJudge(Judge):
    """A chat model with greedy decoding. Its weights are loaded when there is something to ask.

    Args:
        model: a folder or a Hub id.
        cache_dir: where replies are kept; runs and processes may share it.
        device: where it runs; None for the accelerator, if there is one.
        batch_size: prompts at a time.
        max_tokens: of a reply.
    """

    def __init__(
        self, model, cache_dir, device: str | None = None, *, batch_size: int = 8, max_tokens: int = MAX_TOKENS
    ):
        self._source, self._batch_size, self._max_tokens = model, batch_size, max_tokens
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
        self._device = device or accelerator
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left", trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"`model` {str(model)!r} cannot be loaded: expected a folder or the Hub id of a chat model, or a `url` for a "
                f"model behind an endpoint. {str(error).splitlines()[0]}"
            ) from error
        if self._tokenizer.chat_template is None:
            raise ValueError(f"`model` {model} has no chat template: use an instruction-tuned model")
        self._tokenizer.pad_token = self._tokenizer.pad_token or self._tokenizer.eos_token
        folder = Path(model)
        name = folder.resolve().name if folder.is_dir() else str(model)
        key = {"kind": "transformers", "model": name, "settings": {"do_sample": False, "max_tokens": max_tokens}}
        if folder.is_dir():  # other folders may have its name, and its files may change
            stats = [(path.name, path.stat()) for path in sorted(folder.iterdir()) if path.is_file()]
            files = [(file_name, stat.st_size, stat.st_mtime_ns) for file_name, stat in stats]
            key["files"] = hashlib.sha256(json.dumps(files).encode()).hexdigest()[:16]
        super().__init__(name, cache_dir, key)

    @cached_property
    def _model(self):
        model = AutoModelForCausalLM.from_pretrained(self._source, dtype="auto", trust_remote_code=False)
        return model.to(self._device).eval()

    def _ask(self, prompts: list[str]) -> Iterator[Reply]:
        prompts = sorted(prompts, key=len)  # similar lengths: little padding
        for first in range(0, len(prompts), self._batch_size):
            batch = prompts[first : first + self._batch_size]
            yield from [self._keep(prompt, reply) for prompt, reply in zip(batch, self._generate(batch), strict=True)]

    @torch.inference_mode()
    def _generate(self, prompts: list[str]) -> list[dict]:
        inputs = self._tokenizer.apply_chat_template(
            [[{"role": "user", "content": without_surrogates(prompt)}] for prompt in prompts],
            add_generation_prompt=True,
            padding=True,
            return_dict=True,
            return_tensors="pt",
            enable_thinking=False,  # read by some templates: a thought would use up the tokens
        ).to(self._device)
        ends = self._model.generation_config.eos_token_id  # one id or several
        ends = self._tokenizer.eos_token_id if ends is None else ends
        output = self._model.generate(  # without token types, which most models do not take
            inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=self._max_tokens,
            # Spelled out, since the model's generation settings replace what is left out.
            do_sample=False, num_beams=1, repetition_penalty=1.0, eos_token_id=ends,
            pad_token_id=self._tokenizer.pad_token_id,
        )  # fmt: skip
        replies = []
        for tokens, mask in zip(output[:, inputs["input_ids"].shape[1] :], inputs["attention_mask"], strict=True):
            end = torch.isin(tokens, torch.tensor(ends, device=tokens.device)).nonzero().flatten()[:1]
            tokens = tokens[: int(end) + 1] if len(end) else tokens
            replies.append({
                "reply": self._tokenizer.decode(tokens, skip_special_tokens=True), "sampled": False, "served_model": None,
                "finish_reason": "stop" if len(end) else "length",
                "prompt_tokens": int(mask.sum()), "completion_tokens": len(tokens),
            })  # fmt: skip
        return replies
