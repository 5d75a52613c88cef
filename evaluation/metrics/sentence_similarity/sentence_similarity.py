"""Cosine of the sentence embeddings of captions and references: S-BERT and SimCSE, as PointLLM's evaluation computes them."""

import datasets
import evaluate


_INPUTS = """
Args:
    predictions: captions, one text for each object.
    references: a true caption of each object.
    encoder: folder or Hub id.
    pooling: "sentence-transformers", as its own configuration says (S-BERT), or "pooler_output" of transformers' AutoModel
        (SimCSE).
    batch_size: texts that are encoded together.
Returns:
    similarity (mean cosine, in [-1, 1]) and values (for each object).
"""
POOLINGS = ("sentence-transformers", "pooler_output")


class SentenceSimilarity(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions, references, encoder, pooling="sentence-transformers", batch_size=32):
        if pooling not in POOLINGS:
            raise ValueError(f"pooling: expected one of {', '.join(POOLINGS)}, got {pooling!r}.")
        encode = _s_bert if pooling == "sentence-transformers" else _simcse
        # An empty text has no tokens; two marks are what PointLLM's evaluation puts in its place.
        texts = [text.strip() or "##" for text in (*predictions, *references)]
        embeddings = encode(encoder, texts, batch_size)  # (2 * N, D)
        ours, theirs = embeddings.chunk(2)
        values = (ours * theirs).sum(1).tolist()
        return {"similarity": sum(values) / len(values), "values": values}


def _s_bert(encoder, texts: list[str], batch_size: int):
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ImportError(
            'sentence_similarity needs sentence-transformers: pip install "minigpt3d[eval]", or the package alone.'
        ) from error
    model = SentenceTransformer(encoder)
    return (
        model.encode(
            texts, batch_size=batch_size, convert_to_tensor=True, normalize_embeddings=True, show_progress_bar=False
        )
        .double()
        .cpu()
    )


def _simcse(encoder, texts: list[str], batch_size: int):
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(encoder), AutoModel.from_pretrained(encoder).eval()
    pooled = []
    with torch.inference_mode():
        for first in range(0, len(texts), batch_size):
            batch = tokenizer(texts[first : first + batch_size], padding=True, truncation=True, return_tensors="pt")
            pooled.append(model(**batch).pooler_output.double())
    return torch.nn.functional.normalize(torch.cat(pooled))
