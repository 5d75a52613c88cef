"""From a 3D object to text in one call: `pipeline("point-cloud-to-text")`."""

import copy
import os
import warnings
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForImageTextToText, Pipeline, PreTrainedModel
from transformers.pipelines import PIPELINE_REGISTRY

from .cleaning_minigpt3d import mirror_distance
from .point_cloud_minigpt3d import Orientation, load_orientations
from .processing_minigpt3d import DEFAULT_PROMPT, END_OF_ANSWER, cloud_source


TASK = "point-cloud-to-text"
# The authors' benchmarks stop at 150 on Objaverse. Paper: §4.
DEFAULT_MAX_NEW_TOKENS = 150
# In nats, how much more likely another axis than y, as in the training data, must be. See benchmarks/clean.py.
UP_AXIS_MARGIN = 0.3


def default_dtype(model: PreTrainedModel, device: torch.device) -> torch.dtype:
    """The precision to compute in on a device: float32 on a CPU, where half precision is several times slower."""
    return torch.float32 if device.type == "cpu" else model.dtype


def _is_chat(item: Any) -> bool:
    """Whether this is one conversation, a list of `{"role": …, "content": …}`."""
    return (
        isinstance(item, (list, tuple))
        and len(item) > 0
        and all(isinstance(message, dict) and {"role", "content"} <= message.keys() for message in item)
    )


class PointCloudToTextPipeline(Pipeline):
    """Answer a question about a 3D object, or continue a conversation about one.

    ```python
    >>> from transformers import pipeline

    >>> describe = pipeline("point-cloud-to-text", model=folder_or_id, trust_remote_code=True)
    >>> describe("chair.ply")
    [{'generated_text': 'A brown wooden chair.'}]
    >>> describe(["chair.ply", "lamp.npy"], prompt="What color is it?", batch_size=2)
    [[{'generated_text': 'Brown.'}], [{'generated_text': 'White.'}]]
    ```

    Decoding is greedy and ends at the processor's `end_of_answer` (`###`), which is removed. On a CPU the model computes in
    float32, elsewhere in the precision of its files, unless `pipeline(…, dtype=…)` says otherwise. A model that is passed to this
    class keeps its own.
    """

    _load_processor = True
    _load_image_processor = False
    _load_video_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False

    def __init__(self, *args, dtype: str | torch.dtype | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        # "auto" is what transformers.pipeline passes if nothing is given. Quantized or distributed models stay as they are.
        on_one_device = len({parameter.device for parameter in self.model.parameters()}) == 1
        if dtype == "auto" and on_one_device and not hasattr(self.model, "hf_quantizer"):
            self.model.to(default_dtype(self.model, self.model.device))
        # The base class pads batches on this side: an answer must follow its question without a gap.
        self.processor.tokenizer.padding_side = "left"

    def __call__(self, inputs: Any, **kwargs) -> list[dict[str, str]] | list[list[dict[str, str]]]:
        """Describe objects.

        Args:
            inputs: one input or a list (or a generator, or a `torch.utils.data.Dataset`) of them. An input is whatever
                `load_point_cloud` reads (a path, an array or a tensor (N, 3 or 6), a trimesh object), or a chat: a list of
                messages whose content holds `{"type": "point_cloud", "point_cloud": …}` and
                `{"type": "text", "text": …}`.
            prompt (`str` or a list of them, *optional*): the question about each input that is no chat, or a question for
                each of a list of inputs, None for chats; "What is this?" by default.
            up_axis (`str`, *optional*): the axis that points up in the inputs, "x", "y" or "z"; by default the processor's.
                Pass "y" for clouds that have been turned already. "auto" chooses it, see `choose_orientation`.
            missing_color (`str` or three numbers, *optional*): for points without color: "black", "gray", "white" or
                (r, g, b) in [0, 1]; by default the processor's.
            clean (`str`, *optional*): what is removed from the inputs: "none", far "outliers", a "floor" below the object,
                or "all"; by default the processor's.
            batch_size (`int`, *optional*): inputs per batch, 1 by default.
            kwargs: any argument of `generate`, here or in `pipeline(…)`: `max_new_tokens` (150 by default), `num_beams`,
                `do_sample`, `streamer` … They may also come as one dict, `generate_kwargs`, as in other pipelines.

        Returns:
            A list of `num_return_sequences` dicts `{"generated_text": str}`; for a list of inputs a list of such lists.

        Raises:
            ValueError: an input cannot be read, `prompt` is given with a chat, or it is no text or empty.
        """
        if _is_chat(inputs):
            inputs = {"messages": inputs}  # a bare list would be read as a batch
        elif isinstance(inputs, (list, tuple)):
            if not inputs:
                return []
            inputs = [{"messages": item} if _is_chat(item) else item for item in inputs]
        if isinstance(prompts := kwargs.get("prompt"), (list, tuple)):
            del kwargs["prompt"]
            if not isinstance(inputs, list) or len(inputs) != len(prompts):
                raise ValueError(
                    f"{TASK}: prompts are one text, or as many as there are inputs in a list; got {prompts!r}."
                )
            for prompt in prompts:
                self._sanitize_parameters(prompt=prompt)
            inputs = [{"messages": self._messages(*pair)} for pair in zip(inputs, prompts, strict=True)]
        return super().__call__(inputs, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs):
        """Write model, processor and code; `pipeline(…, trust_remote_code=True)` reads the folder without this package."""
        super().save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory, **kwargs)

    def _sanitize_parameters(
        self,
        prompt: str | None = None,
        up_axis: str | None = None,
        missing_color: str | tuple[float, float, float] | None = None,
        clean: str | None = None,
        generate_kwargs: dict[str, Any] | None = None,
        **generate_arguments,
    ) -> tuple[dict, dict, dict]:
        if prompt is not None and not (isinstance(prompt, str) and prompt.strip()):
            raise ValueError(
                f"{TASK}: prompt is one text for all inputs, or a list with a text for each, and not empty; got {prompt!r}."
            )
        preprocess = {"prompt": prompt, "up_axis": up_axis, "missing_color": missing_color, "clean": clean}
        forward = (generate_kwargs or {}) | generate_arguments
        return {name: value for name, value in preprocess.items() if value is not None}, forward, {}

    def preprocess(self, inputs: Any, prompt: str | None = None, **reading) -> dict[str, Any]:
        """One input → `input_ids` (1, T), `attention_mask` (1, T) and `point_clouds`, a list of one (C, N, 6) or of none."""
        messages = self._messages(inputs, prompt)
        if (reading.get("up_axis") or self.processor.feature_extractor.up_axis) == "auto":
            messages = [self._read_clouds(message, reading) for message in messages]
            reading = {"up_axis": "y", "clean": "none"}
        encoded = self.processor.apply_chat_template(
            messages,
            add_generation_prompt=messages[-1]["role"] == "user",
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            **reading,
        )
        # A list: collating would keep only the first cloud of each chat.
        clouds = encoded.pop("point_clouds", None)
        return {**encoded, "point_clouds": [] if clouds is None else [clouds]}

    def _messages(self, inputs: Any, prompt: str | None) -> list[dict[str, Any]]:
        if hasattr(inputs, "messages"):  # the base class has wrapped a generator's chats
            inputs = {"messages": inputs.messages}
        elif _is_chat(inputs):  # an item of a dataset
            inputs = {"messages": inputs}
        if inputs is None:
            raise ValueError(
                f"{TASK}: None cannot be read; an input is a path, an array, a mesh or a list of messages."
            )
        if not isinstance(inputs, dict):
            question = DEFAULT_PROMPT if prompt is None else prompt
            content = [{"type": "point_cloud", "point_cloud": inputs}, {"type": "text", "text": question}]
            return [{"role": "user", "content": content}]
        messages = inputs.get("messages")
        if not _is_chat(messages):
            raise ValueError(
                f"{TASK}: an input is a path, an array, a mesh or a list of messages with 'role' and 'content', "
                f"got a dict with the keys {sorted(map(str, inputs))}."
            )
        if prompt is not None:
            raise ValueError(f"{TASK}: a chat has questions already; leave out prompt, got {prompt!r}.")
        return [dict(message) for message in messages]

    def _read_clouds(self, message: dict[str, Any], reading: dict[str, Any]) -> dict[str, Any]:
        """A message with its sources replaced by the clouds that they hold."""
        if not isinstance(message["content"], (list, tuple)):
            return message
        content = [
            {"type": "point_cloud", "point_cloud": self.read_point_cloud(source, **reading)}
            if item.get("type") == "point_cloud" and (source := cloud_source(item)) is not None
            else item
            for item in message["content"]
        ]
        return message | {"content": content}

    def read_point_cloud(self, source: Any, **reading) -> np.ndarray:
        """Read one source as the pipeline does.

        Args:
            source: see `load_point_cloud`.
            reading: `up_axis`, `missing_color` and `clean`, see `__call__`.

        Returns:
            (N, 6) float32. Pass it on with `up_axis="y"` and `clean="none"`.

        Raises:
            ValueError: the source cannot be read, or an argument is out of its range.
        """
        orientations, _ = load_orientations(source, **self.reading_arguments(**reading))
        chosen = self.choose_orientation(orientations)
        for note in chosen.notes:
            warnings.warn(note, stacklevel=2)
        return chosen.cloud

    def reading_arguments(self, **reading) -> dict[str, Any]:
        """Arguments of `load_orientations`: those given, else the processor's."""
        reader = self.processor.feature_extractor
        names = ("num_points", "missing_color", "up_axis", "seed", "clean")
        given = {name: value for name, value in reading.items() if value is not None}
        return {name: getattr(reader, name) for name in names} | given

    def choose_orientation(self, orientations: list[Orientation]) -> Orientation:
        """The orientation in which an object is upright.

        If the object stands on a floor in only one of them, it is that one. Otherwise a score adds two things, since
        upright the model is surer of its answer, and the object differs more from its image upside down: the
        log-likelihood of the greedy answer to "What is this?", and the logarithm of the distance between the cloud and its
        mirror image at a horizontal plane. The orientation with y up gets `UP_AXIS_MARGIN` more.

        Args:
            orientations: one or more, see `load_orientations`.
        """
        if len(orientations) == 1:
            return orientations[0]
        on_floor = [orientation for orientation in orientations if orientation.has_floor]
        if len(on_floor) == 1:
            return on_floor[0]
        scores = self._answer_log_likelihoods(np.stack([orientation.cloud for orientation in orientations]))
        for number, orientation in enumerate(orientations):
            scores[number] += np.log(mirror_distance(orientation.cloud[:, :3].astype(np.float64), "y"))
            scores[number] += UP_AXIS_MARGIN if orientation.up_axis == "y" else 0
        return orientations[int(scores.argmax())]

    def _answer_log_likelihoods(self, clouds: np.ndarray) -> np.ndarray:
        """(C, N, 6) → (C,) log-likelihood of the greedy answer to the default question about each cloud, in nats."""
        if torch.utils.data.get_worker_info() is not None:
            raise ValueError(f"{TASK}: up_axis='auto' asks the model while it reads: pass num_workers=0.")
        inputs = self.processor.apply_chat_template(
            [self._messages(cloud, None) for cloud in clouds],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            up_axis="y",
            clean="none",
        )
        prompt_length = inputs["input_ids"].shape[1]
        with torch.inference_mode(), self.device_placement():
            output = self.model.generate(
                **self._ensure_tensor_on_device(dict(inputs), device=self.device),
                **self._generation_arguments({"do_sample": False, "num_beams": 1, "num_return_sequences": 1}),
                tokenizer=self.processor.tokenizer,
                return_dict_in_generate=True,
                output_logits=True,
            )
        answers = output.sequences[:, prompt_length:].cpu()  # (C, T)
        logits = torch.stack(output.logits, dim=1).cpu().double()  # (C, T, V)
        scores = logits.log_softmax(-1).gather(-1, answers[..., None])[..., 0]  # (C, T)
        lengths = [self._answer_length(tokens) for tokens in answers.tolist()]
        return np.array([row[:length].sum().item() for row, length in zip(scores, lengths, strict=True)])

    def _answer_length(self, tokens: list[int]) -> int:
        """Tokens of an answer up to its end, with the eos or `###` that the model chose, without padding."""
        tokenizer, eos = self.processor.tokenizer, self.model.generation_config.eos_token_id
        ends = {tokenizer.pad_token_id, tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])}
        first = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
        is_ended = first == len(tokens) or END_OF_ANSWER in tokenizer.decode(tokens[:first])
        return first if is_ended else first + 1

    def _forward(self, model_inputs: dict[str, Any], **generate_kwargs) -> dict[str, torch.Tensor]:
        """Generate; returns the new tokens, (B, num_return_sequences, T)."""
        model_inputs = dict(model_inputs)
        clouds = list(flatten(model_inputs.pop("point_clouds")))
        if clouds:
            model_inputs["point_clouds"] = torch.cat(clouds)
        batch_size, prompt_length = model_inputs["input_ids"].shape
        generated = self.model.generate(
            **model_inputs, **self._generation_arguments(generate_kwargs), tokenizer=self.processor.tokenizer
        )
        sequences = generated if isinstance(generated, torch.Tensor) else generated.sequences
        return {"answers": sequences[:, prompt_length:].unflatten(0, (batch_size, -1))}

    def _generation_arguments(self, generate_kwargs: dict[str, Any]) -> dict[str, Any]:
        """Add to the arguments of `generate` what ends an answer, such as `###`, and a number of tokens if none is set."""
        arguments = dict(generate_kwargs)
        config = arguments.get("generation_config") or self.model.generation_config
        stops = arguments.get("stop_strings") or config.stop_strings or []
        stops = [stops] if isinstance(stops, str) else stops
        ends = {"stop_strings": list(dict.fromkeys([*stops, self.processor.end_of_answer]))}
        if config.max_new_tokens is None and not {"max_new_tokens", "max_length"} & arguments.keys():
            ends["max_new_tokens"] = DEFAULT_MAX_NEW_TOKENS
        if "generation_config" not in arguments:
            return arguments | ends
        config = copy.deepcopy(config)  # generate takes a configuration or arguments, but not both
        config.update(**ends)
        return arguments | {"generation_config": config}

    def postprocess(self, model_outputs: dict[str, torch.Tensor]) -> list[dict[str, str]]:
        """New tokens of one input, (1, num_return_sequences, T) → texts without `###`."""
        texts = self.processor.tokenizer.batch_decode(model_outputs["answers"][0], skip_special_tokens=True)
        end = self.processor.end_of_answer
        return [{"generated_text": text.split(end)[0].strip()} for text in texts]


def flatten(nested: Iterable) -> Iterable[torch.Tensor]:
    """The tensors in nested lists."""
    for item in nested:
        if isinstance(item, torch.Tensor):
            yield item
        else:
            yield from flatten(item)


def register():
    """Register the task, so that it needs no `trust_remote_code` where the package is installed."""
    if TASK not in PIPELINE_REGISTRY.supported_tasks:
        PIPELINE_REGISTRY.register_pipeline(
            TASK, pipeline_class=PointCloudToTextPipeline, pt_model=AutoModelForImageTextToText, type="multimodal"
        )


__all__ = ["PointCloudToTextPipeline", "register"]
