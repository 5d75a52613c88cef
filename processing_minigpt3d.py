"""Processor of MiniGPT-3D: point clouds and chat text in, `input_ids`, `attention_mask` and `point_clouds` out.

One chat template serves training, evaluation, pipeline and demo (paper: §3.1.3, and the authors' code to the character).
In text a cloud is one `<point>`; in `input_ids` it is `num_query_tokens` of them, which the model replaces by vectors.

The processor never changes a question. As in the authors' code, the training data lower-cases the questions of single
rounds (`clean_question`) and keeps those of longer conversations; at inference a question stays as typed.

Shapes: B texts, C clouds of the batch, P points, T tokens.
"""

import dataclasses
import json
import re
import threading
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
from tokenizers import AddedToken, pre_tokenizers
from transformers import BatchFeature, FeatureExtractionMixin, ProcessorMixin
from transformers.processing_utils import TextKwargs
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
TRUNCATIONS = (True, False, None, "longest_first", "only_first", "do_not_truncate")
# Between the letters of a mark that a message quotes, so that it is no mark. Never part of a text: no character of Unicode.
QUOTE = "\ufdd0"
# Held while a template is rendered: transformers keeps the places of answers with the template, one text at a time.
_RENDERING = threading.Lock()
# Where a tokenizer splits a text, and whether it removes the place.
SPLITS = {QUOTE: "removed", END_OF_PROMPT: "merged_with_previous", END_OF_ANSWER: "merged_with_previous"}


# ---- Text -----------------------------------------------------------------------------------------------------------


def _chat_template(start: str, opening: str, cloud: str, closing: str) -> str:
    """A template from expressions (start, opening) and texts (cloud, closing).

    A user turn is start, opening, `cloud` once per cloud, text, closing; an assistant turn is text and `###`. A system message
    is start and text in front of the first turn, where the authors' conversations have theirs.
    """
    return (
        "{%- for message in messages -%}"
        "{%- set content = [{'type': 'text', 'text': message['content']}] "
        "if message['content'] is string else message['content'] -%}"
        "{%- if message['role'] == 'user' -%}"
        "{{- " + start + " + " + opening + " -}}"
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
        "{%- elif message['role'] == 'system' -%}"
        "{%- if not loop.first -%}{{- raise_exception('A system message must be the first one.') -}}{%- endif -%}"
        "{{- " + start + " -}}"
        "{%- for item in content -%}{%- if item['type'] != 'text' -%}"
        "{{- raise_exception(\"A system message must be of type 'text', got '\" + item['type'] + \"'.\") -}}"
        "{%- endif -%}{{- item['text'] -}}{%- endfor -%}"
        "{%- else -%}"
        "{{- raise_exception(\"Roles must be 'system', 'user' or 'assistant', got '\" + message['role'] + \"'.\") -}}"
        "{%- endif -%}{%- endfor -%}"
    )


CHAT_TEMPLATES = {
    # Two spaces: the authors put one after every question and another before [/INST].
    "default": _chat_template("bos_token | default('', true)", "'[INST] '", SHOWN_CLOUD, f"  {END_OF_PROMPT}"),
    # The prompt of the authors' evaluation scripts: <s> is plain text to Phi's tokenizer, [INST] occurs twice, no bos.
    "benchmark": _chat_template("''", "'<s>[INST] '", f"<PC>{POINT_TOKEN}</PC> <s>[INST] ", f" {END_OF_PROMPT}"),
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
    spans both, so that each label belongs to an answer or does not. Marks that a message quotes become single letters.
    Padding is on the left, with eos if the tokenizer has no pad token.

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
    known = json.dumps(present, ensure_ascii=False)
    splits = [pre_tokenizers.Split(mark, behavior) for mark, behavior in SPLITS.items() if mark not in known]
    if splits:
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
class _TextOptions:
    """How texts become tokens, see `MiniGPT3DProcessor.__call__`. The names are transformers'."""

    add_special_tokens: bool = False
    padding: bool | str = True
    truncation: bool | str | None = False
    max_length: int | None = None
    padding_side: str | None = None
    pad_to_multiple_of: int | None = None
    return_attention_mask: bool | None = True
    return_token_type_ids: bool | None = False
    return_special_tokens_mask: bool | None = False
    return_offsets_mapping: bool | None = False
    return_mm_token_type_ids: bool | None = False
    return_assistant_tokens_mask: bool | None = False
    return_length: bool | None = False

    def __post_init__(self):
        for name, choices in (
            ("padding", PADDINGS),
            ("truncation", TRUNCATIONS),
            ("padding_side", (None, "left", "right")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name} must be one of {', '.join(map(repr, choices))}, got {getattr(self, name)!r}."
                )
        if self.pad_to_multiple_of is not None and self.pad_to_multiple_of < 1:
            raise ValueError(f"pad_to_multiple_of must be 1 or more, got {self.pad_to_multiple_of}.")

    def fields(self) -> list[str]:
        """Names of what is returned for each token."""
        wanted = {
            "input_ids": True,
            "attention_mask": self.return_attention_mask,
            "token_type_ids": self.return_token_type_ids,
            "special_tokens_mask": self.return_special_tokens_mask,
            "offset_mapping": self.return_offsets_mapping,
            "mm_token_type_ids": self.return_mm_token_type_ids,
            "assistant_masks": self.return_assistant_tokens_mask,
        }
        return [name for name, is_wanted in wanted.items() if is_wanted]


_TEXT_OPTIONS = {field.name for field in dataclasses.fields(_TextOptions)}
_READING_OPTIONS = {"up_axis", "missing_color", "clean"}
# What processors of transformers take and this one does not do.
_IDLE = (TextKwargs.__annotations__.keys() - _TEXT_OPTIONS) | {"images_kwargs", "videos_kwargs", "audio_kwargs"}
# Dictionaries of options by modality, as transformers' processors take them.
_GROUPS = {"text_kwargs", "common_kwargs"}
_Row = dict[str, np.ndarray]  # a text's tokens: `input_ids` (T,) and other fields (T, …) by transformers' names


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
        (text,), _ = self._render(
            [[{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]], self._template(None)
        )
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
        up_axis: str | None = None,
        missing_color: str | tuple[float, float, float] | None = None,
        clean: str | None = None,
        text_kwargs: dict[str, Any] | None = None,
        common_kwargs: dict[str, Any] | None = None,
        **kwargs,
    ) -> BatchFeature:
        """Tokenize texts in which `<point>` stands for a cloud, and read those clouds.

        Args:
            text: one text or B of them, as `apply_chat_template` renders it.
            point_clouds: one source or C of them, see `load_point_cloud`; or B lists of them, one for each text.
            images, videos, audio: not supported.
            return_tensors: "pt", "np", or None for lists.
            up_axis: the axis that points up in these clouds, "x", "y" or "z"; by default the point cloud processor's.
            missing_color: for points without color; by default the point cloud processor's.
            clean: what is removed from these clouds; by default the point cloud processor's.
            text_kwargs, common_kwargs: dictionaries of the arguments below, and of `return_tensors`.
            add_special_tokens: whether the tokenizer adds bos and the like; False by default.
            padding: True or "longest": to the longest text; "max_length": to `max_length`; False or "do_not_pad": none.
            truncation: whether to cut a text that is too long at its end. Placeholders of clouds are kept.
            max_length: most tokens of a text, with placeholders; by default the tokenizer's `model_max_length`.
            padding_side: "left" or "right"; by default the tokenizer's, which is left.
            pad_to_multiple_of: round the width T of a padded batch up to a multiple of it.
            return_attention_mask, return_token_type_ids, return_special_tokens_mask, return_offsets_mapping,
                return_mm_token_type_ids, return_length: what is returned beside `input_ids`, as in transformers; of
                these only `attention_mask` by default. `mm_token_type_ids` is 1 at placeholders.

        Returns:
            BatchFeature with `input_ids` and `attention_mask` (B, T), and `point_clouds` (C, num_points, 6) if there are any.

        Raises:
            ValueError: texts and clouds do not match, a text is too long, or a cloud cannot be used.
            TypeError: an argument is unknown, or this processor does not do what it asks for (`text_pair`, `stride`).
        """
        for name, value in (("images", images), ("videos", videos), ("audio", audio)):
            if value is not None:
                raise ValueError(f"MiniGPT-3D reads point clouds and text, got {name}. Pass point_clouds=… instead.")
        kwargs = (common_kwargs or {}) | (text_kwargs or {}) | kwargs
        return_tensors = kwargs.pop("return_tensors", None) if return_tensors is None else return_tensors
        answer_spans = kwargs.pop("answer_spans", None)
        options = _text_options(kwargs)
        sources = list(_sources(point_clouds))
        data = {}
        if text is not None:
            texts = [text] if isinstance(text, str) else list(text)
            if not texts:
                raise ValueError("text is an empty list. Pass at least one text, or none at all (None).")
            if not all(isinstance(text, str) for text in texts):
                raise ValueError(f"text must be one text or a list of texts, got {text!r:.80}.")
            rows = self._tokenize(texts, point_clouds, options, answer_spans)
            data = self._pad([self._fit(row, options) for row in rows], options)
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
        tools: list | None = None,
        documents: list | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        return_assistant_tokens_mask: bool = False,
        tokenize: bool = False,
        return_tensors: str | None = None,
        return_dict: bool = False,
        processor_kwargs: dict[str, Any] | None = None,
        sanitize_control_tokens: bool = True,
        **kwargs,
    ) -> Any:
        """Render conversations as the text that the model was trained on, or as its inputs.

        What messages say is data: if they quote `<point>`, `[/INST]`, `###` or a special token of the tokenizer, the
        letters are tokenized one by one, which no mark of the template is. In rendered text they stand apart by `QUOTE`.

        Args:
            conversation: a list of messages, `{"role": "system" | "user" | "assistant", "content": …}`, or B such lists;
                a system message comes first, and no MiniGPT-3D was trained with one. Content is
                text, or a list of `{"type": "text", "text": …}` and `{"type": "point_cloud", "point_cloud": source}`;
                "path" or "url" may stand for the second "point_cloud", which may also be missing if `point_clouds` are
                given. Other roles are for templates that know them.
            chat_template: the name of one of the processor's templates, or a template; "default" by default.
            tools, documents: for templates that know them.
            add_generation_prompt: end with what begins an answer. It has no effect on our own templates, whose prompts
                always end there.
            continue_final_message: leave the last answer open, so that the model continues it.
            return_assistant_tokens_mask: whether to return `assistant_masks` (B, T), 1 at answers and their `###`.
            tokenize: whether to return ids rather than text.
            return_tensors, return_dict: see transformers.
            processor_kwargs: for `__call__`, such as `up_axis`, `missing_color`, `clean`, `padding` and `point_clouds`.
            sanitize_control_tokens: has no effect: what messages say is always data.
            kwargs: as `processor_kwargs`, or variables of the template.

        Returns:
            With `tokenize` and `return_dict` what `__call__` returns; ids without `return_dict`; else text, one or B.

        Raises:
            ValueError: as `__call__`; also arguments that contradict each other, or `tools` or `documents` that the
                template does not know.
        """
        if continue_final_message and (add_generation_prompt or return_assistant_tokens_mask):
            raise ValueError(
                "continue_final_message leaves the last answer open: add_generation_prompt and "
                "return_assistant_tokens_mask do not go with it."
            )
        conversations, is_batched = _conversations(conversation)
        template = self._template(chat_template)
        _check_template_knows(template, tools=tools, documents=documents)
        known = _TEXT_OPTIONS | _READING_OPTIONS | _GROUPS | _IDLE | {"point_clouds"}
        arguments = (processor_kwargs or {}) | {name: kwargs.pop(name) for name in kwargs.keys() & known}
        if unused := [name for name in kwargs if name not in template]:
            warnings.warn(
                f"{', '.join(unused)}: neither an argument of the processor nor a variable of the chat template.",
                stacklevel=2,
            )
        texts, spans = self._render(
            conversations,
            template,
            tools=tools,
            documents=documents,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            **kwargs,
        )
        if not tokenize:
            return texts if is_batched else texts[0]
        if texts[0].startswith(self.tokenizer.bos_token or "\0"):
            arguments["add_special_tokens"] = False
        arguments = {"point_clouds": _message_clouds(conversations)} | arguments
        inputs = self(
            text=texts,
            return_tensors=None if return_tensors == "auto" else return_tensors,
            return_assistant_tokens_mask=return_assistant_tokens_mask,
            answer_spans=spans,
            **arguments,
        )
        return inputs if return_dict else inputs["input_ids"]

    def encode_training(
        self,
        conversations: list[list[dict]],
        point_clouds: Any = None,
        max_text_length: int | None = None,
        do_normalize: bool = True,
    ) -> BatchFeature:
        """Encode complete conversations with their labels.

        Args:
            conversations: B lists of messages, see `apply_chat_template`, each with at least one answer.
            point_clouds: their C clouds in order, or B lists of them; by default the ones in the messages.
            max_text_length: tokens kept after the first prompt, the authors' `max_txt_len`; the rest is cut off.
            do_normalize: False takes the clouds as they are, arrays (num_points, 6) float32 that have been normalized.

        Returns:
            BatchFeature of tensors: `input_ids`, `attention_mask` and `labels` (B, T), padded on the right; labels are the
            ids of answers and their `###`, and -100 elsewhere. `point_clouds` (C, num_points, 6). T is the longest row; the
            authors' batches are as wide as the longest first prompt plus the longest remainder.

        Raises:
            ValueError: as `__call__`; also a conversation without answer, a cloud beyond `max_text_length`, or one that is
                to be taken as it is and has another size.
        """
        if not conversations:
            raise ValueError("conversations is an empty list. Pass at least one conversation.")
        if point_clouds is None:
            point_clouds = _message_clouds(conversations)
        options = _TextOptions(padding_side="right", return_assistant_tokens_mask=True)
        texts, spans = self._render(conversations, self._template(None))
        rows = []
        for index, row in enumerate(self._tokenize(texts, point_clouds, options, spans)):
            if not row["assistant_masks"].any():
                raise ValueError(
                    f"Conversation {index} has no answer to learn from. Its last message must be an answer."
                )
            if max_text_length is not None:
                end = int(row["assistant_masks"].argmax()) + max_text_length
                if row["mm_token_type_ids"][end:].any():
                    raise ValueError(
                        f"Conversation {index}: max_text_length={max_text_length} would cut off a point cloud. "
                        "Raise it, or show the cloud in the first question."
                    )
                row = _choose(row, slice(end))
            rows.append(self._fit(row, options))
        data = self._pad(rows, options)
        data["labels"] = np.where(data.pop("assistant_masks"), data["input_ids"], IGNORED_LABEL)
        sources = list(_sources(point_clouds))
        if sources and do_normalize:
            # Training data stand upright and are cleaned, if at all, when they are packed.
            up_axis = "y" if self.feature_extractor.up_axis == "auto" else None
            clouds = self.feature_extractor(sources, up_axis=up_axis, clean="none")
            data["point_clouds"] = clouds["point_clouds"]
        elif sources:
            data["point_clouds"] = np.stack(sources)
            expected, got = (self.feature_extractor.num_points, 6), data["point_clouds"].shape[1:]
            if got != expected or data["point_clouds"].dtype != np.float32:
                raise ValueError(
                    f"With do_normalize=False a point cloud must have shape {expected} and type float32, got {got} and "
                    f"{data['point_clouds'].dtype}. Leave do_normalize out."
                )
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

    def _template(self, chat_template: str | None) -> str:
        """The template of that name, or the template itself."""
        templates = self.chat_template if isinstance(self.chat_template, dict) else {"default": self.chat_template}
        template = templates.get(chat_template or "default", chat_template)
        if "{" not in template:
            raise ValueError(f"chat_template must be one of {', '.join(templates)} or a template, got {template!r}.")
        return template

    def _render(self, conversations: list, template: str, **kwargs) -> tuple[list[str], list[list[tuple[int, int]]]]:
        """B texts, and for each the (start, end) of its answers in characters."""
        conversations = [[self._quote_message(message) for message in messages] for messages in conversations]
        has_answers = re.search(r"\{%-?\s*generation\b", template) is not None
        if not has_answers:
            conversations = [[_mark_answer(message) for message in conversation] for conversation in conversations]
        with _RENDERING:
            texts, spans = render_jinja_template(
                conversations=conversations,
                chat_template=template,
                return_assistant_tokens_mask=has_answers,
                **self.tokenizer.special_tokens_map | kwargs,
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

    def _quote_message(self, message: dict) -> dict:
        """A message in whose texts no mark has a meaning. Its clouds are left out: templates show only their places."""
        content = message.get("content")
        if isinstance(content, str):
            return message | {"content": self._quote([content])[0]}
        content = content or []
        texts = iter(self._quote([item["text"] for item in content if isinstance(item.get("text"), str)]))
        return message | {
            "content": [
                item | {"text": next(texts)} if isinstance(item.get("text"), str) else {"type": item["type"]}
                for item in content
            ]
        }

    def _quote(self, texts: list[str]) -> list[str]:
        """Texts with `QUOTE` between the letters of each mark of a template or tokenizer.

        Marks that begin in one text and end in another are quoted, too, since templates join the texts of a message.
        """
        added = (token.content for token in self.tokenizer.added_tokens_decoder.values())
        marks = {"[INST]", END_OF_PROMPT, END_OF_ANSWER, "<PC>", "</PC>", *(mark for mark in added if mark.strip())}
        if not any(mark in "".join(texts) for mark in marks):  # as a rule; what follows takes longer
            return texts
        pattern = "|".join(re.escape(mark) for mark in sorted(marks, key=len, reverse=True))
        # Looking ahead finds marks that overlap: in "#####" any three are one.
        found = re.finditer(f"(?=({pattern}))", "".join(texts))
        places = {place for mark in found for place in range(mark.start() + 1, mark.start() + len(mark[1]))}
        ends = accumulate(map(len, texts), initial=0)
        return [
            "".join(QUOTE + letter if place in places else letter for place, letter in enumerate(text, start))
            for text, start in zip(texts, ends, strict=False)
        ]

    def _tokenize(
        self, texts: list[str], point_clouds: Any, options: _TextOptions, answer_spans: list | None
    ) -> list[_Row]:
        """Texts → rows with all fields, `<point>` repeated for every vector of a cloud."""
        for text in texts:
            if half := re.search("[\ud800-\udfff]", text):
                raise ValueError(f"A text has half of a character, a lone surrogate {half[0]!a}. Write it as UTF-8.")
        try:
            encoded = self.tokenizer(
                texts,
                add_special_tokens=options.add_special_tokens,
                return_attention_mask=True,
                return_token_type_ids=True,
                return_special_tokens_mask=True,
                return_offsets_mapping=True,
                verbose=False,
            )
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # of tokenizers; it is no Exception
                raise
            raise ValueError(f"The tokenizer cannot encode {texts!r:.80} ({error}). Change the text.") from error
        rows = [
            {name: np.array(values, dtype=np.int64) for name, values in zip(encoded, row, strict=True)}
            for row in zip(*encoded.values(), strict=True)
        ]
        for row, spans in zip(rows, answer_spans or [[]] * len(rows), strict=True):
            starts = row["offset_mapping"].reshape(-1, 2)[:, 0]
            is_answer = [(start <= starts) & (starts < end) for start, end in spans]
            row["assistant_masks"] = np.any([np.zeros(len(starts), dtype=bool), *is_answer], axis=0).astype(np.int64)
            row["mm_token_type_ids"] = (row["input_ids"] == self.point_token_id).astype(np.int64)
        self._check_clouds([int(row["mm_token_type_ids"].sum()) for row in rows], point_clouds)
        repeats = [np.where(row["mm_token_type_ids"], self.num_query_tokens, 1) for row in rows]
        return [
            _choose(row, np.repeat(np.arange(len(count)), count)) for row, count in zip(rows, repeats, strict=True)
        ]

    def _check_clouds(self, placeholders: list[int], point_clouds: Any):
        """Compare each text's placeholders with its clouds, or all with all if clouds are not given text by text.

        Raises:
            ValueError: their numbers differ.
        """
        counts = [("The text" if len(placeholders) == 1 else "All texts together", sum(placeholders), point_clouds)]
        is_list = isinstance(point_clouds, (list, tuple))
        if is_list and any(item is None or isinstance(item, (list, tuple)) for item in point_clouds):
            if len(point_clouds) != len(placeholders):
                raise ValueError(
                    f"point_clouds has {len(point_clouds)} lists for {len(placeholders)} texts. Pass a list for each text."
                )
            names = [f"Text {index}" for index in range(len(placeholders))]
            counts = list(zip(names, placeholders, point_clouds, strict=True))
        for name, num_placeholders, sources in counts:
            num_clouds = sum(1 for _ in _sources(sources))
            if num_placeholders != num_clouds:
                raise ValueError(
                    f"{name}: {num_placeholders} {POINT_TOKEN} placeholders, but {num_clouds} point clouds were given. "
                    f"Write one {POINT_TOKEN} for each cloud, or use apply_chat_template."
                )

    def _fit(self, row: _Row, options: _TextOptions) -> _Row:
        """Truncate a row that is too long, or raise if truncation is off."""
        limit = self.tokenizer.model_max_length if options.max_length is None else options.max_length
        length = len(row["input_ids"])
        excess = length - limit
        if excess <= 0:
            return row
        if options.truncation in (False, None, "do_not_truncate"):
            raise ValueError(
                f"The text has {length} tokens with {self.num_query_tokens} for each cloud, but the context has {limit}. "
                "Shorten it, or pass truncation=True to cut its end."
            )
        (removable,) = np.nonzero(row["mm_token_type_ids"] == 0)
        if excess > len(removable):
            raise ValueError(
                f"max_length={limit} has no room for the {length - len(removable)} vectors of the point clouds, "
                "which are never truncated. Raise it."
            )
        return _choose(row, np.delete(np.arange(length), removable[len(removable) - excess :]))

    def _pad(self, rows: list[_Row], options: _TextOptions) -> dict[str, Any]:
        """Rows → the fields that are wanted, (B, T), or lists if they are not padded and their lengths differ."""
        lengths = [len(row["input_ids"]) for row in rows]
        fields = options.fields()
        if options.padding in (False, "do_not_pad") and len(set(lengths)) > 1:
            data = {name: [row[name].tolist() for row in rows] for name in fields}
            return data | ({"length": lengths} if options.return_length else {})
        width = max(lengths)
        if options.padding == "max_length":
            width = self.tokenizer.model_max_length if options.max_length is None else options.max_length
        if options.padding not in (False, "do_not_pad") and options.pad_to_multiple_of is not None:
            width += -width % options.pad_to_multiple_of
        fills = {"input_ids": self.tokenizer.pad_token_id, "special_tokens_mask": 1}
        side = options.padding_side or self.tokenizer.padding_side
        data = {}
        for name in fields:
            shape = (len(rows), width, *rows[0][name].shape[1:])
            data[name] = np.full(shape, fills.get(name, 0), dtype=np.int64)
            for number, (row, length) in enumerate(zip(rows, lengths, strict=True)):
                place = slice(width - length, width) if side == "left" else slice(0, length)
                data[name][number, place] = row[name]
        return data | ({"length": np.full(len(rows), width)} if options.return_length else {})


def _text_options(arguments: dict[str, Any]) -> _TextOptions:
    """
    Raises:
        TypeError: an argument is unknown.
        ValueError: an argument has no such value.
    """
    # Other processors take more; what asks for nothing is as good as missing.
    idle = {name for name in arguments.keys() & _IDLE if name == "verbose" or not arguments[name]}
    arguments = {name: value for name, value in arguments.items() if name not in idle}
    if unknown := sorted(arguments.keys() - _TEXT_OPTIONS):
        known = ", ".join(sorted(_TEXT_OPTIONS | _READING_OPTIONS))
        raise TypeError(f"the processor has no argument {', '.join(unknown)}. It has {known}.")
    return _TextOptions(**arguments)


def _check_template_knows(template: str, **variables: Any):
    """
    Raises:
        ValueError: a variable has a value, but the template does not use it.
    """
    for name, value in variables.items():
        if value and name not in template:
            raise ValueError(f"the chat template does not know {name}. Leave them out, or pass another chat_template.")


def _choose(row: _Row, positions: Any) -> _Row:
    """A row's tokens at these positions."""
    return {name: values[positions] for name, values in row.items()}


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
    conversations = [getattr(item, "messages", item) for item in conversation]
    for index, messages in enumerate(conversations):
        if not len(messages):
            raise ValueError(f"Conversation {index} is an empty list. Pass at least one message.")
    return conversations, True


def _message_clouds(conversations: Iterable[list[dict]]) -> list[list[Any]]:
    """The sources in the messages of each conversation, in order."""
    contents = [[message.get("content") for message in messages] for messages in conversations]
    return [
        [
            source
            for content in texts_and_clouds
            for item in ([] if isinstance(content, str) else content or [])
            if item["type"] == "point_cloud" and (source := cloud_source(item)) is not None
        ]
        for texts_and_clouds in contents
    ]


def cloud_source(item: dict[str, Any]) -> Any:
    """What `{"type": "point_cloud", "point_cloud" | "path" | "url": source}` holds, or None.

    Raises:
        ValueError: it holds more than one.
    """
    sources = {key: item[key] for key in ("point_cloud", "path", "url") if item.get(key) is not None}
    if len(sources) > 1:
        raise ValueError(f"a point cloud comes from one of point_cloud, path and url, got {' and '.join(sources)}.")
    return next(iter(sources.values()), None)


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
