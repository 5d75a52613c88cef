"""Sentence Similarity of minigpt3d, for `evaluate.load`."""

from minigpt3d.evaluation.metrics import sentence_similarity
from minigpt3d.evaluation.metrics.hub_metric import HubMetric


class SentenceSimilarity(HubMetric):
    function = staticmethod(sentence_similarity)
