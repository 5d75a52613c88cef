"""Open-Vocabulary Accuracy of minigpt3d, for `evaluate.load`."""

from minigpt3d.evaluation.metrics import open_vocabulary_accuracy
from minigpt3d.evaluation.metrics.hub_metric import HubMetric


class OpenVocabularyAccuracy(HubMetric):
    function = staticmethod(open_vocabulary_accuracy)
