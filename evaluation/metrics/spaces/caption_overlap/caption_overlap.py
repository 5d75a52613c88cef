"""Caption Overlap of minigpt3d, for `evaluate.load`."""

from minigpt3d.evaluation.metrics import caption_overlap
from minigpt3d.evaluation.metrics.hub_metric import HubMetric


class CaptionOverlap(HubMetric):
    function = staticmethod(caption_overlap)
    several_references = has_form = True
