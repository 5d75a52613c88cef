"""What the browser is sent: the object for the 3D view as JSON, the texts about it and the chat as HTML."""

import base64
import json
import re
from html import escape
from pathlib import Path
from urllib.parse import quote

import numpy as np

from minigpt3d.point_cloud_minigpt3d import READABLE_SUFFIXES

from .shown import ShownObject


# Of the controls, by the argument of `load_point_cloud`.
LABELS = {"up_axis": "Up axis of the file", "clean": "Remove", "missing_color": "Missing color"}


def object_to_show(
    shown: ShownObject | None, view: str, surface: Path | None = None, heat: np.ndarray | None = None
) -> str:
    """What static/viewer.js shows, as JSON; empty without an object.

    Args:
        view: "cloud", "surface" or "heat".
        surface: GLB of the view "surface".
        heat: (P, 3) uint8, colors of the view "heat".
    """
    if shown is None:
        return ""
    rgb = np.rint(255 * shown.cloud[:, 3:]).astype(np.uint8)
    return json.dumps(
        {
            "id": str(shown.path),
            "name": shown.name,
            "view": view,
            "up": shown.up_axis,
            "coord": _base64(shown.cloud[:, :3].astype("<f4")),
            "color": _base64(rgb),
            "heat": None if heat is None else _base64(heat),
            "surface": None if surface is None else file_url(surface),
        }
    )


def file_url(path: Path) -> str:
    """Where the server has a file, relative to the page."""
    return f"gradio_api/file={quote(path.as_posix())}"


def _base64(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()


def heat_colors(values: np.ndarray) -> np.ndarray:
    """Values (P,) in [0, 1] → (P, 3) uint8 in the colors of `minigpt3d look`."""
    from matplotlib import colormaps

    return colormaps["viridis"](values, bytes=True)[:, :3]


def scale_bar() -> str:
    """The legend of the heat map."""
    colors = ", ".join("rgb({}, {}, {})".format(*color) for color in heat_colors(np.linspace(0, 1, 9)))
    return f'<div id="scale">no attention <i style="background: linear-gradient(to right, {colors})"></i> most</div>'


def facts_about(shown: ShownObject | None, error: str | None = None) -> str:
    """What is known about an object, and every warning; why there is none, or what went wrong."""
    parts = []
    if error is not None:
        parts.append(f'<p class="error" role="alert">{escape(with_labels(error))}</p>')
    if shown is None:
        if error is None:
            parts.append(f"<p>No object yet. Files of these types are read: {escape(' '.join(READABLE_SUFFIXES))}</p>")
        return "".join(parts)
    facts = shown.facts
    count = f"{facts.num_points:,} points" if facts.num_faces is None else f"{facts.num_faces:,} faces"
    color = "with color" if facts.has_color else "without color"
    parts.append(
        f"<p><b>{escape(shown.name)}</b>: {count}, {color}; the model sees {len(shown.cloud):,} points"
        f"{f', {shown.up_axis} up' if shown.up_axis else ''}.</p>"
    )
    if shown.warnings:
        lines = "".join(f"<li>{escape(with_labels(text))}</li>" for text in shown.warnings)
        parts.append(f'<ul role="status">{lines}</ul>')
    return "".join(parts)


def with_labels(text: str) -> str:
    """A library's message with every argument in backticks replaced by the label of its control."""
    return re.sub(r"`(\w+)`", lambda match: f"“{LABELS[match[1]]}”" if match[1] in LABELS else match[0], text)


def chat_about(turns: list[tuple[str, str]]) -> list[dict[str, str]]:
    """Questions and answers as `gr.Chatbot` takes them, which inserts texts as HTML."""
    pairs = (zip(("user", "assistant"), turn, strict=True) for turn in turns)
    return [{"role": role, "content": escape(text, quote=False)} for pair in pairs for role, text in pair]
