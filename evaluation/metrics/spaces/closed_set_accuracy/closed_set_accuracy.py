"""Closed-Set Accuracy of minigpt3d, for `evaluate.load`."""

from minigpt3d.evaluation.metrics import closed_set_accuracy
from minigpt3d.evaluation.metrics.hub_metric import HubMetric


class ClosedSetAccuracy(HubMetric):
    function = staticmethod(closed_set_accuracy)
