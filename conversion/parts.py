"""A start for stage I with any causal language model, put together from pretrained parts.

    3D encoder                                  a MiniGPT-3D model, or the authors' point_model.pth
    Q-Former, query tokens                      BLIP-2, a MiniGPT-3D model, or new and random
    language model, tokenizer, chat template    the language model
    projections, router                         new: PyTorch's initial values, seed 0

Sizes follow from the parts. All query experts start as the same query tokens.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Blip2QFormerModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.configuration_utils import PreTrainedConfig

from minigpt3d.configuration_minigpt3d import MiniGPT3DConfig
from minigpt3d.files import write_json, written_whole
from minigpt3d.hub import CONFIG_FILE, check_model_dir, find_model, load_model, public_name, write_all_but_weights
from minigpt3d.messages import one_line, public_word
from minigpt3d.modeling_minigpt3d import MiniGPT3DForConditionalGeneration, build_lm_head
from minigpt3d.processing_minigpt3d import (
    POINT_TOKEN,
    MiniGPT3DPointCloudProcessor,
    MiniGPT3DProcessor,
    prepare_tokenizer,
    with_point_clouds,
)

from .checkpoints import Checkpoint
from .lora import lora_targets
from .release import new_linear_layers
from .state_dict import convert_state_dict
from .write import PROVENANCE_FILE


ENCODER, QFORMER, QUERIES = "model.point_encoder.", "model.qformer.", "model.query_experts.0.weight"
BLIP2_KEY = re.compile(r"(?:model\.)?(qformer\..*|query_tokens)")


@dataclass
class Part:
    """A pretrained part.

    Args:
        config: of the MiniGPT-3D that it is from; of other sources only what concerns the part is used.
        tensors: by our names.
        feature_extractor: how clouds are read for it.
    """

    config: MiniGPT3DConfig
    tensors: dict[str, torch.Tensor]
    feature_extractor: MiniGPT3DPointCloudProcessor | None = None


# ---- Parts ----------------------------------------------------------------------------------------------------------


def read_point_encoder(path: str) -> Part:
    """The 3D encoder of a MiniGPT-3D model (folder or Hub id), or of the authors' point_model.pth.

    Raises:
        ValueError: it is neither.
    """
    if not Path(path).is_file():
        return _of_model(path, (ENCODER,))
    checkpoint, config = Checkpoint(path, "base_model"), MiniGPT3DConfig()
    state = {f"pc_encoder.{key}": checkpoint.read(key) for key in checkpoint.shapes}
    return Part(config, convert_state_dict(state, config, part=ENCODER))


def read_qformer(path: str) -> Part:
    """Q-Former and query tokens of BLIP-2 (a folder of transformers, or blip2_pretrained_flant5xxl.pth), or of a MiniGPT-3D
    model (folder or Hub id).

    Raises:
        ValueError: it is none of these, or lacks tensors.
    """
    if Path(path).is_file():
        config, checkpoint = MiniGPT3DConfig(), Checkpoint(path, "model")
        ours = [key for key in checkpoint.shapes if key.startswith(("Qformer.bert", "query_tokens"))]
        state = {key: checkpoint.read(key) for key in ours}
        queries = state.pop("query_tokens", None)
        tensors = convert_state_dict(state, config, part=QFORMER)
    elif (Path(path) / CONFIG_FILE).is_file() and (blip2 := _read_config(path)).model_type == "blip-2":
        checkpoint = Checkpoint(path)
        names = {match[1]: key for key in checkpoint.shapes if (match := BLIP2_KEY.fullmatch(key))}
        no_dropout = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)  # as our own default
        config = MiniGPT3DConfig(qformer_config=blip2.qformer_config.to_dict() | no_dropout)
        queries = checkpoint.read(names["query_tokens"]) if "query_tokens" in names else None
        with torch.device("meta"):
            expected = Blip2QFormerModel(config.qformer_config).state_dict()
        if missing := sorted(f"qformer.{name}" for name in expected if f"qformer.{name}" not in names):
            raise ValueError(f"`qformer` {path}: {len(missing)} tensors are missing, such as {missing[0]}.")
        tensors = {QFORMER + name: checkpoint.read(names[f"qformer.{name}"]) for name in expected}
    else:
        return _of_model(path, (QFORMER, QUERIES))
    if queries is None:
        raise ValueError(f"`qformer` {path}: it has no query_tokens.")
    return Part(config, tensors | {QUERIES: queries.flatten(0, -2)})


def _of_model(path: str, beginnings: tuple[str, ...]) -> Part:
    config = _read_config(find_model(path).base)
    if config.model_type != MiniGPT3DConfig.model_type:
        raise ValueError(f"{path}: expected a MiniGPT-3D model, got one of type {config.model_type}.")
    model, processor = load_model(path)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(beginnings)}
    return Part(model.config, tensors, processor.feature_extractor)


def _read_config(path: str) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:
        raise ValueError(f"{path}: its {CONFIG_FILE} cannot be read ({one_line(error)[:200]}).") from error


def check_language_model(name: str):
    """Check the configuration of a language model before any weights are read.

    Raises:
        ValueError: there is none, or the stages cannot train its family.
    """
    config = _read_config(name).get_text_config()
    build_lm_head(config)
    lora_targets(config.model_type)


def read_language_model(name: str, dtype: torch.dtype | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and prepared tokenizer of a causal language model; its embedding has a row for `<point>`.

    Raises:
        ValueError: it cannot be loaded.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype or "auto", trust_remote_code=False)
    except Exception as error:
        raise ValueError(f"`llm` {name}: it cannot be loaded ({one_line(error)[:200]}).") from error
    prepare_tokenizer(tokenizer)
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer))
    return model, tokenizer


# ---- The whole ------------------------------------------------------------------------------------------------------


def write_start(
    llm: str,
    point_encoder: str,
    output_dir: Path,
    qformer: str | None = None,
    dtype: torch.dtype | None = None,
    command: list[str] = (),
    before_rename: Callable[[Path], None] = lambda folder: None,
) -> str:
    """Write a folder that stage I starts from; returns where each part comes from.

    Args:
        llm: folder or Hub id of a causal language model of transformers.
        point_encoder: see `read_point_encoder`. Its model also gives the sizes that no other part decides.
        output_dir: a new folder.
        qformer: see `read_qformer`; None for a random one.
        dtype: of the weights; by default the language model's.
        command: the command line, for provenance.json.
        before_rename: called with the complete folder while it still has its temporary name.

    Raises:
        ValueError: a part cannot be read or used, or the folder exists.
    """
    folders = [path for path in (llm, point_encoder, qformer) if path is not None and Path(path).exists()]
    output_dir = check_model_dir(output_dir, folders)
    if output_dir.exists() and any(output_dir.iterdir()):
        raise ValueError(f"{output_dir} exists already; pass a new folder.")
    check_language_model(llm)
    encoder = read_point_encoder(point_encoder)
    queries = None if qformer is None else read_qformer(qformer)
    language_model, tokenizer = read_language_model(llm, dtype)
    text_config = language_model.config.get_text_config()
    config = MiniGPT3DConfig(
        point_config=encoder.config.point_config,
        qformer_config=(queries or encoder).config.qformer_config,
        text_config=text_config,
        num_query_tokens=len(queries.tensors[QUERIES]) if queries else encoder.config.num_query_tokens,
        num_query_experts=encoder.config.num_query_experts,
        num_experts_per_cloud=encoder.config.num_experts_per_cloud,
        router_type="none",
        router_hidden_size=encoder.config.router_hidden_size,
        point_token_id=tokenizer.convert_tokens_to_ids(POINT_TOKEN),
    )
    own_template = tokenizer.chat_template
    if isinstance(own_template, dict):
        own_template = own_template.get("default")
    processor = MiniGPT3DProcessor(
        encoder.feature_extractor or MiniGPT3DPointCloudProcessor(),
        tokenizer,
        config.num_query_tokens,
        own_template and with_point_clouds(own_template),
    )
    model, new = _assemble(config, encoder, queries, language_model)
    template = "its own chat template" if own_template else "our chat template"
    summary = [
        f"point encoder: {public_name(point_encoder)}",
        f"Q-Former and query tokens: {public_name(qformer) if qformer else 'new, random'}",
        f"language model and tokenizer: {public_name(llm)} ({text_config.model_type}), {template}",
        f"new: {', '.join(new)}",
    ]
    with written_whole(output_dir) as partial:
        write_all_but_weights(partial, model, processor)
        model.save_pretrained(partial)
        write_json(partial / PROVENANCE_FILE, _record(summary, llm, command))
        before_rename(partial)
    return "\n".join(summary)


def _assemble(
    config: MiniGPT3DConfig, encoder: Part, queries: Part | None, language_model: PreTrainedModel
) -> tuple[MiniGPT3DForConditionalGeneration, list[str]]:
    """The model, and the names of its new parts."""
    state = new_linear_layers(config) | encoder.tensors | (queries.tensors if queries else {})
    if queries is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            qformer = Blip2QFormerModel(config.qformer_config).state_dict()
            width = config.qformer_config.hidden_size
            state[QUERIES] = config.qformer_config.initializer_range * torch.randn(config.num_query_tokens, width)
        state |= {QFORMER + name: tensor for name, tensor in qformer.items()}
    for index in range(1, config.num_query_experts):
        state[QUERIES.replace("0", str(index))] = state[QUERIES].clone()
    of_language_model = language_model.base_model.state_dict()
    state |= {f"model.language_model.{name}": tensor for name, tensor in of_language_model.items()}
    state |= {f"lm_head.{name}": t for name, t in language_model.get_output_embeddings().state_dict().items()}
    model, loading = MiniGPT3DForConditionalGeneration.from_pretrained(
        None, config=config, state_dict=state, dtype=language_model.dtype, output_loading_info=True
    )
    problems = {name: keys for name, keys in loading.items() if keys}
    if problems:
        raise ValueError(f"`llm`: its weights do not fit a model of its configuration: {str(problems)[:300]}")
    parts = ["point projection", "language projection", "router"]
    return model, [*parts, *([] if queries else ["Q-Former", "query tokens"])]


def _record(summary: list[str], llm: str, command: list[str]) -> dict:
    """provenance.json: what the model card states."""
    return {
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": ["minigpt3d", *map(public_word, command)],
        "versions": {name: version(name) for name in ("minigpt3d", "torch", "transformers")},
        "lora": "merge",
        "router_type": "none",
        "language_model": public_name(llm),
        "files": {},
        "summary": summary,
    }
