"""Sentence similarity: the cosine between the vectors of an answer and of its reference, as S-BERT or SimCSE."""

import datasets
import evaluate
import numpy as np


POOLINGS = ("sentence-transformers", "pooler_output")
BATCH_SIZE = 64


class SentenceSimilarity(evaluate.Metric):
    """The cosine between the vectors that a sentence encoder makes of answers and of their references."""

    def _info(self):
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description="""
Args:
    predictions: the answers, one text for each object. An empty one has similarity 0.
    references: one text for each object.
    encoder: a folder or Hub id. The field takes sentence-transformers/all-mpnet-base-v2 for S-BERT and
        princeton-nlp/sup-simcse-roberta-large, with the other pooling, for SimCSE.
    pooling: "sentence-transformers", as the encoder's own files say, or "pooler_output" of transformers' AutoModel.

Returns:
    similarity: the mean, between -1 and 1.
    values: the similarity of each object.
""",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def add_batch(self, *, predictions=None, references=None, **others):
        """Add answers and references."""
        _check_texts("predictions", predictions)
        _check_texts("references", references)
        super().add_batch(predictions=predictions, references=references, **others)

    def _compute(self, predictions, references, encoder, pooling="sentence-transformers"):
        if pooling not in POOLINGS:
            raise ValueError(f"pooling must be {' or '.join(POOLINGS)}, got {pooling!r}.")
        texts = sorted(
            {*predictions, *references}, key=lambda text: (len(text), text)
        )  # alike in length: little padding
        encode = _load_pooler(encoder) if pooling == "pooler_output" else _load_sentence_transformer(encoder)
        row = {text: number for number, text in enumerate(texts)}
        vectors = encode(texts).astype(np.float64)  # (texts, D)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        values = [
            float(vectors[row[answer]] @ vectors[row[reference]]) if answer.strip() else 0.0
            for answer, reference in zip(predictions, references, strict=True)
        ]
        return {"similarity": sum(values) / len(values), "values": values}


def _load_sentence_transformer(encoder):
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ImportError(
            'S-BERT needs sentence-transformers: pip install "minigpt3d[eval]", or pip install sentence-transformers'
        ) from error
    model = SentenceTransformer(encoder)
    return lambda texts: model.encode(texts, batch_size=BATCH_SIZE, show_progress_bar=False)


def _load_pooler(encoder):
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(encoder)
    model, loading = AutoModel.from_pretrained(encoder, output_loading_info=True)
    # transformers would fill weights that a folder lacks with random ones; many encoders come without a pooler.
    if loading["missing_keys"]:
        missing = ", ".join(sorted(loading["missing_keys"])[:3])
        raise ValueError(
            f"{encoder} lacks the weights {missing}: its pooler_output would be random. "
            'Take an encoder that was trained with its pooler, as SimCSE was, or pooling="sentence-transformers".'
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


# ---- The same in every metric of this family, each of which is loaded alone -----------------------------------------


def _check_texts(name, texts):
    """A ValueError unless it is a list of one text or more."""
    if isinstance(texts, str) or not hasattr(texts, "__len__"):
        raise ValueError(f"{name} must be a list of texts, got {texts!r}.")
    if len(texts) == 0:
        raise ValueError(f"{name} is empty: there is nothing to score.")
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"{name}[{number}] must be a text, got {text!r}.")
