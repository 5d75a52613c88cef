"""Small tokenizers in the style of other language models."""

import json

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer


CORPUS = ["What is this? A red chair, with four legs.###", "[INST] <PC></PC> Is it (very) new?  [/INST]Yes.###"] * 20


def train(model, trainer, pre_tokenizer=None, normalizer=None) -> Tokenizer:
    tokenizer = Tokenizer(model)
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def bpe_parts(**kwargs) -> tuple[dict, list]:
    """Vocabulary and merges of a BPE."""
    model = json.loads(train(models.BPE(unk_token="<unk>", byte_fallback=True), **kwargs).to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


def qwen_style():
    """Byte-level BPE, no bos, a pad token of its own."""
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    vocab, merges = bpe_parts(trainer=trainer, pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False))
    return Qwen2Tokenizer(vocab=vocab, merges=merges, model_max_length=512)


def llama_style():
    """Sentencepiece-like BPE: blanks become ▁, another ▁ in front, unknown characters as bytes; bos <s>, no pad."""
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special)
    vocab, merges = bpe_parts(trainer=trainer, pre_tokenizer=pre_tokenizers.Metaspace())
    return LlamaTokenizer(vocab=vocab, merges=merges, model_max_length=512)


def wordpiece_style():
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]", "[PAD]", "[CLS]"])
    backend = train(models.WordPiece(unk_token="[UNK]"), trainer, pre_tokenizers.BertPreTokenizer(), normalizers.NFC())
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", model_max_length=512
    )
