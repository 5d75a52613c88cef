"""Hallucination of minigpt3d, for `evaluate.load`."""

from minigpt3d.evaluation.metrics import hallucination
from minigpt3d.evaluation.metrics.hub_metric import HubMetric


class Hallucination(HubMetric):
    function = staticmethod(hallucination)
