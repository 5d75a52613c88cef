"""The page of this Space."""

from minigpt3d.evaluation.metrics.hub_metric import launch_card


launch_card()
