"""The page of this metric's Space: its card. A form cannot ask for the classes."""

import gradio
from evaluate.utils.gradio import parse_readme


with gradio.Blocks() as page:
    gradio.Markdown(parse_readme("README.md"))
page.launch()
