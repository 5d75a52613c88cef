"""Processor of MiniGPT-3D: point clouds and chat text in, `input_ids`, `attention_mask` and `point_clouds` out.

One chat template serves training, evaluation, pipeline and demo (paper: §3.1.3, and the authors' code to the character).
In text a cloud is one `<point>`; in `input_ids` it is `num_query_tokens` of them, which the model replaces by vectors.

The processor never changes a question. As in the authors' code, the training data lower-cases the questions of single
rounds (`clean_question`) and keeps those of longer conversations; at inference a question stays as typed.

Shapes: B texts, C clouds of the batch, P points, T tokens.
"""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import AddedToken, pre_tokenizers
from transformers import BatchFeature, FeatureExtractionMixin, ProcessorMixin
from transformers.utils.chat_template_utils import render_jinja_template

from .point_cloud_minigpt3d import load_point_cloud


POINT_TOKEN = "<point>"
END_OF_PROMPT = "[/INST]"
END_OF_ANSWER = "###"
SHOWN_CLOUD = f"<PC>{POINT_TOKEN}</PC> "
DEFAULT_PROMPT = "What is this?"
# Around an answer while a language model's own template renders it; from Unicode's private use area.
ANSWER_START, ANSWER_END = "\ue000", "\ue001"
IGNORED_LABEL = -100  # which torch's cross entropy ignores
PADDINGS = (True, False, "longest", "max_length", "do_not_pad")


# ---- Text -----------------------------------------------------------------------------------------------------------


def _chat_template(opening: str, cloud: str, closing: str) -> str:
    """A user turn is opening, `cloud` once per cloud, text, closing; an assistant turn is text and `###`."""
    return (
        "{%- for message in messages -%}"
        "{%- set content = [{'type': 'text', 'text': message['content']}] "
        "if message['content'] is string else message['content'] -%}"
        "{%- if message['role'] == 'user' -%}"
        "{{- " + opening + " -}}"
        "{%- for item in content -%}{%- if item['type'] == 'point_cloud' -%}{{- '" + cloud + "' -}}"
        "{%- elif item['type'] != 'text' -%}"
        "{{- raise_exception(\"Content must be of type 'text' or 'point_cloud', got '\" + item['type'] + \"'.\") -}}"
        "{%- endif -%}{%- endfor -%}"
        "{%- for item in content if item['type'] == 'text' -%}{{- item['text'] -}}{%- endfor -%}"
        "{{- '" + closing + "' -}}"
        "{%- elif message['role'] == 'assistant' -%}"
        "{%- generation -%}"
        "{%- for item in content if item['type'] == 'text' -%}{{- item['text'] -}}{%- endfor -%}"
        "{{- '" + END_OF_ANSWER + "' -}}"
        "{%- endgeneration -%}"
        "{%- else -%}"
        "{{- raise_exception(\"Roles must be 'user' or 'assistant', got '\" + message['role'] + \"'.\") -}}"
        "{%- endif -%}{%- endfor -%}"
    )


CHAT_TEMPLATES = {
    # Two spaces: the authors put one after every question and another before [/INST].
    "default": _chat_template("bos_token | default('', true) + '[INST] '", SHOWN_CLOUD, f"  {END_OF_PROMPT}"),
    # The prompt of the authors' evaluation scripts: <s> is plain text to Phi's tokenizer, [INST] occurs twice, no bos.
    "benchmark": _chat_template("'<s>[INST] '", f"<PC>{POINT_TOKEN}</PC> <s>[INST] ", f" {END_OF_PROMPT}"),
}


def with_point_clouds(chat_template: str) -> str:
    """The chat template of a language model, made to show point clouds.

    Templates of language models take text alone. A message becomes text before the model's own template reads it: `<point>`
    between `<PC>` marks for each cloud, as in our default template, then the text.
    """
    return (
        "{%- set ours = namespace(messages=[], text='') -%}"
        "{%- for message in messages -%}"
        "{%- if message['content'] is string -%}{%- set ours.text = message['content'] -%}{%- else -%}"
        "{%- set ours.text = '' -%}"
        "{%- for item in message['content'] or [] if item['type'] == 'point_cloud' -%}"
        f"{{%- set ours.text = ours.text + '{SHOWN_CLOUD}' -%}}"
        "{%- endfor -%}"
        "{%- for item in message['content'] or [] if item['type'] == 'text' -%}"
        "{%- set ours.text = ours.text + item['text'] -%}"
        "{%- endfor -%}{%- endif -%}"
        "{%- set ours.messages = ours.messages + [dict(message, content=ours.text)] -%}"
        "{%- endfor -%}"
        "{%- set messages = ours.messages -%}" + chat_template
    )


def clean_question(question: str) -> str:
    """BLIP's caption clean-up, which the authors apply to the questions of single rounds (never to answers)."""
    question = re.sub(r"[.!\"()*#:;~]", " ", question.lower())
    question = re.sub(r"\s{2,}", " ", question).strip("\n").strip(" ")
    return " ".join(question.split(" ")[:50])


def prepare_tokenizer(tokenizer):
    """Prepare a fast tokenizer for MiniGPT-3D, in place. Preparing it again changes nothing.

    `<point>` becomes a special token (the language model's embedding must have a row for it). Text is split after
    `[/INST]` and `###` before it is tokenized, because the authors tokenize prompts and answers separately: no token
    spans both, so that each label belongs to an answer or does not. Padding is on the left, with eos if the tokenizer
    has no pad token.

    Args:
        tokenizer: any fast tokenizer of transformers.

    Returns:
        The same tokenizer.

    Raises:
        ValueError: the tokenizer is slow, or has neither pad nor eos token.
    """
    if not tokenizer.is_fast:
        raise ValueError(
            f"MiniGPT-3D needs a fast tokenizer, got {type(tokenizer).__name__}. Convert it to a fast one, which is saved as tokenizer.json."
        )
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError("The tokenizer has neither pad nor eos token. Set tokenizer.pad_token.")
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"  # an answer must follow its prompt without a gap
    if POINT_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_tokens([AddedToken(POINT_TOKEN, special=True, normalized=False)], special_tokens=True)

    backend = tokenizer.backend_tokenizer
    present = json.loads(backend.to_str())["pre_tokenizer"]
    if END_OF_PROMPT not in json.dumps(present):
        splits = [pre_tokenizers.Split(mark, "merged_with_previous") for mark in (END_OF_PROMPT, END_OF_ANSWER)]
        backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, *([backend.pre_tokenizer] if present else [])])
    return tokenizer


# ---- Point clouds ---------------------------------------------------------------------------------------------------


class MiniGPT3DPointCloudProcessor(FeatureExtractionMixin):
    """Reads, samples and normalizes point clouds; see `load_point_cloud`, whose arguments these are.

    Args:
        num_points: points per cloud.
        missing_color: "black" (as ModelNet40 in the paper), "gray", "white" or (r, g, b) in [0, 1] for points without
            color. The model sees it as the object's color.
        up_axis: the axis that points up in the sources, "x", "y" or "z"; None does not turn them. "auto" leaves the
            choice to the pipeline, which asks the model.
        seed: of the sampling.
        clean: what is removed from the sources: "none", far "outliers", a "floor" below the object, or "all".
    """

    model_input_names = ["point_clouds"]
    _auto_class = "AutoFeatureExtractor"

    def __init__(
        self,
        num_points: int = 8192,
        missing_color: str | tuple[float, float, float] = "black",
        up_axis: str | None = None,
        seed: int = 0,
        clean: str = "none",
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.num_points = num_points
        self.missing_color = missing_color
        self.up_axis = up_axis
        self.seed = seed
        self.clean = clean

    def __call__(
        self,
        point_clouds: Any,
        return_tensors: str | None = None,
        up_axis: str | None = None,
        missing_color: str | tuple[float, float, float] | None = None,
        clean: str | None = None,
    ) -> BatchFeature:
        """Read point clouds.

        Args:
            point_clouds: one source or a (nested) list of them, see `load_point_cloud`.
            return_tensors: "pt", "np", or None for an array.
            up_axis: the axis that points up in these sources; by default the processor's. "y" for clouds that have
                been turned already.
            missing_color: for points of these sources without color; by default the processor's.
            clean: what is removed from these sources; by default the processor's. "none" for clouds that have been
                cleaned already.

        Returns:
            BatchFeature with `point_clouds` (C, num_points, 6) float32.

        Raises:
            ValueError: no source, or one that cannot be used.
        """
        up_axis = self.up_axis if up_axis is None else up_axis
        missing_color = self.missing_color if missing_color is None else missing_color
        clean = self.clean if clean is None else clean
        clouds = [
            load_point_cloud(source, self.num_points, missing_color, up_axis, self.seed, clean)
            for source in _sources(point_clouds)
        ]
        if not clouds:
            raise ValueError("point_clouds is an empty list. Pass at least one cloud, or none at all (None).")
        return BatchFeature({"point_clouds": np.stack(clouds)}, tensor_type=return_tensors)


def _sources(point_clouds: Any) -> Iterator[Any]:
    """Single sources out of one, a list of them, a list of lists, or an array (C, N, 6)."""
    if point_clouds is None:
        return
    if isinstance(point_clouds, (list, tuple)) or getattr(point_clouds, "ndim", 0) == 3:
        for item in point_clouds:
            yield from _sources(item)
    else:
        yield point_clouds


# ---- Processor ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Tokens:
    """One text with placeholders expanded: T ids, and for each whether it belongs to an answer."""

    ids: np.ndarray
    is_answer: np.ndarray

    def __getitem__(self, positions) -> "_Tokens":
        return _Tokens(self.ids[positions], self.is_answer[positions])


class MiniGPT3DProcessor(ProcessorMixin):
    """Turns point clouds and text into the model's inputs.

    ```python
    >>> content = [{"type": "point_cloud", "point_cloud": "chair.ply"}, {"type": "text", "text": "What is this?"}]
    >>> inputs = processor.apply_chat_template(
    ...     [{"role": "user", "content": content}],
    ...     tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True,
    ... )
    >>> sorted(inputs)
    ['attention_mask', 'input_ids', 'point_clouds']
    ```

    Args:
        feature_extractor: a `MiniGPT3DPointCloudProcessor`.
        tokenizer: any fast tokenizer; `prepare_tokenizer` is applied to it.
        num_query_tokens: vectors, thus placeholders in `input_ids`, per cloud.
        chat_template: a template, or several by name. By default "default" (the training prompt) and "benchmark" (the
            prompt of the authors' evaluation, for comparison with their numbers).
    """

    def __init__(
        self,
        feature_extractor,
        tokenizer,
        num_query_tokens: int = 32,
        chat_template: str | dict[str, str] | None = None,
    ):
        # Loading rebuilds some tokenizers from their vocabulary and loses what prepare_tokenizer added.
        prepare_tokenizer(tokenizer)
        super().__init__(feature_extractor, tokenizer, chat_template=chat_template or CHAT_TEMPLATES)
        self.num_query_tokens = num_query_tokens
        self.auto_map = {"AutoProcessor": "processing_minigpt3d.MiniGPT3DProcessor"}

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoProcessor"):
        """Do nothing: `auto_map` has the entry, and a registered processor also writes it into the tokenizer's files.

        A tokenizer that is saved alone would then name code that is not there.
        """

    @property
    def point_token_id(self) -> int:
        """The id of `<point>`, for the model's configuration."""
        return self.tokenizer.convert_tokens_to_ids(POINT_TOKEN)

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "point_clouds"]

    @property
    def end_of_answer(self) -> str:
        """What ends an answer: `###` in our templates; in a language model's own, a special token such as `<|im_end|>`."""
        answer = "no other text"
        (text,), _ = self._render([[{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]], None)
        after = text.rpartition(answer)[2].lstrip()
        marks = (mark for mark in (END_OF_ANSWER, *self.tokenizer.all_special_tokens) if after.startswith(mark))
        return next(marks, self.tokenizer.eos_token or END_OF_ANSWER)

    def __call__(
        self,
        text: str | list[str] | None = None,
        point_clouds: Any = None,
        images: Any = None,
        videos: Any = None,
        audio: Any = None,
        return_tensors: str | None = None,
        padding: bool | str = True,
        truncation: bool = False,
        max_length: int | None = None,
        padding_side: str | None = None,
        up_axis: str | None = None,
        missing_color: str | tuple[float, float, float] | None = None,
        clean: str | None = None,
    ) -> BatchFeature:
        """Tokenize texts in which `<point>` stands for a cloud, and read those clouds.

        Args:
            text: one text or B of them, as `apply_chat_template` renders it. Nothing is added to it, not even bos.
            point_clouds: one source or C of them (lists of lists, too), see `load_point_cloud`.
            images, videos, audio: not supported.
            return_tensors: "pt", "np", or None for lists.
            padding: True or "longest": to the longest text; "max_length": to `max_length`; False or "do_not_pad": none.
            truncation: whether to cut a text that is too long at its end. Placeholders of clouds are kept.
            max_length: most tokens of a text, with placeholders; by default the tokenizer's `model_max_length`.
            padding_side: "left" or "right"; by default the tokenizer's, which is left.
            up_axis: the axis that points up in these clouds, "x", "y" or "z"; by default the point cloud processor's.
            missing_color: for points without color; by default the point cloud processor's.
            clean: what is removed from these clouds; by default the point cloud processor's.

        Returns:
            BatchFeature with `input_ids` and `attention_mask` (B, T), and `point_clouds` (C, num_points, 6) if there are any.

        Raises:
            ValueError: texts and clouds do not match, a text is too long, or a cloud cannot be used.
        """
        for name, value in (("images", images), ("videos", videos), ("audio", audio)):
            if value is not None:
                raise ValueError(f"MiniGPT-3D reads point clouds and text, got {name}. Pass point_clouds=… instead.")
        if padding not in PADDINGS:
            raise ValueError(f"padding must be one of {', '.join(map(repr, PADDINGS))}, got {padding!r}.")
        if padding_side not in (None, "left", "right"):
            raise ValueError(f"padding_side must be 'left', 'right' or None (the tokenizer's), got {padding_side!r}.")
        sources = list(_sources(point_clouds))
        data = {}
        if text is not None:
            texts = [text] if isinstance(text, str) else list(text)
            if not texts:
                raise ValueError("text is an empty list. Pass at least one text, or none at all (None).")
            rows = self._tokenize(texts, [[]] * len(texts), len(sources))
            rows = [self._fit(row, max_length, truncation) for row in rows]
            data, _ = self._pad(rows, padding, padding_side or self.tokenizer.padding_side, max_length)
        if sources:
            clouds = self.feature_extractor(sources, None, up_axis, missing_color, clean)
            data["point_clouds"] = clouds["point_clouds"]
        if not data:
            raise ValueError("Nothing to process: pass text, point_clouds or both.")
        return BatchFeature(data, tensor_type=return_tensors)

    def apply_chat_template(
        self,
        conversation: Any,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        tokenize: bool = False,
        return_tensors: str | None = None,
        return_dict: bool = False,
        processor_kwargs: dict[str, Any] | None = None,
        **kwargs,
    ) -> Any:
        """Render conversations as the text that the model was trained on, or as its inputs.

        Args:
            conversation: a list of messages, `{"role": "user" | "assistant", "content": …}`, or B such lists. Content is
                text, or a list of `{"type": "text", "text": …}` and `{"type": "point_cloud", "point_cloud": source}`.
            chat_template: the name of one of the processor's templates, or a template; "default" by default.
            add_generation_prompt: end with what begins an answer. It has no effect on our own templates, whose prompts
                always end there.
            continue_final_message: leave the last answer open, so that the model continues it.
            tokenize: whether to return ids rather than text.
            return_tensors, return_dict: see transformers.
            processor_kwargs, kwargs: for `__call__`, such as `up_axis`, `missing_color`, `clean` and `padding`.

        Returns:
            With `tokenize` and `return_dict` what `__call__` returns; ids without `return_dict`; else text, one or B.

        Raises:
            ValueError: as `__call__`.
        """
        conversations, is_batched = _conversations(conversation)
        texts, _ = self._render(
            conversations,
            chat_template,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
        )
        if not tokenize:
            return texts if is_batched else texts[0]
        inputs = self(
            text=texts,
            point_clouds=list(_message_clouds(conversations)),
            return_tensors=None if return_tensors == "auto" else return_tensors,
            **(processor_kwargs or {}) | kwargs,
        )
        return inputs if return_dict else inputs["input_ids"]

    def encode_training(
        self, conversations: list[list[dict]], point_clouds: Any = None, max_text_length: int | None = None
    ) -> BatchFeature:
        """Encode complete conversations with their labels.

        Args:
            conversations: B lists of messages, see `apply_chat_template`, each with at least one answer.
            point_clouds: their C clouds in order; by default the ones in the messages.
            max_text_length: tokens kept after the first prompt, the authors' `max_txt_len`; the rest is cut off.

        Returns:
            BatchFeature of tensors: `input_ids`, `attention_mask` and `labels` (B, T), padded on the right; labels are the
            ids of answers and their `###`, and -100 elsewhere. `point_clouds` (C, num_points, 6). T is the longest row; the
            authors' batches are as wide as the longest first prompt plus the longest remainder.

        Raises:
            ValueError: as `__call__`; also a conversation without answer, or a cloud beyond `max_text_length`.
        """
        if not conversations:
            raise ValueError("conversations is an empty list. Pass at least one conversation.")
        if point_clouds is None:
            point_clouds = list(_message_clouds(conversations))
        sources = list(_sources(point_clouds))
        texts, spans = self._render(conversations, None)
        rows = []
        for index, row in enumerate(self._tokenize(texts, spans, len(sources))):
            if not row.is_answer.any():
                raise ValueError(
                    f"Conversation {index} has no answer to learn from. Its last message must be an answer."
                )
            if max_text_length is not None:
                end = int(row.is_answer.argmax()) + max_text_length
                if (row.ids[end:] == self.point_token_id).any():
                    raise ValueError(
                        f"Conversation {index}: max_text_length={max_text_length} would cut off a point cloud. "
                        "Raise it, or show the cloud in the first question."
                    )
                row = row[:end]
            rows.append(self._fit(row, None, truncation=False))
        data, is_answer = self._pad(rows, "longest", "right", None)
        data["labels"] = np.where(is_answer, data["input_ids"], IGNORED_LABEL)
        if sources:
            # Training data stand upright and are cleaned, if at all, when they are packed.
            up_axis = "y" if self.feature_extractor.up_axis == "auto" else None
            clouds = self.feature_extractor(sources, up_axis=up_axis, clean="none")
            data["point_clouds"] = clouds["point_clouds"]
        return BatchFeature(data, tensor_type="pt")

    def post_process_image_text_to_text(self, generated_outputs, skip_special_tokens: bool = True, **kwargs):
        """Decode ids (B, T) of prompts and answers; each text ends after its last answer, without `###`.

        For transformers' image-text-to-text pipeline.
        """
        texts = self.tokenizer.batch_decode(generated_outputs, skip_special_tokens=skip_special_tokens, **kwargs)
        results = []
        for text in texts:
            prompt, mark, answer = text.rpartition(END_OF_PROMPT)
            results.append(prompt + mark + answer.split(END_OF_ANSWER)[0])
        return results

    def _render(
        self, conversations: list, chat_template: str | None, **kwargs
    ) -> tuple[list[str], list[list[tuple[int, int]]]]:
        """B texts, and for each the (start, end) of its answers in characters."""
        templates = self.chat_template if isinstance(self.chat_template, dict) else {"default": self.chat_template}
        template = templates.get(chat_template or "default", chat_template)
        if "{" not in template:
            raise ValueError(f"chat_template must be one of {', '.join(templates)} or a template, got {template!r}.")
        has_answers = re.search(r"\{%-?\s*generation\b", template) is not None
        if not has_answers:
            conversations = [[_mark_answer(message) for message in conversation] for conversation in conversations]
        texts, spans = render_jinja_template(
            conversations=conversations,
            chat_template=template,
            return_assistant_tokens_mask=has_answers,
            **self.tokenizer.special_tokens_map,
            **kwargs,
        )
        if has_answers:
            return texts, spans
        texts, spans = zip(*map(self._take_marks, texts), strict=True)
        return list(texts), list(spans)

    def _take_marks(self, text: str) -> tuple[str, list[tuple[int, int]]]:
        """A text without the marks of `_mark_answer`, and the (start, end) of its answers with the token that ends them.

        Raises:
            ValueError: the template has cut an answer.
        """
        special = "|".join(map(re.escape, self.tokenizer.all_special_tokens))
        if re.sub(f"[^{ANSWER_START}{ANSWER_END}]", "", text).replace(ANSWER_START + ANSWER_END, ""):
            raise ValueError("The chat template leaves out part of an answer. Use answers without reasoning.")
        spans, parts = [], re.split(f"[{ANSWER_START}{ANSWER_END}]", text)
        clean = parts[0]
        for answer, rest in zip(parts[1::2], parts[2::2], strict=True):
            end = re.match(rf"\s*(?:{special})|", rest).end()
            spans.append((len(clean), len(clean) + len(answer) + end))
            clean += answer + rest
        return clean, spans

    def _tokenize(self, texts: list[str], answer_spans: list[list[tuple[int, int]]], num_clouds: int) -> list[_Tokens]:
        """Texts → tokens, `<point>` repeated for every vector of a cloud."""
        encoded = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        rows = []
        for ids, offsets, spans in zip(encoded["input_ids"], encoded["offset_mapping"], answer_spans, strict=True):
            ids, starts = np.array(ids, dtype=np.int64), np.array([start for start, _ in offsets], dtype=np.int64)
            is_answer = np.zeros(len(ids), dtype=bool)
            for start, end in spans:
                is_answer |= (start <= starts) & (starts < end)
            rows.append(_Tokens(ids, is_answer))
        num_placeholders = sum(int((row.ids == self.point_token_id).sum()) for row in rows)
        if num_placeholders != num_clouds:
            raise ValueError(
                f"The text has {num_placeholders} {POINT_TOKEN} placeholders, but {num_clouds} point clouds were given. "
                f"Write one {POINT_TOKEN} for each cloud, or use apply_chat_template."
            )
        return [
            row[np.repeat(np.arange(len(row.ids)), np.where(row.ids == self.point_token_id, self.num_query_tokens, 1))]
            for row in rows
        ]

    def _fit(self, row: _Tokens, max_length: int | None, truncation: bool) -> _Tokens:
        """Truncate a row that is too long, or raise if truncation is off."""
        limit = self.tokenizer.model_max_length if max_length is None else max_length
        excess = len(row.ids) - limit
        if excess <= 0:
            return row
        if not truncation:
            raise ValueError(
                f"The text has {len(row.ids)} tokens with {self.num_query_tokens} for each cloud, but the context has {limit}. "
                "Shorten it, or pass truncation=True to cut its end."
            )
        (removable,) = np.nonzero(row.ids != self.point_token_id)
        if excess > len(removable):
            raise ValueError(
                f"max_length={limit} has no room for the {len(row.ids) - len(removable)} vectors of the point clouds, "
                "which are never truncated. Raise it."
            )
        return row[np.delete(np.arange(len(row.ids)), removable[len(removable) - excess :])]

    def _pad(
        self, rows: list[_Tokens], padding: bool | str, side: str, max_length: int | None
    ) -> tuple[dict[str, Any], np.ndarray]:
        """Rows → `input_ids` and `attention_mask` (B, T), and which ids belong to answers, (B, T)."""
        lengths = [len(row.ids) for row in rows]
        if padding in (False, "do_not_pad") and len(set(lengths)) > 1:
            return {"input_ids": [r.ids.tolist() for r in rows], "attention_mask": [[1] * n for n in lengths]}, None
        if padding == "max_length" and max_length is None:
            max_length = self.tokenizer.model_max_length
        width = max_length if padding == "max_length" else max(lengths)
        input_ids = np.full((len(rows), width), self.tokenizer.pad_token_id, dtype=np.int64)
        attention_mask = np.zeros((len(rows), width), dtype=np.int64)
        is_answer = np.zeros((len(rows), width), dtype=bool)
        for number, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            place = slice(width - length, width) if side == "left" else slice(0, length)
            input_ids[number, place], attention_mask[number, place] = row.ids, 1
            is_answer[number, place] = row.is_answer
        return {"input_ids": input_ids, "attention_mask": attention_mask}, is_answer


def _mark_answer(message: dict) -> dict:
    """The message, with marks around its text if it is an answer."""
    if message["role"] != "assistant":
        return message
    content = message["content"]
    if not isinstance(content, str):
        content = "".join(item["text"] for item in content if item["type"] == "text")
    return message | {"content": f"{ANSWER_START}{content}{ANSWER_END}"}


def _conversations(conversation: Any) -> tuple[list[list[dict]], bool]:
    """One conversation or a batch → a batch, and whether a batch was given."""
    conversation = getattr(conversation, "messages", conversation)
    if not len(conversation):
        raise ValueError("The conversation is an empty list. Pass at least one message.")
    if isinstance(conversation[0], dict):
        return [conversation], False
    return [getattr(item, "messages", item) for item in conversation], True


def _message_clouds(conversations: Iterable[list[dict]]) -> Iterator[Any]:
    """The sources in the messages, in order."""
    for message in (message for conversation in conversations for message in conversation):
        content = message["content"]
        for item in [] if isinstance(content, str) else content:
            if item["type"] == "point_cloud" and item.get("point_cloud") is not None:
                yield item["point_cloud"]


__all__ = [
    "CHAT_TEMPLATES",
    "DEFAULT_PROMPT",
    "END_OF_ANSWER",
    "POINT_TOKEN",
    "MiniGPT3DPointCloudProcessor",
    "MiniGPT3DProcessor",
    "clean_question",
    "prepare_tokenizer",
    "with_point_clouds",
]
