"""Caption Score by Judge of minigpt3d, for `evaluate.load`."""

from minigpt3d.evaluation.metrics import caption_judge_score
from minigpt3d.evaluation.metrics.hub_metric import HubMetric


class CaptionJudgeScore(HubMetric):
    function = staticmethod(caption_judge_score)
