"""What the queries of the Q-Former attend to, as numbers and as a page that shows it on the cloud."""

from dataclasses import dataclass
from html import escape

import numpy as np
import torch
from scipy.spatial import cKDTree


@dataclass
class Attention:
    """Where a model looks: Q queries, G groups of points.

    Args:
        center: (G, 3) of the groups.
        groups: (Q, G), mean over the heads and layers of the cross-attention, experts mixed by their weights; a query's
            attention to all groups and to the cls token adds up to 1.
        experts: (number of the expert, weight of the router), the largest first.
    """

    center: np.ndarray
    groups: np.ndarray
    experts: list[tuple[int, float]]


def measure_attention(model, cloud: np.ndarray) -> Attention:
    """Attention of the Q-Former to a normalized cloud (N, 6)."""
    with torch.inference_mode():
        features = model.get_point_features(torch.from_numpy(cloud)[None].to(model.device), output_attentions=True)
    experts, weights = features.experts[0], features.router_weights[0].float()
    shares = weights[experts] / weights.sum()  # (S,)
    of_queries = torch.stack(features.cross_attentions)[:, 0].float().mean((0, 1))  # (S*Q, 1+G)
    of_experts = of_queries.unflatten(0, (len(experts), -1))  # (S, Q, 1+G)
    mixed = torch.einsum("s,sqg->qg", shares, of_experts)[:, 1:]  # without the cls token
    chosen = list(zip(experts.tolist(), weights[experts].tolist(), strict=True))
    return Attention(features.center[0].cpu().numpy(), mixed.cpu().numpy(), chosen)


def draw_page(name: str, answer: str, cloud: np.ndarray, attention: Attention) -> str:
    """The page: a title, the experts, and the cloud with a slider over the queries."""
    import plotly.graph_objects as go

    num_queries, num_groups = attention.groups.shape
    at_points = spread(attention, cloud[:, :3]) * num_groups  # 1: as much as all groups on average
    rgb = [f"rgb({r},{g},{b})" for r, g, b in np.round(255 * cloud[:, 3:]).astype(int)]
    scale = {"colorscale": "Viridis", "showscale": True, "cmin": 0}
    views = [("colors", rgb, False), ("all queries", at_points.mean(0), True)]
    views += [(str(index + 1), at_points[index], True) for index in range(num_queries)]
    steps = []
    for label, values, is_attention in views:
        colors = values if not is_attention else np.round(values, 3).tolist()
        largest = max(colors) if is_attention else 1
        change = {"marker.color": [colors], "marker.showscale": is_attention, "marker.cmax": largest}
        steps.append({"label": label, "method": "restyle", "args": [change]})
    bar = {
        "title": {"text": "attention / mean", "side": "top"},
        "orientation": "h",
        "y": 1,
        "thickness": 12,
        "len": 0.6,
    }
    marker = {"size": 2, "color": rgb} | scale | {"showscale": False, "colorbar": bar}
    # The page turns objects about its z axis, so y, which points up in the cloud, is drawn as z.
    x, y, z = cloud[:, 0], -cloud[:, 2], cloud[:, 1]
    figure = go.Figure(go.Scatter3d(x=x, y=y, z=z, mode="markers", marker=marker, hoverinfo="skip"))
    axes = {f"{name}axis": {"visible": False} for name in "xyz"}
    camera = {"eye": {"x": 1.2, "y": -1.2, "z": 0.8}}
    figure.update_layout(
        scene=axes | {"aspectmode": "data", "camera": camera, "dragmode": "turntable"},
        sliders=[{"steps": steps, "currentvalue": {"prefix": "query: "}}],
        margin={"l": 30, "r": 30, "t": 60, "b": 30},
    )
    drawing = figure.to_html(
        full_html=False,
        include_plotlyjs=True,
        default_height="min(75vh, 110vw)",
        config={"responsive": True, "displaylogo": False, "displayModeBar": False},
    )
    rows = "".join(f"<tr><td>{number}</td><td>{weight:.3f}</td></tr>" for number, weight in attention.experts)
    return (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{escape(name)}</title></head>"
        f'<body style="font-family: sans-serif; margin: 1em"><h1>{escape(name)}</h1><p>{escape(answer)}</p>'
        f"<table><tr><th>expert</th><th>weight</th></tr>{rows}</table>"
        f"<p>Drag to turn. The slider chooses a query; a point has the attention to the groups of points around it, as a "
        f"multiple of the mean over all groups.</p>{drawing}</body></html>"
    )


def spread(attention: Attention, coord: np.ndarray, num_nearest: int = 3) -> np.ndarray:
    """Attention of each query at points (N, 3): (Q, N), from the nearest groups, weighted by inverse distance."""
    num_nearest = min(num_nearest, len(attention.center))
    distance, nearest = cKDTree(attention.center).query(coord, k=np.arange(1, num_nearest + 1))  # (N, k)
    weight = 1 / np.maximum(distance, 1e-6)
    weight /= weight.sum(1, keepdims=True)
    return (attention.groups[:, nearest] * weight).sum(-1)
