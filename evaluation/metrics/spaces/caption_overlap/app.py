"""The page of this Space: a form, and the metric's card."""

import evaluate
import nltk
from evaluate.utils import launch_gradio_widget


nltk.download("wordnet")
launch_gradio_widget(evaluate.load("caption_overlap.py"))
