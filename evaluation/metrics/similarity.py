"""Sentence similarity: the cosine between the vectors of an answer and of its reference, as S-BERT or SimCSE. Paper: §4."""

from collections.abc import Callable, Sequence

import numpy as np

from minigpt3d.messages import one_line

from .checks import check_pairs


POOLINGS = ("sentence-transformers", "pooler_output")
BATCH_SIZE = 64


def sentence_similarity(
    predictions: Sequence[str],
    references: Sequence[str],
    *,
    encoder: str,
    pooling: str = "sentence-transformers",
) -> dict:
    """Cosine between the vectors that a sentence encoder makes of answers and of their references.

    Args:
        predictions: the answers, one text per object. An empty one has similarity 0.
        references: one text per object.
        encoder: a folder or Hub id. The field uses sentence-transformers/all-mpnet-base-v2 for S-BERT and
            princeton-nlp/sup-simcse-roberta-large, with pooling "pooler_output", for SimCSE.
        pooling: "sentence-transformers", as the encoder's files say, or "pooler_output" of transformers' AutoModel.

    Returns:
        similarity: the mean, between -1 and 1.
        values: the similarity per object.

    Raises:
        ValueError: the encoder has no trained pooler, though `pooling` asks for it.
        ImportError: sentence-transformers is missing.
    """
    check_pairs(predictions, references)
    if pooling not in POOLINGS:
        raise ValueError(f"`pooling` must be {' or '.join(POOLINGS)}, got {pooling!r}.")
    try:
        encode = _load_pooler(encoder) if pooling == "pooler_output" else _load_sentence_transformer(encoder)
    except (OSError, ValueError) as error:
        raise ValueError(f"the sentence encoder {encoder} cannot be loaded: {one_line(error)}") from error
    texts = sorted({*predictions, *references}, key=lambda text: (len(text), text))  # similar lengths: little padding
    row = {text: index for index, text in enumerate(texts)}
    vectors = encode(texts).astype(np.float64)  # (texts, D)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    values = [
        float(vectors[row[answer]] @ vectors[row[reference]]) if answer.strip() else 0.0
        for answer, reference in zip(predictions, references, strict=True)
    ]
    return {"similarity": sum(values) / len(values), "values": values}


# ---- Encoders: list of texts -> (texts, D) array --------------------------------------------------------------------


def _load_sentence_transformer(encoder: str) -> Callable[[list[str]], np.ndarray]:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ImportError(
            'S-BERT needs sentence-transformers: pip install "minigpt3d[eval]", or pip install sentence-transformers'
        ) from error
    model = SentenceTransformer(encoder, trust_remote_code=False)
    return lambda texts: model.encode(texts, batch_size=BATCH_SIZE, show_progress_bar=False)


def _load_pooler(encoder: str) -> Callable[[list[str]], np.ndarray]:
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(encoder, trust_remote_code=False)
    model, loading = AutoModel.from_pretrained(encoder, output_loading_info=True, trust_remote_code=False)
    # transformers initializes missing weights at random, and many encoders are published without a pooler.
    if loading["missing_keys"]:
        missing = ", ".join(sorted(loading["missing_keys"])[:3])
        raise ValueError(
            f"`encoder` {encoder} lacks the weights {missing}: its pooler_output would be random. "
            'Use an encoder that was trained with its pooler, as SimCSE was, or pooling="sentence-transformers".'
        )
    model = model.eval().to("cuda" if torch.cuda.is_available() else "cpu")

    @torch.no_grad()
    def encode(texts):
        vectors = []
        for start in range(0, len(texts), BATCH_SIZE):
            batch = tokenizer(texts[start : start + BATCH_SIZE], padding=True, truncation=True, return_tensors="pt")
            vectors.append(model(**batch.to(model.device)).pooler_output.float())
        return torch.cat(vectors).cpu().numpy()

    return encode
